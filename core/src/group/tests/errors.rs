//! Errors: who hears of them, and who does not.

use super::super::{ConnId, Event, Note, Timer};
use super::client::Persisted;
use super::harness::{CLIENT_SCHEMA, Harness, Question};
use super::scenarios::{ALL_ISSUES, change, init, issue, joined, put};
use crate::cvr::store::CvrStoreError;

/// What was logged of failures.
fn lines(h: &Harness) -> Vec<(&'static str, String)> {
    let line = |note: &Note| match note {
        Note::Info(text) => ("info", text.clone()),
        Note::Warn(text) => ("warn", text.clone()),
        Note::Error(text) => ("error", text.clone()),
    };
    h.notes.iter().map(line).filter(|(_, text)| text.contains("fail")).collect()
}

/// Two clients of a group, and one that has not sent its `initConnection`.
fn three(h: &mut Harness) -> [ConnId; 3] {
    let first = joined(h, "a", &put("q", ALL_ISSUES));
    let second = joined(h, "b", &put("q", ALL_ISSUES));
    let third = h.connect("g", "c", None, Persisted::default(), 51).expect("admitted");
    h.settle();
    [first, second, third]
}

#[test]
fn the_end_of_a_group_by_an_error_leaves_one_line_of_its_level() {
    let cases = [
        (
            CvrStoreError::Ownership { owner: "s2".into(), granted_ms: 1.0, connect_ms: 0.0 },
            "info",
            "Rehome: CVR ownership was transferred to s2",
        ),
        (
            CvrStoreError::ConcurrentModification { expected: "1".into(), actual: "2".into() },
            "warn",
            "Rehome: CVR has been concurrently modified",
        ),
        (CvrStoreError::ClientNotFound("purged".into()), "warn", "ClientNotFound: purged"),
        (CvrStoreError::Storage("disk full".into()), "error", "disk full"),
    ];
    for (error, level, text) in cases {
        let mut h = Harness::new(false);
        let [first, second, third] = three(&mut h);
        h.flush_faults.push_back(error.clone());
        let new = issue(&h, "i1", 1.0);
        h.commit(vec![new]);
        h.settle();
        assert!(h.groups.is_empty() && h.socket(third).closed, "{error}");
        assert_eq!(h.error_kind(third), None, "it comes back by itself");
        assert_eq!(h.error_kind(first), h.error_kind(second));
        let lines = lines(&h);
        assert!(lines.len() == 1 && lines[0].0 == level, "{lines:?}");
        for part in ["group g: it failed: ", text, "Its 2 clients", "1 other sockets"] {
            assert!(lines[0].1.contains(part), "{part}: {lines:?}");
        }
    }
}

#[test]
fn rows_that_are_never_written_end_a_group_with_a_line() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "a", &put("q", ALL_ISSUES));
    h.store.defer_above = 0;
    let new = issue(&h, "i1", 1.0);
    h.commit(vec![new]);
    while !h.groups["g"].awaits_rows {
        assert!(h.answer(&"g".into()));
    }
    h.write_rows(&"g".into(), Err(CvrStoreError::Storage("disk full".into())));
    assert_eq!((h.error_kind(conn), h.groups.len()), (Some("Rehome"), 0));
    let lines = lines(&h);
    assert!(lines.len() == 1 && lines[0].0 == "error", "{lines:?}");
    assert!(lines[0].1.contains("group g: rows of its CVR were not written: "), "{lines:?}");
}

#[test]
fn a_client_that_fails_alone_is_named() {
    let mut h = Harness::new(false);
    let good = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let bad = h.connect("g", "b", None, Persisted::default(), 51).expect("admitted");
    h.say(bad, &init("").replace(CLIENT_SCHEMA, r#"{"tables":{}}"#));
    h.settle();
    assert_eq!(h.error_kind(bad), Some("InvalidConnectionRequest"));
    h.say(good, &change(r#"{"op":"put","hash":"x"}"#));
    h.settle();
    assert_eq!(h.error_kind(good), Some("Internal"));
    let lines = lines(&h);
    let lines: Vec<_> = lines.iter().map(|(level, text)| (*level, &**text)).collect();
    let expected = [
        (
            "warn",
            "group g: client b failed: InvalidConnectionRequest: Provided schema does not match previous schema",
        ),
        ("warn", "group g: client a failed: Internal: Must provide name and args"),
    ];
    assert_eq!(lines, expected, "what a client does wrong is no error of the server's");
}

/// A client whose query has been hydrated, and the rows are being taken.
fn taking(h: &mut Harness) -> ConnId {
    let rows = (0..20).map(|i| issue(h, &format!("i{i}"), 1.0)).collect();
    h.commit(rows);
    let conn = joined(h, "a", "");
    h.say(conn, &change(&put("q", ALL_ISSUES)));
    let group = "g".into();
    while !matches!(h.groups[&group].questions.front(), Some(Question::Continue)) {
        assert!(h.answer(&group), "nothing is taken");
    }
    conn
}

#[test]
fn a_query_that_fails_while_its_rows_are_taken_fails_alone() {
    let mut h = Harness::new(false);
    let conn = taking(&mut h);
    let instances = h.world.instances();
    h.world.rows_fault = Some("value 9007199254740993 is outside of supported bounds".into());
    h.settle();
    assert_eq!(h.error_kind(conn), None, "{:?}", h.socket(conn).error);
    assert_eq!(h.socket(conn).model.transform_errors, ["q"]);
    assert!(h.state(conn).got.is_empty() && h.state(conn).rows.is_empty());
    assert_eq!(h.world.instances(), instances - 1);
    // It can be asked for again.
    h.say(conn, &change(r#"{"op":"del","hash":"q"}"#));
    h.say(conn, &change(&put("q", ALL_ISSUES)));
    h.settle();
    assert_eq!((h.state(conn).got.len(), h.state(conn).rows.len()), (1, 20));
}

#[test]
fn a_group_that_ends_while_it_takes_rows_lets_go_of_its_queries() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "a", &put("p", ALL_ISSUES));
    h.store.defer_above = 0;
    let rows = (0..20).map(|i| issue(&h, &format!("i{i}"), 1.0)).collect();
    h.commit(rows);
    let group = "g".into();
    while !h.groups[&group].awaits_rows || !h.groups[&group].questions.is_empty() {
        assert!(h.answer(&group));
    }
    let other = ALL_ISSUES.replace("asc", "desc");
    h.say(conn, &change(&put("q", &other)));
    while !matches!(h.groups[&group].questions.front(), Some(Question::Continue)) {
        assert!(h.answer(&group), "nothing is taken");
    }
    h.write_rows(&group, Err(CvrStoreError::Storage("disk full".into())));
    assert_eq!((h.error_kind(conn), h.groups.len()), (Some("Rehome"), 0));
    assert_eq!(h.world.subscriptions(), 0);
}

#[test]
fn who_is_not_validated_hears_nothing_of_deleted_clients() {
    let mut h = Harness::new(false);
    let a = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let b = joined(&mut h, "b", "");
    let _ = h.disconnect(b);
    h.say(a, r#"["deleteClients",{"clientIDs":["b"]}]"#);
    let c = h.connect("g", "c", None, Persisted::default(), 51).expect("admitted");
    h.say(c, &init(""));
    h.settle();
    assert_eq!(h.socket(a).model.deleted, ["b"]);
    assert!(h.socket(c).model.deleted.is_empty() && h.socket(c).model.pokes > 0);
}

#[test]
fn credentials_are_checked_again_even_if_the_wall_clock_is_slow() {
    let mut h = Harness::new(true);
    let _conn = joined(&mut h, "a", "");
    let group = "g".into();
    let due = |h: &Harness| h.groups[&group].timers.get(&Timer::Maintenance).copied();
    let at = due(&h).expect("planned");
    // The timer is right, and the wall clock a little behind.
    h.now_ms = at - 3.0;
    h.groups.get_mut(&group).expect("a group").timers.remove(&Timer::Maintenance);
    h.feed(&group, Event::Timer(Timer::Maintenance));
    h.settle();
    let requests = h.requests.len();
    assert_eq!(due(&h), Some(at), "it is planned again");
    h.pass(5.0);
    h.settle();
    assert_eq!(h.requests.len(), requests + 1);
}

#[test]
fn a_change_of_a_client_that_left_is_carried_through_for_the_others() {
    let mut h = Harness::new(false);
    let a = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let b = joined(&mut h, "b", &put("r", &ALL_ISSUES.replace("asc", "desc")));
    let c = joined(&mut h, "c", "");
    let _ = h.disconnect(b);
    h.say(a, r#"["deleteClients",{"clientIDs":["b"]}]"#);
    // It leaves while the store writes.
    let group = "g".into();
    assert!(matches!(h.groups[&group].questions.front(), Some(Question::Flushed(_))));
    let _ = h.disconnect(a);
    h.settle();
    assert_eq!(h.socket(c).model.deleted, ["b"]);
    assert_eq!(h.state(c).cookie, Some(h.store.version(&group).cookie()));
}
