//! The plan's meaning is Postgres' meaning: random queries over random data, compared with what a
//! real Postgres answers to an independent translation of the same AST.
//!
//! `ZR_SEEDS=from..to` runs other seeds than the default ones.

#![allow(clippy::unwrap_used, clippy::panic)]

use postgres::{Client, NoTls};
use serde_json::{Value as Json, json};
use zeroring_core::ivm::brute;
use zeroring_core::ivm::memory_source::Database;
use zeroring_core::ivm::plan::{NodeId, Param, Plan};
use zeroring_core::ivm::proof::datasets;
use zeroring_core::ivm::proof::runner::by_id;
use zeroring_core::ivm::proof::script::Edit;
use zeroring_core::row::Row;
use zeroring_core::schema::Schema;
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::ast::Ast;
use zeroring_core::zql::compile::{IdentityKeys, compile};
use zeroring_core::zql::gen_world::{self, Choices, Shape};
use zeroring_core::zql::pg_oracle;
use zeroring_net::pg::local_server::LocalServer;

/// A row with its children; edges without children are left out, for the compiler drops those
/// that can have none.
fn tree(plan: &Plan, node: NodeId, params: &[Param], db: &Database, row: &Row) -> Json {
    let values: Vec<Json> = row.values.iter().map(plain).collect();
    let children: Vec<Json> = plan
        .node(node)
        .related
        .iter()
        .map(|e| {
            let key = row.project(&e.parent_columns);
            brute::rows(plan, e.child, params, db, Some((&e.child_columns, &key)))
                .iter()
                .map(|r| tree(plan, e.child, params, db, r))
                .collect::<Vec<_>>()
        })
        .filter(|rows| !rows.is_empty())
        .map(Json::Array)
        .collect();
    json!([values, children])
}

fn plain(v: &Value) -> Json {
    match v {
        Value::Null => Json::Null,
        Value::Bool(b) => json!(b),
        Value::Number(n) => number(*n),
        Value::UnsafeInt(n) => json!(n),
        Value::String(s) => json!(&**s),
        Value::Json(text) => doubles(serde_json::from_str(text).unwrap()),
    }
}

/// -0 is 0, and 1.0 is 1.
fn number(n: f64) -> Json {
    json!(if n == 0.0 { 0.0 } else { n })
}

fn doubles(v: Json) -> Json {
    match v {
        Json::Number(n) => number(n.as_f64().unwrap()),
        Json::Array(items) => items.into_iter().map(doubles).collect(),
        Json::Object(map) => map.into_iter().map(|(k, v)| (k, doubles(v))).collect(),
        other => other,
    }
}

/// What Postgres answers, in the shape of [`tree`].
fn answer(rows: Json) -> Json {
    let Json::Array(rows) = rows else { panic!("{rows}") };
    rows.into_iter()
        .map(|row| {
            let values = doubles(row[0].clone());
            let children: Vec<Json> = row[1]
                .as_array()
                .unwrap()
                .iter()
                .filter(|c| !c.as_array().unwrap().is_empty())
                .map(|c| answer(c.clone()))
                .collect();
            json!([values, children])
        })
        .collect()
}

fn seeds() -> std::ops::Range<u64> {
    let text = std::env::var("ZR_SEEDS").unwrap_or_default();
    let mut parts = text.split("..").map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(from)), Some(Ok(to))) => from..to,
        _ => 0..60,
    }
}

/// What both answer.
fn agrees(
    sql: &mut Client,
    ast: &Ast,
    schema: &Schema,
    keys: &IdentityKeys,
    db: &Database,
    context: &dyn Fn() -> String,
) -> Json {
    let (plan, params) = compile(ast, schema, keys).unwrap();
    let got: Json = brute::rows(&plan, Plan::ROOT, &params, db, None)
        .iter()
        .map(|r| tree(&plan, Plan::ROOT, &params, db, r))
        .collect();
    let text = pg_oracle::tree(ast, schema, keys).unwrap();
    let row = sql.query_one(&text, &[]).unwrap_or_else(|e| panic!("{e:?} {} {text}", context()));
    let want = answer(serde_json::from_str(row.get(0)).unwrap());
    assert_eq!(got, want, "{}", context());
    want
}

/// The statements of a transaction of a data set.
fn statements(schema: &Schema, version: &StateVersion, edits: &[Edit]) -> String {
    let mut text = String::from("BEGIN;\n");
    for edit in edits {
        let (Edit::Put(id, _) | Edit::Remove(id, _) | Edit::Truncate(id)) = edit;
        let t = by_id(schema, *id).unwrap();
        let delete = |key: Vec<&Value>| {
            let by = t.replica_key.iter().zip(key).map(|(&c, v)| {
                let Value::Number(n) = v else { panic!("a key that is no number") };
                format!("\"{}\" = {n}", t.columns[c].name)
            });
            format!("DELETE FROM \"{}\" WHERE {};\n", t.name, by.collect::<Vec<_>>().join(" AND "))
        };
        match edit {
            Edit::Put(_, values) => {
                text += &delete(t.replica_key.iter().map(|&c| &values[c]).collect());
                text += &pg_oracle::insert(t, &Row::new(version.clone(), values.clone()));
            }
            Edit::Remove(_, key) => text += &delete(key.iter().collect()),
            Edit::Truncate(_) => panic!("data sets do not truncate"),
        }
    }
    text + "COMMIT;"
}

/// The engine is compared with brute force after each of the same transactions in the engine's
/// own tests; here brute force is compared with Postgres.
#[test]
fn the_queries_of_small_applications_mean_the_same_as_in_postgres() {
    let server = LocalServer::start(&["fsync=off", "jit=off"]).unwrap();
    let mut sql = Client::connect(&server.url("postgres"), NoTls).unwrap();
    let keys = IdentityKeys::default();
    let version = StateVersion::from_lsn(1);
    for set in datasets::all().unwrap() {
        for seed in 0..2 {
            let mut c = Choices::new(seed);
            let mut rows = set.rows(&mut c);
            let mut text = format!(
                "DROP SCHEMA IF EXISTS w CASCADE; CREATE SCHEMA w; SET search_path = w;\n{}",
                pg_oracle::ddl(&set.schema)
            );
            for (t, values) in &rows {
                let t = by_id(&set.schema, *t).unwrap();
                text += &pg_oracle::insert(t, &Row::new(version.clone(), values.clone()));
            }
            sql.batch_execute(&text).unwrap();
            for n in 0..8 {
                let mut db = Database::default();
                for (t, values) in &rows {
                    let row = Row::new(version.clone(), values.clone());
                    db.put(by_id(&set.schema, *t).unwrap(), row);
                }
                for (what, ast) in &set.queries {
                    let context = || format!("{}: {what}, seed {seed}, step {n}", set.name);
                    agrees(&mut sql, ast, &set.schema, &keys, &db, &context);
                }
                let edits = set.edits(&mut c, &mut rows);
                sql.batch_execute(&statements(&set.schema, &version, &edits)).unwrap();
            }
        }
    }
}

#[test]
fn random_queries_mean_the_same_as_in_postgres() {
    let server = LocalServer::start(&["fsync=off", "jit=off"]).unwrap();
    let mut sql = Client::connect(&server.url("postgres"), NoTls).unwrap();
    let (mut queries, mut nonempty) = (0, 0);
    for seed in seeds() {
        let mut c = Choices::new(seed);
        let shape = Shape::default();
        let schema = gen_world::schema(&mut c, &shape);
        let version = StateVersion::from_lsn(1);
        let db = gen_world::database(&mut c, &schema, &shape, &version);
        let mut text = format!(
            "DROP SCHEMA IF EXISTS w CASCADE; CREATE SCHEMA w; SET search_path = w;\n{}",
            pg_oracle::ddl(&schema)
        );
        for t in schema.tables.values() {
            db.rows(t.id).for_each(|r| text.push_str(&pg_oracle::insert(t, r)));
        }
        sql.batch_execute(&text).unwrap_or_else(|e| panic!("seed {seed}: {e:?} in {text}"));
        for n in 0..20 {
            let ast = gen_world::ast(&mut c, &schema, &shape);
            let keys = gen_world::identity_keys(&mut c, &schema);
            let context =
                || format!("seed {seed}, query {n}: {}", serde_json::to_string(&ast).unwrap());
            let want = agrees(&mut sql, &ast, &schema, &keys, &db, &context);
            queries += 1;
            nonempty += usize::from(want != json!([]));
        }
    }
    assert!(nonempty * 3 > queries, "{nonempty} of {queries} queries had rows");
}
