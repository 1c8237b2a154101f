//! The real Zero client, in a Node process driven over stdin and stdout (`tests/client`).

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::PATIENCE;

/// How long a view may differ before the client is asked to evaluate it anew.
const DOUBT: Duration = Duration::from_secs(2);

/// What the client's view says when its operators sent it a removal of what it does not show.
const CLIENT_ENGINE_FAILURE: &str = "node does not exist";

/// The latest state of a materialised query.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub complete: bool,
    pub data: Value,
}

/// A process with any number of Zero clients.
pub struct Clients {
    child: Child,
    stdin: ChildStdin,
    events: Receiver<Value>,
    views: HashMap<(String, String), View>,
    fresh: HashMap<(String, String), Value>,
    mutated: HashMap<String, Value>,
    /// Views that only a new local evaluation brought right: mistakes of the client's own
    /// incremental engine over rows that are all there.
    pub stale_views: usize,
    /// The client's own engine failed an assertion: its views mean nothing any more. (Its input is
    /// the difference of two states of its store, so no message of a server can be the cause.)
    pub engine_failed: bool,
    /// Warnings and errors that the clients logged.
    pub complaints: Vec<String>,
    /// Clients whose server did not know them any more: they started anew, as pages do. (A client
    /// may be here several times.)
    pub lost: Vec<String>,
    /// A reason to stop that is no reason: clients that were given it are told to connect again, as
    /// a page's button does. With any other a client stays as it is.
    pub forgives: Option<&'static str>,
    /// Reasons of clients that stopped with an error.
    pub refused: Vec<String>,
}

impl Clients {
    pub fn start() -> Clients {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/client");
        let node = dir.join("node_modules/node/bin/node");
        assert!(node.exists(), "the test client is not installed: run `scripts/setup.sh test`");
        let mut child = Command::new(node)
            .arg(dir.join("driver.mjs"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (send, events) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
                if send.send(event).is_err() {
                    break;
                }
            }
        });
        let mut clients = Clients {
            child,
            stdin,
            events,
            views: HashMap::new(),
            fresh: HashMap::new(),
            mutated: HashMap::new(),
            stale_views: 0,
            engine_failed: false,
            complaints: Vec::new(),
            lost: Vec::new(),
            forgives: None,
            refused: Vec::new(),
        };
        clients.wait_event("ready", |e| e["event"] == "ready");
        clients
    }

    fn send(&mut self, command: Value) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    /// Opens a client. Clients with the same `storage` (and schema and user) form one group.
    pub fn open(&mut self, client: &str, server: &str, storage: &str, schema: &Value) {
        self.send(json!({"op": "open", "client": client, "server": server,
            "storageKey": storage, "userID": "user", "schema": schema}));
    }

    /// As [`Clients::open`], with the driver's custom mutators.
    pub fn open_mutating(&mut self, client: &str, server: &str, storage: &str, schema: &Value) {
        self.send(json!({"op": "open", "client": client, "server": server, "mutators": true,
            "storageKey": storage, "userID": "user", "schema": schema}));
    }

    /// Calls a custom mutator.
    pub fn mutate(&mut self, client: &str, id: &str, name: &str, args: &Value) {
        self.send(json!({"op": "mutate", "client": client, "id": id, "name": name, "args": args}));
    }

    /// What the server made of a mutation.
    pub fn mutated(&mut self, id: &str) -> Value {
        if !self.mutated.contains_key(id) {
            let event = |e: &Value| e["event"] == "mutated" && e["id"] == id;
            self.wait_event(&format!("mutation {id}"), event);
        }
        self.mutated.remove(id).unwrap()
    }

    pub fn watch(&mut self, client: &str, query: &str, spec: &Value) {
        self.views.insert((client.to_owned(), query.to_owned()), View::default());
        self.send(json!({"op": "watch", "client": client, "query": query, "spec": spec}));
    }

    pub fn unwatch(&mut self, client: &str, query: &str) {
        self.views.remove(&(client.to_owned(), query.to_owned()));
        self.send(json!({"op": "unwatch", "client": client, "query": query}));
    }

    pub fn close(&mut self, client: &str) {
        self.send(json!({"op": "close", "client": client}));
        let client = client.to_owned();
        self.wait_event("close", |e| e["event"] == "closed" && e["client"] == client.as_str());
    }

    fn absorb(&mut self, event: &Value) {
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        match event["event"].as_str() {
            Some("view") => {
                if let Some(view) = self.views.get_mut(&(text("client"), text("query"))) {
                    view.complete = event["complete"] == true;
                    view.data = event["data"].clone();
                }
            }
            Some("fresh") => {
                let key = (text("client"), text("query"));
                self.fresh.insert(key, event["data"].clone());
            }
            Some("mutated") => {
                self.mutated.insert(text("id"), event["result"].clone());
            }
            Some("refused") => {
                let reason = text("reason");
                if self.forgives.is_some_and(|text| reason.contains(text)) {
                    self.send(json!({"op": "resume", "client": text("client")}));
                }
                self.refused.push(reason);
            }
            Some("log") => self.complaints.push(text("text")),
            Some("lost") => {
                let client = text("client");
                let views = self.views.iter_mut().filter(|((of, _), _)| *of == client);
                views.for_each(|(_, view)| *view = View::default());
                self.lost.push(client);
            }
            Some("failed") if text("error").contains(CLIENT_ENGINE_FAILURE) => {
                self.engine_failed = true;
            }
            Some("failed") => panic!("the client driver failed: {event}"),
            _ => {}
        }
    }

    fn wait_event(&mut self, what: &str, done: impl Fn(&Value) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Ok(event) = self.events.recv_timeout(Duration::from_millis(100)) {
                self.absorb(&event);
                if done(&event) {
                    return;
                }
            }
        }
        panic!("the client driver did not answer `{what}`; complaints: {:#?}", self.complaints);
    }

    /// Takes everything that arrived so far.
    pub fn listen(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.absorb(&event);
        }
    }

    /// The view of a query, after everything that arrived so far.
    pub fn view(&mut self, client: &str, query: &str) -> View {
        self.listen();
        self.views[&(client.to_owned(), query.to_owned())].clone()
    }

    /// Waits until the server has answered the query and its view equals `want`. A view that
    /// stays different is evaluated anew over the rows that the client holds: these are what the
    /// server is answerable for.
    pub fn expect_view(&mut self, client: &str, query: &str, want: &Value) {
        let deadline = Instant::now() + PATIENCE;
        let mut ask_at = Instant::now() + DOUBT;
        let key = (client.to_owned(), query.to_owned());
        self.fresh.remove(&key);
        loop {
            let view = self.view(client, query);
            if self.engine_failed || (view.complete && view.data == *want) {
                return;
            }
            if view.complete && self.fresh.remove(&key).is_some_and(|fresh| fresh == *want) {
                self.stale_views += 1;
                return;
            }
            if Instant::now() > ask_at {
                self.send(json!({"op": "fresh", "client": client, "query": query}));
                ask_at = Instant::now() + DOUBT;
            }
            assert!(
                Instant::now() < deadline,
                "{client}/{query} did not converge (complete: {})\n  have {}\n  want {want}\n  complaints {:#?}",
                view.complete,
                view.data,
                self.complaints,
            );
            if let Ok(event) = self.events.recv_timeout(Duration::from_millis(20)) {
                self.absorb(&event);
            }
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.complaints.is_empty() {
            let last = &self.complaints[self.complaints.len().saturating_sub(20)..];
            eprintln!("--- the clients complained:\n{}", last.join("\n"));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
