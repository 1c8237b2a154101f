//! Limited reads that sort all candidates to return the first ones name the index that spares it:
//! with that index, SQLite does not sort.

#![allow(clippy::unwrap_used, clippy::panic)]

mod sqlite_world;

use std::ops::ControlFlow;
use std::sync::Arc;

use serde_json::{Value as Json, json};
use sqlite_world::replica;
use zeroring_core::ivm::memory_source::Database;
use zeroring_core::ivm::plan::{Direction, NodeId};
use zeroring_core::ivm::source::{Fetch, Filter, Keys, Source as _};
use zeroring_core::row::{Key, Row};
use zeroring_core::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::compile::{IdentityKeys, compile};
use zeroring_storage::replica::scans::Effort;
use zeroring_storage::replica::source::ReplicaSource;

const ROWS: usize = 6_000;
const ISSUES: usize = 20;

/// `comment(id, issue, at, by)`.
fn comments(indexes: &[&[usize]]) -> (Schema, Database) {
    let column = |name: &str| ColumnSpec {
        name: name.into(),
        value_type: ValueType::Number,
        nullable: name != "id",
        upstream_type: "int4".into(),
    };
    let table = TableSpec {
        id: TableId(0),
        name: "comment".into(),
        columns: ["id", "issue", "at", "by"].map(column).into(),
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: vec![UniqueKey { columns: vec![0], not_null: true }],
        min_row_version: StateVersion::zero(),
        indexes: indexes.iter().map(|i| i.to_vec()).collect(),
    };
    let mut db = Database::default();
    for n in 0..ROWS {
        let row = [n, n % ISSUES, n * 7_919 % ROWS, n % 3].map(|n| Value::Number(n as f64));
        db.put(&table, Row::new(StateVersion::zero(), row));
    }
    let mut schema = Schema::default();
    schema.tables.insert(table.name.clone(), Arc::new(table));
    (schema, db)
}

/// Reads the first rows of an instance, of one key or of all rows, so many times.
fn read(
    source: &mut ReplicaSource,
    schema: &Schema,
    query: &Json,
    key: Option<usize>,
    times: usize,
) {
    let ast = serde_json::from_value(query.clone()).unwrap();
    let (plan, params) = compile(&ast, schema, &IdentityKeys::default()).unwrap();
    for n in 0..times {
        let keys = [key.iter().map(|k| Value::Number(((k + n) % ISSUES) as f64)).collect::<Key>()];
        let fetch = Fetch {
            plan: &plan,
            node: NodeId(0),
            params: &params,
            keys: key.map(|_| Keys { columns: &[1], keys: &keys }),
            filter: Filter::Whole,
            from: None,
            before: None,
            limit: Some(3),
            ordered: true,
        };
        let mut rows = 0;
        source
            .fetch(&fetch, &mut |_| {
                rows += 1;
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(rows, 3);
    }
}

fn by_time(more: Json) -> Json {
    let mut query = json!({"table": "comment", "orderBy": [["at", "desc"]], "limit": 3});
    query.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    query
}

/// The index that is asked for; with it, nothing is asked for any more and nothing is sorted.
fn asks_for(query: &Json, key: Option<usize>, times: usize, index: &[usize]) {
    let mut asked = String::new();
    for indexes in [&[&[1][..]][..], &[&[1], index]] {
        let (schema, db) = comments(indexes);
        let dir = tempfile::tempdir().unwrap();
        let (mut source, _writer) = replica(&dir, &schema, &db, &StateVersion::from_lsn(1));
        read(&mut source, &schema, query, key, times);
        let missing = source.take_missing_indexes();
        if indexes.len() == 1 {
            assert_eq!(missing.len(), 1, "{query}");
            let spec = &schema.tables["comment"];
            let wanted: Vec<_> = index.iter().map(|&c| spec.columns[c].name.clone()).collect();
            assert_eq!(missing[0].columns, wanted, "{query}");
            assert!(missing[0].plan.contains("USE TEMP B-TREE FOR ORDER BY"), "{missing:?}");
            asked = missing[0].to_string();
        } else {
            assert!(missing.is_empty(), "{missing:?}");
        }
    }
    println!("{asked}");
}

#[test]
fn the_first_rows_of_each_parent() {
    asks_for(&by_time(json!({})), Some(4), 2_000, &[1, 2]);
}

#[test]
fn the_first_rows_of_each_parent_among_some() {
    let by = json!({"where": {"type": "simple", "op": "=", "left": {"type": "column", "name": "by"},
        "right": {"type": "literal", "value": 1}}});
    asks_for(&by_time(by), Some(4), 2_000, &[1, 3, 2]);
}

#[test]
fn a_window_of_filtered_rows() {
    let of = json!({"where": {"type": "simple", "op": "=",
        "left": {"type": "column", "name": "issue"}, "right": {"type": "literal", "value": 4}}});
    asks_for(&by_time(of), None, 1_000, &[1, 2]);
}

#[test]
fn a_few_sorted_rows_are_no_concern() {
    let (schema, db) = comments(&[&[1]]);
    let dir = tempfile::tempdir().unwrap();
    let (mut source, _writer) = replica(&dir, &schema, &db, &StateVersion::from_lsn(1));
    read(&mut source, &schema, &by_time(json!({})), Some(4), 20);
    assert!(source.take_missing_indexes().is_empty());
}

#[test]
fn an_interrupted_sort_asks_for_the_index_at_once() {
    let (schema, db) = comments(&[&[1]]);
    let dir = tempfile::tempdir().unwrap();
    let (mut source, _writer) = replica(&dir, &schema, &db, &StateVersion::from_lsn(1));
    let ast = serde_json::from_value(by_time(json!({}))).unwrap();
    let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
    assert_eq!(plan.nodes[0].order[0], (2, Direction::Desc));
    let keys = [[Value::Number(3.0)].into_iter().collect::<Key>()];
    let fetch = Fetch {
        plan: &plan,
        node: NodeId(0),
        params: &params,
        keys: Some(Keys { columns: &[1], keys: &keys }),
        filter: Filter::Whole,
        from: None,
        before: None,
        limit: Some(3),
        ordered: true,
    };
    source.fetch_within(&fetch, 10, &mut |_| ControlFlow::Continue(())).unwrap();
    let missing = source.take_missing_indexes();
    assert_eq!((missing.len(), missing[0].effort), (1, Effort::Sorted(1)));
    assert_eq!(missing[0].columns, ["issue".into(), "at".into()]);
}
