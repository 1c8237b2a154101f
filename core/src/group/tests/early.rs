//! Rows that go out while their query is being hydrated: an open poke, and everything that may
//! come in between ([`super::super::early`]).

use super::super::{ConnId, Event, ResetReason};
use super::client::Persisted;
use super::harness::{Harness, Waiting};
use super::scenarios::{ALL_ISSUES, change, drop_issue, init, issue, joined, put, rejoin};
use crate::cvr::ClientGroupId;
use crate::cvr::store::CvrStoreError;

const TOP: &str = r#"{"table":"issue","orderBy":[["n","desc"],["id","asc"]]}"#;

fn group() -> ClientGroupId {
    "g".into()
}

/// Issues `i0`, `i1`, …
fn issues(h: &mut Harness, count: u32) {
    let new = (0..count).map(|i| issue(h, &format!("i{i}"), f64::from(i))).collect();
    h.commit(new);
}

/// Rows of whatever is being hydrated go ahead, all that there are now; how many. Their clients
/// read them.
fn all_go_ahead(h: &mut Harness) -> usize {
    let rows = h.go_ahead(&group(), |rows| rows).expect("a query is being hydrated");
    let conns: Vec<ConnId> = h.sockets.keys().copied().collect();
    for conn in conns {
        while h.receive(conn) {}
    }
    rows
}

/// Answers questions until the group waits for a query to be hydrated.
fn until_hydrating(h: &mut Harness) {
    while h.go_ahead(&group(), |_| Vec::new()).is_none() {
        assert!(h.answer(&group()), "nothing is hydrated");
    }
}

/// A client that asks for all issues, of which there are `count`; they are being hydrated.
fn asking(h: &mut Harness, count: u32) -> ConnId {
    issues(h, count);
    let conn = joined(h, "c", "");
    h.say(conn, &change(&put("q", ALL_ISSUES)));
    until_hydrating(h);
    while h.receive(conn) {}
    conn
}

/// Settles; the client has the group's version, and so many issues.
fn expect(h: &mut Harness, conn: ConnId, rows: usize) {
    h.settle();
    assert_eq!(h.error_kind(conn), None, "{:?}", h.socket(conn).error);
    let state = h.state(conn);
    assert_eq!(state.cookie, Some(h.store.version(&group()).cookie()));
    assert_eq!(state.rows.len(), rows, "{:?}", state.rows);
    assert!(!h.socket(conn).has_open_poke());
}

fn rows_sent(h: &Harness, conn: ConnId) -> usize {
    h.socket(conn).model.row_patches
}

#[test]
fn rows_reach_the_client_before_their_query_is_hydrated_and_are_sent_once() {
    let mut h = Harness::new(false);
    let conn = asking(&mut h, 12);
    let cookie = h.state(conn).cookie.clone();
    assert_eq!(all_go_ahead(&mut h), 12);
    // Parts are cut at 100 patches only: what is left waits for the end.
    assert_eq!(h.socket(conn).model.open_parts(), Some(0), "the poke has begun");
    assert_eq!(h.state(conn).cookie, cookie, "nothing of it counts before its end");
    assert!(h.state(conn).rows.is_empty() && h.socket(conn).has_open_poke());
    expect(&mut h, conn, 12);
    assert_eq!(rows_sent(&h, conn), 12, "each once");
    assert!(h.state(conn).got.contains("q"));
    assert_eq!(h.socket(conn).model.cancelled, 0);
}

#[test]
fn parts_go_out_as_they_are_full() {
    let mut h = Harness::new(false);
    let conn = asking(&mut h, 250);
    all_go_ahead(&mut h);
    assert_eq!(h.socket(conn).model.open_parts(), Some(2));
    expect(&mut h, conn, 250);
    assert_eq!(rows_sent(&h, conn), 250);
}

#[test]
fn what_a_commit_changes_meanwhile_comes_as_it_is_in_the_end() {
    let mut h = Harness::new(false);
    let conn = asking(&mut h, 10);
    all_go_ahead(&mut h);
    // One changes, one goes, one comes, one goes and comes.
    let changes = vec![issue(&h, "i1", 100.0), drop_issue(&h, "i2"), issue(&h, "new", 0.0)];
    h.commit(changes);
    let gone = drop_issue(&h, "i3");
    h.commit(vec![gone]);
    all_go_ahead(&mut h);
    let back = issue(&h, "i3", 103.0);
    h.commit(vec![back]);
    expect(&mut h, conn, 10);
    let rows = &h.state(conn).rows;
    assert!(rows.values().any(|row| row.contains(r#""n":100"#)), "{rows:?}");
    assert!(rows.values().any(|row| row.contains(r#""n":103"#)), "{rows:?}");
    assert!(!rows.values().any(|row| row.contains(r#""id":"i2""#)), "{rows:?}");
    assert_eq!(h.socket(conn).model.cancelled, 0);
    // 10 at first, `i1` and `new` with the second look, `i2` taken back, `i3` again.
    assert_eq!(rows_sent(&h, conn), 14);
}

#[test]
fn rows_that_the_client_has_are_not_sent_again_and_stay_when_the_query_loses_them() {
    let mut h = Harness::new(false);
    issues(&mut h, 10);
    let few = r#"{"table":"issue","orderBy":[["id","asc"]],"limit":4}"#;
    let conn = joined(&mut h, "c", &put("few", few));
    assert_eq!(h.state(conn).rows.len(), 4);
    let before = rows_sent(&h, conn);
    h.say(conn, &change(&put("q", TOP)));
    until_hydrating(&mut h);
    assert_eq!(all_go_ahead(&mut h), 10);
    let gone = drop_issue(&h, "i9");
    h.commit(vec![gone]);
    expect(&mut h, conn, 9);
    // The six that were new, and the one that went.
    assert_eq!(rows_sent(&h, conn) - before, 7);
}

/// A failure after rows went out: the poke is taken back, and everybody ends with everything.
fn taken_back(fail: impl FnOnce(&mut Harness)) -> (Harness, ConnId) {
    let mut h = Harness::new(false);
    issues(&mut h, 9);
    // Another tab, which is not to blame for what the first one asks.
    let other = joined(&mut h, "d", "");
    let conn = joined(&mut h, "c", "");
    h.say(conn, &change(&put("q", ALL_ISSUES)));
    until_hydrating(&mut h);
    all_go_ahead(&mut h);
    let cookie = h.state(other).cookie.clone();
    fail(&mut h);
    h.settle();
    assert!(!h.socket(other).has_open_poke());
    if h.error_kind(other).is_none() {
        assert_eq!(h.socket(other).model.cancelled, 1);
    } else {
        assert_eq!(h.state(other).cookie, cookie, "what was taken back does not count");
        let state = h.disconnect(other);
        rejoin(&mut h, "d", state);
    }
    let state = if h.error_kind(conn).is_some() {
        assert!(h.state(conn).rows.is_empty(), "what was taken back does not count");
        h.disconnect(conn)
    } else {
        h.state(conn).clone()
    };
    let conn = rejoin(&mut h, "c", state);
    let both: Vec<ConnId> = h.sockets.iter().filter(|(_, s)| !s.closed).map(|(c, _)| *c).collect();
    for conn in both {
        expect(&mut h, conn, 9);
    }
    (h, conn)
}

#[test]
fn a_flush_that_is_refused_takes_them_back() {
    taken_back(|h| h.flush_faults.push_back(CvrStoreError::Storage("disk full".into())));
}

#[test]
fn a_flush_of_unknown_outcome_takes_them_back() {
    taken_back(|h| h.unknown_outcomes += 1);
}

#[test]
fn a_takeover_takes_them_back() {
    taken_back(|h| {
        let owner = CvrStoreError::Ownership {
            owner: "another".into(),
            granted_ms: h.now_ms + 1.0,
            connect_ms: h.now_ms,
        };
        h.flush_faults.push_back(owner);
    });
    taken_back(|h| {
        let (expected, actual) = ("00".into(), "01".into());
        h.flush_faults.push_back(CvrStoreError::ConcurrentModification { expected, actual });
    });
}

#[test]
fn a_reset_takes_them_back() {
    let (h, conn) = taken_back(|h| h.feed(&group(), Event::Reset(ResetReason::SchemaChange)));
    assert!(h.state(conn).got.contains("q"));
}

#[test]
fn a_query_that_cannot_be_hydrated_in_the_end_takes_its_rows_back() {
    let mut h = Harness::new(false);
    let conn = asking(&mut h, 9);
    all_go_ahead(&mut h);
    h.world.hydration_fault = Some("value 9007199254740993 is outside of supported bounds".into());
    h.settle();
    assert_eq!(h.socket(conn).model.cancelled, 1);
    assert_eq!(h.socket(conn).model.transform_errors, ["q"]);
    expect(&mut h, conn, 0);
    assert!(!h.state(conn).got.contains("q"));
}

#[test]
fn the_server_may_close_while_rows_are_on_their_way() {
    let mut h = Harness::new(false);
    let conn = asking(&mut h, 9);
    all_go_ahead(&mut h);
    h.feed(&group(), Event::Drain);
    h.settle();
    assert!(h.socket(conn).closed && h.error_kind(conn).is_none());
    let state = h.disconnect(conn);
    let conn = rejoin(&mut h, "c", state);
    expect(&mut h, conn, 9);
}

#[test]
fn a_tab_that_joins_meanwhile_gets_everything_when_the_first_has_it() {
    let mut h = Harness::new(false);
    let conn = asking(&mut h, 9);
    all_go_ahead(&mut h);
    let late = h.connect("g", "d", None, Persisted::default(), 52).expect("admitted");
    h.say(late, &init(&put("q", ALL_ISSUES)));
    all_go_ahead(&mut h);
    assert_eq!(h.socket(late).model.pokes, 0);
    expect(&mut h, conn, 9);
    expect(&mut h, late, 9);
}

#[test]
fn a_client_that_is_late_gets_what_it_missed_as_a_whole() {
    let mut h = Harness::new(false);
    issues(&mut h, 9);
    let conn = joined(&mut h, "c", "");
    let late = joined(&mut h, "d", "");
    let state = h.disconnect(late);
    h.say(conn, &change(&put("a", r#"{"table":"comment","orderBy":[["id","asc"]]}"#)));
    h.settle();
    // It comes back late, and brings a query: the other one is at the head.
    let late = h.connect("g", "d", None, state, 51).expect("admitted");
    let patch = put("q", ALL_ISSUES);
    h.say(late, &format!(r#"["initConnection",{{"desiredQueriesPatch":[{patch}]}}]"#));
    until_hydrating(&mut h);
    all_go_ahead(&mut h);
    assert!(h.socket(conn).has_open_poke() && !h.socket(late).has_open_poke());
    let gone = drop_issue(&h, "i4");
    h.commit(vec![gone]);
    expect(&mut h, conn, 8);
    expect(&mut h, late, 8);
    assert_eq!((rows_sent(&h, conn), rows_sent(&h, late)), (10, 8));
    assert_eq!(h.state(conn).got, h.state(late).got);
}

#[test]
fn a_client_that_leaves_meanwhile_leaves_the_others_theirs() {
    let mut h = Harness::new(false);
    issues(&mut h, 9);
    let other = joined(&mut h, "d", "");
    let conn = joined(&mut h, "c", "");
    h.say(conn, &change(&put("q", ALL_ISSUES)));
    until_hydrating(&mut h);
    all_go_ahead(&mut h);
    let state = h.disconnect(conn);
    expect(&mut h, other, 9);
    let conn = rejoin(&mut h, "c", state);
    expect(&mut h, conn, 9);
}

#[test]
fn queries_that_ran_before_are_compared_and_send_nothing_ahead() {
    let mut h = Harness::new(false);
    let conn = asking(&mut h, 9);
    expect(&mut h, conn, 9);
    let state = h.disconnect(conn);
    h.crash();
    let new = issue(&h, "new", 1.0);
    h.commit(vec![new]);
    let conn = h.connect("g", "c", None, state, 51).expect("admitted");
    h.say(conn, r#"["initConnection",{"desiredQueriesPatch":[]}]"#);
    until_hydrating(&mut h);
    assert_eq!(all_go_ahead(&mut h), 0);
    expect(&mut h, conn, 10);
    assert_eq!(rows_sent(&h, conn), 1);
}

#[test]
fn a_socket_that_takes_nothing_is_told_nothing_of_what_was_taken_back() {
    let mut h = Harness::new(false);
    h.lazy_sockets = true;
    let conn = asking(&mut h, 9);
    h.go_ahead(&group(), |rows| rows).expect("hydrating");
    h.feed(&group(), Event::Reset(ResetReason::SchemaChange));
    expect(&mut h, conn, 9);
    assert_eq!((h.socket(conn).model.cancelled, rows_sent(&h, conn)), (0, 9));
}

#[test]
fn a_large_poke_is_as_long_as_what_its_client_lacks() {
    let mut h = Harness::new(false);
    issues(&mut h, 20);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    h.lazy_sockets = true;
    // Another client comes, and one row changes before it is served: one poke for both.
    let late = h.connect("g", "d", None, Persisted::default(), 51).expect("admitted");
    h.say(late, &init(""));
    while h.socket(conn).queue.is_empty() {
        assert!(h.answer(&group()));
    }
    let changed = issue(&h, "i1", 100.0);
    h.commit(vec![changed]);
    while h.answer(&group()) {}
    let longest = |h: &Harness, conn| {
        let bytes = |waiting: &Waiting| match waiting {
            Waiting::Large(poke) => poke.bytes(),
            Waiting::Frames(_) => 0,
        };
        h.socket(conn).queue.iter().map(bytes).max().unwrap_or_default()
    };
    let (there, joining) = (longest(&h, conn), longest(&h, late));
    assert!(joining > 20 * 20 && there > 0 && there < 150, "{there} of {joining} bytes");
    expect(&mut h, conn, 20);
    expect(&mut h, late, 20);
}
