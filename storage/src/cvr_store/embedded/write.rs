//! The writer: applies flushes inside one transaction. A flush that is refused is so before it has
//! written anything; one that fails later spoils the transaction, which is then made anew with a
//! savepoint for each flush. That is rare, and savepoints are not for nothing.

use std::collections::HashMap;
use std::sync::Arc;

use rusqlite::types::Null;
use rusqlite::{Connection, OptionalExtension, params};
use zeroring_core::cvr::store::{
    ClientWrite, CvrStoreError, DesireWrite, Flushed, Purged, QueryWrite, RowChange, RowWrite,
};
use zeroring_core::cvr::{
    ClientGroupId, GroupFlush, Query, QueryBody, QueryHash, RefCounts, TtlClock,
};
use zeroring_core::version::CvrVersion;

use super::super::owed::RowsPlan;
use super::super::{Answer, PurgeLimits};
use super::{codec, schema};

/// Kinds of queries in the file.
pub(super) const KIND_CLIENT: i64 = 0;
pub(super) const KIND_CUSTOM: i64 = 1;
pub(super) const KIND_INTERNAL: i64 = 2;

/// Numbers of queries that a flush mentions.
type QueryNumbers = HashMap<QueryHash, i64>;

/// The only connection that writes.
#[derive(Debug)]
pub(super) struct Writer {
    connection: Connection,
    task_id: Arc<str>,
    /// Records written since last asked.
    written: usize,
}

/// A group as the file has it when its flush begins.
struct Known {
    num: i64,
    next_query: i64,
    has_client_schema: bool,
    active_hour: i64,
}

/// What became of a flush in a transaction.
#[derive(Debug)]
pub(super) enum Applied {
    /// Written, or refused without a trace.
    Verdict(Answer<Flushed>),
    /// It failed half way: the transaction must be made anew, with savepoints.
    Spoiled,
}

pub(super) fn failed(e: rusqlite::Error) -> CvrStoreError {
    CvrStoreError::Storage(e.to_string())
}

impl Writer {
    pub(super) fn new(connection: Connection, task_id: Arc<str>) -> Writer {
        Writer { connection, task_id, written: 0 }
    }

    /// Whether commits are synced. Nothing but rows that follow may be written without: the commit
    /// that ends them is synced, and all before it with it.
    pub(super) fn set_synced(&self, synced: bool) -> Answer<()> {
        let sql = if synced { "PRAGMA synchronous = FULL" } else { "PRAGMA synchronous = NORMAL" };
        self.connection.execute_batch(sql).map_err(failed)
    }

    /// Undoes the transaction, if there is one.
    pub(super) fn roll_back(&mut self) {
        if !self.connection.is_autocommit() {
            // If even this fails, the commit will.
            let _ = self.execute("ROLLBACK");
        }
    }

    pub(super) fn begin(&mut self) -> Answer<()> {
        self.execute("BEGIN IMMEDIATE")
    }

    /// Commits, durably. On failure nothing of the transaction is there.
    pub(super) fn commit(&mut self) -> Answer<()> {
        if self.connection.is_autocommit() {
            // An earlier failure (disk full, I/O error) has rolled everything back.
            return Err(CvrStoreError::Storage("the transaction was rolled back".to_owned()));
        }
        self.execute("COMMIT").inspect_err(|_| {
            let _ = self.execute("ROLLBACK");
        })
    }

    /// Checkpoints between two transactions: no other writer adds to the WAL meanwhile.
    pub(super) fn checkpoint(&mut self) {
        if let Err(error) = schema::checkpoint(&self.connection) {
            tracing::warn!(%error, "the CVR file was not checkpointed");
        }
    }

    /// Gives the page cache back.
    pub(super) fn release_memory(&self) {
        schema::release_memory(&self.connection);
    }

    /// Records written since the last call.
    pub(super) fn take_written(&mut self) -> usize {
        std::mem::take(&mut self.written)
    }

    fn execute(&self, sql: &str) -> Answer<()> {
        self.connection.prepare_cached(sql).and_then(|mut s| s.execute([])).map_err(failed)?;
        Ok(())
    }

    /// Applies one group's flush.
    pub(super) fn flush(&mut self, flush: &GroupFlush, rows: RowsPlan) -> Applied {
        if self.connection.is_autocommit() {
            let why = "the transaction was rolled back".to_owned();
            return Applied::Verdict(Err(CvrStoreError::Storage(why)));
        }
        match self.check(flush, rows) {
            Ok(known) => match self.apply(known, flush, rows) {
                Ok(flushed) => Applied::Verdict(Ok(flushed)),
                Err(_) => Applied::Spoiled,
            },
            Err(refused) => Applied::Verdict(Err(refused)),
        }
    }

    /// Applies one group's flush, or leaves no trace of it.
    pub(super) fn flush_carefully(
        &mut self,
        flush: &GroupFlush,
        rows: RowsPlan,
    ) -> Answer<Flushed> {
        if self.connection.is_autocommit() {
            return Err(CvrStoreError::Storage("the transaction was rolled back".to_owned()));
        }
        self.execute("SAVEPOINT flush")?;
        let result = self.check(flush, rows).and_then(|known| self.apply(known, flush, rows));
        if result.is_err() && !self.connection.is_autocommit() {
            self.execute("ROLLBACK TO flush")?;
        }
        if !self.connection.is_autocommit() {
            self.execute("RELEASE flush")?;
        }
        result
    }

    fn apply(
        &mut self,
        known: Option<Known>,
        flush: &GroupFlush,
        rows: RowsPlan,
    ) -> Answer<Flushed> {
        let known = match known {
            Some(known) => known,
            None => {
                let num = self.insert_group(flush)?;
                Known { num, next_query: 0, has_client_schema: false, active_hour: 0 }
            }
        };
        let Known { num: grp, mut next_query, has_client_schema, active_hour } = known;
        for client in &flush.clients {
            self.write_client(grp, client)?;
        }
        for query in &flush.queries {
            self.write_query(grp, query, &mut next_query).map_err(|e| e.of(&flush.group))?;
        }
        for desire in &flush.desires {
            self.write_desire(grp, desire)?;
        }
        self.update_group(grp, flush, next_query)?;
        let hour = schema::hour(flush.instance.last_active_ms);
        if hour != active_hour {
            self.connection
                .prepare_cached("UPDATE groups SET active_hour = ? WHERE num = ?")
                .and_then(|mut s| s.execute(params![hour, grp]))
                .map_err(failed)?;
        }
        if !has_client_schema {
            self.set_client_schema(grp, flush)?;
        }
        self.written += 1 + flush.clients.len() + flush.queries.len() + flush.desires.len();
        if rows == RowsPlan::Follow {
            self.connection
                .prepare_cached("UPDATE groups SET rows_version = ? WHERE num = ?")
                .and_then(|mut s| s.execute(params![flush.expected.cookie(), grp]))
                .map_err(failed)?;
        }
        let mut flushed = Flushed { rows: flush.rows.len(), anomalies: 0, rows_follow: true };
        if !rows.follow() {
            flushed.rows_follow = false;
            flushed.anomalies = self.write_rows(grp, &flush.group, &flush.rows)?;
        }
        Ok(flushed)
    }

    /// Ownership first, then the version.
    fn check(&self, flush: &GroupFlush, rows: RowsPlan) -> Answer<Option<Known>> {
        let stored = self
            .connection
            .prepare_cached(
                "SELECT num, next_query, version, owner, granted, deleted,
                   client_schema IS NOT NULL, active_hour, rows_version
                 FROM groups WHERE id = ?",
            )
            .and_then(|mut s| {
                s.query_row([flush.group.as_str()], |row| {
                    let known = Known {
                        num: row.get(0)?,
                        next_query: row.get(1)?,
                        has_client_schema: row.get(6)?,
                        active_hour: row.get(7)?,
                    };
                    let owner: Option<Arc<str>> = row.get(3)?;
                    let granted: Option<f64> = row.get(4)?;
                    let (version, deleted) = (row.get::<_, String>(2)?, row.get::<_, bool>(5)?);
                    Ok((known, version, owner, granted, deleted, row.get::<_, Option<String>>(8)?))
                })
                .optional()
            })
            .map_err(failed)?;
        let expected = flush.expected.cookie();
        let Some((known, version, owner, granted, deleted, rows_version)) = stored else {
            let nothing = CvrVersion::empty().cookie();
            if expected == nothing {
                return Ok(None);
            }
            return Err(CvrStoreError::ConcurrentModification { expected, actual: nothing });
        };
        let granted_ms = granted.unwrap_or(0.0);
        if let Some(owner) = owner.filter(|owner| *owner != self.task_id)
            && granted_ms > flush.connect_ms
        {
            return Err(CvrStoreError::Ownership {
                owner,
                granted_ms,
                connect_ms: flush.connect_ms,
            });
        }
        if version != expected || deleted {
            return Err(CvrStoreError::ConcurrentModification { expected, actual: version });
        }
        match rows_version.filter(|_| rows != RowsPlan::FollowOwed) {
            // Whoever owed the rows is gone: a load will say so.
            Some(actual) => Err(CvrStoreError::ConcurrentModification { expected, actual }),
            None => Ok(Some(known)),
        }
    }

    fn insert_group(&self, flush: &GroupFlush) -> Answer<i64> {
        self.connection
            .prepare_cached(
                "INSERT INTO groups (id, version, last_active, ttl_clock) VALUES (?, '00', 0, 0)",
            )
            .and_then(|mut s| s.insert([flush.group.as_str()]))
            .map_err(failed)
    }

    fn update_group(&self, grp: i64, flush: &GroupFlush, next_query: i64) -> Answer<()> {
        let instance = &flush.instance;
        self.connection
            .prepare_cached(
                "UPDATE groups SET version = ?, last_active = ?, ttl_clock = ?,
                 replica_version = ?, owner = ?, granted = ?, profile = ?, next_query = ?
                 WHERE num = ?",
            )
            .and_then(|mut s| {
                s.execute(params![
                    instance.version.cookie(),
                    instance.last_active_ms,
                    instance.ttl_clock.0,
                    instance.replica_version.as_ref().map(|v| v.as_str()),
                    self.task_id,
                    flush.connect_ms,
                    instance.profile_id,
                    next_query,
                    grp,
                ])
            })
            .map_err(failed)?;
        Ok(())
    }

    /// Set once, and the same for most groups: stored once.
    fn set_client_schema(&self, grp: i64, flush: &GroupFlush) -> Answer<()> {
        let Some(client_schema) = &flush.instance.client_schema else { return Ok(()) };
        let json = client_schema.text();
        self.connection
            .prepare_cached("INSERT INTO schemas (json) VALUES (?) ON CONFLICT DO NOTHING")
            .and_then(|mut s| s.execute([json]))
            .map_err(failed)?;
        self.connection
            .prepare_cached(
                "UPDATE groups SET client_schema = (SELECT num FROM schemas WHERE json = ?)
                 WHERE num = ?",
            )
            .and_then(|mut s| s.execute(params![json, grp]))
            .map_err(failed)?;
        Ok(())
    }

    fn write_client(&self, grp: i64, client: &ClientWrite) -> Answer<()> {
        let (sql, id) = match client {
            ClientWrite::Insert(id) => ("INSERT INTO clients (grp, id) VALUES (?, ?)", id),
            ClientWrite::Delete(id) => ("DELETE FROM clients WHERE grp = ? AND id = ?", id),
        };
        self.connection
            .prepare_cached(sql)
            .and_then(|mut s| s.execute(params![grp, id.as_str()]))
            .map_err(failed)?;
        Ok(())
    }

    fn write_query(
        &self,
        grp: i64,
        write: &QueryWrite,
        next_query: &mut i64,
    ) -> Result<(), QueryFailure> {
        match write {
            QueryWrite::Full(query) => self.upsert_query(grp, query, next_query),
            QueryWrite::Partial { id, executed, signature } => {
                let mut found = true;
                if let Some(e) = executed {
                    found &= self.update(
                        "UPDATE queries SET patch = ?, transformation_hash = ?,
                         transformation_version = ?, deleted = 0 WHERE grp = ? AND hash = ?",
                        params![
                            e.patch_version.as_ref().map(CvrVersion::cookie),
                            e.transformation_hash,
                            e.transformation_version.cookie(),
                            grp,
                            id.as_str(),
                        ],
                    )?;
                }
                if let Some(signature) = signature {
                    found &= self.update(
                        "UPDATE queries SET signature = ? WHERE grp = ? AND hash = ?",
                        params![*signature as i64, grp, id.as_str()],
                    )?;
                }
                if found { Ok(()) } else { Err(QueryFailure::Unknown(id.clone())) }
            }
            QueryWrite::Removed { id, patch_version } => {
                let found = self.update(
                    "UPDATE queries SET patch = ?, deleted = 1, transformation_hash = NULL,
                     transformation_version = NULL WHERE grp = ? AND hash = ?",
                    params![patch_version.cookie(), grp, id.as_str()],
                )?;
                if found { Ok(()) } else { Err(QueryFailure::Unknown(id.clone())) }
            }
        }
    }

    /// True if a record was there.
    fn update(&self, sql: &str, params: &[&dyn rusqlite::ToSql]) -> Result<bool, QueryFailure> {
        let changed = self.connection.prepare_cached(sql).and_then(|mut s| s.execute(params))?;
        Ok(changed > 0)
    }

    fn upsert_query(
        &self,
        grp: i64,
        query: &Query,
        next_query: &mut i64,
    ) -> Result<(), QueryFailure> {
        let (kind, body, args): (_, Arc<str>, _) = match &query.body {
            QueryBody::Client { ast } => (KIND_CLIENT, ast_text(query, ast)?, None),
            QueryBody::Internal { ast } => (KIND_INTERNAL, ast_text(query, ast)?, None),
            QueryBody::Custom { name, args } => (KIND_CUSTOM, name.clone(), Some(args.clone())),
        };
        let inserted = self
            .connection
            .prepare_cached(
                "INSERT INTO queries (grp, hash, num, kind, body, args, patch,
                   transformation_hash, transformation_version, signature)
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                 ON CONFLICT DO UPDATE SET kind = excluded.kind, body = excluded.body,
                   args = excluded.args, patch = excluded.patch,
                   transformation_hash = excluded.transformation_hash,
                   transformation_version = excluded.transformation_version,
                   signature = excluded.signature, deleted = 0
                 RETURNING num",
            )
            .and_then(|mut s| {
                s.query_row(
                    params![
                        grp,
                        query.id.as_str(),
                        *next_query,
                        kind,
                        body,
                        args,
                        query.patch_version.as_ref().map(CvrVersion::cookie),
                        query.transformation_hash,
                        query.transformation_version.as_ref().map(CvrVersion::cookie),
                        query.signature.map(|s| s as i64),
                    ],
                    |row| row.get::<_, i64>(0),
                )
            })?;
        if inserted == *next_query {
            *next_query += 1;
        }
        Ok(())
    }

    fn write_desire(&self, grp: i64, desire: &DesireWrite) -> Answer<()> {
        self.connection
            .prepare_cached(
                "INSERT INTO desires (grp, client, query, patch, deleted, ttl, inactivated)
                 VALUES (?, ?, ?, ?, ?, ?, ?)
                 ON CONFLICT DO UPDATE SET patch = excluded.patch, deleted = excluded.deleted,
                   ttl = excluded.ttl, inactivated = excluded.inactivated",
            )
            .and_then(|mut s| {
                s.execute(params![
                    grp,
                    desire.client.as_str(),
                    desire.query.as_str(),
                    desire.patch_version.cookie(),
                    desire.deleted,
                    desire.ttl_ms,
                    desire.inactivated_at.map(|c| c.0),
                ])
            })
            .map_err(failed)?;
        Ok(())
    }

    /// Writes rows of a group; returns how many should have been live and were not.
    fn write_rows(&mut self, grp: i64, group: &ClientGroupId, rows: &[RowWrite]) -> Answer<usize> {
        let mut numbers = QueryNumbers::new();
        let mut anomalies = 0;
        for row in rows {
            let done = self.write_row(grp, row, &mut numbers).map_err(|e| e.of(group))?;
            anomalies += usize::from(!done);
        }
        if anomalies > 0 {
            tracing::warn!(%group, rows = anomalies,
                "rows changed that the CVR did not hold as live");
        }
        self.written += rows.len();
        Ok(anomalies)
    }

    /// Writes rows that follow, unconditionally.
    pub(super) fn write_owed_rows(
        &mut self,
        group: &ClientGroupId,
        rows: &[RowWrite],
    ) -> Answer<()> {
        let Some(grp) = self
            .connection
            .prepare_cached("SELECT num FROM groups WHERE id = ?")
            .and_then(|mut s| s.query_row([group.as_str()], |r| r.get(0)).optional())
            .map_err(failed)?
        else {
            // Purged and forgotten meanwhile.
            return Ok(());
        };
        self.write_rows(grp, group, rows).map(drop)
    }

    /// The rows of a group are of this version now.
    pub(super) fn set_rows_version(
        &mut self,
        group: &ClientGroupId,
        version: &CvrVersion,
    ) -> Answer<()> {
        self.connection
            .prepare_cached("UPDATE groups SET rows_version = nullif(?, version) WHERE id = ?")
            .and_then(|mut s| s.execute(params![version.cookie(), group.as_str()]))
            .map_err(failed)?;
        Ok(())
    }

    /// False if there should have been a live record and was none.
    fn write_row(
        &self,
        grp: i64,
        row: &RowWrite,
        numbers: &mut QueryNumbers,
    ) -> Result<bool, QueryFailure> {
        let id = row.id.text();
        match &row.change {
            RowChange::Put { row_version, patch_version, ref_counts } => {
                let refs = self.encode(grp, ref_counts, numbers)?;
                self.put_row(grp, id, row_version.as_str(), &patch_version.cookie(), &refs)?;
                Ok(true)
            }
            RowChange::Tombstone { row_version, patch_version } => self.update(
                "UPDATE rows SET row_version = coalesce(?, row_version), patch = ?, refs = NULL
                 WHERE grp = ? AND id = ? AND refs IS NOT NULL",
                params![row_version.as_ref().map(|v| v.as_str()), patch_version.cookie(), grp, id],
            ),
            RowChange::Delete => {
                self.update("DELETE FROM rows WHERE grp = ? AND id = ?", params![grp, id])?;
                Ok(true)
            }
            RowChange::Adjust { counts, row_version, patch_version, keep_patch_version } => {
                let mut select = self.connection.prepare_cached(
                    "SELECT row_version, patch, refs FROM rows
                     WHERE grp = ? AND id = ? AND refs IS NOT NULL",
                )?;
                let stored = select
                    .query_row(params![grp, id], |row| {
                        let refs: Vec<u8> = row.get(2)?;
                        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, refs))
                    })
                    .optional()?;
                let found = stored.is_some();
                let row_version = row_version.as_ref().map(|v| v.as_str());
                let (known_version, known_patch, known_refs) = match stored {
                    Some(stored) => stored,
                    // Without contents there is nothing that a client could have been sent.
                    None if row_version.is_none() => return Ok(false),
                    None => (String::new(), String::new(), Vec::new()),
                };
                let damaged = || QueryFailure::Damaged(format!("reference counts of row {id}"));
                let mut merged = codec::decode(&known_refs).ok_or_else(damaged)?;
                for (query, count) in counts.iter() {
                    let number = self.number(grp, query, numbers)?;
                    merged.retain(|(n, _)| *n != number);
                    if count != 0 {
                        merged.push((number, count));
                    }
                }
                merged.sort_unstable();
                let keep = *keep_patch_version && row_version == Some(known_version.as_str());
                let patch = if keep { known_patch } else { patch_version.cookie() };
                let refs = codec::encode_numbers(&merged);
                self.put_row(grp, id, row_version.unwrap_or(&known_version), &patch, &refs)?;
                Ok(found)
            }
        }
    }

    fn put_row(
        &self,
        grp: i64,
        id: &str,
        row_version: &str,
        patch: &str,
        refs: &[u8],
    ) -> rusqlite::Result<()> {
        // Nothing left is a tombstone.
        let refs: &dyn rusqlite::ToSql = if refs.is_empty() { &Null } else { &refs };
        self.connection
            .prepare_cached(
                "INSERT INTO rows (grp, id, row_version, patch, refs) VALUES (?, ?, ?, ?, ?)
                 ON CONFLICT DO UPDATE SET row_version = excluded.row_version,
                   patch = excluded.patch, refs = excluded.refs",
            )?
            .execute(params![grp, id, row_version, patch, refs])?;
        Ok(())
    }

    fn encode(
        &self,
        grp: i64,
        counts: &RefCounts,
        numbers: &mut QueryNumbers,
    ) -> Result<Vec<u8>, QueryFailure> {
        codec::encode(counts, |query| self.number(grp, query, numbers))
    }

    fn number(
        &self,
        grp: i64,
        query: &QueryHash,
        numbers: &mut QueryNumbers,
    ) -> Result<i64, QueryFailure> {
        if let Some(number) = numbers.get(query) {
            return Ok(*number);
        }
        let number = self
            .connection
            .prepare_cached("SELECT num FROM queries WHERE grp = ? AND hash = ?")?
            .query_row(params![grp, query.as_str()], |row| row.get(0))
            .optional()?
            .ok_or_else(|| QueryFailure::Unknown(query.clone()))?;
        numbers.insert(query.clone(), number);
        Ok(number)
    }

    /// Notes a group's clock. A group that is unknown is left alone.
    pub(super) fn ttl_clock(
        &mut self,
        group: &ClientGroupId,
        clock: TtlClock,
        now_ms: f64,
    ) -> Answer<()> {
        self.written += 1;
        self.connection
            .prepare_cached(
                "UPDATE groups SET ttl_clock = ?, last_active = ?, active_hour = ? WHERE id = ?",
            )
            .and_then(|mut s| {
                s.execute(params![clock.0, now_ms, schema::hour(now_ms), group.as_str()])
            })
            .map_err(failed)?;
        Ok(())
    }

    /// Notes that this server took a group over, unless somebody has a later connection.
    pub(super) fn claim(&mut self, group: &ClientGroupId, connect_ms: f64) -> Answer<()> {
        self.written += 1;
        self.connection
            .prepare_cached(
                "UPDATE groups SET owner = ?1, granted = ?2
                 WHERE id = ?3 AND deleted = 0 AND (granted IS NULL OR granted <= ?2)",
            )
            .and_then(|mut s| s.execute(params![self.task_id, connect_ms, group.as_str()]))
            .map_err(failed)?;
        Ok(())
    }

    /// One round of purging.
    pub(super) fn purge(&mut self, limits: &PurgeLimits) -> Answer<Purged> {
        self.purge_round(limits).map_err(failed)
    }

    fn purge_round(&mut self, limits: &PurgeLimits) -> rusqlite::Result<Purged> {
        let inactive_since = limits.now_ms - limits.inactive_ms;
        let hour = schema::hour(inactive_since);
        let forget_since = limits.now_ms - limits.tombstone_ms();
        let found: Vec<i64> = self
            .connection
            .prepare_cached(
                "SELECT num FROM groups
                 WHERE deleted = 0 AND active_hour <= ? AND last_active < ?
                 ORDER BY active_hour, last_active LIMIT ?",
            )?
            .query_map(params![hour, inactive_since, limits.batch as i64], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        for grp in &found {
            for table in ["desires", "queries", "clients", "rows"] {
                let sql = format!("DELETE FROM {table} WHERE grp = ?");
                self.written += self.connection.prepare_cached(&sql)?.execute([grp])?;
            }
            self.connection
                .prepare_cached(
                    "UPDATE groups SET deleted = 1, version = '00', ttl_clock = 0,
                     replica_version = NULL, owner = NULL, granted = NULL, client_schema = NULL,
                     next_query = 0, rows_version = NULL WHERE num = ?",
                )?
                .execute([grp])?;
        }
        let tombstones = self
            .connection
            .prepare_cached(
                "DELETE FROM groups WHERE deleted = 1 AND active_hour <= ? AND last_active < ?",
            )?
            .execute(params![schema::hour(forget_since), forget_since])?;
        if !found.is_empty() {
            self.connection
                .prepare_cached(
                    "DELETE FROM schemas WHERE num NOT IN
                     (SELECT client_schema FROM groups WHERE client_schema IS NOT NULL)",
                )?
                .execute([])?;
        }
        let remaining: i64 = self
            .connection
            .prepare_cached(
                "SELECT count(*) FROM groups
                 WHERE deleted = 0 AND active_hour <= ? AND last_active < ?",
            )?
            .query_row(params![hour, inactive_since], |row| row.get(0))?;
        Ok(Purged { groups: found.len(), tombstones, remaining: remaining as usize })
    }
}

fn ast_text(query: &Query, ast: &zeroring_core::zql::ast::Ast) -> Result<Arc<str>, QueryFailure> {
    match serde_json::to_string(ast) {
        Ok(text) => Ok(text.into()),
        Err(e) => Err(QueryFailure::Damaged(format!("AST of query {}: {e}", query.id))),
    }
}

/// A failure inside one group's flush.
#[derive(Debug)]
enum QueryFailure {
    Sqlite(rusqlite::Error),
    Unknown(QueryHash),
    Damaged(String),
}

impl From<rusqlite::Error> for QueryFailure {
    fn from(e: rusqlite::Error) -> QueryFailure {
        QueryFailure::Sqlite(e)
    }
}

impl QueryFailure {
    fn of(self, group: &ClientGroupId) -> CvrStoreError {
        let damaged = |what| CvrStoreError::Damaged { group: group.clone(), what };
        match self {
            QueryFailure::Sqlite(e) => failed(e),
            QueryFailure::Unknown(id) => damaged(format!("query {id} has no record")),
            QueryFailure::Damaged(what) => damaged(what),
        }
    }
}
