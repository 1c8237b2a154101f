//! Rules of the specification that no scenario has: who hears of what, what is stored when, and
//! what becomes of work that nobody asked for.

use super::super::{ConnId, Event, KEEP_ALIVE_MS, Note};
use super::client::Persisted;
use super::harness::{Answer, Harness, Question};
use super::scenarios::{ALL_ISSUES, change, drop_issue, init, issue, joined, put, rejoin};
use crate::cvr::store::CvrStoreError;
use crate::protocol::error::ApiFailure;
use crate::protocol::up;

const COMMENTS: &str = r#"{"table":"comment","orderBy":[["id","asc"]]}"#;

fn named(hash: &str) -> String {
    format!(r#"{{"op":"put","hash":"{hash}","name":"n_{hash}","args":[]}}"#)
}

/// Pokes so far, and how many of them were empty.
fn pokes(h: &Harness, conn: ConnId) -> (usize, usize) {
    (h.socket(conn).model.pokes, h.socket(conn).model.empty_pokes)
}

#[test]
fn who_joins_is_announced_to_the_others_by_one_empty_poke() {
    // view-syncer-cvr 43
    let mut h = Harness::new(false);
    let there = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let (all, empty) = pokes(&h, there);
    let new = joined(&mut h, "b", "");
    assert_eq!(pokes(&h, there), (all + 1, empty + 1), "its version is the new one");
    assert_eq!(h.state(there).cookie, h.state(new).cookie);
    assert_eq!(h.state(there).got, h.state(new).got);
    // Known already, it changes nothing.
    let state = h.disconnect(new);
    let new = rejoin(&mut h, "b", state);
    assert_eq!(pokes(&h, there), (all + 1, empty + 1));
    assert_eq!(pokes(&h, new), (1, 1));
}

#[test]
fn what_a_replaced_socket_said_is_not_done() {
    // view-syncer-cvr 50
    let mut h = Harness::new(false);
    let other = joined(&mut h, "other", "");
    let old = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let state = h.state(old).clone();
    // Its message waits behind another one's, and then there is a new socket.
    h.say(other, &change(&put("p", COMMENTS)));
    h.say(old, &change(&put("late", COMMENTS)));
    assert!(h.socket(old).busy);
    let new = rejoin(&mut h, "c", state);
    assert!(h.socket(old).closed && h.socket(old).error.is_none());
    // What is still on its way comes to nothing either.
    let late = up::parse(&change(&put("later", COMMENTS))).expect("valid");
    h.feed(&"g".into(), Event::Message(old, Box::new(late)));
    h.settle();
    assert_eq!(h.store.desired(&"g".into(), &"c".into()), ["q".into()]);
    assert_eq!((h.error_kind(new), h.error_kind(other)), (None, None));
    h.say(new, &change(&put("r", COMMENTS)));
    h.settle();
    assert!(h.state(new).got.contains("r"));
}

#[test]
fn nothing_is_poked_to_a_connection_that_is_not_validated() {
    // Trap T26, decision 11.
    let mut h = Harness::new(true);
    h.endpoint = Box::new(|_, _| Answer::Ast(ALL_ISSUES.to_owned()));
    let there = joined(&mut h, "a", &named("q"));
    let late = joined(&mut h, "b", "");
    let current = h.disconnect(late);
    assert_eq!(current.cookie, h.state(there).cookie, "as far as all others");
    let late = h.connect("g", "b", None, current, 51).expect("admitted");
    let new = issue(&h, "i1", 1.0);
    h.commit(vec![new]);
    h.settle();
    h.say(there, &change(&put("p", COMMENTS)));
    h.settle();
    assert_eq!((h.state(there).rows.len(), h.state(there).got.len()), (1, 2));
    assert_eq!(pokes(&h, late), (0, 0));
    // Nor while the app thinks about it.
    h.say(late, r#"["initConnection",{"desiredQueriesPatch":[]}]"#);
    let new = issue(&h, "i2", 1.0);
    h.commit(vec![new]);
    while h.receive(late) {}
    assert_eq!(pokes(&h, late), (0, 0));
    h.settle();
    assert_eq!(h.state(late).rows, h.state(there).rows);
    assert_eq!(
        (h.state(late).rows.len(), h.state(late).cookie.clone()),
        (2, h.state(there).cookie.clone())
    );
}

#[test]
fn a_group_that_was_lost_when_its_queries_were_asked_for_again_ends() {
    // Trap T32: no other connection is tried, and nothing is tried again without pause.
    let mut h = Harness::new(true);
    h.endpoint = Box::new(|_, _| Answer::Ast(ALL_ISSUES.to_owned()));
    let a = joined(&mut h, "a", &named("q"));
    let b = joined(&mut h, "b", "");
    let asked = h.requests.iter().filter(|queries| !queries.is_empty()).count();
    // Other rows than before: there is something to write.
    h.endpoint = Box::new(|_, _| Answer::Ast(COMMENTS.to_owned()));
    h.flush_faults.push_back(CvrStoreError::Ownership {
        owner: "another".into(),
        granted_ms: h.now_ms + 1e6,
        connect_ms: h.now_ms,
    });
    h.pass(301_000.0);
    h.settle();
    assert!(h.flush_faults.is_empty(), "it was written");
    assert_eq!((h.error_kind(a), h.error_kind(b)), (Some("Rehome"), Some("Rehome")));
    assert!(h.groups.is_empty());
    let again = h.requests.iter().filter(|queries| !queries.is_empty()).count();
    assert_eq!(again, asked + 1);
}

#[test]
fn a_group_whose_queries_cannot_be_asked_for_when_it_comes_up_ends_and_may_come_again() {
    // view-syncer-cvr §5.6: a failed request of shared work fails everybody.
    let mut h = Harness::new(true);
    h.endpoint = Box::new(|_, _| Answer::Ast(ALL_ISSUES.to_owned()));
    let new = issue(&h, "i1", 1.0);
    h.commit(vec![new]);
    let a = joined(&mut h, "a", &named("q"));
    let b = joined(&mut h, "b", "");
    let states = [h.disconnect(a), h.disconnect(b)];
    h.pass(KEEP_ALIVE_MS + 1.0);
    assert!(h.groups.is_empty());
    let flushes = h.store.flushes;
    let again = |h: &mut Harness| {
        ["a", "b"]
            .into_iter()
            .zip(states.clone())
            .map(|(client, state)| {
                let conn = h.connect("g", client, None, state, 51).expect("admitted");
                h.say(conn, r#"["initConnection",{"desiredQueriesPatch":[]}]"#);
                conn
            })
            .collect::<Vec<_>>()
    };
    let conns = again(&mut h);
    let group = "g".into();
    let asks = |h: &Harness| {
        let front = h.groups.get(&group).and_then(|slot| slot.questions.front());
        matches!(front, Some(Question::Transform(_, queries)) if !queries.is_empty())
    };
    while !asks(&h) {
        assert!(h.answer(&group), "nothing is asked");
    }
    h.endpoint_down = Some(ApiFailure::http(500, None, "status 500"));
    h.settle();
    for conn in conns {
        assert_eq!(h.error_kind(conn), Some("TransformFailed"));
    }
    assert!(h.groups.is_empty());
    assert_eq!(h.store.flushes, flushes, "nothing was written");
    h.endpoint_down = None;
    for conn in again(&mut h) {
        h.settle();
        assert_eq!((h.error_kind(conn), h.state(conn).rows.len()), (None, 1));
    }
}

#[test]
fn the_clock_of_ttls_is_stored_every_minute_and_when_the_last_client_leaves() {
    // view-syncer-cvr §1.4
    let mut h = Harness::new(false);
    let stored = |h: &Harness| h.store.load(&"g".into()).cvr.ttl_clock.0;
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let begin = stored(&h);
    h.pass(150_000.0);
    h.settle();
    assert_eq!(stored(&h) - begin, 120_000.0);
    let state = h.state(conn).clone();
    h.crash();
    // Half a minute was lost, the hour in which nobody was there does not count.
    h.pass(3_600_000.0);
    let conn = rejoin(&mut h, "c", state);
    h.pass(7_000.0);
    h.disconnect(conn);
    assert_eq!(stored(&h) - begin, 127_000.0);
    h.pass(KEEP_ALIVE_MS + 1.0);
    assert!(h.groups.is_empty());
    assert_eq!(stored(&h) - begin, 127_000.0);
}

fn drifts(h: &Harness) -> usize {
    let is = |note: &&Note| matches!(note, Note::Warn(text) if text.contains("drifted"));
    h.notes.iter().filter(is).count()
}

#[test]
fn a_signature_of_other_rows_is_noticed_and_put_right_and_a_missing_one_is_not_a_drift() {
    // view-syncer-cvr 36–38
    for (stored, expected) in [(Some(7), 1), (None, 0)] {
        let mut h = Harness::new(false);
        let first = issue(&h, "i1", 1.0);
        h.commit(vec![first]);
        let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
        let of = |h: &Harness| {
            let cvr = h.store.load(&"g".into()).cvr;
            (cvr.version.clone(), cvr.query(&"q".into()).and_then(|q| q.signature))
        };
        let (version, signature) = of(&h);
        assert!(signature.is_some_and(|s| s != 0));
        let state = h.disconnect(conn);
        h.pass(KEEP_ALIVE_MS + 1.0);
        h.store.sign(&"g".into(), &"q".into(), stored);
        let conn = rejoin(&mut h, "c", state);
        assert_eq!((drifts(&h), h.error_kind(conn)), (expected, None));
        assert_eq!(h.state(conn).rows.len(), 1);
        let (after, now) = of(&h);
        if stored.is_some() {
            assert_eq!(now, signature);
            assert_eq!((after.state, after.config), (version.state, version.config + 1), "once");
        }
        let state = h.disconnect(conn);
        h.pass(KEEP_ALIVE_MS + 1.0);
        let flushes = h.store.flushes;
        rejoin(&mut h, "c", state);
        assert_eq!((drifts(&h), h.store.flushes), (expected, flushes), "it is right now");
    }
}

#[test]
fn a_query_that_was_emptied_comes_back_without_a_drift() {
    // view-syncer-cvr 37
    let mut h = Harness::new(false);
    let first = issue(&h, "i1", 1.0);
    h.commit(vec![first]);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let gone = drop_issue(&h, "i1");
    h.commit(vec![gone]);
    h.settle();
    let signature = h.store.load(&"g".into()).cvr.query(&"q".into()).and_then(|q| q.signature);
    assert_eq!(signature, Some(0));
    let state = h.disconnect(conn);
    h.pass(KEEP_ALIVE_MS + 1.0);
    let flushes = h.store.flushes;
    rejoin(&mut h, "c", state);
    assert_eq!((drifts(&h), h.store.flushes), (0, flushes));
}

#[test]
fn a_schema_that_the_replica_cannot_serve_is_told_to_every_client_of_the_group() {
    // view-syncer-cvr 45
    let mut h = Harness::new(false);
    let schema = r#"{"tables":{"nope":{"columns":{"id":{"type":"string"}},"primaryKey":["id"]}}}"#;
    let conns = ["a", "b"].map(|client| {
        let conn = h.connect("g", client, None, Persisted::default(), 51).expect("admitted");
        let body = format!(r#"{{"desiredQueriesPatch":[],"clientSchema":{schema}}}"#);
        h.say(conn, &format!(r#"["initConnection",{body}]"#));
        conn
    });
    h.settle();
    for conn in conns {
        assert_eq!(h.error_kind(conn), Some("SchemaVersionNotSupported"));
    }
    assert!(h.groups.is_empty());
}

#[test]
fn who_is_deleted_by_name_and_who_is_not_active_are_confirmed_together() {
    // view-syncer-cvr 58, §5.4
    let mut h = Harness::new(false);
    let a = joined(&mut h, "a", &put("q", ALL_ISSUES));
    for client in ["x", "y"] {
        let conn = joined(&mut h, client, &put(client, ALL_ISSUES));
        let _ = h.disconnect(conn);
    }
    let b = h.connect("g", "b", None, Persisted::default(), 51).expect("admitted");
    let body = init("").replacen(
        '{',
        r#"{"activeClients":["a","b","y"],"deleted":{"clientIDs":["y","never"]},"#,
        1,
    );
    h.say(b, &body);
    h.settle();
    for conn in [a, b] {
        assert_eq!(h.socket(conn).model.deleted, ["never", "x", "y"]);
        for gone in ["x", "y"] {
            assert!(h.state(conn).desired.get(gone).is_none_or(|queries| queries.is_empty()));
        }
        assert!(h.state(conn).desired["a"].contains("q"));
    }
}
