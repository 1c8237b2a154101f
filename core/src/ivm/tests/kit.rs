//! A small database with named rows, queries as JSON, and deltas as text.

use std::sync::Arc;

use serde_json::Value as Json;

use crate::change::{Commit, RowChange, TableChange};
use crate::ivm::brute;
use crate::ivm::delta::{Advanced, DeltaKind, RowDelta};
use crate::ivm::engine::{Budget, Engine, EngineConfig, InstanceId, Progress};
use crate::ivm::memory_source::{Database, MemorySource};
use crate::ivm::plan::{Param, Plan};
use crate::row::{Row, RowId, RowRef};
use crate::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use crate::value::Value;
use crate::version::StateVersion;
use crate::zql::compile::{IdentityKeys, compile};

/// A value of a row: numbers, strings, null.
pub(super) fn value(json: &Json) -> Value {
    match json {
        Json::Number(n) => Value::Number(n.as_f64().unwrap()),
        Json::String(s) => Value::string(s),
        Json::Null => Value::Null,
        other => panic!("no column value: {other}"),
    }
}

pub(super) fn table(id: u32, name: &str, columns: &[(&str, ValueType)]) -> Arc<TableSpec> {
    Arc::new(TableSpec {
        id: TableId(id),
        name: name.into(),
        columns: columns
            .iter()
            .enumerate()
            .map(|(i, (name, value_type))| ColumnSpec {
                name: (*name).into(),
                value_type: *value_type,
                nullable: i > 0,
                upstream_type: "x".into(),
            })
            .collect(),
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: vec![UniqueKey { columns: vec![0], not_null: true }],
        min_row_version: StateVersion::zero(),
        indexes: vec![],
    })
}

/// An engine with its database; the first column of each table is its key.
pub(super) struct Kit {
    pub(super) engine: Engine,
    pub(super) source: MemorySource,
    pub(super) schema: Arc<Schema>,
    lsn: u64,
}

/// A change: table and row; a row with only its key is a delete.
pub(super) type Change = (&'static str, Json);

impl Kit {
    pub(super) fn new(config: EngineConfig, tables: Vec<Arc<TableSpec>>, rows: &[Change]) -> Kit {
        let tables = tables.into_iter().map(|t| (t.name.clone(), t)).collect();
        let schema = Arc::new(Schema { tables, ..Schema::default() });
        let version = StateVersion::from_lsn(1);
        let mut db = Database::default();
        for (table, row) in rows {
            db.put(schema.table(table).unwrap(), Kit::row(row, &version));
        }
        Kit {
            engine: Engine::new(config, version.clone(), schema.clone()),
            source: MemorySource::new(db, version),
            schema,
            lsn: 1,
        }
    }

    fn row(row: &Json, version: &StateVersion) -> RowRef {
        let values: Vec<Value> = row.as_array().unwrap().iter().map(value).collect();
        Row::new(version.clone(), values)
    }

    pub(super) fn plan(&self, query: &Json) -> (Arc<Plan>, Arc<[Param]>) {
        let ast = serde_json::from_value(query.clone()).unwrap();
        let (plan, params) = compile(&ast, &self.schema, &IdentityKeys::default()).unwrap();
        (Arc::new(plan), params.into())
    }

    pub(super) fn subscribe(&mut self, query: &Json) -> InstanceId {
        let (plan, params) = self.plan(query);
        self.engine.subscribe(&plan, params).unwrap()
    }

    pub(super) fn hydrate(&mut self, id: InstanceId) {
        let mut budget = Budget::unlimited();
        let done = self.engine.hydrate_step(id, &mut self.source, &mut budget).unwrap();
        assert_eq!(done, Progress::Done);
    }

    /// Applies changes to the database, as one commit for the engine.
    pub(super) fn commit(&mut self, changes: &[Change]) -> Arc<Commit> {
        self.lsn += 1;
        let version = StateVersion::from_lsn(self.lsn);
        let mut tables: Vec<TableChange> = Vec::new();
        for (name, json) in changes {
            let table = self.schema.table(name).unwrap().clone();
            let row = Kit::row(json, &version);
            let delete = row.values.len() < table.columns.len();
            let old = self.source.db.get(table.id, &row.project(&[0])).cloned();
            let new = (!delete).then_some(row);
            assert!(old.is_some() || new.is_some(), "nothing to delete: {name} {json}");
            let change = RowChange { old, new };
            match tables.iter_mut().find(|t| t.table.id == table.id) {
                Some(t) => t.rows.push(change),
                None => {
                    tables.push(TableChange { table, rows: vec![change], truncated: false });
                }
            }
        }
        let commit = Arc::new(Commit {
            previous: self.source.version.clone(),
            version,
            tables,
            schema: None,
            upstream_commit_ms: 0.0,
            permissions_changed: false,
        });
        self.source.advance(&commit);
        commit
    }

    pub(super) fn advance(&mut self, commits: &[Arc<Commit>]) -> Advanced {
        self.engine.begin_advance(commits).unwrap();
        self.finish()
    }

    pub(super) fn finish(&mut self) -> Advanced {
        let mut budget = Budget::unlimited();
        self.engine.advance_step(&mut self.source, &mut budget).unwrap().unwrap()
    }

    pub(super) fn change(&mut self, changes: &[Change]) -> Advanced {
        let commit = self.commit(changes);
        self.advance(&[commit])
    }

    /// The engine's rows equal the oracle's.
    pub(super) fn check(&self, id: InstanceId, query: &Json) {
        let (plan, params) = self.plan(query);
        let want: Vec<(RowId, u64)> = brute::sync(&plan, &params, &self.source.db)
            .into_iter()
            .map(|(id, (count, _))| (id, count))
            .collect();
        let rows = self.engine.rows(id).unwrap();
        let mut have: Vec<(RowId, u64)> =
            rows.map(|h| (RowId::of(h.table, h.row), h.count)).collect();
        have.sort();
        assert_eq!(have, want);
    }

    /// The current rows as `+key` words.
    pub(super) fn rows(&self, id: InstanceId) -> String {
        let rows = self.engine.rows(id).unwrap();
        let words = rows.map(|h| word('+', &h.row.values[0], h.count));
        sorted(words.collect())
    }
}

fn word(sign: char, key: &Value, count: u64) -> String {
    let key = match key {
        Value::String(s) => s.to_string(),
        Value::Number(n) => n.to_string(),
        other => panic!("key {other:?}"),
    };
    if count == 1 { format!("{sign}{key}") } else { format!("{sign}{key}×{count}") }
}

fn sorted(mut words: Vec<String>) -> String {
    words.sort_by(|a, b| a[1..].cmp(&b[1..]));
    words.join(" ")
}

/// Deltas as words: `+` entered, `-` left, `~` changed contents, `=` counted anew.
pub(super) fn words(deltas: &[RowDelta]) -> String {
    let word = |d: &RowDelta| {
        let key = &d.id.key[0];
        match d.kind() {
            DeltaKind::Entered => word('+', key, d.count_after),
            DeltaKind::Left => word('-', key, d.count_before),
            DeltaKind::Changed => word('~', key, d.count_after),
            DeltaKind::Recounted => word('=', key, d.count_after),
        }
    };
    sorted(deltas.iter().map(word).collect())
}

/// The deltas of the only instance.
pub(super) fn only(advanced: &Advanced) -> String {
    assert!(advanced.failed.is_empty(), "{:?}", advanced.failed);
    assert!(advanced.deltas.len() <= 1);
    advanced.deltas.first().map_or(String::new(), |d| words(&d.rows))
}
