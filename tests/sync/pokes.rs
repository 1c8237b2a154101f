//! Checklist 16–31: pokes, cookies, several tabs, errors of cookies and schemas.

use serde_json::{Value, json};
use zeroring_core::change::message::LiteValue;

use crate::support::*;

fn rows(parts: &[Value]) -> Vec<Value> {
    let lists = parts.iter().filter_map(|p| p["rowsPatch"].as_array());
    lists.flatten().cloned().collect()
}

#[test]
fn rows_arrive_live_and_cookies_chain() {
    let mut server = Server::start(&Setup::default());
    let first = server.issue("i1", 1);
    server.commit(vec![first]);
    let mut client = Client::joined(&server, &dial("g", "c"), &put("q"));
    let parts = client.pokes_until(is_got);
    let expected = json!({"id": "i1", "title": "title of i1", "n": 1});
    assert_eq!(rows(&parts), [json!({"op": "put", "tableName": "issue", "value": expected})]);
    for n in 2..6 {
        let next = server.issue(&format!("i{n}"), n);
        let version = server.commit(vec![next]);
        let parts = client.poke();
        assert_eq!(client.cookie.as_deref(), Some(version.as_str()));
        assert_eq!(rows(&parts).len(), 1);
    }
}

#[test]
fn a_reconnecting_client_gets_one_empty_poke_and_then_what_it_missed() {
    let mut server = Server::start(&Setup::default());
    let mut client = Client::joined(&server, &dial("g", "c"), &put("q"));
    client.pokes_until(is_got);
    let cookie = client.cookie.clone().unwrap();
    client.drop_connection();
    let again = dial("g", "c").cookie(&cookie);
    let mut client = Client::joined(&server, &again, "");
    client.cookie = Some(cookie.clone());
    assert!(client.poke().is_empty());
    assert_eq!(client.cookie, Some(cookie.clone()));
    client.drop_connection();
    let missed = server.issue("i9", 9);
    server.commit(vec![missed]);
    let mut client = Client::joined(&server, &again, "");
    client.cookie = Some(cookie);
    let parts = client.pokes_until(|p| p.get("rowsPatch").is_some());
    assert_eq!(rows(&parts).len(), 1);
}

#[test]
fn many_rows_come_in_parts_and_for_protocol_52_in_chunks() {
    let mut server = Server::start(&Setup::default());
    let many: Vec<_> = (0..250).map(|n| server.issue(&format!("i{n:03}"), n)).collect();
    server.commit(many);
    let mut old = Client::joined(&server, &dial("g", "old"), &put("q"));
    let parts = old.pokes_until(is_got);
    let with_rows: Vec<usize> =
        parts.iter().map(|p| rows(std::slice::from_ref(p)).len()).filter(|n| *n > 0).collect();
    assert!(with_rows.len() >= 3 && with_rows.iter().all(|n| *n <= 100), "{with_rows:?}");
    let dial = dial("h", "new").path("/sync/v52/connect");
    let mut new = Client::joined(&server, &dial, &put("q"));
    assert_eq!(rows(&new.pokes_until(is_got)).len(), 250);
}

#[test]
fn two_tabs_get_each_others_desires_and_each_row_once() {
    let mut server = Server::start(&Setup::default());
    let mut a = Client::joined(&server, &dial("g", "a"), &put("qa"));
    a.pokes_until(is_got);
    let mut b = Client::joined(&server, &dial("g", "b"), &put("qb"));
    b.pokes_until(|p| p["gotQueriesPatch"].to_string().contains("qb"));
    let parts = a.pokes_until(|p| p["gotQueriesPatch"].to_string().contains("qb"));
    assert!(parts.iter().any(|p| p["desiredQueriesPatches"]["b"][0]["hash"] == "qb"));
    let new = server.issue("i", 1);
    server.commit(vec![new]);
    for client in [&mut a, &mut b] {
        assert_eq!(rows(&client.poke()).len(), 1);
    }
}

#[test]
fn last_mutation_ids_and_results_come_together_without_any_query() {
    let mut server = Server::start(&Setup::default());
    let mut client = Client::joined(&server, &dial("g", "c"), "");
    client.poke();
    // The bring-up's own poke may or may not move the cookie.
    let changes = vec![
        server.insert("clients", &[text("g"), text("c"), LiteValue::Integer(1), LiteValue::Null]),
        server.insert(
            "mutations",
            &[
                text("g"),
                text("c"),
                LiteValue::Integer(1),
                text(r#"{"error":"app","message":"m"}"#),
            ],
        ),
    ];
    server.commit(changes);
    let parts = client.pokes_until(|p| p.get("lastMutationIDChanges").is_some());
    let part = parts.last().unwrap();
    assert_eq!(part["lastMutationIDChanges"], json!({"c": 1}));
    assert_eq!(part["mutationsPatch"][0]["mutation"]["result"]["message"], "m");
}

#[test]
fn cookies_that_cannot_be_are_refused() {
    let server = Server::start(&Setup::default());
    let mut client = Client::joined(&server, &dial("new", "c").cookie("00:01"), "");
    assert_eq!(client.error()["kind"], "ClientNotFound");
    let mut known = Client::joined(&server, &dial("g", "c"), "");
    known.poke();
    let mut client = Client::joined(&server, &dial("g", "d").cookie("8zzzzzzzzz"), "");
    assert_eq!(client.error()["kind"], "InvalidConnectionRequestBaseCookie");
}

#[test]
fn client_schemas_are_needed_and_checked() {
    let server = Server::start(&Setup::default());
    let mut client = Client::connect(&server, &dial("g", "c")).unwrap();
    client.say(r#"["initConnection",{"desiredQueriesPatch":[]}]"#);
    assert_eq!(client.error()["kind"], "InvalidConnectionRequest");
    let mut client = Client::connect(&server, &dial("g", "c")).unwrap();
    client.say(
        r#"["initConnection",{"desiredQueriesPatch":[],"clientSchema":{"tables":{"issue":{"columns":{"nope":{"type":"string"}},"primaryKey":["id"]}}}}]"#,
    );
    let error = client.error();
    assert_eq!(error["kind"], "SchemaVersionNotSupported");
    assert!(error["message"].as_str().unwrap().contains("\"issue\".\"nope\""));
}

#[test]
fn an_integer_that_no_double_holds_fails_its_query_alone() {
    let mut server = Server::start(&Setup::default());
    let mut client = Client::joined(&server, &dial("g", "c"), &put("q"));
    client.pokes_until(is_got);
    let fine = server.issue("fine", (1 << 53) - 1);
    server.commit(vec![fine]);
    assert_eq!(rows(&client.poke())[0]["value"]["n"], json!(9_007_199_254_740_991_i64));
    let big = server.issue("big", 1 << 53);
    server.commit(vec![big]);
    let (kind, body) = client.json();
    assert_eq!(kind, "transformError");
    let message = body[0]["message"].as_str().unwrap();
    for part in ["9007199254740992", "issue", "n"] {
        assert!(message.contains(part), "{message}");
    }
    // The group goes on.
    let lmid =
        server.insert("clients", &[text("g"), text("c"), LiteValue::Integer(1), LiteValue::Null]);
    server.commit(vec![lmid]);
    client.pokes_until(|p| p.get("lastMutationIDChanges").is_some());
}

#[test]
fn updates_and_groups_on_two_executors() {
    let mut server = Server::start(&Setup { executors: 2, ..Setup::default() });
    let first = server.issue("i", 0);
    server.commit(vec![first]);
    let mut clients: Vec<Client> = (0..8)
        .map(|g| {
            let mut client = Client::joined(&server, &dial(&format!("g{g}"), "c"), &put("q"));
            client.pokes_until(is_got);
            client
        })
        .collect();
    for n in 1..20 {
        let changed = server.update("issue", &[text("i"), text("t"), LiteValue::Integer(n)]);
        server.commit(vec![changed]);
    }
    for client in &mut clients {
        client.pokes_until(|p| rows(std::slice::from_ref(p)).iter().any(|r| r["value"]["n"] == 19));
    }
}
