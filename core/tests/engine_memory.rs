//! An engine from which everybody unsubscribed is as small as a new one: counted by an allocator,
//! in a binary of its own.

#![allow(clippy::unwrap_used, clippy::panic)]

mod counting;

use std::sync::Arc;

use counting::live;
use serde_json::json;
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, InstanceId, Progress};
use zeroring_core::ivm::memory_source::{Database, MemorySource};
use zeroring_core::ivm::plan::{Param, Plan};
use zeroring_core::row::Row;
use zeroring_core::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::compile::{IdentityKeys, compile};

/// What an engine may keep after its last instance is gone: capacity of small tables.
const KEPT_BYTES: usize = 64 << 10;

fn table(id: u32, name: &str) -> Arc<TableSpec> {
    let column = |name: &str| ColumnSpec {
        name: name.into(),
        value_type: ValueType::Number,
        nullable: name != "id",
        upstream_type: "int4".into(),
    };
    Arc::new(TableSpec {
        id: TableId(id),
        name: name.into(),
        columns: ["id", "k", "n"].map(column).into(),
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: vec![UniqueKey { columns: vec![0], not_null: true }],
        min_row_version: StateVersion::zero(),
        indexes: vec![vec![0]],
    })
}

/// Two tables of a few rows, and an engine at their version.
fn world() -> (Engine, MemorySource, Arc<Schema>) {
    let version = StateVersion::from_lsn(1);
    let mut schema = Schema::default();
    let mut db = Database::default();
    for (id, name) in [(0, "a"), (1, "b")] {
        let spec = table(id, name);
        for i in 0..6 {
            let values = [i, i % 4, i % 3].map(|v| Value::Number(f64::from(v)));
            db.put(&spec, Row::new(version.clone(), values));
        }
        schema.tables.insert(name.into(), spec);
    }
    let schema = Arc::new(schema);
    let engine = Engine::new(EngineConfig::default(), version.clone(), schema.clone());
    (engine, MemorySource::new(db, version), schema)
}

type Query = (Arc<Plan>, Arc<[Param]>);

fn hydrate(engine: &mut Engine, source: &mut MemorySource, query: &Query) -> InstanceId {
    let id = engine.subscribe(&query.0, query.1.clone()).unwrap();
    let mut budget = Budget::unlimited();
    assert_eq!(engine.hydrate_step(id, source, &mut budget).unwrap(), Progress::Done);
    id
}

fn compiled(schema: &Schema, query: serde_json::Value) -> (Plan, Vec<Param>) {
    let ast = serde_json::from_value(query).unwrap();
    compile(&ast, schema, &IdentityKeys::default()).unwrap()
}

/// In which order instances are dropped.
#[derive(Debug, Clone, Copy)]
enum Order {
    OldestFirst,
    NewestFirst,
    /// All over the place: a step that has no factor in common with the number of instances.
    Mixed,
}

impl Order {
    const ALL: [Order; 3] = [Order::OldestFirst, Order::NewestFirst, Order::Mixed];

    fn of(self, ids: &[InstanceId]) -> Vec<InstanceId> {
        let n = ids.len();
        let place = |i: usize| match self {
            Order::OldestFirst => i,
            Order::NewestFirst => n - 1 - i,
            Order::Mixed => i * 7_919 % n,
        };
        (0..n).map(|i| ids[place(i)]).collect()
    }
}

/// `n` instances at a time, hydrated and dropped; the engine's growth in bytes afterwards.
fn growth(n: usize, orders: &[Order], query: &dyn Fn(&Schema, usize) -> Query) -> isize {
    let (mut engine, mut source, schema) = world();
    let before = live();
    let mut peak = 0;
    for round in orders {
        let ids: Vec<InstanceId> =
            (0..n).map(|i| hydrate(&mut engine, &mut source, &query(&schema, i))).collect();
        assert_eq!(engine.stats().instances, n, "{round:?}");
        assert!(engine.stats().resident_rows > 0);
        peak = live() - before;
        round.of(&ids).into_iter().for_each(|id| engine.unsubscribe(id));
        drop(ids);
        engine.sweep(&mut Budget::unlimited());
        let s = engine.stats();
        let left = [s.plans, s.instances, s.subscriptions, s.partitions, s.resident_rows, s.routes];
        assert_eq!(left, [0; 6], "{round:?}: {s:?}");
    }
    let grown = live() as isize - before as isize;
    // The source shared its rows with the engine.
    drop(source);
    engine.sweep(&mut Budget::unlimited());
    assert_eq!(engine.stats().interned_rows, 0);
    println!("{n} instances: {peak} bytes, {} each; {grown} bytes stay", peak / n);
    grown
}

// One test: the count is of the whole process.
#[test]
fn instances_that_are_gone_leave_nothing_behind() {
    let one_plan = |schema: &Schema| {
        compiled(
            schema,
            json!({"table": "a", "limit": 3, "orderBy": [["n", "desc"]],
                "where": {"type": "and", "conditions": [
                    {"type": "simple", "op": "!=", "left": {"type": "column", "name": "k"},
                        "right": {"type": "literal", "value": 0}},
                    {"type": "correlatedSubquery", "op": "EXISTS", "related": {
                        "correlation": {"parentField": ["k"], "childField": ["id"]},
                        "subquery": {"table": "b", "alias": "e"}}}]},
                "related": [{"correlation": {"parentField": ["id"], "childField": ["k"]},
                    "subquery": {"table": "b", "alias": "r", "limit": 1}}]}),
        )
    };
    let plan = std::cell::OnceCell::new();
    // One plan, 100,000 parameters: all share the groups and routes of the parts without.
    let of_one_plan = |schema: &Schema, i: usize| {
        let (plan, params) = plan.get_or_init(|| {
            let (plan, params) = one_plan(schema);
            (Arc::new(plan), params)
        });
        let mut params = params.clone();
        params[0] = Param::Value(Value::Number(i as f64));
        (plan.clone(), params.into())
    };
    for (n, orders) in [(100_000, &[Order::Mixed][..]), (10_000, &Order::ALL)] {
        let grown = growth(n, orders, &of_one_plan);
        assert!(grown < KEPT_BYTES as isize, "{grown} bytes stay");
    }
    // A plan for each instance: limits are part of the plan.
    let grown = growth(5_000, &Order::ALL, &|schema, i| {
        let (mut plan, params) = one_plan(schema);
        plan.nodes[0].limit = Some(1 + i as u64);
        (Arc::new(plan), params.into())
    });
    assert!(grown < KEPT_BYTES as isize, "{grown} bytes stay");
}
