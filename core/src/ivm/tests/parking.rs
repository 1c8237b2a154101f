//! Queries whose rows had to make room for others.

use serde_json::{Value as Json, json};

use super::kit::{Change, Kit, only, table, words};
use crate::ivm::engine::{EngineConfig, InstanceId};
use crate::ivm::error::EngineError;
use crate::ivm::stats::EngineStats;
use crate::row::RowRef;
use crate::schema::TableId;
use crate::schema::ValueType::{Number, String as Text};

/// Room for the rows of one of the two large queries.
const ROOM: usize = 12;

fn kit() -> Kit {
    let tables = vec![
        table(0, "a", &[("id", Text), ("n", Number)]),
        table(1, "b", &[("id", Text), ("n", Number)]),
    ];
    let mut rows: Vec<Change> = Vec::new();
    for n in 0..10 {
        rows.push(("a", json!([format!("a{n}"), n])));
        rows.push(("b", json!([format!("b{n}"), n])));
    }
    Kit::new(EngineConfig { max_rows: ROOM, ..EngineConfig::default() }, tables, &rows)
}

fn all(table: &str) -> Json {
    json!({"table": table})
}

fn hydrated(kit: &mut Kit, table: &str) -> InstanceId {
    let id = kit.subscribe(&all(table));
    kit.hydrate(id);
    id
}

fn some_row(kit: &Kit, table: TableId) -> RowRef {
    kit.source.db.rows(table).next().unwrap().clone()
}

fn stats(kit: &Kit) -> EngineStats {
    kit.engine.stats()
}

#[test]
fn the_largest_query_makes_room_and_still_answers() {
    let mut kit = kit();
    let first = hydrated(&mut kit, "a");
    let known = (kit.engine.signature(first).unwrap(), stats(&kit).interned_rows);
    assert_eq!((known.1, stats(&kit).parked), (10, 0));
    let second = hydrated(&mut kit, "b");
    assert!(kit.engine.is_parked(first) && !kit.engine.is_parked(second));
    assert_eq!((stats(&kit).parked, stats(&kit).resident_rows), (1, 10));
    let row = some_row(&kit, TableId(0));
    assert_eq!(kit.engine.count(first, TableId(0), &row).unwrap(), 1);
    assert_eq!(kit.engine.count(first, TableId(1), &some_row(&kit, TableId(1))).unwrap(), 0);
    assert_eq!(kit.engine.signature(first).unwrap(), known.0);
    assert!(matches!(kit.engine.rows(first).err(), Some(EngineError::NotReady)));
    // Who wants the rows has them read anew; then another one makes room.
    kit.hydrate(first);
    assert!(kit.engine.is_parked(second) && !kit.engine.is_parked(first));
    kit.check(first, &all("a"));
    assert_eq!(stats(&kit).counters.parkings, 2);
}

#[test]
fn a_commit_reads_a_parked_query_anew_if_it_concerns_its_table() {
    let mut kit = kit();
    let (first, second) = (hydrated(&mut kit, "a"), hydrated(&mut kit, "b"));
    let fetches = kit.source.fetches;
    assert_eq!(only(&kit.change(&[("b", json!(["b1"]))])), "-b1");
    assert_eq!(kit.source.fetches, fetches, "what is parked is not concerned");
    assert!(kit.engine.is_parked(first));
    let changes: &[Change] =
        &[("a", json!(["a0"])), ("a", json!(["a3", 7])), ("a", json!(["x", 1]))];
    assert_eq!(only(&kit.change(changes)), "-a0 ~a3 +x");
    // Whichever made room this time, both are as they should be.
    for (id, table) in [(first, "a"), (second, "b")] {
        kit.hydrate(id);
        kit.check(id, &all(table));
    }
}

#[test]
fn what_changed_before_a_query_was_parked_is_not_said_again() {
    let mut kit = kit();
    let first = hydrated(&mut kit, "a");
    assert_eq!(only(&kit.change(&[("a", json!(["a3", 7]))])), "~a3");
    hydrated(&mut kit, "b");
    assert!(kit.engine.is_parked(first));
    let advanced = kit.change(&[("a", json!(["y", 1]))]);
    assert_eq!(advanced.deltas.len(), 1);
    assert_eq!(words(&advanced.deltas[0].rows), "+y");
}

#[test]
fn a_parked_query_that_is_dropped_leaves_nothing() {
    let mut kit = kit();
    let (first, second) = (hydrated(&mut kit, "a"), hydrated(&mut kit, "b"));
    kit.engine.unsubscribe(first);
    assert_eq!((stats(&kit).parked, stats(&kit).instances), (0, 1));
    kit.check(second, &all("b"));
    assert!(kit.engine.count(first, TableId(0), &some_row(&kit, TableId(0))).is_err());
}
