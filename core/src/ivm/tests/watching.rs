//! Rows are passed on while they are read.

use std::collections::BTreeSet;

use serde_json::{Value as Json, json};

use super::kit::{Change, Kit, table};
use crate::ivm::engine::{Budget, EngineConfig, InstanceId, Progress, Reset};
use crate::row::RowId;
use crate::schema::ValueType::Number;
use crate::value::Value;

const PARENTS: usize = 30;
const COMMITS: usize = 8;

fn query() -> Json {
    json!({"table": "p", "where": {"type": "correlatedSubquery", "op": "EXISTS", "related": {
        "correlation": {"parentField": ["k"], "childField": ["k"]},
        "subquery": {"table": "e", "alias": "e"},
    }}, "related": [{
        "correlation": {"parentField": ["k"], "childField": ["k"]},
        "subquery": {"table": "c", "alias": "c"},
    }]})
}

fn kit() -> Kit {
    let columns = [("id", Number), ("k", Number)];
    let tables = vec![table(0, "p", &columns), table(1, "c", &columns), table(2, "e", &columns)];
    let of = |i: usize| ["p", "c", "e"].map(|t| (t, json!([i, i % 7])));
    let rows: Vec<Change> = (0..PARENTS).flat_map(of).collect();
    Kit::new(EngineConfig::default(), tables, &rows)
}

/// A slice of hydration; false when that was the last.
fn step(kit: &mut Kit, id: InstanceId) -> bool {
    let mut budget = Budget::units(4);
    kit.engine.hydrate_step(id, &mut kit.source, &mut budget).unwrap() != Progress::Done
}

fn taken(kit: &mut Kit, id: InstanceId, least: usize) -> Vec<RowId> {
    let rows = kit.engine.take_watched(id, least);
    rows.into_iter().map(|(table, row)| RowId::of(&table, &row)).collect()
}

fn id_of(kit: &Kit, key: usize) -> RowId {
    let key = [Value::Number(key as f64)].into_iter().collect();
    RowId { table: kit.schema.table("p").unwrap().id, key }
}

fn result(kit: &Kit, id: InstanceId) -> BTreeSet<RowId> {
    kit.engine.rows(id).unwrap().map(|held| RowId::of(held.table, held.row)).collect()
}

#[test]
fn every_row_is_passed_on_and_most_of_them_before_the_last_is_read() {
    let mut kit = kit();
    let id = kit.subscribe(&query());
    assert!(kit.engine.watch(id));
    assert!(!kit.engine.watch(id), "one takes them");
    let (mut rows, mut before) = (BTreeSet::new(), 0);
    while step(&mut kit, id) {
        rows.extend(taken(&mut kit, id, 1));
        before = rows.len();
    }
    rows.extend(taken(&mut kit, id, 1));
    assert_eq!(rows, result(&kit, id));
    assert!(before * 3 > rows.len() * 2, "{before} of {} before the end", rows.len());
    kit.engine.unwatch(id);
    assert!(!kit.engine.watch(id), "it is hydrated");
}

#[test]
fn they_wait_until_there_are_enough() {
    let mut kit = kit();
    let id = kit.subscribe(&query());
    assert!(kit.engine.watch(id));
    let mut most = 0;
    while step(&mut kit, id) {
        most = most.max(taken(&mut kit, id, 20).len());
        assert!(most == 0 || most >= 20);
    }
    assert!(most >= 20);
}

#[test]
fn rows_that_commits_bring_meanwhile_are_among_them() {
    let mut kit = kit();
    let id = kit.subscribe(&query());
    assert!(kit.engine.watch(id));
    let mut rows = BTreeSet::new();
    let mut steps = 0;
    while step(&mut kit, id) {
        rows.extend(taken(&mut kit, id, 1));
        steps += 1;
        if steps <= COMMITS {
            let new = 100 + steps;
            kit.change(&[("p", json!([new, 3])), ("c", json!([new, 3])), ("p", json!([steps, 5]))]);
        }
    }
    rows.extend(taken(&mut kit, id, 1));
    let result = result(&kit, id);
    assert!(steps > COMMITS && result.is_subset(&rows), "{steps} steps");
    assert!((1..=COMMITS).any(|n| result.contains(&id_of(&kit, 100 + n))), "none of the new rows");
}

#[test]
fn who_starts_over_passes_nothing_on_any_more() {
    let mut kit = kit();
    let id = kit.subscribe(&query());
    assert!(kit.engine.watch(id));
    (0..3).for_each(|_| assert!(step(&mut kit, id)));
    assert!(!taken(&mut kit, id, 1).is_empty());
    let table = kit.schema.table("p").unwrap().id;
    let (version, schema) = (kit.engine.version().clone(), kit.schema.clone());
    kit.engine.begin_reset(version, schema, &Reset::Tables(vec![table])).unwrap();
    kit.finish();
    while step(&mut kit, id) {}
    assert!(taken(&mut kit, id, 1).is_empty());
}
