//! The maintained state of one plan with its parameters.

use std::sync::Arc;

use super::emit::Snapshot;
use super::engine::InstanceId;
use super::error::EngineError;
use super::garbage::Garbage;
use super::mutant::{self, Mutant};
use super::partition::{Partition, Settled};
use super::plan::Param;
use super::propagate::Settling;
use super::reading::Readers;
use super::remains::Remains;
use super::rows::Rows;
use super::settle::Narrow;
use super::shape::{Kind, NodeShape, Shape};
use super::shards::ShardMap;
use super::stack::Stack;
use super::watch::Watch;
use crate::row::{Key, Row, RowRef};
use crate::schema::TableId;

/// How far an instance is.
#[derive(Debug)]
pub(super) enum Phase {
    /// Being hydrated for the first time: nobody knows its rows yet.
    Hydrating,
    /// Its subscribers know its rows.
    Ready,
    /// Gave up; holds nothing.
    Failed(EngineError),
}

/// The partitions of one node.
#[derive(Debug, Default)]
pub(super) struct NodeState {
    pub(super) partitions: ShardMap<Key, Partition>,
    /// Per EXISTS leaf, once it was needed: the resident rows by the leaf's parent columns. Rows
    /// of partitions with a log are as before it.
    pub(super) parents: Option<Box<[Option<Rows>]>>,
    /// Keys of partitions with a log; each once.
    pub(super) touched: Stack<Key>,
    /// The partition whose log is being worked off piece by piece.
    pub(super) settling: Option<Box<Settling>>,
    /// Keys of partitions that may be short of rows; perhaps stale, perhaps twice.
    pub(super) unfilled: Stack<Key>,
    /// The same, of those that must be read on their own: of a batch that was too much, or the one
    /// that is being read.
    pub(super) singly: Vec<Key>,
    /// A partition that is hard to read.
    pub(super) narrow: Option<Box<Narrow>>,
}

impl NodeState {
    /// Rows that left and entered partitions of the node.
    pub(super) fn note_parents(&mut self, node: &NodeShape, settled: &Settled) {
        let Some(parents) = &mut self.parents else { return };
        for (edge, rows) in node.leaves.iter().zip(parents) {
            let Some(rows) = rows else { continue };
            // A row that moved between partitions may enter the one before it leaves the other:
            // the version tells which of the two is here.
            for row in &settled.left {
                if let Ok(at) = rows.find(&edge.parent_order, row)
                    && (rows.at(at).version == row.version
                        || mutant::is(Mutant::MovedParentForgotten))
                {
                    rows.remove(at);
                }
            }
            for row in &settled.entered {
                let at = match rows.find(&edge.parent_order, row) {
                    Err(at) => at,
                    Ok(_) if mutant::is(Mutant::MovedParentForgotten) => continue,
                    Ok(at) => {
                        rows.remove(at);
                        let (Ok(at) | Err(at)) = rows.find(&edge.parent_order, row);
                        at
                    }
                };
                rows.insert(at, row.clone());
            }
        }
    }

    /// The same for one row of the log of a large partition, which was not netted: what the
    /// partition holds now decides.
    pub(super) fn note_parent(&mut self, node: &NodeShape, key: &Key, row: &RowRef, added: bool) {
        let Some(parents) = &mut self.parents else { return };
        let rows = self.partitions.get(key).map(Partition::rows);
        let at = rows.and_then(|rows| Some((rows, rows.find(&node.order, row).ok()?)));
        let is_resident = at.is_some_and(|(rows, at)| rows.at(at).version == row.version);
        if is_resident != added {
            return;
        }
        for (edge, rows) in node.leaves.iter().zip(parents) {
            let Some(rows) = rows else { continue };
            match rows.find(&edge.parent_order, row) {
                Ok(at) if rows.at(at).version == row.version => {
                    if !added {
                        rows.remove(at);
                    }
                    continue;
                }
                Ok(_) if !added => continue,
                Ok(at) => drop(rows.remove(at)),
                Err(_) if !added => continue,
                Err(_) => {}
            }
            let (Ok(at) | Err(at)) = rows.find(&edge.parent_order, row);
            rows.insert(at, row.clone());
        }
    }

    /// Starts to keep the rows by the parent columns of a leaf: these are all of them.
    pub(super) fn index_parents(&mut self, node: &NodeShape, leaf: usize, rows: Rows) {
        let none = || node.leaves.iter().map(|_| None).collect();
        self.parents.get_or_insert_with(none)[leaf] = Some(rows);
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Instance {
    pub(super) id: InstanceId,
    /// Number of its plan.
    pub(super) plan: u32,
    pub(super) params: Arc<[Param]>,
    /// Subscriptions.
    pub(super) subscriptions: u32,
    pub(super) phase: Phase,
    /// One per node of the plan; those of nodes that hold nothing stay empty.
    pub(super) nodes: Box<[NodeState]>,
    /// Parameter group per node that owns groups ([`u32::MAX`]: none).
    pub(super) groups: Box<[u32]>,
    pub(super) signature: u64,
    /// While it re-hydrates: what its subscribers know.
    pub(super) known: Option<Snapshot>,
    /// Waits for a new plan.
    pub(super) unbound: bool,
    /// Holds no rows, only `known`, to make room; its signature then. Anything that needs the rows
    /// reads them anew.
    pub(super) parked: Option<u64>,
    /// Resident rows, as of when they were settled last.
    pub(super) resident: usize,
    /// The state before it started over, until that is taken apart: nothing may be read before.
    pub(super) remains: Option<Box<Remains>>,
    /// Who is reading it.
    pub(super) readers: Readers,
    /// While it is hydrated: rows for somebody who does not wait for the end.
    pub(super) watch: Option<Box<Watch>>,
}

impl Instance {
    pub(super) fn new(id: InstanceId, plan: u32, params: Arc<[Param]>) -> Instance {
        Instance {
            id,
            plan,
            params,
            subscriptions: 0,
            phase: Phase::Hydrating,
            nodes: Box::default(),
            groups: Box::default(),
            signature: 0,
            known: None,
            unbound: false,
            parked: None,
            resident: 0,
            remains: None,
            readers: Readers::default(),
            watch: None,
        }
    }

    /// Starts over: only the root partition, unread. What readers remember is left to the caller.
    pub(super) fn restart(&mut self, shape: &Shape, garbage: &mut Garbage) {
        self.readers.start_over(garbage);
        self.nodes = shape.nodes.iter().map(|_| NodeState::default()).collect();
        self.signature = 0;
        self.resident = 0;
        self.watch = None;
        if let Some(root) = self.nodes.first_mut() {
            let mut partition = Partition::new();
            partition.mult = 1;
            partition.wanted = 1;
            root.partitions.insert(Key::new(), partition);
            root.touched.push(Key::new());
            root.unfilled.push(Key::new());
        }
    }

    /// Whether anything was read yet.
    pub(super) fn is_started(&self) -> bool {
        self.nodes.first().and_then(|n| n.partitions.get(&Key::new())).is_some_and(|root| {
            root.bound != super::partition::Bound::Start || !root.rows().is_empty()
        })
    }

    /// Occurrences of a row, given at the instance's version.
    pub(super) fn count(&self, shape: &Shape, table: TableId, row: &Row) -> u64 {
        let of = |node: &NodeShape| self.count_in(node, row);
        let count: i64 = held(shape).filter(|n| n.table.id == table).map(of).sum();
        u64::try_from(count).unwrap_or(0)
    }

    fn count_in(&self, node: &NodeShape, row: &Row) -> i64 {
        let state = &self.nodes[usize::from(node.id.0)];
        let Some(partition) = state.partitions.get(&row.project(&node.join)) else { return 0 };
        if partition.shows(&node.order, row, node.window) { partition.mult } else { 0 }
    }

    /// The count of a row that is visible in a partition of this multiplicity, if this is where it
    /// is told: each row is at one place.
    pub(super) fn told_at(
        &self,
        shape: &Shape,
        node: &NodeShape,
        row: &Row,
        mult: u64,
    ) -> Option<u64> {
        if node.alone {
            // It occurs in no other node, and in one partition only.
            return Some(mult);
        }
        // The first node of the table that counts the row tells it.
        let mut others = held(shape).filter(|n| n.table.id == node.table.id);
        let first = others.find(|n| self.count_in(n, row) > 0)?;
        (first.id == node.id).then(|| self.count(shape, node.table.id, row))
    }

    /// Partitions and resident rows.
    pub(super) fn size(&self) -> (usize, usize) {
        let partitions = || self.nodes.iter().flat_map(|n| n.partitions.values());
        (partitions().count(), partitions().map(|p| p.rows().len()).sum())
    }
}

fn held(shape: &Shape) -> impl Iterator<Item = &NodeShape> {
    shape.nodes.iter().filter(|n| n.is_held())
}

/// Whether instances of related nodes are routed by the join keys of their partitions.
pub(super) fn routed_by_join(node: &NodeShape) -> bool {
    node.kind == Kind::Related
}
