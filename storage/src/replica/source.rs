//! [`Source`] over a reader's snapshot: each fetch is one prepared statement.

use std::ops::ControlFlow;
use std::rc::Rc;

use rusqlite::CachedStatement;
use rusqlite::types::{ToSql, ToSqlOutput, Value as SqlValue};
use rusqlite::vtab::array::Array;
use zeroring_core::ivm::source::{Fetch, Source, SourceError};
use zeroring_core::row::{Key, RowRef};
use zeroring_core::schema::TableSpec;
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::order;

use super::ReplicaError;
use super::estimate::{ExistsSide, Statistics};
use super::reader::{ReplicaReader, decode_row, source_error, store_error};
use super::scans::{MissingIndex, ScanCounters, ScanWatch};
use super::sql::{self, Bind, MAX_COMPOUND_KEYS, Select, Statement};
use super::types::{ValueParam, VersionCache};

/// The rows of a replica, at the version of a reader's snapshot.
#[derive(Debug)]
pub struct ReplicaSource {
    reader: ReplicaReader,
    version: StateVersion,
    statements: u64,
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
    pub fn new(reader: ReplicaReader) -> Result<ReplicaSource, ReplicaError> {
        sql::register(reader.connection())
            .map_err(ReplicaError::sqlite(reader.path(), "adding functions"))?;
        Ok(ReplicaSource {
            reader,
            version: StateVersion::zero(),
            statements: 0,
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

    /// Begins every EXISTS with this side from now on, whatever the statistics say: for tests.
    pub fn always_begin_with(&mut self, side: ExistsSide<'static>) {
        self.always = Some(side);
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
        let sql = sql::compile(fetch, keys, Select::Rows, side)?;
        self.statements += 1;
        let mut statement = prepare(&self.reader, &sql)?;
        let table = &fetch.plan.node(fetch.node).table;
        let flow = visit_rows(&mut statement, table, &mut self.versions, visit);
        self.scans.ran(self.reader.connection(), &statement, &sql.text, fetch);
        flow
    }

    fn has_row(&mut self, fetch: &Fetch<'_>, keys: Option<&[Key]>) -> Result<bool, SourceError> {
        let sql = sql::compile(fetch, keys, Select::Exists, ExistsSide::Parent)?;
        self.statements += 1;
        let mut statement = prepare(&self.reader, &sql)?;
        let found = statement.raw_query().next().map_err(store_error).map(|row| row.is_some());
        self.scans.ran(self.reader.connection(), &statement, &sql.text, fetch);
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
            let flow = self.run(fetch, Some(part), &mut |row| {
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
            _ => self.run(fetch, None, &mut visit).map(drop),
        }
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
