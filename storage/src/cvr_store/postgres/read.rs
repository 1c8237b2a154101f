//! Loads, lookups and scans, each of one moment.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use tracing::warn;
use zeroring_core::cvr::load::{StoredDesire, assemble};
use zeroring_core::cvr::store::{
    CatchupPage, CatchupRange, ConfigChange, CvrStoreError, InspectedQuery, Loaded, RowCursor,
    RowPage,
};
use zeroring_core::cvr::{
    ClientGroupId, ClientId, Cvr, Query, QueryBody, QueryHash, RowIdentity, RowRecord, TtlClock,
    parse_signature,
};
use zeroring_core::version::CvrVersion;
use zeroring_net::pg::{Param, PgError, QueryResult, Row};

use super::super::decode::{self, damaged, version};
use super::super::{Answer, CatchupScan, PAGE_ROWS, RowLookup};
use super::job::{Read, answer};
use super::params::{Records, wall};
use super::session::{Session, Shared};
use super::sql::Sql;
use super::write::{failed, snapshot, transaction};

/// Reads of one transaction: their answers are all in memory at once.
const MAX_READS: usize = 32;

type Failure = decode::Failure<PgError>;

impl From<PgError> for Failure {
    fn from(e: PgError) -> Failure {
        match e {
            PgError::Decode { .. } => Failure::Damaged(e.to_string()),
            e => Failure::Database(e),
        }
    }
}

/// One attempt to load a group.
pub(super) enum Attempt {
    Done(Answer<Loaded>),
    /// Another server has not written its rows yet: try again. The versions of both.
    RowsBehind {
        version: String,
        rows: String,
    },
}

/// Reads through a worker's connection.
#[derive(Debug)]
pub(super) struct Reader<'w> {
    pub(super) session: &'w mut Session,
}

/// What the store has of some groups, by group.
struct Stored<'a> {
    instances: HashMap<&'a str, &'a Row>,
    clients: HashMap<&'a str, Vec<&'a Row>>,
    queries: HashMap<&'a str, Vec<&'a Row>>,
    desires: HashMap<&'a str, Vec<&'a Row>>,
}

impl Reader<'_> {
    fn shared(&self) -> Arc<Shared> {
        self.session.shared.clone()
    }

    fn read(&mut self, statements: &[(&str, &[Param])]) -> Result<Vec<QueryResult>, PgError> {
        let shared = self.shared();
        self.session.run(|client, _| snapshot(client, &shared, statements))
    }

    /// Loads groups (spec §2.5), given the latest connection to each on this server. Those that
    /// others own are taken over.
    pub(super) fn load(&mut self, groups: &[(ClientGroupId, f64)]) -> Vec<Attempt> {
        let shared = self.shared();
        let ids = Param::array(groups.iter().map(|(g, _)| Some(g.as_str())));
        let with_deleted = [ids.clone(), false.into()];
        let ids = std::slice::from_ref(&ids);
        let read = self.read(&[
            (&shared.sql.load_instances, ids),
            (&shared.sql.load_clients, ids),
            (&shared.sql.load_queries, &with_deleted),
            (&shared.sql.load_desires, ids),
        ]);
        let mut claims = Records::<2>::new();
        let all_failed = |e| {
            let error = failed(e);
            groups.iter().map(|_| Attempt::Done(Err(error.clone()))).collect()
        };
        let read = match read {
            Ok(read) => read,
            Err(e) => return all_failed(e),
        };
        let stored = match Stored::of(&read) {
            Ok(stored) => stored,
            Err(e) => return all_failed(e),
        };
        let attempts = groups
            .iter()
            .map(|(group, connect_ms)| {
                let (attempt, claim) = stored
                    .load(group, *connect_ms, &shared.task_id)
                    .unwrap_or_else(|e| (Attempt::Done(Err(e.of(group, failed))), false));
                if claim {
                    claims.push([group.as_str().into(), wall(*connect_ms).into()]);
                }
                attempt
            })
            .collect();
        // Before the answer: a former owner that writes meanwhile would make us start over.
        self.claim(claims);
        attempts
    }

    /// Tells the former owners. Only a hint: our first flush takes the groups over anyway.
    fn claim(&mut self, mut claims: Records<2>) {
        let count = claims.len();
        if count == 0 {
            return;
        }
        let shared = self.shared();
        let mut params = vec![Param::from(&*shared.task_id)];
        params.extend(claims.take());
        let statements = [(shared.sql.claim.as_str(), &params[..])];
        let done = self.session.run(|client, _| transaction(client, &shared, &statements));
        if let Err(error) = done {
            warn!(groups = count, %error, "take-overs were not noted");
        }
    }

    /// Answers reads, many in one transaction and round trip.
    pub(super) fn answer(&mut self, reads: Vec<Read>) {
        let mut reads = reads.into_iter();
        loop {
            let some: Vec<_> = reads.by_ref().take(MAX_READS).collect();
            if some.is_empty() {
                return;
            }
            self.answer_some(some);
        }
    }

    fn answer_some(&mut self, reads: Vec<Read>) {
        let shared = self.shared();
        let mut planned: Vec<(Read, Plan<'_>)> = Vec::with_capacity(reads.len());
        for read in reads {
            match read.plan(&shared.sql) {
                Ok(plan) => planned.push((read, plan)),
                Err(error) => read.refuse(error),
            }
        }
        if planned.is_empty() {
            return;
        }
        let plans = planned.iter().flat_map(|(_, plan)| plan);
        let statements: Vec<_> = plans.map(|(sql, params)| (*sql, &params[..])).collect();
        match self.read(&statements) {
            Ok(results) => {
                let mut rest = &results[..];
                for (read, plan) in planned {
                    let (own, others) = rest.split_at(plan.len());
                    read.finish(own);
                    rest = others;
                }
            }
            // One of them is to blame.
            Err(PgError::Server(_)) if planned.len() > 1 => {
                for (read, _) in planned {
                    self.answer_some(vec![read]);
                }
            }
            Err(error) => {
                let error = failed(error);
                planned.into_iter().for_each(|(read, _)| read.refuse(error.clone()));
            }
        }
    }
}

/// Statements and their parameters.
type Plan<'s> = Vec<(&'s str, Vec<Param>)>;

impl Read {
    /// What has to be asked. All but the inspector believe in a version of the group.
    fn plan<'s>(&self, sql: &'s Sql) -> Answer<Plan<'s>> {
        let versions =
            |group: &ClientGroupId| (sql.versions.as_str(), vec![Param::from(group.as_str())]);
        Ok(match self {
            Read::Rows(lookup, _) => {
                let group = || Param::from(lookup.group.as_str());
                let mut plan = vec![versions(&lookup.group)];
                if !lookup.queries.is_empty() {
                    let queries = Param::array(lookup.queries.iter().map(|q| Some(q.as_str())));
                    let [table, key] = cursor_params(lookup.from.as_ref())?;
                    let limit = Param::from(page_rows(lookup.limit) as i64);
                    plan.push((&sql.rows_of_queries, vec![group(), queries, table, key, limit]));
                }
                if !lookup.ids.is_empty() && lookup.from.is_none() {
                    let mut keys = Records::<2>::new();
                    for id in &lookup.ids {
                        keys.push([(&**id.table()).into(), id.key_json().into()]);
                    }
                    let params = std::iter::once(group()).chain(keys.take());
                    plan.push((&sql.rows_by_key, params.collect()));
                }
                plan
            }
            Read::CatchUp(scan, _) => {
                let range = &scan.range;
                let rows = (sql.catchup_rows.as_str(), catchup_params(scan)?);
                let mut plan = vec![versions(&range.group), rows];
                if scan.from.is_none() {
                    let params = vec![Param::from(range.group.as_str()), since(range)];
                    plan.push((&sql.catchup_queries, params.clone()));
                    plan.push((&sql.catchup_desires, params));
                }
                plan
            }
            Read::Inspect(group, ..) => {
                let ids = || Param::array([Some(group.as_str())]);
                vec![
                    (&sql.load_queries, vec![ids(), true.into()]),
                    (&sql.load_desires, vec![ids()]),
                    (&sql.rows_per_query, vec![Param::from(group.as_str())]),
                ]
            }
        })
    }

    /// Answers from what the plan found.
    fn finish(self, found: &[QueryResult]) {
        match self {
            Read::Rows(lookup, reply) => {
                let page = expect_version(&found[0], &lookup.current)
                    .and_then(|()| row_page(&lookup, &found[1..]));
                answer(reply, page.map_err(|e| e.of(&lookup.group, failed)));
            }
            Read::CatchUp(scan, reply) => {
                let page = expect_version(&found[0], &scan.range.current)
                    .and_then(|()| catchup_page(&scan, &found[1..]));
                answer(reply, page.map_err(|e| e.of(&scan.range.group, failed)));
            }
            Read::Inspect(group, client, clock, reply) => {
                let list = inspected(found, client.as_ref(), clock);
                answer(reply, list.map_err(|e| e.of(&group, failed)));
            }
        }
    }
}

/// Records that may have been found in two ways, each once.
fn row_page(lookup: &RowLookup, found: &[QueryResult]) -> Result<RowPage, Failure> {
    let mut page = RowPage::default();
    let (of_queries, by_key) = found.split_at(usize::from(!lookup.queries.is_empty()));
    for row in by_key.iter().flat_map(|r| &r.rows) {
        page.rows.push(record(row)?);
    }
    for row in of_queries.iter().flat_map(|r| &r.rows) {
        let record = record(row)?;
        // Those that were named came with the first page.
        if lookup.ids.is_empty() || !lookup.ids.contains(&record.id) {
            page.rows.push(record);
        }
    }
    if let Some(result) = of_queries.first() {
        page.next = cursor_after(&result.rows, lookup.limit)?;
    }
    Ok(page)
}

/// Where a page goes on.
fn cursor_params(from: Option<&RowCursor>) -> Answer<[Param; 2]> {
    let from: Option<(String, String)> = match from {
        None => None,
        Some(cursor) => Some(serde_json::from_str(&cursor.0).map_err(|e| {
            CvrStoreError::Storage(format!("a row cursor that is none of ours: {e}"))
        })?),
    };
    let (table, key) = from.unzip();
    Ok([table.as_deref().into(), key.as_deref().into()])
}

fn page_rows(limit: usize) -> usize {
    limit.clamp(1, PAGE_ROWS)
}

/// Where the page after these rows begins, if there may be one.
fn cursor_after(rows: &[Row], limit: usize) -> Result<Option<RowCursor>, Failure> {
    let Some(last) = rows.last().filter(|_| rows.len() >= page_rows(limit)) else {
        return Ok(None);
    };
    let at: (&str, &str) = (last.get(0)?, last.get(1)?);
    Ok(Some(RowCursor(serde_json::to_string(&at).map_err(|e| damaged("a row", e))?)))
}

fn catchup_params(scan: &CatchupScan) -> Answer<Vec<Param>> {
    let [table, key] = cursor_params(scan.from.as_ref())?;
    Ok(vec![
        Param::from(scan.range.group.as_str()),
        since(&scan.range),
        Param::array(scan.without.iter().map(|q| Some(q.as_str()))),
        table,
        key,
        Param::from(page_rows(scan.limit) as i64),
    ])
}

/// A page of what a late client misses, rows in key order. Postgres leaves out what is surely not
/// meant; the versions are compared here, as text they are in another order.
fn catchup_page(scan: &CatchupScan, found: &[QueryResult]) -> Result<CatchupPage, Failure> {
    let rows = &found[0].rows;
    let mut page = CatchupPage::default();
    for row in rows {
        let record = record(row)?;
        if scan.range.contains(&record.patch_version) {
            page.rows.push(record);
        }
    }
    page.next = cursor_after(rows, scan.limit)?;
    if let [_, queries, desires] = found {
        page.config = config_changes(&scan.range, &queries.rows, &desires.rows)?;
    }
    Ok(page)
}

/// Changes of queries and desires that a late client misses.
fn config_changes(
    range: &CatchupRange,
    queries: &[Row],
    desires: &[Row],
) -> Result<Vec<ConfigChange>, Failure> {
    let mut changes = Vec::new();
    for row in queries {
        let patch_version = version(row.get(1)?)?;
        if range.contains(&patch_version) {
            let query = row.get::<&str>(0)?.into();
            changes.push(ConfigChange::Got { query, deleted: row.get(2)?, patch_version });
        }
    }
    for row in desires {
        let patch_version = version(row.get(2)?)?;
        if range.contains(&patch_version) {
            changes.push(ConfigChange::Desire {
                client: row.get::<&str>(0)?.into(),
                query: row.get::<&str>(1)?.into(),
                deleted: row.get(3)?,
                patch_version,
            });
        }
    }
    Ok(changes)
}

/// Where a scan of patch versions begins as bytes: all later versions are above the state alone.
fn since(range: &CatchupRange) -> Param {
    Param::from(range.after.as_ref().map_or("", |after| after.state.as_str()))
}

fn expect_version(found: &QueryResult, current: &CvrVersion) -> Result<(), Failure> {
    let expected = current.cookie();
    let (actual, rows) = match found.rows.first() {
        Some(row) => (row.get::<String>(0)?, row.get::<String>(1)?),
        None => (CvrVersion::empty().cookie(), CvrVersion::empty().cookie()),
    };
    // Rows of another version are somebody else's work under way: after a reload, which waits for
    // them, they can be used.
    if actual == expected && rows == expected {
        return Ok(());
    }
    let actual = if actual == expected { rows } else { actual };
    Err(CvrStoreError::ConcurrentModification { expected, actual }.into())
}

fn by_group(result: &QueryResult) -> Result<HashMap<&str, Vec<&Row>>, PgError> {
    let mut groups: HashMap<&str, Vec<&Row>> = HashMap::new();
    for row in &result.rows {
        groups.entry(row.get(0)?).or_default().push(row);
    }
    Ok(groups)
}

impl<'a> Stored<'a> {
    /// Of the answers to the four loading statements.
    fn of(read: &'a [QueryResult]) -> Result<Stored<'a>, PgError> {
        let instances = read[0].rows.iter().map(|row| Ok((row.get(0)?, row)));
        Ok(Stored {
            instances: instances.collect::<Result<_, PgError>>()?,
            clients: by_group(&read[1])?,
            queries: by_group(&read[2])?,
            desires: by_group(&read[3])?,
        })
    }

    /// The flag: this server takes the group over, which is to be noted.
    fn load(
        &self,
        group: &ClientGroupId,
        connect_ms: f64,
        task_id: &str,
    ) -> Result<(Attempt, bool), Failure> {
        let Some(row) = self.instances.get(group.as_str()) else {
            let loaded = Loaded::new(Cvr::empty(group.clone()));
            return Ok((Attempt::Done(Ok(loaded)), false));
        };
        let owner: Option<Arc<str>> = row.get::<Option<&str>>(5)?.map(Arc::from);
        let granted_ms = row.get::<Option<f64>>(6)?.unwrap_or(0.0);
        let foreign =
            decode::takes_over(row.get(9)?, owner.as_ref(), granted_ms, connect_ms, task_id)?;
        let (found, rows): (&str, &str) = (row.get(1)?, row.get(10)?);
        if found != rows {
            let behind = Attempt::RowsBehind { version: found.to_owned(), rows: rows.to_owned() };
            return Ok((behind, foreign));
        }
        let cvr = self.cvr(group, row)?;
        let taken_over_from = owner.filter(|_| foreign);
        Ok((Attempt::Done(Ok(Loaded { cvr, taken_over_from, own: !foreign })), foreign))
    }

    fn cvr(&self, group: &ClientGroupId, row: &Row) -> Result<Cvr, Failure> {
        let client_schema = decode::client_schema(row.get(7)?)?;
        let cvr = Cvr {
            version: version(row.get(1)?)?,
            stored: true,
            last_active_ms: row.get(2)?,
            ttl_clock: TtlClock(row.get(3)?),
            replica_version: row.get::<Option<&str>>(4)?.map(decode::state).transpose()?,
            profile_id: row.get::<Option<&str>>(8)?.map(Arc::from),
            client_schema,
            ..Cvr::empty(group.clone())
        };
        let of = |rows: &HashMap<&str, Vec<&'a Row>>| {
            rows.get(group.as_str()).cloned().unwrap_or_default()
        };
        let clients = of(&self.clients)
            .into_iter()
            .map(|row| Ok(ClientId::from(row.get::<&str>(1)?)))
            .collect::<Result<Vec<_>, PgError>>()?;
        let queries =
            of(&self.queries).into_iter().map(query).collect::<Result<Vec<_>, Failure>>()?;
        let desires =
            of(&self.desires).into_iter().map(desire).collect::<Result<Vec<_>, Failure>>()?;
        Ok(assemble(cvr, clients, queries, desires))
    }
}

/// A row of [`super::sql::Sql::load_queries`].
fn query(row: &Row) -> Result<Query, Failure> {
    let id = QueryHash::from(row.get::<&str>(1)?);
    let text = |at| -> Result<Option<Arc<str>>, PgError> {
        Ok(row.get::<Option<&str>>(at)?.map(Arc::from))
    };
    let body = match row.get::<Option<&str>>(2)? {
        Some(json) => {
            let ast = serde_json::from_str(json)
                .map_err(|e| damaged(format!("AST of query {id}"), e))
                .map(Arc::new)?;
            if row.get(8)? { QueryBody::Internal { ast } } else { QueryBody::Client { ast } }
        }
        None => QueryBody::Custom {
            name: text(3)?.ok_or_else(|| damaged(format!("query {id}"), "no name"))?,
            args: text(4)?.ok_or_else(|| damaged(format!("query {id}"), "no arguments"))?,
        },
    };
    let parsed = |at| -> Result<Option<CvrVersion>, Failure> {
        row.get::<Option<&str>>(at)?.map(version).transpose()
    };
    Ok(Query {
        patch_version: parsed(5)?,
        transformation_hash: text(6)?,
        transformation_version: parsed(7)?,
        signature: row.get::<Option<&str>>(9)?.and_then(parse_signature),
        ..Query::new(id, body)
    })
}

/// A row of [`super::sql::Sql::load_desires`].
fn desire(row: &Row) -> Result<StoredDesire, Failure> {
    Ok(StoredDesire {
        client: row.get::<&str>(1)?.into(),
        query: row.get::<&str>(2)?.into(),
        patch_version: version(row.get(3)?)?,
        deleted: row.get(4)?,
        ttl_ms: row.get(5)?,
        inactivated_at: row.get::<Option<f64>>(6)?.map(TtlClock),
    })
}

/// A row record: table, key, row version, patch version, references.
fn record(row: &Row) -> Result<RowRecord, Failure> {
    let (table, key): (&str, &str) = (row.get(0)?, row.get(1)?);
    let id = RowIdentity::from_key_json(table, key).map_err(|e| damaged("a row", e))?;
    let ref_counts = match row.get::<Option<&str>>(4)? {
        None => None,
        Some(json) => {
            let counts: HashMap<Cow<'_, str>, i64> = serde_json::from_str(json)
                .map_err(|e| damaged(format!("reference counts of row {id}"), e))?;
            Some(counts.into_iter().map(|(query, n)| (QueryHash::new(query), n)).collect())
        }
    };
    decode::record(Arc::new(id), row.get(2)?, row.get(3)?, ref_counts)
}

/// The inspector's lines from queries, desires and row counts.
fn inspected(
    read: &[QueryResult],
    client: Option<&ClientId>,
    clock: TtlClock,
) -> Result<Vec<InspectedQuery>, Failure> {
    let queries = read[0]
        .rows
        .iter()
        .map(|row| query(row).map(|q| (q.id.clone(), q)))
        .collect::<Result<HashMap<_, _>, Failure>>()?;
    let counts = read[2]
        .rows
        .iter()
        .map(|row| Ok((row.get::<&str>(0)?, row.get::<i64>(1)? as u64)))
        .collect::<Result<HashMap<_, _>, PgError>>()?;
    let desires = read[1].rows.iter().map(desire).collect::<Result<Vec<_>, Failure>>()?;
    Ok(decode::inspected(desires, client, clock, |hash| {
        (queries.get(hash), counts.get(hash.as_str()).copied().unwrap_or(0))
    }))
}
