//! Carries out the effects of groups: the executor, store, endpoint and sockets in one.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::super::{
    ConnId, Connection, Credentials, Effect, Event, Frame, Group, Note, OutgoingPush, Settings,
    Timer,
};
use super::client::{ClientModel, Persisted};
use super::store::MemStore;
use super::world::SimWorld;
use crate::cvr::internal::ShardTables;
use crate::cvr::store::{CvrStoreError, RowCursor};
use crate::cvr::{ClientGroupId, QueryHash};
use crate::protocol::custom_query::{
    ErroredQuery, QueryErrorKind, TransformRequest, TransformResponse, TransformResult,
    ValidatedUser,
};
use crate::protocol::error::{ApiFailure, ErrorBody};
use crate::protocol::mutate::CleanUp;
use crate::protocol::up::{self, Upstream};
use crate::version::CvrVersion;

/// A question of a group that waits for its answer.
pub enum Question {
    Enter,
    Load,
    Rows(CvrVersion, Option<RowCursor>),
    CatchUp(Box<crate::cvr::store::CatchupRange>, Vec<QueryHash>, Option<RowCursor>),
    /// Durable already; the verdict is under way.
    Flushed(Result<crate::cvr::store::Flushed, CvrStoreError>),
    Transform(Arc<Credentials>, Vec<TransformRequest>),
    Hydrate(Vec<super::super::Hydrate>),
    Continue,
}

/// A socket.
pub struct Socket {
    pub group: ClientGroupId,
    pub model: ClientModel,
    /// Sent, not yet received.
    pub wire: VecDeque<Frame>,
    pub error: Option<ErrorBody>,
    pub closed: bool,
    /// Its message is being handled.
    pub busy: bool,
    pub outbox: VecDeque<Upstream>,
}

pub struct GroupSlot {
    pub group: Group,
    pub questions: VecDeque<Question>,
    /// It has a place among those that come up.
    pub admitted: bool,
    /// It wants to be told when its rows are written.
    pub awaits_rows: bool,
    pub timers: BTreeMap<Timer, f64>,
}

/// How the endpoint answers.
pub type Endpoint = Box<dyn FnMut(&Credentials, &TransformRequest) -> Answer>;

pub enum Answer {
    Ast(String),
    App(&'static str),
    Missing,
}

pub struct Harness {
    pub world: SimWorld,
    pub store: MemStore,
    pub settings: Arc<Settings>,
    pub groups: BTreeMap<ClientGroupId, GroupSlot>,
    pub sockets: BTreeMap<ConnId, Socket>,
    pub now_ms: f64,
    pub endpoint: Endpoint,
    /// Fails whole requests.
    pub endpoint_down: Option<ApiFailure>,
    pub endpoint_user: ValidatedUser,
    pub requests: Vec<Vec<String>>,
    /// Pushes on their way to the mutate endpoint.
    pub pushes: Vec<(ClientGroupId, OutgoingPush)>,
    pub clean_ups: Vec<CleanUp>,
    /// How often a group read its row records.
    pub row_reads: usize,
    pub notes: Vec<Note>,
    /// How often a group was loaded.
    pub loads: usize,
    /// The next flushes get these verdicts and are not carried out.
    pub flush_faults: VecDeque<CvrStoreError>,
    /// The next loads, and the next reads of rows or patches, get these answers.
    pub load_faults: VecDeque<CvrStoreError>,
    pub read_faults: VecDeque<CvrStoreError>,
    /// So many flushes are carried out, but the verdict is lost.
    pub unknown_outcomes: usize,
    /// Groups that gave their place back because they serve their clients.
    pub came_up: usize,
    /// Print everything that goes in and out.
    pub trace: bool,
    next_conn: u64,
}

pub const CLIENT_SCHEMA: &str = r#"{"tables":{
  "issue":{"columns":{"id":{"type":"string"},"owner":{"type":"string"},"n":{"type":"number"}},"primaryKey":["id"]},
  "comment":{"columns":{"id":{"type":"string"},"issue":{"type":"string"}},"primaryKey":["id"]}}}"#;

impl Harness {
    pub fn new(has_query_endpoint: bool) -> Harness {
        Harness {
            world: SimWorld::new(),
            store: MemStore::default(),
            settings: Arc::new(Settings {
                app_id: "zero".into(),
                shard_num: 0,
                tables: ShardTables::new("zero", 0),
                has_query_endpoint,
                has_mutate_endpoint: false,
                crud_mutations: true,
                refuses_tokens: None,
                revalidate_ms: 300_000.0,
                retransform_ms: 300_000.0,
            }),
            groups: BTreeMap::new(),
            sockets: BTreeMap::new(),
            now_ms: 1_765_000_000_000.0,
            endpoint: Box::new(|_, _| Answer::Missing),
            endpoint_down: None,
            endpoint_user: ValidatedUser::Unsaid,
            requests: Vec::new(),
            pushes: Vec::new(),
            clean_ups: Vec::new(),
            row_reads: 0,
            notes: Vec::new(),
            loads: 0,
            flush_faults: VecDeque::new(),
            load_faults: VecDeque::new(),
            read_faults: VecDeque::new(),
            unknown_outcomes: 0,
            came_up: 0,
            trace: std::env::var_os("ZERORING_SIM_TRACE").is_some(),
            next_conn: 0,
        }
    }

    pub fn feed(&mut self, group: &ClientGroupId, event: Event) {
        let Some(slot) = self.groups.get_mut(group) else { return };
        if self.trace {
            eprintln!("{} {group} <- {event:?}", self.world.version);
        }
        let mut effects = Vec::new();
        slot.group.handle(event, self.now_ms, &mut self.world, &mut effects);
        for effect in effects {
            self.carry_out(group, effect);
        }
    }

    fn carry_out(&mut self, id: &ClientGroupId, effect: Effect) {
        let slot = self.groups.get_mut(id).expect("alive until `Stop`");
        if self.trace {
            eprintln!("    {id} -> {}", shown(&effect));
        }
        match effect {
            Effect::SendLarge(conn, mut poke) => {
                while let Some(frames) = poke.next_frames() {
                    self.carry_out(id, Effect::Send(conn, frames));
                }
            }
            Effect::Send(conn, frames) => {
                let durable = self.store.version(id).cookie();
                let socket = self.sockets.get_mut(&conn).expect("a socket");
                for frame in frames.iter().cloned() {
                    if frame.payload.starts_with(b"[\"pokeEnd\"") {
                        let end: (String, serde_json::Value) =
                            serde_json::from_slice(&frame.payload).expect("JSON");
                        let cookie = end.1["cookie"].as_str().expect("cookie");
                        assert!(cookie <= durable.as_str(), "{cookie} before {durable} is durable");
                    }
                    if !socket.closed {
                        socket.wire.push_back(frame);
                    }
                }
            }
            Effect::Fail(conn, error) => {
                let socket = self.sockets.get_mut(&conn).expect("a socket");
                socket.wire.clear();
                socket.error = Some(*error);
                socket.closed = true;
            }
            Effect::Close(conn, _) => {
                self.sockets.get_mut(&conn).expect("a socket").closed = true;
            }
            Effect::MessageDone(conn) => {
                let socket = self.sockets.get_mut(&conn).expect("a socket");
                assert!(std::mem::take(&mut socket.busy), "one answer per message");
            }
            Effect::Enter => {
                assert!(!slot.admitted, "{id} asks twice");
                slot.questions.push_back(Question::Enter);
            }
            Effect::Leave { up } => {
                assert!(std::mem::take(&mut slot.admitted), "{id} has no place");
                self.came_up += usize::from(up);
            }
            Effect::Load { .. } => slot.questions.push_back(Question::Load),
            Effect::ReadRows { current, from, .. } => {
                self.row_reads += usize::from(from.is_none());
                slot.questions.push_back(Question::Rows(current, from));
            }
            Effect::CatchUp { range, except, from } => {
                slot.questions.push_back(Question::CatchUp(Box::new(range), except, from));
            }
            Effect::AwaitRows => {
                assert!(!std::mem::replace(&mut slot.awaits_rows, true), "asked once");
            }
            Effect::Flush(flush) => {
                let verdict = match self.flush_faults.pop_front() {
                    Some(fault) => Err(fault),
                    None if self.unknown_outcomes > 0 => {
                        self.unknown_outcomes -= 1;
                        let _ = self.store.flush(&flush);
                        Err(CvrStoreError::Storage("connection lost".into()))
                    }
                    None => self.store.flush(&flush),
                };
                slot.questions.push_back(Question::Flushed(verdict));
            }
            Effect::StoreTtlClock { clock, .. } => self.store.store_clock(id, clock),
            Effect::Transform { credentials, queries } => {
                slot.questions.push_back(Question::Transform(credentials, queries));
            }
            Effect::Hydrate(wanted) => slot.questions.push_back(Question::Hydrate(wanted)),
            Effect::Release(instance) => self.world.release(instance),
            Effect::Continue => slot.questions.push_back(Question::Continue),
            Effect::SetTimer(timer, Some(after)) => {
                assert!(after >= 0.0);
                slot.timers.insert(timer, self.now_ms + after);
            }
            Effect::SetTimer(timer, None) => {
                slot.timers.remove(&timer);
            }
            Effect::Push(push) => {
                let socket = self.sockets.get_mut(&push.conn).expect("a socket");
                assert!(std::mem::take(&mut socket.busy), "one answer per message");
                self.pushes.push((id.clone(), *push));
            }
            Effect::CleanUp { clean_up, .. } => self.clean_ups.push(clean_up),
            Effect::Stop => {
                let slot = self.groups.remove(id).expect("stops once");
                // What the executor had under way for it comes to nothing.
                drop(slot);
            }
            Effect::Note(Note::Error(text)) => panic!("{text}"),
            Effect::Note(note) => self.notes.push(note),
        }
    }

    /// Answers the oldest question of a group.
    pub fn answer(&mut self, group: &ClientGroupId) -> bool {
        let next = self.groups.get(group).and_then(|slot| slot.questions.front());
        let reads =
            matches!(next, Some(Question::Load | Question::Rows(..) | Question::CatchUp(..)));
        // Reads wait for rows that follow.
        if reads && self.store.owes(group) {
            return self.write_rows(group, Ok(()));
        }
        let Some(slot) = self.groups.get_mut(group) else { return false };
        let Some(question) = slot.questions.pop_front() else { return false };
        let event = match question {
            Question::Enter => {
                slot.admitted = true;
                Event::Admitted
            }
            Question::Load => {
                self.loads += 1;
                let fault = self.load_faults.pop_front();
                let load = || self.store.try_load(group).map(Box::new);
                Event::Loaded(fault.map_or_else(load, Err))
            }
            Question::Rows(current, from) => {
                let fault = self.read_faults.pop_front();
                let read = || self.store.page(group, &current, from.as_ref());
                Event::Rows(fault.map_or_else(read, Err))
            }
            Question::CatchUp(range, except, from) => {
                let fault = self.read_faults.pop_front();
                let read = || self.store.catch_up(&range, &except, from.as_ref());
                Event::CaughtUp(fault.map_or_else(read, Err))
            }
            Question::Flushed(verdict) => Event::Flushed(verdict),
            Question::Continue => Event::Continue,
            Question::Transform(credentials, queries) => {
                Event::Transformed(self.transform(&credentials, &queries))
            }
            Question::Hydrate(wanted) => Event::Hydrated(
                wanted.iter().map(|w| (w.query.clone(), self.world.hydrate(w))).collect(),
            ),
        };
        self.feed(group, event);
        true
    }

    /// The rows that follow are written, or never will be; whoever waits for them is told.
    pub fn write_rows(
        &mut self,
        group: &ClientGroupId,
        written: Result<(), CvrStoreError>,
    ) -> bool {
        let owed = self.store.owes(group);
        match &written {
            Ok(()) => self.store.write_owed(group),
            Err(_) => self.store.lose_owed(group),
        }
        let slot = self.groups.get_mut(group);
        let told = slot.is_some_and(|slot| std::mem::take(&mut slot.awaits_rows));
        if told {
            self.feed(group, Event::RowsWritten(written));
        }
        owed || told
    }

    fn transform(
        &mut self,
        credentials: &Credentials,
        queries: &[TransformRequest],
    ) -> Result<TransformResponse, ApiFailure> {
        self.requests.push(queries.iter().map(|q| q.id.clone()).collect());
        if let Some(failure) = &self.endpoint_down {
            return Err(failure.clone());
        }
        let mut results = Vec::new();
        for query in queries {
            match (self.endpoint)(credentials, query) {
                Answer::Ast(ast) => results.push(TransformResult::Query {
                    id: query.id.clone(),
                    name: query.name.clone(),
                    ast: serde_json::from_str(&ast).expect("an AST"),
                }),
                Answer::App(message) => results.push(TransformResult::Error(ErroredQuery {
                    error: QueryErrorKind::App,
                    id: query.id.clone(),
                    name: query.name.clone(),
                    message: Some(message.to_owned()),
                    details: None,
                })),
                Answer::Missing => {}
            }
        }
        Ok(TransformResponse::Queries { user: self.endpoint_user.clone(), queries: results })
    }

    // ---- clients ------------------------------------------------------------------------------

    /// Opens a socket; `Err` is what the handshake answers.
    pub fn connect(
        &mut self,
        group: &str,
        client: &str,
        user: Option<&str>,
        state: Persisted,
        protocol: u32,
    ) -> Result<ConnId, Box<ErrorBody>> {
        let id = ClientGroupId::from(group);
        let slot = self.groups.entry(id.clone()).or_insert_with(|| GroupSlot {
            group: Group::new(id.clone(), self.settings.clone(), self.now_ms),
            questions: VecDeque::new(),
            admitted: false,
            awaits_rows: false,
            timers: BTreeMap::new(),
        });
        slot.group.admit(user)?;
        self.next_conn += 1;
        let conn = ConnId(self.next_conn);
        let connection = Connection {
            conn,
            client_id: client.into(),
            ws_id: format!("w{}", conn.0).into(),
            protocol,
            profile_id: None,
            base_cookie: state.cookie.as_deref().map(Arc::from),
            credentials: Arc::new(Credentials {
                user_id: user.map(Arc::from),
                ..Credentials::default()
            }),
        };
        self.sockets.insert(
            conn,
            Socket {
                group: id.clone(),
                model: ClientModel::new(state, protocol >= 52),
                wire: VecDeque::new(),
                error: None,
                closed: false,
                busy: false,
                outbox: VecDeque::new(),
            },
        );
        self.feed(&id, Event::Connected(Box::new(connection)));
        Ok(conn)
    }

    /// The socket is lost, with whatever was on the wire.
    pub fn disconnect(&mut self, conn: ConnId) -> Persisted {
        let socket = self.sockets.get_mut(&conn).expect("a socket");
        socket.closed = true;
        socket.wire.clear();
        let (group, state) = (socket.group.clone(), socket.model.state.clone());
        self.feed(&group, Event::Disconnected(conn));
        state
    }

    /// The server dies, with everything that was under way, and is there again.
    pub fn crash(&mut self) {
        self.groups.clear();
        self.store.lose_all_owed();
        self.world.forget_instances();
        for socket in self.sockets.values_mut() {
            socket.closed = true;
            socket.busy = false;
            socket.wire.clear();
            socket.outbox.clear();
        }
    }

    /// A message from a client, as JSON text.
    pub fn say(&mut self, conn: ConnId, text: &str) {
        let message = up::parse(text).expect("a valid message");
        self.sockets.get_mut(&conn).expect("a socket").outbox.push_back(message);
        self.pump_upstream(conn);
    }

    /// Hands over the next message if the one before was handled.
    pub fn pump_upstream(&mut self, conn: ConnId) -> bool {
        let socket = self.sockets.get_mut(&conn).expect("a socket");
        if socket.busy || socket.closed {
            return false;
        }
        let Some(message) = socket.outbox.pop_front() else { return false };
        socket.busy = true;
        let group = socket.group.clone();
        self.feed(&group, Event::Message(conn, Box::new(message)));
        true
    }

    /// The client receives one frame.
    pub fn receive(&mut self, conn: ConnId) -> bool {
        let socket = self.sockets.get_mut(&conn).expect("a socket");
        let Some(frame) = socket.wire.pop_front() else { return false };
        socket.model.receive(&frame);
        true
    }

    // ---- time and data ------------------------------------------------------------------------

    /// A transaction upstream, delivered to all groups.
    pub fn commit(&mut self, changes: Vec<super::world::Change>) {
        let deltas = self.world.commit(changes);
        let groups: Vec<ClientGroupId> = self.groups.keys().cloned().collect();
        for group in groups {
            for delta in &deltas {
                self.feed(&group, Event::Delta(delta.clone()));
            }
            self.feed(&group, Event::Advanced);
        }
    }

    /// Lets time pass; timers fire in order.
    pub fn pass(&mut self, ms: f64) {
        let until = self.now_ms + ms;
        loop {
            let next = self
                .groups
                .iter()
                .flat_map(|(g, s)| s.timers.iter().map(|(t, at)| (*at, g.clone(), *t)))
                .filter(|(at, ..)| *at <= until)
                .min_by(|a, b| a.0.total_cmp(&b.0));
            let Some((at, group, timer)) = next else { break };
            self.now_ms = at.max(self.now_ms);
            self.groups.get_mut(&group).expect("a group").timers.remove(&timer);
            self.feed(&group, Event::Timer(timer));
        }
        self.now_ms = until;
    }

    /// Answers every question, hands over every message and delivers every frame.
    pub fn settle(&mut self) {
        loop {
            let mut moved = false;
            let groups: Vec<ClientGroupId> = self.groups.keys().cloned().collect();
            for group in groups {
                while self.answer(&group) || self.write_rows(&group, Ok(())) {
                    moved = true;
                }
            }
            let conns: Vec<ConnId> = self.sockets.keys().copied().collect();
            for conn in conns {
                moved |= self.pump_upstream(conn);
                while self.receive(conn) {
                    moved = true;
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// No answer, message or frame is under way.
    pub fn is_quiet(&self) -> bool {
        self.groups.values().all(|g| g.questions.is_empty() && !g.awaits_rows)
            && self
                .sockets
                .values()
                .all(|s| s.closed || (s.wire.is_empty() && s.outbox.is_empty() && !s.busy))
    }

    pub fn socket(&self, conn: ConnId) -> &Socket {
        &self.sockets[&conn]
    }

    pub fn state(&self, conn: ConnId) -> &Persisted {
        &self.socket(conn).model.state
    }

    pub fn error_kind(&self, conn: ConnId) -> Option<&'static str> {
        self.socket(conn).error.as_ref().map(ErrorBody::kind_name)
    }
}

/// An effect for the trace, frames as text.
fn shown(effect: &Effect) -> String {
    match effect {
        Effect::Send(conn, frames) => {
            let text: Vec<_> =
                frames.iter().map(|f| String::from_utf8_lossy(&f.payload).into_owned()).collect();
            format!("Send({conn:?}) {}", text.join(" "))
        }
        other => format!("{other:?}"),
    }
}
