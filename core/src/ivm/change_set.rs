//! The net change between two versions: several commits as one, per table and identity key.

use std::sync::Arc;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use super::mutant::{self, Mutant};
use crate::change::{Commit, RowChange};
use crate::row::{Key, Row};
use crate::schema::TableId;

/// A row before and after; at least one side is present, and they differ.
#[derive(Debug, Clone)]
pub(super) struct NetChange {
    pub(super) old: Option<Arc<Row>>,
    pub(super) new: Option<Arc<Row>>,
}

/// Net changes of one table under one identity key.
#[derive(Debug, Default)]
pub(super) struct NetTable {
    identity: Box<[usize]>,
    pub(super) changes: Vec<NetChange>,
    index: HashMap<Key, u32, FxBuildHasher>,
}

impl NetTable {
    /// Without changes yet. Pairs old and new rows by identity key: two rows that exchange a
    /// unique value are two pairs, each with its old side from one row and its new side from the
    /// other.
    pub(super) fn new(identity: &[usize]) -> NetTable {
        NetTable { identity: identity.into(), ..NetTable::default() }
    }

    /// Adds changes by replica key.
    pub(super) fn add(&mut self, changes: &[NetChange]) {
        for change in changes {
            if let Some(old) = &change.old {
                self.entry(old.project(&self.identity)).old = Some(Arc::clone(old));
            }
            if let Some(new) = &change.new {
                self.entry(new.project(&self.identity)).new = Some(Arc::clone(new));
            }
        }
    }

    /// All changes were added: drops those that are none.
    pub(super) fn close(&mut self) {
        let same = |c: &NetChange| match (&c.old, &c.new) {
            (Some(old), Some(new)) => old.version == new.version && old.values == new.values,
            (None, None) => true,
            _ => false,
        };
        if self.changes.iter().any(same) {
            let all = std::mem::take(&mut self.changes);
            self.index.clear();
            for change in all.into_iter().filter(|c| !same(c)) {
                if let Some(row) = change.old.as_ref().or(change.new.as_ref()) {
                    self.index.insert(row.project(&self.identity), self.changes.len() as u32);
                    self.changes.push(change);
                }
            }
        }
    }

    fn entry(&mut self, key: Key) -> &mut NetChange {
        let next = self.changes.len() as u32;
        let at = *self.index.entry(key).or_insert(next);
        if at == next {
            self.changes.push(NetChange { old: None, new: None });
        }
        &mut self.changes[at as usize]
    }

    /// The change of a row by identity key.
    pub(super) fn get(&self, key: &Key) -> Option<&NetChange> {
        self.index.get(key).map(|&i| &self.changes[i as usize])
    }
}

/// First old and last new row per replica key, over all commits of an advance.
#[derive(Debug, Default)]
pub(super) struct ChangeSet {
    by_replica_key: HashMap<TableId, Vec<NetChange>, FxBuildHasher>,
}

impl ChangeSet {
    /// Merges commits, except for the tables that `skip` names.
    pub(super) fn new(commits: &[Arc<Commit>], skip: &dyn Fn(TableId) -> bool) -> ChangeSet {
        let tables = || commits.iter().flat_map(|c| &c.tables).filter(|c| !skip(c.table.id));
        let mut by_replica_key: HashMap<TableId, Vec<NetChange>, FxBuildHasher> =
            HashMap::default();
        if commits.len() == 1 {
            // Net already.
            for change in tables() {
                let rows = by_replica_key.entry(change.table.id).or_default();
                let pair = |r: &RowChange| NetChange { old: r.old.clone(), new: r.new.clone() };
                rows.extend(change.rows.iter().map(pair));
            }
            return ChangeSet { by_replica_key };
        }
        let mut merged: HashMap<TableId, HashMap<Key, NetChange, FxBuildHasher>, FxBuildHasher> =
            HashMap::default();
        for change in tables() {
            let key = &change.table.replica_key;
            let rows = merged.entry(change.table.id).or_default();
            // All old sides before any new one: keys may move between rows of a commit.
            for old in change.rows.iter().filter_map(|r| r.old.as_ref()) {
                rows.entry(old.project(key))
                    .or_insert_with(|| NetChange { old: Some(Arc::clone(old)), new: None })
                    .new = None;
                if mutant::is(Mutant::LastOldRow)
                    && let Some(entry) = rows.get_mut(&old.project(key))
                {
                    entry.old = Some(Arc::clone(old));
                }
            }
            for new in change.rows.iter().filter_map(|r| r.new.as_ref()) {
                rows.entry(new.project(key)).or_insert(NetChange { old: None, new: None }).new =
                    Some(Arc::clone(new));
            }
        }
        for (table, rows) in merged {
            by_replica_key.insert(table, rows.into_values().collect());
        }
        ChangeSet { by_replica_key }
    }

    /// Tables with changes.
    pub(super) fn tables(&self) -> impl Iterator<Item = TableId> {
        self.by_replica_key.keys().copied()
    }

    /// The changes of a table by replica key.
    pub(super) fn rows(&self, table: TableId) -> &[NetChange] {
        self.by_replica_key.get(&table).map_or(&[], |rows| rows)
    }
}
