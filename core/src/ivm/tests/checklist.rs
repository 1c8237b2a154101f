//! Items of the conformance checklist that no worked example covers.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::examples::{all_of, comments, example, exists, simple};
use super::kit::{Change, Kit, only, table};
use crate::ivm::engine::EngineConfig;
use crate::schema::ValueType::{Number, String as Text};
use crate::schema::{TableSpec, UniqueKey};

/// 12.
#[test]
fn a_limit_of_zero_is_no_row_no_child_false_or_true() {
    let all = "+i1 +i2 +i3 +i4";
    let change: &[(&[Change], &str)] = &[(&[("comment", json!(["c50", "i1", "a"]))], "")];
    example(json!({"table": "issue", "limit": 0}), "", change);
    let none = || comments(json!({"limit": 0}));
    example(json!({"table": "issue", "related": [none()]}), all, change);
    example(json!({"table": "issue", "where": exists("NOT EXISTS", none())}), all, change);
    example(json!({"table": "issue", "where": exists("EXISTS", none())}), "", change);
}

/// 14.
#[test]
fn null_joins_with_nothing() {
    let issue = |op: &str| {
        json!({"type": "correlatedSubquery", "op": op, "related": {
            "correlation": {"parentField": ["t"], "childField": ["title"]},
            "subquery": {"table": "issue", "alias": "i"}}})
    };
    let steps = |there: &'static str, back: &'static str| {
        [
            (vec![("comment", json!(["c1", null, null]))], there),
            (vec![("issue", json!(["i0", null, 0]))], ""),
            (vec![("comment", json!(["c1", null, "title 1"]))], back),
        ]
    };
    let id = simple("id", json!("c1"));
    for (op, there, back) in [("EXISTS", "", "+c1 +i1"), ("NOT EXISTS", "+c1", "-c1")] {
        let steps = steps(there, back);
        let steps: Vec<(&[Change], &str)> = steps.iter().map(|(c, e)| (&c[..], *e)).collect();
        let query = json!({"table": "comment", "where": all_of("and", json!([id, issue(op)]))});
        example(query, "", &steps);
    }
    let related = json!({"correlation": {"parentField": ["t"], "childField": ["title"]},
        "subquery": {"table": "issue", "alias": "i"}});
    let steps = steps("+c1", "~c1 +i1");
    let steps: Vec<(&[Change], &str)> = steps.iter().map(|(c, e)| (&c[..], *e)).collect();
    example(json!({"table": "comment", "where": id, "related": [related]}), "", &steps);
}

/// 28 and 45: under a client's key, rows of the replica that exchange it are updates.
#[test]
fn rows_that_exchange_the_clients_key_are_updates() {
    let mut spec = TableSpec::clone(&table(0, "t", &[("id", Text), ("u", Text), ("n", Number)]));
    spec.primary_key = vec![1];
    spec.unique_keys.push(UniqueKey { columns: vec![1], not_null: true });
    let rows: Vec<Change> = vec![("t", json!(["a", "x", 1])), ("t", json!(["b", "y", 2]))];
    let mut kit = Kit::new(EngineConfig::default(), vec![Arc::new(spec)], &rows);
    let query = json!({"table": "t", "orderBy": [["n", "asc"]], "limit": 2});
    let id = kit.subscribe(&query);
    kit.hydrate(id);
    let swap: &[Change] = &[("t", json!(["a", "y", 1])), ("t", json!(["b", "x", 2]))];
    assert_eq!(only(&kit.change(swap)), "~x ~y");
    kit.check(id, &query);
    // In two transactions that arrive together, by way of a third value.
    let first = kit.commit(&[("t", json!(["a", "z", 1]))]);
    let second = kit.commit(&[("t", json!(["b", "y", 2])), ("t", json!(["a", "x", 1]))]);
    assert_eq!(only(&kit.advance(&[first, second])), "~x ~y");
    kit.check(id, &query);
    // Deleted and inserted again under the same key.
    assert_eq!(only(&kit.change(&[("t", json!(["a"])), ("t", json!(["c", "x", 3]))])), "~x");
    kit.check(id, &query);
}

fn scalar(body: Json, hints: &Json) -> Json {
    let mut condition = exists("EXISTS", comments(body));
    for (k, v) in hints.as_object().unwrap() {
        condition[k] = v.clone();
    }
    condition
}

/// 32 and 33.
#[test]
fn a_scalar_subquery_follows_its_row() {
    let of_c20 = json!({"where": simple("id", json!("c20"))});
    for hints in [json!({}), json!({"scalar": true}), json!({"scalar": true, "flip": true})] {
        example(
            json!({"table": "issue", "where": scalar(of_c20.clone(), &hints)}),
            "+c20 +i2",
            &[
                (&[("comment", json!(["c20", "i3", "b"]))], "~c20 -i2 +i3"),
                (&[("comment", json!(["c20", null, "b"]))], "-c20 -i3"),
                (&[("comment", json!(["c20", "i1", "b"]))], "+c20 +i1"),
                (&[("comment", json!(["c20", "i1", "z"]))], "~c20"),
                (&[("comment", json!(["c20"]))], "-c20 -i1"),
                (&[("comment", json!(["c20", "i4", "b"]))], "+c20 +i4"),
            ],
        );
        let not = json!({"op": "NOT EXISTS"});
        let mut condition = scalar(of_c20.clone(), &hints);
        condition["op"] = not["op"].clone();
        example(
            json!({"table": "issue", "where": condition}),
            "+i1 +i3 +i4",
            &[
                (&[("comment", json!(["c20", null, "b"]))], "+i2"),
                (&[("comment", json!(["c20", "i1", "b"]))], "-i1"),
                (&[("comment", json!(["c20"]))], "+i1"),
            ],
        );
    }
}

/// 46 and 17.
#[test]
fn scalars_of_rules_are_silent_and_evidence_below_a_scalar_is_not() {
    let of_c20 = json!({"where": simple("id", json!("c20"))});
    let mut rule = scalar(of_c20, &json!({"scalar": true}));
    rule["related"]["system"] = "permissions".into();
    example(
        json!({"table": "issue", "where": rule}),
        "+i2",
        &[(&[("comment", json!(["c20", "i3", "b"]))], "-i2 +i3")],
    );
    let nested = |op: &str, title: &str| {
        let of_issue = json!({"type": "correlatedSubquery", "op": op, "related": {
            "correlation": {"parentField": ["issueID"], "childField": ["id"]},
            "subquery": {"table": "issue", "alias": "i", "where": simple("title", json!(title))}}});
        let body = json!({"where": all_of("and", json!([simple("id", json!("c20")), of_issue]))});
        json!({"table": "issue", "where": scalar(body, &json!({"scalar": true}))})
    };
    example(
        nested("EXISTS", "title 2"),
        "+c20 +i2×2",
        &[(&[("issue", json!(["i2", "x", 2]))], "-c20 -i2×2")],
    );
    example(
        nested("NOT EXISTS", "x"),
        "+c20 +i2",
        &[
            (&[("issue", json!(["i2", "x", 2]))], "-c20 -i2"),
            (&[("issue", json!(["i2", "y", 2]))], "+c20 +i2"),
        ],
    );
}
