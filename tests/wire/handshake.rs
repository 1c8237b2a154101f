//! From the upgrade request to `connected` (spec: sync-protocol §1, checklist 1–12).

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::json;
use tungstenite::Message;
use tungstenite::protocol::frame::Frame;
use tungstenite::protocol::frame::coding::{Data, OpCode};

use crate::socket::{Connect, Next, PATIENCE, sub_protocol};
use crate::support::server::is_original;
use crate::world::{World, init, items, newest_version, put};

/// What browsers offer.
const OFFER: &str = "permessage-deflate; client_max_window_bits";

/// The reason of the close frame that answers the request.
fn refused(connect: &Connect) -> String {
    let mut socket = connect.open();
    match socket.next() {
        Next::Closed(Some(1002), reason) => {
            assert!(reason.len() <= 123, "{} bytes", reason.len());
            reason
        }
        other => panic!("{} is answered with {other:?}", connect.target()),
    }
}

/// `Error: ` and the text, cut to what a close frame holds.
fn reason(text: &str) -> String {
    let text = format!("Error: {text}");
    if text.len() > 123 { format!("{}...", &text[..120]) } else { text }
}

#[test]
fn bad_requests_are_upgraded_and_closed_with_1002_and_a_reason() {
    let world = World::new(&[]);
    let good = || world.connect("g", "c");
    for path in [
        "/a/b/sync/v51/connect",
        "/sync/v51/connect/",
        "/foo/v51/connect",
        "/sync/51/connect",
        "/sync/v5.1/connect",
        "/",
    ] {
        let connect = good().path(path);
        assert_eq!(refused(&connect), reason(&format!("Invalid URL: {}", connect.target())));
    }
    let connect = good().path("/sync/vx/connect");
    assert_eq!(refused(&connect), reason(&format!("Invalid version: {}", connect.target())));
    for name in ["clientID", "clientGroupID", "ts", "lmid"] {
        let missing = format!("Error: invalid querystring - missing {name}");
        assert_eq!(refused(&good().param(name, None)), missing);
        assert_eq!(refused(&good().param(name, "")), missing, "empty is absent");
    }
    for name in ["ts", "lmid"] {
        let connect = good().param(name, "abc");
        let text = format!(
            "invalid querystring parameter {name}, got: abc, url: http://unused{}",
            connect.target()
        );
        let got = refused(&connect);
        let prefix = format!("Error: invalid querystring parameter {name}, got: abc, url: http");
        assert!(got.starts_with(&prefix) && got.ends_with("..."), "{got} {text}");
    }
    assert_eq!(refused(&good().protocol(None)), "Error: Unexpected undefined value");
    let bad_base64 = refused(&good().protocol(Some("!!!")));
    assert!(bad_base64.contains("Invalid character"), "{bad_base64}");
    for text in ["bm8ganNvbg%3D%3D", &sub_protocol(&json!(null)), "e30%3D, e30"] {
        assert!(refused(&good().protocol(Some(text))).contains("Error: "), "{text}");
    }
}

#[test]
fn connected_comes_first_and_repeats_wsid_and_sub_protocol() {
    let world = World::new(&[]);
    let good = || world.connect("g", "c");
    let body = init(&[put("q", &items())]);
    for connect in [
        good().init(body.clone()),
        good().path("/x/sync/v51/connect").init(body.clone()),
        good().path("/a%20b-_~/sync/v51/other").init(body.clone()),
        good().param("ts", "12.75").param("lmid", "12abc").init(body.clone()),
        good().param("unknown", "1").param("debugPerf", "true").init(body.clone()),
        good().param("clientID", "ü/c+d&e=f").init(body.clone()),
        // 12 KiB, and characters that base64 writes as `+` and `/`.
        good().content(&json!({"pad": "ü".repeat(4500), "more": "~~~???>>>",
            "initConnectionMessage": ["initConnection", body]})),
    ] {
        let connect = connect.header("Sec-WebSocket-Extensions", OFFER);
        let (mut socket, response) = connect.open_with_response();
        let echo = response.headers().get("sec-websocket-protocol").unwrap();
        assert_eq!(echo.to_str().unwrap(), connect.sub_protocol().unwrap());
        assert!(!response.headers().contains_key("sec-websocket-extensions"), "not by default");
        let frame = socket.frame();
        assert_eq!(frame[0], "connected");
        assert_eq!(frame[1]["wsid"], "ws-1");
        assert!(frame[1]["timestamp"].is_number());
        assert_eq!(frame[1].as_object().unwrap().len(), 2);
        // The message of the header is handled.
        socket.poke();
        socket.close();
    }
    // Optional parameters.
    let names = ["wsid", "userID", "profileID", "baseCookie"];
    let bare =
        names.iter().fold(world.connect("g2", "c"), |connect, name| connect.param(name, None));
    assert_eq!(bare.open().frame()[1]["wsid"], "");
    // Several sub-protocols are not what clients offer; anything but an object counts as `{}`.
    for content in [json!(1), json!("x"), json!([1]), json!({})] {
        good().content(&content).connected();
    }
}

#[test]
fn versions_from_30_to_the_newest_are_served() {
    let world = World::new(&[]);
    let newest = newest_version();
    for version in [30, 51, newest] {
        world.connect("g", "c").version(version).connected().close();
    }
    for (version, side) in [(29, "client"), (0, "client"), (newest + 1, "server"), (60, "server")] {
        let body = init(&[put("q", &items())]);
        let mut socket = world.connect("g", "c").version(version).init(body).open();
        let message = format!(
            "server is at sync protocol v{newest} and does not support v{version}. The {side} \
             must be updated to a newer release."
        );
        socket.fails("VersionNotSupported", &message);
    }
    // A JavaScript number.
    world.connect("g", "c").path("/sync/v5e1/connect").connected();
    world.connect("g", "c").path("/sync/v0x33/connect").connected();
}

#[test]
fn a_token_needs_a_user_and_a_server_that_takes_tokens() {
    let with_token = |world: &World, user: Option<&str>| {
        let content = json!({"authToken": "tok"});
        world.connect("g", "c").param("userID", user).content(&content).open()
    };
    if !is_original() {
        // The original ends with all its sockets here.
        let world = World::new(&[]);
        let mut other = world.connect("g2", "c2").connected();
        let error = with_token(&world, Some("u1")).error();
        assert_eq!(error["kind"], "Internal");
        other.ping();
    }
    let url = "http://127.0.0.1:9/";
    let world = World::new(&[("ZERO_QUERY_URL", url), ("ZERO_MUTATE_URL", url)]);
    let mut socket = with_token(&world, None);
    let text = "Authenticated connections require a userID.";
    let error = socket.error_frame();
    assert_eq!((&error["kind"], &error["message"]), (&json!("Unauthorized"), &json!(text)));
    assert_eq!(socket.next(), Next::Closed(Some(3000), text.to_owned()));
    let mut socket = with_token(&world, Some("u1"));
    assert_eq!(socket.frame()[0], "connected");
    // An empty token is none.
    world.connect("g", "c").param("userID", None).content(&json!({"authToken": ""})).connected();
}

#[test]
fn message_sizes_and_encodings() {
    let world = World::new(&[]);
    let connected = || world.connect("g", "c").connected();
    // 9 MiB are fine, 11 are not.
    let mut socket = connected();
    let args = "x".repeat(9 << 20);
    socket.send(&json!(["changeDesiredQueries", {"desiredQueriesPatch":
        [{"op": "put", "hash": "h", "name": "n", "args": [args]}]}]));
    assert_eq!(socket.ping(), Vec::<serde_json::Value>::new());
    socket.try_send(Message::text("x".repeat(11 << 20)));
    match socket.next_but_pongs() {
        Next::Closed(Some(1009), _) => {}
        other => panic!("11 MiB are answered with {other:?}"),
    }
    // Bad UTF-8.
    let mut socket = connected();
    let bad = Frame::message(vec![b'"', 0xff, b'"'], OpCode::Data(Data::Text), true);
    socket.send_message(Message::Frame(bad));
    assert!(matches!(socket.next_but_pongs(), Next::Closed(Some(1007), _)));
    // Binary frames are text too, empty messages are nothing.
    let mut socket = connected();
    socket.send_text("");
    socket.send_message(Message::binary(Vec::new()));
    socket.send_message(Message::binary(br#"["ping",{}]"#.to_vec()));
    assert_eq!(socket.next(), Next::Frame(json!(["pong", {}])));
    // A message in fragments, with a ping frame between them.
    let part = |text: &'static str, opcode, last| {
        Message::Frame(Frame::message(text.as_bytes(), OpCode::Data(opcode), last))
    };
    socket.send_message(part(r#"["pi"#, Data::Text, false));
    socket.send_message(Message::Ping(b"are you there"[..].into()));
    assert_eq!(socket.control_pong(), b"are you there");
    socket.send_message(part(r#"ng",{}]"#, Data::Continue, true));
    assert_eq!(socket.next(), Next::Frame(json!(["pong", {}])));
}

#[test]
fn compression_is_negotiated_when_enabled() {
    let world = World::new(&[("ZERO_WEBSOCKET_COMPRESSION", "true")]);
    let connect = world.connect("g", "c").header("Sec-WebSocket-Extensions", OFFER);
    let (_, response) = connect.open_with_response();
    let answer = response.headers().get("sec-websocket-extensions").expect("negotiated");
    assert!(answer.to_str().unwrap().starts_with("permessage-deflate"), "{answer:?}");
    // Nobody is forced.
    world.connect("g", "c").connected().ping();
}

/// The status of an upgrade request with these headers instead of the usual ones.
fn status(world: &World, changes: &[(&str, Option<&str>)]) -> (u16, String) {
    let mut headers = vec![
        ("Host", "localhost"),
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Protocol", "e30%3D"),
    ];
    for (name, value) in changes {
        headers.retain(|(known, _)| known != name);
        headers.extend(value.map(|value| (*name, value)));
    }
    let mut head = format!("GET {} HTTP/1.1\r\n", world.connect("g", "c").target());
    headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    head.push_str("\r\n");
    let mut stream = TcpStream::connect(("127.0.0.1", world.port())).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        answer.push(byte[0]);
    }
    let answer = String::from_utf8(answer).unwrap();
    let code = answer.split(' ').nth(1).unwrap_or_else(|| panic!("{changes:?}")).parse().unwrap();
    (code, answer)
}

#[test]
fn upgrades_that_are_none_get_a_status() {
    let world = World::new(&[]);
    assert_eq!(status(&world, &[]).0, 101);
    let (code, head) = status(&world, &[("Sec-WebSocket-Key", Some("dGhlIHNhbXBsZSBub25jZQ=="))]);
    assert_eq!(code, 101);
    assert!(head.to_ascii_lowercase().contains("s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
    assert_eq!(status(&world, &[("Sec-WebSocket-Version", Some("8"))]).0, 101);
    for bad in [
        ("Sec-WebSocket-Version", Some("12")),
        ("Sec-WebSocket-Version", None),
        ("Sec-WebSocket-Key", Some("short")),
        ("Sec-WebSocket-Key", None),
        ("Sec-WebSocket-Protocol", Some("e30%3D, e30%3D")),
        ("Sec-WebSocket-Protocol", Some("a b")),
        ("Sec-WebSocket-Protocol", Some("a,,b")),
        ("Sec-WebSocket-Protocol", Some("{}")),
    ] {
        assert_eq!(status(&world, &[bad]).0, 400, "{bad:?}");
    }
    // Decision 3: 64 KiB where Node has 16.
    let long = |kib: usize| "x".repeat(kib << 10);
    assert_eq!(status(&world, &[("X-Long", Some(&long(14)))]).0, 101);
    let more = if is_original() { 431 } else { 101 };
    assert_eq!(status(&world, &[("X-Long", Some(&long(40)))]).0, more);
    assert_eq!(status(&world, &[("X-Long", Some(&long(70)))]).0, 431);
}
