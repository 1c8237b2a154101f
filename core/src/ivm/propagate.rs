//! What the settled rows of a partition mean: for subscribers (emission), and for the child nodes
//! (which keys their parents want now, and how often). The rest of settling, root first, is
//! [`super::settle`]'s.
//!
//! A large partition without a limit is worked off piece by piece. All that follows from a log is
//! a sum over its rows, so that they need not be netted first: each row that was added counts as
//! often as the partition did before, each that was removed counts that much less; and if the
//! partition counts otherwise now, the difference goes to all rows that are resident now.

use super::emit::{Emission, join_key};
use super::error::EngineError;
use super::instance::{Instance, NodeState, routed_by_join};
use super::mutant::{self, Mutant};
use super::partition::{Log, Partition, Settled};
use super::plan::NodeId;
use super::route::{Target, Who};
use super::settle::Work;
use super::shape::{Edge, NodeShape};
use super::watch::{self, Watch};
use crate::row::{Key, Row, RowRef};
use crate::zql::order::compare_rows;

/// Rows of a change above which it is worked off piece by piece. Tests have few rows, and shall
/// work off both ways.
const PIECE: usize = if cfg!(test) { 3 } else { 512 };

impl Instance {
    /// Settles the touched partitions of a node: emits what changed in view, drops what nobody
    /// wants, and passes the changes of keys and multiplicities on to the child nodes. False if
    /// the budget ended before the last one; something was settled then.
    pub(super) fn propagate(
        &mut self,
        node: &NodeShape,
        w: &mut Work<'_>,
        mut emission: Option<&mut Emission>,
    ) -> Result<bool, EngineError> {
        let n = usize::from(node.id.0);
        let (above, below) = self.nodes.split_at_mut(n + 1);
        let Some(state) = above.last_mut() else { return Ok(true) };
        let mut worked = false;
        loop {
            if worked && w.budget.is_spent() {
                return Ok(state.settling.is_none() && state.touched.is_empty());
            }
            worked = true;
            if state.settling.is_some() {
                let emission = emission.as_deref_mut();
                let (signature, watch) = (&mut self.signature, &mut self.watch);
                let to = Told { node, below, emission, signature, watch };
                Settling::work_off(state, to, w);
                continue;
            }
            let Some(key) = state.touched.pop() else { return Ok(true) };
            let Some(partition) = state.partitions.get_mut(&key) else { continue };
            if partition.wanted < 0 || partition.mult < 0 {
                return Err(EngineError::Invariant("a partition is wanted less than never"));
            }
            if partition.wanted == 0 {
                partition.clear();
            }
            if node.window.limit.is_none() && partition.changed_rows() > PIECE {
                let mult = partition.mult;
                if let Some(log) = partition.take_log() {
                    self.resident = (self.resident + log.added.len()) - log.removed.len();
                    state.settling = Some(Box::new(Settling::new(key, *log, mult)));
                }
                continue;
            }
            let Some(settled) = partition.settle(&node.order, node.window) else { continue };
            self.resident = (self.resident + settled.entered.len()) - settled.left.len();
            let mult = partition.mult;
            let change =
                Change { settled: &settled, mult, kept: kept(partition, node, &settled, mult) };
            state.note_parents(node, &settled);
            change.emit(node, emission.as_deref_mut(), &mut self.signature, &mut self.watch);
            let work = change.units();
            for edge in &node.related {
                change.pass_on(edge, w, &mut below[usize::from(edge.child.0) - n - 1], true);
            }
            for edge in &node.leaves {
                if w.shape.node(edge.child).is_held() {
                    change.pass_on(edge, w, &mut below[usize::from(edge.child.0) - n - 1], false);
                }
            }
            w.budget.spend(work);
            drop_unwanted(node, &key, state, w);
            drop((settled.hidden, settled.shown));
            for row in settled.left {
                w.interner.release(node.table.id, row);
            }
        }
    }

    /// Goes on with the large partition of a node that is being worked off: nothing may enter or
    /// leave it meanwhile. True when it is through.
    pub(super) fn work_off(
        &mut self,
        node: &NodeShape,
        w: &mut Work<'_>,
        emission: Option<&mut Emission>,
    ) -> bool {
        let (above, below) = self.nodes.split_at_mut(usize::from(node.id.0) + 1);
        let Some(state) = above.last_mut() else { return true };
        if state.settling.is_none() {
            return true;
        }
        let (signature, watch) = (&mut self.signature, &mut self.watch);
        Settling::work_off(state, Told { node, below, emission, signature, watch }, w)
    }

    /// Works off what is left of large partitions, whatever it costs: before an update.
    pub(super) fn work_off_all(&mut self, w: &mut Work<'_>) {
        let shape = w.shape;
        for node in shape.nodes.iter().filter(|n| n.is_held()) {
            while !self.work_off(node, w, None) {}
        }
    }
}

/// Drops a settled partition that nobody wants, unless something came up meanwhile.
fn drop_unwanted(node: &NodeShape, key: &Key, state: &mut NodeState, w: &mut Work<'_>) {
    if state.partitions.get(key).is_none_or(|p| p.wanted != 0 || p.is_touched()) {
        return;
    }
    state.partitions.remove(key);
    if routed_by_join(node) {
        let to = Target { plan: w.plan, node: node.id, who: Who::Instance(w.slot) };
        w.router.remove(w.tables[usize::from(node.id.0)], &node.join, key, to);
    }
}

/// Who is told of a row of a large partition.
struct Told<'a> {
    node: &'a NodeShape,
    /// The nodes behind it.
    below: &'a mut [NodeState],
    emission: Option<&'a mut Emission>,
    signature: &'a mut u64,
    watch: &'a mut Option<Box<Watch>>,
}

impl Told<'_> {
    /// The row counts `mult` more, and wants its child partitions `wanted` times more.
    fn row(&mut self, row: &RowRef, mult: i64, wanted: i64, w: &mut Work<'_>) {
        match &mut self.emission {
            Some(emission) => emission.add(self.node, row, mult),
            None => {
                if mult & 1 == 1 {
                    *self.signature ^= self.node.row_name.hash(row);
                }
                watch::shown(self.watch, self.node.id, row, mult);
            }
        }
        let first = self.node.id.0 + 1;
        for edge in self.node.related.iter().chain(&self.node.leaves) {
            if !w.shape.node(edge.child).is_held() {
                continue;
            }
            if let Some(key) = join_key(row, &edge.parent_columns) {
                let child = &mut self.below[usize::from(edge.child.0 - first)];
                want(edge.child, key, mult, wanted, child, w);
            }
        }
        w.budget.spend(1);
    }
}

/// The log of a large partition without a limit, on its way: see the module.
#[derive(Debug)]
pub(super) struct Settling {
    key: Key,
    /// Multiplicity before, and now.
    before: i64,
    now: i64,
    added: std::vec::IntoIter<RowRef>,
    removed: std::vec::IntoIter<RowRef>,
    /// Resident rows that know of the new multiplicity.
    counted_anew: usize,
}

impl Settling {
    fn new(key: Key, log: Log, now: i64) -> Settling {
        let (added, removed) = (log.added.into_iter(), log.removed.into_iter());
        Settling { key, before: log.mult, now, added, removed, counted_anew: 0 }
    }

    /// The rows that it still holds.
    pub(super) fn into_rows(self) -> impl Iterator<Item = RowRef> {
        self.added.chain(self.removed)
    }

    /// Works off the large partition of a node: a piece at least, until all is done (true) or
    /// the budget is spent.
    fn work_off(state: &mut NodeState, mut to: Told<'_>, w: &mut Work<'_>) -> bool {
        while let Some(mut settling) = state.settling.take() {
            if settling.step(state, &mut to, w) {
                drop_unwanted(to.node, &settling.key, state, w);
                return true;
            }
            state.settling = Some(settling);
            if w.budget.is_spent() {
                return false;
            }
        }
        true
    }

    /// Works off a piece. True when it was the last one.
    fn step(&mut self, state: &mut NodeState, to: &mut Told<'_>, w: &mut Work<'_>) -> bool {
        let table = to.node.table.id;
        // Those that enter first: no partition is dropped because a row moves within this one.
        for row in self.added.by_ref().take(PIECE) {
            to.row(&row, self.before, 1, w);
            state.note_parent(to.node, &self.key, &row, true);
            w.interner.release(table, row);
        }
        if self.added.len() > 0 {
            return false;
        }
        for row in self.removed.by_ref().take(PIECE) {
            to.row(&row, -self.before, -1, w);
            state.note_parent(to.node, &self.key, &row, false);
            w.interner.release(table, row);
        }
        if self.removed.len() > 0 {
            return false;
        }
        if self.now == self.before || mutant::is(Mutant::CountedAnewForgotten) {
            return true;
        }
        let Some(partition) = state.partitions.get(&self.key) else { return true };
        for row in partition.rows().iter_from(self.counted_anew).take(PIECE) {
            to.row(row, self.now - self.before, 0, w);
        }
        self.counted_anew += PIECE;
        self.counted_anew >= partition.rows().len()
    }
}

/// Rows in view before and now, if their multiplicity changed.
fn kept(partition: &Partition, node: &NodeShape, settled: &Settled, mult: i64) -> Vec<RowRef> {
    if mult == settled.mult_before {
        return Vec::new();
    }
    let shown = |row: &RowRef| {
        settled.shown.binary_search_by(|s| compare_rows(&node.order, s, row)).is_ok()
    };
    partition.visible(node.window).filter(|row| !shown(row)).cloned().collect()
}

/// The change of one partition.
struct Change<'a> {
    settled: &'a Settled,
    mult: i64,
    kept: Vec<RowRef>,
}

impl Change<'_> {
    fn units(&self) -> u64 {
        let s = self.settled;
        1 + (s.left.len() + s.entered.len() + self.kept.len()) as u64 / 2
    }

    /// Each row in view with the change of its count.
    fn visible(&self) -> impl Iterator<Item = (&RowRef, i64)> {
        let before = self.settled.mult_before;
        let hidden = self.settled.hidden.iter().map(move |r| (r, -before));
        let shown = self.settled.shown.iter().map(move |r| (r, self.mult));
        hidden.chain(shown).chain(self.kept.iter().map(move |r| (r, self.mult - before)))
    }

    fn emit(
        &self,
        node: &NodeShape,
        emission: Option<&mut Emission>,
        signature: &mut u64,
        watch: &mut Option<Box<Watch>>,
    ) {
        match emission {
            Some(emission) => {
                self.visible().for_each(|(row, delta)| emission.add(node, row, delta));
            }
            None => {
                for (row, delta) in self.visible() {
                    if delta & 1 == 1 {
                        *signature ^= node.row_name.hash(row);
                    }
                    watch::shown(watch, node.id, row, delta);
                }
            }
        }
    }

    /// Tells a child node. Partitions of related edges are wanted by visible parents, those of
    /// EXISTS edges by resident ones; only visible parents give multiplicity.
    fn pass_on(&self, edge: &Edge, w: &mut Work<'_>, child: &mut NodeState, related: bool) {
        let s = self.settled;
        let mut tell = |row: &Row, mult: i64, wanted: i64| {
            let Some(key) = join_key(row, &edge.parent_columns) else { return };
            want(edge.child, key, mult, wanted, child, w);
        };
        if related && mutant::is(Mutant::CountOvershoot) {
            s.entered.iter().for_each(|r| tell(r, self.mult, 1));
            s.left.iter().for_each(|r| tell(r, -s.mult_before, -1));
        } else if related {
            s.shown.iter().for_each(|r| tell(r, self.mult, 1));
            s.hidden.iter().for_each(|r| tell(r, -s.mult_before, -1));
        } else {
            let visible = mutant::is(Mutant::EvidenceForVisible);
            let (entered, left) =
                if visible { (&s.shown, &s.hidden) } else { (&s.entered, &s.left) };
            entered.iter().for_each(|r| tell(r, 0, 1));
            left.iter().for_each(|r| tell(r, 0, -1));
            s.shown.iter().for_each(|r| tell(r, self.mult, 0));
            s.hidden.iter().for_each(|r| tell(r, -s.mult_before, 0));
        }
        let delta = self.mult - s.mult_before;
        self.kept.iter().for_each(|r| tell(r, delta, 0));
    }
}

/// Changes how much a partition is wanted; makes it if it is new.
fn want(node: NodeId, key: Key, mult: i64, wanted: i64, state: &mut NodeState, w: &mut Work<'_>) {
    if mult == 0 && wanted == 0 {
        return;
    }
    let shape = w.shape.node(node);
    if let Some(partition) = state.partitions.get_mut(&key) {
        if partition.touch() {
            state.touched.push(key.clone());
        }
        partition.mult += mult;
        let wanted_anew = partition.wanted == 0 && !mutant::is(Mutant::WantedAnewForgotten);
        partition.wanted += wanted;
        if wanted_anew && partition.is_short(shape.window) {
            // Filling passed it over while nobody wanted it.
            state.unfilled.push(key);
        }
        return;
    }
    if routed_by_join(shape) {
        let plan = w.plan;
        let to = Target { plan, node, who: Who::Instance(w.slot) };
        w.router.add(w.tables[usize::from(node.0)], &shape.join, key.clone(), to);
    }
    let mut partition = Partition::new();
    partition.mult = mult;
    partition.wanted = wanted;
    state.unfilled.push(key.clone());
    state.touched.push(key.clone());
    state.partitions.insert(key, partition);
}
