//! The app's query or mutate endpoint, as a test double that records what it is asked.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::socket::{Connect, PATIENCE};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Value,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// These headers have these values, or are not there.
    #[track_caller]
    pub fn expect_headers(&self, headers: &[(&str, Option<&str>)]) {
        for (name, value) in headers {
            assert_eq!(self.header(name), *value, "{name}");
        }
    }

    /// What an endpoint is told of a connection [`with_headers`] and the token `tok-é`, if it has
    /// the API key `key-1`, gets cookies, and allows the request header `x-trace`.
    #[track_caller]
    pub fn expect_what_was_brought(&self) {
        self.expect_headers(&[
            ("content-type", Some("application/json")),
            ("x-api-key", Some("key-1")),
            ("cookie", Some("session=1; other=2")),
            ("origin", Some("https://site.example")),
            ("authorization", Some("Bearer tok-é")),
            ("x-trace", Some("t1")),
            ("x-unlisted", None),
        ]);
    }

    /// The queries that are asked for.
    pub fn queries(&self) -> Vec<Value> {
        assert_eq!(self.body[0], "transform");
        self.body[1].as_array().unwrap().clone()
    }
}

/// An upgrade request with headers of all kinds.
pub fn with_headers(connect: Connect) -> Connect {
    let connect = connect.header("Cookie", "session=1; other=2");
    let connect = connect.header("Origin", "https://site.example");
    connect.header("X-Trace", "t1").header("X-Unlisted", "u")
}

type Handler = dyn FnMut(&Request) -> (u16, String) + Send;

/// A running endpoint.
pub struct Api {
    port: u16,
    handler: Arc<Mutex<Box<Handler>>>,
    requests: Receiver<Request>,
}

impl Api {
    /// Answers every query with `ast(name, args)`; `None` is an app error.
    pub fn start() -> Api {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let handler: Arc<Mutex<Box<Handler>>> =
            Arc::new(Mutex::new(Box::new(|request: &Request| answer(request, json!({})))));
        let (send, requests) = channel();
        let shared = handler.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (shared, send) = (shared.clone(), send.clone());
                std::thread::spawn(move || serve(stream.unwrap(), &shared, &send));
            }
        });
        Api { port, handler, requests }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/query", self.port)
    }

    /// From now on requests are answered by this.
    pub fn answer(&self, handler: impl FnMut(&Request) -> (u16, String) + Send + 'static) {
        *self.handler.lock().unwrap() = Box::new(handler);
    }

    /// The next request that was not yet looked at.
    pub fn request(&self) -> Request {
        self.requests.recv_timeout(PATIENCE).expect("a request")
    }

    /// Requests that came meanwhile.
    pub fn drain(&self) -> Vec<Request> {
        self.requests.try_iter().collect()
    }
}

/// The good answer: `extra` overrides fields. Query `from` takes a minimum, `items` and `others`
/// nothing; `refused` is an app error, `broken` a parse error, `unanswered` is left out.
pub fn answer(request: &Request, extra: Value) -> (u16, String) {
    let queries: Vec<Value> = request.queries().iter().filter_map(result).collect();
    let mut body = json!({"kind": "QueryResponse", "queries": queries});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    (200, body.to_string())
}

fn result(query: &Value) -> Option<Value> {
    let (id, name) = (&query["id"], query["name"].as_str().unwrap());
    let ast = match name {
        "items" => crate::world::items(),
        "others" => crate::world::others(),
        "from" => crate::world::items_from(query["args"][0].as_i64().unwrap()),
        "refused" => {
            return Some(json!({"error": "app", "id": id, "name": name,
                "message": "not allowed", "details": {"code": 7}}));
        }
        "broken" => {
            return Some(json!({"error": "parse", "id": id, "name": name, "message": "bad"}));
        }
        "unanswered" => return None,
        other => panic!("no query {other}"),
    };
    Some(json!({"id": id, "name": name, "ast": ast}))
}

fn serve(mut stream: TcpStream, handler: &Mutex<Box<Handler>>, requests: &Sender<Request>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let line = line_of(&mut reader);
    if line.is_empty() {
        return;
    }
    let target = line.split(' ').nth(1).unwrap().to_owned();
    assert!(line.starts_with("POST "), "{line}");
    let mut headers = Vec::new();
    loop {
        let line = line_of(&mut reader);
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.push((name.to_owned(), value.to_owned()));
    }
    let mut request = Request { target, headers, body: Value::Null };
    let length = request.header("content-length").unwrap().parse().unwrap();
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    request.body = serde_json::from_slice(&body).unwrap();
    let (status, text) = (handler.lock().unwrap())(&request);
    // Recorded before it is answered: who sees the effect finds the request.
    let _ = requests.send(request);
    // The text of a redirect is where it leads.
    let location = match status {
        300..400 => format!("Location: {text}\r\n"),
        _ => String::new(),
    };
    let _ = write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{location}\
         Content-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    );
}

/// A line of the head, whose bytes are Latin-1.
fn line_of(reader: &mut impl BufRead) -> String {
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line).unwrap_or(0);
    line.into_iter().map(char::from).collect()
}
