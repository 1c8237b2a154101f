//! No step of the engine makes SQLite do much: a statement that looks at many rows is given up and
//! read part by part. Counted in instructions of SQLite's machine.

#![allow(clippy::unwrap_used, clippy::panic)]

mod sqlite_world;

use std::sync::Arc;

use serde_json::{Value as Json, json};
use sqlite_world::replica;
use zeroring_core::change::{Commit, RowChange, TableChange};
use zeroring_core::ivm::brute;
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, InstanceId, Progress};
use zeroring_core::ivm::memory_source::Database;
use zeroring_core::ivm::source::Source as _;
use zeroring_core::row::{Row, RowId};
use zeroring_core::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::compile::{IdentityKeys, compile};
use zeroring_storage::replica::source::ReplicaSource;

/// Rows of the large table: without limits one statement takes some 200,000 instructions.
const ROWS: usize = 20_000;
/// Units of a step, and of instructions what a step may come to.
const STEP: u64 = 300;
const MOST: u64 = 60_000;

fn table(id: u32, name: &str, columns: [&str; 3], indexes: &[usize]) -> Arc<TableSpec> {
    let column = |name: &str| ColumnSpec {
        name: name.into(),
        value_type: if name == "name" { ValueType::String } else { ValueType::Number },
        nullable: name != "id",
        upstream_type: if name == "name" { "text" } else { "int4" }.into(),
    };
    Arc::new(TableSpec {
        id: TableId(id),
        name: name.into(),
        columns: columns.map(column).into(),
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: vec![UniqueKey { columns: vec![0], not_null: true }],
        min_row_version: StateVersion::zero(),
        indexes: indexes.iter().map(|&c| vec![c]).collect(),
    })
}

fn number(n: usize) -> Value {
    Value::Number(n as f64)
}

struct World {
    engine: Engine,
    source: ReplicaSource,
    writer: rusqlite::Connection,
    schema: Arc<Schema>,
    db: Database,
    worst: u64,
    steps: u64,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let (p, c) =
            (table(0, "p", ["id", "k", "name"], &[1]), table(1, "c", ["id", "k", "n"], &[1]));
        let version = StateVersion::from_lsn(1);
        let mut db = Database::default();
        for n in 0..ROWS {
            // Those that are wanted are the last ones.
            let name = if n + 5 > ROWS { "a needle" } else { "hay" };
            let row = [number(n), number(n / (ROWS - 10)), Value::string(name)];
            db.put(&p, Row::new(version.clone(), row));
        }
        let tables = [p, c].map(|t| (t.name.clone(), t));
        let schema = Arc::new(Schema { tables: tables.into(), ..Schema::default() });
        let dir = tempfile::tempdir().unwrap();
        let (source, writer) = replica(&dir, &schema, &db, &version);
        let config = EngineConfig { rehydrate_above: usize::MAX, ..EngineConfig::default() };
        let engine = Engine::new(config, version, schema.clone());
        World { engine, source, writer, schema, db, worst: 0, steps: 0, _dir: dir }
    }

    fn step<T>(
        &mut self,
        run: impl FnOnce(&mut Engine, &mut ReplicaSource, &mut Budget) -> T,
    ) -> T {
        let before = self.source.instructions();
        let result = run(&mut self.engine, &mut self.source, &mut Budget::units(STEP));
        let instructions = self.source.instructions() - before;
        self.worst = self.worst.max(instructions);
        self.steps += 1;
        assert!(instructions <= MOST, "{instructions} instructions in step {}", self.steps);
        result
    }

    fn subscribe(&mut self, query: &Json) -> InstanceId {
        let ast = serde_json::from_value(query.clone()).unwrap();
        let (plan, params) = compile(&ast, &self.schema, &IdentityKeys::default()).unwrap();
        let id = self.engine.subscribe(&Arc::new(plan), params.into()).unwrap();
        while self.step(|e, s, b| e.hydrate_step(id, s, b)).unwrap() != Progress::Done {}
        self.check(id, query);
        id
    }

    fn check(&self, id: InstanceId, query: &Json) {
        let ast = serde_json::from_value(query.clone()).unwrap();
        let (plan, params) = compile(&ast, &self.schema, &IdentityKeys::default()).unwrap();
        let rows = self.engine.rows(id).unwrap();
        let mut have: Vec<RowId> = rows.map(|h| RowId::of(h.table, h.row)).collect();
        have.sort();
        assert!(have.iter().eq(brute::sync(&plan, &params, &self.db).keys()));
    }

    /// Adds a row to `c`, whose `k` leads to nearly all rows of `p`.
    fn child(&mut self) -> Arc<Commit> {
        let version = StateVersion::from_lsn(2);
        let row = Row::new(version.clone(), [number(0), number(0), number(0)]);
        let table = self.schema.tables["c"].clone();
        self.db.put(&table, row.clone());
        self.writer
            .execute_batch(&format!(
                r#"BEGIN; INSERT INTO c VALUES (0, 0, 0, '{version}');
                   UPDATE "_zero.replicationState" SET stateVersion = '{version}'; COMMIT"#
            ))
            .unwrap();
        self.source.refresh().unwrap();
        assert_eq!(*self.source.version(), version);
        let rows = vec![RowChange { old: None, new: Some(row) }];
        Arc::new(Commit {
            previous: StateVersion::from_lsn(1),
            version,
            tables: vec![TableChange { table, rows, truncated: false }],
            schema: None,
            upstream_commit_ms: 0.0,
            permissions_changed: false,
        })
    }
}

fn needles() -> Json {
    json!({"type": "simple", "op": "LIKE", "left": {"type": "column", "name": "name"},
        "right": {"type": "literal", "value": "%needle"}})
}

#[test]
fn a_scan_for_a_few_rows_is_read_in_steps() {
    let mut world = World::new();
    world.subscribe(&json!({"table": "p", "where": needles()}));
    assert!(world.source.interrupted() > 0);
    println!("{} steps, at most {} instructions", world.steps, world.worst);
}

#[test]
fn a_window_that_is_hard_to_fill_is_read_in_steps() {
    let mut world = World::new();
    world.subscribe(&json!({"table": "p", "where": needles(), "limit": 3,
        "orderBy": [["id", "asc"]]}));
    assert!(world.source.interrupted() > 0);
    println!("{} steps, at most {} instructions", world.steps, world.worst);
}

#[test]
fn a_search_for_the_parents_of_one_key_is_made_in_steps() {
    let mut world = World::new();
    let query = json!({"table": "p", "where": {"type": "correlatedSubquery", "op": "EXISTS",
        "related": {"correlation": {"parentField": ["k"], "childField": ["k"]},
            "subquery": {"table": "c", "alias": "c"}}}});
    let id = world.subscribe(&query);
    let before = world.source.interrupted();
    let commit = world.child();
    world.engine.begin_advance(&[commit]).unwrap();
    let advanced = loop {
        if let Some(advanced) = world.step(|e, s, b| e.advance_step(s, b)).unwrap() {
            break advanced;
        }
    };
    // And the child.
    assert_eq!(advanced.deltas[0].rows.len(), ROWS - 10 + 1);
    assert!(world.source.interrupted() > before);
    world.check(id, &query);
    println!("{} steps, at most {} instructions", world.steps, world.worst);
}
