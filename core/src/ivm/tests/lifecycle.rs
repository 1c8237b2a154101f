//! What happens to instances besides commits: schema changes, resets, failures, limits.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::kit::{Change, Kit, only, table, words};
use crate::change::{Commit, RowChange, TableChange};
use crate::ivm::engine::{Budget, EngineConfig, Progress, Reset, Status};
use crate::ivm::error::{AdvanceError, EngineError};
use crate::ivm::source::SourceError;
use crate::row::{Row, RowRef};
use crate::schema::ValueType::{Number, String as Text};
use crate::schema::{Schema, TableSpec};
use crate::value::Value;
use crate::version::StateVersion;

fn kit() -> Kit {
    let tables = vec![
        table(0, "a", &[("id", Text), ("n", Number)]),
        table(1, "b", &[("id", Text), ("n", Number)]),
    ];
    let rows: Vec<Change> =
        vec![("a", json!(["a1", 1])), ("a", json!(["a2", 2])), ("b", json!(["b1", 1]))];
    Kit::new(EngineConfig::default(), tables, &rows)
}

fn all(table: &str) -> Json {
    json!({"table": table})
}

/// A schema change of table `a`: version 2, with a changed spec and these rows.
fn alter(kit: &mut Kit, change: impl Fn(&mut TableSpec), rows: Vec<RowRef>) -> Arc<Commit> {
    let mut schema = Schema::clone(&kit.schema);
    let old = schema.tables["a"].clone();
    let mut spec = TableSpec::clone(&old);
    change(&mut spec);
    let spec = Arc::new(spec);
    schema.tables.insert("a".into(), spec.clone());
    kit.schema = Arc::new(schema);
    for row in kit.source.db.rows(old.id).cloned().collect::<Vec<_>>() {
        kit.source.db.remove(&old, &row);
    }
    rows.into_iter().for_each(|row| drop(kit.source.db.put(&spec, row)));
    let commit = Arc::new(Commit {
        previous: kit.source.version.clone(),
        version: StateVersion::from_lsn(2),
        tables: vec![],
        schema: Some(kit.schema.clone()),
        upstream_commit_ms: 0.0,
        permissions_changed: false,
    });
    kit.source.version = commit.version.clone();
    commit
}

#[test]
fn a_schema_change_rebinds_its_readers_and_emits_the_difference() {
    let mut kit = kit();
    let (a, b) = (kit.subscribe(&all("a")), kit.subscribe(&all("b")));
    kit.hydrate(a);
    kit.hydrate(b);
    // A column is added; the table's rows count as written now; one row is gone.
    let version = StateVersion::from_lsn(2);
    let row = Row::new(
        version.clone(),
        vec![Value::string("a1"), Value::Number(1.0), Value::string("new")],
    );
    let commit = alter(
        &mut kit,
        |spec| {
            let mut column = spec.columns[0].clone();
            column.name = "extra".into();
            spec.columns.push(column);
            spec.min_row_version = version.clone();
        },
        vec![row],
    );
    let start = kit.engine.begin_advance(&[commit]).unwrap();
    assert_eq!(start.needs_rebind, [a]);
    let plan = kit.plan(&all("a"));
    kit.engine.rebind(a, Ok(plan)).unwrap();
    let advanced = kit.finish();
    assert_eq!(only(&advanced), "~a1 -a2");
    let row = advanced.deltas[0].rows.iter().find_map(|d| d.row.as_ref()).unwrap();
    assert_eq!(row.values.len(), 3);
    kit.check(a, &all("a"));
    assert_eq!(kit.engine.stats().plans, 2);
}

#[test]
fn a_reader_without_a_new_plan_fails_alone() {
    for reason in [None, Some("column gone")] {
        let mut kit = kit();
        let (a, b) = (kit.subscribe(&all("a")), kit.subscribe(&all("b")));
        kit.hydrate(a);
        kit.hydrate(b);
        let commit =
            alter(&mut kit, |spec| spec.min_row_version = StateVersion::from_lsn(2), vec![]);
        kit.engine.begin_advance(&[commit]).unwrap();
        if let Some(reason) = reason {
            kit.engine.rebind(a, Err(reason.into())).unwrap();
        }
        let advanced = kit.finish();
        let [(id, error)] = &*advanced.failed else { panic!("{:?}", advanced.failed) };
        assert_eq!(*id, a);
        match reason {
            None => assert!(matches!(error, EngineError::SchemaChanged(t) if t == "a")),
            Some(_) => assert!(matches!(error, EngineError::Rebind(_))),
        }
        assert!(matches!(kit.engine.status(b), Ok(Status::Ready)));
        assert!(kit.engine.rows(a).is_err());
        // A new subscription tries anew.
        let again = kit.subscribe(&all("a"));
        assert_ne!(again, a);
        kit.hydrate(again);
    }
}

#[test]
fn a_reset_emits_what_changed_meanwhile() {
    let mut kit = kit();
    let (a, b) = (kit.subscribe(&all("a")), kit.subscribe(&all("b")));
    kit.hydrate(a);
    kit.hydrate(b);
    kit.commit(&[("a", json!(["a1", 9])), ("a", json!(["a2"])), ("a", json!(["a3", 3]))]);
    let lost = kit.commit(&[("b", json!(["b1"]))]);
    assert!(matches!(kit.engine.begin_advance(&[lost]), Err(AdvanceError::ChainBroken { .. })));
    let version = kit.source.version.clone();
    kit.engine.begin_reset(version, kit.schema.clone(), &Reset::All).unwrap();
    let advanced = kit.finish();
    let of = |id| advanced.deltas.iter().find(|d| d.instance == id).map(|d| words(&d.rows));
    assert_eq!(of(a).as_deref(), Some("~a1 -a2 +a3"));
    assert_eq!(of(b).as_deref(), Some("-b1"));
    assert_eq!(kit.engine.version(), &kit.source.version);
    // Nothing changed since: nothing is emitted.
    let version = kit.source.version.clone();
    let ids = vec![kit.schema.table("a").unwrap().id];
    kit.engine.begin_reset(version, kit.schema.clone(), &Reset::Tables(ids)).unwrap();
    assert!(kit.finish().deltas.is_empty());
    assert_eq!(only(&kit.change(&[("a", json!(["a3"]))])), "-a3");
}

#[test]
fn nothing_is_answered_during_an_advance_or_before_hydration() {
    let mut kit = kit();
    let (a, b) = (kit.subscribe(&all("a")), kit.subscribe(&all("b")));
    assert!(matches!(kit.engine.rows(a).err(), Some(EngineError::NotReady)));
    kit.hydrate(a);
    let row = kit.source.db.rows(crate::schema::TableId(0)).next().unwrap().clone();
    assert_eq!(kit.engine.count(a, crate::schema::TableId(0), &row).unwrap(), 1);
    let commit = kit.commit(&[("a", json!(["a1"]))]);
    let mut budget = Budget::unlimited();
    let early = kit.engine.hydrate_step(b, &mut kit.source, &mut budget);
    assert!(matches!(early, Err(EngineError::SnapshotMismatch { .. })));
    kit.engine.begin_advance(std::slice::from_ref(&commit)).unwrap();
    assert!(matches!(kit.engine.begin_advance(&[commit]), Err(AdvanceError::Busy)));
    assert!(matches!(kit.engine.status(a), Ok(Status::Advancing)));
    assert!(kit.engine.rows(a).is_err() && kit.engine.signature(a).is_err());
    let blocked = kit.engine.hydrate_step(b, &mut kit.source, &mut budget).unwrap();
    assert_eq!(blocked, Progress::Blocked);
    assert_eq!(only(&kit.finish()), "-a1");
    kit.hydrate(b);
    assert!(matches!(
        kit.engine.advance_step(&mut kit.source, &mut budget),
        Err(AdvanceError::Idle)
    ));
}

/// Checklist 18: an integer that no client can hold fails the query that would deliver it.
#[test]
fn an_undeliverable_value_fails_its_query_alone() {
    let mut kit = kit();
    let small = json!({"table": "a", "where": {"type": "simple", "op": "<",
        "left": {"type": "column", "name": "n"}, "right": {"type": "literal", "value": 5}}});
    let (a, few) = (kit.subscribe(&all("a")), kit.subscribe(&small));
    kit.hydrate(a);
    kit.hydrate(few);
    let spec = kit.schema.table("a").unwrap().clone();
    let version = StateVersion::from_lsn(2);
    let row = Row::new(version.clone(), vec![Value::string("a9"), Value::from_i64(i64::MAX)]);
    let rows = vec![RowChange { old: None, new: Some(row) }];
    let commit = Arc::new(Commit {
        previous: kit.source.version.clone(),
        version,
        tables: vec![TableChange { table: spec, rows, truncated: false }],
        schema: None,
        upstream_commit_ms: 0.0,
        permissions_changed: false,
    });
    kit.source.advance(&commit);
    let advanced = kit.advance(&[commit]);
    let [(id, error)] = &*advanced.failed else { panic!("{:?}", advanced.failed) };
    assert_eq!(*id, a);
    assert!(error.to_string().contains("a.n"), "{error}");
    assert!(matches!(error, EngineError::Source(SourceError::UnsupportedValue(_))));
    assert!(advanced.deltas.is_empty());
    assert_eq!(kit.rows(few), "+a1 +a2");
    assert!(matches!(kit.engine.status(a), Ok(Status::Failed(_))));
    assert_eq!(kit.engine.stats().resident_rows, 2, "a failed query holds nothing");
}

#[test]
fn the_number_of_instances_is_bounded() {
    let mut kit = kit();
    kit.engine = crate::ivm::engine::Engine::new(
        EngineConfig { max_instances: 1, ..EngineConfig::default() },
        kit.source.version.clone(),
        kit.schema.clone(),
    );
    let a = kit.subscribe(&all("a"));
    let (plan, params) = kit.plan(&all("b"));
    assert!(matches!(
        kit.engine.subscribe(&plan, params.clone()),
        Err(EngineError::TooManyInstances(1))
    ));
    assert_eq!(kit.subscribe(&all("a")), a, "one more subscriber is no new instance");
    kit.engine.unsubscribe(a);
    kit.engine.unsubscribe(a);
    assert!(kit.engine.subscribe(&plan, params).is_ok());
}

#[test]
fn several_commits_are_one_change() {
    let mut kit = kit();
    let a = kit.subscribe(&all("a"));
    kit.hydrate(a);
    let commits = [
        kit.commit(&[("a", json!(["a3", 3])), ("a", json!(["a1", 7]))]),
        kit.commit(&[("a", json!(["a3"])), ("a", json!(["a2"]))]),
        kit.commit(&[("a", json!(["a2", 2])), ("a", json!(["a1", 8]))]),
    ];
    let advanced = kit.advance(&commits);
    // a3 came and went; a2 went and came back in another version.
    assert_eq!(only(&advanced), "~a1 ~a2");
    kit.check(a, &all("a"));
}
