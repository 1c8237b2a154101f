//! Groups that come back to the rows that they had read no records; all others do.

use std::collections::BTreeMap;

use super::super::{ConnId, KEEP_ALIVE_MS};
use super::client::Persisted;
use super::harness::Harness;
use super::scenarios::{ALL_ISSUES, drop_issue, issue, joined, lmid, put, rejoin};
use crate::json::row::wire_json;
use crate::value::Value;

const WINDOW: &str = r#"{"table":"issue","orderBy":[["n","asc"]],"limit":2}"#;
const COMMENTS_WITH_ISSUE: &str = r#"{"table":"comment","orderBy":[["id","asc"]],"related":[{"correlation":{"parentField":["issue"],"childField":["id"]},"subquery":{"table":"issue","alias":"issue","orderBy":[["id","asc"]]}}]}"#;

/// A group with this query is up, and has been let go.
fn left(h: &mut Harness, ast: &str) -> Persisted {
    let changes = [("i1", 1.0), ("i2", 2.0), ("i3", 3.0)].map(|(id, n)| issue(h, id, n));
    h.commit(changes.into());
    let conn = joined(h, "c", &put("q", ast));
    let state = h.disconnect(conn);
    h.pass(KEEP_ALIVE_MS + 1.0);
    assert!(h.groups.is_empty());
    state
}

/// It comes back, and has what the query says now; also told: groups of records that were read.
fn back(h: &mut Harness, ast: &str, state: Persisted) -> (ConnId, usize) {
    let reads = h.row_reads;
    let conn = rejoin(h, "c", state);
    assert_eq!(h.error_kind(conn), None);
    let expected = h.world.expected(&serde_json::from_str(ast).expect("an AST"));
    let rows: BTreeMap<_, _> = expected
        .into_iter()
        .map(|(id, (_, table, row))| {
            let json = wire_json(&table, &row).expect("deliverable");
            let json: serde_json::Value = serde_json::from_slice(json).expect("JSON");
            ((table.name.to_string(), id), json.to_string())
        })
        .collect();
    assert_eq!(h.state(conn).rows, rows);
    assert_eq!(h.store.anomalies, 0);
    (conn, h.row_reads - reads)
}

#[test]
fn changed_contents_and_mutations_are_told_from_the_instances_alone() {
    let mut h = Harness::new(false);
    let state = left(&mut h, ALL_ISSUES);
    let written = h.store.rows_written;
    let changes = vec![issue(&h, "i2", 7.0), lmid(&h, "g", "c", 4.0)];
    h.commit(changes);
    let (conn, reads) = back(&mut h, ALL_ISSUES, state);
    assert_eq!((reads, h.state(conn).lmids["c"]), (1, 4), "a mutation id is a new row");
    assert_eq!(h.store.rows_written - written, 2);
    let state = h.disconnect(conn);
    h.pass(KEEP_ALIVE_MS + 1.0);
    let changes = vec![issue(&h, "i2", 8.0), lmid(&h, "g", "c", 5.0)];
    h.commit(changes);
    let (conn, reads) = back(&mut h, ALL_ISSUES, state);
    assert_eq!((reads, h.state(conn).lmids["c"]), (0, 5));
    assert_eq!(h.store.rows_written - written, 4, "only what changed");
    // The records are right: another server that reads them all finds nothing to do.
    let state = h.disconnect(conn);
    h.pass(KEEP_ALIVE_MS + 1.0);
    let flushes = h.store.flushes;
    h.store.foreign = true;
    let gone = drop_issue(&h, "i9");
    h.commit(vec![gone]);
    back(&mut h, ALL_ISSUES, state);
    assert_eq!(h.store.flushes, flushes);
}

#[test]
fn rows_that_came_or_went_are_found_in_the_records() {
    for (gone, new) in [(Some("i1"), None), (None, Some("i4")), (Some("i1"), Some("i4"))] {
        let mut h = Harness::new(false);
        let state = left(&mut h, ALL_ISSUES);
        let gone = gone.map(|id| drop_issue(&h, id));
        let new = new.map(|id| issue(&h, id, 4.0));
        h.commit(gone.into_iter().chain(new).collect());
        let (_, reads) = back(&mut h, ALL_ISSUES, state);
        assert_eq!(reads, 1);
    }
}

/// In `comment → issue` an issue can be there twice, and its signature says nothing of it.
#[test]
fn rows_that_a_signature_says_nothing_of_are_found_in_the_records() {
    let mut h = Harness::new(false);
    let comment = |h: &Harness, id: &str, of: &str| {
        let values = [id, of, "text"].map(Value::string).to_vec();
        (h.world.table("comment"), [Value::string(id)].into_iter().collect(), Some(values))
    };
    let changes = vec![comment(&h, "c1", "i1"), comment(&h, "c2", "i1")];
    h.commit(changes);
    let state = left(&mut h, COMMENTS_WITH_ISSUE);
    // Both move on: the same comments, and an even number of occurrences of each issue.
    let changes = vec![comment(&h, "c1", "i2"), comment(&h, "c2", "i2")];
    h.commit(changes);
    let (_, reads) = back(&mut h, COMMENTS_WITH_ISSUE, state);
    assert_eq!(reads, 1);
}

/// A signature that a server did not keep up to date misleads about rows that come without having
/// changed: in a window, for example.
#[test]
fn a_window_of_another_server_is_compared_with_its_records() {
    for (foreign, expected) in [(false, 0), (true, 1)] {
        let mut h = Harness::new(false);
        let state = left(&mut h, WINDOW);
        h.store.foreign = foreign;
        let change = issue(&h, "i3", 9.0);
        h.commit(vec![change]);
        let (_, reads) = back(&mut h, WINDOW, state);
        assert_eq!(reads, expected, "foreign: {foreign}");
    }
}

#[test]
fn late_clients_and_new_queries_have_the_records_read() {
    let mut h = Harness::new(false);
    let late = left(&mut h, ALL_ISSUES);
    let change = issue(&h, "i1", 5.0);
    h.commit(vec![change]);
    let (conn, reads) = back(&mut h, ALL_ISSUES, late.clone());
    assert_eq!(reads, 0);
    h.disconnect(conn);
    h.pass(KEEP_ALIVE_MS + 1.0);
    let change = issue(&h, "i2", 5.0);
    h.commit(vec![change]);
    // Its cookie is of before: the change of `i1` is missing, too.
    let (_, reads) = back(&mut h, ALL_ISSUES, late);
    assert_eq!(reads, 1);
}
