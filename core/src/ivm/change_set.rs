//! The net change between two versions: several commits as one, per table and identity key.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use hashbrown::{HashSet, HashTable};
use rustc_hash::{FxBuildHasher, FxHasher};

use super::engine::Budget;
use super::mutant::{self, Mutant};
use super::route::RouteTableId;
use crate::change::Commit;
use crate::row::{Key, Row, RowRef};
use crate::schema::TableId;
use crate::value::Value;

/// A row before and after.
#[derive(Debug, Clone)]
pub(super) struct NetChange {
    pub(super) old: Option<RowRef>,
    pub(super) new: Option<RowRef>,
}

impl NetChange {
    /// Whether anything changed at all: a row that came and went did not.
    pub(super) fn is_real(&self) -> bool {
        match (&self.old, &self.new) {
            (Some(old), Some(new)) => old.version != new.version || old.values != new.values,
            (None, None) => false,
            _ => true,
        }
    }
}

/// Net changes of one table under one identity key: the first old and the last new row of each.
/// Two rows that exchange a unique value are two pairs, each with its old side from one row and
/// its new side from the other.
#[derive(Debug)]
pub(super) struct NetTable {
    identity: Box<[usize]>,
    /// Some of them are none: see [`NetChange::is_real`].
    pub(super) changes: Vec<NetChange>,
    /// Places in `changes` by identity key, with the key's hash.
    index: HashTable<(u32, u32)>,
}

fn hash<'v>(key: impl Iterator<Item = &'v Value>) -> u32 {
    let mut h = FxHasher::default();
    key.for_each(|v| v.hash(&mut h));
    h.finish() as u32 ^ (h.finish() >> 32) as u32
}

/// A hash of 64 bits from what is kept of it.
fn spread(kept: u32) -> u64 {
    u64::from(kept).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl NetTable {
    /// Without changes yet; for about so many.
    fn new(identity: &[usize], rows: usize) -> NetTable {
        NetTable {
            identity: identity.into(),
            changes: Vec::with_capacity(rows),
            index: HashTable::with_capacity(rows),
        }
    }

    /// All old sides of a commit come before any new one: keys may move between rows.
    fn note_old(&mut self, old: &RowRef) {
        let (change, is_new) = self.entry(old);
        if is_new || mutant::is(Mutant::LastOldRow) {
            change.old = Some(old.clone());
        }
        if !mutant::is(Mutant::NewRowKept) {
            change.new = None;
        }
    }

    fn note_new(&mut self, new: &RowRef) {
        self.entry(new).0.new = Some(new.clone());
    }

    /// The change of a row's identity, and whether it is the first one.
    fn entry(&mut self, row: &Row) -> (&mut NetChange, bool) {
        let NetTable { identity, changes, index } = self;
        let hash = hash(identity.iter().map(|&c| &row.values[c]));
        let same = |e: &(u32, u32)| {
            let known = &changes[e.0 as usize];
            let known = known.old.as_ref().or(known.new.as_ref());
            known.is_some_and(|k| identity.iter().all(|&c| k.values[c] == row.values[c]))
        };
        if let Some(&(at, _)) = index.find(spread(hash), same) {
            return (&mut changes[at as usize], false);
        }
        let at = changes.len();
        index.insert_unique(spread(hash), (at as u32, hash), |e| spread(e.1));
        changes.push(NetChange { old: None, new: None });
        (&mut changes[at], true)
    }

    /// The change of a row by identity key.
    pub(super) fn get(&self, key: &Key) -> Option<&NetChange> {
        let same = |e: &(u32, u32)| {
            let known = &self.changes[e.0 as usize];
            let known = known.old.as_ref().or(known.new.as_ref());
            known.is_some_and(|k| self.identity.iter().map(|&c| &k.values[c]).eq(key.iter()))
        };
        let &(at, _) = self.index.find(spread(hash(key.iter())), same)?;
        self.changes.get(at as usize).filter(|c| c.is_real())
    }
}

/// Commits that are being netted, without the tables that are re-hydrated anyway.
#[derive(Debug, Default)]
pub(super) struct ChangeSet {
    commits: Vec<Arc<Commit>>,
    skip: HashSet<TableId, FxBuildHasher>,
}

impl ChangeSet {
    /// Commits, except for the tables of `skip`.
    pub(super) fn new(commits: &[Arc<Commit>], skip: HashSet<TableId, FxBuildHasher>) -> ChangeSet {
        ChangeSet { commits: commits.to_vec(), skip }
    }

    /// Tables with changes.
    pub(super) fn tables(&self) -> impl Iterator<Item = TableId> {
        let changes = self.commits.iter().flat_map(|c| &c.tables);
        changes.map(|c| c.table.id).filter(|table| !self.skip.contains(table))
    }

    /// Starts to net the changes of a table under an identity key.
    pub(super) fn pair(&self, id: RouteTableId, table: TableId, identity: &[usize]) -> Pairing {
        let changes = self.commits.iter().flat_map(|c| &c.tables);
        let rows = changes.filter(|c| c.table.id == table).map(|c| c.rows.len()).sum();
        let at = Place::default();
        Pairing { id, table, net: NetTable::new(identity, rows), at }
    }
}

/// A table's changes on the way to be netted.
#[derive(Debug)]
pub(super) struct Pairing {
    pub(super) id: RouteTableId,
    table: TableId,
    pub(super) net: NetTable,
    at: Place,
}

/// How far the commits are netted.
#[derive(Debug, Default)]
struct Place {
    commit: usize,
    /// The old sides of this commit are through.
    new: bool,
    /// Change of a table in the commit, and row of it.
    change: usize,
    row: usize,
}

/// Rows between two looks at the budget.
const ROWS: usize = 64;

impl Pairing {
    /// Goes on until all commits are netted (true) or the budget is spent.
    pub(super) fn step(&mut self, set: &ChangeSet, budget: &mut Budget) -> bool {
        let Pairing { table, net, at, .. } = self;
        while let Some(commit) = set.commits.get(at.commit) {
            while let Some(change) = commit.tables.get(at.change) {
                let rows = change.rows.get(at.row..).unwrap_or_default();
                if change.table.id != *table || rows.is_empty() {
                    (at.change, at.row) = (at.change + 1, 0);
                    continue;
                }
                let rows = &rows[..rows.len().min(ROWS)];
                if at.new {
                    rows.iter().filter_map(|r| r.new.as_ref()).for_each(|r| net.note_new(r));
                } else {
                    rows.iter().filter_map(|r| r.old.as_ref()).for_each(|r| net.note_old(r));
                }
                at.row += rows.len();
                budget.spend(rows.len() as u64 / 4);
                if budget.is_spent() {
                    return false;
                }
            }
            let commit = if at.new { at.commit + 1 } else { at.commit };
            *at = Place { commit, new: !at.new, change: 0, row: 0 };
        }
        true
    }
}
