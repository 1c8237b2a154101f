//! The reader: loads and scans, each in one read transaction.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row, params};
use zeroring_core::cvr::load::{StoredDesire, assemble};
use zeroring_core::cvr::store::{
    CatchupPage, CatchupRange, ConfigChange, CvrStoreError, InspectedQuery, Loaded, RowCursor,
    RowPage,
};
use zeroring_core::cvr::{
    ClientGroupId, ClientId, Cvr, Query, QueryBody, QueryHash, RefCounts, RowIdentity, RowRecord,
    TtlClock,
};
use zeroring_core::version::CvrVersion;

use super::super::decode::{self, damaged, state, version};
use super::super::{Answer, CatchupScan, PAGE_ROWS, RowLookup};
use super::codec;
use super::write::{KIND_CLIENT, KIND_CUSTOM, KIND_INTERNAL, failed};

/// A connection that reads.
#[derive(Debug)]
pub(super) struct Reader {
    connection: Connection,
    task_id: Arc<str>,
}

type Failure = decode::Failure<rusqlite::Error>;

impl From<rusqlite::Error> for Failure {
    fn from(e: rusqlite::Error) -> Failure {
        Failure::Database(e)
    }
}

/// The group's own record.
struct GroupRow {
    num: i64,
    cvr: Cvr,
    schema: Option<String>,
    owner: Option<Arc<str>>,
    granted_ms: f64,
    deleted: bool,
    /// The version that its rows are of, if that is another one.
    rows_version: Option<String>,
}

/// An attempt to load a group.
#[derive(Debug)]
pub(super) enum Attempt {
    /// The flag: this server takes it over, which is to be noted.
    Done(Loaded, bool),
    /// Another server has not written its rows yet: try again. The versions of both.
    RowsBehind { version: String, rows: String },
}

impl Reader {
    pub(super) fn new(connection: Connection, task_id: Arc<str>) -> Reader {
        Reader { connection, task_id }
    }

    /// Gives the page cache back.
    pub(super) fn release_memory(&self) {
        super::schema::release_memory(&self.connection);
    }

    /// Runs `body` in one read transaction: all it reads is of one moment.
    fn read<T>(
        &mut self,
        group: &ClientGroupId,
        body: impl FnOnce(&Connection, &str) -> Result<T, Failure>,
    ) -> Answer<T> {
        let tx = self.connection.transaction().map_err(failed)?;
        body(&tx, &self.task_id).map_err(|e| e.of(group, failed))
    }

    /// Loads a group (spec §2.5).
    pub(super) fn load(&mut self, group: &ClientGroupId, connect_ms: f64) -> Answer<Attempt> {
        self.read(group, |db, task_id| {
            let Some(mut found) = group_row(db, group)? else {
                let cvr = Cvr::empty(group.clone());
                return Ok(Attempt::Done(Loaded::new(cvr), false));
            };
            let (owner, granted_ms) = (found.owner.as_ref(), found.granted_ms);
            let foreign =
                decode::takes_over(found.deleted, owner, granted_ms, connect_ms, task_id)?;
            if let Some(rows) = found.rows_version {
                return Ok(Attempt::RowsBehind { version: found.cvr.version.cookie(), rows });
            }
            found.cvr.client_schema = decode::client_schema(found.schema.as_deref())?;
            let cvr = assemble(
                found.cvr,
                clients(db, found.num)?,
                queries(db, found.num)?,
                desires(db, found.num)?,
            );
            let taken_over_from = found.owner.filter(|_| foreign);
            Ok(Attempt::Done(Loaded { cvr, taken_over_from, own: true }, foreign))
        })
    }

    /// A page of live records of the rows that are asked for: reads the group's rows in key order.
    pub(super) fn rows(&mut self, lookup: &RowLookup) -> Answer<RowPage> {
        self.read(&lookup.group, |db, _| {
            let mut page = RowPage::default();
            let Some(grp) = at_version(db, &lookup.group, &lookup.current)? else {
                return Ok(page);
            };
            let hashes = query_hashes(db, grp)?;
            if lookup.queries.is_empty() {
                let mut select = db.prepare_cached(
                    "SELECT id, row_version, patch, refs FROM rows
                     WHERE grp = ? AND id = ? AND refs IS NOT NULL",
                )?;
                for id in &lookup.ids {
                    let mut rows = select.query(params![grp, id.text()])?;
                    if let Some(row) = rows.next()? {
                        page.rows.push(RawRow::of(row)?.record_of(id.clone(), &hashes)?);
                    }
                }
                return Ok(page);
            }
            let wanted: HashSet<_> = lookup.ids.iter().map(|id| id.text()).collect();
            let numbers = numbers_of(&hashes, &lookup.queries);
            let mut select = db.prepare_cached(
                "SELECT id, row_version, patch, refs FROM rows
                 WHERE grp = ? AND id > ? ORDER BY id LIMIT ?",
            )?;
            let limit = page_rows(lookup.limit);
            let from = lookup.from.as_ref().map_or("", |cursor| &cursor.0);
            let mut rows = select.query(params![grp, from, limit])?;
            let mut turn = PageTurn::new(limit);
            while let Some(row) = rows.next()? {
                let raw = RawRow::of(row)?;
                let asked_for = wanted.contains(raw.id) || raw.mentions(&numbers)?;
                if raw.refs.is_some() && asked_for {
                    page.rows.push(raw.record(&hashes)?);
                }
                page.next = turn.after(&raw);
            }
            Ok(page)
        })
    }

    /// A page of what a late client misses: reads the group's rows in key order.
    pub(super) fn catch_up(&mut self, scan: &CatchupScan) -> Answer<CatchupPage> {
        self.read(&scan.range.group, |db, _| {
            let mut page = CatchupPage::default();
            let Some(grp) = at_version(db, &scan.range.group, &scan.range.current)? else {
                return Ok(page);
            };
            if scan.from.is_none() {
                page.config = config_changes(db, grp, &scan.range)?;
            }
            let hashes = query_hashes(db, grp)?;
            let without = numbers_of(&hashes, &scan.without);
            let from = scan.from.as_ref().map_or("", |cursor| &cursor.0);
            let mut select = db.prepare_cached(
                "SELECT id, row_version, patch, refs FROM rows
                 WHERE grp = ? AND id > ? ORDER BY id LIMIT ?",
            )?;
            let limit = page_rows(scan.limit);
            let mut rows = select.query(params![grp, from, limit])?;
            let mut turn = PageTurn::new(limit);
            while let Some(row) = rows.next()? {
                let raw = RawRow::of(row)?;
                if scan.range.contains(&version(raw.patch)?) && !raw.mentions(&without)? {
                    page.rows.push(raw.record(&hashes)?);
                }
                page.next = turn.after(&raw);
            }
            Ok(page)
        })
    }

    /// The inspector's list (spec §2.9).
    pub(super) fn inspect(
        &mut self,
        group: &ClientGroupId,
        client: Option<&ClientId>,
        clock: TtlClock,
    ) -> Answer<Vec<InspectedQuery>> {
        self.read(group, |db, _| {
            let Some(found) = group_row(db, group)? else { return Ok(Vec::new()) };
            let counts = rows_per_query(db, found.num)?;
            let by_hash: HashMap<_, _> =
                all_queries(db, found.num)?.into_iter().map(|q| (q.query.id.clone(), q)).collect();
            let desires = desires(db, found.num)?;
            Ok(decode::inspected(desires, client, clock, |hash| {
                let stored = by_hash.get(hash);
                let rows = stored.and_then(|s| counts.get(&s.num)).copied().unwrap_or(0);
                (stored.map(|s| &s.query), rows)
            }))
        })
    }
}

fn page_rows(limit: usize) -> i64 {
    limit.clamp(1, PAGE_ROWS) as i64
}

/// Counts the records of a page.
struct PageTurn {
    left: i64,
}

impl PageTurn {
    fn new(limit: i64) -> PageTurn {
        PageTurn { left: limit }
    }

    /// Where the next page begins, if this record is the last one of a full page.
    fn after(&mut self, raw: &RawRow<'_>) -> Option<RowCursor> {
        self.left -= 1;
        (self.left == 0).then(|| RowCursor(raw.id.to_owned()))
    }
}

/// Changes of queries and desires in a range, queries first.
fn config_changes(
    db: &Connection,
    grp: i64,
    range: &CatchupRange,
) -> Result<Vec<ConfigChange>, Failure> {
    let mut changes = Vec::new();
    let mut select = db.prepare_cached(
        "SELECT hash, patch, deleted FROM queries WHERE grp = ? AND patch IS NOT NULL",
    )?;
    let mut rows = select.query([grp])?;
    while let Some(row) = rows.next()? {
        let patch_version = version(row.get_ref(1)?.as_str().map_err(from_sql)?)?;
        if range.contains(&patch_version) {
            changes.push(ConfigChange::Got {
                query: row.get::<_, String>(0)?.into(),
                deleted: row.get(2)?,
                patch_version,
            });
        }
    }
    for desire in desires(db, grp)? {
        if range.contains(&desire.patch_version) {
            changes.push(ConfigChange::Desire {
                client: desire.client,
                query: desire.query,
                deleted: desire.deleted,
                patch_version: desire.patch_version,
            });
        }
    }
    Ok(changes)
}

fn from_sql(e: rusqlite::types::FromSqlError) -> Failure {
    Failure::Damaged(e.to_string())
}

/// The group's number if it is at the version that the asker believes in; `None` if neither knows
/// of it.
fn at_version(
    db: &Connection,
    group: &ClientGroupId,
    current: &CvrVersion,
) -> Result<Option<i64>, Failure> {
    let found = db
        .prepare_cached("SELECT num, version, rows_version FROM groups WHERE id = ?")?
        .query_row([group.as_str()], |r| {
            let rows: Option<String> = r.get(2)?;
            Ok((r.get(0)?, r.get::<_, String>(1)?, rows))
        })
        .optional()?;
    let expected = current.cookie();
    let nothing = CvrVersion::empty().cookie();
    match found {
        None if expected == nothing => Ok(None),
        Some((num, version, None)) if version == expected => Ok(Some(num)),
        found => {
            let actual = found.map_or(nothing, |(_, version, rows)| {
                if version == expected { rows.unwrap_or(version) } else { version }
            });
            Err(CvrStoreError::ConcurrentModification { expected, actual }.into())
        }
    }
}

fn group_row(db: &Connection, group: &ClientGroupId) -> Result<Option<GroupRow>, Failure> {
    let mut select = db.prepare_cached(
        "SELECT g.num, g.version, g.last_active, g.ttl_clock, g.replica_version, g.owner,
           g.granted, s.json, g.profile, g.deleted, g.rows_version
         FROM groups g LEFT JOIN schemas s ON s.num = g.client_schema WHERE g.id = ?",
    )?;
    let mut rows = select.query([group.as_str()])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    let replica_version: Option<String> = row.get(4)?;
    let cvr = Cvr {
        version: version(&row.get::<_, String>(1)?)?,
        stored: true,
        last_active_ms: row.get(2)?,
        ttl_clock: TtlClock(row.get(3)?),
        replica_version: replica_version.as_deref().map(state).transpose()?,
        profile_id: row.get(8)?,
        ..Cvr::empty(group.clone())
    };
    Ok(Some(GroupRow {
        num: row.get(0)?,
        cvr,
        schema: row.get(7)?,
        owner: row.get(5)?,
        granted_ms: row.get::<_, Option<f64>>(6)?.unwrap_or(0.0),
        deleted: row.get(9)?,
        rows_version: row.get(10)?,
    }))
}

fn clients(db: &Connection, grp: i64) -> Result<Vec<ClientId>, Failure> {
    let mut select = db.prepare_cached("SELECT id FROM clients WHERE grp = ?")?;
    let ids = select.query_map([grp], |row| row.get::<_, String>(0))?;
    Ok(ids.map(|id| id.map(ClientId::from)).collect::<Result<_, _>>()?)
}

struct StoredQuery {
    query: Query,
    num: i64,
    deleted: bool,
}

fn queries(db: &Connection, grp: i64) -> Result<Vec<Query>, Failure> {
    let all = all_queries(db, grp)?;
    Ok(all.into_iter().filter(|q| !q.deleted).map(|q| q.query).collect())
}

fn all_queries(db: &Connection, grp: i64) -> Result<Vec<StoredQuery>, Failure> {
    let mut select = db.prepare_cached(
        "SELECT hash, num, kind, body, args, patch, transformation_hash, transformation_version,
           signature, deleted FROM queries WHERE grp = ?",
    )?;
    let mut rows = select.query([grp])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let id = QueryHash::from(row.get::<_, String>(0)?);
        let text: Arc<str> = row.get(3)?;
        let ast = || match serde_json::from_str(&text) {
            Ok(ast) => Ok(Arc::new(ast)),
            Err(e) => Err(damaged(format!("AST of query {id}"), e)),
        };
        let body = match row.get::<_, i64>(2)? {
            KIND_CLIENT => QueryBody::Client { ast: ast()? },
            KIND_INTERNAL => QueryBody::Internal { ast: ast()? },
            KIND_CUSTOM => QueryBody::Custom {
                name: text,
                args: row
                    .get::<_, Option<Arc<str>>>(4)?
                    .ok_or_else(|| damaged(format!("query {id}"), "no arguments"))?,
            },
            kind => return Err(damaged(format!("query {id}"), format!("unknown kind {kind}"))),
        };
        let parsed = |at| -> Result<Option<CvrVersion>, Failure> {
            row.get::<_, Option<String>>(at)?.as_deref().map(version).transpose()
        };
        found.push(StoredQuery {
            num: row.get(1)?,
            deleted: row.get(9)?,
            query: Query {
                patch_version: parsed(5)?,
                transformation_hash: row.get(6)?,
                transformation_version: parsed(7)?,
                signature: row.get::<_, Option<i64>>(8)?.map(|s| s as u64),
                ..Query::new(id, body)
            },
        });
    }
    Ok(found)
}

fn desires(db: &Connection, grp: i64) -> Result<Vec<StoredDesire>, Failure> {
    let mut select = db.prepare_cached(
        "SELECT client, query, patch, deleted, ttl, inactivated FROM desires WHERE grp = ?
         ORDER BY client, query",
    )?;
    let mut rows = select.query([grp])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(StoredDesire {
            client: row.get::<_, String>(0)?.into(),
            query: row.get::<_, String>(1)?.into(),
            patch_version: version(row.get_ref(2)?.as_str().map_err(from_sql)?)?,
            deleted: row.get(3)?,
            ttl_ms: row.get(4)?,
            inactivated_at: row.get::<_, Option<f64>>(5)?.map(TtlClock),
        });
    }
    Ok(found)
}

/// Queries by their number in the group, deleted ones too.
fn query_hashes(db: &Connection, grp: i64) -> Result<HashMap<i64, QueryHash>, Failure> {
    let mut select = db.prepare_cached("SELECT num, hash FROM queries WHERE grp = ?")?;
    let found = select.query_map([grp], |row| {
        Ok((row.get::<_, i64>(0)?, QueryHash::from(row.get::<_, String>(1)?)))
    })?;
    Ok(found.collect::<Result<_, _>>()?)
}

fn numbers_of(hashes: &HashMap<i64, QueryHash>, queries: &[QueryHash]) -> HashSet<i64> {
    hashes.iter().filter(|(_, hash)| queries.contains(hash)).map(|(num, _)| *num).collect()
}

fn rows_per_query(db: &Connection, grp: i64) -> Result<HashMap<i64, u64>, Failure> {
    let mut select =
        db.prepare_cached("SELECT refs FROM rows WHERE grp = ? AND refs IS NOT NULL")?;
    let mut rows = select.query([grp])?;
    let mut counts = HashMap::new();
    while let Some(row) = rows.next()? {
        let refs = row.get_ref(0)?.as_blob().map_err(from_sql)?;
        for (num, _) in codec::decode(refs).ok_or_else(|| damaged("a row", "reference counts"))? {
            *counts.entry(num).or_insert(0) += 1;
        }
    }
    Ok(counts)
}

/// A row record as the file has it.
struct RawRow<'a> {
    id: &'a str,
    row_version: &'a str,
    patch: &'a str,
    refs: Option<&'a [u8]>,
}

impl<'a> RawRow<'a> {
    fn of(row: &'a Row<'_>) -> Result<RawRow<'a>, Failure> {
        let text = |at| row.get_ref(at)?.as_str().map_err(from_sql);
        Ok(RawRow {
            id: text(0)?,
            row_version: text(1)?,
            patch: text(2)?,
            refs: row.get_ref(3)?.as_blob_or_null().map_err(from_sql)?,
        })
    }

    fn counts(&self) -> Result<Option<Vec<(i64, i64)>>, Failure> {
        self.refs
            .map(|refs| codec::decode(refs).ok_or_else(|| damaged(self.id, "reference counts")))
            .transpose()
    }

    fn mentions(&self, numbers: &HashSet<i64>) -> Result<bool, Failure> {
        if numbers.is_empty() {
            return Ok(false);
        }
        Ok(self.counts()?.is_some_and(|counts| counts.iter().any(|(n, _)| numbers.contains(n))))
    }

    fn record(&self, hashes: &HashMap<i64, QueryHash>) -> Result<RowRecord, Failure> {
        let id = RowIdentity::parse(self.id).map_err(|e| damaged("a row", e))?;
        self.record_of(Arc::new(id), hashes)
    }

    fn record_of(
        &self,
        id: Arc<RowIdentity>,
        hashes: &HashMap<i64, QueryHash>,
    ) -> Result<RowRecord, Failure> {
        let ref_counts = match self.counts()? {
            None => None,
            Some(counts) => {
                let mut named = RefCounts::new();
                for (num, count) in counts {
                    let query = hashes
                        .get(&num)
                        .ok_or_else(|| damaged(self.id, format!("query number {num}")))?;
                    named.add(query, count);
                }
                Some(named)
            }
        };
        decode::record(id, self.row_version, self.patch, ref_counts)
    }
}
