//! The first half of an advance of one instance: find every row whose membership may differ
//! (*dirty* rows), leaves before parents, and bring the partitions to the new version, each as a
//! set and once. Reading rows that became missing, and everything that follows for child nodes,
//! is [`super::settle`]'s.
//!
//! Dirty rows of a node are the changed rows that its weak predicate matches before or after (the
//! router delivers them), and the rows that share a join key with a dirty row of one of its
//! EXISTS bodies: resident ones always; others if they may qualify now. In the body of an EXISTS
//! or NOT EXISTS, where a row that nobody holds and that *stops* qualifying matters as well, all
//! that the weak predicate matches.

use std::ops::ControlFlow;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use rustc_hash::FxBuildHasher;

use super::change_set::NetChange;
use super::emit::{NetTables, join_key};
use super::engine::Budget;
use super::error::EngineError;
use super::instance::{Instance, NodeState};
use super::mutant::{self, Mutant};
use super::partition::Bound;
use super::plan::{ExistsEdge, NodeId, Param, Role};
use super::settle::Work;
use super::shape::{Edge, Kind, NodeShape, Shape};
use super::source::{Fetch, Filter, Keys, SourceError};
use crate::row::{Key, Row};
use crate::zql::predicate;

/// Keys per statement of a parent search; bounds the statement's key list.
const SEARCH_BATCH: usize = 128;

/// A changed row that reached an instance: the node, and the change's place in the net table of
/// the node's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Hit {
    pub(super) node: NodeId,
    pub(super) change: u32,
}

/// Rows of a node to be judged anew, by identity key.
#[derive(Debug, Default)]
struct Dirty {
    rows: Vec<NetChange>,
    known: HashSet<Key, FxBuildHasher>,
}

impl Dirty {
    fn add(&mut self, node: &NodeShape, change: NetChange) {
        let Some(row) = change.old.as_ref().or(change.new.as_ref()) else { return };
        if self.known.insert(row.project(&node.table.primary_key)) {
            self.rows.push(change);
        }
    }

    fn add_unchanged(&mut self, node: &NodeShape, row: &Arc<Row>) {
        self.add(node, NetChange { old: Some(Arc::clone(row)), new: Some(Arc::clone(row)) });
    }
}

/// An instance on its way to the new version.
#[derive(Debug)]
pub(super) struct Update {
    /// Sorted by node.
    hits: Vec<Hit>,
    /// Per node.
    dirty: Vec<Dirty>,
    /// Nodes still to do: those below this number.
    todo: usize,
    /// Answers of point checks at the new version.
    points: HashMap<(NodeId, Key), bool, FxBuildHasher>,
}

impl Update {
    pub(super) fn new(mut hits: Vec<Hit>, nodes: usize) -> Update {
        hits.sort_unstable();
        hits.dedup();
        let dirty = (0..nodes).map(|_| Dirty::default()).collect();
        Update { hits, dirty, todo: nodes, points: HashMap::default() }
    }

    /// Works off nodes, the last first (children have larger numbers). True when done.
    pub(super) fn step(
        &mut self,
        instance: &mut Instance,
        changes: &NetTables,
        w: &mut Work<'_>,
    ) -> Result<bool, EngineError> {
        while self.todo > 0 {
            self.todo -= 1;
            let shape = w.shape;
            let node = &shape.nodes[self.todo];
            self.node(node, instance, changes, w)?;
            if w.budget.is_spent() && self.todo > 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn node(
        &mut self,
        node: &NodeShape,
        instance: &mut Instance,
        changes: &NetTables,
        w: &mut Work<'_>,
    ) -> Result<(), EngineError> {
        let n = usize::from(node.id.0);
        let mut dirty = Dirty::default();
        let from = self.hits.partition_point(|h| h.node < node.id);
        if let Some(table) = changes.get(&w.tables[n]) {
            for hit in self.hits[from..].iter().take_while(|h| h.node == node.id) {
                dirty.add(node, table.changes[hit.change as usize].clone());
            }
        }
        for edge in &node.leaves {
            let keys = self.changed_keys(edge);
            if keys.is_empty() {
                continue;
            }
            if node.is_held() && !mutant::is(Mutant::ResidentForgotten) {
                resident(node, edge, &keys, &instance.nodes[n], &mut dirty);
            }
            search(node, edge, &keys, instance, &mut dirty, w)?;
        }
        if node.is_held() && !dirty.rows.is_empty() {
            self.partitions(node, &dirty, instance, w)?;
        }
        self.dirty[n] = dirty;
        Ok(())
    }

    /// Join keys of the old and new versions of a body's dirty rows.
    fn changed_keys(&self, edge: &Edge) -> Vec<Key> {
        let rows = &self.dirty[usize::from(edge.child.0)].rows;
        let sides = rows.iter().flat_map(|c| c.old.iter().chain(&c.new));
        let mut keys: Vec<Key> =
            sides.filter_map(|row| join_key(row, &edge.child_columns)).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Brings a node's partitions to the new version.
    fn partitions(
        &mut self,
        node: &NodeShape,
        dirty: &Dirty,
        instance: &mut Instance,
        w: &mut Work<'_>,
    ) -> Result<(), EngineError> {
        let n = usize::from(node.id.0);
        // All leave before any enters.
        let mut changed = take_out(node, dirty, &mut instance.nodes[n]);
        if mutant::is(Mutant::RefillEarly) {
            for key in &changed {
                if instance.nodes[n].partitions[key].is_short(node.window) {
                    instance.fill_one(node, key, w)?;
                }
            }
        }
        self.put_in(node, dirty, instance, &mut changed, w)?;
        w.budget.spend(dirty.rows.len() as u64);
        changed.sort_unstable();
        changed.dedup();
        let state = &mut instance.nodes[n];
        for key in changed {
            let Some(partition) = state.partitions.get_mut(&key) else { continue };
            partition.cut(&node.order, node.window);
            if partition.is_short(node.window) {
                state.unfilled.push(key);
            }
        }
        Ok(())
    }

    /// Puts each dirty row in that qualifies now and lies before its partition's bound.
    fn put_in(
        &mut self,
        node: &NodeShape,
        dirty: &Dirty,
        instance: &mut Instance,
        changed: &mut Vec<Key>,
        w: &mut Work<'_>,
    ) -> Result<(), EngineError> {
        let first = usize::from(node.id.0) + 1;
        let (above, below) = instance.nodes.split_at_mut(first);
        let Some(state) = above.last_mut() else { return Ok(()) };
        let mut judge = Judge { params: &instance.params, below, first, points: &mut self.points };
        for new in dirty.rows.iter().filter_map(|c| c.new.as_ref()) {
            let key = new.project(&node.join);
            let Some(partition) = state.partitions.get_mut(&key) else { continue };
            if !partition.covers(&node.order, new) || !judge.qualifies(node, new, w)? {
                continue;
            }
            SourceError::check_deliverable(&node.table, new)?;
            if partition.touch() {
                state.touched.push(key.clone());
            }
            let row = w.interner.intern(&node.table, Arc::clone(new));
            if !partition.insert(&node.order, row) {
                return Err(EngineError::Invariant("a row entered a window twice"));
            }
            changed.push(key);
        }
        Ok(())
    }
}

/// Takes all dirty rows out of a node's partitions, by their old versions; returns the keys of
/// the partitions that had any.
fn take_out(node: &NodeShape, dirty: &Dirty, state: &mut NodeState) -> Vec<Key> {
    let mut changed = Vec::new();
    for old in dirty.rows.iter().filter_map(|c| c.old.as_ref()) {
        let key = old.project(&node.join);
        let Some(partition) = state.partitions.get_mut(&key) else { continue };
        if partition.index_of(&node.order, old).is_none() {
            continue;
        }
        if partition.touch() {
            state.touched.push(key.clone());
        }
        partition.remove(&node.order, old);
        changed.push(key);
    }
    changed
}

/// Resident rows of a node with one of the join keys of a leaf.
fn resident(node: &NodeShape, edge: &Edge, keys: &[Key], state: &NodeState, dirty: &mut Dirty) {
    let wanted = |row: &Row| {
        keys.binary_search_by(|key| {
            let columns = edge.parent_columns.iter();
            let mut pairs = key.iter().zip(columns.map(|&c| &row.values[c]));
            pairs
                .find_map(|(a, b)| Some(a.compare(b)).filter(|o| o.is_ne()))
                .unwrap_or(std::cmp::Ordering::Equal)
        })
        .is_ok()
    };
    for partition in state.partitions.values() {
        for row in partition.rows().iter().filter(|r| wanted(r)) {
            dirty.add_unchanged(node, row);
        }
    }
}

/// Rows of a node that nobody holds, with one of the join keys of a leaf.
fn search(
    node: &NodeShape,
    edge: &Edge,
    keys: &[Key],
    instance: &Instance,
    dirty: &mut Dirty,
    w: &mut Work<'_>,
) -> Result<(), EngineError> {
    let state = &instance.nodes[usize::from(node.id.0)];
    let mut before = None;
    match node.kind {
        Kind::Root => match state.partitions.get(&Key::new()).map(|p| &p.bound) {
            // Nothing can lie before the bound.
            None | Some(Bound::Start) => return Ok(()),
            Some(Bound::At(position)) => before = Some(&**position),
            Some(Bound::End) => {}
        },
        Kind::Related if state.partitions.is_empty() => return Ok(()),
        Kind::Related | Kind::Evidence | Kind::Bare => {}
        Kind::Dead => return Ok(()),
    }
    let filter = search_filter(node, w.shape);
    let mut found = Vec::new();
    for keys in keys.chunks(SEARCH_BATCH) {
        let fetch = Fetch {
            plan: &w.shape.plan,
            node: node.id,
            params: &instance.params,
            keys: Some(Keys { columns: &edge.parent_columns, keys }),
            filter,
            from: None,
            before,
            limit: None,
            ordered: false,
        };
        match filter {
            Filter::Whole => w.counters.parent_lookups += 1,
            Filter::Weak | Filter::Any => w.counters.weak_searches += 1,
        }
        w.budget.spend(Budget::STATEMENT);
        w.source.fetch(&fetch, &mut |row| {
            w.budget.spend(1);
            found.push(row);
            ControlFlow::Continue(())
        })?;
    }
    for row in found {
        if !mutant::is(Mutant::WeakForOneLeaf) || one_leaf_true(node, edge, instance, &row, w)? {
            dirty.add_unchanged(node, &row);
        }
    }
    Ok(())
}

/// Which rows a search must find: see the module.
fn search_filter(node: &NodeShape, shape: &Shape) -> Filter {
    let weak = if mutant::is(Mutant::WholeEverywhere) {
        false
    } else if mutant::is(Mutant::WeakByParity) {
        node.below_leaf && negations(node, shape) % 2 == 1
    } else if mutant::is(Mutant::EvidenceForVisible) {
        node.below_leaf && shape.plan.node(node.id).below_not_exists
    } else {
        node.below_leaf
    };
    if weak { Filter::Weak } else { Filter::Whole }
}

/// NOT EXISTS edges above a node, up to the root or a related edge.
fn negations(node: &NodeShape, shape: &Shape) -> usize {
    let (mut count, mut at) = (0, node.id);
    while let Role::Exists { parent, negated } = shape.plan.node(at).role {
        count += usize::from(negated);
        at = parent;
    }
    count
}

/// Whether a row of a body would qualify if only the given leaf were true (a wrong variant).
fn one_leaf_true(
    node: &NodeShape,
    edge: &Edge,
    instance: &Instance,
    row: &Row,
    w: &mut Work<'_>,
) -> Result<bool, EngineError> {
    let first = usize::from(node.id.0) + 1;
    let mut points = HashMap::default();
    let mut judge = Judge {
        params: &instance.params,
        below: &instance.nodes[first..],
        first,
        points: &mut points,
    };
    let condition = &w.shape.plan.node(node.id).condition;
    predicate::try_evaluate(condition, row, &instance.params, &mut |e| {
        Ok(e.child == edge.child || judge.has_child(e, row, w)? != e.negated)
    })
}

/// Decides whether a row qualifies at the new version.
struct Judge<'a> {
    params: &'a [Param],
    /// States of the nodes from `first` on; they are at the new version.
    below: &'a [NodeState],
    first: usize,
    points: &'a mut HashMap<(NodeId, Key), bool, FxBuildHasher>,
}

impl Judge<'_> {
    fn qualifies(
        &mut self,
        node: &NodeShape,
        row: &Row,
        w: &mut Work<'_>,
    ) -> Result<bool, EngineError> {
        let planned = w.shape.plan.node(node.id);
        if !predicate::weak(planned, row, self.params) {
            return Ok(false);
        }
        if node.leaves.is_empty() {
            return Ok(true);
        }
        predicate::try_evaluate(&planned.condition, row, self.params, &mut |edge| {
            Ok(self.has_child(edge, row, w)? != edge.negated)
        })
    }

    /// Whether the body of a leaf has a row for this parent row.
    fn has_child(
        &mut self,
        edge: &ExistsEdge,
        row: &Row,
        w: &mut Work<'_>,
    ) -> Result<bool, EngineError> {
        let Some(key) = join_key(row, &edge.parent_columns) else { return Ok(false) };
        let body = usize::from(edge.child.0);
        if let Some(partition) = self.below[body - self.first].partitions.get(&key) {
            if !partition.rows().is_empty() {
                return Ok(true);
            }
            if partition.bound == Bound::End || mutant::is(Mutant::IncompleteIsEmpty) {
                return Ok(false);
            }
        }
        if let Some(&known) = self.points.get(&(edge.child, key.clone())) {
            return Ok(known);
        }
        let keys = [key];
        let fetch = Fetch {
            plan: &w.shape.plan,
            node: edge.child,
            params: self.params,
            keys: Some(Keys { columns: &edge.child_columns, keys: &keys }),
            filter: Filter::Whole,
            from: None,
            before: None,
            limit: Some(1),
            ordered: false,
        };
        w.counters.point_checks += 1;
        w.budget.spend(Budget::STATEMENT);
        let found = w.source.exists(&fetch)?;
        let [key] = keys;
        self.points.insert((edge.child, key), found);
        Ok(found)
    }
}
