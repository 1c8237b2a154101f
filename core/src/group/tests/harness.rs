//! Carries out the effects of groups: the executor, store, endpoint and sockets in one.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use rand::Rng;
use rand::rngs::StdRng;

use super::super::{
    ConnId, Connection, Credentials, EarlyRows, Effect, Event, Frame, Group, LargePoke, NextFrames,
    Note, OutgoingPush, Settings, Timer,
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
use crate::row::{Row, RowRef};
use crate::version::CvrVersion;
use crate::waste::Waste;

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

/// What waits for a socket.
pub enum Waiting {
    Frames(Arc<[Frame]>),
    Large(Box<LargePoke>),
}

/// A socket.
pub struct Socket {
    pub group: ClientGroupId,
    pub model: ClientModel,
    /// To be sent when the wire is empty.
    pub queue: VecDeque<Waiting>,
    /// Sent, not yet received.
    pub wire: VecDeque<Frame>,
    pub error: Option<ErrorBody>,
    pub closed: bool,
    /// Its message is being handled.
    pub busy: bool,
    pub outbox: VecDeque<Upstream>,
}

impl Socket {
    /// Puts what can be sent on the wire; true if there was something.
    fn pump(&mut self) -> bool {
        loop {
            match self.queue.front_mut() {
                None => return false,
                Some(Waiting::Frames(frames)) => {
                    self.wire.extend(frames.iter().cloned());
                    self.queue.pop_front();
                    return true;
                }
                Some(Waiting::Large(poke)) => match poke.next_frames() {
                    NextFrames::Some(frames) if frames.is_empty() => {}
                    NextFrames::Some(frames) => {
                        self.wire.extend(frames.iter().cloned());
                        return true;
                    }
                    NextFrames::Waits => return false,
                    NextFrames::Done => drop(self.queue.pop_front()),
                },
            }
        }
    }

    fn close(&mut self) {
        self.closed = true;
        self.queue.clear();
        self.wire.clear();
    }

    fn is_idle(&self) -> bool {
        self.wire.is_empty() && self.queue.is_empty()
    }

    /// A poke has begun whose end is not known yet.
    pub fn has_open_poke(&self) -> bool {
        let is_open = |w: &Waiting| matches!(w, Waiting::Large(poke) if poke.is_open());
        self.queue.iter().any(is_open)
    }
}

pub struct GroupSlot {
    pub group: Group,
    pub questions: VecDeque<Question>,
    /// It has a place among those that come up.
    pub admitted: bool,
    /// It wants to be told when its rows are written.
    pub awaits_rows: bool,
    /// It has deltas to merge.
    pub merges: bool,
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
    /// Rows of queries that are being hydrated go ahead, by chance; so many did.
    pub ahead: Option<StdRng>,
    pub went_ahead: usize,
    /// Slices of gathered deltas that groups merged on their own.
    pub slices_merged: usize,
    /// Sockets take what waits for them when their client reads.
    pub lazy_sockets: bool,
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
            slices_merged: 0,
            lazy_sockets: false,
            ahead: None,
            went_ahead: 0,
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
            Effect::SendLarge(conn, poke) => self.queue(id, conn, Waiting::Large(poke)),
            Effect::Send(conn, frames) => self.queue(id, conn, Waiting::Frames(frames)),
            Effect::GrowLarge(conn, growth) => {
                let socket = self.sockets.get_mut(&conn).expect("a socket");
                let open = socket.queue.iter_mut().find_map(|waiting| match waiting {
                    Waiting::Large(poke) if poke.is_open() => Some(poke),
                    _ => None,
                });
                match open {
                    Some(open) => open.grow(&growth, &mut Waste::default()),
                    None => assert!(socket.closed, "nothing of {conn:?} is open"),
                }
                self.check_ends(id, conn);
            }
            Effect::LetGo(mut waste) => {
                while !waste.is_empty() {
                    waste.shed(2);
                }
            }
            Effect::Fail(conn, error) => {
                let socket = self.sockets.get_mut(&conn).expect("a socket");
                socket.close();
                socket.error = Some(*error);
            }
            Effect::Close(conn, _) => {
                self.sockets.get_mut(&conn).expect("a socket").close();
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
            Effect::Merge => assert!(!std::mem::replace(&mut slot.merges, true), "asked once"),
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
            Effect::Note(Note::Error(text)) if text.contains("without a question") => {
                panic!("{text}")
            }
            Effect::Note(note) => self.notes.push(note),
        }
    }

    fn queue(&mut self, id: &ClientGroupId, conn: ConnId, waiting: Waiting) {
        let socket = self.sockets.get_mut(&conn).expect("a socket");
        if !socket.closed {
            socket.queue.push_back(waiting);
        }
        self.check_ends(id, conn);
    }

    /// Encodes what waits for a socket at once, unless sockets are lazy: every cookie that a
    /// client gets is durable before.
    fn check_ends(&mut self, id: &ClientGroupId, conn: ConnId) {
        if self.lazy_sockets {
            return;
        }
        let durable = self.store.version(id).cookie();
        let socket = self.sockets.get_mut(&conn).expect("a socket");
        let known = socket.wire.len();
        while socket.pump() {}
        for frame in socket.wire.range(known..) {
            if frame.payload.starts_with(b"[\"pokeEnd\"") {
                let end: (String, serde_json::Value) =
                    serde_json::from_slice(&frame.payload).expect("JSON");
                let cookie = end.1["cookie"].as_str().expect("cookie");
                assert!(cookie <= durable.as_str(), "{cookie} before {durable} is durable");
            }
        }
    }

    /// Rows of a query that a group waits for go ahead: those that are picked of all that it has
    /// now. How many; `None` if the group waits for nothing like that.
    pub fn go_ahead(
        &mut self,
        group: &ClientGroupId,
        mut pick: impl FnMut(EarlyRows) -> EarlyRows,
    ) -> Option<usize> {
        let Some(Question::Hydrate(wanted)) = self.groups.get(group)?.questions.front() else {
            return None;
        };
        let mut early = Vec::new();
        for wanted in wanted.iter().filter(|wanted| wanted.early) {
            early.push((wanted.query.clone(), pick(self.world.rows_of(wanted))));
        }
        let rows = early.iter().map(|(_, rows)| rows.len()).sum();
        for (query, rows) in early {
            self.feed(group, Event::Early(query, rows));
        }
        Some(rows)
    }

    /// Some rows of a query that is being hydrated go ahead, as they are now: some of them are read
    /// again before the end.
    fn some_go_ahead(&mut self, group: &ClientGroupId) -> bool {
        let Some(mut rng) = self.ahead.take() else { return false };
        let copy = |row: &RowRef| Row::new(row.version.clone(), row.values.to_vec());
        let again = rng.random_bool(0.6);
        let rows = self.go_ahead(group, |mut rows| {
            rows.retain(|_| again && rng.random_bool(0.6));
            rows.iter_mut().filter(|_| rng.random_bool(0.1)).for_each(|(_, row)| *row = copy(row));
            rows
        });
        self.ahead = Some(rng);
        self.went_ahead += rows.unwrap_or_default();
        rows.is_some_and(|rows| rows > 0)
    }

    /// Lets a group merge a slice.
    pub fn merge(&mut self, group: &ClientGroupId) -> bool {
        let merges =
            self.groups.get_mut(group).is_some_and(|slot| std::mem::take(&mut slot.merges));
        if merges {
            self.slices_merged += 1;
            self.feed(group, Event::Merge);
        }
        merges
    }

    /// Answers the oldest question of a group.
    pub fn answer(&mut self, group: &ClientGroupId) -> bool {
        if self.some_go_ahead(group) {
            return true;
        }
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
            merges: false,
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
                queue: VecDeque::new(),
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
        socket.close();
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
            socket.close();
            socket.busy = false;
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
        if socket.wire.is_empty() {
            socket.pump();
        }
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
                while self.merge(&group) || self.answer(&group) || self.write_rows(&group, Ok(())) {
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
        self.groups.values().all(|g| g.questions.is_empty() && !g.awaits_rows && !g.merges)
            && self
                .sockets
                .values()
                .all(|s| s.closed || (s.is_idle() && s.outbox.is_empty() && !s.busy))
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
