//! Dirty rows: whose membership in a node may differ at the new version.
//!
//! Of a node these are the changed rows that its weak predicate matches before or after (the
//! router delivers them), and the rows that share a join key with a dirty row of one of its
//! EXISTS bodies: resident ones always; others if they may qualify now. In the body of an EXISTS
//! or NOT EXISTS, where a row that nobody holds and that *stops* qualifying matters as well, all
//! that the weak predicate matches.

use std::cmp::Ordering;
use std::ops::ControlFlow;

use hashbrown::HashSet;
use rustc_hash::FxBuildHasher;

use super::change_set::NetChange;
use super::emit::join_key;
use super::engine::Budget;
use super::error::EngineError;
use super::instance::NodeState;
use super::mutant::{self, Mutant};
use super::plan::{NodeId, Param, Role};
use super::shape::{Edge, NodeShape, Shape};
use super::source::{Fetch, Filter, Keys, Source};
use super::stats::Counters;
use crate::row::{Key, Row, RowRef};
use crate::value::Value;

/// Keys per statement of a parent search; bounds the statement's key list.
const SEARCH_BATCH: usize = 128;

/// Resident rows and partitions, above which they are indexed by a leaf's parent columns once a
/// row of its body changes. Tests have few rows, and shall use the index all the same.
const INDEX_ABOVE: usize = if cfg!(test) { 2 } else { 256 };

/// With more keys than this part of the rows, all rows are looked at.
const SCAN_SHARE: usize = if cfg!(test) { 1 } else { 8 };

/// A row that was led to an instance for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Hit {
    pub(super) node: NodeId,
    pub(super) row: HitRow,
}

/// Which row. Changed rows come first: what they say about old and new versions counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum HitRow {
    /// Place in the net table of the node's table.
    Changed(u32),
    /// Place among the rows that were found once for a whole group: as they are now.
    Found(u32),
}

/// Rows of a node to be judged anew, by identity key.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    pub(super) rows: Vec<NetChange>,
    known: HashSet<Key, FxBuildHasher>,
}

impl Dirty {
    pub(super) fn add(&mut self, node: &NodeShape, change: NetChange) {
        let Some(row) = change.old.as_ref().or(change.new.as_ref()) else { return };
        if self.known.insert(row.project(&node.table.primary_key)) {
            self.rows.push(change);
        }
    }

    pub(super) fn add_unchanged(&mut self, node: &NodeShape, row: &RowRef) {
        self.add(node, NetChange { old: Some(row.clone()), new: Some(row.clone()) });
    }

    /// Join keys of the old and new versions, for the parents of a body; sorted.
    pub(super) fn keys(&self, edge: &Edge) -> Vec<Key> {
        let sides = self.rows.iter().flat_map(|c| c.old.iter().chain(&c.new));
        let mut keys: Vec<Key> =
            sides.filter_map(|row| join_key(row, &edge.child_columns)).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Adds the resident rows of a node with one of the join keys of a leaf.
    pub(super) fn add_resident(
        &mut self,
        node: &NodeShape,
        leaf: usize,
        keys: &[Key],
        state: &mut NodeState,
    ) {
        let edge = &node.leaves[leaf];
        // With a log, the index is behind the partitions.
        let at_rest = state.touched.is_empty() && state.settling.is_none();
        let index = state.parents.as_ref().and_then(|p| p[leaf].as_ref()).filter(|_| at_rest);
        if let Some(rows) = index
            && keys.len() <= rows.len() / SCAN_SHARE
        {
            for key in keys {
                let place = |row: &Row| place(row, &edge.parent_columns, key);
                for row in rows.iter_since(place).take_while(|r| place(r).is_eq()) {
                    self.add_unchanged(node, row);
                }
            }
            return;
        }
        let wanted = |row: &Row| {
            keys.binary_search_by(|key| place(row, &edge.parent_columns, key).reverse()).is_ok()
        };
        let mut scanned = 0;
        for partition in state.partitions.values() {
            scanned += 1 + partition.rows().len();
            for row in partition.rows().iter().filter(|r| wanted(r)) {
                self.add_unchanged(node, row);
            }
        }
        if at_rest && index.is_none() && scanned > INDEX_ABOVE {
            state.index_parents(node, leaf);
        }
    }
}

/// How the columns of a row compare with a key.
fn place(row: &Row, columns: &[usize], key: &Key) -> Ordering {
    let pairs = columns.iter().map(|&c| &row.values[c]).zip(key);
    pairs.map(|(a, b)| a.compare(b)).find(|o| o.is_ne()).unwrap_or(Ordering::Equal)
}

/// A search for the parent rows of join keys, in a snapshot at the new version.
pub(super) struct Search<'a> {
    pub(super) shape: &'a Shape,
    pub(super) node: &'a NodeShape,
    /// The parent columns of the leaf.
    pub(super) columns: &'a [usize],
    pub(super) params: &'a [Param],
    pub(super) filter: Filter,
    /// Only rows before this position of the node's order.
    pub(super) before: Option<&'a [Value]>,
}

impl Search<'_> {
    pub(super) fn run(
        &self,
        keys: &[Key],
        source: &mut dyn Source,
        budget: &mut Budget,
        counters: &mut Counters,
    ) -> Result<Vec<RowRef>, EngineError> {
        let mut found = Vec::new();
        for keys in keys.chunks(SEARCH_BATCH) {
            let fetch = Fetch {
                plan: &self.shape.plan,
                node: self.node.id,
                params: self.params,
                keys: Some(Keys { columns: self.columns, keys }),
                filter: self.filter,
                from: None,
                before: self.before,
                limit: None,
                ordered: false,
            };
            match self.filter {
                Filter::Whole => counters.parent_lookups += 1,
                Filter::Weak => counters.weak_searches += 1,
                Filter::Any => counters.shared_searches += 1,
            }
            budget.spend(Budget::STATEMENT);
            source.fetch(&fetch, &mut |row| {
                budget.spend(1);
                found.push(row);
                ControlFlow::Continue(())
            })?;
        }
        Ok(found)
    }
}

/// Which rows a search for one instance must find: see the module.
pub(super) fn search_filter(node: &NodeShape, shape: &Shape) -> Filter {
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
