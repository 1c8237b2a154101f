//! Checklist 1–15: paths, parameters, sub-protocol, versions, validation.

use serde_json::json;

use crate::support::*;

fn greeted(server: &Server, dial: &Dial) -> Client {
    let mut client = Client::connect(server, dial).unwrap();
    let (kind, body) = client.json();
    assert_eq!(kind, "connected", "{body}");
    client
}

fn refused(server: &Server, dial: &Dial) -> String {
    let mut client = Client::connect(server, dial).unwrap();
    let end = client.end();
    assert_eq!(end.code, Some(1002), "{end:?}");
    assert!(!end.reason.is_empty());
    end.reason
}

#[test]
fn paths_are_judged_after_the_upgrade() {
    let server = Server::start(&Setup::default());
    let dial = dial("g", "c");
    greeted(&server, &dial);
    greeted(&server, &dial.clone().path("/x/sync/v51/connect"));
    for bad in [
        "/a/b/sync/v51/connect",
        "/sync/v51/connect/",
        "/foo/v51/connect",
        "/replication/v6/changes",
        "/sync/vx/connect",
    ] {
        let reason = refused(&server, &dial.clone().path(bad));
        assert!(reason.starts_with("Error: Invalid "), "{bad}: {reason}");
    }
}

#[test]
fn the_sub_protocol_is_echoed_and_decoded() {
    let server = Server::start(&Setup { tokens: true, ..Setup::default() });
    // Characters whose base64 has +, / and = in it.
    let content = json!({"authToken": "tok-é?>~~ÿÿ", "x": "??>>~~"});
    let dial = dial("g", "c").and("userID=u").with(&content);
    let client = greeted(&server, &dial);
    assert_eq!(client.echoed, dial.protocol);
    // 12 KiB of it.
    let long = json!({"authToken": "t".repeat(9_000)});
    let dial = self::dial("g", "c").and("userID=u").with(&long);
    assert!(dial.protocol.as_ref().unwrap().len() > 12_000);
    greeted(&server, &dial);
}

#[test]
fn parameters_are_required_as_the_original_does() {
    let server = Server::start(&Setup::default());
    let with = |query: &str| Dial { query: query.into(), ..dial("g", "c") };
    greeted(&server, &with("clientID=c&clientGroupID=g&ts=12.75&lmid=0"));
    for (query, reason) in [
        ("clientGroupID=g&ts=1&lmid=0", "Error: invalid querystring - missing clientID"),
        ("clientID=c&ts=1&lmid=0", "Error: invalid querystring - missing clientGroupID"),
        ("clientID=c&clientGroupID=g&lmid=0", "Error: invalid querystring - missing ts"),
        ("clientID=c&clientGroupID=g&ts=1&lmid=", "Error: invalid querystring - missing lmid"),
        (
            "clientID=c&clientGroupID=g&ts=abc&lmid=0",
            "Error: invalid querystring parameter ts, got: abc",
        ),
    ] {
        let got = refused(&server, &with(query));
        assert!(got.starts_with(reason), "{got}");
    }
    let without = Dial { protocol: None, ..dial("g", "c") };
    assert_eq!(refused(&server, &without), "Error: Unexpected undefined value");
    let bad = Dial { protocol: Some("!!!".into()), ..dial("g", "c") };
    assert_eq!(refused(&server, &bad), "Error: Invalid character");
}

#[test]
fn connected_repeats_the_socket_id() {
    let server = Server::start(&Setup::default());
    let mut client = Client::connect(&server, &dial("g", "c")).unwrap();
    let (kind, body) = client.json();
    assert_eq!((kind.as_str(), &body["wsid"]), ("connected", &json!("w-c")));
    assert!(body["timestamp"].as_f64().is_some_and(|t| t > 1.6e12));
}

#[test]
fn versions_outside_of_the_range_get_one_error() {
    let server = Server::start(&Setup::default());
    for version in ["29", "53"] {
        let path = format!("/sync/v{version}/connect");
        let mut client = Client::connect(&server, &dial("g", "c").path(&path)).unwrap();
        let (kind, body) = client.json();
        assert_eq!((kind.as_str(), &body["kind"]), ("error", &json!("VersionNotSupported")));
        assert_eq!(client.end().code, None);
    }
    greeted(&server, &dial("g", "c").path("/sync/v30/connect"));
    greeted(&server, &dial("g", "c").path("/sync/v52/connect"));
}

#[test]
fn init_connection_in_the_header_is_the_first_message() {
    let server = Server::start(&Setup::default());
    let message: serde_json::Value = serde_json::from_str(&init(&put("q"))).unwrap();
    let dial = dial("g", "c").with(&json!({"initConnectionMessage": message}));
    let mut client = greeted(&server, &dial);
    client.pokes_until(is_got);
    // A second one is an error.
    client.say(&init(""));
    assert_eq!(client.error()["kind"], "Internal");
    assert_eq!(client.end().code, None);
}

#[test]
fn what_is_no_message_ends_the_socket() {
    let server = Server::start(&Setup::default());
    for bad in ["nonsense", r#"["nope",{}]"#, r#"["changeDesiredQueries",{}]"#, "[]"] {
        let mut client = greeted(&server, &dial("g", "c"));
        client.say(bad);
        assert_eq!(client.error()["kind"], "InvalidMessage", "{bad}");
        assert_eq!(client.end().code, None);
    }
}

#[test]
fn deprecated_messages_are_ignored_and_pings_answered() {
    let server = Server::start(&Setup::default());
    let mut client = greeted(&server, &dial("g", "c"));
    client.say(r#"["pull",{"clientGroupID":"g","cookie":null,"requestID":"r"}]"#);
    client.say(r#"["closeConnection",[]]"#);
    client.say(r#"["changeDesiredQueries",{"desiredQueriesPatch":[]}]"#);
    client.say(r#"["ping",{}]"#);
    match client.next() {
        Got::Json(kind, _) => assert_eq!(kind, "pong"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_message_that_is_too_big_closes_with_1009() {
    let server = Server::start(&Setup::default());
    let mut client = greeted(&server, &dial("g", "c"));
    client.say(&format!(r#"["ping",{{"x":"{}"}}]"#, "y".repeat(11 << 20)));
    assert_eq!(client.end().code, Some(1009));
}

#[test]
fn tokens_need_a_user_and_somebody_to_judge_them() {
    let server = Server::start(&Setup { tokens: true, ..Setup::default() });
    let token = json!({"authToken": "t"});
    let mut client = Client::connect(&server, &dial("g", "c").with(&token)).unwrap();
    assert_eq!(client.error()["kind"], "Unauthorized");
    assert_eq!(client.end().code, Some(3000));
    drop(server);
    let server = Server::start(&Setup::default());
    let with_user = dial("g", "c").and("userID=u").with(&token);
    let mut client = Client::connect(&server, &with_user).unwrap();
    assert_eq!(client.error()["kind"], "Internal");
    greeted(&server, &dial("g", "d"));
}
