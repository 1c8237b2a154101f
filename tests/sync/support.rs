//! The sync service in this process: a replica file made by hand, commits on demand, real sockets,
//! a WebSocket client, and a stand-in for the app's query endpoint.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::{Value, json};
use tungstenite::client::IntoClientRequest;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Message, WebSocket};
use zeroring::ops::registry::Registry;
use zeroring::options::config::Endpoint;
use zeroring::replication::commit_bus::{CommitBus, MAX_COMMITS, commit_bus_of};
use zeroring::replication::{CommitSink, ReplicaInfo};
use zeroring::sync::{SyncConfig, SyncPart, SyncService, websocket_config};
use zeroring_core::change::message::{
    ChangeMessage, LiteValue, Relation, RelationColumn, ReplicaIdentity, TupleValue,
};
use zeroring_core::change::published::{
    PublishedColumn, PublishedIndex, PublishedSchema, PublishedTable,
};
use zeroring_core::version::StateVersion;
use zeroring_net::http::Incoming;
use zeroring_net::http::client::{ApiClient, ApiClientConfig};
use zeroring_net::rt::{BoundListener, Executors, RtConfig, bind_group, now, spawn};
use zeroring_storage::cvr_store::CvrStore;
use zeroring_storage::cvr_store::embedded::EmbeddedCvrStore;
use zeroring_storage::cvr_store::postgres::{PostgresCvrConfig, PostgresCvrStore};
use zeroring_storage::replica::initial::{InitialSpec, InitialSync, RowBatch};
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::writer::{Applied, ReplicaWriter, WriterOptions};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(120);
const INITIAL: u64 = 22_020_400_000;

pub const CLIENT_SCHEMA: &str = r#"{"tables":{"issue":{"columns":{"id":{"type":"string"},"title":{"type":"string"},"n":{"type":"number"}},"primaryKey":["id"]}}}"#;
pub const ALL_ISSUES: &str = r#"{"table":"issue","orderBy":[["id","asc"]]}"#;
/// Everybody may read everything.
const PERMISSIONS: &str =
    r#"{"tables":{"issue":{"row":{"select":[["allow",{"type":"and","conditions":[]}]]}}}}"#;

/// Settings of a server under test.
#[derive(Clone)]
pub struct Setup {
    pub executors: usize,
    pub query_url: Option<String>,
    pub tokens: bool,
    pub revalidate: Duration,
    /// How long a client may read nothing of a large poke.
    pub stalled: Duration,
    /// Commits that may be on the way to an executor.
    pub ring: usize,
    /// Name of this server, and the view records that it shares with others; none: its own file.
    pub task: &'static str,
    pub records: Option<PostgresCvrConfig>,
    /// A store of the test's own.
    pub store: Option<Arc<dyn CvrStore>>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            executors: 1,
            query_url: None,
            tokens: false,
            revalidate: Duration::from_secs(300),
            stalled: Duration::from_secs(120),
            ring: MAX_COMMITS,
            task: "task-1",
            records: None,
            store: None,
        }
    }
}

pub struct Server {
    pub addr: SocketAddr,
    executors: Option<Executors>,
    writer: ReplicaWriter,
    bus: CommitBus,
    table_ids: TableIds,
    tables: Vec<PublishedTable>,
    /// Version of the replica, and commits since.
    initial: u64,
    next: u64,
    replicas: u64,
    registry: Registry,
    dir: tempfile::TempDir,
}

fn column(pos: i32, data_type: &str, not_null: bool) -> PublishedColumn {
    PublishedColumn {
        pos,
        data_type: data_type.into(),
        pg_type_class: Some("b".into()),
        elem_pg_type_class: None,
        type_oid: 0,
        character_maximum_length: None,
        not_null: Some(not_null),
        dflt: None,
    }
}

/// A table: `schema.name`, its columns with types; the first `key` columns are its key.
fn table(
    schema: &str,
    name: &str,
    key: usize,
    columns: &[(&str, &str)],
) -> (PublishedTable, PublishedIndex) {
    let published = PublishedTable {
        oid: name.bytes().fold(16_384, |h, b| (h * 31 + u32::from(b)) % 1_000_003),
        schema: schema.into(),
        schema_oid: 2_200,
        name: name.into(),
        replica_identity: "d".into(),
        columns: columns
            .iter()
            .enumerate()
            .map(|(i, (n, t))| ((*n).to_owned(), column(i as i32 + 1, t, i < key)))
            .collect(),
        primary_key: columns[..key].iter().map(|(n, _)| (*n).to_owned()).collect(),
        publications: Default::default(),
    };
    let index = PublishedIndex {
        schema: schema.into(),
        table_name: name.into(),
        name: format!("{name}_pkey"),
        unique: true,
        is_primary_key: Some(true),
        is_replica_identity: None,
        is_immediate: Some(true),
        columns: columns[..key].iter().map(|(n, _)| ((*n).to_owned(), "ASC".into())).collect(),
    };
    (published, index)
}

fn published() -> PublishedSchema {
    let all = [
        table("public", "issue", 1, &[("id", "text"), ("title", "text"), ("n", "int8")]),
        table(
            "zero_0",
            "clients",
            2,
            &[
                ("clientGroupID", "text"),
                ("clientID", "text"),
                ("lastMutationID", "int8"),
                ("userID", "text"),
            ],
        ),
        table(
            "zero_0",
            "mutations",
            3,
            &[
                ("clientGroupID", "text"),
                ("clientID", "text"),
                ("mutationID", "int8"),
                ("result", "json"),
            ],
        ),
        table(
            "zero",
            "permissions",
            1,
            &[("lock", "bool"), ("permissions", "jsonb"), ("hash", "text")],
        ),
    ];
    let (tables, indexes) = all.into_iter().unzip();
    PublishedSchema { tables, indexes }
}

struct Input {
    listener: BoundListener,
    part: SyncPart,
}

/// A new replica file of this version, with issues of these ids and numbers.
fn make_replica(path: &Path, version: &StateVersion, issues: &[(&str, i64)]) {
    let schema = published();
    let publications = ["_zero_metadata_0".to_owned(), "_zero_public_0".to_owned()];
    let spec =
        InitialSpec { schema: &schema, version, publications: &publications, context_json: "{}" };
    let mut sync = InitialSync::create(path, &spec).unwrap();
    let mut permissions = RowBatch::new();
    permissions.push(&LiteValue::Integer(1));
    permissions.push(&LiteValue::Text(PERMISSIONS.into()));
    permissions.push(&LiteValue::Text("h".into()));
    sync.insert(3, &permissions).unwrap();
    let mut rows = RowBatch::new();
    for (id, n) in issues {
        issue_values(id, *n).iter().for_each(|value| rows.push(value));
    }
    sync.insert(0, &rows).unwrap();
    sync.create_indexes(&mut |_| {}).unwrap();
    sync.finish().unwrap();
}

/// A row of `issue`.
pub fn issue_values(id: &str, n: i64) -> [LiteValue; 3] {
    [text(id), text(&format!("title of {id}")), LiteValue::Integer(n)]
}

impl Server {
    pub fn start(setup: &Setup) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let replica_file: PathBuf = dir.path().join("replica.db");
        let version = StateVersion::from_lsn(INITIAL);
        make_replica(&replica_file, &version, &[]);
        let table_ids = TableIds::default();
        let options = WriterOptions::new("zero", table_ids.clone());
        let writer = ReplicaWriter::open(&replica_file, &options).unwrap();
        let (bus, receivers) = commit_bus_of(setup.executors, setup.ring).unwrap();
        let store: Arc<dyn CvrStore> = match (&setup.store, &setup.records) {
            (Some(store), _) => store.clone(),
            (None, Some(config)) => {
                Arc::new(PostgresCvrStore::connect(config, setup.task).unwrap())
            }
            (None, None) => {
                Arc::new(EmbeddedCvrStore::open(&dir.path().join("cvr.db"), setup.task).unwrap())
            }
        };
        let query = Endpoint {
            urls: setup.query_url.iter().cloned().collect(),
            forward_cookies: true,
            ..Endpoint::default()
        };
        let service = SyncService {
            config: SyncConfig {
                app_id: "zero".into(),
                shard_num: 0,
                task_id: setup.task.into(),
                replica_file,
                query,
                mutate: Endpoint::default(),
                crud_mutations: true,
                api_timeout: PATIENCE,
                refuses_tokens: (!setup.tokens).then(|| "no tokens here".to_owned()),
                auth_revalidate: setup.revalidate,
                auth_retransform: Duration::from_secs(300),
                slow_hydrate: Duration::from_millis(100),
                websocket: websocket_config(),
                stalled: setup.stalled,
            },
            store,
            api: Some(ApiClient::start(ApiClientConfig::default()).unwrap()),
            replica_version: version,
            table_ids: table_ids.clone(),
        };
        let registry = Registry::new(setup.executors);
        let parts = service.prepare(receivers, &registry).unwrap();
        let listeners = bind_group("127.0.0.1:0".parse().unwrap(), setup.executors).unwrap();
        let addr = listeners[0].local_addr();
        let config = RtConfig {
            executors: NonZeroUsize::new(setup.executors),
            pin: false,
            ..RtConfig::default()
        };
        let inputs = listeners.into_iter().zip(parts);
        let inputs = inputs.map(|(listener, part)| Input { listener, part }).collect();
        let executors = Executors::spawn_with(&config, inputs, |ctx, input: Input| async move {
            let listener = input.listener.into_local().unwrap();
            let sync = input.part.start(&ctx).unwrap();
            let service = sync.clone();
            let accepting = spawn(async move {
                while let Ok(stream) = listener.accept().await {
                    let service = service.clone();
                    spawn(async move {
                        if let Ok(incoming) = Incoming::read(stream, now() + PATIENCE).await {
                            service.upgrade(incoming).await;
                        }
                    });
                }
            });
            sync.run().await.unwrap();
            drop(accepting);
        })
        .unwrap();
        let tables = published().tables;
        let executors = Some(executors);
        let (initial, next, replicas) = (INITIAL, 1, 1);
        Server {
            addr,
            executors,
            writer,
            bus,
            table_ids,
            tables,
            initial,
            next,
            replicas,
            registry,
            dir,
        }
    }

    /// Another replica takes the place of this one, its version so much newer (or older), with
    /// these issues.
    pub fn replace_replica(&mut self, newer: i64, issues: &[(&str, i64)]) -> StateVersion {
        self.replicas += 1;
        (self.initial, self.next) = (self.initial.checked_add_signed(newer).unwrap(), 1);
        let version = StateVersion::from_lsn(self.initial);
        let path = self.dir.path().join(format!("replica-{}.db", self.replicas));
        make_replica(&path, &version, issues);
        let options = WriterOptions::new("zero", self.table_ids.clone());
        self.writer = ReplicaWriter::open(&path, &options).unwrap();
        let (replica_version, generation) = (version.clone(), self.replicas);
        self.bus.replica_replaced(&path, &ReplicaInfo { replica_version, generation });
        version
    }

    /// A number of `/statz`, as it was published last.
    pub fn number(&self, name: &str) -> u64 {
        self.registry.total().get(name).copied().unwrap_or_default()
    }

    /// Commits that an executor did not get because it was too slow.
    pub fn dropped(&self) -> u64 {
        self.bus.dropped().sum()
    }

    fn relation(&self, name: &str) -> Arc<Relation> {
        let table = self.tables.iter().find(|t| t.name == name).unwrap();
        let mut columns: Vec<_> = table.columns.iter().collect();
        columns.sort_by_key(|(_, c)| c.pos);
        Arc::new(Relation {
            oid: table.oid,
            schema: table.schema.clone(),
            name: table.name.clone(),
            identity: ReplicaIdentity::Default,
            columns: columns
                .iter()
                .map(|(n, _)| RelationColumn {
                    name: (*n).clone(),
                    is_key: table.primary_key.contains(n),
                    type_oid: 0,
                })
                .collect(),
        })
    }

    pub fn insert(&self, table: &str, values: &[LiteValue]) -> ChangeMessage {
        let new = values.iter().cloned().map(TupleValue::Value).collect();
        ChangeMessage::Insert { relation: self.relation(table), new }
    }

    pub fn update(&self, table: &str, values: &[LiteValue]) -> ChangeMessage {
        let new = values.iter().cloned().map(TupleValue::Value).collect();
        ChangeMessage::Update { relation: self.relation(table), old: None, new }
    }

    pub fn delete_issue(&self, id: &str) -> ChangeMessage {
        let old = vec![TupleValue::Value(text(id)), TupleValue::Absent, TupleValue::Absent];
        ChangeMessage::Delete { relation: self.relation("issue"), old }
    }

    pub fn issue(&self, id: &str, n: i64) -> ChangeMessage {
        self.insert("issue", &issue_values(id, n))
    }

    /// Applies and publishes a transaction.
    pub fn commit(&mut self, changes: Vec<ChangeMessage>) -> StateVersion {
        let watermark = StateVersion::from_lsn(self.initial + self.next);
        self.next += 1;
        let begin = ChangeMessage::Begin { watermark: watermark.clone(), commit_time_ms: 1.0 };
        self.writer.apply(&begin).unwrap();
        for change in &changes {
            self.writer.apply(change).unwrap();
        }
        let commit = ChangeMessage::Commit { watermark: watermark.clone() };
        match self.writer.apply(&commit).unwrap() {
            Applied::Committed(commit) => self.bus.commit(commit),
            other => panic!("not committed: {other:?}"),
        }
        watermark
    }

    /// Asks the executors to stop, as SIGTERM does; true if all ended in time.
    pub fn stop(&mut self) -> bool {
        self.begin_stop().join().unwrap()
    }

    /// The same, without waiting for it.
    pub fn begin_stop(&mut self) -> std::thread::JoinHandle<bool> {
        let executors = self.executors.take();
        std::thread::spawn(move || {
            let Some(executors) = executors else { return true };
            executors.stop_handle().stop();
            let (failures, all) = executors.join(PATIENCE);
            assert!(failures.is_empty(), "{failures:?}");
            all
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(executors) = self.executors.take() {
            executors.stop_handle().stop();
            let _ = executors.join(PATIENCE);
        }
    }
}

pub fn text(s: &str) -> LiteValue {
    LiteValue::Text(s.into())
}

/// Parameters of a connection.
#[derive(Clone)]
pub struct Dial {
    pub path: String,
    pub query: String,
    pub protocol: Option<String>,
    pub headers: Vec<(&'static str, &'static str)>,
}

/// The usual parameters for a client of a group.
pub fn dial(group: &str, client: &str) -> Dial {
    Dial {
        path: "/sync/v51/connect".into(),
        query: format!(
            "clientID={client}&clientGroupID={group}&ts=812.4&lmid=0&wsid=w-{client}&baseCookie="
        ),
        protocol: Some(sub_protocol(&json!({}))),
        headers: Vec::new(),
    }
}

impl Dial {
    pub fn path(mut self, path: &str) -> Dial {
        self.path = path.into();
        self
    }

    pub fn and(mut self, param: &str) -> Dial {
        self.query = format!("{}&{param}", self.query);
        self
    }

    pub fn cookie(mut self, cookie: &str) -> Dial {
        let cookie = cookie.replace(':', "%3A");
        self.query = self.query.replace("baseCookie=", &format!("baseCookie={cookie}"));
        self
    }

    pub fn with(mut self, content: &Value) -> Dial {
        self.protocol = Some(sub_protocol(content));
        self
    }
}

/// A `Sec-WebSocket-Protocol` value.
pub fn sub_protocol(content: &Value) -> String {
    let base64 = base64::engine::general_purpose::STANDARD.encode(content.to_string());
    base64.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D")
}

/// How a socket ended.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    pub code: Option<u16>,
    pub reason: String,
}

pub struct Client {
    ws: WebSocket<TcpStream>,
    pub echoed: Option<String>,
    pub cookie: Option<String>,
}

/// One message, or the end.
#[derive(Debug)]
pub enum Got {
    Json(String, Value),
    Binary(Vec<u8>),
    End(End),
}

impl Client {
    /// Upgrades; the HTTP status if that is refused.
    pub fn connect(server: &Server, dial: &Dial) -> Result<Client, u16> {
        Client::connect_to(server.addr, dial)
    }

    pub fn connect_to(addr: SocketAddr, dial: &Dial) -> Result<Client, u16> {
        let url = format!("ws://{addr}{}?{}", dial.path, dial.query);
        let mut request = url.into_client_request().unwrap();
        if let Some(protocol) = &dial.protocol {
            request.headers_mut().insert("Sec-WebSocket-Protocol", protocol.parse().unwrap());
        }
        for (name, value) in &dial.headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        match tungstenite::client(request, stream) {
            Ok((ws, response)) => {
                let echoed = response.headers().get("sec-websocket-protocol");
                let echoed = echoed.map(|v| v.to_str().unwrap().to_owned());
                Ok(Client { ws, echoed, cookie: None })
            }
            Err(tungstenite::HandshakeError::Failure(tungstenite::Error::Http(response))) => {
                Err(response.status().as_u16())
            }
            Err(error) => panic!("handshake: {error}"),
        }
    }

    pub fn say(&mut self, text: &str) {
        self.ws.send(Message::text(text)).unwrap();
    }

    pub fn next(&mut self) -> Got {
        self.try_next().unwrap_or_else(|error| panic!("no message: {error}"))
    }

    /// What comes next; an error if the connection broke, or nothing comes.
    pub fn try_next(&mut self) -> Result<Got, tungstenite::Error> {
        loop {
            match self.ws.read()? {
                Message::Text(text) => {
                    let (kind, body) = serde_json::from_str(text.as_str()).unwrap();
                    return Ok(Got::Json(kind, body));
                }
                Message::Binary(bytes) => return Ok(Got::Binary(bytes.to_vec())),
                Message::Close(frame) => {
                    let end = frame.map_or(End { code: None, reason: String::new() }, |f| End {
                        code: Some(f.code).filter(|c| *c != CloseCode::Status).map(u16::from),
                        reason: f.reason.to_string(),
                    });
                    return Ok(Got::End(end));
                }
                _ => {}
            }
        }
    }

    /// The next JSON message that is no `pong`.
    pub fn json(&mut self) -> (String, Value) {
        loop {
            match self.next() {
                Got::Json(kind, _) if kind == "pong" => {}
                Got::Json(kind, body) => return (kind, body),
                other => panic!("expected JSON: {other:?}"),
            }
        }
    }

    /// A whole poke, checked for its base cookie; its parts merged.
    pub fn poke(&mut self) -> Vec<Value> {
        let (kind, start) = self.json();
        assert_eq!(kind, "pokeStart", "{start}");
        assert_eq!(start["baseCookie"].as_str(), self.cookie.as_deref(), "base cookie");
        let mut parts = Vec::new();
        let mut chunks = Vec::new();
        loop {
            match self.next() {
                Got::Json(kind, body) if kind == "pokePart" => parts.push(body),
                Got::Binary(bytes) => {
                    assert_eq!(bytes[0], 0);
                    chunks.extend_from_slice(&bytes[1..]);
                }
                Got::Json(kind, end) if kind == "pokeEnd" => {
                    assert_eq!(end["pokeID"], start["pokeID"]);
                    self.cookie = Some(end["cookie"].as_str().unwrap().to_owned());
                    if !chunks.is_empty() {
                        assert!(parts.is_empty(), "parts and chunks in one poke");
                        parts = serde_json::from_slice(&chunks).unwrap();
                    }
                    return parts;
                }
                Got::Json(kind, _) if kind == "pong" => {}
                other => panic!("inside a poke: {other:?}"),
            }
        }
    }

    /// Pokes until one brings rows, or its got patch; all parts so far.
    pub fn pokes_until(&mut self, done: impl Fn(&Value) -> bool) -> Vec<Value> {
        let mut parts = Vec::new();
        loop {
            let more = self.poke();
            let found = more.iter().any(&done);
            parts.extend(more);
            if found {
                return parts;
            }
        }
    }

    pub fn error(&mut self) -> Value {
        loop {
            let (kind, body) = self.json();
            if kind == "error" {
                assert!(body["origin"].is_string(), "every error has an origin: {body}");
                return body;
            }
        }
    }

    pub fn end(&mut self) -> End {
        loop {
            if let Got::End(end) = self.next() {
                return end;
            }
        }
    }

    /// Greeted, and initialised with these query operations.
    pub fn joined(server: &Server, dial: &Dial, patch: &str) -> Client {
        let mut client = Client::connect(server, dial).unwrap();
        assert_eq!(client.json().0, "connected");
        client.say(&init(patch));
        client
    }

    pub fn drop_connection(self) {
        drop(self.ws);
    }
}

pub fn init(patch: &str) -> String {
    format!(
        r#"["initConnection",{{"desiredQueriesPatch":[{patch}],"clientSchema":{CLIENT_SCHEMA}}}]"#
    )
}

pub fn put(hash: &str) -> String {
    format!(r#"{{"op":"put","hash":"{hash}","ast":{ALL_ISSUES},"ttl":60000}}"#)
}

pub fn named(hash: &str) -> String {
    format!(r#"{{"op":"put","hash":"{hash}","name":"{hash}","args":[]}}"#)
}

pub fn is_got(part: &Value) -> bool {
    part.get("gotQueriesPatch").is_some()
}

// ---- the app's query endpoint -----------------------------------------------------------------

/// A request that the endpoint got.
#[derive(Debug, Clone)]
pub struct Call {
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Value,
}

impl Call {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

type Respond = dyn Fn(&Call, usize) -> (u16, String) + Send + Sync;

/// An HTTP server that answers as told and remembers what it was asked.
pub struct QueryApi {
    pub url: String,
    pub calls: Arc<Mutex<Vec<Call>>>,
}

impl QueryApi {
    pub fn start(
        respond: impl Fn(&Call, usize) -> (u16, String) + Send + Sync + 'static,
    ) -> QueryApi {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/query", listener.local_addr().unwrap());
        let calls: Arc<Mutex<Vec<Call>>> = Arc::default();
        let seen = calls.clone();
        let respond: Arc<Respond> = Arc::new(respond);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (seen, respond) = (seen.clone(), respond.clone());
                std::thread::spawn(move || serve(stream, &seen, &*respond));
            }
        });
        QueryApi { url, calls }
    }

    pub fn bodies(&self) -> Vec<Value> {
        self.calls.lock().unwrap().iter().map(|c| c.body.clone()).collect()
    }
}

fn serve(mut stream: TcpStream, seen: &Mutex<Vec<Call>>, respond: &Respond) {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let head_end = loop {
            if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            match stream.read(&mut chunk) {
                Ok(n) if n > 0 => bytes.extend_from_slice(&chunk[..n]),
                _ => return,
            }
        };
        let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
        let mut lines = head.lines();
        let target = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
        let headers: Vec<(String, String)> = lines
            .filter_map(|l| l.split_once(": "))
            .map(|(n, v)| (n.to_owned(), v.to_owned()))
            .collect();
        let length = headers.iter().find(|(n, _)| n.eq_ignore_ascii_case("content-length"));
        let length: usize = length.map_or(0, |(_, v)| v.parse().unwrap());
        while bytes.len() < head_end + length {
            match stream.read(&mut chunk) {
                Ok(n) if n > 0 => bytes.extend_from_slice(&chunk[..n]),
                _ => return,
            }
        }
        let body = serde_json::from_slice(&bytes[head_end..head_end + length]).unwrap();
        bytes.drain(..head_end + length);
        let call = Call { target, headers, body };
        let index = {
            let mut seen = seen.lock().unwrap();
            seen.push(call.clone());
            seen.len() - 1
        };
        let (status, answer) = respond(&call, index);
        let response = format!(
            "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{answer}",
            answer.len()
        );
        if stream.write_all(response.as_bytes()).is_err() {
            return;
        }
    }
}

/// The usual answer: every query is all issues.
pub fn all_issues(call: &Call) -> String {
    let queries: Vec<Value> = call.body[1]
        .as_array()
        .unwrap()
        .iter()
        .map(|q| {
            let ast: Value = serde_json::from_str(ALL_ISSUES).unwrap();
            json!({"id": q["id"], "name": q["name"], "ast": ast})
        })
        .collect();
    json!({"kind": "QueryResponse", "queries": queries}).to_string()
}

/// Waits until `check` is true.
pub fn eventually(what: &str, check: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
