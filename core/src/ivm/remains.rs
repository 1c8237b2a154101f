//! The state of an instance that is gone, or starts over: partitions, their routes and their rows
//! are given back in slices, because there may be a million of them. An instance that starts over
//! says on the way what its subscribers know.

use std::collections::VecDeque;
use std::sync::Arc;

use super::emit::Snapshot;
use super::engine::Budget;
use super::garbage::Garbage;
use super::instance::{NodeState, routed_by_join};
use super::intern::Interner;
use super::partition::Partition;
use super::plan::NodeId;
use super::route::{RouteTableId, Router, Target, Who};
use super::rows;
use super::shape::Shape;
use super::shards;
use crate::row::{Key, RowRef};

/// See the module.
#[derive(Debug)]
pub(super) struct Remains {
    pub(super) shape: Arc<Shape>,
    pub(super) tables: Arc<[RouteTableId]>,
    pub(super) plan: u32,
    pub(super) slot: u32,
    /// What the instance counted, as far as it is known; `None` if nobody wants to know.
    known: Option<Snapshot>,
    nodes: VecDeque<(NodeId, NodeState)>,
    node: Option<Node>,
}

/// The node that is being taken apart.
#[derive(Debug)]
struct Node {
    id: NodeId,
    /// Its indexes of parents: they own rows that the interner shall forget.
    parents: Vec<rows::IntoIter>,
    partitions: shards::IntoIter<(Key, Partition)>,
    partition: Option<Rows>,
}

/// The rows of a partition.
#[derive(Debug)]
struct Rows {
    mult: u64,
    /// So many of the resident ones, which come first, are visible.
    visible: usize,
    resident: rows::IntoIter,
    logged: std::vec::IntoIter<RowRef>,
}

impl Rows {
    /// Rows that are no partition's.
    fn left_over(rows: Vec<RowRef>) -> Rows {
        let resident = rows::Rows::default().into_iter();
        Rows { mult: 0, visible: 0, resident, logged: rows.into_iter() }
    }
}

impl Remains {
    pub(super) fn new(
        shape: &Arc<Shape>,
        tables: &Arc<[RouteTableId]>,
        plan: u32,
        slot: u32,
        nodes: Box<[NodeState]>,
    ) -> Remains {
        Remains {
            nodes: shape.nodes.iter().map(|n| n.id).zip(nodes).collect(),
            shape: Arc::clone(shape),
            tables: Arc::clone(tables),
            plan,
            slot,
            known: None,
            node: None,
        }
    }

    /// Notes what the instance counted, from now on: before the first step.
    pub(super) fn note_known(&mut self) {
        self.known = Some(Snapshot::default());
    }

    /// What the instance counted.
    pub(super) fn into_known(self) -> Option<Snapshot> {
        self.known
    }

    /// Goes on until nothing is left (true) or the budget is spent.
    pub(super) fn step(
        &mut self,
        router: &mut Router,
        interner: &mut Interner,
        budget: &mut Budget,
    ) -> bool {
        let Remains { shape, tables, plan, slot, known, nodes, node } = self;
        let shape = &*shape;
        let mut rows = 0;
        let mut goes_on = |budget: &mut Budget| {
            rows += 1;
            // About two of them are as much work as one row that is read.
            budget.spend(rows & 1);
            !budget.is_spent()
        };
        loop {
            let Some(Node { id, parents, partitions, partition }) = node else {
                let Some((id, state)) = nodes.pop_front() else { return true };
                let parents = state.parents.into_iter().flatten().flatten();
                let settling = state.settling.map(|s| s.into_rows().collect());
                *node = Some(Node {
                    id,
                    parents: parents.map(IntoIterator::into_iter).collect(),
                    partitions: state.partitions.into_iter(),
                    partition: settling.map(Rows::left_over),
                });
                continue;
            };
            let shape = shape.node(*id);
            while let Some(index) = parents.last_mut() {
                if index.next().is_none() {
                    parents.pop();
                }
                if !goes_on(budget) {
                    return false;
                }
            }
            while let Some(rows) = partition {
                if let Some(row) = rows.resident.next() {
                    if let Some(known) = known
                        && rows.visible > 0
                    {
                        rows.visible -= 1;
                        known.add(shape, &row, rows.mult);
                    }
                    interner.release(shape.table.id, row);
                } else if let Some(row) = rows.logged.next() {
                    interner.release(shape.table.id, row);
                } else {
                    *partition = None;
                }
                if !goes_on(budget) {
                    return false;
                }
            }
            match partitions.next() {
                None => *node = None,
                Some((key, taken)) => {
                    if routed_by_join(shape) {
                        let who = Who::Instance(*slot);
                        let to = Target { plan: *plan, node: *id, who };
                        router.remove(tables[usize::from(id.0)], &shape.join, &key, to);
                    }
                    let visible = shape.window.visible(taken.rows().len());
                    let mult = u64::try_from(taken.mult).unwrap_or(0);
                    let (resident, logged) = taken.into_rows();
                    *partition = Some(Rows { mult, visible, resident, logged });
                }
            }
            if !goes_on(budget) {
                return false;
            }
        }
    }
}

/// What nobody needs any more.
#[derive(Debug)]
pub(super) enum Grave {
    State {
        remains: Box<Remains>,
        /// The slot may be used again once this is gone.
        frees_slot: bool,
    },
    Lists(Garbage),
}
