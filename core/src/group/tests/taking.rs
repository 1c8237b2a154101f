//! The rows of a query are taken a few at a time, however often it changes meanwhile.

use std::collections::BTreeMap;

use super::super::compute::Course;
use super::super::held::{Basis, Taking};
use super::super::{Hydrate, World};
use super::world::{Change, SimWorld};
use crate::cvr::{Ast, QueryHash, RowIdentity};
use crate::value::Value;
use crate::waste::Waste;

const ISSUES: usize = 40;
/// Rows of a slice, see `held.rs`, and those of a query that starts over.
const SLICE: usize = 4;

fn issue(world: &SimWorld, n: usize, at: Option<usize>) -> Change {
    let key = Value::string(format!("i{n:02}"));
    let values = at.map(|at| vec![key.clone(), Value::string("o"), Value::Number(at as f64)]);
    (world.table("issue"), [key].into_iter().collect(), values)
}

fn begin() -> (SimWorld, Ast, Taking) {
    let mut world = SimWorld::new();
    world.commit((0..ISSUES).map(|n| issue(&world, n, Some(0))).collect());
    let ast: Ast = serde_json::from_str(r#"{"table":"issue","orderBy":[["n","asc"]]}"#).unwrap();
    let transformed = world.transform(&ast, true, None).unwrap();
    let query = QueryHash::from("q");
    let wanted = Hydrate { query: query.clone(), transformed, client_schema: None, early: false };
    let instance = world.hydrate(&wanted).unwrap();
    let queries = [(&query, instance, Course::Comes)].into_iter();
    let taking = Taking::of(Basis::Instances, queries, None);
    (world, ast, taking)
}

/// What was taken is the result; each row once.
fn check(world: &SimWorld, ast: &Ast, taking: Taking) {
    let mut rows = BTreeMap::new();
    for mut held in taking.held {
        while let Some(next) = held.pop() {
            let Some((table, row, count)) = next else { continue };
            let id = RowIdentity::of(&held.tables[table], &row).text().to_owned();
            assert!(rows.insert(id, (row.version.clone(), count)).is_none(), "twice");
        }
    }
    let expected = world.expected(ast).into_iter();
    let expected = expected.map(|(id, (count, _, row))| (id, (row.version.clone(), count as i64)));
    assert_eq!(rows, expected.collect());
}

/// Rows before and behind the place change, come and go, one in every pause.
#[test]
fn a_query_that_changes_all_the_time_is_taken_in_slices() {
    let (mut world, ast, mut taking) = begin();
    let mut slices = 1;
    loop {
        let before = world.told;
        let done = taking.step(&mut world, &mut Waste::default()).unwrap();
        assert!(world.told - before <= SLICE, "{} rows in one slice", world.told - before);
        if done {
            break;
        }
        let at = (slices % 5 != 0).then_some(slices);
        world.commit(vec![issue(&world, slices * 17 % (ISSUES + 5), at)]);
        slices += 1;
    }
    // All rows, and one that has changed per slice: none of them is taken anew.
    assert!(slices <= ISSUES.div_ceil(SLICE - 1) + 2, "{slices} slices");
    assert_eq!(world.readings(), 0, "what happens from now on is nobody's business");
    check(&world, &ast, taking);
}

#[test]
fn a_query_that_starts_over_is_taken_anew() {
    let (mut world, ast, mut taking) = begin();
    for _ in 0..5 {
        assert!(!taking.step(&mut world, &mut Waste::default()).unwrap());
    }
    world.commit((10..30).map(|n| issue(&world, n, (n % 3 > 0).then_some(7))).collect());
    while !taking.step(&mut world, &mut Waste::default()).unwrap() {}
    check(&world, &ast, taking);
}
