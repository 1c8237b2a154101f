//! What is no message, and what is none yet (spec: sync-protocol §2 "strict validation", §3.2,
//! §5.2, checklist 10, 13–15).

use serde_json::{Value, json};
use tungstenite::Message;

use crate::support::server::is_original;
use crate::world::{World, again, change, init, items, put};

const NOTHING: Vec<Value> = Vec::new();

#[test]
fn a_message_that_is_none_fails_its_connection_only() {
    let world = World::new(&[]);
    let mut other = world.connect("g", "other").init(init(&[put("q", &items())])).connected();
    other.until_got("q");
    let mut bad: Vec<(String, &str)> =
        ["not json", r#"["ping",{}"#].map(|text| (text.to_owned(), "SyntaxError: ")).into();
    for message in [
        json!({}),
        json!(null),
        json!([]),
        json!(["ping"]),
        json!(["ping", 1]),
        json!(["unknown", {}]),
        json!(["initConnection", {}]),
        json!(["initConnection", {"desiredQueriesPatch": "all"}]),
        json!(["initConnection", {"desiredQueriesPatch": [{"op": "put"}]}]),
        json!(["initConnection", {"desiredQueriesPatch": [{"op": "take", "hash": "h"}]}]),
        json!(["initConnection", {"desiredQueriesPatch": [{"op": "put", "hash": "h", "ttl": "1"}]}]),
        json!(["initConnection", {"desiredQueriesPatch": [], "clientSchema": {}}]),
        json!(["initConnection", {"desiredQueriesPatch": [],
            "clientSchema": {"tables": {"item": {"columns": {"id": {"type": "text"}}, "primaryKey": ["id"]}}}}]),
        json!(["initConnection", {"desiredQueriesPatch": [],
            "clientSchema": {"tables": {"item": {"columns": {"id": {"type": "string"}}}}}}]),
        json!(["changeDesiredQueries", {}]),
        json!(["changeDesiredQueries", {"desiredQueriesPatch":
            [{"op": "put", "hash": "h", "ast": {"table": 1}}]}]),
        json!(["changeDesiredQueries", {"desiredQueriesPatch":
            [{"op": "put", "hash": "h", "ast": {"table": "item", "where": {"type": "xor"}}}]}]),
        json!(["deleteClients", {"clientIDs": "c"}]),
        json!(["updateAuth", {}]),
        json!(["push", {"clientGroupID": "g"}]),
        json!(["ackMutationResponses", {"clientID": "c"}]),
        json!(["pull", {"clientGroupID": "g"}]),
        json!(["inspect", {"op": "version"}]),
    ] {
        bad.push((message.to_string(), "TypeError: "));
    }
    for (i, (text, prefix)) in bad.into_iter().enumerate() {
        println!("{text}");
        let mut socket = world.connect("g", &format!("c{i}")).connected();
        socket.send_text(&text);
        let error = socket.error();
        assert_eq!(error["kind"], "InvalidMessage", "{text}");
        let message = error["message"].as_str().unwrap();
        assert!(message.starts_with(prefix), "{text}: {message}");
    }
    // Decision 2: a newer client's extra keys are no reason to cut it off.
    for message in [
        json!(["ping", {"x": 1}]),
        json!(["changeDesiredQueries", {"desiredQueriesPatch": [], "x": 1}]),
    ] {
        let mut socket = world.connect("g", "c").connected();
        socket.send(&message);
        if is_original() {
            assert_eq!(socket.error()["kind"], "InvalidMessage", "{message}");
        } else {
            socket.ping();
        }
    }
    // A message of the header is held to the same, after `connected`.
    for message in [json!(["initConnection", {}]), json!(["unknown", {}]), json!("x")] {
        let connect = world.connect("g", "h").content(&json!({"initConnectionMessage": message}));
        assert_eq!(connect.connected().error()["kind"], "InvalidMessage", "{message}");
    }
    assert_eq!(other.ping(), NOTHING);
}

#[test]
fn some_messages_have_no_answer() {
    let world = World::new(&[]);
    let quiet = [
        json!(["pull", {"clientGroupID": "g", "cookie": null, "requestID": "r"}]),
        json!(["closeConnection", []]),
        json!(["changeDesiredQueries", {"desiredQueriesPatch": [], "traceparent": "00-1-2-00"}]),
        json!(["deleteClients", {"clientIDs": ["x"]}]),
        json!(["deleteClients", {}]),
        json!(["inspect", {"op": "version", "id": "i"}]),
        json!(["ackMutationResponses", {"clientID": "c", "id": 1}]),
        json!(["push", {"clientGroupID": "g", "mutations": [], "pushVersion": 1,
            "timestamp": 1, "requestID": "r"}]),
        json!(["updateAuth", {"auth": ""}]),
    ];
    // Before `initConnection`.
    let mut socket = world.connect("g", "c").connected();
    for message in &quiet {
        socket.send(message);
    }
    assert_eq!(socket.ping(), NOTHING);
    // A query that was wanted too early is not remembered.
    socket.send(&change(&[put("early", &items())]));
    socket.send(&json!(["initConnection", init(&[put("q", &items())])]));
    let poke = socket.until_got("q");
    assert_eq!(poke.desired["c"], ["+q"]);
    assert_eq!(poke.got, ["+q"]);
    // After it; nothing changes, so nothing is poked either.
    for message in quiet.iter().filter(|m| m[0] != "inspect" && m[0] != "deleteClients") {
        socket.send(message);
    }
    socket.send(&change(&[put("r", &items())]));
    let poke = socket.until_got("r");
    assert_eq!((&poke.desired["c"][..], &poke.rows[..]), (&["+r".to_owned()][..], &[][..]));
    assert_eq!(socket.aside, NOTHING);
}

#[test]
fn a_second_init_connection_fails() {
    let world = World::new(&[]);
    let body = || init(&[put("q", &items())]);
    let mut socket = world.connect("g", "c").init(body()).connected();
    socket.until_got("q");
    socket.send(&json!(["initConnection", again(&[])]));
    socket.fails("Internal", "Outbound stream already set for this connection!");
    // The group goes on.
    let cookie = socket.cookie.clone().unwrap();
    let mut socket = world.connect("g", "c").cookie(&cookie).init(again(&[])).connected();
    assert!(socket.poke().is_empty());
}

#[test]
fn queries_need_an_ast_or_a_name() {
    let world = World::new(&[]);
    let both = "Cannot provide name or args with ast";
    let neither = "Must provide name and args";
    let op = |fields: Value| {
        let mut op = json!({"op": "put", "hash": "h"});
        op.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        op
    };
    for (fields, text) in [
        (json!({"ast": items(), "name": "n", "args": []}), both),
        (json!({"ast": items(), "args": []}), both),
        (json!({}), neither),
        (json!({"name": "n"}), neither),
        (json!({"args": []}), neither),
    ] {
        let mut socket = world.connect("g", "c").init(init(&[])).connected();
        socket.poke();
        socket.send(&change(&[op(fields)]));
        socket.fails("Internal", text);
    }
    // Of a query that the group knows the body is not looked at.
    let mut socket = world.connect("g", "d").init(init(&[put("h", &items())])).connected();
    socket.until_got("h");
    let mut socket = world.connect("g", "e").init(init(&[op(json!({}))])).connected();
    let poke = socket.pokes_until(|p| p.rows.len() == 3);
    assert_eq!(poke.desired["e"], ["+h"]);
    socket.try_send(Message::Close(None));
}

#[test]
fn pushes_that_nobody_takes() {
    let world = World::new(&[]);
    let push = |group: &str| {
        json!(["push", {"clientGroupID": group, "pushVersion": 1, "timestamp": 1, "requestID": "r",
            "mutations": [{"type": "custom", "id": 1, "clientID": "c", "name": "m", "args": [null],
                "timestamp": 1}]}])
    };
    for (group, text) in [
        (
            "other",
            "clientGroupID in mutation \"other\" does not match clientGroupID of connection \"g",
        ),
        ("g", "A ZERO_MUTATE_URL must be set in order to process custom mutations."),
    ] {
        let mut socket = world.connect("g", "c").init(init(&[])).connected();
        socket.poke();
        socket.send(&push(group));
        socket.fails("InvalidPush", text);
    }
}

#[test]
fn nobody_is_authenticated_to_inspect() {
    if is_original() {
        // It tells a client that has the password what it wants to know.
        return;
    }
    let world = World::new(&[]);
    let mut socket = world.connect("g", "c").init(init(&[put("q", &items())])).connected();
    socket.until_got("q");
    for op in [
        json!({"op": "version"}),
        json!({"op": "metrics"}),
        json!({"op": "queries"}),
        json!({"op": "analyze-query", "ast": items()}),
        json!({"op": "authenticate", "value": "secret"}),
    ] {
        let mut request = op;
        request["id"] = json!("i7");
        socket.send(&json!(["inspect", request]));
        let answer = json!(["inspect", {"op": "authenticated", "id": "i7", "value": false}]);
        assert_eq!(socket.take_aside("inspect"), answer);
    }
    socket.ping();
}
