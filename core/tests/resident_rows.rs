//! What a row costs that a query holds, beyond its values: counted by an allocator, in a binary of
//! its own. "Its values" are the bytes that they would be written with: 8 of a number, 1 of a
//! boolean, those of a text. docs/engine.md has the breakdown.

#![allow(clippy::unwrap_used, clippy::panic)]

mod counting;

use std::sync::Arc;

use counting::live;
use serde_json::{Value as Json, json};
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, Progress};
use zeroring_core::ivm::source::{Fetch, Filter, Source, SourceError};
use zeroring_core::json::row::wire_json;
use zeroring_core::row::{Row, RowRef};
use zeroring_core::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::compile::{IdentityKeys, compile};

/// Bytes that a resident row may cost beyond its values.
const ALLOWED: usize = 64;

/// (name, type) of the table's columns.
const COLUMNS: [(&str, ValueType); 5] = [
    ("id", ValueType::String),
    ("project", ValueType::Number),
    ("rank", ValueType::Number),
    ("open", ValueType::Boolean),
    ("title", ValueType::String),
];

fn table() -> Arc<TableSpec> {
    let columns = COLUMNS.iter().map(|&(name, value_type)| ColumnSpec {
        name: name.into(),
        value_type,
        nullable: false,
        upstream_type: "x".into(),
    });
    Arc::new(TableSpec {
        id: TableId(0),
        name: "item".into(),
        columns: columns.collect(),
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: vec![UniqueKey { columns: vec![0], not_null: true }],
        min_row_version: StateVersion::zero(),
        indexes: vec![vec![0]],
    })
}

fn values(n: usize) -> [Value; 5] {
    [
        Value::string(format!("item-{n:08}")),
        Value::Number((n / 10) as f64),
        Value::Number(n as f64),
        Value::Bool(n.is_multiple_of(3)),
        Value::string(format!("The {n}th of all items, with a title of usual length")),
    ]
}

/// A source that makes rows when they are asked for, in the order of the key, and owns none.
struct Made {
    version: StateVersion,
    rows: usize,
}

impl Source for Made {
    fn version(&self) -> &StateVersion {
        &self.version
    }

    fn fetch(
        &mut self,
        f: &Fetch<'_>,
        visit: &mut dyn FnMut(RowRef) -> std::ops::ControlFlow<()>,
    ) -> Result<(), SourceError> {
        assert!(f.filter == Filter::Whole && f.before.is_none());
        let from = match f.from.map(|b| &b.position[0]) {
            Some(Value::String(id)) => id[5..].parse().unwrap(),
            _ => 0,
        };
        let mut left = f.limit.unwrap_or(usize::MAX);
        for n in from..self.rows {
            let wanted = |k: &zeroring_core::ivm::source::Keys<'_>| {
                k.keys.iter().any(|key| key[0] == Value::Number((n / 10) as f64))
            };
            if f.keys.is_none_or(|k| wanted(&k)) && left > 0 {
                left -= 1;
                if visit(Row::new(self.version.clone(), values(n))).is_break() {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Bytes of the values of the first rows.
fn payload(rows: usize) -> usize {
    let bytes = |v: &Value| match v {
        Value::String(s) | Value::Json(s) => s.len(),
        Value::Number(_) | Value::UnsafeInt(_) => 8,
        Value::Bool(_) => 1,
        Value::Null => 0,
    };
    (0..rows).flat_map(values).map(|v| bytes(&v)).sum()
}

/// What an instance of a query over so many rows costs per row: slots and heads of the values, and
/// everything else.
struct Cost {
    values: f64,
    overhead: f64,
    json: f64,
    /// All bytes of the instance.
    held: f64,
}

fn cost(query: &Json, available: usize, at_least: usize) -> Cost {
    let spec = table();
    let schema = Schema { tables: [("item".into(), spec)].into(), ..Schema::default() };
    let version = StateVersion::from_lsn(22_020_400);
    let mut engine =
        Engine::new(EngineConfig::default(), version.clone(), Arc::new(schema.clone()));
    let mut source = Made { version, rows: available };
    let ast = serde_json::from_value(query.clone()).unwrap();
    let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
    let before = live();
    let id = engine.subscribe(&Arc::new(plan), params.into()).unwrap();
    // In slices, as an executor does it.
    loop {
        match engine.hydrate_step(id, &mut source, &mut Budget::units(1_000)).unwrap() {
            Progress::Done => break,
            more => assert_eq!(more, Progress::More),
        }
    }
    let resident = engine.stats().resident_rows;
    assert!((at_least..=at_least * 2).contains(&resident));
    let held = live() - before;
    // What the values themselves are, in the form that rows keep them in.
    let before = live();
    let rows: Vec<Vec<Value>> = (0..resident).map(|n| values(n).into()).collect();
    let vectors = rows.capacity() * size_of::<Vec<Value>>();
    let slots_and_text = live() - before - vectors;
    drop(rows);
    let before = live();
    let mut json = 0;
    for row in engine.rows(id).unwrap() {
        json += wire_json(row.table, row.row).unwrap().len();
    }
    let made = live() - before;
    let shown = engine.rows(id).unwrap().count() as f64;
    let per = |bytes: usize| bytes as f64 / resident as f64;
    Cost {
        values: per(slots_and_text) - per(payload(resident)),
        overhead: per(held) - per(slots_and_text),
        json: (made - json) as f64 / shown,
        held: held as f64,
    }
}

// One test: the count is of the whole process.
#[test]
fn a_resident_row_costs_little_beyond_its_values() {
    let all = json!({"table": "item"});
    let window = json!({"table": "item", "limit": 8_000});
    let nested = json!({"table": "item", "related": [{
        "correlation": {"parentField": ["project"], "childField": ["project"]},
        "subquery": {"table": "item", "alias": "all"}}]});
    // Sizes at which hash tables have just grown, and others.
    for rows in [2_000, 10_000, 14_400, 33_000, 100_000, 180_000] {
        let Cost { values, overhead, json, .. } = cost(&all, rows, rows);
        println!(
            "{rows} rows: {overhead:.1} + {values:.1} bytes beyond the values, {json:.1} JSON"
        );
        assert!(overhead <= ALLOWED as f64, "{overhead} bytes with {rows} rows");
        // A count and a length, beside the JSON itself.
        assert!(json <= 8.0, "{json} bytes of JSON");
        // Tag and padding of a slot, count and length of a text.
        assert!(values <= 80.0, "{values} bytes for five values");
    }
    let Cost { overhead, .. } = cost(&window, 100_000, 8_000);
    println!("a window of 8,000: {overhead:.1}");
    assert!(overhead <= ALLOWED as f64, "{overhead} bytes in a window");
    // Each row twice: in the root's partition, and in one of ten rows for its project.
    let (flat, twice) = (cost(&all, 20_000, 20_000), cost(&nested, 20_000, 40_000));
    let partition = (twice.held - flat.held) / 2_000.0;
    println!("a partition of ten rows: {partition:.0}");
    assert!(partition <= 640.0, "{partition} bytes for a partition of ten rows");
    let parked = parked(20_000);
    println!("a parked row: {parked:.0}");
    assert!(parked <= 200.0, "{parked} bytes for a parked row");
}

/// What is kept of a row of a query that gave its rows up.
fn parked(rows: usize) -> f64 {
    let schema = Schema { tables: [("item".into(), table())].into(), ..Schema::default() };
    let version = StateVersion::from_lsn(22_020_400);
    let config = EngineConfig { max_rows: 1, ..EngineConfig::default() };
    let mut engine = Engine::new(config, version.clone(), Arc::new(schema.clone()));
    let mut source = Made { version, rows };
    let mut hydrated = |query: Json| {
        let ast = serde_json::from_value(query).unwrap();
        let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
        let id = engine.subscribe(&Arc::new(plan), params.into()).unwrap();
        let mut budget = Budget::unlimited();
        engine.hydrate_step(id, &mut source, &mut budget).unwrap();
        engine.is_parked(id)
    };
    let before = live();
    assert!(!hydrated(json!({"table": "item"})), "what alone is too much is held all the same");
    // A second one needs room.
    hydrated(json!({"table": "item", "limit": 1}));
    assert_eq!(engine.stats().parked, 1);
    engine.sweep(&mut Budget::unlimited());
    (live() - before) as f64 / rows as f64
}
