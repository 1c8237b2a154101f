//! Cost follows what is affected: shared instances, routed changes, work counted not timed.

use serde_json::{Value as Json, json};

use super::kit::{Change, Kit, only, table, words};
use crate::ivm::engine::{EngineConfig, InstanceId};
use crate::ivm::stats::Counters;
use crate::schema::ValueType::{Number, String as Text};

/// Projects, each with one instance.
const PROJECTS: usize = 2_000;

fn kit() -> Kit {
    let tables = vec![
        table(0, "issue", &[("id", Text), ("project", Number), ("rank", Number)]),
        table(1, "label", &[("id", Text), ("issue", Text), ("name", Text)]),
    ];
    let mut rows: Vec<Change> = Vec::new();
    for p in 0..PROJECTS {
        rows.push(("issue", json!([format!("i{p}"), p, 0])));
    }
    Kit::new(EngineConfig::default(), tables, &rows)
}

fn of_project(project: usize) -> Json {
    json!({"type": "simple", "op": "=", "left": {"type": "column", "name": "project"},
           "right": {"type": "literal", "value": project}})
}

fn work(kit: &Kit) -> Counters {
    kit.engine.stats().counters
}

fn subscribe_all(kit: &mut Kit, query: impl Fn(usize) -> Json) -> Vec<InstanceId> {
    let ids: Vec<_> = (0..PROJECTS).map(|p| kit.subscribe(&query(p))).collect();
    ids.iter().for_each(|&id| kit.hydrate(id));
    ids
}

#[test]
fn equal_queries_share_an_instance_and_its_work() {
    let mut kit = kit();
    let query = json!({"table": "issue", "where": of_project(7)});
    let ids: Vec<_> = (0..100).map(|_| kit.subscribe(&query)).collect();
    assert!(ids.iter().all(|&id| id == ids[0]));
    kit.hydrate(ids[0]);
    assert_eq!(kit.source.fetches, 1);
    let advanced = kit.change(&[("issue", json!(["x", 7, 0]))]);
    assert_eq!(only(&advanced), "+x");
    let stats = kit.engine.stats();
    assert_eq!((stats.instances, stats.subscriptions, stats.plans), (1, 100, 1));
    for &id in &ids[1..] {
        kit.engine.unsubscribe(id);
    }
    assert_eq!(kit.rows(ids[0]), "+i7 +x");
    kit.engine.unsubscribe(ids[0]);
    assert!(kit.engine.status(ids[0]).is_err());
    assert_ne!(kit.subscribe(&query), ids[0], "ids are not reused");
}

#[test]
fn a_changed_row_reaches_only_the_instance_of_its_project() {
    let mut kit = kit();
    let ids = subscribe_all(&mut kit, |p| json!({"table": "issue", "where": of_project(p)}));
    assert_eq!(kit.engine.stats().plans, 1);
    let before = work(&kit);
    let advanced = kit.change(&[("issue", json!(["i7", 8, 0]))]);
    let after = work(&kit);
    assert_eq!(after.advances - before.advances, 2);
    assert_eq!(after.rest_evaluations, 0);
    let delta = |p: usize| {
        let d = advanced.deltas.iter().find(|d| d.instance == ids[p]);
        words(&d.unwrap().rows)
    };
    assert_eq!((advanced.deltas.len(), delta(7), delta(8)), (2, "-i7".into(), "+i7".into()));
}

#[test]
fn a_changed_row_of_a_shared_body_is_looked_up_once() {
    let labelled = |p: usize| {
        let related = json!({"correlation": {"parentField": ["id"], "childField": ["issue"]},
            "subquery": {"table": "label", "alias": "l", "where":
                {"type": "simple", "op": "=", "left": {"type": "column", "name": "name"},
                 "right": {"type": "literal", "value": "bug"}}}});
        let exists = json!({"type": "correlatedSubquery", "op": "EXISTS", "related": related});
        json!({"table": "issue",
               "where": {"type": "and", "conditions": [of_project(p), exists]}})
    };
    let mut kit = kit();
    let ids = subscribe_all(&mut kit, labelled);
    let (before, fetches) = (work(&kit), kit.source.fetches);
    let advanced = kit.change(&[("label", json!(["l1", "i7", "bug"]))]);
    let after = work(&kit);
    assert_eq!(only(&advanced), "+i7 +l1");
    assert_eq!(advanced.deltas[0].instance, ids[7]);
    assert_eq!(after.advances - before.advances, 1);
    assert_eq!(after.leaf_fanouts, 0);
    assert_eq!(after.shared_searches - before.shared_searches, 1);
    // The parents, the truth of the leaf, the evidence.
    assert_eq!(kit.source.fetches - fetches, 3);
    // A label that no query asks for costs nothing.
    let fetches = kit.source.fetches;
    assert!(kit.change(&[("label", json!(["l2", "i8", "later"]))]).deltas.is_empty());
    assert_eq!(kit.source.fetches, fetches);
    kit.check(ids[7], &labelled(7));
}

#[test]
fn a_child_row_reaches_only_the_instances_that_hold_its_parent() {
    let with_labels = |p: usize| {
        let related = json!({"correlation": {"parentField": ["id"], "childField": ["issue"]},
            "subquery": {"table": "label", "alias": "l"}});
        json!({"table": "issue", "where": of_project(p), "related": [related]})
    };
    let mut kit = kit();
    let ids = subscribe_all(&mut kit, with_labels);
    let (before, fetches) = (work(&kit), kit.source.fetches);
    let advanced = kit.change(&[("label", json!(["l1", "i7", "bug"]))]);
    assert_eq!(only(&advanced), "+l1");
    assert_eq!(advanced.deltas[0].instance, ids[7]);
    assert_eq!(work(&kit).advances - before.advances, 1);
    assert_eq!(kit.source.fetches, fetches, "everything needed is in memory");
}

/// Five queries that compare the rank, after a commit that gives one row rank 2.
fn compared(op: &str) -> (Kit, usize) {
    let mut kit = kit();
    for rank in 0..5 {
        let id = kit.subscribe(&json!({"table": "issue", "limit": 3, "where":
            {"type": "simple", "op": op, "left": {"type": "column", "name": "rank"},
             "right": {"type": "literal", "value": rank}}}));
        kit.hydrate(id);
    }
    let advanced = kit.change(&[("issue", json!(["i7", 7, 2]))]);
    (kit, advanced.deltas.len())
}

#[test]
fn ranges_are_found_by_their_bounds() {
    let (kit, deltas) = compared(">");
    assert_eq!(deltas, 2);
    assert_eq!((work(&kit).rest_evaluations, work(&kit).advances), (0, 2));
}

#[test]
fn other_comparisons_are_evaluated_once_per_distinct_parameter() {
    let (kit, deltas) = compared("!=");
    assert_eq!(deltas, 1);
    // Where all ranks but one qualify, the row is behind the window.
    assert_eq!((work(&kit).rest_evaluations, work(&kit).advances), (5, 1));
}

#[test]
fn more_of_the_same_evidence_reads_nothing() {
    let related = json!({"correlation": {"parentField": ["id"], "childField": ["issue"]},
        "subquery": {"table": "label", "alias": "l"}});
    let exists = json!({"type": "correlatedSubquery", "op": "EXISTS", "related": related});
    let query = json!({"table": "issue", "where": exists});
    let mut kit = kit();
    let id = kit.subscribe(&query);
    kit.hydrate(id);
    assert_eq!(only(&kit.change(&[("label", json!(["l1", "i7", "bug"]))])), "+i7 +l1");
    let fetches = kit.source.fetches;
    assert_eq!(only(&kit.change(&[("label", json!(["l2", "i7", "bug"]))])), "+l2");
    assert_eq!(only(&kit.change(&[("label", json!(["l1"]))])), "-l1");
    assert_eq!(kit.source.fetches, fetches);
    kit.check(id, &query);
}

fn condition(column: &str, op: &str, value: Json) -> Json {
    json!({"type": "simple", "op": op, "left": {"type": "column", "name": column},
           "right": {"type": "literal", "value": value}})
}

fn combined(op: &str, conditions: &[Json]) -> Json {
    json!({"type": op, "conditions": conditions})
}

/// Queries of one shape, of which one change concerns one, found without looking at the others.
fn routed_alone(query: impl Fn(usize) -> Json, change: Change, whom: usize) {
    let mut kit = kit();
    let ids = subscribe_all(&mut kit, |n| json!({"table": "issue", "where": query(n)}));
    let before = work(&kit);
    let advanced = kit.change(&[change]);
    let after = work(&kit);
    assert_eq!((after.rest_evaluations, after.advances - before.advances), (0, 1));
    assert_eq!((advanced.deltas.len(), advanced.deltas[0].instance), (1, ids[whom]));
}

#[test]
fn an_or_of_equalities_is_found_by_each_of_them() {
    // More than the projects that there are: nobody else's.
    let far = PROJECTS * 2;
    let same_column =
        |n: usize| combined("or", &[of_project(far + 2 * n), of_project(far + 2 * n + 1)]);
    routed_alone(same_column, ("issue", json!(["x", far + 14, 0])), 7);
    routed_alone(same_column, ("issue", json!(["x", far + 15, 0])), 7);
    let two_columns =
        |n: usize| combined("or", &[of_project(far + n), condition("rank", "=", json!(far + n))]);
    routed_alone(two_columns, ("issue", json!(["x", far + 7, 0])), 7);
    routed_alone(two_columns, ("issue", json!(["x", 0, far + 8])), 8);
    let nested = |n: usize| {
        let rank = condition("rank", ">", json!(3));
        let list = condition("project", "IN", json!([far + 2 * n, far + 2 * n + 1]));
        let id = condition("id", "=", json!(format!("x{n}")));
        combined("and", &[rank.clone(), combined("or", &[combined("and", &[rank, id]), list])])
    };
    routed_alone(nested, ("issue", json!(["x", far + 15, 4])), 7);
    routed_alone(nested, ("issue", json!(["x8", 0, 4])), 8);
}

#[test]
fn an_or_with_another_branch_is_evaluated() {
    let mut kit = kit();
    let query = combined("or", &[of_project(1), condition("rank", "!=", json!(0))]);
    let id = kit.subscribe(&json!({"table": "issue", "where": query}));
    kit.hydrate(id);
    assert_eq!(only(&kit.change(&[("issue", json!(["x", 7, 1]))])), "+x");
    assert_eq!(work(&kit).rest_evaluations, 1);
}
