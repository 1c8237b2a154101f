//! SQL and predicate are the same function: every fetch of a random plan answers the same over
//! SQLite as over plain vectors, whatever the declared types' affinities.
//!
//! `ZR_SEEDS=from..to` runs other seeds than the default ones.

#![allow(clippy::unwrap_used, clippy::panic)]

mod sqlite_world;

use std::ops::ControlFlow;
use std::sync::Arc;

use rusqlite::{Connection, StatementStatus};
use zeroring_core::ivm::brute;
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, InstanceId, Progress};
use zeroring_core::ivm::memory_source::{Database, MemorySource};
use zeroring_core::ivm::plan::{Condition, NodeId, Plan};
use zeroring_core::ivm::source::{Bound, Fetch, Filter, Keys, Source, SourceError};
use zeroring_core::row::{Key, Row, RowRef};
use zeroring_core::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::ast::Ast;
use zeroring_core::zql::compile::{IdentityKeys, MAX_DEPTH, compile};
use zeroring_core::zql::gen_world::{self, Choices, Shape};
use zeroring_storage::replica::estimate::{ExistsSide, Statistics};
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader};
use zeroring_storage::replica::scans::{LARGE_SCAN_ROWS, MissingIndex};
use zeroring_storage::replica::source::ReplicaSource;
use zeroring_storage::replica::sql::{Select, compile as compile_sql};

/// A replica file with the rows of `db`.
fn replica(dir: &tempfile::TempDir, schema: &Schema, db: &Database) -> ReplicaSource {
    sqlite_world::replica(dir, schema, db, &StateVersion::from_lsn(1)).0
}

fn collect(source: &mut dyn Source, fetch: &Fetch<'_>) -> Result<Vec<RowRef>, SourceError> {
    let mut rows = Vec::new();
    source.fetch(fetch, &mut |r| {
        rows.push(r);
        ControlFlow::Continue(())
    })?;
    Ok(rows)
}

/// Rows as comparable text; sorted unless the order counts.
fn shown(rows: &[RowRef], ordered: bool) -> Vec<String> {
    let mut all: Vec<String> =
        rows.iter().map(|r| format!("{} {:?}", r.version, normal(&r.values))).collect();
    if !ordered {
        all.sort();
    }
    all
}

/// -0 and 0 are one value.
fn normal(values: &[Value]) -> Vec<Value> {
    values
        .iter()
        .map(|v| match v {
            Value::Number(0.0) => Value::Number(0.0),
            v => v.clone(),
        })
        .collect()
}

fn seeds(default: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let text = std::env::var("ZR_SEEDS").unwrap_or_default();
    let mut parts = text.split("..").map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(from)), Some(Ok(to))) => from..to,
        _ => default,
    }
}

/// A random fetch of a node.
struct Wanted {
    node: NodeId,
    columns: Vec<usize>,
    keys: Option<Vec<Key>>,
    filter: Filter,
    from: Option<(Key, bool)>,
    before: Option<Key>,
    limit: Option<usize>,
    ordered: bool,
}

impl Wanted {
    fn random(c: &mut Choices, plan: &Plan, shape: &Shape) -> Wanted {
        let node = NodeId(c.below(plan.nodes.len()) as u16);
        let n = plan.node(node);
        let value = |c: &mut Choices, column: usize| {
            let spec = &n.table.columns[column];
            if column < 2 && spec.value_type == ValueType::Number {
                Value::Number(c.below(shape.rows) as f64)
            } else if column < 2 {
                Value::string(format!("k{}", c.below(shape.rows)))
            } else {
                gen_world::value(c, spec)
            }
        };
        let position = |c: &mut Choices| -> Key { n.order.iter().map(|o| value(c, o.0)).collect() };
        let mut columns: Vec<usize> = Vec::new();
        for _ in 0..1 + c.below(2) {
            let column = c.below(n.table.columns.len());
            if n.table.columns[column].value_type != ValueType::Json && !columns.contains(&column) {
                columns.push(column);
            }
        }
        let keys = (c.chance(50) && !columns.is_empty()).then(|| {
            let mut keys: Vec<Key> = (0..c.below(5))
                .map(|_| columns.iter().map(|&k| value(c, k)).collect::<Key>())
                .filter(|k| !k.iter().any(Value::is_null))
                .collect();
            keys.sort();
            keys.dedup();
            keys
        });
        Wanted {
            node,
            columns,
            keys,
            filter: c.pick(&[Filter::Whole, Filter::Whole, Filter::Weak, Filter::Any]),
            from: c.chance(30).then(|| (position(c), c.chance(50))),
            before: c.chance(30).then(|| position(c)),
            limit: c.chance(30).then(|| c.below(4)),
            ordered: c.chance(50),
        }
    }

    fn fetch<'a>(
        &'a self,
        plan: &'a Plan,
        params: &'a [zeroring_core::ivm::plan::Param],
    ) -> Fetch<'a> {
        Fetch {
            plan,
            node: self.node,
            params,
            keys: self.keys.as_ref().map(|keys| Keys { columns: &self.columns, keys }),
            filter: self.filter,
            from: self
                .from
                .as_ref()
                .map(|(p, inclusive)| Bound { position: p, inclusive: *inclusive }),
            before: self.before.as_deref(),
            limit: self.limit,
            ordered: self.ordered,
        }
    }
}

#[test]
fn random_fetches_answer_the_same_over_sqlite_and_over_vectors() {
    let (mut fetches, mut nonempty) = (0u32, 0u32);
    for seed in seeds(0..300) {
        let mut c = Choices::new(seed);
        let shape = Shape::default();
        let schema = gen_world::schema(&mut c, &shape);
        let version = StateVersion::from_lsn(1);
        let db = gen_world::database(&mut c, &schema, &shape, &version);
        let dir = tempfile::tempdir().unwrap();
        let mut sqlite = replica(&dir, &schema, &db);
        assert_eq!(sqlite.version(), &version);
        let mut memory = MemorySource::new(db, version);
        for _ in 0..12 {
            let ast = gen_world::ast(&mut c, &schema, &shape);
            let keys = gen_world::identity_keys(&mut c, &schema);
            let (plan, params) = compile(&ast, &schema, &keys).unwrap();
            for _ in 0..6 {
                let wanted = Wanted::random(&mut c, &plan, &shape);
                let fetch = wanted.fetch(&plan, &params);
                let ordered = fetch.ordered || fetch.limit.is_some();
                let context =
                    || format!("seed {seed}\n{fetch:#?}\n{}", serde_json::to_string(&ast).unwrap());
                let want = shown(&collect(&mut memory, &fetch).unwrap(), ordered);
                for side in [ExistsSide::Parent, ExistsSide::Child] {
                    sqlite.always_begin_with(side);
                    let got = collect(&mut sqlite, &fetch)
                        .unwrap_or_else(|e| panic!("{e} {}", context()));
                    assert_eq!(shown(&got, ordered), want, "{side:?} {}", context());
                }
                assert_eq!(sqlite.exists(&fetch).unwrap(), !want.is_empty(), "{}", context());
                fetches += 1;
                nonempty += u32::from(!want.is_empty());
            }
        }
    }
    assert!(nonempty * 4 > fetches, "{nonempty} of {fetches} fetches had rows");
}

fn table(columns: &[(&str, ValueType, &str)], rows: Vec<Vec<Value>>) -> (Schema, Database) {
    let spec = Arc::new(TableSpec {
        id: TableId(0),
        name: "t".into(),
        columns: columns
            .iter()
            .map(|(name, value_type, upstream)| ColumnSpec {
                name: (*name).into(),
                value_type: *value_type,
                nullable: true,
                upstream_type: (*upstream).into(),
            })
            .collect(),
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: vec![UniqueKey { columns: vec![0], not_null: true }],
        min_row_version: StateVersion::zero(),
        indexes: vec![],
    });
    let mut db = Database::default();
    for values in rows {
        db.put(&spec, Row::new(StateVersion::from_lsn(1), values));
    }
    let mut schema = Schema::default();
    schema.tables.insert("t".into(), spec);
    (schema, db)
}

fn whole<'a>(plan: &'a Plan, params: &'a [zeroring_core::ivm::plan::Param]) -> Fetch<'a> {
    Fetch {
        plan,
        node: Plan::ROOT,
        params,
        keys: None,
        filter: Filter::Whole,
        from: None,
        before: None,
        limit: None,
        ordered: true,
    }
}

/// The ids that `t where condition` yields over SQLite; checked against vectors.
fn ids(
    sqlite: &mut ReplicaSource,
    schema: &Schema,
    db: &Database,
    ast: serde_json::Value,
) -> Result<Vec<String>, SourceError> {
    let ast: Ast = serde_json::from_value(ast).unwrap();
    let (plan, params) = compile(&ast, schema, &IdentityKeys::default()).unwrap();
    let rows = collect(sqlite, &whole(&plan, &params))?;
    let want = brute::rows(&plan, Plan::ROOT, &params, db, None);
    assert_eq!(shown(&rows, true), shown(&want, true), "{ast:?}");
    Ok(rows.iter().map(|r| format!("{:?}", r.values[0])).collect())
}

fn cond(op: &str, value: serde_json::Value) -> serde_json::Value {
    serde_json::json!({"table":"t","where":{"type":"simple","op":op,
        "left":{"type":"column","name":"v"},"right":{"type":"literal","value":value}}})
}

#[test]
fn text_in_columns_with_numeric_affinity_stays_text() {
    let texts = ["10", "9", "x", "2"];
    let rows: Vec<Vec<Value>> = texts
        .iter()
        .enumerate()
        .map(|(i, t)| vec![Value::Number(i as f64), Value::string(t)])
        .collect();
    for upstream in ["upc", "point_kind"] {
        let (schema, db) = table(
            &[("id", ValueType::Number, "int4"), ("v", ValueType::String, upstream)],
            rows.clone(),
        );
        let dir = tempfile::tempdir().unwrap();
        let mut sqlite = replica(&dir, &schema, &db);
        let mut count = |op: &str, v: serde_json::Value| {
            ids(&mut sqlite, &schema, &db, cond(op, v)).unwrap().len()
        };
        assert_eq!(count("=", "10".into()), 1);
        assert_eq!(count("=", "10.0".into()), 0, "equal as numbers, not as texts");
        assert_eq!(count("=", "1e1".into()), 0);
        assert_eq!(count("<", "2".into()), 1, "by bytes: only \"10\"");
        assert_eq!(count("IN", serde_json::json!(["010", "9", "x"])), 2);
        assert_eq!(count("NOT IN", serde_json::json!(["010", "9"])), 3);
        assert_eq!(count("LIKE", "1%".into()), 1);
        assert_eq!(count("IS NOT", "9.0".into()), 4);
    }
}

#[test]
fn an_unsafe_integer_fails_only_the_fetch_that_delivers_it() {
    let max = Value::MAX_SAFE_INTEGER;
    let (schema, db) = table(
        &[("id", ValueType::Number, "int4"), ("v", ValueType::Number, "int8")],
        vec![
            vec![Value::Number(1.0), Value::from_i64(max)],
            vec![Value::Number(2.0), Value::from_i64(max + 1)],
        ],
    );
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = replica(&dir, &schema, &db);
    let safe = ids(&mut sqlite, &schema, &db, cond("<=", max.into())).unwrap();
    assert_eq!(safe.len(), 1);
    let error = ids(&mut sqlite, &schema, &db, cond(">", 0.into())).unwrap_err();
    assert_eq!(error.to_string(), "value 9007199254740992 (in t.v) is outside of supported bounds");
    let (plan, params) = compile(&Ast::table("t"), &schema, &IdentityKeys::default()).unwrap();
    let weak = Fetch { filter: Filter::Weak, ..whole(&plan, &params) };
    assert_eq!(collect(&mut sqlite, &weak).unwrap().len(), 2, "candidates are judged first");
}

#[test]
fn long_lists_many_conditions_and_deep_nesting_are_one_statement() {
    let rows = (0..50).map(|i| vec![Value::Number(f64::from(i)), Value::Number(f64::from(i % 7))]);
    let (schema, db) = table(
        &[("id", ValueType::Number, "int4"), ("v", ValueType::Number, "float8")],
        rows.collect(),
    );
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = replica(&dir, &schema, &db);
    let list: Vec<i32> = (0..90_000).map(|i| i * 2).collect();
    let found = ids(&mut sqlite, &schema, &db, cond("IN", serde_json::json!(list))).unwrap();
    assert_eq!(found.len(), 50 * 4 / 7 + 1);
    let any: Vec<serde_json::Value> =
        (0..1_900).map(|i| cond("=", i.into())["where"].clone()).collect();
    let wide = serde_json::json!({"table":"t","where":{"type":"or","conditions":any}});
    assert_eq!(ids(&mut sqlite, &schema, &db, wide).unwrap().len(), 50);
    let mut deep = serde_json::json!({"table":"t"});
    for _ in 0..MAX_DEPTH {
        deep = serde_json::json!({"table":"t","where":{"type":"and","conditions":[
            cond(">=", 0.into())["where"],
            {"type":"correlatedSubquery","op":"EXISTS","related":{
                "correlation":{"parentField":["id"],"childField":["id"]},"subquery":deep}}]}});
    }
    let ast: Ast = serde_json::from_value(deep).unwrap();
    let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
    assert_eq!(plan.nodes.len(), MAX_DEPTH + 1);
    assert!(matches!(plan.nodes[0].condition, Condition::And(_)));
    assert_eq!(collect(&mut sqlite, &whole(&plan, &params)).unwrap().len(), 50);
}

#[test]
fn more_compound_keys_than_one_statement_takes_are_read_in_parts() {
    let rows =
        (0..9_000).map(|i| vec![Value::Number(f64::from(i)), Value::Number(f64::from(i % 7))]);
    let (schema, db) = table(
        &[("id", ValueType::Number, "int4"), ("v", ValueType::Number, "int4")],
        rows.collect(),
    );
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = replica(&dir, &schema, &db);
    let ast: Ast =
        serde_json::from_value(serde_json::json!({"table":"t","orderBy":[["v","desc"]]})).unwrap();
    let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
    let keys: Vec<Key> = (0..9_000)
        .map(|i| {
            [Value::Number(f64::from(i)), Value::Number(f64::from(i % 7))].into_iter().collect()
        })
        .collect();
    let fetch = Fetch {
        keys: Some(Keys { columns: &[0, 1], keys: &keys }),
        limit: Some(8_000),
        ..whole(&plan, &params)
    };
    let got = collect(&mut sqlite, &fetch).unwrap();
    let want = brute::rows(&plan, Plan::ROOT, &params, &db, None);
    assert_eq!(shown(&got, true), shown(&want[..8_000], true));
    assert!(sqlite.exists(&fetch).unwrap());
}

#[test]
fn without_a_snapshot_nothing_is_read() {
    let (schema, db) =
        table(&[("id", ValueType::Number, "int4"), ("v", ValueType::Json, "json")], vec![]);
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = replica(&dir, &schema, &db);
    sqlite.release().unwrap();
    let (plan, params) = compile(&Ast::table("t"), &schema, &IdentityKeys::default()).unwrap();
    assert!(collect(&mut sqlite, &whole(&plan, &params)).is_err());
}

/// EXPLAIN QUERY PLAN of a query's root fetch.
fn explained(sqlite: &ReplicaSource, schema: &Schema, ast: serde_json::Value) -> String {
    let ast: Ast = serde_json::from_value(ast).unwrap();
    let (plan, params) = compile(&ast, schema, &IdentityKeys::default()).unwrap();
    let limit = plan.nodes[0].limit.map(|l| l as usize);
    let fetch = Fetch { limit, ..whole(&plan, &params) };
    let connection = sqlite.reader().connection();
    let statistics = Statistics::read(connection);
    let side = ExistsSide::Cheaper(&statistics);
    let sql = compile_sql(&fetch, None, Select::Rows, side).unwrap();
    let mut explain = connection.prepare(&format!("EXPLAIN QUERY PLAN {}", sql.text)).unwrap();
    let holes = vec![rusqlite::types::Null; explain.parameter_count()];
    let lines = explain
        .query_map(rusqlite::params_from_iter(holes), |r| r.get::<_, String>(3))
        .unwrap()
        .map(Result::unwrap);
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn what_an_index_can_serve_is_not_scanned() {
    let (schema, db) = {
        let (mut schema, db) = table(
            &[
                ("id", ValueType::String, "uuid"),
                ("v", ValueType::Number, "int4"),
                ("s", ValueType::String, "text"),
            ],
            vec![],
        );
        let mut spec = TableSpec::clone(schema.table("t").unwrap());
        spec.columns[0].nullable = false;
        spec.indexes = vec![vec![0], vec![1, 2, 0], vec![2]];
        schema.tables.insert("t".into(), Arc::new(spec));
        (schema, db)
    };
    let dir = tempfile::tempdir().unwrap();
    let sqlite = replica(&dir, &schema, &db);
    let cond = |column: &str, op: &str, value: serde_json::Value| {
        serde_json::json!({"type":"simple","op":op,"left":{"type":"column","name":column},
            "right":{"type":"literal","value":value}})
    };
    let exists = serde_json::json!({"type":"correlatedSubquery","op":"EXISTS","related":{
        "correlation":{"parentField":["id"],"childField":["s"]},
        "subquery":{"table":"t","where":cond("v", ">", 3.into())}}});
    for (what, ast) in [
        ("equality", serde_json::json!({"where":cond("v", "=", 1.into())})),
        (
            "equality and order",
            serde_json::json!({"where":cond("v", "=", 1.into()),"orderBy":[["s","desc"],["id","desc"]],
                "limit":20}),
        ),
        ("a list", serde_json::json!({"where":cond("v", "IN", serde_json::json!([1, 2]))})),
        ("a prefix", serde_json::json!({"where":cond("s", "LIKE", "abc%".into())})),
        (
            "a cursor",
            serde_json::json!({"orderBy":[["id","asc"]],"limit":20,
                "start":{"row":{"id":"x"},"exclusive":true}}),
        ),
        (
            "a join",
            serde_json::json!({"where":{"type":"and","conditions":[cond("v", "=", 1.into()), exists]}}),
        ),
    ] {
        let mut ast = ast;
        ast["table"] = "t".into();
        let plan = explained(&sqlite, &schema, ast);
        assert!(!plan.contains("SCAN t"), "{what}: {plan}");
        assert!(what != "a join" || plan.contains("(s=?"), "{plan}");
        if what.contains("order") || what == "a cursor" {
            assert!(!plan.contains("TEMP B-TREE"), "{what}: {plan}");
        }
    }
}

/// An index on the child's column serves a join from either side, whatever the affinities of the
/// two columns make of a text that looks like a number; and the join stays one of texts.
#[test]
fn an_index_serves_joins_of_text_columns_with_any_affinity() {
    let texts = ["10", "010", "1e1", "10.0", "9", " 9", "x", "", "0x10", "9223372036854775808"];
    let rows: Vec<Vec<Value>> = texts
        .iter()
        .flat_map(|a| texts.iter().map(move |b| (a, b)))
        .enumerate()
        .filter(|(i, _)| i % 3 != 2)
        .map(|(i, (a, b))| vec![Value::Number(i as f64), Value::string(a), Value::string(b)])
        .chain([vec![Value::Number(-1.0), Value::Null, Value::Null]])
        .collect();
    let types = ["text", "uuid", "upc", "isbn13", "point_kind", "varchar"];
    for (parent, child) in types.iter().flat_map(|p| types.iter().map(move |c| (*p, *c))) {
        let (mut schema, db) = table(
            &[
                ("id", ValueType::Number, "int4"),
                ("a", ValueType::String, parent),
                ("b", ValueType::String, child),
            ],
            rows.iter()
                .map(|r| {
                    // What these types never hold.
                    let text = |v: &Value, kind: &str| match v {
                        Value::String(s) if kind == "uuid" => Value::string(format!("{s}-f00d")),
                        other if kind != "text" && kind != "varchar" => canonical(other),
                        other => other.clone(),
                    };
                    vec![r[0].clone(), text(&r[1], parent), text(&r[2], child)]
                })
                .collect(),
        );
        let mut spec = TableSpec::clone(schema.table("t").unwrap());
        spec.indexes = vec![vec![2]];
        schema.tables.insert("t".into(), Arc::new(spec));
        let dir = tempfile::tempdir().unwrap();
        let mut sqlite = replica(&dir, &schema, &db);
        for op in ["EXISTS", "NOT EXISTS"] {
            let ast = serde_json::json!({"table":"t","where":{"type":"correlatedSubquery","op":op,
                "related":{"correlation":{"parentField":["a"],"childField":["b"]},
                "subquery":{"table":"t","alias":"t"}}}});
            ids(&mut sqlite, &schema, &db, ast.clone()).unwrap();
            let plan = explained(&sqlite, &schema, ast);
            assert!(plan.contains("(b=?)"), "{parent} joined with {child}: {plan}");
        }
    }
}

/// What a column of numeric affinity makes of a text: a number's text is its shortest.
fn canonical(v: &Value) -> Value {
    match v {
        Value::String(s) => match &*s.clone() {
            "010" | "1e1" | "10.0" => Value::string("10"),
            " 9" => Value::string("9"),
            "9223372036854775808" => Value::string("9223372036854776000"),
            _ => v.clone(),
        },
        _ => v.clone(),
    }
}

/// Rows enough that reading all of them is worth a report: (id, v, s), an index on `id` only.
fn large_table() -> (Schema, Database) {
    let rows = LARGE_SCAN_ROWS + 10;
    let row = |n: u64| {
        let (id, v) = (Value::Number(n as f64), Value::Number((n % 100) as f64));
        vec![id, v, Value::string(format!("s{}", n % 1_000))]
    };
    let columns = [
        ("id", ValueType::Number, "int4"),
        ("v", ValueType::Number, "int4"),
        ("s", ValueType::String, "text"),
    ];
    table(&columns, (0..rows).map(row).collect())
}

fn run(sqlite: &mut ReplicaSource, schema: &Schema, ast: serde_json::Value) -> usize {
    let ast: Ast = serde_json::from_value(ast).unwrap();
    let (plan, params) = compile(&ast, schema, &IdentityKeys::default()).unwrap();
    let limit = plan.nodes[0].limit.map(|l| l as usize);
    collect(sqlite, &Fetch { limit, ..whole(&plan, &params) }).unwrap().len()
}

#[test]
fn a_second_subscriber_of_an_instance_runs_no_statement() {
    let columns = [("id", ValueType::Number, "int4"), ("v", ValueType::Number, "int4")];
    let number = |n: u32| Value::Number(f64::from(n));
    let (schema, db) = table(&columns, (1..=50).map(|n| vec![number(n), number(n / 2)]).collect());
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = replica(&dir, &schema, &db);
    let mut engine =
        Engine::new(EngineConfig::default(), sqlite.version().clone(), Arc::new(schema.clone()));
    // Batches of keys, and a seek for each limited child.
    let below = |subquery: serde_json::Value| {
        serde_json::json!([{"correlation":{"parentField":["id"],"childField":["v"]},
            "subquery":subquery}])
    };
    let last = serde_json::json!({"table":"t","alias":"last","limit":1,
        "orderBy":[["id","desc"]]});
    let children = serde_json::json!({"table":"t","alias":"children","related":below(last)});
    let ast = serde_json::json!({"table":"t","limit":20,"related":below(children)});
    let mut subscribe = |engine: &mut Engine, v: u32| -> (InstanceId, u64) {
        let mut ast = ast.clone();
        ast["where"] = cond(">", v.into())["where"].clone();
        let ast: Ast = serde_json::from_value(ast).unwrap();
        let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
        let id = engine.subscribe(&Arc::new(plan), params.into()).unwrap();
        let before = sqlite.statements();
        while engine.hydrate_step(id, &mut sqlite, &mut Budget::units(10)).unwrap()
            == (Progress::More {})
        {}
        (id, sqlite.statements() - before)
    };
    let rows = |engine: &Engine, id: InstanceId| -> Vec<(Vec<Value>, u64)> {
        engine.rows(id).unwrap().map(|held| (held.row.values.to_vec(), held.count)).collect()
    };
    let (first, statements) = subscribe(&mut engine, 3);
    assert!(statements > 10, "{statements} statements");
    let (second, statements) = subscribe(&mut engine, 3);
    assert_eq!((second, statements), (first, 0));
    let whole = rows(&engine, second);
    assert!(whole.len() > 30, "{} rows", whole.len());
    // Also when the first has gone.
    engine.unsubscribe(first);
    let (third, statements) = subscribe(&mut engine, 3);
    assert_eq!(statements, 0);
    assert_eq!(rows(&engine, third), whole);
    // Other parameters are another instance; and nobody's rows are not kept.
    assert!(subscribe(&mut engine, 4).1 > 10);
    engine.unsubscribe(second);
    engine.unsubscribe(third);
    assert!(subscribe(&mut engine, 3).1 > 10, "read anew");
}

#[test]
fn a_large_scan_names_the_missing_index_once_per_statement() {
    let (schema, db) = large_table();
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = replica(&dir, &schema, &db);
    let missing = |sqlite: &mut ReplicaSource, ast: serde_json::Value| {
        run(sqlite, &schema, ast);
        let of = |m: &MissingIndex| format!("{}({})", m.table, m.columns.join(","));
        sqlite.take_missing_indexes().iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(missing(&mut sqlite, cond("=", 5.into())), ["t(v)"]);
    assert_eq!(sqlite.scans().large_scans, 1);
    assert_eq!(missing(&mut sqlite, cond("=", 6.into())), [""; 0], "the same statement");
    assert_eq!(sqlite.scans().large_scans, 2);
    // The second body is the one that is scanned: no `s` has this `v`.
    let exists = |field: &str, v: i32| {
        serde_json::json!({"type":"correlatedSubquery","op":"EXISTS","related":{
            "correlation":{"parentField":[field],"childField":[field]},
            "subquery":{"table":"t","where":cond("=", v.into())["where"]}}})
    };
    let either = serde_json::json!({"table":"t","where":{"type":"and","conditions":[
        {"type":"simple","op":"=","left":{"type":"column","name":"id"},
            "right":{"type":"literal","value":7}},
        {"type":"or","conditions":[exists("id", 8), exists("s", 8)]}]}});
    assert_eq!(missing(&mut sqlite, either), ["t(s,v)"]);
    // Everything is wanted: no index would help. Found by its key: nothing is scanned.
    assert_eq!(missing(&mut sqlite, serde_json::json!({"table":"t"})), [""; 0]);
    let by_key = serde_json::json!({"table":"t","limit":3,"orderBy":[["id","desc"]]});
    assert_eq!(missing(&mut sqlite, by_key), [""; 0]);
    let ordered = serde_json::json!({"table":"t","limit":3,"orderBy":[["v","desc"]]});
    assert_eq!(missing(&mut sqlite, ordered), ["t(v,id)"]);
    assert_eq!(sqlite.scans().missing_indexes, 3);
}

#[test]
fn a_query_beyond_the_limits_of_sqlite_fails_with_an_error_of_its_own() {
    let (schema, db) = table(
        &[("id", ValueType::Number, "int4"), ("v", ValueType::Number, "int4")],
        vec![vec![Value::Number(1.0), Value::Number(2.0)]],
    );
    let dir = tempfile::tempdir().unwrap();
    let mut sqlite = replica(&dir, &schema, &db);
    // As deep as plans may be in every dimension.
    let simple = |v: usize| cond("!=", v.into())["where"].clone();
    let mut condition = simple(0);
    for level in 0..MAX_DEPTH {
        for depth in 0..30 {
            let kind = if depth % 2 == 0 { "and" } else { "or" };
            condition = serde_json::json!({"type":kind,
                "conditions":[condition, simple(1), simple(2), simple(3)]});
        }
        if level + 1 < MAX_DEPTH {
            condition = serde_json::json!({"type":"correlatedSubquery","op":"EXISTS","related":{
                "correlation":{"parentField":["id"],"childField":["id"]},
                "subquery":{"table":"t","where":condition}}});
        }
    }
    let ast: Ast =
        serde_json::from_value(serde_json::json!({"table":"t","where":condition})).unwrap();
    let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
    let error = collect(&mut sqlite, &whole(&plan, &params)).unwrap_err();
    assert!(matches!(error, SourceError::TooComplex(_)), "{error}");
    assert!(error.to_string().contains("maximum depth 1000"), "{error}");
    assert!(!error.to_string().contains("SELECT"), "{error}");
    assert_eq!(ids(&mut sqlite, &schema, &db, cond("=", 2.into())).unwrap().len(), 1);
}

#[test]
fn few_children_with_an_index_to_their_parents_come_first() {
    let (mut schema, db) = large_table();
    let exists = |condition: serde_json::Value| {
        let body = serde_json::json!({"table":"t","where":condition["where"]});
        serde_json::json!({"table":"t","where":{"type":"correlatedSubquery","op":"EXISTS",
            "related":{"correlation":{"parentField":["s"],"childField":["s"]},"subquery":body}}})
    };
    let one = exists(serde_json::json!({"where":{"type":"simple","op":"=",
        "left":{"type":"column","name":"id"},"right":{"type":"literal","value":7}}}));
    let many = exists(cond("!=", 3.into()));
    for indexed in [true, false] {
        if indexed {
            let mut spec = TableSpec::clone(schema.table("t").unwrap());
            spec.indexes = vec![vec![2]];
            schema.tables.insert("t".into(), Arc::new(spec));
        } else {
            let mut spec = TableSpec::clone(schema.table("t").unwrap());
            spec.indexes = vec![];
            schema.tables.insert("t".into(), Arc::new(spec));
        }
        let dir = tempfile::tempdir().unwrap();
        let mut sqlite = replica(&dir, &schema, &db);
        let writer = Connection::open(dir.path().join("replica.db")).unwrap();
        writer.execute_batch("ANALYZE").unwrap();
        sqlite.refresh().unwrap();
        let plan = explained(&sqlite, &schema, one.clone());
        assert_eq!(plan.contains("LIST SUBQUERY"), indexed, "{plan}");
        assert!(!indexed || !plan.contains("SCAN"), "{plan}");
        let plan = explained(&sqlite, &schema, many.clone());
        assert!(!plan.contains("LIST SUBQUERY"), "{plan}");
        for side in [ExistsSide::Parent, ExistsSide::Child] {
            if !indexed {
                break;
            }
            sqlite.always_begin_with(side);
            assert_eq!(run(&mut sqlite, &schema, one.clone()), 11);
        }
    }
}

#[test]
fn a_statement_that_runs_key_by_key_is_prepared_once() {
    let (mut schema, db) = large_table();
    let mut spec = TableSpec::clone(schema.table("t").unwrap());
    spec.indexes = vec![vec![1]];
    schema.tables.insert("t".into(), Arc::new(spec));
    let dir = tempfile::tempdir().unwrap();
    let sqlite = replica(&dir, &schema, &db);
    // With samples of the column's values.
    Connection::open(dir.path().join("replica.db")).unwrap().execute_batch("ANALYZE").unwrap();
    let reader = ReplicaReader::open(sqlite.reader().path(), &ReaderOptions::default()).unwrap();
    let mut sqlite = ReplicaSource::new(reader).unwrap();
    sqlite.refresh().unwrap();
    let ast = serde_json::json!({"table":"t","orderBy":[["s","asc"]],"where":cond(">", 3.into())["where"]});
    let ast: Ast = serde_json::from_value(ast).unwrap();
    let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
    let prepared_again = |fetch: &Fetch<'_>| {
        let compiled = compile_sql(fetch, None, Select::Rows, ExistsSide::Parent).unwrap();
        let mut statement = sqlite.reader().prepare(&compiled.text).unwrap();
        for round in 0..5 {
            for at in 1..=compiled.binds.len() {
                statement.raw_bind_parameter(at, 4 + round).unwrap();
            }
            let mut rows = statement.raw_query();
            while rows.next().unwrap().is_some() {}
        }
        statement.get_status(StatementStatus::RePrepare)
    };
    let position: Key = [Value::string("s4"), Value::Number(4.0)].into_iter().collect();
    for n in 0..3 {
        let keys: [Key; 1] = [[Value::Number(f64::from(n))].into_iter().collect()];
        let first = Fetch {
            keys: Some(Keys { columns: &[1], keys: &keys }),
            limit: Some(4),
            ..whole(&plan, &params)
        };
        assert_eq!(prepared_again(&first), 0);
        let from = Some(Bound { position: &position, inclusive: true });
        assert_eq!(prepared_again(&Fetch { from, ..first.clone() }), 0);
        assert_eq!(prepared_again(&Fetch { limit: None, ..first }), 0);
    }
    // Where much may be read, SQLite looks at the values.
    assert!(prepared_again(&whole(&plan, &params)) > 0);
    // All rows with a value, in any order, have no second way.
    let ast = serde_json::json!({"table":"t","orderBy":[["s","asc"]],"where":cond("=", 3.into())["where"]});
    let ast: Ast = serde_json::from_value(ast).unwrap();
    let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
    let all = Fetch { ordered: false, ..whole(&plan, &params) };
    assert_eq!(prepared_again(&all), 0);
    assert!(prepared_again(&Fetch { ordered: true, limit: Some(2), ..all }) > 0);
}

#[test]
fn small_partitions_are_read_together_and_large_ones_stop_early() {
    let columns = [("id", ValueType::Number, "int4"), ("v", ValueType::Number, "int4")];
    let number = |n: u32| Value::Number(f64::from(n));
    // Each of 100 parents (v = 0) has `children` children.
    for (children, together) in [(3_u32, true), (40, false)] {
        let parents = (1..=100).map(|n| vec![number(n), number(0)]);
        let below = (0..100 * children).map(|n| vec![number(1_000 + n), number(n % 100 + 1)]);
        let (mut schema, db) = table(&columns, parents.chain(below).collect());
        let mut spec = TableSpec::clone(schema.table("t").unwrap());
        spec.indexes = vec![vec![1]];
        schema.tables.insert("t".into(), Arc::new(spec));
        let dir = tempfile::tempdir().unwrap();
        let mut sqlite = replica(&dir, &schema, &db);
        let writer = Connection::open(dir.path().join("replica.db")).unwrap();
        writer.execute_batch("ANALYZE").unwrap();
        sqlite.refresh().unwrap();
        let edge = serde_json::json!({"correlation":{"parentField":["id"],"childField":["v"]},
            "subquery":{"table":"t","alias":"c","limit":2,"orderBy":[["id","desc"]]}});
        let query = |part: &str, value: serde_json::Value| {
            let mut ast = serde_json::json!({"table":"t","where":cond("=", 0.into())["where"]});
            match part {
                "related" => ast["related"] = serde_json::json!([value]),
                _ => {
                    let exists = serde_json::json!({"type":"correlatedSubquery","op":"EXISTS",
                        "related":value});
                    ast["where"] =
                        serde_json::json!({"type":"and","conditions":[ast["where"], exists]});
                }
            }
            ast
        };
        for (part, of_each) in [("related", 2), ("exists", 3)] {
            let ast: Ast = serde_json::from_value(query(part, edge.clone())).unwrap();
            let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
            let version = sqlite.version().clone();
            let mut engine =
                Engine::new(EngineConfig::default(), version, Arc::new(schema.clone()));
            let id = engine.subscribe(&Arc::new(plan), params.into()).unwrap();
            let before = sqlite.statements();
            let mut budget = Budget::unlimited();
            let done = engine.hydrate_step(id, &mut sqlite, &mut budget).unwrap();
            assert_eq!(done, Progress::Done);
            let statements = sqlite.statements() - before;
            assert_eq!(statements, if together { 2 } else { 101 }, "{part} of {children}");
            assert_eq!(engine.rows(id).unwrap().count(), 100 * (1 + of_each), "{part}");
        }
    }
}
