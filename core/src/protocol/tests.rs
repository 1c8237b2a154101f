//! The protocol against the examples of spec sync-protocol and its conformance checklist
//! (1–8, 13–15, 19, 22–24).

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::connect::*;
use super::custom_query::*;
use super::error::*;
use super::poke::{self, Chunks, PokePart, QueryPatch};
use super::up::*;
use super::{MIN_PROTOCOL_VERSION, PROTOCOL_VERSION, down};
use crate::client_schema::ClientSchema;
use crate::json::RawJson;

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn parsed(bytes: &[u8]) -> Json {
    serde_json::from_slice(bytes).unwrap()
}

// ---- connect ----

const QUERY: &str = "?clientID=c1&clientGroupID=g1&ts=12.75&lmid=0";
const EMPTY_PROTOCOL: &str = "e30%3D";

fn connect(target: &str) -> Result<ConnectRequest, ConnectError> {
    ConnectRequest::parse(target, Some(EMPTY_PROTOCOL))
}

#[test]
fn paths_may_have_one_base_segment() {
    for path in ["/sync/v51/connect", "/x/sync/v51/connect", "/a%20b~/sync/v51/anything"] {
        let got = connect(&format!("{path}{QUERY}")).unwrap();
        assert_eq!(got.protocol_version, 51.0);
    }
    for path in [
        "/a/b/sync/v51/connect",
        "/sync/v51/connect/",
        "/sync/v51",
        "/sync/51/connect",
        "/sync/v5.1/connect",
        "/sync/v/connect",
        "//sync/v51/connect",
        "/",
        "",
    ] {
        let target = format!("{path}{QUERY}");
        let error = connect(&target).unwrap_err();
        assert_eq!(error.to_string(), format!("Invalid URL: {target}"));
    }
    assert_eq!(parse_path("/replication/v6/changes?x=/y").map(|p| p.worker), Some("replication"));
    let target = format!("/sync/vfive/connect{QUERY}");
    assert_eq!(connect(&target).unwrap_err().to_string(), format!("Invalid version: {target}"));
}

#[test]
fn parameters_are_read_as_in_the_original() {
    let got = connect(
        "/sync/v51/connect?clientID=c%20+1&clientGroupID=g1&ts=1523.7000000476837&lmid=12abc\
         &wsid=w1&userID=&profileID=p&baseCookie=4d3z1s%3A01&baseCookie=other&schemaVersion=3&debugPerf=true",
    )
    .unwrap();
    assert_eq!(got.client_id, "c  1");
    assert_eq!(got.wsid, "w1");
    assert_eq!(got.user_id, None);
    assert_eq!(got.profile_id.as_deref(), Some("p"));
    assert_eq!(got.base_cookie.as_deref(), Some("4d3z1s:01"));

    let least = connect(&format!("/sync/v51/connect{QUERY}")).unwrap();
    assert_eq!((least.wsid.as_str(), least.base_cookie), ("", None));

    for missing in ["clientID", "clientGroupID", "ts", "lmid"] {
        for gone in ["x=1".to_owned(), format!("{missing}=")] {
            let query = QUERY.replace(&format!("{missing}="), &format!("{gone}&y="));
            let error = connect(&format!("/sync/v51/connect{query}")).unwrap_err();
            assert_eq!(error.to_string(), format!("invalid querystring - missing {missing}"));
        }
    }
    for (ts, good) in
        [("12.75", true), (" 7", true), ("0x1f", true), ("-3", true), ("abc", false), (".5", false)]
    {
        let target = format!("/sync/v51/connect{}", QUERY.replace("12.75", ts));
        let got = connect(&target);
        assert_eq!(got.is_ok(), good, "{ts}");
        if let Err(error) = got {
            let url = format!("http://unused{target}");
            let text = format!("invalid querystring parameter ts, got: {ts}, url: {url}");
            assert_eq!(error.to_string(), text);
        }
    }
    let long = QUERY.replace("c1", &"x".repeat(MAX_PARAM_BYTES + 1));
    assert!(matches!(
        connect(&format!("/sync/v51/connect{long}")),
        Err(ConnectError::TooLong { .. })
    ));
}

#[test]
fn sub_protocol_of_the_spec() {
    let header = "eyJpbml0Q29ubmVjdGlvbk1lc3NhZ2UiOlsiaW5pdENvbm5lY3Rpb24iLHsiZGVzaXJlZFF1ZXJpZXNQYXRjaCI6W119XSwiYXV0aFRva2VuIjoidG9rLcOpIn0%3D";
    let got = SubProtocol::decode(header).unwrap();
    assert_eq!(got.auth_token.as_deref(), Some("tok-é"));
    let init = got.init_connection.unwrap();
    assert_eq!(init.as_str(), r#"["initConnection",{"desiredQueriesPatch":[]}]"#);
    assert!(matches!(parse(init.as_str()), Ok(Upstream::InitConnection(_))));
    // Unescaped, without padding, with blanks.
    for same in
        [header.replace("%3D", "="), header.replace("%3D", ""), header.replace("LHs", "LH%20%0As")]
    {
        assert_eq!(SubProtocol::decode(&same).unwrap().auth_token.as_deref(), Some("tok-é"));
    }
    // `+` and `/` of the alphabet, percent-encoded by the client.
    let got = SubProtocol::decode("eyJhdXRoVG9rZW4iOiI%2FPz8%2BPj4ifQ%3D%3D").unwrap();
    assert_eq!(got.auth_token.as_deref(), Some("???>>>"));
}

#[test]
fn bad_sub_protocols_are_told_by_their_layer() {
    let error = |header: &str| SubProtocol::decode(header).unwrap_err().to_string();
    assert_eq!(error("%zz"), "URI malformed");
    assert_eq!(error("%ff"), "URI malformed");
    assert_eq!(error("e30%3D, other"), "Invalid character");
    assert_eq!(error("e30%3D%3D"), "Invalid character");
    assert_eq!(error("e"), "Invalid character");
    assert!(error("bnVsbA%3D%3D").contains("JSON"));
    assert!(error("e30x").contains("JSON"));
    assert_eq!(SubProtocol::decode("WzFd").unwrap(), SubProtocol::default(), "[1] counts as {{}}");
    assert_eq!(SubProtocol::decode("e30").unwrap(), SubProtocol::default());
    let none = ConnectRequest::parse(&format!("/sync/v51/connect{QUERY}"), None).unwrap_err();
    assert_eq!(close_reason(&none), "Error: Unexpected undefined value");
}

#[test]
fn close_reasons_fit_a_close_frame() {
    let error = ConnectError::Url(format!("/{}", "é".repeat(200)));
    let reason = close_reason(&error);
    assert!(reason.len() <= MAX_CLOSE_REASON_BYTES && reason.len() > 118, "{}", reason.len());
    assert!(reason.starts_with("Error: Invalid URL: /é") && reason.ends_with("..."));
    assert_eq!(elide("short", 123), "short");
}

#[test]
fn versions_outside_the_range_are_refused_with_the_side_to_update() {
    assert_eq!(check_version(f64::from(MIN_PROTOCOL_VERSION)), Ok(MIN_PROTOCOL_VERSION));
    assert_eq!(check_version(f64::from(PROTOCOL_VERSION)), Ok(PROTOCOL_VERSION));
    let new = check_version(f64::from(PROTOCOL_VERSION) + 9.0).unwrap_err();
    assert_eq!(
        parsed(&down::error(&new)),
        json!(["error", {"kind": "VersionNotSupported", "origin": "zeroCache", "message":
            "server is at sync protocol v52 and does not support v61. The server must be updated to a newer release."}])
    );
    let old = check_version(29.0).unwrap_err();
    assert!(old.message().contains("v29. The client must"), "{old}");
    assert!(check_version(f64::INFINITY).is_err());
}

// ---- upstream ----

fn invalid(message: &str) -> String {
    match parse(message) {
        Err(ErrorBody::Basic {
            kind: ErrorKind::InvalidMessage,
            message,
            origin: Origin::ZeroCache,
        }) => message,
        other => panic!("{:.200}: {:.200}", message, format!("{other:?}")),
    }
}

#[test]
fn init_connection_of_the_spec() {
    let message = r#"["initConnection",{
      "desiredQueriesPatch":[
        {"op":"put","hash":"2wkihx3s74imc","name":"ticketsByOwner","args":[{"owner":"u7"}],"ttl":300000},
        {"op":"put","hash":"1abq0z","ast":{"table":"ticket","orderBy":[["id","asc"]]},"ttl":0},
        {"op":"del","hash":"x"},{"op":"clear"}],
      "clientSchema":{"tables":{"ticket":{"columns":{"id":{"type":"string"},"title":{"type":"string"},"done":{"type":"boolean"}},"primaryKey":["id"]}}},
      "deleted":{"clientIDs":["c-0"],"clientGroupIDs":["g-0"]},
      "userQueryURL":"https://x/q","userQueryHeaders":{"X-A":"1"},
      "activeClients":["c-9f2"]}]"#;
    let Ok(Upstream::InitConnection(init)) = parse(message) else { panic!() };
    let QueryOp::Put(custom) = &init.desired_queries_patch[0] else { panic!() };
    assert_eq!((custom.name.as_deref(), custom.ttl), (Some("ticketsByOwner"), Some(300_000.0)));
    assert_eq!(custom.args.as_ref().unwrap()[0].as_str(), r#"{"owner":"u7"}"#);
    let QueryOp::Put(legacy) = &init.desired_queries_patch[1] else { panic!() };
    let ast = legacy.ast.as_ref().unwrap();
    assert_eq!(ast.ast().table, "ticket");
    assert_eq!(ast.json().as_str(), r#"{"table":"ticket","orderBy":[["id","asc"]]}"#);
    assert_eq!(init.desired_queries_patch[2], QueryOp::Del { hash: "x".into() });
    assert_eq!(init.desired_queries_patch[3], QueryOp::Clear);
    assert_eq!(
        init.client_schema.as_ref().unwrap().table("ticket").unwrap().primary_key,
        Some(vec!["id".into()])
    );
    assert_eq!(init.active_clients.as_deref(), Some(&["c-9f2".to_owned()][..]));
    assert_eq!(init.user_query_url.as_deref(), Some("https://x/q"));
    assert_eq!(init.user_push_url, None);
}

#[test]
fn client_schemas_are_equal_whatever_the_order_of_their_keys() {
    let schema = |text: &str| {
        let init =
            format!(r#"["initConnection",{{"desiredQueriesPatch":[],"clientSchema":{text}}}]"#);
        let Ok(Upstream::InitConnection(init)) = parse(&init) else { panic!("{init}") };
        init.client_schema.unwrap()
    };
    let a = schema(
        r#"{"tables":{"t":{"columns":{"a":{"type":"json"},"b":{"type":"null"}},"primaryKey":["a"]},"u":{"columns":{},"primaryKey":["x"]}}}"#,
    );
    let b = schema(
        r#"{"tables":{"u":{"primaryKey":["x"],"columns":{}},"t":{"primaryKey":["a"],"columns":{"b":{"type":"null"},"a":{"type":"json"}}}}}"#,
    );
    assert_eq!(a, b);
    // Kept as it was read, and as a store gives it back.
    assert!(b.text().find(r#""u""#) < b.text().find(r#""t""#), "{}", b.text());
    let loaded = ClientSchema::parse(b.text()).unwrap();
    assert_eq!((loaded.tables(), loaded.text()), (b.tables(), b.text()));
    assert_eq!(schema(b.text()), a);
    let less = r#"{"tables":{"u":{"columns":{},"primaryKey":["x"]}}}"#;
    assert_ne!(schema(less), a);
}

#[test]
fn push_of_the_spec_keeps_mutations_as_they_were_written() {
    let mutation = r#"{"type":"custom","timestamp":1765000000100,"id":4,"clientID":"c-9f2","name":"ticket.rename","args":[{"id":"t-1","title":"New"}], "later": 1.0}"#;
    let message = format!(
        r#"["push",{{"timestamp":1765000000123,"clientGroupID":"cg-1","pushVersion":1,"requestID":"c-9f2-ab-3","mutations":[{mutation}]}}]"#
    );
    let Ok(Upstream::Push(push)) = parse(&message) else { panic!() };
    let m = &push.mutations[0];
    assert_eq!(m.id, MutationId { id: 4, client_id: "c-9f2".into() });
    assert!(matches!(&m.kind, MutationKind::Custom));
    assert_eq!(m.json.as_str(), mutation);

    let crud = r#"["push",{"timestamp":1,"clientGroupID":"g","pushVersion":1,"requestID":"r","mutations":[
        {"type":"crud","id":1,"clientID":"c","name":"_zero_crud","timestamp":1,"args":[{"ops":[
          {"op":"insert","tableName":"t","primaryKey":["id"],"value":{"id":1,"x":[1]}},
          {"op":"delete","tableName":"t","primaryKey":["id"],"value":{"id":1}}]}]}]}]"#;
    let Ok(Upstream::Push(push)) = parse(crud) else { panic!() };
    let MutationKind::Crud(ops) = &push.mutations[0].kind else { panic!() };
    assert_eq!((ops[0].op, ops[1].op), (CrudKind::Insert, CrudKind::Delete));
    assert!(invalid(&crud.replace(r#"["id"]"#, "[]")).contains("primaryKey"));
    assert!(invalid(&crud.replace("_zero_crud", "other")).contains("_zero_crud"));
}

#[test]
fn small_messages() {
    assert_eq!(parse(r#"["ping",{}]"#), Ok(Upstream::Ping));
    assert_eq!(
        parse(r#" [ "pull" , {"clientGroupID":"g","cookie":null,"requestID":"r"} ] "#),
        Ok(Upstream::Pull)
    );
    assert_eq!(parse(r#"["closeConnection",[]]"#), Ok(Upstream::CloseConnection));
    assert_eq!(parse(r#"["updateAuth",{"auth":"t"}]"#), Ok(Upstream::UpdateAuth("t".into())));
    assert_eq!(
        parse(r#"["ackMutationResponses",{"clientID":"c","id":4}]"#),
        Ok(Upstream::AckMutationResponses(MutationId { id: 4, client_id: "c".into() }))
    );
    assert!(
        matches!(parse(r#"["deleteClients",{}]"#), Ok(Upstream::DeleteClients(d)) if d.client_ids.is_none())
    );
    let inspect = |body: &str| match parse(&format!(r#"["inspect",{body}]"#)) {
        Ok(Upstream::Inspect(inspect)) => inspect.op,
        other => panic!("{other:?}"),
    };
    assert_eq!(inspect(r#"{"op":"version","id":"i"}"#), InspectOp::Version);
    assert_eq!(inspect(r#"{"op":"queries","id":"i"}"#), InspectOp::Queries { client_id: None });
    assert_eq!(
        inspect(r#"{"op":"authenticate","id":"i","value":"p"}"#),
        InspectOp::Authenticate("p".into())
    );
    let InspectOp::AnalyzeQuery(analyze) = inspect(
        r#"{"op":"analyze-query","id":"i","value":{"table":"t"},"options":{"joinPlans":true}}"#,
    ) else {
        panic!()
    };
    assert_eq!(analyze.ast.unwrap().ast().table, "t");
    assert_eq!(analyze.options.join_plans, Some(true));
}

#[test]
fn unknown_keys_pass_and_wrong_shapes_do_not() {
    assert_eq!(parse(r#"["ping",{"x":1}]"#), Ok(Upstream::Ping));
    assert!(parse(r#"["changeDesiredQueries",{"desiredQueriesPatch":[{"op":"del","hash":"h","y":0}],"z":{}}]"#).is_ok());
    for (message, says) in [
        ("nonsense", "SyntaxError"),
        ("", "SyntaxError"),
        (r#"{"a":1}"#, "TypeError"),
        (r#"["ping"]"#, "InvalidMessage is enough"),
        (r#"["ping",[]]"#, "ping"),
        (r#"["hello",{}]"#, "Invalid union value: unknown message type \"hello\""),
        (r#"["changeDesiredQueries",{}]"#, "missing field `desiredQueriesPatch`"),
        (
            r#"["changeDesiredQueries",{"desiredQueriesPatch":[{"op":"put"}]}]"#,
            "missing field `hash`",
        ),
        (r#"["changeDesiredQueries",{"desiredQueriesPatch":[{"op":"drop"}]}]"#, "drop"),
        (
            r#"["changeDesiredQueries",{"desiredQueriesPatch":[{"op":"put","hash":"h","ttl":"1"}]}]"#,
            "invalid type",
        ),
        (
            r#"["changeDesiredQueries",{"desiredQueriesPatch":[{"op":"put","hash":"h","ttl":null}]}]"#,
            "null",
        ),
        (
            r#"["changeDesiredQueries",{"desiredQueriesPatch":[{"op":"put","hash":"h","ast":{}}]}]"#,
            "table",
        ),
        (
            r#"["initConnection",{"desiredQueriesPatch":[],"clientSchema":{"tables":{"t":{"columns":{}}}}}]"#,
            "primaryKey",
        ),
        (
            r#"["initConnection",{"desiredQueriesPatch":[],"clientSchema":{"tables":{"t":{"columns":{"a":{"type":"date"}},"primaryKey":[]}}}}]"#,
            "date",
        ),
        (r#"["ackMutationResponses",{"clientID":"c","id":1.5}]"#, "1.5"),
        (r#"["inspect",{"op":"what","id":"i"}]"#, "what"),
        (r#"["updateAuth",{}]"#, "auth"),
    ] {
        let text = invalid(message);
        assert!(text.contains(says) || says.starts_with("InvalidMessage"), "{message}: {text}");
    }
}

#[test]
fn everything_is_bounded() {
    let deep = format!(
        r#"["changeDesiredQueries",{{"desiredQueriesPatch":[{{"op":"put","hash":"h","name":"n","args":[{}1{}]}}]}}]"#,
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    assert!(invalid(&deep).contains("nested more than 128"));
    let strings = format!(r#"["ping",{{"x":"{}\\\"["}}]"#, "[".repeat(500));
    assert_eq!(parse(&strings), Ok(Upstream::Ping));
    let ops = vec![r#"{"op":"clear"}"#; MAX_QUERY_PATCH_OPS + 1].join(",");
    assert!(
        invalid(&format!(r#"["changeDesiredQueries",{{"desiredQueriesPatch":[{ops}]}}]"#))
            .contains("limit is 10000")
    );
    let long = "h".repeat(MAX_ID_BYTES + 1);
    let del = |hash: &str| {
        format!(
            r#"["changeDesiredQueries",{{"desiredQueriesPatch":[{{"op":"del","hash":"{hash}"}}]}}]"#
        )
    };
    assert!(invalid(&del(&long)).contains("limit is 1024"));
    assert!(parse(&del(&long[1..])).is_ok());
    assert!(invalid(&del("a\\u0000b")).contains("NUL"));
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(s in any::<String>(), kind in "[a-zA-Z]{1,20}") {
        let _ = parse(&s);
        let _ = parse(&format!("[{},{s}]", Json::from(kind)));
        let _ = SubProtocol::decode(&s);
        let _ = ConnectRequest::parse(&s, Some(&s));
        let _ = parse_response(s.as_bytes());
    }

    #[test]
    fn any_sub_protocol_of_a_client_decodes(token in any::<String>()) {
        // As a client encodes it: JSON, base64 with padding, percent.
        let bytes = serde_json::to_vec(&json!({ "authToken": token })).unwrap();
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut header = String::new();
        for group in bytes.chunks(3) {
            let mut padded = [0u8; 4];
            padded[1..=group.len()].copy_from_slice(group);
            let bits = u32::from_be_bytes(padded);
            for i in 0..4usize {
                match alphabet[(bits >> (18 - 6 * i)) as usize & 63] {
                    _ if i > group.len() => header.push_str("%3D"),
                    b'+' => header.push_str("%2B"),
                    b'/' => header.push_str("%2F"),
                    c => header.push(c as char),
                }
            }
        }
        let got = SubProtocol::decode(&header).unwrap();
        prop_assert_eq!(got.auth_token.unwrap_or_default(), token);
    }
}

// ---- downstream ----

#[test]
fn every_error_carries_an_origin() {
    let call = ApiFailure::call(CallReason::Internal, "x");
    let server =
        ApiFailure { cause: FailureCause::Server(ServerReason::OooMutation), ..call.clone() };
    let bodies = [
        ErrorBody::internal("x"),
        ErrorBody::rehome("x"),
        ErrorBody::PushFailed { failure: server, mutation_ids: vec![] },
        ErrorBody::TransformFailed { failure: call, query_ids: vec!["q".into()] },
    ];
    for body in bodies {
        let message = parsed(&down::error(&body));
        let expected = if body.kind_name() == "PushFailed" { "server" } else { "zeroCache" };
        assert_eq!(message[1]["origin"], expected, "{message}");
        assert!(message[1]["kind"].is_string() && message[1]["message"].is_string());
    }
}

#[test]
fn shapes_of_the_four_error_families() {
    let body = |body: &ErrorBody| parsed(&down::error(body))[1].clone();
    assert_eq!(
        body(&ErrorBody::rehome_now("moved")),
        json!({"kind": "Rehome", "message": "moved", "origin": "zeroCache", "maxBackoffMs": 0})
    );
    let failure = ApiFailure::http(
        502,
        Some("<html>".into()),
        "Fetch from API server returned non-OK status 502",
    );
    assert_eq!(
        body(&ErrorBody::TransformFailed { failure: failure.clone(), query_ids: vec![] }),
        json!({"kind": "TransformFailed", "message": failure.message, "origin": "zeroCache", "reason": "http",
               "status": 502, "bodyPreview": "<html>", "queryIDs": []})
    );
    let failure = ApiFailure {
        cause: FailureCause::Server(ServerReason::UnsupportedPushVersion),
        message: "m".into(),
        details: Some(RawJson::parse(r#"{"a":[1]}"#).unwrap()),
    };
    let id = MutationId { id: 3, client_id: "c".into() };
    assert_eq!(
        body(&ErrorBody::PushFailed { failure, mutation_ids: vec![id] }),
        json!({"kind": "PushFailed", "message": "m", "origin": "server", "reason": "unsupportedPushVersion",
               "details": {"a": [1]}, "mutationIDs": [{"id": 3, "clientID": "c"}]})
    );
    let params = BTreeMap::from([("node".to_owned(), "7".to_owned())]);
    let rebalance = ErrorBody::Backoff {
        kind: BackoffKind::Rebalance,
        message: "b".into(),
        min_backoff_ms: Some(1),
        max_backoff_ms: None,
        reconnect_params: params,
    };
    assert_eq!(
        body(&rebalance),
        json!({"kind": "Rebalance", "message": "b", "origin": "zeroCache", "minBackoffMs": 1, "reconnectParams": {"node": "7"}})
    );
    assert!(rebalance.closes_socket());
    assert!(!ErrorBody::basic(ErrorKind::MutationFailed, "").closes_socket());
}

#[test]
fn other_messages() {
    assert_eq!(
        text(&down::connected("V1\"", 1765000000000.0)),
        r#"["connected",{"wsid":"V1\"","timestamp":1765000000000}]"#
    );
    assert_eq!(text(down::PONG), r#"["pong",{}]"#);
    assert_eq!(
        text(&down::delete_clients(&["c-old".into()])),
        r#"["deleteClients",{"clientIDs":["c-old"]}]"#
    );
    assert_eq!(text(&down::delete_clients(&[])), r#"["deleteClients",{}]"#);
    let error = ErroredQuery {
        error: QueryErrorKind::App,
        id: "q".into(),
        name: "n".into(),
        message: Some("not allowed".into()),
        details: Some(RawJson::parse(r#"{"code":7}"#).unwrap()),
    };
    assert_eq!(
        text(&down::transform_error(&[error])),
        r#"["transformError",[{"error":"app","id":"q","name":"n","message":"not allowed","details":{"code":7}}]]"#
    );
    assert_eq!(
        text(&down::inspect("version", "i", &RawJson::parse("\"1\"").unwrap())),
        r#"["inspect",{"op":"version","id":"i","value":"1"}]"#
    );
}

// ---- pokes ----

#[test]
fn pokes_of_the_spec() {
    assert_eq!(
        text(&poke::start("00:01", None)),
        r#"["pokeStart",{"pokeID":"00:01","baseCookie":null}]"#
    );
    assert_eq!(
        text(&poke::start("4d3z1s:02", Some("4d3z1s:01"))),
        r#"["pokeStart",{"pokeID":"4d3z1s:02","baseCookie":"4d3z1s:01"}]"#
    );
    assert_eq!(text(&poke::end("a", "b")), r#"["pokeEnd",{"pokeID":"a","cookie":"b"}]"#);
    assert_eq!(text(&poke::cancel("a")), r#"["pokeEnd",{"pokeID":"a","cookie":"","cancel":true}]"#);

    let id = MutationId { id: 2, client_id: "c1".into() };
    let mut part = PokePart::new();
    part.last_mutation_id("c1", 1);
    part.last_mutation_id("c1", 2);
    part.desired("c1", QueryPatch::Put, "q2");
    part.desired("c2", QueryPatch::Put, "q2");
    part.desired("c1", QueryPatch::Del, "q1");
    part.got(QueryPatch::Put, "q1");
    part.put_row("ticket", br#"{"id":"t-1"}"#);
    part.del_row("ticket", br#"{"id":"t-2"}"#);
    part.put_mutation(&id, &RawJson::parse(r#"{"error":"app","message":"too long"}"#).unwrap());
    part.del_mutation(&id);
    assert_eq!(part.len(), 10);
    assert_eq!(
        text(&part.message("4d3z6k")),
        concat!(
            r#"["pokePart",{"pokeID":"4d3z6k","lastMutationIDChanges":{"c1":2},"#,
            r#""desiredQueriesPatches":{"c1":[{"op":"put","hash":"q2"},{"op":"del","hash":"q1"}],"c2":[{"op":"put","hash":"q2"}]},"#,
            r#""gotQueriesPatch":[{"op":"put","hash":"q1"}],"#,
            r#""rowsPatch":[{"op":"put","tableName":"ticket","value":{"id":"t-1"}},{"op":"del","tableName":"ticket","id":{"id":"t-2"}}],"#,
            r#""mutationsPatch":[{"op":"put","mutation":{"id":{"clientID":"c1","id":2},"result":{"error":"app","message":"too long"}}},"#,
            r#"{"op":"del","id":{"clientID":"c1","id":2}}]}]"#
        )
    );
}

#[test]
fn parts_are_full_at_a_hundred_patches_or_a_mebibyte_of_rows() {
    let mut many = PokePart::new();
    (0..99).for_each(|i| many.got(QueryPatch::Put, &format!("q{i}")));
    assert!(!many.is_full());
    many.got(QueryPatch::Put, "q99");
    assert!(many.is_full());
    let mut big = PokePart::new();
    big.put_row("t", format!("\"{}\"", "x".repeat(1 << 20)).as_bytes());
    assert!(big.is_full() && !big.is_empty());
}

#[test]
fn chunks_join_to_the_parts_and_split_no_code_point() {
    let empty = Chunks::new("p").finish();
    assert_eq!(empty, [b"\0[]".to_vec()]);
    for width in ["a", "é", "€", "😀"] {
        let mut chunks = Chunks::new("p");
        let mut frames = Vec::new();
        let mut expected = Vec::new();
        for i in 0..7 {
            let mut part = PokePart::new();
            part.put_row(
                "t",
                format!("\"{}\"", width.repeat(100_003 * (i + 1) / width.len())).as_bytes(),
            );
            let mut body = Vec::new();
            part.write_body(&mut body, "p");
            expected.push(parsed(&body));
            chunks.push(&part);
            frames.extend(chunks.take_frames());
        }
        frames.extend(chunks.finish());
        assert!(frames.len() >= 3, "{width}");
        let mut joined = Vec::new();
        for (i, frame) in frames.iter().enumerate() {
            assert!(frame.len() <= poke::CHUNK_BYTES && frame[0] == poke::CHUNK_TAG);
            assert!(
                i + 1 == frames.len() || frame.len() > poke::CHUNK_BYTES - 4,
                "all but the last are full"
            );
            assert!(std::str::from_utf8(&frame[1..]).is_ok(), "{width}: a split code point");
            joined.extend_from_slice(&frame[1..]);
        }
        assert_eq!(parsed(&joined), Json::from(expected));
    }
}

// ---- custom queries ----

#[test]
fn transform_requests_and_responses_of_the_spec() {
    assert_eq!(request_body(&[]).unwrap(), br#"["transform",[]]"#);
    let query = TransformRequest {
        id: "2wkihx3s74imc".into(),
        name: "ticketsByOwner".into(),
        args: vec![RawJson::parse(r#"{"owner":"u7"}"#).unwrap()],
    };
    assert_eq!(
        text(&request_body(&[query]).unwrap()),
        r#"["transform",[{"id":"2wkihx3s74imc","name":"ticketsByOwner","args":[{"owner":"u7"}]}]]"#
    );
    let response = r#"{"kind":"QueryResponse","userID":"u7","queries":[
      {"id":"2w","name":"byOwner","ast":{"table":"ticket","where":{"type":"simple","op":"=","left":{"type":"column","name":"owner"},"right":{"type":"literal","value":"u7"}},"orderBy":[["id","asc"]]}},
      {"error":"app","id":"1x","name":"secret","message":"not allowed"},
      {"error":"parse","id":"1y","name":"n","message":"bad","details":[1],"more":true}],"extra":0}"#;
    let Ok(TransformResponse::Queries { user, queries }) = parse_response(response.as_bytes())
    else {
        panic!()
    };
    assert_eq!(user, ValidatedUser::User(Some("u7".into())));
    assert!(
        matches!(&queries[0], TransformResult::Query { id, ast, .. } if id == "2w" && ast.ast().table == "ticket")
    );
    assert!(matches!(&queries[1], TransformResult::Error(e) if e.error == QueryErrorKind::App));
    assert!(
        matches!(&queries[2], TransformResult::Error(e) if e.details.as_ref().unwrap().as_str() == "[1]")
    );

    let user = |text: &str| match parse_response(text.as_bytes()) {
        Ok(TransformResponse::Queries { user, .. }) => user,
        other => panic!("{other:?}"),
    };
    assert_eq!(user(r#"{"kind":"QueryResponse","queries":[]}"#), ValidatedUser::Unsaid);
    assert_eq!(
        user(r#"{"kind":"QueryResponse","userID":null,"queries":[]}"#),
        ValidatedUser::User(None)
    );
    assert_eq!(user(r#"["transformed",[]]"#), ValidatedUser::Unsaid);
}

#[test]
fn failed_and_malformed_responses() {
    let failed = r#"{"kind":"TransformFailed","origin":"server","reason":"database","message":"down","queryIDs":["a"]}"#;
    let expected = TransformResponse::Failed {
        failure: ApiFailure {
            cause: FailureCause::Server(ServerReason::Database),
            message: "down".into(),
            details: None,
        },
        query_ids: vec!["a".into()],
    };
    assert_eq!(parse_response(failed.as_bytes()), Ok(expected.clone()));
    assert_eq!(parse_response(format!(r#"["transformFailed",{failed}]"#).as_bytes()), Ok(expected));
    for (body, says) in [
        ("", "EOF"),
        ("<html>", "expected"),
        (r#"{"kind":"Other"}"#, "Other"),
        (r#"["other",[]]"#, "other"),
        (r#"{"kind":"QueryResponse"}"#, "queries"),
        (r#"{"kind":"QueryResponse","queries":[{"id":"a","name":"n"}]}"#, "entry 0"),
        (
            r#"{"kind":"QueryResponse","queries":[{"error":"parse","id":"a","name":"n"}]}"#,
            "message",
        ),
        (
            r#"{"kind":"TransformFailed","origin":"server","reason":"oops","message":"m","queryIDs":[]}"#,
            "oops",
        ),
    ] {
        let error = parse_response(body.as_bytes()).unwrap_err();
        assert!(error.contains(says), "{body}: {error}");
    }
    assert!(parse_response(b"\xff").unwrap_err().contains("UTF-8"));
}
