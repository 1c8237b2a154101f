//! The first half of an advance of one instance: find every row whose membership may differ
//! (*dirty* rows), leaves before parents, and bring the partitions to the new version, each as a
//! set and once. Reading rows that became missing, and everything that follows for child nodes,
//! is [`super::settle`]'s.

use std::sync::Arc;

use super::change_set::NetChange;
use super::dirty::{Dirty, Hit, HitRow, JoinKeys, Resident, SEARCH_BATCH, Search, search_filter};
use super::emit::{NetTables, join_key};
use super::engine::Budget;
use super::error::EngineError;
use super::garbage::Garbage;
use super::instance::{Instance, NodeState, Phase};
use super::lead::Led;
use super::mutant::{self, Mutant};
use super::partition::{Bound, Partition};
use super::plan::{ExistsEdge, NodeId, Param};
use super::settle::Work;
use super::shape::{Edge, Kind, NodeShape, Shape};
use super::shards::ShardMap;
use super::source::{Fetch, Filter, Keys, Part, SourceError};
use super::stack::Stack;
use crate::row::{Key, Row, RowRef};
use crate::zql::predicate;

/// The rows of an advance.
pub(super) struct Input<'a> {
    pub(super) changes: &'a NetTables,
    /// Rows found for whole groups.
    pub(super) found: &'a [RowRef],
}

/// An instance on its way to the new version.
#[derive(Debug)]
pub(super) struct Update {
    /// Sorted by node.
    hits: Vec<Hit>,
    /// Dirty rows of bodies that were found for whole groups.
    led: Vec<Arc<Led>>,
    /// Owners of bodies of which changed rows were led to this instance alone.
    own: Vec<Option<NodeId>>,
    /// Per node.
    dirty: Vec<Dirty>,
    /// Nodes still to do: those below this number.
    todo: usize,
    /// How far the search for the dirty rows of the last of them is.
    find: Option<Box<Find>>,
    /// How far its partitions are, once they are known.
    apply: Option<Apply>,
    /// Answers of point checks at the new version.
    points: ShardMap<(NodeId, Key), bool>,
    /// What is done with.
    garbage: Garbage,
}

/// How far the search for the dirty rows of a node is.
#[derive(Debug, Default)]
struct Find {
    dirty: Dirty,
    /// Hits of the node, and rows found for the whole group, that were looked at.
    hits: usize,
    led: usize,
    /// The leaf whose parents are looked for.
    leaf: usize,
    parents: Parents,
}

/// How far the search for the parents of a leaf's dirty rows is.
#[derive(Debug, Default)]
struct Parents {
    keys: JoinKeys,
    resident: Resident,
    resident_found: bool,
    /// Keys that were searched for among the rows that are not resident, and how far the search
    /// for the next ones is.
    searched: usize,
    part: Part,
}

/// How far dirty rows are brought to the partitions of a node.
#[derive(Debug, Default)]
struct Apply {
    taken_out: usize,
    put_in: usize,
    /// Keys of the partitions that changed, but for the last one; perhaps twice.
    changed: Stack<Key>,
    /// The last one: mostly it is the only one.
    last_changed: Option<Key>,
}

impl Apply {
    fn note(&mut self, key: Key) {
        if self.last_changed.as_ref() != Some(&key)
            && let Some(before) = self.last_changed.replace(key)
        {
            self.changed.push(before);
        }
    }

    fn next_changed(&mut self) -> Option<Key> {
        self.last_changed.take().or_else(|| self.changed.pop())
    }
}

impl Update {
    pub(super) fn new(mut hits: Vec<Hit>, led: Vec<Arc<Led>>, shape: &Shape) -> Update {
        hits.sort_unstable();
        hits.dedup();
        let changed = hits.iter().filter(|h| matches!(h.row, HitRow::Changed(_)));
        let mut own: Vec<_> =
            changed.map(|h| shape.node(h.node).owner).filter(Option::is_some).collect();
        own.dedup();
        let nodes = shape.nodes.len();
        let dirty = (0..nodes).map(|_| Dirty::default()).collect();
        Update {
            hits,
            led,
            own,
            dirty,
            todo: nodes,
            find: None,
            apply: None,
            points: ShardMap::default(),
            garbage: Garbage::default(),
        }
    }

    /// Works off nodes, the last first (children have larger numbers). True when done.
    pub(super) fn step(
        &mut self,
        instance: &mut Instance,
        input: &Input<'_>,
        w: &mut Work<'_>,
    ) -> Result<bool, EngineError> {
        // Of an instance that hydrates: it was interrupted.
        instance.work_off_all(w);
        while let Some(n) = self.todo.checked_sub(1) {
            let shape = w.shape;
            let node = &shape.nodes[n];
            let mut apply = match self.apply.take() {
                Some(apply) => apply,
                None => {
                    let mut find = self.find.take().unwrap_or_default();
                    if !self.node(node, &mut find, instance, input, w)? {
                        self.find = Some(find);
                        return Ok(false);
                    }
                    self.dirty[n] = find.dirty;
                    Apply::default()
                }
            };
            let dirty = std::mem::take(&mut self.dirty[n]);
            let done = !node.is_held() || self.partitions(node, &dirty, &mut apply, instance, w)?;
            self.dirty[n] = dirty;
            if !done {
                self.apply = Some(apply);
                return Ok(false);
            }
            self.todo = n;
            if w.budget.is_spent() && n > 0 {
                return Ok(false);
            }
        }
        for dirty in self.dirty.drain(..) {
            dirty.discard(&mut self.garbage);
        }
        self.garbage.add_keys(std::mem::take(&mut self.points));
        Ok(self.garbage.give_back(w.budget))
    }

    /// Finds the dirty rows of a node. False if the budget ended before.
    fn node(
        &mut self,
        node: &NodeShape,
        find: &mut Find,
        instance: &mut Instance,
        input: &Input<'_>,
        w: &mut Work<'_>,
    ) -> Result<bool, EngineError> {
        let n = usize::from(node.id.0);
        let from = self.hits.partition_point(|h| h.node < node.id);
        let table = input.changes.get(&w.tables[n]);
        while let Some(hit) = self.hits.get(from + find.hits).filter(|h| h.node == node.id) {
            find.hits += 1;
            match (hit.row, table) {
                (HitRow::Changed(i), Some(t)) => {
                    find.dirty.add(node, t.changes[i as usize].clone());
                }
                (HitRow::Changed(_), None) => {}
                (HitRow::Found(i), _) => {
                    find.dirty.add_unchanged(node, &input.found[i as usize]);
                }
            }
            w.budget.spend(1);
            if w.budget.is_spent() {
                return Ok(false);
            }
        }
        if let Some(led) = self.led_by(node.owner)
            && node.is_held()
        {
            // Of what the whole group found, what this instance holds partitions for.
            let state = &instance.nodes[n];
            let holds = |row: &RowRef| state.partitions.contains_key(&row.project(&node.join));
            while let Some(change) = led.rows(node.id).get(find.led) {
                find.led += 1;
                if change.old.iter().chain(&change.new).any(holds) {
                    find.dirty.add(node, change.clone());
                }
                w.budget.spend(find.led as u64 & 1);
                if w.budget.is_spent() {
                    return Ok(false);
                }
            }
        }
        while let Some(edge) = node.leaves.get(find.leaf) {
            let owner = w.shape.node(edge.child).owner;
            // Of some the parents were found for the whole group.
            let is_led = self.led_by(owner).is_some() && !self.own.contains(&owner);
            if !is_led && !self.parents(node, edge, find, instance, w)? {
                return Ok(false);
            }
            find.leaf += 1;
            std::mem::take(&mut find.parents).keys.discard(&mut self.garbage);
        }
        Ok(true)
    }

    /// Finds the rows of a node that share a join key with a dirty row of a leaf. False if the
    /// budget ended before.
    fn parents(
        &mut self,
        node: &NodeShape,
        edge: &Edge,
        find: &mut Find,
        instance: &mut Instance,
        w: &mut Work<'_>,
    ) -> Result<bool, EngineError> {
        let Find { leaf, parents, dirty, .. } = find;
        // Where evidence was and still is, the leaf's truth did not change for any parent.
        // (While hydrating, "was" may be more than one version ago.)
        let ready = matches!(instance.phase, Phase::Ready);
        let bodies = &instance.nodes[usize::from(edge.child.0)].partitions;
        let changed =
            |key: &Key| !(ready && bodies.get(key).is_some_and(Partition::stayed_occupied));
        let children = &self.dirty[usize::from(edge.child.0)];
        if !parents.keys.gather(children, edge, w.budget, changed) {
            return Ok(false);
        }
        if parents.keys.keys.is_empty() {
            return Ok(true);
        }
        if !parents.resident_found && node.is_held() && !mutant::is(Mutant::ResidentForgotten) {
            let state = &mut instance.nodes[usize::from(node.id.0)];
            if !parents.resident.step(node, *leaf, &parents.keys, state, dirty, w.budget) {
                return Ok(false);
            }
        }
        parents.resident_found = true;
        while let Some(keys) = parents.keys.keys.get(parents.searched..).filter(|k| !k.is_empty()) {
            let keys = &keys[..keys.len().min(SEARCH_BATCH)];
            search(node, edge, keys, &mut parents.part, instance, dirty, w)?;
            if parents.part.done {
                parents.searched += keys.len();
                parents.part = Part::default();
            }
            if w.budget.is_spent() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn led_by(&self, owner: Option<NodeId>) -> Option<&Led> {
        self.led.iter().map(|l| &**l).find(|l| Some(l.top) == owner)
    }

    /// Brings a node's partitions to the new version. False if the budget ended before.
    fn partitions(
        &mut self,
        node: &NodeShape,
        dirty: &Dirty,
        apply: &mut Apply,
        instance: &mut Instance,
        w: &mut Work<'_>,
    ) -> Result<bool, EngineError> {
        let n = usize::from(node.id.0);
        // All leave before any enters.
        while let Some(change) = dirty.rows.get(apply.taken_out) {
            apply.taken_out += 1;
            if take_out(node, change, &mut instance.nodes[n], apply) {
                w.budget.spend(1);
                if w.budget.is_spent() {
                    return Ok(false);
                }
            }
        }
        if mutant::is(Mutant::RefillEarly) && apply.put_in == 0 {
            for key in apply.changed.iter().chain(&apply.last_changed) {
                if instance.nodes[n].partitions.get(key).is_some_and(|p| p.is_short(node.window)) {
                    instance.fill_one(node, key, w)?;
                }
            }
        }
        if !self.put_in(node, dirty, instance, apply, w)? {
            return Ok(false);
        }
        let state = &mut instance.nodes[n];
        while let Some(key) = apply.next_changed() {
            w.budget.spend(1);
            if let Some(partition) = state.partitions.get_mut(&key) {
                partition.cut(&node.order, node.window);
                if partition.is_short(node.window) {
                    state.unfilled.push(key);
                }
            }
            if w.budget.is_spent() && !apply.changed.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Puts each dirty row in that qualifies now and lies before its partition's bound. False if
    /// the budget ended before the last one.
    fn put_in(
        &mut self,
        node: &NodeShape,
        dirty: &Dirty,
        instance: &mut Instance,
        apply: &mut Apply,
        w: &mut Work<'_>,
    ) -> Result<bool, EngineError> {
        let first = usize::from(node.id.0) + 1;
        let (above, below) = instance.nodes.split_at_mut(first);
        let Some(state) = above.last_mut() else { return Ok(true) };
        let mut judge = Judge { params: &instance.params, below, first, points: &mut self.points };
        let mut worked = false;
        while let Some(change) = dirty.rows.get(apply.put_in) {
            if worked && w.budget.is_spent() {
                return Ok(false);
            }
            worked = true;
            apply.put_in += 1;
            w.budget.spend(1);
            let Some(new) = &change.new else { continue };
            let key = new.project(&node.join);
            let Some(partition) = state.partitions.get_mut(&key) else { continue };
            if !partition.covers(&node.order, new) || !judge.qualifies(node, new, w)? {
                continue;
            }
            SourceError::check_deliverable(&node.table, new)?;
            if partition.touch() {
                state.touched.push(key.clone());
            }
            let row = w.interner.intern(&node.table, new.clone());
            if !partition.insert(&node.order, row) {
                return Err(EngineError::Invariant("a row entered a window twice"));
            }
            apply.note(key);
        }
        Ok(true)
    }
}

/// Takes a dirty row out of a node's partitions, by its old version; whether it was there.
fn take_out(
    node: &NodeShape,
    change: &NetChange,
    state: &mut NodeState,
    apply: &mut Apply,
) -> bool {
    let Some(old) = &change.old else { return false };
    let key = old.project(&node.join);
    let Some(partition) = state.partitions.get_mut(&key) else { return false };
    let Some(at) = partition.find(&node.order, old) else { return false };
    if partition.touch() {
        state.touched.push(key.clone());
    }
    partition.remove(at);
    apply.note(key);
    true
}

/// Adds further rows of a node that nobody holds, with one of the join keys of a leaf; all, once
/// `part` is done.
fn search(
    node: &NodeShape,
    edge: &Edge,
    keys: &[Key],
    part: &mut Part,
    instance: &Instance,
    dirty: &mut Dirty,
    w: &mut Work<'_>,
) -> Result<(), EngineError> {
    let state = &instance.nodes[usize::from(node.id.0)];
    let mut before = None;
    match node.kind {
        Kind::Root => match state.partitions.get(&Key::new()).map(|p| &p.bound) {
            // Nothing can lie before the bound.
            None | Some(Bound::Start) => {
                part.done = true;
                return Ok(());
            }
            Some(Bound::At(position)) => before = Some(&**position),
            Some(Bound::End) => {}
        },
        Kind::Related if state.partitions.is_empty() => {
            part.done = true;
            return Ok(());
        }
        Kind::Related | Kind::Evidence | Kind::Bare => {}
        Kind::Dead => {
            part.done = true;
            return Ok(());
        }
    }
    let search = Search {
        shape: w.shape,
        node,
        columns: &edge.parent_columns,
        params: &instance.params,
        filter: search_filter(node, w.shape),
        before,
    };
    for row in search.run(keys, part, w.source, w.budget, w.counters)? {
        if !mutant::is(Mutant::WeakForOneLeaf) || one_leaf_true(node, edge, instance, &row, w)? {
            dirty.add_unchanged(node, &row);
        }
    }
    Ok(())
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
    let mut points = ShardMap::default();
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
    points: &'a mut ShardMap<(NodeId, Key), bool>,
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
        let at = (edge.child, key);
        if let Some(&known) = self.points.get(&at) {
            return Ok(known);
        }
        let keys = [at.1];
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
