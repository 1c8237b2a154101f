//! Statistics follow the tables, and readers follow the statistics.

#![allow(clippy::unwrap_used, clippy::panic)]

mod kit;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use kit::{create, index, int, place, relation, table, text, transact, tuple, writer};
use zeroring_core::change::Commit;
use zeroring_core::change::message::{ChangeMessage, ReplicaIdentity};
use zeroring_core::change::published::PublishedSchema;
use zeroring_core::ivm::plan::Plan;
use zeroring_core::ivm::source::{Fetch, Filter, Source};
use zeroring_core::zql::compile::{IdentityKeys, compile};
use zeroring_storage::replica::analyze::{AnalyzeLimits, Analyzer};
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader, visible_schema};
use zeroring_storage::replica::scans::LARGE_SCAN_ROWS;
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::source::ReplicaSource;
use zeroring_storage::replica::writer::ReplicaWriter;

/// Kinds, and issues of them; both can be found by the kind.
fn published() -> PublishedSchema {
    PublishedSchema {
        tables: vec![
            table("public", "kind", &[("id", "int4!"), ("name", "text!")]),
            table("public", "issue", &[("id", "int4!"), ("kind", "int4!")]),
        ],
        indexes: vec![
            index("public", "kind", "kind_pkey", true, &["id"]),
            index("public", "kind", "kind_name", false, &["name"]),
            index("public", "issue", "issue_pkey", true, &["id"]),
            index("public", "issue", "issue_kind", false, &["kind"]),
        ],
    }
}

/// Issues that have a kind of this name.
fn issues_of(source: &mut ReplicaSource, kind: &str) -> usize {
    let ast = serde_json::json!({"table": "issue", "where": {
        "type": "correlatedSubquery", "op": "EXISTS", "related": {
            "correlation": {"parentField": ["kind"], "childField": ["id"]},
            "subquery": {"table": "kind", "alias": "k", "where": {"type": "simple", "op": "=",
                "left": {"type": "column", "name": "name"},
                "right": {"type": "literal", "value": kind}}}}}});
    let schema = visible_schema(source.reader(), &TableIds::default()).unwrap();
    let ast = serde_json::from_value(ast).unwrap();
    let (plan, params) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
    let fetch = Fetch {
        plan: &plan,
        node: Plan::ROOT,
        params: &params,
        keys: None,
        filter: Filter::Whole,
        from: None,
        before: None,
        limit: None,
        ordered: false,
    };
    let mut rows = 0;
    source
        .fetch(&fetch, &mut |_| {
            rows += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
    rows
}

const KINDS: i64 = 600;

/// Inserts issues, spread over the kinds.
fn insert(w: &mut ReplicaWriter, at: u64, ids: std::ops::Range<i64>) -> Arc<Commit> {
    let relation = relation(&published().tables[1], ReplicaIdentity::Default, &["id"]);
    let row = |id: i64| ChangeMessage::Insert {
        relation: relation.clone(),
        new: tuple([int(id), int(id % KINDS)]),
    };
    transact(w, at, ids.map(row).collect())
}

#[test]
fn a_table_that_has_grown_is_searched_by_what_it_is_now() {
    let (_dir, path) = place();
    let kinds = (0..KINDS).map(|k| vec![int(k), text(&format!("kind {k}"))]).collect();
    let few = (0..10).map(|id| vec![int(id), int(id)]).collect();
    create(&path, &published(), &[kinds, few]);
    let mut w = writer(&path);
    let reader = ReplicaReader::open(&path, &ReaderOptions::default()).unwrap();
    let mut source = ReplicaSource::new(reader).unwrap();
    source.refresh().unwrap();
    assert_eq!(issues_of(&mut source, "kind 7"), 1);

    let limits = AnalyzeLimits { pause: Duration::ZERO, ..AnalyzeLimits::default() };
    let mut analyzer = Analyzer::new(limits);
    let rows = LARGE_SCAN_ROWS as i64 + 2_000;
    let commit = insert(&mut w, 1, 10..rows);
    source.refresh().unwrap();
    assert_eq!(issues_of(&mut source, "kind 7"), 20);
    assert_eq!(source.scans().large_scans, 1, "ten issues were expected, and all looked at");

    analyzer.note(&commit, &w);
    assert!(!analyzer.maintain(&w, false).unwrap(), "it waits for a quiet moment");
    assert!(analyzer.maintain(&w, true).unwrap());
    assert!(!analyzer.maintain(&w, true).unwrap(), "nothing else is due");
    assert_eq!((analyzer.counters().analyzed, analyzer.counters().told), (1, 1));
    assert_eq!(issues_of(&mut source, "kind 7"), 20, "the open snapshot stays as it is");
    assert_eq!(source.scans().large_scans, 2);

    let version = source.version().clone();
    assert_eq!(*source.refresh().unwrap(), version, "statistics are no version of the data");
    assert_eq!(issues_of(&mut source, "kind 7"), 20);
    assert_eq!(source.scans().large_scans, 2, "found by their kind");
}

#[test]
fn figures_that_stay_as_they_are_make_looking_rare_and_tell_nobody() {
    let (_dir, path) = place();
    let all = (0..3_000).map(|id| vec![int(id), int(id % KINDS)]).collect();
    create(&path, &published(), &[vec![], all]);
    let mut w = writer(&path);
    let limits = AnalyzeLimits { pause: Duration::ZERO, ..AnalyzeLimits::default() };
    let mut analyzer = Analyzer::new(limits);
    let relation = relation(&published().tables[1], ReplicaIdentity::Default, &["id"]);
    let mut analyzed = Vec::new();
    for at in 1..=10 {
        // A third of the rows gets other kinds, as many of each as before.
        let other = |id: i64| ChangeMessage::Update {
            relation: relation.clone(),
            old: None,
            new: tuple([int(id), int((id + at as i64) % KINDS)]),
        };
        let commit = transact(&mut w, at, (0..1_000).map(other).collect());
        analyzer.note(&commit, &w);
        if analyzer.maintain(&w, true).unwrap() {
            analyzed.push(at);
        }
    }
    // Half of 3,000 rows, then twice, then four times as many.
    assert_eq!(analyzed, [2, 5]);
    assert_eq!(analyzer.counters().told, 0);
    // No pause was given; with one nothing is looked at before it is over.
    let mut patient = Analyzer::default();
    for at in 11..=14 {
        let commit = insert(&mut w, at, 4_000 * at as i64..4_000 * at as i64 + 4_000);
        patient.note(&commit, &w);
        assert_eq!(patient.maintain(&w, true).unwrap(), at == 11, "{at}");
    }
}
