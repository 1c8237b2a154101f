//! One client as a task: connect, upgrade, read, apply, and again if the connection is lost.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::{Shutdown, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use serde_json::{Value, json};
use zeroring_net::rt::local::Notify;
use zeroring_net::rt::{self, Chunk, Stream};

use super::model::{ClientModel, ModelKind, Taken, Violation};
use super::stats::WorkerStats;
use super::wire::{FrameReader, Inbound, OP_CLOSE, OP_PONG, OP_TEXT, WireError, masked_frame};

/// A longer answer to the upgrade is not HTTP.
const MAX_RESPONSE_HEAD_BYTES: usize = 256 << 10;

/// What real clients put into the header at most (spec: sync-protocol §1.3).
const MAX_PROTOCOL_HEADER_BYTES: usize = 8192;

/// A lost connection is opened again after this time, as often as this in a row.
const RETRY_AFTER: Duration = Duration::from_millis(500);
const MAX_RETRIES: u32 = 20;

/// The protocol version that is spoken if a scenario does not say: the newest that both servers
/// have.
pub(crate) const PROTOCOL_VERSION: u32 = 51;

/// From this version on, pokes come in binary chunks.
const CHUNKS_SINCE: u32 = 52;

/// Mutations of a client that the server has not confirmed, at most.
const MAX_PENDING_MUTATIONS: usize = 10_000;

/// One query that a client asks for: key and AST.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) hash: String,
    pub(crate) ast: Value,
}

/// What makes a client.
#[derive(Debug, Clone)]
pub(crate) struct ClientSetup {
    /// Number over all clients of the run.
    pub(crate) index: usize,
    pub(crate) client_id: String,
    pub(crate) group_id: String,
    pub(crate) queries: Vec<Ask>,
    /// As JSON text.
    pub(crate) client_schema: Arc<str>,
    /// Rows that are new here count as writes that arrived: only where rows are never changed.
    pub(crate) counts_new: bool,
    pub(crate) protocol: u32,
}

/// How a client treats what arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// As fast as it comes.
    Normal,
    /// Waits before each read.
    Slow(Duration),
    /// Does not read at all.
    Stalled,
}

/// What the next completion of a client's queries is the end of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Errand {
    Hydrate,
    Reconnect,
    Change,
}

/// A client, as its worker holds it.
pub(crate) struct Client {
    setup: RefCell<ClientSetup>,
    pub(crate) model: RefCell<ClientModel>,
    stats: Arc<WorkerStats>,
    server: SocketAddr,
    stream: RefCell<Option<Rc<Stream>>>,
    outbox: RefCell<Vec<Chunk>>,
    writing: Cell<bool>,
    pace: Cell<Pace>,
    pace_changed: Notify,
    /// It was slow or stalled once: its latencies are its own fault.
    unpunctual: Cell<bool>,
    errand: Cell<(Errand, Instant)>,
    /// When the first poke of this socket came, or the last one with rows.
    last_news: Cell<Option<Instant>>,
    /// Writes that were meant for an earlier time came by catching up.
    opened_us: Cell<u64>,
    connected: Cell<bool>,
    complete: Cell<bool>,
    /// The worker wants the socket closed.
    closing: Cell<bool>,
    sockets: Cell<u64>,
    /// Number of the task that owns the client: an older one must end.
    task: Cell<u64>,
    /// Mutations without a confirmation: number and intended time.
    mutations: RefCell<VecDeque<(u64, u64)>>,
    last_mutation: Cell<u64>,
    /// Query patches that were made while there was no connection.
    unsent: RefCell<Vec<Value>>,
    key: Cell<u32>,
}

/// How a connection ended.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("{0}")]
    Violation(#[from] Violation),
    #[error("the server answered the upgrade with {0:?}")]
    Refused(String),
    #[error("error of the server: {0}")]
    Error(String),
    #[error("closed by the server: {0} {1:?}")]
    Closed(u16, String),
    #[error("the server ended the connection")]
    End,
}

fn epoch_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}

/// As JavaScript's `encodeURIComponent` over base64 text.
fn escape_base64(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + 64);
    let mut rest = text;
    while let Some(at) = rest.find(['+', '/', '=']) {
        escaped.push_str(&rest[..at]);
        escaped.push_str(match rest.as_bytes()[at] {
            b'+' => "%2B",
            b'/' => "%2F",
            _ => "%3D",
        });
        rest = &rest[at + 1..];
    }
    escaped.push_str(rest);
    escaped
}

impl Client {
    pub(crate) fn new(setup: ClientSetup, server: SocketAddr, stats: Arc<WorkerStats>) -> Client {
        let mut model = ClientModel::new(ModelKind {
            client_id: setup.client_id.clone(),
            counts_new: setup.counts_new,
            chunks: setup.protocol >= CHUNKS_SINCE,
        });
        for query in &setup.queries {
            model.ask(&query.hash);
        }
        let key = setup.index as u32;
        Client {
            setup: RefCell::new(setup),
            model: RefCell::new(model),
            stats,
            server,
            stream: RefCell::new(None),
            outbox: RefCell::new(Vec::new()),
            writing: Cell::new(false),
            pace: Cell::new(Pace::Normal),
            pace_changed: Notify::new(),
            unpunctual: Cell::new(false),
            errand: Cell::new((Errand::Hydrate, Instant::now())),
            last_news: Cell::new(None),
            opened_us: Cell::new(0),
            connected: Cell::new(false),
            complete: Cell::new(false),
            closing: Cell::new(false),
            sockets: Cell::new(0),
            task: Cell::new(0),
            mutations: RefCell::new(VecDeque::new()),
            last_mutation: Cell::new(0),
            unsent: RefCell::new(Vec::new()),
            key: Cell::new(key),
        }
    }

    /// Starts the client's task; the first connect is due at `at`.
    pub(crate) fn open(self: &Rc<Self>, at: Instant) {
        self.closing.set(false);
        self.task.set(self.task.get() + 1);
        rt::spawn(self.clone().run(self.task.get(), at));
    }

    /// Closes the socket as a browser does when its page goes away.
    pub(crate) fn close(&self) {
        self.closing.set(true);
        self.pace.set(Pace::Normal);
        self.pace_changed.notify_all();
        if let Some(stream) = self.stream.borrow().as_ref() {
            // A socket that is gone already is as good as closed.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub(crate) fn set_pace(&self, pace: Pace) {
        self.unpunctual.set(self.unpunctual.get() || pace != Pace::Normal);
        self.pace.set(pace);
        self.pace_changed.notify_all();
    }

    /// Gives up a query and asks for another instead.
    pub(crate) fn swap_query(self: &Rc<Self>, gone: &str, new: Ask) {
        let patch = [
            json!({"op": "del", "hash": gone}),
            json!({"op": "put", "hash": new.hash, "ast": new.ast, "ttl": 0}),
        ];
        {
            let mut model = self.model.borrow_mut();
            model.renounce(gone);
            model.ask(&new.hash);
        }
        let mut setup = self.setup.borrow_mut();
        setup.queries.retain(|q| q.hash != gone);
        setup.queries.push(new);
        drop(setup);
        self.errand.set((Errand::Change, Instant::now()));
        self.update_complete();
        if !self.connected.get() {
            self.unsent.borrow_mut().extend(patch);
            return;
        }
        self.send_text(&json!(["changeDesiredQueries", {"desiredQueriesPatch": patch}]));
    }

    /// Pushes a mutation that was meant for `meant_us`: the item `item` gets another title.
    pub(crate) fn mutate(self: &Rc<Self>, item: &str, meant_us: u64) {
        if !self.connected.get() || self.mutations.borrow().len() >= MAX_PENDING_MUTATIONS {
            // It never becomes confirmed, and the step tells how many did not.
            return;
        }
        let id = self.last_mutation.get() + 1;
        self.last_mutation.set(id);
        self.mutations.borrow_mut().push_back((id, meant_us));
        let setup = self.setup.borrow();
        let (client, group) = (&setup.client_id, &setup.group_id);
        let now_ms = epoch_us() / 1000;
        let args = json!([{"item": item, "sent": meant_us}]);
        self.send_text(&json!(["push", {
            "timestamp": now_ms, "clientGroupID": group, "pushVersion": 1,
            "requestID": format!("{client}-{id}"),
            "mutations": [{"type": "custom", "id": id, "clientID": client, "name": "title",
                "args": args, "timestamp": now_ms}]}]));
    }

    /// All clients are known to be right: a reconnect ended with the last news.
    pub(crate) fn caught_up(&self) {
        if let ((Errand::Reconnect, since), Some(news)) = (self.errand.get(), self.last_news.take())
        {
            let us = news.saturating_duration_since(since).as_micros() as u64;
            self.stats.now().reconnect.record(us);
        }
    }

    pub(crate) fn ping(self: &Rc<Self>) {
        if self.connected.get() {
            self.send_text(&json!(["ping", {}]));
        }
    }

    /// Whether task `mine` has to end.
    fn is_over(&self, mine: u64) -> bool {
        self.closing.get() || self.task.get() != mine
    }

    async fn run(self: Rc<Self>, mine: u64, mut at: Instant) {
        let mut retries = 0;
        loop {
            rt::sleep_until(at).await;
            if self.is_over(mine) {
                return;
            }
            let came_back = self.model.borrow().cookie().is_some();
            let errand = if came_back { Errand::Reconnect } else { Errand::Hydrate };
            self.errand.set((errand, at));
            self.last_news.set(None);
            self.opened_us.set(epoch_us());
            self.model.borrow_mut().socket_opened();
            let lost = match self.connection().await {
                Ok(never) => match never {},
                Err(lost) => lost,
            };
            *self.stream.borrow_mut() = None;
            self.outbox.borrow_mut().clear();
            let lasted = self.connected.get();
            self.set_flags(false, false);
            if self.is_over(mine) {
                return;
            }
            self.lose(&lost);
            retries = if lasted { 0 } else { retries + 1 };
            if retries > MAX_RETRIES || matches!(lost, Lost::Violation(_) | Lost::Wire(_)) {
                return;
            }
            at = Instant::now() + RETRY_AFTER;
        }
    }

    fn lose(&self, lost: &Lost) {
        let name = self.setup.borrow().client_id.clone();
        let mut stats = self.stats.now();
        stats.disconnects += 1;
        if matches!(lost, Lost::Violation(_) | Lost::Wire(_)) {
            stats.violations += 1;
        }
        stats.complain(format!("{name}: {lost}"));
    }

    fn set_flags(&self, connected: bool, complete: bool) {
        WorkerStats::flip(&self.stats.connected, &self.connected, connected);
        self.stats.set_complete(&self.complete, complete);
    }

    fn update_complete(&self) {
        let complete = self.connected.get() && self.model.borrow().is_complete();
        self.stats.set_complete(&self.complete, complete);
    }

    async fn connection(self: &Rc<Self>) -> Result<std::convert::Infallible, Lost> {
        let stream = Rc::new(Stream::connect(self.server).await?);
        *self.stream.borrow_mut() = Some(stream.clone());
        if self.closing.get() {
            return Err(Lost::End);
        }
        self.sockets.set(self.sockets.get() + 1);
        let (request, late) = self.upgrade_request();
        stream.write_all(vec![Chunk::Owned(request)]).await?;
        let mut head = Vec::new();
        let end = loop {
            if stream.read_append(&mut head).await? == 0 {
                return Err(Lost::End);
            }
            if let Some(end) = head.windows(4).position(|w| w == b"\r\n\r\n") {
                break end + 4;
            }
            if head.len() > MAX_RESPONSE_HEAD_BYTES {
                return Err(Lost::Refused("an endless head".to_owned()));
            }
        };
        if !head.starts_with(b"HTTP/1.1 101") {
            let text = String::from_utf8_lossy(&head[..end.min(120)]).into_owned();
            return Err(Lost::Refused(text));
        }
        if let Some(message) = late {
            self.send(OP_TEXT, message.as_bytes());
        }
        let mut reader = FrameReader::default();
        self.read(&mut reader, &head[end..])?;
        drop(head);
        loop {
            match self.pace.get() {
                Pace::Normal => {}
                Pace::Slow(pause) => rt::sleep(pause).await,
                Pace::Stalled => {
                    self.pace_changed.notified().await;
                    continue;
                }
            }
            let read = stream.read_with(|bytes| {
                let more = !bytes.is_empty();
                self.read(&mut reader, bytes).map(|()| more)
            });
            if !read.await?? {
                return Err(Lost::End);
            }
        }
    }

    /// The request, and the `initConnection` that did not fit into it.
    fn upgrade_request(&self) -> (Vec<u8>, Option<String>) {
        let setup = self.setup.borrow();
        let model = self.model.borrow();
        let cookie = model.cookie();
        let patch: Vec<Value> = if cookie.is_some() {
            std::mem::take(&mut *self.unsent.borrow_mut()) // the server has the others
        } else {
            self.unsent.borrow_mut().clear();
            let put = |q: &Ask| json!({"op": "put", "hash": q.hash, "ast": q.ast, "ttl": 0});
            setup.queries.iter().map(put).collect()
        };
        let patch = Value::from(patch);
        // The schema is the same for all clients: it is text already.
        let message = match cookie {
            Some(_) => format!(r#"["initConnection",{{"desiredQueriesPatch":{patch}}}]"#),
            None => format!(
                r#"["initConnection",{{"desiredQueriesPatch":{patch},"clientSchema":{}}}]"#,
                setup.client_schema
            ),
        };
        let engine = base64::engine::general_purpose::STANDARD;
        let encode = |text: &str| escape_base64(&engine.encode(text));
        let mut header = encode(&format!(r#"{{"initConnectionMessage":{message}}}"#));
        let mut late = None;
        if header.len() > MAX_PROTOCOL_HEADER_BYTES {
            header = encode("{}");
            late = Some(message);
        }
        let request = format!(
            "GET /sync/v{}/connect?clientID={}&clientGroupID={}&userID=user\
             &baseCookie={}&ts=1&lmid=0&wsid=s{}-{} HTTP/1.1\r\nHost: {}\r\n\
             Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: {header}\r\n\r\n",
            setup.protocol,
            setup.client_id,
            setup.group_id,
            cookie.unwrap_or("").replace(':', "%3A"),
            setup.index,
            self.sockets.get(),
            self.server,
        );
        (request.into_bytes(), late)
    }

    fn read(self: &Rc<Self>, reader: &mut FrameReader, bytes: &[u8]) -> Result<(), Lost> {
        self.stats.now().bytes += bytes.len() as u64;
        let now_us = epoch_us();
        reader.feed(bytes, |inbound| match inbound {
            Inbound::Message(message) => {
                let taken = self.model.borrow_mut().take(message)?;
                self.taken(taken, now_us)
            }
            Inbound::Binary(message) => {
                let taken = self.model.borrow_mut().take_binary(message)?;
                self.taken(taken, now_us)
            }
            Inbound::Ping(payload) => {
                self.send(OP_PONG, payload);
                Ok(())
            }
            Inbound::Close(code, reason) => {
                self.send(OP_CLOSE, &[]);
                Err(Lost::Closed(code, reason))
            }
        })
    }

    fn taken(&self, taken: Taken, now_us: u64) -> Result<(), Lost> {
        match taken {
            Taken::Nothing => {}
            Taken::Connected => self.set_flags(true, false),
            Taken::Error(text) => return Err(Lost::Error(text)),
            Taken::Poke(poke) => {
                if poke.row_ops > 0 || self.last_news.get().is_none() {
                    self.last_news.set(Some(Instant::now()));
                }
                let (punctual, opened_us) = (!self.unpunctual.get(), self.opened_us.get());
                let counted = |times: Vec<u64>| {
                    times.into_iter().filter(move |&sent| punctual && sent >= opened_us)
                };
                let mut stats = self.stats.now();
                stats.pokes += 1;
                stats.row_ops += poke.row_ops;
                if let Some(last) = poke.last_mutation {
                    let mut pending = self.mutations.borrow_mut();
                    while pending.front().is_some_and(|(id, _)| *id <= last) {
                        if let Some((_, meant_us)) = pending.pop_front() {
                            stats.mutation.record(now_us.saturating_sub(meant_us));
                        }
                    }
                }
                for sent in counted(poke.sent_us) {
                    stats.write.record(now_us.saturating_sub(sent));
                }
                if poke.became_complete {
                    let (errand, since) = self.errand.get();
                    let us = since.elapsed().as_micros() as u64;
                    match errand {
                        Errand::Hydrate => stats.hydrate.record(us),
                        // The first poke may come before the catch-up: see `caught_up`.
                        Errand::Reconnect => {}
                        Errand::Change => stats.change.record(us),
                    }
                }
                drop(stats);
                self.update_complete();
            }
        }
        Ok(())
    }

    fn send_text(self: &Rc<Self>, message: &Value) {
        self.send(OP_TEXT, message.to_string().as_bytes());
    }

    /// Queues a frame; one write at a time is under way.
    fn send(self: &Rc<Self>, opcode: u8, payload: &[u8]) {
        let Some(stream) = self.stream.borrow().clone() else { return };
        let key = self.key.get().wrapping_mul(0x9E37_79B1).wrapping_add(0x7F4A_7C15);
        self.key.set(key);
        let frame = masked_frame(opcode, payload, key.to_le_bytes());
        self.outbox.borrow_mut().push(Chunk::Owned(frame));
        if self.writing.replace(true) {
            return;
        }
        let me = self.clone();
        rt::spawn(async move {
            loop {
                let chunks = std::mem::take(&mut *me.outbox.borrow_mut());
                // A failed write is seen by the reader too.
                if chunks.is_empty() || stream.write_all(chunks).await.is_err() {
                    break;
                }
            }
            me.writing.set(false);
        });
    }
}
