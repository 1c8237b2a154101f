//! From a changed row to the instances that it may touch: cost follows what is affected.
//!
//! Per table and identity key, indexes over column sets lead from a row's values to targets: a
//! *group* (instances of a plan that agree on a node's own parameters, found by its equality
//! conjuncts) or an *instance* (that holds the partition of a related node for this join key).
//! Nodes without an equality conjunct, but with a range of a column, are found by its bounds.
//! All others are in a rest list, where each group is evaluated.

use std::hash::{Hash, Hasher};

use hashbrown::{Equivalent, HashMap};
use rustc_hash::FxBuildHasher;

use super::plan::NodeId;
use super::ranges::{Range, Ranges};
use super::shards::ShardMap;
use super::small_set::SmallSet;
use crate::row::{Key, Row};
use crate::schema::TableId;

/// Number of a (table, identity key) in the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct RouteTableId(pub(super) u32);

/// Who is interested in a row, for which node of which plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Target {
    pub(super) plan: u32,
    pub(super) node: NodeId,
    pub(super) who: Who,
}

/// One instance, or all instances of a node's parameter group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Who {
    Instance(u32),
    Group(u32),
}

#[derive(Debug)]
struct RouteTable {
    table: TableId,
    identity: Vec<usize>,
    indexes: Vec<ColumnIndex>,
    /// By column.
    ranges: Vec<(usize, Ranges)>,
    /// Nodes whose groups must each be evaluated.
    rest: SmallSet<(u32, NodeId)>,
}

#[derive(Debug)]
struct ColumnIndex {
    columns: Box<[usize]>,
    targets: ShardMap<Key, SmallSet<Target>>,
}

/// Columns of a row, to be looked up among keys without being copied.
pub(super) struct Projected<'a> {
    pub(super) row: &'a Row,
    pub(super) columns: &'a [usize],
}

impl Hash for Projected<'_> {
    /// As a slice of values hashes.
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_usize(self.columns.len());
        self.columns.iter().for_each(|&c| self.row.values[c].hash(state));
    }
}

impl Equivalent<Key> for Projected<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        let values = self.columns.iter().map(|&c| &self.row.values[c]);
        self.columns.len() == key.len() && values.eq(key.iter())
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Router {
    tables: Vec<RouteTable>,
    numbers: HashMap<(TableId, Vec<usize>), RouteTableId, FxBuildHasher>,
}

impl Router {
    /// The number of a table under an identity key. Numbers are never given back: there are as
    /// many as tables and client schemas name keys for.
    pub(super) fn table(&mut self, table: TableId, identity: &[usize]) -> RouteTableId {
        let next = RouteTableId(self.tables.len() as u32);
        let id = *self.numbers.entry((table, identity.to_vec())).or_insert(next);
        if id == next {
            let identity = identity.to_vec();
            let (indexes, ranges, rest) = Default::default();
            self.tables.push(RouteTable { table, identity, indexes, ranges, rest });
        }
        id
    }

    /// All numbers, with what they stand for.
    pub(super) fn tables(&self) -> impl Iterator<Item = (RouteTableId, TableId, &[usize])> {
        self.tables.iter().enumerate().map(|(i, t)| (RouteTableId(i as u32), t.table, &*t.identity))
    }

    /// Leads rows whose `columns` equal `key` to `target`.
    pub(super) fn add(&mut self, table: RouteTableId, columns: &[usize], key: Key, to: Target) {
        let table = &mut self.tables[table.0 as usize];
        let index = match table.indexes.iter().position(|i| *i.columns == *columns) {
            Some(i) => &mut table.indexes[i],
            None => {
                let targets = ShardMap::default();
                table.indexes.push(ColumnIndex { columns: columns.into(), targets });
                let last = table.indexes.len() - 1;
                &mut table.indexes[last]
            }
        };
        index.targets.get_or_insert_with(key, SmallSet::default).insert(to);
    }

    /// Takes back [`Router::add`].
    pub(super) fn remove(&mut self, table: RouteTableId, columns: &[usize], key: &Key, to: Target) {
        let table = &mut self.tables[table.0 as usize];
        let Some(i) = table.indexes.iter().position(|i| *i.columns == *columns) else { return };
        let index = &mut table.indexes[i];
        let Some(targets) = index.targets.get_mut(key) else { return };
        targets.remove(to);
        if targets.is_empty() {
            index.targets.remove(key);
        }
        if index.targets.is_empty() {
            table.indexes.swap_remove(i);
        }
    }

    /// Leads rows whose `column` is in `range` to `target`.
    pub(super) fn add_range(
        &mut self,
        table: RouteTableId,
        column: usize,
        range: Range,
        to: Target,
    ) {
        let ranges = &mut self.tables[table.0 as usize].ranges;
        let at = match ranges.iter().position(|r| r.0 == column) {
            Some(at) => at,
            None => {
                ranges.push((column, Ranges::default()));
                ranges.len() - 1
            }
        };
        ranges[at].1.add(range, to);
    }

    /// Takes back [`Router::add_range`].
    pub(super) fn remove_range(
        &mut self,
        table: RouteTableId,
        column: usize,
        range: &Range,
        to: Target,
    ) {
        let ranges = &mut self.tables[table.0 as usize].ranges;
        let Some(at) = ranges.iter().position(|r| r.0 == column) else { return };
        ranges[at].1.remove(range, to);
        if ranges[at].1.is_empty() {
            ranges.swap_remove(at);
        }
    }

    /// Puts a node on the rest list.
    pub(super) fn add_rest(&mut self, table: RouteTableId, plan: u32, node: NodeId) {
        self.tables[table.0 as usize].rest.insert((plan, node));
    }

    /// Takes a node off the rest list.
    pub(super) fn remove_rest(&mut self, table: RouteTableId, plan: u32, node: NodeId) {
        self.tables[table.0 as usize].rest.remove((plan, node));
    }

    /// The rest list of a table.
    pub(super) fn rest(&self, table: RouteTableId) -> impl Iterator<Item = (u32, NodeId)> {
        self.tables[table.0 as usize].rest.iter()
    }

    /// Appends the targets that the indexes give for a row.
    pub(super) fn find(&self, table: RouteTableId, row: &Row, out: &mut Vec<Target>) {
        let table = &self.tables[table.0 as usize];
        for index in &table.indexes {
            if let Some(targets) = index.targets.get(&Projected { row, columns: &index.columns }) {
                out.extend(targets.iter());
            }
        }
        for (column, ranges) in &table.ranges {
            ranges.find(&row.values[*column], out);
        }
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        let of = |t: &RouteTable| {
            let ranges: usize = t.ranges.iter().map(|r| r.1.len()).sum();
            t.rest.len() + ranges + t.indexes.iter().map(|i| i.targets.len()).sum::<usize>()
        };
        self.tables.iter().map(of).sum()
    }
}
