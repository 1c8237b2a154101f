//! Bringing an instance to rest, from the root down: read the rows that partitions are short of,
//! then tell the child nodes which keys their parents want now. Hydration is settling an instance
//! of which only the unread root exists; an advance settles what [`super::update`] touched.

use std::ops::ControlFlow;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use super::emit::Emission;
use super::engine::Budget;
use super::error::EngineError;
use super::instance::Instance;
use super::intern::Interner;
use super::mutant::{self, Mutant};
use super::partition::{Bound, Order};
use super::route::{RouteTableId, Router};
use super::shape::{Kind, NodeShape, Shape};
use super::source::{self, Ended, Fetch, Filter, Keys, Reach, Source};
use super::stats::Counters;
use crate::row::{Key, RowRef};
use crate::zql::order::position;

/// Keys read by one statement when many partitions are new. Bounds the length of the statement's
/// key list.
const FILL_BATCH: usize = 128;

/// What working on one instance needs of the engine.
pub(super) struct Work<'a> {
    pub(super) shape: &'a Shape,
    /// Router numbers of the nodes' tables.
    pub(super) tables: &'a [RouteTableId],
    pub(super) plan: u32,
    pub(super) slot: u32,
    pub(super) router: &'a mut Router,
    pub(super) interner: &'a mut Interner,
    pub(super) source: &'a mut dyn Source,
    pub(super) budget: &'a mut Budget,
    pub(super) counters: &'a mut Counters,
}

/// What a statement is given at least, however little is left of a slice. Tests have few rows.
const LEAST_FOR_SOURCE: u64 = if cfg!(test) { 4 } else { 250 };

impl Budget {
    pub(crate) fn spend(&mut self, units: u64) {
        self.0 = self.0.saturating_sub(units);
    }

    pub(super) fn spend_all(&mut self) {
        self.0 = 0;
    }

    /// Work of its own that a statement may do.
    pub(super) fn for_source(&self) -> u64 {
        self.0.max(LEAST_FOR_SOURCE)
    }
}

impl Instance {
    /// Goes on until everything is settled (true) or the budget is spent.
    pub(super) fn settle(
        &mut self,
        w: &mut Work<'_>,
        mut emission: Option<&mut Emission>,
    ) -> Result<bool, EngineError> {
        let shape = w.shape;
        for node in shape.nodes.iter().filter(|n| n.is_held()) {
            if !mutant::is(Mutant::FilledWhileSettling)
                && !self.work_off(node, w, emission.as_deref_mut())
            {
                return Ok(false);
            }
            let filled = self.fill(node, w)?;
            // Of a large partition what was read so far: not all at once in the end.
            if !self.propagate(node, w, emission.as_deref_mut())? || !filled {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads what partitions of a node are short of.
    fn fill(&mut self, node: &NodeShape, w: &mut Work<'_>) -> Result<bool, EngineError> {
        let n = usize::from(node.id.0);
        let (mut worked, mut together) = (false, true);
        loop {
            let state = &mut self.nodes[n];
            let singly = state.singly.pop();
            let is_single = singly.is_some();
            let Some(key) = singly.or_else(|| state.unfilled.pop()) else { return Ok(true) };
            if !self.needs_rows(node, &key) {
                continue;
            }
            if worked && w.budget.is_spent() {
                let state = &mut self.nodes[n];
                if is_single {
                    state.singly.push(key)
                } else {
                    state.unfilled.push(key)
                }
                return Ok(false);
            }
            worked = true;
            let together_now = together && !is_single;
            let batch = if together_now { self.take_batch(node, key, w) } else { vec![key] };
            match &*batch {
                [key] => {
                    if !self.fill_one(node, key, w)? {
                        // On its own again, even if it is still unread.
                        self.nodes[n].singly.push(key.clone());
                        if w.budget.is_spent() {
                            return Ok(false);
                        }
                    }
                }
                _ => together = self.fill_batch(node, &batch, w)?,
            }
        }
    }

    fn needs_rows(&self, node: &NodeShape, key: &Key) -> bool {
        self.nodes[usize::from(node.id.0)]
            .partitions
            .get(key)
            .is_some_and(|p| p.wanted > 0 && p.is_short(node.window))
    }

    /// `first`, with further unread partitions if they can be read together.
    fn take_batch(&mut self, node: &NodeShape, first: Key, w: &mut Work<'_>) -> Vec<Key> {
        let state = &mut self.nodes[usize::from(node.id.0)];
        let unread = |key: &Key, state: &super::instance::NodeState| {
            state.partitions.get(key).is_some_and(|p| p.wanted > 0 && p.bound == Bound::Start)
        };
        let mut batch = vec![first];
        if node.kind == Kind::Root || !unread(&batch[0], state) || !reads_together(node, w) {
            return batch;
        }
        while batch.len() < FILL_BATCH
            && let Some(key) = state.unfilled.pop()
        {
            if unread(&key, state) {
                if !batch.contains(&key) {
                    batch.push(key);
                }
            } else {
                state.unfilled.push(key);
                break;
            }
        }
        batch
    }

    /// Reads one partition from its bound on. False if the budget ended before the window was
    /// full; then something was taken, or the next statement will look at less of the table.
    pub(super) fn fill_one(
        &mut self,
        node: &NodeShape,
        key: &Key,
        w: &mut Work<'_>,
    ) -> Result<bool, EngineError> {
        let state = &mut self.nodes[usize::from(node.id.0)];
        let narrow = state.narrow.take().filter(|n| n.key == *key);
        let Some(partition) = state.partitions.get_mut(key) else { return Ok(true) };
        let most = match partition.bound {
            Bound::Start => first_rows(node),
            Bound::At(_) | Bound::End => node.window.capacity(),
        };
        let room = most.map(|c| c.saturating_sub(partition.rows().len()));
        let keys = [key.clone()];
        let from = match &partition.bound {
            Bound::At(position) => Some(source::Bound { position, inclusive: true }),
            Bound::Start | Bound::End => None,
        };
        let fetch = Fetch {
            plan: &w.shape.plan,
            node: node.id,
            params: &self.params,
            keys: (node.kind != Kind::Root).then_some(Keys { columns: &node.join, keys: &keys }),
            filter: Filter::Whole,
            from,
            before: None,
            limit: room.map(|r| r.saturating_add(1)),
            ordered: true,
        };
        if from.is_some() {
            w.counters.refills += 1
        } else {
            w.counters.fills += 1
        }
        let reach = match &narrow {
            Some(n) => n.reach(&fetch, w)?,
            None => Reach::End,
        };
        let read = Read::run(&fetch, &reach, room, node, w)?;
        let is_whole = read.ended == Ended::Whole;
        if !is_whole {
            w.budget.spend_all();
        }
        state.narrow = match (narrow, &reach, is_whole) {
            (None, _, true) => None,
            (None, _, false) if !read.rows.is_empty() => None,
            (None, _, false) => Some(Narrow::new(key)),
            (Some(n), reach, whole) => n.next(reach, whole),
        };
        if !is_whole && read.rows.is_empty() {
            return Ok(false);
        }
        if partition.touch() {
            state.touched.push(key.clone());
        }
        if !partition.append(&node.order, read.rows, read.bound) {
            return Err(EngineError::Invariant("rows behind a bound were resident"));
        }
        Ok(!read.more || !partition.is_short(node.window))
    }

    /// Reads many unread partitions by one statement, all rows of each. If it turns out to be too
    /// much for the budget, they are left unread, to be read one by one. False if so much was read
    /// in vain that others like these are better read one by one.
    fn fill_batch(
        &mut self,
        node: &NodeShape,
        keys: &[Key],
        w: &mut Work<'_>,
    ) -> Result<bool, EngineError> {
        let state = &mut self.nodes[usize::from(node.id.0)];
        let fetch = Fetch {
            plan: &w.shape.plan,
            node: node.id,
            params: &self.params,
            keys: Some(Keys { columns: &node.join, keys }),
            filter: Filter::Whole,
            from: None,
            before: None,
            limit: None,
            ordered: false,
        };
        w.counters.fills += 1;
        w.budget.spend(Budget::STATEMENT);
        // A slice may be overrun by this factor before a batch is given up.
        let allowed = (w.budget.0 / 4).max(keys.len() as u64).saturating_mul(8);
        let mut groups = Groups::new(&node.join, keys);
        let mut too_many = false;
        let units = w.budget.for_source().saturating_mul(4);
        let ended = w.source.fetch_within(&fetch, units, &mut |row| {
            if groups.rows.len() as u64 >= allowed {
                too_many = true;
                return ControlFlow::Break(());
            }
            groups.push(w.interner.intern(&node.table, row));
            ControlFlow::Continue(())
        })?;
        let read = groups.rows.len();
        w.budget.spend(read as u64);
        if too_many || ended == Ended::Interrupted {
            state.singly.extend_from_slice(keys);
            return Ok(first_rows(node).is_none());
        }
        let mut groups = groups.sorted(&node.order);
        for (key, number) in keys.iter().zip(0..) {
            let count = groups.as_slice().partition_point(|(group, _)| *group == number);
            let kept = first_rows(node).map_or(count, |most| most.min(count));
            // Exactly as long as it has to be: it is kept.
            let mut rows = Vec::with_capacity(kept);
            rows.extend(groups.by_ref().take(kept).map(|(_, row)| row));
            let mut bound = Bound::End;
            for (_, row) in groups.by_ref().take(count - kept) {
                if bound == Bound::End {
                    bound = Bound::At(position(&node.order, &row).into_iter().collect());
                }
                w.interner.release(node.table.id, row);
            }
            let Some(partition) = state.partitions.get_mut(key) else { continue };
            if partition.touch() {
                state.touched.push(key.clone());
            }
            if !partition.append(&node.order, rows, bound) {
                return Err(EngineError::Invariant("an unread partition had rows"));
            }
        }
        Ok(first_rows(node).is_none_or(|most| read <= keys.len() * (2 * most + 8)))
    }
}

/// What one statement read of a partition, from its bound on.
struct Read {
    rows: Vec<RowRef>,
    /// All rows before this are known now.
    bound: Bound,
    ended: Ended,
    /// Perhaps there are more.
    more: bool,
}

impl Read {
    /// Reads up to `reach`, until `room` is full, the budget is spent, or the source had to look
    /// at too many rows.
    fn run(
        fetch: &Fetch<'_>,
        reach: &Reach,
        room: Option<usize>,
        node: &NodeShape,
        w: &mut Work<'_>,
    ) -> Result<Read, EngineError> {
        let before = match reach {
            Reach::At(position) => Some(&**position),
            Reach::End | Reach::Unknown => None,
        };
        w.budget.spend(Budget::STATEMENT);
        let end = before.map_or(Bound::End, |p| Bound::At(p.into()));
        let mut read =
            Read { rows: Vec::new(), bound: end, ended: Ended::Whole, more: before.is_some() };
        let fetch = Fetch { before, ..fetch.clone() };
        let units = if *reach == Reach::Unknown { u64::MAX } else { w.budget.for_source() };
        read.ended = w.source.fetch_within(&fetch, units, &mut |row| {
            let cut_short = !read.rows.is_empty() && w.budget.is_spent();
            if cut_short || room.is_some_and(|room| read.rows.len() >= room) {
                read.bound = Bound::At(position(&node.order, &row).into_iter().collect());
                read.more = cut_short;
                return ControlFlow::Break(());
            }
            w.budget.spend(1);
            read.rows.push(w.interner.intern(&node.table, row));
            ControlFlow::Continue(())
        })?;
        if mutant::is(Mutant::InterruptedIsWhole) {
            read.ended = Ended::Whole;
        }
        if read.ended == Ended::Interrupted {
            // What comes behind the last row is not known: it is read again.
            read.more = true;
            if let Some(last) = read.rows.pop() {
                read.bound = Bound::At(position(&node.order, &last).into_iter().collect());
                w.interner.release(node.table.id, last);
            }
        }
        Ok(read)
    }
}

/// A partition of which no row was found with all the work that a statement is given: the next
/// ones look at so many rows of the table, in the node's order, and not further.
#[derive(Debug)]
pub(super) struct Narrow {
    key: Key,
    rows: usize,
}

/// Rows of a table that the first narrowed statement looks at, and the fewest. Tests have few.
const NARROW_ROWS: (usize, usize) = if cfg!(test) { (8, 2) } else { (2_048, 16) };

impl Narrow {
    fn new(key: &Key) -> Box<Narrow> {
        Box::new(Narrow { key: key.clone(), rows: NARROW_ROWS.0 })
    }

    /// How far the next statement goes. Without an index in the node's order nobody can tell: it
    /// must look at everything.
    fn reach(&self, fetch: &Fetch<'_>, w: &mut Work<'_>) -> Result<Reach, EngineError> {
        if self.rows < NARROW_ROWS.1 {
            return Ok(Reach::Unknown);
        }
        w.budget.spend(Budget::STATEMENT);
        Ok(w.source.reach(fetch, self.rows, w.budget.for_source())?)
    }

    /// For the next statement.
    fn next(mut self: Box<Narrow>, reach: &Reach, is_whole: bool) -> Option<Box<Narrow>> {
        self.rows = match (reach, is_whole) {
            (Reach::Unknown, _) => 0,
            (_, true) => self.rows.saturating_mul(2),
            (_, false) => self.rows / 4,
        };
        Some(self)
    }
}

/// Most rows that an unread partition is filled with. Those of a parent begin without an overshoot:
/// many never lose a row. One that does is refilled with it.
fn first_rows(node: &NodeShape) -> Option<usize> {
    if node.kind == Kind::Root { node.window.capacity() } else { node.window.limit }
}

/// Whether unread partitions of a node are read many at a time.
fn reads_together(node: &NodeShape, w: &mut Work<'_>) -> bool {
    first_rows(node).is_none_or(|most| w.source.few_per_key(&node.table, &node.join, most + 1))
}

/// Rows that one statement read for many keys, told apart by their key.
struct Groups<'a> {
    join: &'a [usize],
    numbers: HashMap<&'a Key, u32, FxBuildHasher>,
    /// Each row with the number of its key.
    rows: Vec<(u32, RowRef)>,
}

impl<'a> Groups<'a> {
    fn new(join: &'a [usize], keys: &'a [Key]) -> Groups<'a> {
        Groups { join, numbers: keys.iter().zip(0..).collect(), rows: Vec::new() }
    }

    fn push(&mut self, row: RowRef) {
        // An index returns the rows of a key one after the other: most look-ups are spared.
        let last = self
            .rows
            .last()
            .filter(|(_, last)| self.join.iter().all(|&c| last.values[c] == row.values[c]));
        let number = match last {
            Some((number, _)) => Some(*number),
            None => self.numbers.get(&row.project(self.join)).copied(),
        };
        self.rows.extend(number.map(|number| (number, row)));
    }

    /// By key, the rows of each in order.
    fn sorted(mut self, order: &Order) -> std::vec::IntoIter<(u32, RowRef)> {
        // Orders are total: no two rows of a key are equal.
        self.rows.sort_unstable_by(|(a, x), (b, y)| {
            a.cmp(b).then_with(|| crate::zql::order::compare_rows(order, x, y))
        });
        self.rows.into_iter()
    }
}
