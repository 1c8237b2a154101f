//! A client that does nothing by itself: what it sends and expects is the test's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use base64::Engine;
use serde_json::{Value, json};
use tungstenite::client::IntoClientRequest;
use tungstenite::handshake::client::Response;
use tungstenite::http::{HeaderName, HeaderValue};
use tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tungstenite::{Message, WebSocket};

/// How long anything may take that a test waits for. The server says `pong` meanwhile.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Most patches in a `pokePart`.
const MAX_PART_PATCHES: usize = 100;

/// An upgrade request in the making.
#[derive(Clone)]
pub struct Connect {
    port: u16,
    path: String,
    params: Vec<(String, String)>,
    protocol: Option<String>,
    headers: Vec<(String, String)>,
}

impl Connect {
    /// A well-formed request without `initConnection`.
    pub fn new(port: u16, group: &str, client: &str) -> Connect {
        let param = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        Connect {
            port,
            path: "/sync/v51/connect".to_owned(),
            params: vec![
                param("clientID", client),
                param("clientGroupID", group),
                param("ts", "1523.7000000476837"),
                param("lmid", "0"),
                param("wsid", "ws-1"),
                param("baseCookie", ""),
                param("userID", "u1"),
            ],
            protocol: Some(sub_protocol(&json!({}))),
            headers: Vec::new(),
        }
    }

    pub fn path(mut self, path: &str) -> Connect {
        path.clone_into(&mut self.path);
        self
    }

    pub fn version(self, version: u32) -> Connect {
        self.path(&format!("/sync/v{version}/connect"))
    }

    /// Sets a parameter; `None` leaves it out.
    pub fn param<'a>(mut self, name: &str, value: impl Into<Option<&'a str>>) -> Connect {
        self.params.retain(|(known, _)| known != name);
        if let Some(value) = value.into() {
            self.params.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    pub fn cookie(self, cookie: &str) -> Connect {
        self.param("baseCookie", cookie)
    }

    pub fn header(mut self, name: &str, value: &str) -> Connect {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The content of the sub-protocol.
    pub fn content(self, content: &Value) -> Connect {
        self.protocol(Some(&sub_protocol(content)))
    }

    /// The text of the sub-protocol header.
    pub fn protocol(mut self, text: Option<&str>) -> Connect {
        self.protocol = text.map(str::to_owned);
        self
    }

    /// `initConnection` in the sub-protocol.
    pub fn init(self, body: Value) -> Connect {
        self.content(&json!({"initConnectionMessage": ["initConnection", body]}))
    }

    /// The sub-protocol header.
    pub fn sub_protocol(&self) -> Option<&str> {
        self.protocol.as_deref()
    }

    /// The request line's target.
    pub fn target(&self) -> String {
        let mut pairs = url::form_urlencoded::Serializer::new(String::new());
        pairs.extend_pairs(&self.params);
        format!("{}?{}", self.path, pairs.finish())
    }

    /// Connects; the upgrade itself always succeeds.
    pub fn open(&self) -> Socket {
        self.open_with_response().0
    }

    pub fn open_with_response(&self) -> (Socket, Response) {
        let url = format!("ws://127.0.0.1:{}{}", self.port, self.target());
        let mut request = url.into_client_request().unwrap();
        if let Some(protocol) = &self.protocol {
            let value = HeaderValue::from_str(protocol).unwrap();
            request.headers_mut().insert("sec-websocket-protocol", value);
        }
        for (name, value) in &self.headers {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            request.headers_mut().append(name, HeaderValue::from_str(value).unwrap());
        }
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let (ws, response) =
            tungstenite::client::client_with_config(request, stream, Some(config)).unwrap();
        let base = self.params.iter().find(|(k, v)| k == "baseCookie" && !v.is_empty());
        let cookie = base.map(|(_, v)| v.clone());
        (Socket { ws, cookie, pongs: 0, aside: Vec::new(), known: BTreeSet::new() }, response)
    }

    /// Connects and takes `connected`.
    pub fn connected(&self) -> Socket {
        let mut socket = self.open();
        assert_eq!(socket.frame()[0], "connected");
        socket
    }
}

/// The header value for this content, as real clients make it.
pub fn sub_protocol(content: &Value) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(content.to_string());
    text.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D")
}

/// What comes next on a socket.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    Frame(Value),
    Binary(Vec<u8>),
    /// Code and reason; no code for a close frame without one.
    Closed(Option<u16>, String),
    /// The TCP connection ended without a close frame.
    Dropped,
}

/// A poke, merged over its parts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Poke {
    pub id: String,
    pub base: Option<String>,
    pub cookie: String,
    pub lmids: BTreeMap<String, Value>,
    /// Patches by client, each as `+hash` or `-hash`.
    pub desired: BTreeMap<String, Vec<String>>,
    pub got: Vec<String>,
    pub rows: Vec<Value>,
    pub mutations: Vec<Value>,
    /// Patches per part.
    pub parts: Vec<usize>,
    /// Parts came in binary chunks.
    pub binary: bool,
}

impl Poke {
    /// The rows that are put, of one table, in order of arrival.
    pub fn puts(&self, table: &str) -> Vec<Value> {
        let rows = self.rows.iter().filter(|r| r["op"] == "put" && r["tableName"] == table);
        rows.map(|r| r["value"].clone()).collect()
    }

    /// The keys that are deleted, of one table.
    pub fn dels(&self, table: &str) -> Vec<Value> {
        let rows = self.rows.iter().filter(|r| r["op"] == "del" && r["tableName"] == table);
        rows.map(|r| r["id"].clone()).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    fn absorb(&mut self, body: &Value) {
        let body = body.as_object().unwrap();
        let mut patches = 0;
        for (key, value) in body {
            match key.as_str() {
                "pokeID" => assert_eq!(*value, self.id, "a part of another poke"),
                "lastMutationIDChanges" => {
                    for (client, lmid) in value.as_object().unwrap() {
                        self.lmids.insert(client.clone(), lmid.clone());
                        patches += 1;
                    }
                }
                "desiredQueriesPatches" => {
                    for (client, ops) in value.as_object().unwrap() {
                        let ops = query_ops(ops);
                        patches += ops.len();
                        self.desired.entry(client.clone()).or_default().extend(ops);
                    }
                }
                "gotQueriesPatch" => {
                    let ops = query_ops(value);
                    patches += ops.len();
                    self.got.extend(ops);
                }
                "rowsPatch" => {
                    let rows = value.as_array().unwrap();
                    patches += rows.len();
                    self.rows.extend(rows.iter().cloned());
                }
                "mutationsPatch" => {
                    let list = value.as_array().unwrap();
                    patches += list.len();
                    self.mutations.extend(list.iter().cloned());
                }
                other => panic!("unknown key `{other}` in a part"),
            }
        }
        assert!(patches <= MAX_PART_PATCHES, "{patches} patches in a part");
        self.parts.push(patches);
    }
}

fn query_ops(list: &Value) -> Vec<String> {
    let ops = list.as_array().unwrap().iter().map(|op| {
        let keys: Vec<&String> = op.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["op", "hash"], "{op}");
        let sign = match op["op"].as_str().unwrap() {
            "put" => '+',
            "del" => '-',
            other => panic!("query op {other}"),
        };
        format!("{sign}{}", op["hash"].as_str().unwrap())
    });
    ops.collect()
}

/// A connected client.
pub struct Socket {
    ws: WebSocket<TcpStream>,
    /// Where the last poke ended, or the request's `baseCookie`.
    pub cookie: Option<String>,
    /// `pong` messages so far.
    pub pongs: usize,
    /// Messages that arrived while a poke was waited for.
    pub aside: Vec<Value>,
    /// Clients of whose queries it was told.
    known: BTreeSet<String>,
}

impl Socket {
    pub fn send(&mut self, message: &Value) {
        self.send_text(&message.to_string());
    }

    pub fn send_text(&mut self, text: &str) {
        self.send_message(Message::text(text));
    }

    pub fn send_message(&mut self, message: Message) {
        self.ws.send(message).unwrap();
    }

    /// Sends without minding that the peer may have closed already.
    pub fn try_send(&mut self, message: Message) {
        let _ = self.ws.send(message);
    }

    /// Closes and waits for the answer.
    pub fn close(mut self) {
        self.ws.close(None).unwrap();
        while !matches!(self.next(), Next::Closed(..) | Next::Dropped) {}
    }

    /// The next thing, `pong` messages included.
    #[track_caller]
    pub fn next(&mut self) -> Next {
        self.next_within(PATIENCE).expect("something arrives")
    }

    fn next_within(&mut self, patience: Duration) -> Option<Next> {
        self.ws.get_ref().set_read_timeout(Some(patience)).unwrap();
        loop {
            match self.ws.read() {
                Ok(Message::Text(text)) => {
                    return Some(Next::Frame(serde_json::from_str(&text).unwrap()));
                }
                Ok(Message::Binary(bytes)) => return Some(Next::Binary(bytes.to_vec())),
                Ok(Message::Close(frame)) => {
                    // Answers the close frame.
                    let _ = self.ws.flush();
                    return Some(match frame {
                        Some(CloseFrame { code, reason }) => {
                            Next::Closed(Some(code.into()), reason.to_string())
                        }
                        None => Next::Closed(None, String::new()),
                    });
                }
                Ok(_) => {}
                Err(error) if is_timeout(&error) => return None,
                Err(_) => return Some(Next::Dropped),
            }
        }
    }

    /// What comes after any `pong` messages: a slow server may say that it is there.
    #[track_caller]
    pub fn next_but_pongs(&mut self) -> Next {
        loop {
            let next = self.next();
            if !matches!(&next, Next::Frame(frame) if frame[0] == "pong") {
                return next;
            }
        }
    }

    /// The next WebSocket-level pong.
    pub fn control_pong(&mut self) -> Vec<u8> {
        loop {
            if let Message::Pong(payload) = self.ws.read().unwrap() {
                return payload.to_vec();
            }
        }
    }

    /// The next frame that is no `pong`.
    #[track_caller]
    pub fn frame(&mut self) -> Value {
        self.frame_within(PATIENCE).expect("more than pongs")
    }

    #[track_caller]
    fn frame_within(&mut self, patience: Duration) -> Option<Value> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let next = self.next_within(left.max(Duration::from_millis(1)))?;
            match next {
                Next::Frame(frame) if frame[0] == "pong" => {
                    assert_eq!(frame, json!(["pong", {}]));
                    self.pongs += 1;
                }
                Next::Frame(frame) => return Some(frame),
                other => panic!("a frame was expected, not {other:?}"),
            }
        }
    }

    /// `ping`, and everything up to its `pong`.
    #[track_caller]
    pub fn ping(&mut self) -> Vec<Value> {
        self.send(&json!(["ping", {}]));
        let mut before = Vec::new();
        loop {
            match self.next() {
                Next::Frame(frame) if frame == json!(["pong", {}]) => return before,
                Next::Frame(frame) => before.push(frame),
                other => panic!("a pong was expected, not {other:?}"),
            }
        }
    }

    /// Takes an error frame and the close after it.
    #[track_caller]
    pub fn error(&mut self) -> Value {
        let body = self.error_frame();
        assert_eq!(self.next(), Next::Closed(None, String::new()), "after {body}");
        body
    }

    /// The next error; pokes before it are not looked at.
    #[track_caller]
    pub fn error_frame(&mut self) -> Value {
        let mut frame = self.frame();
        while frame[0].as_str().is_some_and(|kind| kind.starts_with("poke")) {
            frame = self.frame();
        }
        assert_eq!(frame[0], "error", "{frame}");
        let origin = &frame[1]["origin"];
        assert!(origin == "zeroCache" || origin == "server", "{frame}");
        frame[1].clone()
    }

    /// Expects this error and a plain close.
    #[track_caller]
    pub fn fails(&mut self, kind: &str, message: &str) {
        let error = self.error();
        assert_eq!(
            (error["kind"].as_str(), error["message"].as_str()),
            (Some(kind), Some(message))
        );
    }

    /// Expects a close frame without code, and no error before it.
    #[track_caller]
    pub fn closes_plainly(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "nothing but pongs arrives");
            match self.next() {
                Next::Frame(frame) if frame[0] == "pong" => {}
                next => return assert_eq!(next, Next::Closed(None, String::new())),
            }
        }
    }

    /// The next poke, which must continue where the last one ended.
    #[track_caller]
    pub fn poke(&mut self) -> Poke {
        self.poke_within(PATIENCE).expect("a poke")
    }

    /// The next poke if it begins within this time.
    #[track_caller]
    pub fn poke_within(&mut self, patience: Duration) -> Option<Poke> {
        let mut poke = Poke::default();
        loop {
            let frame = self.frame_within(patience)?;
            if frame[0] == "pokeStart" {
                let body = &frame[1];
                poke.id = body["pokeID"].as_str().unwrap().to_owned();
                poke.base = body["baseCookie"].as_str().map(str::to_owned);
                assert_eq!(poke.base, self.cookie, "the chain of cookies is broken: {frame}");
                break;
            }
            self.aside.push(frame);
        }
        let mut chunks = Vec::new();
        loop {
            match self.next() {
                Next::Binary(bytes) => {
                    assert_eq!(bytes[0], 0);
                    assert!(bytes.len() <= 1 << 20);
                    poke.binary = true;
                    chunks.extend_from_slice(&bytes[1..]);
                }
                Next::Frame(frame) => match frame[0].as_str().unwrap() {
                    "pokePart" => poke.absorb(&frame[1]),
                    "pokeEnd" => {
                        let body = &frame[1];
                        assert_eq!(body["pokeID"], poke.id.as_str());
                        assert!(body["cancel"].is_null(), "cancelled: {frame}");
                        poke.cookie = body["cookie"].as_str().unwrap().to_owned();
                        break;
                    }
                    "pokeStart" => panic!("a poke in a poke: {frame}"),
                    "pong" => self.pongs += 1,
                    _ => self.aside.push(frame),
                },
                other => panic!("a poke is torn by {other:?}"),
            }
        }
        if poke.binary {
            let parts: Vec<Value> = serde_json::from_slice(&chunks).unwrap();
            parts.iter().for_each(|part| poke.absorb(part));
        }
        assert!(
            poke.base.as_deref().is_none_or(|base| base <= poke.cookie.as_str()),
            "backwards: {poke:?}"
        );
        if poke.base.as_deref() == Some(poke.cookie.as_str()) {
            assert!(poke.is_empty(), "patches without a new cookie: {poke:?}");
        }
        self.cookie = Some(poke.cookie.clone());
        self.known.extend(poke.desired.keys().cloned());
        Some(poke)
    }

    /// Pokes until `done` holds of all of them together; returns them merged.
    #[track_caller]
    pub fn pokes_until(&mut self, done: impl Fn(&Poke) -> bool) -> Poke {
        let mut all = self.poke();
        while !done(&all) {
            let next = self.poke();
            all.cookie = next.cookie;
            all.id = next.id;
            all.lmids.extend(next.lmids);
            for (client, ops) in next.desired {
                all.desired.entry(client).or_default().extend(ops);
            }
            all.got.extend(next.got);
            all.rows.extend(next.rows);
            all.mutations.extend(next.mutations);
            all.parts.extend(next.parts);
        }
        all
    }

    /// Pokes until the query is got.
    #[track_caller]
    pub fn until_got(&mut self, hash: &str) -> Poke {
        let wanted = format!("+{hash}");
        self.pokes_until(|p| p.got.contains(&wanted))
    }

    /// Pokes until this client is where another one is.
    #[track_caller]
    pub fn catch_up_with(&mut self, other: &Socket) {
        while self.cookie != other.cookie {
            self.poke();
        }
    }

    /// A poke told of queries that this client wants.
    pub fn heard_of(&self, client: &str) -> bool {
        self.known.contains(client)
    }

    /// The message of this type that comes next or came while a poke was waited for.
    #[track_caller]
    pub fn take_aside(&mut self, kind: &str) -> Value {
        if let Some(at) = self.aside.iter().position(|m| m[0] == kind) {
            return self.aside.remove(at);
        }
        let frame = self.frame();
        assert_eq!(frame[0], kind, "{frame}");
        frame
    }
}

fn is_timeout(error: &tungstenite::Error) -> bool {
    matches!(error, tungstenite::Error::Io(e)
        if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut))
}
