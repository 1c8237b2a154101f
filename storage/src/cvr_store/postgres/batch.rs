//! The flushes of many groups as statements, and what their answers say.

use std::collections::{BTreeMap, HashMap, HashSet};

use zeroring_core::cvr::store::{
    ClientWrite, CvrStoreError, DesireWrite, Flushed, QueryWrite, RowChange, RowWrite,
};
use zeroring_core::cvr::{ClientId, GroupFlush, Query, QueryBody, QueryHash, format_signature};
use zeroring_core::version::CvrVersion;
use zeroring_net::pg::{Client, Param, PgError, QueryResult, Row};

use super::super::Answer;
use super::super::owed::RowsPlan;
use super::params::{Records, ref_counts_json, stored_ref_counts, wall};
use super::session::Shared;

/// Row records of one statement.
pub(super) const CHUNK_ROWS: usize = 4_096;
/// Bytes of statements that are sent before their answers are looked at.
const MAX_SENT_BYTES: usize = 8 << 20;

/// One group's flush in a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item<'a> {
    pub(super) flush: &'a GroupFlush,
    pub(super) rows: RowsPlan,
}

/// How a batch deals with groups that are locked by others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Locked {
    /// Leave them out; and give up soon where waiting cannot be avoided (two first flushes of a
    /// group).
    Skip,
    /// Wait for them.
    Wait,
}

impl Locked {
    /// `lock_timeout`.
    fn timeout(self) -> &'static str {
        match self {
            Locked::Skip => "200ms",
            Locked::Wait => "10s",
        }
    }
}

/// What became of a group.
#[derive(Debug)]
pub(super) enum Outcome {
    Done(Answer<Flushed>),
    /// Another transaction holds its lock.
    Locked,
}

/// What an answer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Plain,
    /// The verdicts.
    Gate,
    /// Live rows per group.
    LiveRows,
}

pub(super) struct Statement<'a> {
    sql: &'a str,
    params: Vec<Param>,
    role: Role,
}

impl<'a> Statement<'a> {
    pub(super) fn plain(sql: &'a str, params: Vec<Param>) -> Statement<'a> {
        Statement { sql, params, role: Role::Plain }
    }

    fn bytes(&self) -> usize {
        self.params.iter().filter_map(|p| p.value.as_ref()).map(Vec::len).sum()
    }
}

/// Sends statements of a transaction, as many at once as [`MAX_SENT_BYTES`] allows; rolls back at
/// the first error.
pub(super) fn send(
    client: &mut Client,
    shared: &Shared,
    statements: &[Statement<'_>],
) -> Result<Vec<QueryResult>, PgError> {
    let mut results = Vec::with_capacity(statements.len());
    let mut rest = statements;
    while !rest.is_empty() {
        let mut pipeline = client.pipeline()?;
        let (mut sent, mut bytes) = (0, 0);
        for statement in rest {
            bytes += statement.bytes();
            if sent > 0 && bytes > MAX_SENT_BYTES {
                break;
            }
            shared.add(&mut pipeline, statement.sql, &statement.params)?;
            sent += 1;
        }
        match pipeline.run_one() {
            Ok(part) => results.extend(part),
            Err(error) => {
                if !client.is_broken() {
                    client.batch_execute("ROLLBACK")?;
                }
                return Err(error);
            }
        }
        rest = &rest[sent..];
    }
    Ok(results)
}

/// Live rows that statements have found.
pub(super) fn live_rows(
    statements: &[Statement<'_>],
    results: &[QueryResult],
) -> Result<usize, PgError> {
    let mut live = 0;
    for (_, result) in statements.iter().zip(results).filter(|(s, _)| s.role == Role::LiveRows) {
        for row in &result.rows {
            live += row.get::<i64>(1)? as usize;
        }
    }
    Ok(live)
}

/// Statements of one transaction.
pub(super) struct Batch<'a> {
    items: &'a [Item<'a>],
    statements: Vec<Statement<'a>>,
    gate: usize,
    /// Per group, rows that are expected to be live.
    live: HashMap<&'a str, usize>,
}

/// Records by table.
#[derive(Default)]
struct Tables {
    needs: Records<2>,
    joins: Records<2>,
    instances: Records<8>,
    clients_gone: Records<2>,
    queries: Records<10>,
    query_updates: Records<8>,
    desires: Records<7>,
    rows: RowTables,
}

/// Records of rows by what becomes of them; they become statements when there are many.
#[derive(Default)]
pub(super) struct RowTables {
    rows_gone: Records<3>,
    rows_put: Records<6>,
    rows_buried: Records<5>,
    rows_adjusted: Records<8>,
}

impl<'a> Batch<'a> {
    /// `sends_schema` tells whether a group's client schema may be missing in the store.
    ///
    /// # Errors
    /// None of the flushes can be written; with several, take them one by one.
    pub(super) fn new(
        shared: &'a Shared,
        items: &'a [Item<'a>],
        locked: Locked,
        sends_schema: impl Fn(&GroupFlush) -> bool,
    ) -> Answer<Batch<'a>> {
        let mut tables = Tables::default();
        let mut batch = Batch { items, statements: Vec::new(), gate: 0, live: HashMap::default() };
        let mut rows = Vec::new();
        let mut gates = Records::<8>::new();
        let mut versions = Records::<2>::new();
        let mut new_groups = Records::<1>::new();
        for Item { flush, rows: plan } in items {
            let id = flush.group.as_str();
            let (instance, version) = (&flush.instance, flush.instance.version.cookie());
            gates.push([
                id.into(),
                flush.expected.cookie().into(),
                version.as_str().into(),
                wall(flush.connect_ms).into(),
                wall(instance.last_active_ms).into(),
                instance.ttl_clock.0.into(),
                instance.profile_id.as_deref().into(),
                (*plan != RowsPlan::FollowOwed).into(),
            ]);
            if flush.expected == CvrVersion::empty() {
                new_groups.push([id.into()]);
            }
            if !plan.follow() {
                versions.push([id.into(), version.as_str().into()]);
            }
            let schema = instance.client_schema.as_ref().filter(|_| sends_schema(flush));
            tables.instances.push([
                id.into(),
                version.into(),
                wall(instance.last_active_ms).into(),
                instance.ttl_clock.0.into(),
                instance.replica_version.as_ref().map(|v| v.as_str()).into(),
                wall(flush.connect_ms).into(),
                schema.map(|s| s.text()).into(),
                instance.profile_id.as_deref().into(),
            ]);
            tables.clients(flush)?;
            let now = if plan.follow() { &[][..] } else { &flush.rows };
            tables.queries_and_desires(flush, now)?;
            let mut live = 0;
            for row in now {
                live += tables.rows.add(id, row);
                tables.rows.emit(shared, CHUNK_ROWS, &mut rows);
            }
            batch.live.insert(id, live);
        }
        tables.rows.emit(shared, 1, &mut rows);
        let has_stubs = new_groups.len() > 0;
        batch.begin(shared, locked, new_groups, gates, &mut tables);
        batch.metadata(shared, &mut tables);
        if versions.len() > 0 {
            batch.push(&shared.sql.rows_version, versions.take().collect());
        }
        batch.statements.append(&mut rows);
        if has_stubs {
            batch.push(&shared.sql.drop_stubs, Vec::new());
        }
        batch.push("COMMIT", Vec::new());
        Ok(batch)
    }

    fn push(&mut self, sql: &'a str, params: Vec<Param>) {
        self.statements.push(Statement::plain(sql, params));
    }

    fn begin(
        &mut self,
        shared: &'a Shared,
        locked: Locked,
        mut new_groups: Records<1>,
        mut gates: Records<8>,
        tables: &mut Tables,
    ) {
        self.push("BEGIN ISOLATION LEVEL READ COMMITTED", Vec::new());
        let limits = vec![shared.idle_in_transaction.as_str().into(), locked.timeout().into()];
        self.push(&shared.sql.limits, limits);
        if new_groups.len() > 0 {
            self.push(&shared.sql.stubs, new_groups.take().collect());
        }
        let mut params = vec![Param::from(&*shared.task_id)];
        params.extend(gates.take());
        params.extend(tables.needs.take());
        params.extend(tables.joins.take());
        params.push(false.into());
        self.gate = self.statements.len();
        let sql = match locked {
            Locked::Skip => &shared.sql.gate_skip,
            Locked::Wait => &shared.sql.gate,
        };
        self.statements.push(Statement { sql, params, role: Role::Gate });
    }

    /// Groups before clients and queries before desires: foreign keys.
    fn metadata(&mut self, shared: &'a Shared, tables: &mut Tables) {
        let sql = &shared.sql;
        let mut params = vec![Param::from(&*shared.task_id)];
        params.extend(tables.instances.take());
        self.push(&sql.instances, params);
        if tables.clients_gone.len() > 0 {
            self.push(&sql.delete_clients, tables.clients_gone.take().collect());
        }
        // What may join is what the gate has looked at.
        let joins = &self.statements[self.gate].params[11..13];
        if joins[0].value.as_deref() != Some(b"{}") {
            let joins = joins.to_vec();
            self.push(&sql.insert_clients, joins);
        }
        if tables.queries.len() > 0 {
            self.push(&sql.queries, tables.queries.take().collect());
        }
        if tables.query_updates.len() > 0 {
            self.push(&sql.update_queries, tables.query_updates.take().collect());
        }
        if tables.desires.len() > 0 {
            self.push(&sql.desires, tables.desires.take().collect());
        }
    }

    /// Runs the transaction. `maybe_done`: an earlier run may have committed.
    pub(super) fn run(
        &mut self,
        client: &mut Client,
        shared: &Shared,
        maybe_done: bool,
    ) -> Result<Vec<Outcome>, PgError> {
        if let Some(flag) = self.statements[self.gate].params.last_mut() {
            *flag = maybe_done.into();
        }
        let results = send(client, shared, &self.statements)?;
        self.outcomes(&results)
    }

    fn outcomes(&self, results: &[QueryResult]) -> Result<Vec<Outcome>, PgError> {
        let mut live: HashMap<&str, usize> = HashMap::new();
        let answers = || self.statements.iter().zip(results);
        for (_, result) in answers().filter(|(s, _)| s.role == Role::LiveRows) {
            for row in &result.rows {
                *live.entry(row.get(0)?).or_default() += row.get::<i64>(1)? as usize;
            }
        }
        let mut outcomes: Vec<_> = self.items.iter().map(|_| None).collect();
        for (_, result) in answers().filter(|(s, _)| s.role == Role::Gate) {
            for row in &result.rows {
                let at = row.get::<i64>(0)? as usize;
                if let Some((item, outcome)) =
                    at.checked_sub(1).and_then(|at| Some((self.items.get(at)?, &mut outcomes[at])))
                {
                    let id = item.flush.group.as_str();
                    let expected = self.live.get(id).copied().unwrap_or(0);
                    let found = live.get(id).copied().unwrap_or(0);
                    *outcome = Some(verdict(item, row, expected.saturating_sub(found))?);
                }
            }
        }
        let missing = || PgError::Decode {
            column: "n".to_owned(),
            cause: "a group has no verdict".to_owned(),
        };
        outcomes.into_iter().map(|o| o.ok_or_else(missing)).collect()
    }
}

/// A row of the gate's answer as verdict. Ownership is looked at before the version.
fn verdict(item: &Item<'_>, row: &Row, anomalies: usize) -> Result<Outcome, PgError> {
    let flush = item.flush;
    let (won, done, locked, known): (bool, bool, bool, bool) =
        (row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?);
    if won || done {
        let anomalies = if won { anomalies } else { 0 };
        let (rows, rows_follow) = (flush.rows.len(), item.rows.follow());
        return Ok(Outcome::Done(Ok(Flushed { rows, anomalies, rows_follow })));
    }
    if !locked && known {
        return Ok(Outcome::Locked);
    }
    let damaged = |what: String| CvrStoreError::Damaged { group: flush.group.clone(), what };
    let error = if row.get::<bool>(8)? {
        CvrStoreError::Ownership {
            owner: row.get::<Option<String>>(6)?.unwrap_or_default().into(),
            granted_ms: row.get::<Option<f64>>(7)?.unwrap_or(0.0),
            connect_ms: flush.connect_ms,
        }
    } else if let (true, Some(actual)) = (row.get::<bool>(9)?, row.get::<Option<String>>(12)?) {
        // The rows are of another version, and whoever owes them is gone: a load will say so.
        CvrStoreError::ConcurrentModification { expected: flush.expected.cookie(), actual }
    } else if !row.get::<bool>(9)? {
        let nothing = || CvrVersion::empty().cookie();
        CvrStoreError::ConcurrentModification {
            expected: flush.expected.cookie(),
            actual: row.get::<Option<String>>(5)?.unwrap_or_else(nothing),
        }
    } else if let Some(query) = row.get::<Option<&str>>(10)? {
        damaged(format!("query {query} has no record"))
    } else {
        let client = row.get::<Option<&str>>(11)?.unwrap_or_default();
        damaged(format!("client {client} joins a second time"))
    };
    Ok(Outcome::Done(Err(error)))
}

impl Tables {
    /// The net effect of the clients' coming and going.
    fn clients(&mut self, flush: &GroupFlush) -> Answer<()> {
        let id = flush.group.as_str();
        // Per client: whether it must be new, and whether it is there in the end.
        let mut net: BTreeMap<&ClientId, (bool, bool)> = BTreeMap::new();
        for write in &flush.clients {
            let (client, joins) = match write {
                ClientWrite::Insert(client) => (client, true),
                ClientWrite::Delete(client) => (client, false),
            };
            let known = net.get_mut(client);
            match known {
                Some((_, true)) if joins => {
                    return Err(CvrStoreError::Damaged {
                        group: flush.group.clone(),
                        what: format!("client {client} joins a second time"),
                    });
                }
                Some((_, there)) => *there = joins,
                None => {
                    net.insert(client, (joins, joins));
                }
            }
        }
        for (client, (was_new, there)) in net {
            match (was_new, there) {
                (true, true) => self.joins.push([id.into(), client.as_str().into()]),
                (false, false) => self.clients_gone.push([id.into(), client.as_str().into()]),
                // Came and went, or went and came back.
                (true, false) | (false, true) => {}
            }
        }
        Ok(())
    }

    fn queries_and_desires(&mut self, flush: &GroupFlush, rows: &[RowWrite]) -> Answer<()> {
        let id = flush.group.as_str();
        let mut whole: HashSet<&QueryHash> = HashSet::new();
        let mut needed: HashSet<&QueryHash> = HashSet::new();
        for write in &flush.queries {
            match write {
                QueryWrite::Full(query) => {
                    whole.insert(&query.id);
                    self.query(flush, query)?;
                }
                QueryWrite::Partial { id: query, executed, signature } => {
                    needed.insert(query);
                    let e = executed.as_ref();
                    self.query_updates.push([
                        id.into(),
                        query.as_str().into(),
                        e.is_some().into(),
                        false.into(),
                        e.and_then(|e| e.patch_version.as_ref()).map(CvrVersion::cookie).into(),
                        e.map(|e| &*e.transformation_hash).into(),
                        e.map(|e| e.transformation_version.cookie()).into(),
                        signature.map(format_signature).into(),
                    ]);
                }
                QueryWrite::Removed { id: query, patch_version } => {
                    needed.insert(query);
                    self.query_updates.push([
                        id.into(),
                        query.as_str().into(),
                        true.into(),
                        true.into(),
                        patch_version.cookie().into(),
                        None::<&str>.into(),
                        None::<&str>.into(),
                        None::<&str>.into(),
                    ]);
                }
            }
        }
        for desire in &flush.desires {
            needed.insert(&desire.query);
            self.desire(id, desire);
        }
        for row in rows {
            if let RowChange::Put { ref_counts, .. } = &row.change {
                needed.extend(ref_counts.iter().map(|(query, _)| query));
            }
        }
        for query in needed.difference(&whole) {
            self.needs.push([id.into(), query.as_str().into()]);
        }
        Ok(())
    }

    fn query(&mut self, flush: &GroupFlush, query: &Query) -> Answer<()> {
        let text = |ast: &zeroring_core::zql::ast::Ast| {
            serde_json::to_string(ast).map_err(|e| CvrStoreError::Damaged {
                group: flush.group.clone(),
                what: format!("AST of query {}: {e}", query.id),
            })
        };
        let (ast, name, args) = match &query.body {
            QueryBody::Client { ast } | QueryBody::Internal { ast } => {
                (Some(text(ast)?), None, None)
            }
            QueryBody::Custom { name, args } => (None, Some(&**name), Some(&**args)),
        };
        self.queries.push([
            flush.group.as_str().into(),
            query.id.as_str().into(),
            ast.into(),
            name.into(),
            args.into(),
            query.patch_version.as_ref().map(CvrVersion::cookie).into(),
            query.transformation_hash.as_deref().into(),
            query.transformation_version.as_ref().map(CvrVersion::cookie).into(),
            query.is_internal().then_some(true).into(),
            query.signature.map(format_signature).into(),
        ]);
        Ok(())
    }

    fn desire(&mut self, id: &str, desire: &DesireWrite) {
        self.desires.push([
            id.into(),
            desire.client.as_str().into(),
            desire.query.as_str().into(),
            desire.patch_version.cookie().into(),
            desire.deleted.into(),
            desire.ttl_ms.into(),
            desire.inactivated_at.map(|c| c.0).into(),
        ]);
    }
}

impl RowTables {
    /// Adds a row; 1 if there should be a live record.
    pub(super) fn add(&mut self, id: &str, row: &RowWrite) -> usize {
        let (table, key) = (&**row.id.table(), row.id.key_json());
        match &row.change {
            RowChange::Put { row_version, patch_version, ref_counts } => {
                self.rows_put.push([
                    id.into(),
                    table.into(),
                    key.into(),
                    row_version.as_str().into(),
                    patch_version.cookie().into(),
                    stored_ref_counts(ref_counts).into(),
                ]);
                0
            }
            RowChange::Delete => {
                self.rows_gone.push([id.into(), table.into(), key.into()]);
                0
            }
            RowChange::Tombstone { row_version, patch_version } => {
                self.rows_buried.push([
                    id.into(),
                    table.into(),
                    key.into(),
                    row_version.as_ref().map(|v| v.as_str()).into(),
                    patch_version.cookie().into(),
                ]);
                1
            }
            RowChange::Adjust { counts, row_version, patch_version, keep_patch_version } => {
                let mut gone = Records::<1>::new();
                for (query, _) in counts.iter().filter(|(_, n)| *n == 0) {
                    gone.push([query.as_str().into()]);
                }
                let gone = gone.take().next().and_then(|p| p.value).unwrap_or_default();
                self.rows_adjusted.push([
                    id.into(),
                    table.into(),
                    key.into(),
                    row_version.as_ref().map(|v| v.as_str()).into(),
                    patch_version.cookie().into(),
                    (*keep_patch_version).into(),
                    String::from_utf8_lossy(&gone).into_owned().into(),
                    ref_counts_json(counts.iter().filter(|(_, n)| *n != 0)).into(),
                ]);
                1
            }
        }
    }

    /// Makes statements of the rows of each kind of which there are `at_least` so many.
    pub(super) fn emit<'a>(
        &mut self,
        shared: &'a Shared,
        at_least: usize,
        out: &mut Vec<Statement<'a>>,
    ) {
        let sql = &shared.sql;
        let mut add = |sql: &'a str, role, params: Vec<Param>| {
            out.push(Statement { sql, params, role });
        };
        if self.rows_gone.len() >= at_least {
            add(&sql.delete_rows, Role::Plain, self.rows_gone.take().collect());
        }
        if self.rows_put.len() >= at_least {
            add(&sql.put_rows, Role::Plain, self.rows_put.take().collect());
        }
        if self.rows_buried.len() >= at_least {
            add(&sql.bury_rows, Role::LiveRows, self.rows_buried.take().collect());
        }
        if self.rows_adjusted.len() >= at_least {
            add(&sql.adjust_rows, Role::LiveRows, self.rows_adjusted.take().collect());
        }
    }
}
