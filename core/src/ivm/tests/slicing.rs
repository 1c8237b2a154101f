//! Hydration in slices with commits in between.

use serde_json::{Value as Json, json};

use super::kit::{Change, Kit, table};
use crate::ivm::engine::{Budget, EngineConfig, Progress};
use crate::ivm::mutant::{self, Mutant};
use crate::schema::ValueType::Number;

fn query() -> Json {
    json!({"table": "p", "related": [{
        "correlation": {"parentField": ["k"], "childField": ["k"]},
        "subquery": {"table": "c", "alias": "c", "limit": 1},
    }]})
}

fn kit() -> Kit {
    let tables = vec![
        table(0, "p", &[("id", Number), ("k", Number)]),
        table(1, "c", &[("id", Number), ("k", Number)]),
    ];
    let rows: Vec<Change> =
        (0..5).flat_map(|i| [("p", json!([i, i])), ("c", json!([i, i]))]).collect();
    Kit::new(EngineConfig::default(), tables, &rows)
}

/// Deletes a parent after `before` slices, puts it back `between` slices later.
fn hydrate_around(before: usize, between: usize, parent: usize) -> bool {
    let mut kit = kit();
    let id = kit.subscribe(&query());
    let step = |kit: &mut Kit| {
        let mut budget = Budget::units(1);
        kit.engine.hydrate_step(id, &mut kit.source, &mut budget).unwrap() == Progress::Done
    };
    for _ in 0..before {
        step(&mut kit);
    }
    kit.change(&[("p", json!([parent]))]);
    for _ in 0..between {
        step(&mut kit);
    }
    kit.change(&[("p", json!([parent, parent]))]);
    while !step(&mut kit) {}
    kit.engine.rows(id).unwrap().count() == 10
}

fn all_right() -> bool {
    (0..16).all(|before| {
        (0..4).all(|between| (0..5).all(|parent| hydrate_around(before, between, parent)))
    })
}

#[test]
fn a_key_unwanted_for_a_while_is_read_all_the_same() {
    assert!(all_right());
    assert!(!mutant::with(Mutant::WantedAnewForgotten, all_right), "the test proves nothing");
}
