//! One transaction of the stream, applied row by row.
//!
//! Every change reads the old row first, so that the net effect is known; plain writes are tried
//! first, and only a violated unique index makes the writer look for the rows in the way. Such a
//! row is *evicted*: Postgres checks deferrable constraints at the end of a transaction, so two
//! rows may swap a unique value, and SQLite cannot hold both states in between. An evicted row
//! keeps its values in memory until its own change comes and brings it back.

use std::sync::Arc;

use hashbrown::HashMap;
use rusqlite::{Connection, ffi};
use smallvec::SmallVec;
use zeroring_core::change::message::{LiteValue, ReplicaIdentity, Tuple, TupleValue};
use zeroring_core::row::{Row, RowRef};
use zeroring_core::schema::TableSpec;
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;

use super::ReplicaError;
use super::netting::Net;
use super::plan::{RelationPlan, RowKey, TablePlan};
use super::reader::decode_row;
use super::types::{
    LiteParam, VersionCache, keeps_its_form, lite_from_sql, lite_ref, value_from_sql,
};
use crate::changelog::{LogOp, LogWriter, write_key_value};

/// `UPDATE` texts kept; one per set of columns that changes together.
const MAX_UPDATE_SHAPES: usize = 4096;

/// Positions of columns.
type Columns = SmallVec<[u16; 16]>;

/// What outlives a transaction: caches.
#[derive(Debug, Default)]
pub(super) struct ApplyCaches {
    versions: VersionCache,
    updates: HashMap<(Arc<str>, Columns), Arc<str>>,
}

/// A transaction in progress.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) version: StateVersion,
    pub(super) commit_time_ms: f64,
    pub(super) net: Net,
    log: LogWriter,
    /// (table, key of the change log) → values by position.
    evicted: HashMap<(Arc<str>, Vec<u8>), Vec<LiteValue>>,
}

impl Transaction {
    pub(super) fn new(version: StateVersion, commit_time_ms: f64) -> Transaction {
        Transaction {
            log: LogWriter::new(version.clone()),
            version,
            commit_time_ms,
            net: Net::default(),
            evicted: HashMap::new(),
        }
    }
}

/// Applies changes of one transaction.
pub(super) struct Apply<'a> {
    pub(super) connection: &'a Connection,
    pub(super) tx: &'a mut Transaction,
    pub(super) caches: &'a mut ApplyCaches,
}

/// A row of the file, found before it changes.
struct Found {
    rowid: i64,
    old: Seen,
    /// Relation columns whose value differs from the new tuple's.
    changed: Columns,
}

/// A row as clients see it.
enum Seen {
    Row(RowRef),
    /// A value cannot be read: only queries that meet it may fail, not replication.
    Unreadable,
    /// Clients cannot have the table.
    Hidden,
}

/// Whether an old row of the stream is an evicted one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Evicted {
    No,
    Yes,
    /// And another row has its key.
    AndReplaced,
}

/// Why a statement failed.
enum WriteError {
    /// A unique index has the values already.
    Conflict,
    Other(rusqlite::Error),
}

/// An error while a row is changed; the writer adds file and table.
pub(super) enum ApplyError {
    Sqlite(rusqlite::Error),
    Replica(ReplicaError),
}

impl From<rusqlite::Error> for ApplyError {
    fn from(e: rusqlite::Error) -> Self {
        ApplyError::Sqlite(e)
    }
}
impl From<ReplicaError> for ApplyError {
    fn from(e: ReplicaError) -> Self {
        ApplyError::Replica(e)
    }
}

type Result<T> = std::result::Result<T, ApplyError>;

impl Apply<'_> {
    pub(super) fn insert(&mut self, plan: &RelationPlan, new: &Tuple) -> Result<()> {
        check_width(plan, new)?;
        let key = key_json(plan, |c| given(new, c));
        self.insert_row(plan, &|c| given(new, c), key.as_deref())?;
        if let Some(key) = key {
            self.tx.log.row(self.connection, &plan.table.name, &key, LogOp::Set)?;
        }
        Ok(())
    }

    pub(super) fn update(
        &mut self,
        plan: &RelationPlan,
        old: Option<&Tuple>,
        new: &Tuple,
    ) -> Result<()> {
        check_width(plan, new)?;
        if let Some(old) = old {
            check_width(plan, old)?;
        }
        // The old key names the row; where Postgres sent none, it did not change.
        let old_value = |c: usize| old.and_then(|o| given(o, c)).or_else(|| given(new, c));
        // A toasted key column that did not change is only in the old key.
        let new_value = |c: usize| given(new, c).or_else(|| old.and_then(|o| given(o, c)));
        let old_key = key_json(plan, old_value);
        let new_key = key_json(plan, new_value);
        let evicted = self.names_evicted(plan, old_key.as_deref(), old)?;
        let found = match evicted {
            Evicted::No => self.find(plan, &old_value, Some(new), "update")?,
            Evicted::Yes | Evicted::AndReplaced => None,
        };
        match found {
            Some(found) => self.update_row(plan, &found, new)?,
            None => self.update_absent(plan, &old_key, &new_key, &new_value, new)?,
        }
        // The old key's entry is that of the row that has taken it over.
        let old_key_logged = old.is_some() && evicted != Evicted::AndReplaced;
        self.log_update(plan, old_key_logged, old_key, new_key)
    }

    /// An update of a row that is not there: brings an evicted row back, or inserts what is given.
    fn update_absent<'v>(
        &mut self,
        plan: &RelationPlan,
        old_key: &Option<Vec<u8>>,
        new_key: &Option<Vec<u8>>,
        new_value: &dyn Fn(usize) -> Option<&'v LiteValue>,
        new: &Tuple,
    ) -> Result<()> {
        match old_key.clone().and_then(|key| self.take_evicted(plan, key)) {
            Some(cells) => {
                let value = |c: usize| given(new, c).or(Some(&cells[plan.positions[c]]));
                self.insert_row(plan, &value, new_key.as_deref())
            }
            None => self.insert_row(plan, new_value, new_key.as_deref()),
        }
    }

    pub(super) fn delete(&mut self, plan: &RelationPlan, old: &Tuple) -> Result<()> {
        check_width(plan, old)?;
        let value = |c: usize| given(old, c);
        let key = key_json(plan, value);
        let evicted = self.names_evicted(plan, key.as_deref(), Some(old))?;
        let found = match evicted {
            Evicted::No => self.find(plan, &value, None, "delete")?,
            Evicted::Yes | Evicted::AndReplaced => None,
        };
        match found {
            Some(found) => {
                self.execute(&plan.table.delete_by_rowid, &[], None, Some(found.rowid))
                    .map_err(unexpected)?;
                self.record(&plan.table, Some(found.old), None);
            }
            None => {
                if let Some(key) = key.clone() {
                    self.take_evicted(plan, key);
                }
            }
        }
        if let (Some(key), Evicted::No | Evicted::Yes) = (key, evicted) {
            self.tx.log.row(self.connection, &plan.table.name, &key, LogOp::Delete)?;
        }
        Ok(())
    }

    pub(super) fn truncate(&mut self, plan: &RelationPlan) -> Result<()> {
        let table = &plan.table;
        self.connection.prepare_cached(&table.delete_all)?.raw_execute()?;
        if let Some(spec) = &table.spec {
            self.tx.net.incomplete(spec);
        }
        self.tx.evicted.retain(|(name, _), _| *name != table.name);
        self.tx.log.truncate(self.connection, &table.name)?;
        Ok(())
    }

    /// Rows that were in the way of others and never came back are gone, as with the original's
    /// `INSERT OR REPLACE`.
    pub(super) fn finish(&mut self) -> Result<()> {
        let evicted = std::mem::take(&mut self.tx.evicted);
        if !evicted.is_empty() {
            tracing::warn!(
                rows = evicted.len(),
                "rows were replaced by others with the same value in a unique index"
            );
        }
        for (table, key) in evicted.into_keys() {
            self.tx.log.row(self.connection, &table, &key, LogOp::Delete)?;
        }
        Ok(())
    }

    /// Looks the row up by its key; `new` decides which columns count as changed.
    fn find<'v>(
        &mut self,
        plan: &RelationPlan,
        key: &dyn Fn(usize) -> Option<&'v LiteValue>,
        new: Option<&Tuple>,
        op: &'static str,
    ) -> Result<Option<Found>> {
        let no_key = || ReplicaError::NoKey { table: plan.table.name.to_string(), op };
        let whole: Vec<usize>;
        let (select, columns) = match &plan.key {
            RowKey::Columns { select, relation_columns, .. } => (select, relation_columns),
            RowKey::WholeRow => {
                whole = (0..plan.positions.len()).collect();
                (&plan.select_whole_row, &whole)
            }
            RowKey::None => return Err(no_key().into()),
        };
        let mut statement = self.connection.prepare_cached(select)?;
        for (i, &column) in columns.iter().enumerate() {
            let value = key(column).ok_or_else(no_key)?;
            statement.raw_bind_parameter(i + 1, LiteParam(value))?;
        }
        let mut rows = statement.raw_query();
        let Some(row) = rows.next()? else { return Ok(None) };
        let mut changed = Columns::new();
        if let Some(new) = new {
            for (c, value) in new.iter().enumerate() {
                if let TupleValue::Value(value) = value
                    && row.get_ref(2 + plan.positions[c])? != lite_ref(value)
                {
                    changed.push(c as u16);
                }
            }
        }
        let old = see(&plan.table, &mut self.caches.versions, row)?;
        Ok(Some(Found { rowid: row.get(0)?, old, changed }))
    }

    /// Changes a row in place. Only columns that differ are written: SQLite touches every index
    /// over a column that is named, changed or not.
    fn update_row(&mut self, plan: &RelationPlan, found: &Found, new: &Tuple) -> Result<()> {
        let values: SmallVec<[&LiteValue; 16]> =
            found.changed.iter().filter_map(|&c| given(new, usize::from(c))).collect();
        let sql = self.update_sql(plan, &found.changed);
        match self.execute(&sql, &values, Some(()), Some(found.rowid)) {
            Ok(()) => {}
            Err(WriteError::Conflict) => {
                let mut cells = self.read_cells(&plan.table, found.rowid)?;
                for &c in &found.changed {
                    if let Some(value) = given(new, usize::from(c)) {
                        cells[plan.positions[usize::from(c)]] = value.clone();
                    }
                }
                self.evict_conflicts(plan, &cells, Some(found.rowid))?;
                self.execute(&sql, &values, Some(()), Some(found.rowid)).map_err(unexpected)?;
            }
            Err(WriteError::Other(e)) => return Err(e.into()),
        }
        let changes =
            found.changed.iter().zip(&values).map(|(&c, v)| (plan.positions[usize::from(c)], *v));
        let base = match &found.old {
            Seen::Row(row) => Some(row.values.to_vec()),
            Seen::Unreadable | Seen::Hidden => None,
        };
        let after = self.seen_after(&plan.table, base, changes, found.rowid)?;
        let before = match &found.old {
            Seen::Row(row) => Seen::Row(row.clone()),
            Seen::Unreadable => Seen::Unreadable,
            Seen::Hidden => Seen::Hidden,
        };
        self.record(&plan.table, Some(before), Some(after));
        Ok(())
    }

    /// Inserts the given columns; rows in the way are evicted.
    fn insert_row<'v>(
        &mut self,
        plan: &RelationPlan,
        value: &dyn Fn(usize) -> Option<&'v LiteValue>,
        key: Option<&[u8]>,
    ) -> Result<()> {
        let table = &plan.table;
        let mut columns: SmallVec<[usize; 16]> = SmallVec::new();
        let mut values: SmallVec<[&LiteValue; 16]> = SmallVec::new();
        for c in 0..plan.positions.len() {
            if let Some(v) = value(c) {
                columns.push(plan.positions[c]);
                values.push(v);
            }
        }
        let partial;
        let sql = if columns.len() == plan.positions.len() {
            &plan.insert_all
        } else {
            partial = table.insert(&columns);
            &partial
        };
        match self.execute(sql, &values, Some(()), None) {
            Ok(()) => {}
            Err(WriteError::Conflict) => {
                let mut cells = vec![LiteValue::Null; table.columns.len()];
                for (&c, v) in columns.iter().zip(&values) {
                    cells[c] = (*v).clone();
                }
                self.evict_conflicts(plan, &cells, None)?;
                self.execute(sql, &values, Some(()), None).map_err(unexpected)?;
            }
            Err(WriteError::Other(e)) => return Err(e.into()),
        }
        if let Some(key) = key {
            // A row of the same key was not evicted but replaced.
            self.take_evicted(plan, key.to_vec());
        }
        let rowid = self.connection.last_insert_rowid();
        let base = table.spec.as_ref().map(|s| vec![Value::Null; s.columns.len()]);
        let changes = columns.iter().zip(&values).map(|(&c, v)| (c, *v));
        let after = self.seen_after(table, base, changes, rowid)?;
        self.record(table, None, Some(after));
        Ok(())
    }

    /// Removes the rows that have the same values as `cells` in a unique index.
    fn evict_conflicts(
        &mut self,
        plan: &RelationPlan,
        cells: &[LiteValue],
        own_rowid: Option<i64>,
    ) -> Result<()> {
        let table = &plan.table;
        for index in &table.unique {
            if index.columns.iter().any(|&c| cells[c] == LiteValue::Null) {
                continue;
            }
            let mut statement = self.connection.prepare_cached(&index.select)?;
            for (i, &c) in index.columns.iter().enumerate() {
                statement.raw_bind_parameter(i + 1, LiteParam(&cells[c]))?;
            }
            let mut rows = statement.raw_query();
            let Some(row) = rows.next()? else { continue };
            let rowid: i64 = row.get(0)?;
            if Some(rowid) == own_rowid {
                continue;
            }
            let seen = see(table, &mut self.caches.versions, row)?;
            let cells = cells_of(table, row)?;
            drop(rows);
            drop(statement);
            self.execute(&table.delete_by_rowid, &[], None, Some(rowid)).map_err(unexpected)?;
            self.record(table, Some(seen), None);
            if let Some(key) = key_json(plan, |c| Some(&cells[plan.positions[c]])) {
                self.tx.evicted.insert((table.name.clone(), key), cells);
            }
        }
        Ok(())
    }

    /// Whether `old`, a whole row, is an evicted row rather than the one that took over its key:
    /// under REPLICA IDENTITY FULL the key may be a deferrable one, and two rows may swap it.
    fn names_evicted(
        &self,
        plan: &RelationPlan,
        key: Option<&[u8]>,
        old: Option<&Tuple>,
    ) -> Result<Evicted> {
        let (Some(key), Some(old)) = (key, old) else { return Ok(Evicted::No) };
        if self.tx.evicted.is_empty() || plan.relation.identity != ReplicaIdentity::Full {
            return Ok(Evicted::No);
        }
        let Some(evicted) = self.tx.evicted.get(&(plan.table.name.clone(), key.to_vec())) else {
            return Ok(Evicted::No);
        };
        let find = |sql: &str, columns: &[usize]| -> Result<Option<Vec<LiteValue>>> {
            let mut statement = self.connection.prepare_cached(sql)?;
            for (i, &column) in columns.iter().enumerate() {
                let value = given(old, column).unwrap_or(&LiteValue::Null);
                statement.raw_bind_parameter(i + 1, LiteParam(value))?;
            }
            statement.raw_query().next()?.map(|row| cells_of(&plan.table, row)).transpose()
        };
        let RowKey::Columns { select, relation_columns, .. } = &plan.key else {
            return Ok(Evicted::No);
        };
        // The row that took the key over was written by this transaction, so it compares equal to
        // what the stream says of it. SQLite compares: it knows what affinity did to the values.
        let all: Vec<usize> = (0..plan.positions.len()).collect();
        Ok(match find(&plan.select_whole_row, &all)? {
            // Twins: one of them goes, one stays.
            Some(cells) if cells == *evicted => Evicted::AndReplaced,
            Some(_) => Evicted::No,
            None if find(select, relation_columns)?.is_some() => Evicted::AndReplaced,
            None => Evicted::Yes,
        })
    }

    fn take_evicted(&mut self, plan: &RelationPlan, key: Vec<u8>) -> Option<Vec<LiteValue>> {
        if self.tx.evicted.is_empty() {
            return None;
        }
        self.tx.evicted.remove(&(plan.table.name.clone(), key))
    }

    /// The row after a write: `base` with `changes`, or read back where affinity decides the form.
    fn seen_after<'v>(
        &mut self,
        table: &TablePlan,
        base: Option<Vec<Value>>,
        changes: impl Iterator<Item = (usize, &'v LiteValue)>,
        rowid: i64,
    ) -> Result<Seen> {
        let Some(spec) = &table.spec else { return Ok(Seen::Hidden) };
        if let Some(mut values) = base {
            let mut known = true;
            for (position, value) in changes {
                let Some(column) = spec.columns.get(position) else { continue };
                let read = keeps_its_form(value, table.columns[position].affinity)
                    .then(|| {
                        value_from_sql(
                            lite_ref(value),
                            column.value_type,
                            &table.name,
                            &column.name,
                        )
                    })
                    .and_then(std::result::Result::ok);
                match read {
                    Some(value) => values[position] = value,
                    None => {
                        known = false;
                        break;
                    }
                }
            }
            if known {
                return Ok(Seen::Row(Row::new(self.row_version(spec), values)));
            }
        }
        let mut statement = self.connection.prepare_cached(&table.select_by_rowid)?;
        let mut rows = statement.query([rowid])?;
        match rows.next()? {
            Some(row) => see(table, &mut self.caches.versions, row),
            None => Ok(Seen::Unreadable),
        }
    }

    fn row_version(&self, spec: &TableSpec) -> StateVersion {
        self.tx.version.clone().max(spec.min_row_version.clone())
    }

    fn record(&mut self, table: &TablePlan, old: Option<Seen>, new: Option<Seen>) {
        let Some(spec) = &table.spec else { return };
        let unreadable = |s: &Option<Seen>| matches!(s, Some(Seen::Unreadable));
        if unreadable(&old) || unreadable(&new) {
            return self.tx.net.incomplete(spec);
        }
        let row = |s: Option<Seen>| match s {
            Some(Seen::Row(row)) => Some(row),
            _ => None,
        };
        self.tx.net.change(spec, row(old), row(new));
    }

    /// Writes the log as the original: with an old key its deletion, then the new key.
    fn log_update(
        &mut self,
        plan: &RelationPlan,
        has_old: bool,
        old_key: Option<Vec<u8>>,
        new_key: Option<Vec<u8>>,
    ) -> Result<()> {
        let (Some(old_key), Some(new_key)) = (old_key, new_key) else { return Ok(()) };
        if has_old {
            if old_key == new_key {
                // Its entry would be overwritten at once; only its place counts.
                self.tx.log.skip();
            } else {
                self.tx.log.row(self.connection, &plan.table.name, &old_key, LogOp::Delete)?;
            }
        }
        self.tx.log.row(self.connection, &plan.table.name, &new_key, LogOp::Set)?;
        Ok(())
    }

    fn update_sql(&mut self, plan: &RelationPlan, changed: &Columns) -> Arc<str> {
        let positions: Columns =
            changed.iter().map(|&c| plan.positions[usize::from(c)] as u16).collect();
        let updates = &mut self.caches.updates;
        if updates.len() >= MAX_UPDATE_SHAPES {
            updates.clear();
        }
        updates
            .entry((plan.table.name.clone(), positions))
            .or_insert_with_key(|(_, positions)| {
                let columns: Vec<usize> = positions.iter().map(|&c| usize::from(c)).collect();
                plan.table.update(&columns).into()
            })
            .clone()
    }

    /// Runs a write: values, then the transaction's version if `versioned`, then the rowid.
    fn execute(
        &self,
        sql: &str,
        values: &[&LiteValue],
        versioned: Option<()>,
        rowid: Option<i64>,
    ) -> std::result::Result<(), WriteError> {
        let run = || {
            let mut statement = self.connection.prepare_cached(sql)?;
            let mut at = 0;
            for value in values {
                at += 1;
                statement.raw_bind_parameter(at, LiteParam(value))?;
            }
            if versioned.is_some() {
                at += 1;
                statement.raw_bind_parameter(at, self.tx.version.as_str())?;
            }
            if let Some(rowid) = rowid {
                statement.raw_bind_parameter(at + 1, rowid)?;
            }
            statement.raw_execute()
        };
        run().map(drop).map_err(|error| match &error {
            rusqlite::Error::SqliteFailure(e, _)
                if e.extended_code == ffi::SQLITE_CONSTRAINT_UNIQUE =>
            {
                WriteError::Conflict
            }
            _ => WriteError::Other(error),
        })
    }

    fn read_cells(&self, table: &TablePlan, rowid: i64) -> Result<Vec<LiteValue>> {
        let mut statement = self.connection.prepare_cached(&table.select_by_rowid)?;
        let mut rows = statement.query([rowid])?;
        match rows.next()? {
            Some(row) => cells_of(table, row),
            None => Err(rusqlite::Error::QueryReturnedNoRows.into()),
        }
    }
}

/// A conflict that remains although the rows in the way were removed.
fn unexpected(error: WriteError) -> ApplyError {
    ApplyError::Sqlite(match error {
        WriteError::Conflict => {
            rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_CONSTRAINT_UNIQUE), None)
        }
        WriteError::Other(e) => e,
    })
}

fn see(table: &TablePlan, versions: &mut VersionCache, row: &rusqlite::Row<'_>) -> Result<Seen> {
    let Some(spec) = &table.spec else { return Ok(Seen::Hidden) };
    match decode_row(spec, versions, row, 1) {
        Ok(row) => Ok(Seen::Row(row)),
        Err(ReplicaError::UnsupportedValue(reason)) => {
            tracing::debug!(reason, "a changed row cannot be read");
            Ok(Seen::Unreadable)
        }
        Err(other) => Err(other.into()),
    }
}

fn cells_of(table: &TablePlan, row: &rusqlite::Row<'_>) -> Result<Vec<LiteValue>> {
    (0..table.columns.len()).map(|i| Ok(lite_from_sql(row.get_ref(2 + i)?)?)).collect()
}

/// A column's value if the tuple has it.
fn given(tuple: &Tuple, column: usize) -> Option<&LiteValue> {
    match tuple.get(column) {
        Some(TupleValue::Value(value)) => Some(value),
        Some(TupleValue::Absent) | None => None,
    }
}

fn check_width(plan: &RelationPlan, tuple: &Tuple) -> Result<()> {
    if tuple.len() == plan.positions.len() {
        return Ok(());
    }
    Err(ReplicaError::SchemaMismatch {
        table: plan.table.name.to_string(),
        problem: format!(
            "a tuple of {} values for a relation of {} columns",
            tuple.len(),
            plan.positions.len()
        ),
    }
    .into())
}

/// The change log's key of a row; `None` if the table has no key or a part of it is missing.
fn key_json<'v>(
    plan: &RelationPlan,
    value: impl Fn(usize) -> Option<&'v LiteValue>,
) -> Option<Vec<u8>> {
    let RowKey::Columns { relation_columns, json_names, .. } = &plan.key else { return None };
    let mut out = Vec::with_capacity(48);
    for (i, (&column, name)) in relation_columns.iter().zip(json_names).enumerate() {
        out.push(if i == 0 { b'{' } else { b',' });
        out.extend_from_slice(name.as_bytes());
        out.push(b':');
        write_key_value(&mut out, value(column)?);
    }
    out.push(b'}');
    Some(out)
}
