//! The worked examples of spec zql-ivm §4.14, with our evidence: the three smallest by key.

use serde_json::{Value as Json, json};

use super::kit::{Change, Kit, only, table};
use crate::ivm::engine::EngineConfig;
use crate::schema::ValueType::{Number, String as Text};

pub(super) fn kit() -> Kit {
    let tables = vec![
        table(0, "issue", &[("id", Text), ("title", Text), ("n", Number)]),
        table(1, "comment", &[("id", Text), ("issueID", Text), ("t", Text)]),
    ];
    let mut rows: Vec<Change> = Vec::new();
    for i in 1..=4 {
        rows.push(("issue", json!([format!("i{i}"), format!("title {i}"), i])));
        for c in 0..[0, 3, 4, 5][i - 1] {
            let t = if c % 2 == 0 { "b" } else { "a" };
            rows.push(("comment", json!([format!("c{i}{c}"), format!("i{i}"), t])));
        }
    }
    Kit::new(EngineConfig::default(), tables, &rows)
}

/// A query's rows after hydration, and what each commit emits.
pub(super) fn example(query: Json, hydrated: &str, steps: &[(&[Change], &str)]) {
    let mut kit = kit();
    let id = kit.subscribe(&query);
    kit.hydrate(id);
    assert_eq!(kit.rows(id), hydrated, "hydration of {query}");
    kit.check(id, &query);
    for (changes, emitted) in steps {
        assert_eq!(only(&kit.change(changes)), *emitted, "{changes:?} in {query}");
        kit.check(id, &query);
    }
}

pub(super) fn comments(body: Json) -> Json {
    let mut subquery = json!({"table": "comment", "alias": "comments"});
    for (k, v) in body.as_object().unwrap() {
        subquery[k] = v.clone();
    }
    json!({"correlation": {"parentField": ["id"], "childField": ["issueID"]}, "subquery": subquery})
}

pub(super) fn exists(op: &str, related: Json) -> Json {
    json!({"type": "correlatedSubquery", "op": op, "related": related})
}

pub(super) fn simple(column: &str, value: Json) -> Json {
    json!({"type": "simple", "op": "=", "left": {"type": "column", "name": column},
           "right": {"type": "literal", "value": value}})
}

pub(super) fn all_of(op: &str, conditions: Json) -> Json {
    json!({"type": op, "conditions": conditions})
}

const COMMENTS_OF_2_3_4: &str = "+c20 +c21 +c22 +c30 +c31 +c32 +c40 +c41 +c42 +i2 +i3 +i4";

#[test]
fn exists_keeps_three_rows_of_evidence() {
    let query = json!({"table": "issue", "where": exists("EXISTS", comments(json!({})))});
    example(
        query.clone(),
        COMMENTS_OF_2_3_4,
        &[
            (&[("comment", json!(["c20"]))], "-c20"),
            (&[("comment", json!(["c40"]))], "-c40 +c43"),
            (&[("issue", json!(["i9", "new", 9]))], ""),
            (&[("comment", json!(["c90", "i9", "a"]))], "+c90 +i9"),
            (&[("comment", json!(["c91", "i9", "a"]))], "+c91"),
            (&[("comment", json!(["c90"]))], "-c90"),
            (&[("comment", json!(["c91"]))], "-c91 -i9"),
            (&[("comment", json!(["c21", "i2", "z"]))], "~c21"),
            (&[("comment", json!(["c44", "i4", "z"]))], ""),
        ],
    );
    // A re-parented comment stays in the result; only its contents change.
    example(query, COMMENTS_OF_2_3_4, &[(&[("comment", json!(["c20", "i1", "b"]))], "~c20 +i1")]);
}

#[test]
fn not_exists_has_no_evidence() {
    example(
        json!({"table": "issue", "where": exists("NOT EXISTS", comments(json!({})))}),
        "+i1",
        &[
            (&[("comment", json!(["c10", "i1", "a"]))], "-i1"),
            (&[("comment", json!(["c10"]))], "+i1"),
        ],
    );
}

#[test]
fn each_branch_of_an_or_has_its_evidence() {
    let branch = |t: &str| exists("EXISTS", comments(json!({"where": simple("t", json!(t))})));
    let both = all_of("or", json!([branch("a"), branch("b")]));
    example(
        json!({"table": "issue", "where": all_of("and", json!([simple("id", json!("i2")), both]))}),
        "+c20 +c21 +c22 +i2",
        &[
            (&[("comment", json!(["c21"]))], "-c21"),
            (&[("comment", json!(["c20"])), ("comment", json!(["c22"]))], "-c20 -c22 -i2"),
        ],
    );
}

#[test]
fn a_body_with_limit_zero_is_false_and_has_no_evidence() {
    let body = exists("EXISTS", comments(json!({"limit": 0})));
    example(
        json!({"table": "issue", "where": all_of("or", json!([body, simple("n", json!(2))]))}),
        "+i2",
        &[(&[("comment", json!(["c20"]))], "")],
    );
}

#[test]
fn rows_enter_and_leave_a_window() {
    let query = json!({"table": "issue", "orderBy": [["n", "asc"]], "limit": 2});
    example(
        query.clone(),
        "+i1 +i2",
        &[
            (&[("issue", json!(["i1", "t", 10]))], "-i1 +i3"),
            (&[("issue", json!(["i0", "t", 0]))], "+i0 -i3"),
            (&[("issue", json!(["i0"]))], "-i0 +i3"),
        ],
    );
    example(
        query,
        "+i1 +i2",
        &[
            (&[("issue", json!(["i4", "t", 0]))], "-i2 +i4"),
            (&[("issue", json!(["i4", "t", 0.5]))], "~i4"),
        ],
    );
}

#[test]
fn a_cursor_that_excludes_its_row() {
    example(
        json!({"table": "issue", "orderBy": [["n", "asc"]],
               "start": {"row": {"n": 2, "id": "i2"}, "exclusive": true}}),
        "+i3 +i4",
        &[
            (&[("issue", json!(["i1", "t", 9]))], "+i1"),
            (&[("issue", json!(["i1", "t", 1]))], "-i1"),
        ],
    );
}

#[test]
fn a_related_window_per_parent() {
    let related = comments(json!({"orderBy": [["t", "asc"]], "limit": 1}));
    example(
        json!({"table": "issue", "related": [related]}),
        "+c21 +c31 +c41 +i1 +i2 +i3 +i4",
        &[
            (&[("comment", json!(["c21"]))], "+c20 -c21"),
            (&[("issue", json!(["i2", "new", 2]))], "~i2"),
            (&[("issue", json!(["i3"]))], "-c31 -i3"),
        ],
    );
}

#[test]
fn evidence_and_related_rows_add_up() {
    let one =
        all_of("and", json!([simple("id", json!("i2")), exists("EXISTS", comments(json!({})))]));
    example(
        json!({"table": "issue", "where": one, "related": [comments(json!({"limit": 1}))]}),
        "+c20×2 +c21 +c22 +i2",
        &[(&[("comment", json!(["c20"]))], "-c20×2 =c21×2")],
    );
}

#[test]
fn permission_rows_stay_on_the_server() {
    let mut rule = comments(json!({}));
    rule["system"] = json!("permissions");
    example(
        json!({"table": "issue", "where": exists("EXISTS", rule)}),
        "+i2 +i3 +i4",
        &[
            (&[("comment", json!(["c20"]))], ""),
            (&[("comment", json!(["c21"])), ("comment", json!(["c22"]))], "-i2"),
        ],
    );
}

#[test]
fn a_window_over_an_exists() {
    example(
        json!({"table": "issue", "orderBy": [["n", "asc"]], "limit": 1,
               "where": exists("EXISTS", comments(json!({})))}),
        "+c20 +c21 +c22 +i2",
        &[
            (&[("issue", json!(["i2"]))], "-c20 -c21 -c22 +c30 +c31 +c32 -i2 +i3"),
            (&[("comment", json!(["c10", "i1", "a"]))], "+c10 -c30 -c31 -c32 +i1 -i3"),
        ],
    );
}

fn same_n(body: Json) -> Json {
    let mut subquery = json!({"table": "issue", "alias": "twins"});
    for (k, v) in body.as_object().unwrap() {
        subquery[k] = v.clone();
    }
    json!({"correlation": {"parentField": ["n"], "childField": ["n"]}, "subquery": subquery})
}

#[test]
fn a_row_is_its_own_evidence() {
    example(
        json!({"table": "issue", "where": exists("EXISTS", same_n(json!({})))}),
        "+i1×2 +i2×2 +i3×2 +i4×2",
        &[
            (&[("issue", json!(["i5", "t", 7]))], "+i5×2"),
            // Two parents share the evidence of one key.
            (&[("issue", json!(["i5", "t", 1]))], "=i1×3 ~i5×3"),
            (&[("issue", json!(["i5", "t", null]))], "=i1×2 -i5×3"),
        ],
    );
}

#[test]
fn a_row_forbids_its_twins() {
    let body = same_n(json!({"where": simple("title", json!("x"))}));
    example(
        json!({"table": "issue", "where": exists("NOT EXISTS", body)}),
        "+i1 +i2 +i3 +i4",
        &[(&[("issue", json!(["i5", "x", 2]))], "-i2"), (&[("issue", json!(["i5"]))], "+i2")],
    );
}

/// Checklist 43: rows that nobody holds.
#[test]
fn what_stops_matching_below_a_not_exists_lets_its_parent_in() {
    let gone = |op: &str, inner: Json| exists(op, comments(json!({"where": inner})));
    let by_t = |op: &str, t: &str| {
        let related = json!({"correlation": {"parentField": ["t"], "childField": ["title"]},
            "subquery": {"table": "issue", "alias": t, "where": simple("title", json!(t))}});
        exists(op, related)
    };
    // A comment counts while an issue has its `t` as title.
    let either = all_of("and", json!([by_t("EXISTS", "a"), by_t("NOT EXISTS", "q")]));
    example(
        json!({"table": "issue", "where": gone("NOT EXISTS", either)}),
        "+i1 +i2 +i3 +i4",
        &[
            (&[("issue", json!(["x", "a", 0]))], "-i2 -i3 -i4 +x"),
            (&[("issue", json!(["x"]))], "+i2 +i3 +i4 -x"),
        ],
    );
    let twice = exists("NOT EXISTS", comments(json!({"where": by_t("NOT EXISTS", "a")})));
    example(
        json!({"table": "issue", "where": twice}),
        "+i1",
        &[
            (&[("comment", json!(["c20"])), ("comment", json!(["c22"]))], ""),
            (&[("issue", json!(["x", "a", 0]))], "+i2 +x"),
            (&[("issue", json!(["x"]))], "-i2 -x"),
        ],
    );
}

/// Checklist 44.
#[test]
fn a_window_moves_past_all_parents_of_one_key() {
    let tables = vec![
        table(0, "a", &[("id", Text), ("k", Number)]),
        table(1, "h", &[("id", Text), ("n", Number)]),
    ];
    let rows: Vec<Change> = vec![
        ("a", json!(["a0", 1])),
        ("a", json!(["a1", 1])),
        ("a", json!(["a5", 1])),
        ("a", json!(["a8", 1])),
        ("a", json!(["a9", 2])),
        ("h", json!(["h1", 1])),
        ("h", json!(["h2", 2])),
    ];
    let mut kit = Kit::new(EngineConfig::default(), tables, &rows);
    let related = json!({"correlation": {"parentField": ["k"], "childField": ["n"]},
                         "subquery": {"table": "h", "alias": "h"}});
    let query = json!({"table": "a", "limit": 1,
                       "where": all_of("or", json!([exists("EXISTS", related)]))});
    let id = kit.subscribe(&query);
    kit.hydrate(id);
    assert_eq!(kit.rows(id), "+a0 +h1");
    assert_eq!(only(&kit.change(&[("h", json!(["h1"]))])), "-a0 +a9 -h1 +h2");
    kit.check(id, &query);
}
