//! [`Source`] over a reader's snapshot: each fetch is one prepared statement.

use std::ops::ControlFlow;
use std::rc::Rc;

use rusqlite::CachedStatement;
use rusqlite::types::{ToSql, ToSqlOutput, Value as SqlValue};
use rusqlite::vtab::array::Array;
use zeroring_core::ivm::source::{Ended, Fetch, Filter, Part, Reach, Source, SourceError};
use zeroring_core::row::{Key, RowRef};
use zeroring_core::schema::TableSpec;
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::order;

use super::ReplicaError;
use super::estimate::{ExistsSide, Statistics};
use super::parts::{Numbered, RowNumbers};
use super::patience::Patience;
use super::reader::{ReplicaReader, decode_row, source_error, store_error};
use super::scans::{MissingIndex, ScanCounters, ScanWatch};
use super::sql::{self, Bind, MAX_COMPOUND_KEYS, Select, Statement};
use super::types::{ValueParam, VersionCache};

/// The rows of a replica, at the version of a reader's snapshot.
#[derive(Debug)]
pub struct ReplicaSource {
    reader: ReplicaReader,
    patience: Patience,
    version: StateVersion,
    statements: u64,
    interrupted: u64,
    scans: ScanWatch,
    /// Read when a statement first has a choice, with the schema version that they are of.
    statistics: Option<(i64, Rc<Statistics>)>,
    /// The statistics were compared with the file's since the snapshot was opened.
    statistics_checked: bool,
    /// Instead of what the statistics say.
    always: Option<ExistsSide<'static>>,
    versions: VersionCache,
}

impl ReplicaSource {
    /// A source over a reader. No snapshot is open until [`ReplicaSource::refresh`].
    ///
    /// # Errors
    /// [`ReplicaError`] if SQLite refuses the functions that statements need.
    pub fn new(mut reader: ReplicaReader) -> Result<ReplicaSource, ReplicaError> {
        let patience = Patience::over(&mut reader)?;
        sql::register(reader.connection())
            .map_err(ReplicaError::sqlite(reader.path(), "adding functions"))?;
        Ok(ReplicaSource {
            reader,
            patience,
            version: StateVersion::zero(),
            statements: 0,
            interrupted: 0,
            scans: ScanWatch::default(),
            statistics: None,
            statistics_checked: false,
            always: None,
            versions: VersionCache::default(),
        })
    }

    /// Moves to the newest version.
    ///
    /// # Errors
    /// [`ReplicaError`]; then no snapshot is open, and every fetch fails.
    pub fn refresh(&mut self) -> Result<&StateVersion, ReplicaError> {
        self.statistics_checked = false;
        self.version = self.reader.refresh()?.clone();
        Ok(&self.version)
    }

    /// Gives the snapshot up, so that a checkpoint can pass.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub fn release(&mut self) -> Result<(), ReplicaError> {
        self.reader.release()
    }

    /// The reader, for anything but moving it.
    pub fn reader(&self) -> &ReplicaReader {
        &self.reader
    }

    /// Statements run so far.
    pub fn statements(&self) -> u64 {
        self.statements
    }

    /// Statements that took too much work and were interrupted.
    pub fn interrupted(&self) -> u64 {
        self.interrupted
    }

    /// Instructions of SQLite's machine so far; short statements are not counted.
    pub fn instructions(&self) -> u64 {
        self.patience.spent()
    }

    /// Begins every EXISTS with this side from now on, whatever the statistics say: for tests.
    pub fn always_begin_with(&mut self, side: ExistsSide<'static>) {
        self.always = Some(side);
    }

    /// Looks at the work of statements every so many instructions: tests have few rows.
    ///
    /// # Errors
    /// [`ReplicaError`] if SQLite refuses.
    pub fn look_at_work_every(mut self, instructions: i32) -> Result<ReplicaSource, ReplicaError> {
        self.patience.ask_every(&mut self.reader, instructions)?;
        Ok(self)
    }

    /// The statistics of the snapshot: [`super::analyze`] raises the schema's version when they
    /// change.
    fn statistics(&mut self) -> Rc<Statistics> {
        let known = match &self.statistics {
            Some((_, known)) if self.statistics_checked => return known.clone(),
            other => other,
        };
        let connection = self.reader.connection();
        let now = connection
            .prepare_cached("PRAGMA schema_version")
            .and_then(|mut s| s.query_row([], |r| r.get(0)))
            .unwrap_or(0);
        let fresh = match known {
            Some((version, known)) if *version == now => known.clone(),
            _ => Rc::new(Statistics::read(connection)),
        };
        self.statistics = Some((now, fresh.clone()));
        self.statistics_checked = true;
        fresh
    }

    /// What was scanned so far.
    pub fn scans(&self) -> ScanCounters {
        self.scans.counters
    }

    /// Missing indexes that were noticed since the last call, each plan's once.
    pub fn take_missing_indexes(&mut self) -> Vec<MissingIndex> {
        self.scans.take()
    }

    fn run(
        &mut self,
        fetch: &Fetch<'_>,
        keys: Option<&[Key]>,
        range: Option<RowNumbers<'_>>,
        visit: &mut dyn FnMut(RowRef) -> Result<ControlFlow<()>, SourceError>,
    ) -> Result<ControlFlow<()>, SourceError> {
        let statistics;
        let side = match self.always {
            Some(side) => side,
            None if sql::has_bodies(fetch) => {
                statistics = self.statistics();
                ExistsSide::Cheaper(&statistics)
            }
            None => ExistsSide::Parent,
        };
        let sql = sql::compile_range(fetch, keys, range, Select::Rows, side)?;
        self.statements += 1;
        let mut statement = prepare(&self.reader, &sql)?;
        let table = &fetch.plan.node(fetch.node).table;
        let flow = visit_rows(&mut statement, table, &mut self.versions, visit);
        let ended = !matches!(flow, Err(SourceError::Interrupted));
        self.scans.ran(self.reader.connection(), &statement, &sql.text, fetch, ended);
        flow
    }

    /// The rows of a range, if they can be had with so much work; and what is left of it.
    fn rows_within(
        &mut self,
        fetch: &Fetch<'_>,
        range: Option<RowNumbers<'_>>,
        units: u64,
    ) -> Result<(Option<Vec<RowRef>>, u64), SourceError> {
        let table = &fetch.plan.node(fetch.node).table;
        let delivers = fetch.delivers();
        let mut rows = Vec::new();
        self.patience.limit(units);
        let read = self.run(fetch, None, range, &mut |row| {
            if delivers {
                SourceError::check_deliverable(table, &row)?;
            }
            rows.push(row);
            Ok(ControlFlow::Continue(()))
        });
        let rest = self.patience.end();
        match read {
            Ok(_) => Ok((Some(rows), rest)),
            Err(SourceError::Interrupted) => {
                self.interrupted += 1;
                Ok((None, 0))
            }
            Err(error) => Err(error),
        }
    }

    fn has_row(&mut self, fetch: &Fetch<'_>, keys: Option<&[Key]>) -> Result<bool, SourceError> {
        let sql = sql::compile(fetch, keys, Select::Exists, ExistsSide::Parent)?;
        self.statements += 1;
        let mut statement = prepare(&self.reader, &sql)?;
        let found = statement.raw_query().next().map_err(store_error).map(|row| row.is_some());
        self.scans.ran(self.reader.connection(), &statement, &sql.text, fetch, true);
        found
    }

    /// More compound keys than one statement takes: in parts; an order over all parts is made
    /// here.
    fn run_in_parts(
        &mut self,
        fetch: &Fetch<'_>,
        keys: &[Key],
        visit: &mut dyn FnMut(RowRef) -> Result<ControlFlow<()>, SourceError>,
    ) -> Result<(), SourceError> {
        let sorted = fetch.ordered || fetch.limit.is_some();
        let mut all = Vec::new();
        for part in keys.chunks(MAX_COMPOUND_KEYS) {
            let flow = self.run(fetch, Some(part), None, &mut |row| {
                if sorted {
                    all.push(row);
                    Ok(ControlFlow::Continue(()))
                } else {
                    visit(row)
                }
            })?;
            if flow.is_break() {
                return Ok(());
            }
        }
        let by = &fetch.plan.node(fetch.node).order;
        all.sort_by(|a, b| order::compare_rows(by, a, b));
        for row in all.into_iter().take(fetch.limit.unwrap_or(usize::MAX)) {
            if visit(row)?.is_break() {
                break;
            }
        }
        Ok(())
    }
}

impl Source for ReplicaSource {
    fn version(&self) -> &StateVersion {
        &self.version
    }

    fn fetch(
        &mut self,
        fetch: &Fetch<'_>,
        visit: &mut dyn FnMut(RowRef) -> ControlFlow<()>,
    ) -> Result<(), SourceError> {
        if fetch.limit == Some(0) || fetch.keys.is_some_and(|k| k.keys.is_empty()) {
            return Ok(());
        }
        let table = &fetch.plan.node(fetch.node).table;
        let delivers = fetch.delivers();
        let mut visit = |row: RowRef| {
            if delivers {
                SourceError::check_deliverable(table, &row)?;
            }
            Ok(visit(row))
        };
        match &fetch.keys {
            Some(k) if k.columns.len() > 1 && k.keys.len() > MAX_COMPOUND_KEYS => {
                self.run_in_parts(fetch, k.keys, &mut visit)
            }
            _ => self.run(fetch, None, None, &mut visit).map(drop),
        }
    }

    fn fetch_within(
        &mut self,
        fetch: &Fetch<'_>,
        units: u64,
        visit: &mut dyn FnMut(RowRef) -> ControlFlow<()>,
    ) -> Result<Ended, SourceError> {
        self.patience.limit(units);
        let read = self.fetch(fetch, visit);
        self.patience.end();
        match read {
            Ok(()) => Ok(Ended::Whole),
            Err(SourceError::Interrupted) => {
                self.interrupted += 1;
                Ok(Ended::Interrupted)
            }
            Err(error) => Err(error),
        }
    }

    fn reach(&mut self, fetch: &Fetch<'_>, rows: usize, units: u64) -> Result<Reach, SourceError> {
        let one = Fetch {
            keys: None,
            filter: Filter::Any,
            before: None,
            limit: Some(1),
            ordered: true,
            ..fetch.clone()
        };
        let mut sql = sql::compile(&one, None, Select::Rows, ExistsSide::Parent)?;
        sql.text.push_str(" OFFSET +?");
        sql.binds.push(Bind::Integer(i64::try_from(rows).unwrap_or(i64::MAX)));
        self.statements += 1;
        let node = fetch.plan.node(fetch.node);
        let mut reach = Reach::End;
        self.patience.limit(units);
        let read = prepare(&self.reader, &sql).and_then(|mut statement| {
            visit_rows(&mut statement, &node.table, &mut self.versions, &mut |row| {
                reach = Reach::At(order::position(&node.order, &row).into_iter().collect());
                Ok(ControlFlow::Break(()))
            })
        });
        self.patience.end();
        match read {
            Ok(_) => Ok(reach),
            Err(SourceError::Interrupted) => Ok(Reach::Unknown),
            Err(error) => Err(error),
        }
    }

    fn fetch_part(
        &mut self,
        fetch: &Fetch<'_>,
        part: &mut Part,
        units: u64,
        visit: &mut dyn FnMut(RowRef),
    ) -> Result<(), SourceError> {
        if part.width.is_none() {
            // Everything first: nearly always that is little.
            if let Some(rows) = self.rows_within(fetch, None, units)?.0 {
                rows.into_iter().for_each(visit);
                part.done = true;
                return Ok(());
            }
        }
        let table = &fetch.plan.node(fetch.node).table;
        let Some(numbered) = Numbered::read(self.reader.connection(), table)? else {
            self.rows_within(fetch, None, u64::MAX)?.0.into_iter().flatten().for_each(visit);
            part.done = true;
            return Ok(());
        };
        if part.width.is_none() {
            numbered.was_too_much(part);
            return Ok(());
        }
        let mut left = units;
        while !part.done && left > 0 {
            let Some(range) = numbered.range(part) else {
                part.done = true;
                break;
            };
            // A single row is read, whatever that takes.
            let (rows, rest) = match range.is_one() {
                true => (self.rows_within(fetch, Some(range), u64::MAX)?.0, 0),
                false => self.rows_within(fetch, Some(range), left)?,
            };
            let Some(rows) = rows else {
                numbered.was_too_much(part);
                break;
            };
            rows.into_iter().for_each(&mut *visit);
            numbered.was_read(part, range);
            left = rest;
        }
        Ok(())
    }

    fn few_per_key(&mut self, table: &TableSpec, columns: &[usize], most: usize) -> bool {
        self.statistics().few_per_key(table, columns, most)
    }

    fn exists(&mut self, fetch: &Fetch<'_>) -> Result<bool, SourceError> {
        let keys = fetch.keys.map_or(&[][..], |k| k.keys);
        if fetch.limit == Some(0) || fetch.keys.is_some() && keys.is_empty() {
            return Ok(false);
        }
        let parts: Vec<Option<&[Key]>> = match &fetch.keys {
            Some(k) if k.columns.len() > 1 => keys.chunks(MAX_COMPOUND_KEYS).map(Some).collect(),
            _ => vec![None],
        };
        for part in parts {
            if self.has_row(fetch, part)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn prepare<'r>(
    reader: &'r ReplicaReader,
    sql: &Statement<'_>,
) -> Result<CachedStatement<'r>, SourceError> {
    if reader.version().is_none() {
        return Err(SourceError::Store("no snapshot is open".into()));
    }
    let mut statement = reader.prepare(&sql.text)?;
    let mut owned = sql.owned.iter().peekable();
    for (i, bind) in sql.binds.iter().enumerate() {
        let param = match owned.next_if(|(at, _)| *at == i) {
            Some((_, text)) => BindParam(Bind::Text(text)),
            None => BindParam(*bind),
        };
        statement.raw_bind_parameter(i + 1, param).map_err(store_error)?;
    }
    Ok(statement)
}

fn visit_rows(
    statement: &mut CachedStatement<'_>,
    table: &TableSpec,
    versions: &mut VersionCache,
    visit: &mut dyn FnMut(RowRef) -> Result<ControlFlow<()>, SourceError>,
) -> Result<ControlFlow<()>, SourceError> {
    let mut rows = statement.raw_query();
    while let Some(row) = rows.next().map_err(store_error)? {
        let row = decode_row(table, versions, row, 0).map_err(source_error)?;
        if visit(row)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

struct BindParam<'a>(Bind<'a>);

impl ToSql for BindParam<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        match self.0 {
            Bind::Value(Value::String(s) | Value::Json(s)) => Ok(ToSqlOutput::from(&**s)),
            Bind::Value(v) => Ok(ToSqlOutput::Owned(owned(v))),
            Bind::Text(t) => Ok(ToSqlOutput::from(t)),
            Bind::Integer(n) => Ok(ToSqlOutput::from(n)),
            Bind::List(values) => array(values.iter()),
            Bind::Keys(keys) => array(keys.iter().filter_map(|k| k.first())),
        }
    }
}

fn array<'v>(values: impl Iterator<Item = &'v Value>) -> rusqlite::Result<ToSqlOutput<'static>> {
    let values: Array = Rc::new(values.map(owned).collect());
    Ok(ToSqlOutput::from_rc(values, c"rarray"))
}

fn owned(value: &Value) -> SqlValue {
    match ValueParam(value).to_sql() {
        Ok(ToSqlOutput::Owned(v)) => v,
        Ok(ToSqlOutput::Borrowed(v)) => v.try_into().unwrap_or(SqlValue::Null),
        _ => SqlValue::Null,
    }
}
