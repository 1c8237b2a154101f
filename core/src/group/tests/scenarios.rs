//! Scenarios of the spec's conformance checklists.

use super::super::{ConnId, Event, Note, Timer};
use super::client::Persisted;
use super::harness::{Answer, CLIENT_SCHEMA, Harness, Question};
use crate::cvr::store::CvrStoreError;
use crate::cvr::{RefCounts, RowIdentity, RowRecord};
use crate::protocol::error::{ApiFailure, CallReason};
use crate::value::Value;

pub const ALL_ISSUES: &str = r#"{"table":"issue","orderBy":[["id","asc"]]}"#;
const COMMENTED: &str = r#"{"table":"issue","orderBy":[["id","asc"]],"related":[{"correlation":{"parentField":["id"],"childField":["issue"]},"subquery":{"table":"comment","alias":"comments","orderBy":[["id","asc"]]}}]}"#;

pub fn put(hash: &str, ast: &str) -> String {
    format!(r#"{{"op":"put","hash":"{hash}","ast":{ast},"ttl":1000}}"#)
}

fn named(hash: &str) -> String {
    format!(r#"{{"op":"put","hash":"{hash}","name":"n_{hash}","args":[]}}"#)
}

pub fn init(patch: &str) -> String {
    format!(
        r#"["initConnection",{{"desiredQueriesPatch":[{patch}],"clientSchema":{CLIENT_SCHEMA}}}]"#
    )
}

pub fn change(patch: &str) -> String {
    format!(r#"["changeDesiredQueries",{{"desiredQueriesPatch":[{patch}]}}]"#)
}

pub fn issue(h: &Harness, id: &str, n: f64) -> super::world::Change {
    let values = vec![Value::string(id), Value::string("o"), Value::Number(n)];
    (h.world.table("issue"), [Value::string(id)].into_iter().collect(), Some(values))
}

pub fn drop_issue(h: &Harness, id: &str) -> super::world::Change {
    (h.world.table("issue"), [Value::string(id)].into_iter().collect(), None)
}

pub fn lmid(h: &Harness, group: &str, client: &str, id: f64) -> super::world::Change {
    let key = [Value::string(group), Value::string(client)].into_iter().collect();
    let values = vec![Value::string(group), Value::string(client), Value::Number(id), Value::Null];
    (h.world.table("zero_0.clients"), key, Some(values))
}

fn result(h: &Harness, group: &str, client: &str, id: f64, json: &str) -> super::world::Change {
    let key: crate::row::Key =
        [Value::string(group), Value::string(client), Value::Number(id)].into_iter().collect();
    let mut values: Vec<Value> = key.to_vec();
    values.push(Value::Json(json.into()));
    (h.world.table("zero_0.mutations"), key, Some(values))
}

pub fn joined(h: &mut Harness, client: &str, patch: &str) -> ConnId {
    let conn = h.connect("g", client, None, Persisted::default(), 51).expect("admitted");
    h.say(conn, &init(patch));
    h.settle();
    assert_eq!(h.error_kind(conn), None, "{:?}", h.socket(conn).error);
    conn
}

pub fn rejoin(h: &mut Harness, client: &str, state: Persisted) -> ConnId {
    let conn = h.connect("g", client, None, state, 51).expect("admitted");
    h.say(conn, r#"["initConnection",{"desiredQueriesPatch":[]}]"#);
    h.settle();
    conn
}

#[test]
fn a_new_group_gets_its_config_then_its_rows() {
    let mut h = Harness::new(false);
    let first = issue(&h, "i1", 1.0);
    h.commit(vec![first]);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let state = h.state(conn);
    assert_eq!(h.socket(conn).model.pokes, 2, "config, then results");
    assert_eq!(state.cookie.as_deref(), Some(h.world.version.as_str()));
    assert!(state.got.contains("q") && state.desired["c"].contains("q"));
    assert_eq!(state.rows.len(), 1);
}

#[test]
fn a_commit_reaches_clients_and_one_that_touches_nothing_does_not() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let (pokes, flushes) = (h.socket(conn).model.pokes, h.store.flushes);
    let other = lmid(&h, "other", "c", 1.0);
    h.commit(vec![other]);
    h.settle();
    assert_eq!((h.socket(conn).model.pokes, h.store.flushes), (pokes, flushes));
    let new = issue(&h, "i1", 1.0);
    h.commit(vec![new]);
    h.settle();
    assert_eq!(h.socket(conn).model.pokes, pokes + 1);
    let gone = drop_issue(&h, "i1");
    h.commit(vec![gone]);
    h.settle();
    assert!(h.state(conn).rows.is_empty());
}

#[test]
fn a_mutation_result_comes_with_its_id_and_rows() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", "");
    let pokes = h.socket(conn).model.pokes;
    let changes = vec![lmid(&h, "g", "c", 2.0), result(&h, "g", "c", 2.0, r#"{"error":"app"}"#)];
    h.commit(changes);
    h.settle();
    assert_eq!(h.socket(conn).model.pokes, pokes + 1);
    assert_eq!(h.state(conn).lmids["c"], 2);
    assert_eq!(h.state(conn).results[&("c".to_owned(), 2)], r#"{"error":"app"}"#);
    let key = [Value::string("g"), Value::string("c"), Value::Number(2.0)].into_iter().collect();
    h.commit(vec![(h.world.table("zero_0.mutations"), key, None)]);
    h.settle();
    assert!(h.state(conn).results.is_empty());
}

#[test]
fn a_client_that_is_current_gets_one_empty_poke() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let state = h.disconnect(conn);
    let conn = rejoin(&mut h, "c", state);
    assert_eq!((h.socket(conn).model.pokes, h.socket(conn).model.empty_pokes), (1, 1));
}

#[test]
fn a_current_client_of_a_new_server_gets_one_empty_poke_and_nothing_is_written() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let state = h.disconnect(conn);
    h.pass(6_000.0);
    assert!(h.groups.is_empty(), "idle groups stop");
    assert_eq!(h.world.instances(), 0);
    let flushes = h.store.flushes;
    let conn = rejoin(&mut h, "c", state);
    assert_eq!((h.socket(conn).model.pokes, h.socket(conn).model.empty_pokes), (1, 1));
    assert_eq!(h.store.flushes, flushes);
}

#[test]
fn a_late_client_gets_what_it_missed_and_others_nothing() {
    let mut h = Harness::new(false);
    let a = joined(&mut h, "a", &put("q", COMMENTED));
    let b = joined(&mut h, "b", &put("q", COMMENTED));
    let old = h.disconnect(b);
    for (i, n) in [("i1", 1.0), ("i2", 2.0), ("i1", 3.0)] {
        let changed = issue(&h, i, n);
        h.commit(vec![changed]);
        h.settle();
    }
    let gone = drop_issue(&h, "i2");
    h.commit(vec![gone]);
    h.settle();
    let pokes = h.socket(a).model.pokes;
    let b = rejoin(&mut h, "b", old);
    assert_eq!(h.socket(a).model.pokes, pokes);
    assert_eq!(h.socket(b).model.pokes, 1);
    assert_eq!(h.state(b).rows, h.state(a).rows);
    assert_eq!(h.state(b).cookie, h.state(a).cookie);
}

/// A client that is late by five rows, at the moment when some of them were read for it.
fn being_caught_up(h: &mut Harness) -> (ConnId, ConnId) {
    let new = (0..5).map(|i| issue(h, &format!("i{i}"), 0.0)).collect();
    let there = joined(h, "c", &put("q", ALL_ISSUES));
    let late = joined(h, "d", "");
    let state = h.disconnect(late);
    h.commit(new);
    h.settle();
    let late = h.connect("g", "d", None, state, 51).expect("admitted");
    h.say(late, r#"["initConnection",{"desiredQueriesPatch":[]}]"#);
    let group = "g".into();
    while !matches!(h.groups[&group].questions.front(), Some(Question::CatchUp(..))) {
        assert!(h.answer(&group), "nothing is caught up on");
    }
    (there, late)
}

fn resets(h: &Harness) -> usize {
    let is_reset =
        |note: &&Note| matches!(note, Note::Info(text) if text.contains("resetting its queries"));
    h.notes.iter().filter(is_reset).count()
}

#[test]
fn a_row_that_goes_while_it_is_read_for_a_late_client_is_not_lost() {
    for leaves in [false, true] {
        let mut h = Harness::new(false);
        let (there, late) = being_caught_up(&mut h);
        let gone = drop_issue(&h, "i1");
        h.commit(vec![gone]);
        h.answer(&"g".into());
        let state = leaves.then(|| h.disconnect(late));
        h.settle();
        assert_eq!(resets(&h), 0, "the records are right: {:?}", h.notes);
        assert_eq!((h.row_reads, h.state(there).rows.len()), (0, 4));
        let late = state.map_or(late, |state| rejoin(&mut h, "d", state));
        assert_eq!(h.state(late).rows.len(), 4);
        assert_eq!(h.state(late).cookie, h.state(there).cookie);
    }
}

#[test]
fn records_of_rows_that_the_replica_lost_are_put_right() {
    // Decision 12: the group's queries are executed anew; nobody gets an error.
    for table in ["issue", "dropped"] {
        let mut h = Harness::new(false);
        let first = issue(&h, "i1", 1.0);
        h.commit(vec![first]);
        let stays = joined(&mut h, "a", &put("q", ALL_ISSUES));
        let conn = joined(&mut h, "b", "");
        let state = h.disconnect(conn);
        let second = issue(&h, "i2", 1.0);
        h.commit(vec![second]);
        h.settle();
        let id = RowIdentity::new(table.into(), vec![("id".into(), Value::string("lost"))]);
        let lost = RowRecord {
            id: id.into(),
            row_version: h.world.version.clone(),
            patch_version: h.store.version(&"g".into()),
            ref_counts: Some(RefCounts::of("q".into(), 1)),
        };
        h.store.invent_row(&"g".into(), lost);
        let conn = rejoin(&mut h, "b", state);
        assert_eq!(h.error_kind(conn), None, "{table}");
        let rows = |conn| h.state(conn).rows.keys().cloned().collect::<Vec<_>>();
        assert_eq!((rows(conn).len(), rows(conn)), (2, rows(stays)), "{table}");
        assert_eq!(h.store.rows(&"g".into()).len(), 2, "{table}: a tombstone");
    }
}

#[test]
fn cookies_from_the_future_and_of_unknown_groups_are_refused() {
    let mut h = Harness::new(false);
    let unknown = Persisted { cookie: Some("00:01".into()), ..Persisted::default() };
    let conn = h.connect("g", "c", None, unknown, 51).expect("admitted");
    h.say(conn, &init(""));
    h.settle();
    assert_eq!(h.error_kind(conn), Some("ClientNotFound"));
    joined(&mut h, "c", "");
    let future = Persisted { cookie: Some("zzzzzz".into()), ..Persisted::default() };
    let conn = h.connect("g", "d", None, future, 51).expect("admitted");
    h.say(conn, &init(""));
    assert_eq!(h.error_kind(conn), Some("Internal"), "no LexiVersion");
    let future = Persisted { cookie: Some("5zzzzzz".into()), ..Persisted::default() };
    let conn = h.connect("g", "d", None, future, 51).expect("admitted");
    h.say(conn, &init(""));
    h.settle();
    assert_eq!(h.error_kind(conn), Some("InvalidConnectionRequestBaseCookie"));
}

/// A client that was at another server and comes back before its group has ended here.
#[test]
fn a_cookie_that_another_server_gave_is_looked_up_before_it_is_judged() {
    let mut h = Harness::new(false);
    let stays = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let cookie = h.store.moved_on(&"g".into()).cookie();
    let returns = Persisted { cookie: Some(cookie.clone()), ..h.state(stays).clone() };
    let conn = rejoin(&mut h, "d", returns);
    assert_eq!(h.error_kind(conn), None);
    assert!(h.state(conn).cookie >= Some(cookie));
    assert_eq!(h.error_kind(stays), None);
    assert_eq!(h.state(stays).cookie, h.state(conn).cookie, "the other one is caught up");
    assert_eq!(h.state(stays).rows, h.state(conn).rows);
}

#[test]
fn the_client_schema_is_needed_kept_and_compared() {
    let mut h = Harness::new(false);
    let conn = h.connect("g", "c", None, Persisted::default(), 51).expect("admitted");
    h.say(conn, r#"["initConnection",{"desiredQueriesPatch":[]}]"#);
    h.settle();
    assert_eq!(h.error_kind(conn), Some("InvalidConnectionRequest"));
    assert_eq!(h.store.flushes, 0, "no trace");
    joined(&mut h, "c", "");
    let conn = h.connect("g", "d", None, Persisted::default(), 51).expect("admitted");
    h.say(conn, r#"["initConnection",{"desiredQueriesPatch":[],"clientSchema":{"tables":{}}}]"#);
    h.settle();
    assert_eq!(h.error_kind(conn), Some("InvalidConnectionRequest"));
    assert_eq!(
        h.socket(conn).error.as_ref().map(|e| e.message()),
        Some("Provided schema does not match previous schema")
    );
}

#[test]
fn a_schema_that_the_replica_cannot_serve_fails_the_group() {
    let mut h = Harness::new(false);
    let conn = h.connect("g", "c", None, Persisted::default(), 51).expect("admitted");
    h.say(
        conn,
        r#"["initConnection",{"desiredQueriesPatch":[],"clientSchema":{"tables":{"issue":{"columns":{"x":{"type":"string"}},"primaryKey":["id"]}}}}]"#,
    );
    h.settle();
    assert_eq!(h.error_kind(conn), Some("SchemaVersionNotSupported"));
    let message = h.socket(conn).error.as_ref().map(|e| e.message().to_owned());
    assert!(message.is_some_and(|m| m.contains("\"issue\".\"x\"")));
    assert!(h.groups.is_empty());
}

#[test]
fn a_second_init_connection_is_an_error() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", "");
    h.say(conn, &init(""));
    h.settle();
    assert_eq!(h.error_kind(conn), Some("Internal"));
}

#[test]
fn messages_before_init_connection_are_ignored() {
    let mut h = Harness::new(false);
    let conn = h.connect("g", "c", None, Persisted::default(), 51).expect("admitted");
    h.say(conn, &change(&put("q", ALL_ISSUES)));
    h.say(conn, r#"["deleteClients",{"clientIDs":["x"]}]"#);
    h.say(conn, r#"["inspect",{"id":"1","op":"version"}]"#);
    h.say(conn, r#"["closeConnection",[]]"#);
    h.say(conn, r#"["pull",{"clientGroupID":"g","cookie":null,"requestID":"r"}]"#);
    h.settle();
    assert!(!h.socket(conn).closed && !h.socket(conn).busy);
    assert_eq!(h.store.flushes, 0);
}

#[test]
fn a_new_socket_of_a_client_closes_the_old_one_without_error() {
    let mut h = Harness::new(false);
    let old = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let state = h.state(old).clone();
    let new = rejoin(&mut h, "c", state);
    assert!(h.socket(old).closed && h.socket(old).error.is_none());
    assert!(!h.socket(new).closed);
    let fresh = issue(&h, "i", 1.0);
    h.commit(vec![fresh]);
    h.settle();
    assert_eq!(h.state(new).rows.len(), 1);
}

#[test]
fn another_user_is_turned_away_and_touches_nothing() {
    let mut h = Harness::new(false);
    let conn = h.connect("g", "c", Some("u1"), Persisted::default(), 51).expect("admitted");
    h.say(conn, &init(""));
    h.settle();
    let refused = h.connect("g", "c", Some("u2"), Persisted::default(), 51);
    assert_eq!(refused.map_err(|e| e.kind_name()), Err("Unauthorized"));
    assert!(!h.socket(conn).closed);
}

#[test]
fn desired_queries_come_and_go_with_their_ttl_in_connected_time() {
    let mut h = Harness::new(false);
    let first = issue(&h, "i1", 1.0);
    h.commit(vec![first]);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    h.say(conn, &change(r#"{"op":"del","hash":"q"}"#));
    h.settle();
    assert!(h.state(conn).desired["c"].is_empty(), "poked at once");
    assert!(h.state(conn).got.contains("q"));
    h.pass(500.0);
    h.settle();
    let state = h.disconnect(conn);
    h.pass(3_600_000.0);
    let conn = rejoin(&mut h, "c", state);
    assert!(h.state(conn).got.contains("q"), "time alone does not count");
    h.pass(600.0);
    h.settle();
    assert!(h.state(conn).got.is_empty());
    assert!(h.state(conn).rows.is_empty());
    assert_eq!(h.world.instances(), 2, "the internal queries");
}

#[test]
fn repeating_a_put_changes_nothing_unless_its_ttl_grows() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let pokes = h.socket(conn).model.pokes;
    h.say(conn, &change(&put("q", ALL_ISSUES)));
    h.settle();
    assert_eq!(h.socket(conn).model.pokes, pokes);
    let longer = put("q", ALL_ISSUES).replace("1000", "-1");
    h.say(conn, &change(&longer));
    h.settle();
    assert_eq!(h.socket(conn).model.pokes, pokes + 1);
    h.say(conn, &change(&longer));
    h.settle();
    assert_eq!(h.socket(conn).model.pokes, pokes + 2, "unclamped against clamped");
}

#[test]
fn clear_evicts_without_grace() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    h.say(conn, &change(r#"{"op":"clear"}"#));
    h.settle();
    assert!(h.state(conn).got.is_empty() && h.state(conn).desired["c"].is_empty());
}

#[test]
fn two_tabs_see_each_others_desires_and_get_rows_once() {
    let mut h = Harness::new(false);
    let a = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let b = joined(&mut h, "b", &put("p", COMMENTED));
    for conn in [a, b] {
        assert!(h.state(conn).desired["a"].contains("q"));
        assert!(h.state(conn).desired["b"].contains("p"));
        assert_eq!(h.state(conn).got.len(), 2);
    }
    let pokes = (h.socket(a).model.pokes, h.socket(b).model.pokes);
    let new = issue(&h, "i", 1.0);
    h.commit(vec![new]);
    h.settle();
    assert_eq!((h.socket(a).model.pokes, h.socket(b).model.pokes), (pokes.0 + 1, pokes.1 + 1));
    // One query goes; the other one still references the row.
    h.say(a, &change(r#"{"op":"clear"}"#));
    h.settle();
    assert_eq!(h.state(a).rows.len(), 1);
}

#[test]
fn delete_clients_is_acknowledged_to_everybody() {
    let mut h = Harness::new(false);
    let a = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let b = joined(&mut h, "b", &put("p", COMMENTED));
    let _ = h.disconnect(b);
    h.say(a, r#"["deleteClients",{"clientIDs":["b","never"]}]"#);
    h.settle();
    assert_eq!(h.socket(a).model.deleted, ["b", "never"]);
    assert!(h.state(a).desired["b"].is_empty());
    h.say(a, r#"["deleteClients",{"clientIDs":["a"]}]"#);
    h.settle();
    assert_eq!(h.error_kind(a), Some("Internal"), "cannot delete self");
}

#[test]
fn clients_that_are_not_active_any_more_are_forgotten() {
    let mut h = Harness::new(false);
    let a = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let state = h.disconnect(a);
    let b = h.connect("g", "b", None, state, 51).expect("admitted");
    h.say(b, r#"["initConnection",{"desiredQueriesPatch":[],"activeClients":["b"]}]"#);
    h.settle();
    assert!(h.state(b).desired["a"].is_empty());
    assert!(h.socket(b).model.deleted.is_empty(), "nobody asked for it by name");
}

#[test]
fn an_idle_group_lives_for_five_seconds() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", "");
    h.pass(10_000.0);
    let state = h.disconnect(conn);
    h.pass(4_900.0);
    assert_eq!(h.groups.len(), 1);
    let conn = rejoin(&mut h, "c", state);
    h.pass(10_000.0);
    assert_eq!(h.groups.len(), 1);
    let _ = h.disconnect(conn);
    h.pass(4_000.0);
    assert_eq!(h.groups.len(), 1);
    h.pass(2_000.0);
    assert_eq!(h.groups.len(), 0);
}

#[test]
fn a_drain_closes_without_error() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", "");
    let group = h.socket(conn).group.clone();
    h.feed(&group, super::super::Event::Drain);
    h.settle();
    assert!(h.socket(conn).closed && h.socket(conn).error.is_none());
    assert!(h.groups.is_empty());
}

#[test]
fn nothing_is_poked_for_a_flush_that_failed_and_the_clients_come_back() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "c", &put("q", ALL_ISSUES));
    let pokes = h.socket(conn).model.pokes;
    h.flush_faults.push_back(CvrStoreError::Storage("disk full".into()));
    let new = issue(&h, "i", 1.0);
    h.commit(vec![new]);
    h.settle();
    assert_eq!(h.error_kind(conn), Some("Rehome"), "a store comes back");
    assert_eq!(h.socket(conn).model.pokes, pokes);
    let state = h.disconnect(conn);
    let conn = rejoin(&mut h, "c", state);
    assert_eq!(h.state(conn).rows.len(), 1);
}

#[test]
fn a_failed_flush_of_a_message_fails_its_client_only() {
    let mut h = Harness::new(false);
    let a = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let b = joined(&mut h, "b", "");
    h.flush_faults.push_back(CvrStoreError::Storage("disk full".into()));
    h.say(b, &change(&put("p", COMMENTED)));
    h.settle();
    assert_eq!(h.error_kind(b), Some("Rehome"));
    assert_eq!(h.error_kind(a), None);
    let new = issue(&h, "i", 1.0);
    h.commit(vec![new]);
    h.settle();
    assert_eq!(h.state(a).rows.len(), 1);
}

/// A server remembers a group from before another one had it; then somebody comes who was never
/// here. Real clients that are refused while they digest `connected` do not come back.
#[test]
fn a_change_of_a_group_that_another_server_had_is_made_anew() {
    let mut h = Harness::new(false);
    let stays = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let cookie = h.store.moved_on(&"g".into()).cookie();
    let late = h.connect("g", "b", None, Persisted::default(), 51).expect("admitted");
    h.say(late, &init(&put("p", COMMENTED)));
    h.settle();
    assert_eq!((h.error_kind(late), h.error_kind(stays)), (None, None));
    assert!(h.state(late).cookie > Some(cookie.clone()), "{cookie}");
    assert!(h.state(late).got.contains("p"));
    let cookie = h.store.moved_on(&"g".into()).cookie();
    h.say(stays, &change(r#"{"op":"del","hash":"q"}"#));
    h.settle();
    assert!(h.state(stays).cookie > Some(cookie));
    assert_eq!(h.store.desired(&"g".into(), &"a".into()), []);
    let new = issue(&h, "i", 1.0);
    h.commit(vec![new]);
    h.settle();
    assert_eq!((h.state(stays).rows.len(), h.state(late).rows.len()), (1, 1));
    // Not again and again: whoever writes so fast has the group.
    for _ in 0..2 {
        h.flush_faults.push_back(CvrStoreError::ConcurrentModification {
            expected: "00".into(),
            actual: "01".into(),
        });
    }
    h.say(late, &change(r#"{"op":"del","hash":"p"}"#));
    h.settle();
    assert_eq!((h.error_kind(late), h.error_kind(stays)), (Some("Rehome"), None));
}

/// It wants nothing new, so nothing is written: what it missed cannot be read at the version that
/// is remembered.
#[test]
fn a_late_client_of_a_group_that_another_server_had_is_caught_up() {
    let mut h = Harness::new(false);
    let early = joined(&mut h, "b", &put("q", ALL_ISSUES));
    let early = h.disconnect(early);
    let stays = joined(&mut h, "a", &put("q", ALL_ISSUES));
    let new = issue(&h, "i", 1.0);
    h.commit(vec![new]);
    h.settle();
    let cookie = h.store.moved_on(&"g".into()).cookie();
    let late = rejoin(&mut h, "b", early);
    assert_eq!((h.error_kind(late), h.error_kind(stays)), (None, None));
    assert!(h.state(late).cookie >= Some(cookie));
    assert_eq!(h.state(late).rows, h.state(stays).rows);
    assert_eq!(h.state(late).cookie, h.state(stays).cookie);
    h.say(late, &change(&put("p", COMMENTED)));
    h.settle();
    assert!(h.state(late).got.contains("p"), "its next message is taken");
}

#[test]
fn a_group_that_nobody_needs_ends_even_if_the_clock_was_set_back() {
    let mut h = Harness::new(false);
    let conn = joined(&mut h, "a", "");
    h.disconnect(conn);
    h.now_ms -= 3_600_000.0;
    h.feed(&"g".into(), Event::Timer(Timer::Idle));
    assert!(h.groups.is_empty());
}

// ---- custom queries ---------------------------------------------------------------------------

fn with_endpoint() -> Harness {
    let mut h = Harness::new(true);
    h.endpoint = Box::new(|_, q| match q.id.as_str() {
        "bad" => Answer::App("not allowed"),
        "lost" => Answer::Missing,
        _ => Answer::Ast(ALL_ISSUES.to_owned()),
    });
    h
}

#[test]
fn a_connection_is_validated_before_its_queries_are_asked_for() {
    let mut h = with_endpoint();
    let conn = joined(&mut h, "c", &named("q"));
    assert_eq!(h.requests, [vec![], vec!["q".to_owned()]]);
    assert!(h.state(conn).got.contains("q"));
}

#[test]
fn results_are_reused_within_five_seconds() {
    let mut h = with_endpoint();
    let conn = joined(&mut h, "c", &named("q"));
    let requests = h.requests.len();
    h.say(conn, &change(r#"{"op":"clear"}"#));
    h.say(conn, &change(&named("q")));
    h.settle();
    assert_eq!(h.requests.len(), requests);
    h.pass(5_000.0);
    h.say(conn, &change(r#"{"op":"clear"}"#));
    h.say(conn, &change(&named("q")));
    h.settle();
    assert_eq!(h.requests.len(), requests + 1);
}

#[test]
fn an_application_error_fails_one_query() {
    let mut h = with_endpoint();
    let conn = joined(&mut h, "c", &format!("{},{},{}", named("q"), named("bad"), named("lost")));
    assert_eq!(h.socket(conn).model.transform_errors, ["bad"]);
    assert_eq!(h.state(conn).got.iter().collect::<Vec<_>>(), ["q"]);
    assert!(h.state(conn).desired["c"].contains("bad"), "the desire itself stays");
    // Only a new put re-creates it.
    h.pass(6_000.0);
    h.say(conn, &change(&named("other")));
    h.settle();
    assert_eq!(
        h.requests.last().map(Vec::as_slice),
        Some(&["lost".to_owned(), "other".into()][..])
    );
}

#[test]
fn a_failed_request_fails_the_client_that_asked() {
    let mut h = with_endpoint();
    let a = joined(&mut h, "a", &named("q"));
    let b = joined(&mut h, "b", "");
    h.endpoint_down = Some(ApiFailure::http(500, None, "status 500"));
    h.say(b, &change(&named("p")));
    h.settle();
    assert_eq!(h.error_kind(b), Some("TransformFailed"));
    assert_eq!(h.error_kind(a), None);
    let new = issue(&h, "i", 1.0);
    h.commit(vec![new]);
    h.settle();
    assert_eq!(h.state(a).rows.len(), 1, "pipelines stay");
}

#[test]
fn refused_credentials_at_connect_change_nothing() {
    let mut h = with_endpoint();
    h.endpoint_down = Some(ApiFailure::http(401, None, "status 401"));
    let conn = h.connect("g", "c", None, Persisted::default(), 51).expect("admitted");
    h.say(conn, &init(&named("q")));
    h.settle();
    assert_eq!(h.error_kind(conn), Some("TransformFailed"));
    assert_eq!(h.store.flushes, 0);
    assert_eq!(h.socket(conn).model.pokes, 0);
}

#[test]
fn the_endpoint_says_who_the_user_is() {
    let mut h = with_endpoint();
    h.endpoint_user = crate::protocol::custom_query::ValidatedUser::User(Some("other".into()));
    let conn = h.connect("g", "c", Some("me"), Persisted::default(), 51).expect("admitted");
    h.say(conn, &init(""));
    h.settle();
    assert_eq!(h.error_kind(conn), Some("Unauthorized"));
}

#[test]
fn a_new_token_transforms_everything_again_and_the_same_one_nothing() {
    let mut h = with_endpoint();
    let conn = h.connect("g", "c", Some("u"), Persisted::default(), 51).expect("admitted");
    h.say(conn, &init(&named("q")));
    h.settle();
    h.say(conn, r#"["updateAuth",{"auth":"t1"}]"#);
    h.settle();
    let requests = h.requests.len();
    assert_eq!(h.requests.last(), Some(&vec!["q".to_owned()]));
    h.say(conn, r#"["updateAuth",{"auth":"t1"}]"#);
    h.settle();
    assert_eq!(h.requests.len(), requests);
    h.say(conn, r#"["updateAuth",{"auth":""}]"#);
    h.settle();
    assert_eq!(h.error_kind(conn), Some("Unauthorized"));
}

#[test]
fn revalidation_spares_a_server_in_trouble_and_ends_refused_connections() {
    let mut h = with_endpoint();
    let a = joined(&mut h, "a", &named("q"));
    let b = joined(&mut h, "b", "");
    h.endpoint_down = Some(ApiFailure::call(CallReason::Internal, "down"));
    let requests = h.requests.len();
    h.pass(301_000.0);
    h.settle();
    assert!(h.requests.len() > requests);
    assert_eq!((h.error_kind(a), h.error_kind(b)), (None, None));
    h.endpoint_down = Some(ApiFailure::http(403, None, "status 403"));
    h.pass(301_000.0);
    h.settle();
    assert_eq!(h.error_kind(a), Some("TransformFailed"));
}

#[test]
fn protocol_52_gets_chunks() {
    let mut h = Harness::new(false);
    for i in 0..250 {
        let new = issue(&h, &format!("i{i:03}"), f64::from(i));
        h.commit(vec![new]);
    }
    let old = joined(&mut h, "old", &put("q", ALL_ISSUES));
    let new = h.connect("g", "new", None, Persisted::default(), 52).expect("admitted");
    h.say(new, &init(""));
    h.settle();
    assert_eq!(h.state(new).rows, h.state(old).rows);
    assert_eq!(h.state(new).rows.len(), 250);
}
