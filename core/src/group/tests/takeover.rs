//! A group that another server had in between: whatever this one remembers, its clients are
//! answered when they come back.

use super::client::Persisted;
use super::harness::Harness;
use super::scenarios::{ALL_ISSUES, issue, joined, put, rejoin};
use crate::cvr::store::CvrStoreError;
use crate::group::ConnId;

/// Two clients, one of which missed something; both have left, and the group is remembered.
fn remembered(h: &mut Harness) -> (Persisted, Persisted) {
    let late = joined(h, "late", &put("q", ALL_ISSUES));
    let late = h.disconnect(late);
    let current = joined(h, "current", &put("q", ALL_ISSUES));
    let new = issue(h, "i1", 1.0);
    h.commit(vec![new]);
    h.settle();
    let current = h.disconnect(current);
    assert!(late.cookie < current.cookie && h.groups.len() == 1);
    (late, current)
}

/// Another server writes the group, and is the owner when this one wants to write.
fn another_has_it(h: &mut Harness) {
    h.store.moved_on(&"g".into());
    h.flush_faults.push_back(CvrStoreError::Ownership {
        owner: "another".into(),
        granted_ms: h.now_ms + 1.0,
        connect_ms: h.now_ms,
    });
}

fn assert_answered(h: &Harness, conn: ConnId) {
    assert_eq!(h.error_kind(conn), None, "{:?}", h.socket(conn).error);
    let cookie = h.store.version(&"g".into()).cookie();
    assert_eq!(h.state(conn).cookie, Some(cookie));
    assert!(h.socket(conn).model.pokes > 0 && !h.socket(conn).busy);
}

/// A client comes back and wants something else: its change is refused, and then it is answered.
#[test]
fn a_client_whose_change_was_refused_is_answered_when_it_comes_back() {
    let mut h = Harness::new(false);
    let (late, current) = remembered(&mut h);
    another_has_it(&mut h);
    let conn = h.connect("g", "late", None, late.clone(), 51).expect("admitted");
    let wants =
        format!(r#"["initConnection",{{"desiredQueriesPatch":[{}]}}]"#, put("r", ALL_ISSUES));
    h.say(conn, &wants);
    h.settle();
    assert_eq!(h.error_kind(conn), Some("Rehome"));
    let conn = h.connect("g", "late", None, late, 51).expect("admitted");
    h.say(conn, &wants);
    h.settle();
    assert_answered(&h, conn);
    assert_eq!((h.state(conn).got.len(), h.state(conn).rows.len()), (2, 1));
    let conn = rejoin(&mut h, "current", current);
    assert_answered(&h, conn);
}

/// The others of the group are brought to what the other server left.
#[test]
fn those_who_stay_are_brought_up_to_what_was_written_elsewhere() {
    let mut h = Harness::new(false);
    let (late, current) = remembered(&mut h);
    let stays = rejoin(&mut h, "current", current);
    another_has_it(&mut h);
    let conn = h.connect("g", "late", None, late.clone(), 51).expect("admitted");
    h.say(
        conn,
        &format!(r#"["initConnection",{{"desiredQueriesPatch":[{}]}}]"#, put("r", ALL_ISSUES)),
    );
    h.settle();
    assert_eq!(h.error_kind(conn), Some("Rehome"));
    assert_answered(&h, stays);
    let conn = rejoin(&mut h, "late", late);
    assert_answered(&h, conn);
    assert_answered(&h, stays);
}

/// Nobody asked for what is refused: everybody is sent away, and answered on coming back.
#[test]
fn clients_of_a_group_that_ended_by_a_refused_advance_are_answered() {
    let mut h = Harness::new(false);
    let (late, current) = remembered(&mut h);
    let conns = [rejoin(&mut h, "late", late), rejoin(&mut h, "current", current)];
    h.store.moved_on(&"g".into());
    let new = issue(&h, "i2", 2.0);
    h.commit(vec![new]);
    h.settle();
    assert!(h.groups.is_empty(), "it does not know any more what is right");
    for (conn, client) in conns.into_iter().zip(["late", "current"]) {
        assert_eq!(h.error_kind(conn), Some("Rehome"));
        let state = h.state(conn).clone();
        h.disconnect(conn);
        let conn = rejoin(&mut h, client, state);
        assert_answered(&h, conn);
        assert_eq!(h.state(conn).rows.len(), 2);
    }
}

/// A client that was poked elsewhere has a cookie that the memory does not know.
#[test]
fn a_cookie_that_is_ahead_of_the_memory_is_looked_up() {
    let mut h = Harness::new(false);
    let (late, mut current) = remembered(&mut h);
    let stays = rejoin(&mut h, "late", late);
    current.cookie = Some(h.store.moved_on(&"g".into()).cookie());
    let loads = h.loads;
    let conn = rejoin(&mut h, "current", current);
    assert_eq!(h.loads, loads + 1);
    assert_answered(&h, conn);
    assert_answered(&h, stays);
}

/// The store refuses a load, a read of rows, or a scan: who waited is told, and may come again.
#[test]
fn a_store_that_fails_at_any_step_of_coming_up_is_asked_again() {
    for step in 0..3 {
        let mut h = Harness::new(false);
        let (late, _) = remembered(&mut h);
        h.pass(crate::group::KEEP_ALIVE_MS + 1.0);
        assert!(h.groups.is_empty());
        let more = issue(&h, "i3", 3.0);
        h.commit(vec![more]);
        let lost = CvrStoreError::Storage("connection lost".into());
        match step {
            0 => h.load_faults.push_back(lost),
            1 => h.read_faults.push_back(lost),
            _ => h.flush_faults.push_back(lost),
        }
        let conn = rejoin(&mut h, "late", late.clone());
        assert_eq!(h.error_kind(conn), Some("Rehome"), "step {step}");
        let state = h.state(conn).clone();
        let conn = rejoin(&mut h, "late", state);
        assert_answered(&h, conn);
        assert_eq!(h.state(conn).rows.len(), 2);
        let more = issue(&h, "i4", 4.0);
        h.commit(vec![more]);
        h.settle();
        assert_eq!((h.state(conn).rows.len(), h.world.subscriptions()), (3, 3));
    }
}

/// A client comes back and wants something else: its change meets what the other server wrote, is
/// made anew on that, and answered.
#[test]
fn a_client_whose_change_meets_what_another_server_wrote_is_taken_in() {
    let mut h = Harness::new(false);
    let (late, current) = remembered(&mut h);
    h.store.moved_on(&"g".into());
    let conn = h.connect("g", "late", None, late, 51).expect("admitted");
    let wants =
        format!(r#"["initConnection",{{"desiredQueriesPatch":[{}]}}]"#, put("r", ALL_ISSUES));
    let loads = h.loads;
    h.say(conn, &wants);
    h.settle();
    assert_eq!(h.loads, loads + 1, "what is remembered is not what is stored");
    assert_answered(&h, conn);
    assert_eq!((h.state(conn).got.len(), h.state(conn).rows.len()), (2, 1));
    let conn = rejoin(&mut h, "current", current);
    assert_answered(&h, conn);
}
