//! Dirty rows: whose membership in a node may differ at the new version.
//!
//! Of a node these are the changed rows that its weak predicate matches before or after (the
//! router delivers them), and the rows that share a join key with a dirty row of one of its
//! EXISTS bodies: resident ones always; others if they may qualify now. In the body of an EXISTS
//! or NOT EXISTS, where a row that nobody holds and that *stops* qualifying matters as well, all
//! that the weak predicate matches.

use std::cmp::Ordering;

use super::change_set::NetChange;
use super::emit::join_key;
use super::engine::Budget;
use super::error::EngineError;
use super::garbage::Garbage;
use super::instance::NodeState;
use super::mutant::{self, Mutant};
use super::plan::{NodeId, Param, Role};
use super::route::Projected;
use super::rows::Rows;
use super::shape::{Edge, NodeShape, Shape};
use super::shards::ShardMap;
use super::source::{Fetch, Filter, Keys, Part, Source};
use super::stats::Counters;
use crate::row::{Key, Row, RowRef};
use crate::value::Value;

/// Keys per statement of a parent search; bounds the statement's key list.
pub(super) const SEARCH_BATCH: usize = 128;

/// Resident rows and partitions, above which they are indexed by a leaf's parent columns once a
/// row of its body changes. Tests have few rows, and shall use the index all the same.
const INDEX_ABOVE: usize = if cfg!(test) { 2 } else { 256 };

/// Rows between two looks at the budget.
const SCAN_PIECE: usize = if cfg!(test) { 3 } else { 512 };

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
    known: ShardMap<Key, ()>,
}

impl Dirty {
    pub(super) fn add(&mut self, node: &NodeShape, change: NetChange) {
        let Some(row) = change.old.as_ref().or(change.new.as_ref()) else { return };
        let mut is_new = false;
        let key = row.project(&node.table.primary_key);
        self.known.get_or_insert_with(key, || is_new = true);
        if is_new {
            self.rows.push(change);
        }
    }

    pub(super) fn add_unchanged(&mut self, node: &NodeShape, row: &RowRef) {
        self.add(node, NetChange { old: Some(row.clone()), new: Some(row.clone()) });
    }
}

impl Dirty {
    /// Nobody needs it any more.
    pub(super) fn discard(self, garbage: &mut Garbage) {
        garbage.add(self.rows);
        garbage.add_keys(self.known);
    }
}

/// The join keys of the old and new versions of the dirty rows of a body, for its parents.
#[derive(Debug, Default)]
pub(super) struct JoinKeys {
    pub(super) keys: Vec<Key>,
    known: ShardMap<Key, ()>,
    /// Dirty rows that were looked at.
    rows: usize,
}

impl JoinKeys {
    /// Adds the keys that `keep` wants, until all rows are through (true) or the budget is spent.
    pub(super) fn gather(
        &mut self,
        dirty: &Dirty,
        edge: &Edge,
        budget: &mut Budget,
        keep: impl Fn(&Key) -> bool,
    ) -> bool {
        while let Some(change) = dirty.rows.get(self.rows) {
            self.rows += 1;
            for row in change.old.iter().chain(&change.new) {
                let Some(key) = join_key(row, &edge.child_columns) else { continue };
                if self.known.contains_key(&key) || !keep(&key) {
                    continue;
                }
                self.keys.push(key.clone());
                self.known.insert(key, ());
            }
            budget.spend(1);
            if budget.is_spent() {
                return false;
            }
        }
        true
    }

    /// Nobody needs it any more.
    pub(super) fn discard(self, garbage: &mut Garbage) {
        garbage.add(self.keys);
        garbage.add_keys(self.known);
    }

    fn wants(&self, row: &Row, columns: &[usize]) -> bool {
        self.known.get(&Projected { row, columns }).is_some()
    }
}

/// Finds the resident rows of a node with one of the join keys of a leaf.
#[derive(Debug, Default)]
pub(super) struct Resident {
    /// By the index of parents: keys that were looked up.
    keys: usize,
    /// Without: in this table of partitions, behind so many of them and so many rows.
    table: u64,
    partition: usize,
    rank: usize,
    /// Rows and partitions that were looked at.
    scanned: usize,
    /// The index, if it is made on the way.
    index: Option<Rows>,
}

impl Resident {
    /// Adds them to the dirty rows, until it is through (true) or the budget is spent. The
    /// partitions must not change between two calls.
    pub(super) fn step(
        &mut self,
        node: &NodeShape,
        leaf: usize,
        keys: &JoinKeys,
        state: &mut NodeState,
        dirty: &mut Dirty,
        budget: &mut Budget,
    ) -> bool {
        let edge = &node.leaves[leaf];
        // With a log, the index is behind the partitions.
        let at_rest = (state.touched.is_empty() && state.settling.is_none())
            || mutant::is(Mutant::StaleParents);
        let index = state.parents.as_ref().and_then(|p| p[leaf].as_ref()).filter(|_| at_rest);
        if let Some(rows) = index
            && keys.keys.len() <= rows.len() / SCAN_SHARE
        {
            while let Some(key) = keys.keys.get(self.keys) {
                self.keys += 1;
                let place = |row: &Row| place(row, &edge.parent_columns, key);
                for row in rows.iter_since(place).take_while(|r| place(r).is_eq()) {
                    dirty.add_unchanged(node, row);
                    budget.spend(1);
                }
                budget.spend(1);
                if budget.is_spent() {
                    return self.keys == keys.keys.len();
                }
            }
            return true;
        }
        let may_index = at_rest && index.is_none();
        'tables: loop {
            let (partitions, next) = state.partitions.table(self.table);
            for partition in partitions.skip(self.partition) {
                let rows = partition.rows();
                for row in rows.iter_from(self.rank).take(SCAN_PIECE) {
                    if keys.wants(row, &edge.parent_columns) {
                        dirty.add_unchanged(node, row);
                    }
                    if let Some(index) = &mut self.index
                        && let Err(at) = index.find(&edge.parent_order, row)
                    {
                        index.insert(at, row.clone());
                    }
                }
                let seen = rows.len().saturating_sub(self.rank).min(SCAN_PIECE);
                self.scanned += seen + 1;
                if may_index && self.index.is_none() && self.scanned > INDEX_ABOVE {
                    // From the beginning: what is dirty already is not so twice.
                    *self = Resident { index: Some(Rows::default()), ..Resident::default() };
                    continue 'tables;
                }
                self.rank += seen;
                budget.spend(seen as u64 / if self.index.is_some() { 1 } else { 16 } + 1);
                let is_through = self.rank >= rows.len();
                if is_through {
                    (self.partition, self.rank) = (self.partition + 1, 0);
                }
                if budget.is_spent() {
                    return false;
                }
                if !is_through {
                    continue 'tables;
                }
            }
            (self.partition, self.rank) = (0, 0);
            match next {
                Some(next) => self.table = next,
                None => break,
            }
        }
        if let Some(index) = self.index.take() {
            state.index_parents(node, leaf, index);
        }
        true
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
    /// Further rows of at most [`SEARCH_BATCH`] keys; all, once `part` is done.
    pub(super) fn run(
        &self,
        keys: &[Key],
        part: &mut Part,
        source: &mut dyn Source,
        budget: &mut Budget,
        counters: &mut Counters,
    ) -> Result<Vec<RowRef>, EngineError> {
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
        if *part == Part::default() {
            match self.filter {
                Filter::Whole => counters.parent_lookups += 1,
                Filter::Weak => counters.weak_searches += 1,
                Filter::Any => counters.shared_searches += 1,
            }
        }
        budget.spend(Budget::STATEMENT);
        let mut found = Vec::new();
        source.fetch_part(&fetch, part, budget.for_source(), &mut |row| found.push(row))?;
        budget.spend(found.len() as u64);
        part.done |= mutant::is(Mutant::OnePartSearched);
        if !part.done {
            budget.spend_all();
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
