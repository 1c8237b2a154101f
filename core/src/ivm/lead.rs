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
use super::dirty::{Dirty, Hit, HitRow, Search, search_filter};
use super::emit::NetTables;
use super::engine::Budget;
use super::error::EngineError;
use super::plan::{NodeId, Param};
use super::route::RouteTableId;
use super::shape::Shape;
use super::source::{Filter, Source};
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
pub(super) struct Leading<'a> {
    pub(super) shape: &'a Shape,
    pub(super) tables: &'a [RouteTableId],
    /// Of any member: the body reads only what they agree on.
    pub(super) params: &'a [Param],
    pub(super) changes: &'a NetTables,
    pub(super) source: &'a mut dyn Source,
    pub(super) budget: &'a mut Budget,
    pub(super) counters: &'a mut Counters,
}

impl Leading<'_> {
    /// The dirty rows of a group's body, and the parent rows that they may concern.
    pub(super) fn run(
        mut self,
        top: NodeId,
        hits: &[Hit],
    ) -> Result<(Led, Vec<RowRef>), EngineError> {
        let shape = self.shape;
        let mut dirty: Vec<Dirty> = shape.nodes.iter().map(|_| Dirty::default()).collect();
        for node in shape.owned(top).rev() {
            let n = usize::from(node.id.0);
            let mut rows = Dirty::default();
            if let Some(table) = self.changes.get(&self.tables[n]) {
                for hit in hits.iter().filter(|h| h.node == node.id) {
                    if let HitRow::Changed(i) = hit.row {
                        rows.add(node, table.changes[i as usize].clone());
                    }
                }
            }
            for edge in &node.leaves {
                let keys = dirty[usize::from(edge.child.0)].keys(edge);
                let search = Search {
                    shape,
                    node,
                    columns: &edge.parent_columns,
                    params: self.params,
                    filter: search_filter(node, shape),
                    before: None,
                };
                for row in self.search(&search, &keys)? {
                    rows.add_unchanged(node, &row);
                }
            }
            dirty[n] = rows;
        }
        let Some(parent) = shape.node(top).parent.map(|p| shape.node(p)) else {
            return Err(EngineError::Invariant("an EXISTS body has no parent"));
        };
        let mut parents = Vec::new();
        for edge in parent.leaves.iter().filter(|e| e.child == top) {
            let search = Search {
                shape,
                node: parent,
                columns: &edge.parent_columns,
                params: self.params,
                filter: Filter::Any,
                before: None,
            };
            parents = self.search(&search, &dirty[usize::from(top.0)].keys(edge))?;
        }
        let nodes = shape
            .owned(top)
            .map(|n| (n.id, std::mem::take(&mut dirty[usize::from(n.id.0)].rows)))
            .filter(|(_, rows)| !rows.is_empty())
            .collect();
        Ok((Led { top, nodes }, parents))
    }

    fn search(
        &mut self,
        search: &Search<'_>,
        keys: &[crate::row::Key],
    ) -> Result<Vec<RowRef>, EngineError> {
        search.run(keys, self.source, self.budget, self.counters)
    }
}
