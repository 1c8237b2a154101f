//! Mutations: what is taken, and who is told of failures (spec: sync-protocol §7.1, §7.6).

use std::sync::Arc;

use serde_json::json;

use super::super::{ConnId, Event, OutgoingPush, Pushed, Settings};
use super::client::Persisted;
use super::harness::{CLIENT_SCHEMA, Harness};
use crate::protocol::custom_query::ValidatedUser;
use crate::protocol::error::{ApiFailure, CallReason, ErrorBody, MutationId};
use crate::protocol::mutate::{CleanUp, MutateResponse, parse_response};

fn harness(change: impl FnOnce(&mut Settings)) -> Harness {
    let mut h = Harness::new(false);
    let settings = Arc::make_mut(&mut h.settings);
    settings.has_mutate_endpoint = true;
    change(settings);
    h
}

fn joined(h: &mut Harness, client: &str) -> ConnId {
    let conn = h.connect("g", client, Some("u"), Persisted::default(), 51).expect("admitted");
    h.say(
        conn,
        &format!(
            r#"["initConnection",{{"desiredQueriesPatch":[],"clientSchema":{CLIENT_SCHEMA},
               "userPushURL":"https://push","userPushHeaders":{{"x":"1"}}}}]"#
        ),
    );
    h.settle();
    assert_eq!(h.error_kind(conn), None, "{:?}", h.socket(conn).error);
    conn
}

fn message(group: &str, kind: &str, mutations: &[(&str, i64)]) -> String {
    let args = if kind == "crud" { json!([{"ops": []}]) } else { json!([null]) };
    let name = if kind == "crud" { "_zero_crud" } else { "m" };
    let mutations: Vec<_> = mutations
        .iter()
        .map(|(client, id)| {
            json!({"type": kind, "id": id, "clientID": client, "name": name, "args": args,
                "timestamp": 1})
        })
        .collect();
    let body = json!({"clientGroupID": group, "mutations": mutations, "pushVersion": 1,
        "timestamp": 1, "requestID": "r"});
    json!(["push", body]).to_string()
}

/// The endpoint answers the oldest push.
fn answer(h: &mut Harness, answer: Result<MutateResponse, ApiFailure>) {
    let (group, sent) = h.pushes.remove(0);
    let mutation_ids = sent.push.mutations.iter().map(|m| m.id.clone()).collect();
    let pushed = Pushed { conn: sent.conn, revision: sent.revision, mutation_ids, answer };
    h.feed(&group, Event::Pushed(Box::new(pushed)));
    h.settle();
}

fn says(json: &serde_json::Value) -> Result<MutateResponse, ApiFailure> {
    Ok(parse_response(json.to_string().as_bytes()).expect("an answer"))
}

fn refusal(h: &Harness, conn: ConnId) -> (String, String) {
    let error = h.socket(conn).error.as_ref().expect("an error");
    (error.kind_name().to_owned(), error.message().to_owned())
}

fn ids(error: &ErrorBody) -> Vec<(String, i64)> {
    let ErrorBody::PushFailed { mutation_ids, .. } = error else { panic!("{error}") };
    mutation_ids.iter().map(|m| (m.client_id.clone(), m.id)).collect()
}

#[test]
fn pushes_are_judged_in_the_order_of_the_spec() {
    let custom_off = "A ZERO_MUTATE_URL must be set in order to process custom mutations.";
    let other = "clientGroupID in mutation \"x\" does not match clientGroupID of connection \"g";
    let crud_off = "Support for legacy CRUD mutations is disabled";
    type Change = fn(&mut Settings);
    let cases: [(Change, &str, &str, &str); 4] = [
        (|_| {}, "x", "custom", other),
        (|s| s.has_mutate_endpoint = false, "g", "custom", custom_off),
        (|s| s.crud_mutations = false, "g", "crud", crud_off),
        (|_| {}, "g", "crud", "This version of zeroring does not execute legacy CRUD mutations."),
    ];
    for (change, group, kind, text) in cases {
        let mut h = harness(change);
        let conn = joined(&mut h, "a");
        h.say(conn, &message(group, kind, &[("a", 1)]));
        let (name, message) = refusal(&h, conn);
        assert_eq!(name, "InvalidPush");
        assert!(message.starts_with(text), "{message}");
        assert!(h.pushes.is_empty());
    }
    let mut h = harness(|_| {});
    let conn = joined(&mut h, "a");
    h.say(conn, &message("g", "custom", &[]));
    assert!(h.pushes.is_empty() && h.error_kind(conn).is_none());
}

#[test]
fn a_push_leaves_with_the_credentials_of_its_moment() {
    let mut h = harness(|_| {});
    let conn = h.connect("g", "a", Some("u"), Persisted::default(), 51).expect("admitted");
    h.say(conn, &message("g", "custom", &[("a", 1)]));
    h.disconnect(conn);
    let conn = joined(&mut h, "a");
    h.say(conn, &message("g", "custom", &[("a", 2)]));
    h.say(conn, r#"["updateAuth",{"auth":"t"}]"#);
    h.say(conn, &message("g", "custom", &[("b", 3)]));
    h.settle();
    let of = |p: &'_ OutgoingPush| {
        let c = p.credentials.clone();
        let url = c.mutate.url.is_some();
        (p.revision, c.token.clone().map(|t| t.to_string()), url, c.mutate.headers.len())
    };
    let seen: Vec<_> = h.pushes.iter().map(|(_, p)| of(p)).collect();
    assert_eq!(seen, [(0, None, false, 0), (1, None, true, 1), (2, Some("t".into()), true, 1)]);
}

#[test]
fn errors_go_to_the_clients_whose_mutations_they_are() {
    let mut h = harness(|_| {});
    let (a, b) = (joined(&mut h, "a"), joined(&mut h, "b"));
    h.say(a, &message("g", "custom", &[("b", 1), ("gone", 1)]));
    let listed = json!([{"id": 1, "clientID": "b"}, {"id": 1, "clientID": "gone"}]);
    answer(
        &mut h,
        says(&json!({"kind": "PushFailed", "origin": "server", "reason": "internal",
            "message": "boom", "mutationIDs": listed})),
    );
    assert_eq!(h.error_kind(a), None, "the sender owns none of them");
    assert_eq!(refusal(&h, b), ("PushFailed".to_owned(), "boom".to_owned()));
    assert_eq!(ids(h.socket(b).error.as_ref().unwrap()).len(), 2, "passed on unchanged");
    // A failed call lists what was sent, and everybody concerned is told all of it.
    let b = joined(&mut h, "b");
    h.say(a, &message("g", "custom", &[("a", 1), ("b", 1)]));
    answer(&mut h, Err(ApiFailure::call(CallReason::Internal, "no way")));
    for conn in [a, b] {
        let error = h.socket(conn).error.as_ref().unwrap();
        assert_eq!(ids(error), [("a".to_owned(), 1), ("b".to_owned(), 1)]);
    }
}

#[test]
fn an_error_finds_the_clients_present_socket_or_nobody() {
    let mut h = harness(|_| {});
    let old = joined(&mut h, "a");
    h.say(old, &message("g", "custom", &[("a", 1)]));
    let new = joined(&mut h, "a");
    answer(&mut h, Err(ApiFailure::call(CallReason::Parse, "x")));
    assert_eq!(h.error_kind(new), Some("PushFailed"));
    // Before `initConnection` there is nobody to tell.
    let early = h.connect("g", "b", Some("u"), Persisted::default(), 51).expect("admitted");
    h.say(early, &message("g", "custom", &[("b", 1)]));
    answer(&mut h, Err(ApiFailure::call(CallReason::Parse, "x")));
    assert!(!h.socket(early).closed);
}

#[test]
fn refused_credentials_end_the_sender_unless_it_has_new_ones() {
    let mut h = harness(|_| {});
    let refused = || Err(ApiFailure::http(401, None, "who?"));
    let (a, b) = (joined(&mut h, "a"), joined(&mut h, "b"));
    h.say(a, &message("g", "custom", &[("b", 1)]));
    answer(&mut h, refused());
    assert_eq!(refusal(&h, b), ("PushFailed".to_owned(), "who?".to_owned()));
    assert_eq!(refusal(&h, a), ("PushFailed".to_owned(), "who?".to_owned()));
    let a = joined(&mut h, "a");
    h.say(a, &message("g", "custom", &[("b", 1)]));
    h.say(a, r#"["updateAuth",{"auth":"t"}]"#);
    h.settle();
    answer(&mut h, refused());
    assert_eq!(h.error_kind(a), None);
    // A failure of another kind says nothing about credentials.
    h.say(a, &message("g", "custom", &[("b", 1)]));
    answer(&mut h, Err(ApiFailure::http(500, None, "oh")));
    assert_eq!(h.error_kind(a), None);
}

#[test]
fn the_endpoint_says_who_pushes() {
    let mut h = harness(|_| {});
    let done = |user| Ok(MutateResponse::Done { user, errors: Vec::new() });
    let a = joined(&mut h, "a");
    for user in [ValidatedUser::Unsaid, ValidatedUser::User(Some("u".into()))] {
        h.say(a, &message("g", "custom", &[("a", 1)]));
        answer(&mut h, done(user));
        assert_eq!(h.error_kind(a), None);
    }
    for user in [None, Some("v".to_owned())] {
        let a = joined(&mut h, "a");
        h.say(a, &message("g", "custom", &[("a", 1)]));
        answer(&mut h, done(ValidatedUser::User(user)));
        let text = "Connection userID does not match validated server userID.";
        assert_eq!(refusal(&h, a), ("PushFailed".to_owned(), text.to_owned()));
        let body = serde_json::to_value(h.socket(a).error.as_ref().unwrap()).unwrap();
        assert_eq!((&body["reason"], &body["status"]), (&json!("http"), &json!(401)));
    }
}

#[test]
fn results_are_cleaned_up_when_seen_and_when_clients_are_deleted() {
    let mut h = harness(|_| {});
    let (a, b) = (joined(&mut h, "a"), joined(&mut h, "b"));
    h.say(a, r#"["ackMutationResponses",{"clientID":"b","id":4}]"#);
    let seen = CleanUp::Single(MutationId { id: 4, client_id: "b".into() });
    assert_eq!(std::mem::take(&mut h.clean_ups), [seen]);
    h.disconnect(b);
    h.say(a, r#"["deleteClients",{"clientIDs":[]}]"#);
    h.say(a, r#"["deleteClients",{"clientIDs":["b","x"]}]"#);
    h.settle();
    let gone = CleanUp::Bulk(vec!["b".into(), "x".into()]);
    assert_eq!(std::mem::take(&mut h.clean_ups), [gone]);
    h.say(a, r#"["deleteClients",{"clientIDs":["a"]}]"#);
    h.settle();
    assert_eq!(h.error_kind(a), Some("Internal"));
    assert_eq!(h.clean_ups, [], "nobody deletes itself");

    let mut h = harness(|s| s.has_mutate_endpoint = false);
    let a = joined(&mut h, "a");
    h.say(a, r#"["ackMutationResponses",{"clientID":"a","id":4}]"#);
    h.say(a, r#"["deleteClients",{"clientIDs":["b"]}]"#);
    h.settle();
    assert_eq!(h.clean_ups, []);
}
