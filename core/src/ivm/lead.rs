//! EXISTS bodies that many instances share: their dirty rows are found once per group of
//! instances (which agree on all parameters of the body and everything below it), the parent rows
//! are looked up once, and only those lead to instances, by the parents' own routes. One changed
//! `label` under 10,000 instances of `project_id = ? AND EXISTS(labels …)` costs one look-up.
//!
//! Complete because an instance that holds evidence for a key also holds a parent row with that
//! key: unchanged, it is found by the look-up; changed, its old version is routed. That does not
//! hold while an instance hydrates (it may hold evidence whose parent is gone already): those get
//! the changed rows themselves.

use std::sync::Arc;

use super::change_set::NetChange;
use super::dirty::{Dirty, Hit, HitRow, JoinKeys, SEARCH_BATCH, Search, search_filter};
use super::emit::NetTables;
use super::engine::Budget;
use super::error::EngineError;
use super::garbage::Garbage;
use super::plan::{NodeId, Param};
use super::route::RouteTableId;
use super::shape::{Edge, NodeShape, Shape};
use super::source::{Filter, Part, Source};
use super::stats::Counters;
use crate::row::RowRef;

/// A topmost EXISTS body and a group of instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LeafGroup {
    pub(super) plan: u32,
    pub(super) top: NodeId,
    pub(super) group: u32,
}

/// What reached a leaf group.
#[derive(Debug)]
pub(super) struct LeafHits {
    /// To notice a plan number that was given to another plan.
    pub(super) shape: Arc<Shape>,
    pub(super) hits: Vec<Hit>,
}

/// Dirty rows of a body and everything below it, per node: the same for a whole group.
#[derive(Debug)]
pub(super) struct Led {
    pub(super) top: NodeId,
    pub(super) nodes: Vec<(NodeId, Vec<NetChange>)>,
}

impl Led {
    /// Dirty rows of a node.
    pub(super) fn rows(&self, node: NodeId) -> &[NetChange] {
        self.nodes.iter().find(|n| n.0 == node).map_or(&[], |n| &n.1)
    }
}

/// What a look-up for a group needs.
pub(super) struct Needs<'a> {
    pub(super) tables: &'a [RouteTableId],
    /// Of any member: the body reads only what they agree on.
    pub(super) params: &'a [Param],
    pub(super) changes: &'a NetTables,
    pub(super) source: &'a mut dyn Source,
    pub(super) budget: &'a mut Budget,
    pub(super) counters: &'a mut Counters,
}

/// A look-up for a group on its way: the dirty rows of its body, and the parent rows that they
/// may concern.
#[derive(Debug)]
pub(super) struct Leading {
    pub(super) group: LeafGroup,
    reached: LeafHits,
    /// Nodes of the body still to do, the last first.
    nodes: Vec<NodeId>,
    /// Per node.
    dirty: Vec<Dirty>,
    /// Of the node that is being done: hits that were looked at, and leaves that are through.
    hits: usize,
    leaf: usize,
    /// The keys that parents of a leaf, or of the body, are looked for by; and how far.
    keys: JoinKeys,
    searched: usize,
    /// How far the search for the next ones is.
    part: Part,
    parents: Vec<RowRef>,
    /// What is done with.
    garbage: Garbage,
}

impl Leading {
    pub(super) fn new(group: LeafGroup, reached: LeafHits) -> Leading {
        let shape = &reached.shape;
        Leading {
            group,
            nodes: shape.owned(group.top).map(|n| n.id).collect(),
            dirty: shape.nodes.iter().map(|_| Dirty::default()).collect(),
            reached,
            hits: 0,
            leaf: 0,
            keys: JoinKeys::default(),
            searched: 0,
            part: Part::default(),
            parents: Vec::new(),
            garbage: Garbage::default(),
        }
    }

    pub(super) fn shape(&self) -> &Arc<Shape> {
        &self.reached.shape
    }

    /// Goes on until everything is found (true) or the budget is spent.
    pub(super) fn step(&mut self, needs: &mut Needs<'_>) -> Result<bool, EngineError> {
        let shape = Arc::clone(&self.reached.shape);
        while let Some(&id) = self.nodes.last() {
            let node = shape.node(id);
            if !self.changed(node, needs) {
                return Ok(false);
            }
            while let Some(edge) = node.leaves.get(self.leaf) {
                let filter = search_filter(node, &shape);
                if !self.search(&shape, node, edge, filter, needs)? {
                    return Ok(false);
                }
                (self.leaf, self.searched) = (self.leaf + 1, 0);
                std::mem::take(&mut self.keys).discard(&mut self.garbage);
            }
            (self.leaf, self.hits) = (0, 0);
            self.nodes.pop();
        }
        let top = self.group.top;
        let Some(parent) = shape.node(top).parent.map(|p| shape.node(p)) else {
            return Err(EngineError::Invariant("an EXISTS body has no parent"));
        };
        match parent.leaves.iter().find(|e| e.child == top) {
            Some(edge) => self.search(&shape, parent, edge, Filter::Any, needs),
            None => Ok(true),
        }
    }

    /// The changed rows that reached a node. False if the budget ended before the last one.
    fn changed(&mut self, node: &NodeShape, needs: &mut Needs<'_>) -> bool {
        let n = usize::from(node.id.0);
        let Some(table) = needs.changes.get(&needs.tables[n]) else { return true };
        while let Some(hit) = self.reached.hits.get(self.hits) {
            self.hits += 1;
            if let HitRow::Changed(i) = hit.row
                && hit.node == node.id
            {
                self.dirty[n].add(node, table.changes[i as usize].clone());
            }
            needs.budget.spend(1);
            if needs.budget.is_spent() {
                return false;
            }
        }
        true
    }

    /// Rows of a node that share a join key with a dirty row of a leaf: dirty rows of the body,
    /// or, above it, parents. False if the budget ended before the last one.
    fn search(
        &mut self,
        shape: &Shape,
        node: &NodeShape,
        edge: &Edge,
        filter: Filter,
        needs: &mut Needs<'_>,
    ) -> Result<bool, EngineError> {
        let children = &self.dirty[usize::from(edge.child.0)];
        if !self.keys.gather(children, edge, needs.budget, |_| true) {
            return Ok(false);
        }
        while let Some(keys) = self.keys.keys.get(self.searched..).filter(|k| !k.is_empty()) {
            let keys = &keys[..keys.len().min(SEARCH_BATCH)];
            let columns = &edge.parent_columns;
            let search =
                Search { shape, node, columns, params: needs.params, filter, before: None };
            let part = &mut self.part;
            let found = search.run(keys, part, needs.source, needs.budget, needs.counters)?;
            if self.part.done {
                self.searched += keys.len();
                self.part = Part::default();
            }
            if filter == Filter::Any {
                self.parents.extend(found);
            } else {
                let dirty = &mut self.dirty[usize::from(node.id.0)];
                found.iter().for_each(|row| dirty.add_unchanged(node, row));
            }
            if needs.budget.is_spent() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What was found, and what is to be given back.
    pub(super) fn close(mut self) -> (Led, Vec<RowRef>, Garbage) {
        let top = self.group.top;
        let shape = &self.reached.shape;
        let nodes = shape
            .owned(top)
            .map(|n| (n.id, std::mem::take(&mut self.dirty[usize::from(n.id.0)].rows)))
            .filter(|(_, rows)| !rows.is_empty())
            .collect();
        self.keys.discard(&mut self.garbage);
        for dirty in self.dirty {
            dirty.discard(&mut self.garbage);
        }
        (Led { top, nodes }, self.parents, self.garbage)
    }
}
