//! Items of the checklists that the scenarios leave out.

use super::super::KEEP_ALIVE_MS;
use super::client::Persisted;
use super::harness::Harness;
use super::scenarios::{ALL_ISSUES, change, init, issue, joined, put, rejoin};
use crate::value::Value;
use crate::version::StateVersion;

const NOBODYS: &str = r#"{"table":"issue","where":{"type":"simple","op":"=","left":{"type":"column","name":"owner"},"right":{"type":"literal","value":"nobody"}},"orderBy":[["id","asc"]]}"#;

#[test]
fn a_replica_behind_the_cvr_is_waited_for() {
    // view-syncer-cvr 44
    let mut h = Harness::new(false);
    let first = issue(&h, "i1", 1.0);
    h.commit(vec![first]);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let state = h.disconnect(conn);
    h.pass(KEEP_ALIVE_MS + 1.0);
    assert!(h.groups.is_empty());
    // Another server, whose replica is behind.
    let newer = std::mem::replace(&mut h.world.version, StateVersion::from_lsn(500));
    let conn = rejoin(&mut h, "c", state);
    assert_eq!(h.error_kind(conn), None);
    assert_eq!(h.socket(conn).model.pokes, 0);
    assert!(h.groups["g"].group.waits_for_version());
    let second = issue(&h, "i2", 2.0);
    h.commit(vec![second]);
    h.settle();
    assert!(h.world.version > newer && !h.groups["g"].group.waits_for_version());
    assert_eq!(h.state(conn).rows.len(), 2);
    assert_eq!(h.state(conn).cookie.as_deref(), Some(h.world.version.as_str()));
}

#[test]
fn a_client_that_returns_while_its_group_comes_up_is_not_refused() {
    // Shared work needs a validated connection. The original looks for one when a version is ready,
    // and ends a group whose only client is just coming back.
    for has_query_endpoint in [false, true] {
        let mut h = Harness::new(has_query_endpoint);
        let first = issue(&h, "i1", 1.0);
        h.commit(vec![first]);
        let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
        let mut state = h.disconnect(conn);
        h.pass(KEEP_ALIVE_MS + 1.0);
        // Another server, whose replica is behind, and a socket that breaks while the group waits.
        h.world.version = StateVersion::from_lsn(500);
        let conn = rejoin(&mut h, "c", state);
        state = h.disconnect(conn);
        assert!(h.groups["g"].group.waits_for_version());
        let conn = h.connect("g", "c", None, state, 51).expect("admitted");
        let second = issue(&h, "i2", 2.0);
        h.commit(vec![second]);
        h.settle();
        assert_eq!((h.error_kind(conn), h.socket(conn).model.pokes), (None, 0));
        // The same after every answer that the group waits for until it is up.
        const INIT: &str = r#"["initConnection",{"desiredQueriesPatch":[]}]"#;
        let mut socket = conn;
        for answers in 0.. {
            h.say(socket, INIT);
            h.settle();
            assert_eq!((h.error_kind(socket), h.state(socket).rows.len()), (None, 2), "{answers}");
            state = h.disconnect(socket);
            h.pass(KEEP_ALIVE_MS + 1.0);
            assert!(h.groups.is_empty());
            let breaks = h.connect("g", "c", None, state, 51).expect("admitted");
            h.say(breaks, INIT);
            let came_up = (0..answers).any(|_| !h.answer(&"g".into()));
            state = h.disconnect(breaks);
            socket = h.connect("g", "c", None, state, 51).expect("admitted");
            h.settle();
            assert_eq!(h.error_kind(socket), None, "after {answers} answers");
            if came_up {
                assert!(answers > 3, "a group is up after {answers} answers");
                break;
            }
        }
    }
}

#[test]
fn evictions_that_are_close_share_a_poke_and_no_ttl_is_longer_than_ten_minutes() {
    // view-syncer-cvr 51
    let mut h = Harness::new(false);
    let later = put("r", NOBODYS).replace("1000", "1030");
    let conn = joined(&mut h, "c", &format!("{},{later}", put("q", ALL_ISSUES)));
    let drop = |hash: &str| change(&format!(r#"{{"op":"del","hash":"{hash}"}}"#));
    for hash in ["q", "r"] {
        h.say(conn, &drop(hash));
        h.settle();
    }
    let pokes = h.socket(conn).model.pokes;
    h.pass(1_049.0);
    h.settle();
    assert_eq!((h.state(conn).got.len(), h.socket(conn).model.pokes), (2, pokes));
    h.pass(2.0);
    h.settle();
    assert_eq!((h.state(conn).got.len(), h.socket(conn).model.pokes), (0, pokes + 1));

    h.say(conn, &change(&put("q", ALL_ISSUES).replace("1000", "3600000")));
    h.say(conn, &drop("q"));
    h.settle();
    h.pass(599_000.0);
    h.settle();
    assert!(h.state(conn).got.contains("q"));
    h.pass(1_100.0);
    h.settle();
    assert!(h.state(conn).got.is_empty());
}

#[test]
fn an_integer_that_javascript_cannot_hold_fails_its_query_alone() {
    // view-syncer-cvr 56, decision 5
    let mut h = Harness::new(false);
    let mut rows: Vec<_> = (0..10).map(|i| issue(&h, &format!("i{i}"), 1.0)).collect();
    rows[7].2.as_mut().unwrap()[2] = Value::UnsafeInt(9_007_199_254_740_993);
    h.commit(rows);
    let conn = joined(&mut h, "c", &format!("{},{}", put("q", ALL_ISSUES), put("r", NOBODYS)));
    let model = &h.socket(conn).model;
    assert_eq!(model.transform_errors, ["q"]);
    assert_eq!(model.state.got.iter().collect::<Vec<_>>(), ["r"]);
    assert!(model.state.rows.is_empty() && !h.socket(conn).closed);
    assert!(h.store.rows(&"g".into()).is_empty());
    assert_eq!(h.world.instances(), 3, "the internal queries, and the good one");
}

#[test]
fn a_message_that_fails_before_its_flush_leaves_no_trace() {
    // view-syncer-cvr 60
    let mut h = Harness::new(false);
    let good = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let bad = h.connect("g", "b", None, Persisted::default(), 51).expect("admitted");
    let text = init(&put("r", NOBODYS));
    h.say(bad, &text.replacen("{", r#"{"deleted":{"clientIDs":["b"]},"#, 1));
    h.settle();
    assert_eq!(h.error_kind(bad), Some("Internal"));
    h.say(good, &change(&put("s", NOBODYS)));
    h.settle();
    assert_eq!(h.store.desired(&"g".into(), &"a".into()), ["q".into(), "s".into()]);
    assert!(h.store.desired(&"g".into(), &"b".into()).is_empty());
    assert!(!h.state(good).desired.contains_key("b"), "{:?}", h.state(good).desired);
}
