//! The client groups of an executor: who is where, what goes to whom, what they want done.
//!
//! Everything here runs to completion on the executor's thread; whatever has to wait becomes a
//! request to the store, a job of the executor or a timer, and comes back as an event.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustc_hash::FxHashMap;
use zeroring_core::cvr::store::{CatchupRange, GroupFlush};
use zeroring_core::cvr::{ClientGroupId, QueryHash};
use zeroring_core::group::{
    ConnId, Credentials, Effect, Event, Frame, Group, Missed, Note, Settings, SharedDelta, Timer,
};
use zeroring_core::ivm::delta::Advanced;
use zeroring_core::ivm::engine::{Budget, InstanceId, Progress};
use zeroring_core::ivm::error::EngineError;
use zeroring_core::protocol::custom_query::TransformRequest;
use zeroring_core::protocol::down;
use zeroring_core::protocol::error::ErrorBody;
use zeroring_core::protocol::up::Upstream;
use zeroring_net::rt::{Instant, now};
use zeroring_net::ws::{SendError, WsWriter};
use zeroring_storage::cvr_store::{CvrStore, RowLookup, RowScan};

use super::answers::{FlushLane, Mailbox, StoreAnswer};
use super::counters::Counters;
use super::drain::Draining;
use super::fanout::{self, WireFrames};
use super::farewell::farewell;
use super::pushes::MutateCall;
use super::world::World;

/// Rows of a catch-up scan per page.
const SCAN_PAGE: usize = 10_000;
/// Groups in one flush: bounds the time to the first verdict.
const FLUSH_BATCH: usize = 1_024;
/// An update of more rows than this is a batch of its own.
const LARGE_FLUSH_ROWS: usize = 1_000;
/// Messages of one connection that wait for their turn. Real clients send a handful; beyond this
/// the connection is not read until some were handled.
pub(super) const MAX_BACKLOG: usize = 256;
/// And so many bytes of them: a client that re-pushes what it did offline while the app is slow.
const MAX_BACKLOG_BYTES: usize = 16 << 20;
/// Bytes that may wait for a socket when a poke is to be sent to it, beside one large poke: who
/// takes long to read its first rows must not lose them to the next small change, again and again.
/// A client that has not read this much has been away for longer than a reconnect costs.
pub(super) const MAX_QUEUED_BYTES: usize = 16 << 20;
/// The client is told something at least this often.
const SIGN_OF_LIFE: Duration = Duration::from_secs(6);

/// Code of the close frame of a client that does not read.
const CLOSE_TRY_AGAIN: u16 = 1013;

/// Names one life of a group: a group that ends and comes back is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct GroupKey(pub(super) u64);

/// Every timer of a group, at the index that it is as a number.
const TIMERS: [Timer; 4] = [Timer::Expiry, Timer::TtlClock, Timer::Maintenance, Timer::Idle];
const _: () = assert!(
    matches!(TIMERS, [a, b, c, d] if a as u8 == 0 && b as u8 == 1 && c as u8 == 2 && d as u8 == 3)
);

struct Slot {
    group: Group,
    /// By [`Timer`].
    timers: [Option<Instant>; TIMERS.len()],
    scan: Option<Scan>,
    /// How long its queries were hydrated here.
    hydrated_for: Duration,
}

/// A catch-up scan under way: configuration first, then rows, page by page.
struct Scan {
    range: CatchupRange,
    except: Vec<QueryHash>,
    missed: Missed,
}

/// A connection that has passed its handshake.
pub(super) struct Conn {
    group: GroupKey,
    writer: WsWriter,
    /// When it was told `connected`.
    since: Instant,
    last_sent: Instant,
    /// Bytes that may wait: more than usual while a large poke is on its way.
    may_wait_bytes: usize,
    /// A message is being handled; the next ones wait here.
    busy: bool,
    backlog: VecDeque<(Box<Upstream>, usize)>,
    /// Length of their texts.
    backlog_bytes: usize,
}

/// Queries of a group on their way into the engine.
pub(super) struct Hydration {
    group: GroupKey,
    queries: VecDeque<(QueryHash, Result<InstanceId, String>)>,
    done: Vec<(QueryHash, Result<InstanceId, String>)>,
    /// Time spent on the first of `queries`.
    spent: Duration,
}

/// A request to the app's query endpoint.
pub(super) struct Transform {
    pub(super) group: GroupKey,
    pub(super) credentials: Arc<Credentials>,
    pub(super) queries: Vec<TransformRequest>,
}

/// The state of an executor.
pub(super) struct State {
    pub(super) world: World,
    settings: Arc<Settings>,
    store: Arc<dyn CvrStore>,
    mailbox: Arc<Mailbox>,
    compress: bool,
    /// Boxed: the table has places for up to twice as many.
    slots: FxHashMap<GroupKey, Box<Slot>>,
    by_id: FxHashMap<ClientGroupId, GroupKey>,
    /// Who is subscribed to an instance, and how often.
    subscribers: FxHashMap<InstanceId, BTreeMap<GroupKey, usize>>,
    /// Groups that cannot go on before a newer version.
    waiting: BTreeSet<GroupKey>,
    timers: BTreeSet<(Instant, GroupKey, Timer)>,
    conns: FxHashMap<ConnId, Conn>,
    /// Events in order; handled between advances only.
    pub(super) inbox: VecDeque<(GroupKey, Event)>,
    pub(super) hydrations: VecDeque<Hydration>,
    /// Groups that have more to compute, one slice per turn.
    pub(super) computing: VecDeque<GroupKey>,
    pub(super) transforms: Vec<Transform>,
    /// For the mutate endpoint, in order.
    pub(super) calls: Vec<(ClientGroupId, MutateCall)>,
    frames: WireFrames,
    flushes: VecDeque<(GroupKey, GroupFlush)>,
    /// Large ones, each a batch of its own: nobody else waits for them.
    large_flushes: VecDeque<(GroupKey, GroupFlush)>,
    flushing: bool,
    flushing_large: bool,
    draining: Option<Draining>,
    next_key: u64,
    next_conn: u64,
    /// Writers of sockets that were closed lately, for an orderly end.
    pub(super) closing: Vec<WsWriter>,
    pub(super) counters: Counters,
}

/// Wall time, milliseconds since the Unix epoch.
pub(super) fn wall_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_micros() as f64 / 1_000.0)
}

impl State {
    pub(super) fn new(
        world: World,
        settings: Arc<Settings>,
        store: Arc<dyn CvrStore>,
        mailbox: Arc<Mailbox>,
        compress: bool,
    ) -> State {
        State {
            world,
            settings,
            store,
            mailbox,
            compress,
            slots: FxHashMap::default(),
            by_id: FxHashMap::default(),
            subscribers: FxHashMap::default(),
            waiting: BTreeSet::new(),
            timers: BTreeSet::new(),
            conns: FxHashMap::default(),
            inbox: VecDeque::new(),
            hydrations: VecDeque::new(),
            computing: VecDeque::new(),
            transforms: Vec::new(),
            calls: Vec::new(),
            frames: WireFrames::default(),
            flushes: VecDeque::new(),
            large_flushes: VecDeque::new(),
            flushing: false,
            flushing_large: false,
            draining: None,
            next_key: 0,
            next_conn: 0,
            closing: Vec::new(),
            counters: Counters::default(),
        }
    }

    pub(super) fn groups(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn connections(&self) -> usize {
        self.conns.len()
    }

    pub(super) fn keys(&self) -> Vec<GroupKey> {
        self.slots.keys().copied().collect()
    }

    /// Begins to close groups: those that serve nobody yet at once, the others at their pace.
    pub(super) fn start_drain(&mut self) {
        let mut keys = self.keys();
        keys.sort_unstable();
        tracing::info!(groups = keys.len(), "draining");
        let serves = |key: &GroupKey| self.slots.get(key).is_some_and(|s| s.group.queries() > 0);
        let (serving, idle): (Vec<GroupKey>, Vec<GroupKey>) = keys.into_iter().partition(serves);
        self.inbox.extend(idle.into_iter().map(|key| (key, Event::Drain)));
        self.draining = Some(Draining::new(serving, now()));
    }

    /// Closes the groups whose turn it is.
    pub(super) fn drain(&mut self) {
        let Some(draining) = &mut self.draining else { return };
        let slots = &self.slots;
        while let Some(key) = draining.due(now(), |key| slots.get(&key).map(|s| s.hydrated_for)) {
            self.inbox.push_back((key, Event::Drain));
        }
    }

    /// Nothing of a stopped group is left to be written.
    pub(super) fn is_flushed(&self) -> bool {
        self.flushes.is_empty()
            && self.large_flushes.is_empty()
            && !self.flushing
            && !self.flushing_large
    }

    // ---- connections ------------------------------------------------------------------------

    /// The group of this id; made if it is not there.
    pub(super) fn group_of(&mut self, id: &ClientGroupId) -> GroupKey {
        if let Some(key) = self.by_id.get(id) {
            return *key;
        }
        let key = GroupKey(self.next_key);
        self.next_key += 1;
        let group = Group::new(id.clone(), self.settings.clone(), wall_ms());
        let timers = [None; TIMERS.len()];
        let slot = Slot { group, timers, scan: None, hydrated_for: Duration::ZERO };
        self.slots.insert(key, Box::new(slot));
        self.by_id.insert(id.clone(), key);
        if let Some(draining) = &mut self.draining {
            draining.add(key);
        }
        key
    }

    /// The group of this id, if it is there.
    pub(super) fn key_of(&self, id: &ClientGroupId) -> Option<GroupKey> {
        self.by_id.get(id).copied()
    }

    /// Whether a user may join the group.
    ///
    /// # Errors
    /// The group belongs to another user.
    pub(super) fn admit(&self, key: GroupKey, user: Option<&str>) -> Result<(), Box<ErrorBody>> {
        self.slots.get(&key).map_or(Ok(()), |slot| slot.group.admit(user))
    }

    /// Registers a connection.
    pub(super) fn connect(&mut self, group: GroupKey, writer: WsWriter) -> ConnId {
        self.next_conn += 1;
        self.counters.connections_total += 1;
        let conn = ConnId(self.next_conn);
        let since = now();
        let may_wait_bytes = MAX_QUEUED_BYTES;
        let backlog = VecDeque::new();
        let entry = Conn {
            group,
            writer,
            since,
            last_sent: since,
            may_wait_bytes,
            busy: false,
            backlog,
            backlog_bytes: 0,
        };
        self.conns.insert(conn, entry);
        conn
    }

    /// The socket is gone.
    pub(super) fn disconnected(&mut self, conn: ConnId) {
        if let Some(gone) = self.conns.remove(&conn) {
            self.inbox.push_back((gone.group, Event::Disconnected(conn)));
        }
    }

    /// A message of a connection, and the length of its text; false if the connection is gone.
    pub(super) fn message(&mut self, conn: ConnId, message: Upstream, bytes: usize) -> bool {
        let Some(entry) = self.conns.get_mut(&conn) else { return false };
        self.counters.messages += 1;
        let message = Box::new(message);
        if entry.busy {
            entry.backlog.push_back((message, bytes));
            entry.backlog_bytes += bytes;
        } else {
            entry.busy = true;
            self.inbox.push_back((entry.group, Event::Message(conn, message)));
        }
        true
    }

    /// The connection has so many messages waiting that it should not be read.
    pub(super) fn is_backlogged(&self, conn: ConnId) -> bool {
        self.conns
            .get(&conn)
            .is_some_and(|c| c.backlog.len() >= MAX_BACKLOG || c.backlog_bytes >= MAX_BACKLOG_BYTES)
    }

    /// Answers a ping, whatever is under way.
    pub(super) fn pong(&mut self, conn: ConnId) {
        self.deliver(conn, &fanout::wire(down::PONG, false, false));
    }

    /// Ends a connection with an error of its own making.
    pub(super) fn fail(&mut self, conn: ConnId, error: &ErrorBody) {
        if let Some(gone) = self.conns.get(&conn) {
            let group = gone.group;
            self.close_with(conn, error);
            self.inbox.push_back((group, Event::Disconnected(conn)));
        }
    }

    fn close_with(&mut self, conn: ConnId, error: &ErrorBody) {
        let Some(entry) = self.conns.remove(&conn) else { return };
        tracing::debug!(conn = conn.0, "closing with error: {error}");
        farewell(entry.writer.clone(), error, entry.since);
        self.remember_closing(entry.writer);
    }

    fn remember_closing(&mut self, writer: WsWriter) {
        self.closing.retain(WsWriter::is_open);
        self.closing.push(writer);
    }

    /// Sends a frame; a client that does not read is closed.
    fn deliver(&mut self, conn: ConnId, frame: &zeroring_net::ws::Frame) {
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        entry.last_sent = now();
        self.counters.frames += 1;
        match entry.writer.send(frame) {
            Ok(()) | Err(SendError::Closed) => {}
            Err(error @ SendError::Overflow { .. }) => self.too_slow(conn, &error.to_string()),
        }
    }

    /// Closes a client that does not read; it comes back with its cookie.
    fn too_slow(&mut self, conn: ConnId, why: &str) {
        let Some(entry) = self.conns.get(&conn) else { return };
        tracing::info!(conn = conn.0, "a client does not keep up: {why}");
        self.counters.slow_clients += 1;
        entry.writer.close_now(Some((CLOSE_TRY_AGAIN, "the client does not read fast enough")));
        self.disconnected(conn);
    }

    /// Tells quiet clients that we are alive, and forgets what was kept for sharing.
    pub(super) fn signs_of_life(&mut self) {
        self.frames.clear();
        self.world.shared.sweep();
        let quiet: Vec<ConnId> = self
            .conns
            .iter()
            .filter(|(_, c)| now().duration_since(c.last_sent) > SIGN_OF_LIFE)
            .map(|(conn, _)| *conn)
            .collect();
        for conn in quiet {
            self.pong(conn);
        }
    }

    // ---- events and effects -------------------------------------------------------------------

    /// Feeds one event; events of groups that are gone come to nothing but clean-up.
    pub(super) fn feed(&mut self, key: GroupKey, event: Event) {
        let Some(slot) = self.slots.get_mut(&key) else {
            if let Event::Hydrated(results) = event {
                results.into_iter().filter_map(|(_, r)| r.ok()).for_each(|id| {
                    self.unsubscribe(key, id);
                });
            }
            return;
        };
        let mut effects = Vec::new();
        slot.group.handle(event, wall_ms(), &mut self.world, &mut effects);
        if slot.group.waits_for_version() {
            self.waiting.insert(key);
        } else {
            self.waiting.remove(&key);
        }
        for effect in effects {
            self.carry_out(key, effect);
        }
        self.frames.trim();
    }

    fn carry_out(&mut self, key: GroupKey, effect: Effect) {
        match effect {
            Effect::Send(conn, list) => self.send(conn, &list),
            Effect::SendMore(conn, list) => {
                if let Some(entry) = self.conns.get_mut(&conn) {
                    let waiting = entry.writer.queued_bytes().saturating_add(MAX_QUEUED_BYTES);
                    let coming: usize = list.iter().map(|frame| frame.payload.len()).sum();
                    let may_wait = entry.may_wait_bytes.max(waiting);
                    entry.may_wait_bytes = may_wait.saturating_add(coming);
                }
                self.send(conn, &list);
            }
            Effect::Fail(conn, error) => self.close_with(conn, &error),
            Effect::Close(conn, reason) => {
                if let Some(entry) = self.conns.remove(&conn) {
                    tracing::debug!(conn = conn.0, "closing: {reason}");
                    entry.writer.close(None);
                    self.remember_closing(entry.writer);
                }
            }
            Effect::MessageDone(conn) => self.message_done(conn),
            Effect::Push(push) => self.call(key, MutateCall::Push(push)),
            Effect::CleanUp { credentials, clean_up } => {
                self.call(key, MutateCall::CleanUp(credentials, clean_up));
            }
            Effect::Hydrate(wanted) => {
                let queries = wanted
                    .iter()
                    .map(|w| {
                        let id = self.world.subscribe(w);
                        if let Ok(id) = id {
                            let of = self.subscribers.entry(id).or_default();
                            *of.entry(key).or_default() += 1;
                        }
                        (w.query.clone(), id)
                    })
                    .collect();
                let spent = Duration::ZERO;
                let done = Vec::new();
                self.hydrations.push_back(Hydration { group: key, queries, done, spent });
            }
            Effect::Release(instance) => self.unsubscribe(key, instance),
            Effect::Continue => self.computing.push_back(key),
            Effect::SetTimer(timer, after_ms) => self.set_timer(key, timer, after_ms),
            Effect::Stop => self.forget(key),
            Effect::Note(Note::Info(text)) => tracing::info!("{text}"),
            Effect::Note(Note::Warn(text)) => tracing::warn!("{text}"),
            Effect::Note(Note::Error(text)) => {
                self.counters.group_failures += 1;
                tracing::error!("{text}");
            }
            Effect::Transform { credentials, queries } => {
                self.transforms.push(Transform { group: key, credentials, queries });
            }
            Effect::Flush(flush) if flush.rows.len() > LARGE_FLUSH_ROWS => {
                self.large_flushes.push_back((key, *flush));
            }
            Effect::Flush(flush) => self.flushes.push_back((key, *flush)),
            Effect::Load { .. }
            | Effect::ReadRows { .. }
            | Effect::CatchUp { .. }
            | Effect::StoreTtlClock { .. } => self.ask_store(key, effect),
        }
    }

    /// A connection's message was handled: the next one may come.
    pub(super) fn message_done(&mut self, conn: ConnId) {
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        match entry.backlog.pop_front() {
            Some((next, bytes)) => {
                entry.backlog_bytes -= bytes;
                self.inbox.push_back((entry.group, Event::Message(conn, next)));
            }
            None => entry.busy = false,
        }
    }

    fn call(&mut self, key: GroupKey, call: MutateCall) {
        if let Some(slot) = self.slots.get(&key) {
            self.calls.push((slot.group.id().clone(), call));
        }
    }

    fn send(&mut self, conn: ConnId, list: &Arc<[Frame]>) {
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        let waiting = entry.writer.queued_bytes();
        if waiting > entry.may_wait_bytes {
            return self.too_slow(conn, &format!("{waiting} bytes wait for it"));
        }
        if waiting <= MAX_QUEUED_BYTES {
            let coming: usize = list.iter().map(|frame| frame.payload.len()).sum();
            entry.may_wait_bytes = MAX_QUEUED_BYTES.saturating_add(coming);
        }
        entry.last_sent = now();
        self.counters.frames += list.len() as u64;
        for frame in self.frames.of(list, self.compress).iter() {
            match entry.writer.send(frame) {
                Ok(()) | Err(SendError::Closed) => {}
                Err(error @ SendError::Overflow { .. }) => {
                    return self.too_slow(conn, &error.to_string());
                }
            }
        }
    }

    fn unsubscribe(&mut self, key: GroupKey, instance: InstanceId) {
        self.world.unsubscribe(instance);
        if let Some(of) = self.subscribers.get_mut(&instance) {
            if let Some(count) = of.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    of.remove(&key);
                }
            }
            if of.is_empty() {
                self.subscribers.remove(&instance);
            }
        }
    }

    fn forget(&mut self, key: GroupKey) {
        let Some(slot) = self.slots.remove(&key) else { return };
        if self.by_id.get(slot.group.id()) == Some(&key) {
            self.by_id.remove(slot.group.id());
        }
        for (timer, at) in TIMERS.into_iter().zip(slot.timers) {
            at.map(|at| self.timers.remove(&(at, key, timer)));
        }
        self.waiting.remove(&key);
        let (gone, kept) =
            std::mem::take(&mut self.hydrations).into_iter().partition(|h| h.group == key);
        self.hydrations = kept;
        let gone: VecDeque<Hydration> = gone;
        for (_, result) in gone.into_iter().flat_map(|h| h.queries.into_iter().chain(h.done)) {
            if let Ok(instance) = result {
                self.unsubscribe(key, instance);
            }
        }
    }

    fn set_timer(&mut self, key: GroupKey, timer: Timer, after_ms: Option<f64>) {
        let Some(slot) = self.slots.get_mut(&key) else { return };
        if let Some(old) = slot.timers[timer as usize].take() {
            self.timers.remove(&(old, key, timer));
        }
        if let Some(ms) = after_ms {
            // A century is as good as never.
            let after = Duration::from_secs_f64((ms / 1_000.0).clamp(0.0, 3.2e9));
            let Some(at) = now().checked_add(after) else { return };
            slot.timers[timer as usize] = Some(at);
            self.timers.insert((at, key, timer));
        }
    }

    /// When the next timer is due, or the next group is to be closed.
    pub(super) fn next_timer(&self) -> Option<Instant> {
        let timer = self.timers.first().map(|(at, ..)| *at);
        let drain = self.draining.as_ref().and_then(Draining::next);
        timer.into_iter().chain(drain).min()
    }

    /// Turns due timers into events.
    pub(super) fn fire_timers(&mut self) {
        let now = now();
        while let Some(&(at, key, timer)) = self.timers.first() {
            if at > now {
                return;
            }
            self.timers.pop_first();
            if let Some(slot) = self.slots.get_mut(&key) {
                slot.timers[timer as usize] = None;
                self.inbox.push_back((key, Event::Timer(timer)));
            }
        }
    }

    // ---- the store ----------------------------------------------------------------------------

    fn ask_store(&mut self, key: GroupKey, effect: Effect) {
        let Some(slot) = self.slots.get_mut(&key) else { return };
        let group = slot.group.id().clone();
        let mailbox = self.mailbox.clone();
        match effect {
            Effect::Load { connect_ms } => {
                let reply = move |answer: Result<_, _>| {
                    mailbox.put(StoreAnswer::Loaded(key, answer.map(Box::new)));
                };
                self.store.load(group, connect_ms, Box::new(reply));
            }
            Effect::ReadRows { current, queries } => {
                let lookup = RowLookup { group, current, queries, ids: Vec::new() };
                let reply = move |answer| mailbox.put(StoreAnswer::Rows(key, answer));
                self.store.rows(lookup, Box::new(reply));
            }
            Effect::CatchUp { range, except } => {
                slot.scan = Some(Scan { range: range.clone(), except, missed: Missed::default() });
                let reply = move |answer| mailbox.put(StoreAnswer::MissedConfig(key, answer));
                self.store.catchup_config(range, Box::new(reply));
            }
            Effect::StoreTtlClock { clock, now_ms } => {
                self.store.write_ttl_clock(group, clock, now_ms);
            }
            _ => {}
        }
    }

    fn scan_rows(&mut self, key: GroupKey, from: Option<zeroring_core::cvr::store::RowCursor>) {
        let Some(scan) = self.slots.get(&key).and_then(|slot| slot.scan.as_ref()) else { return };
        let request = RowScan {
            range: scan.range.clone(),
            without: scan.except.clone(),
            from,
            limit: SCAN_PAGE,
        };
        let mailbox = self.mailbox.clone();
        let reply = move |answer| mailbox.put(StoreAnswer::MissedRows(key, answer));
        self.store.catchup_rows(request, Box::new(reply));
    }

    /// Takes an answer of the store.
    pub(super) fn store_answer(&mut self, answer: StoreAnswer) {
        match answer {
            StoreAnswer::Loaded(key, loaded) => {
                self.inbox.push_back((key, Event::Loaded(loaded)));
            }
            StoreAnswer::Rows(key, rows) => self.inbox.push_back((key, Event::Rows(rows))),
            StoreAnswer::MissedConfig(key, Ok(config)) => {
                if let Some(scan) = self.slots.get_mut(&key).and_then(|s| s.scan.as_mut()) {
                    scan.missed.config = config;
                    self.scan_rows(key, None);
                }
            }
            StoreAnswer::MissedRows(key, Ok(page)) => {
                let Some(slot) = self.slots.get_mut(&key) else { return };
                let Some(scan) = slot.scan.as_mut() else { return };
                scan.missed.rows.extend(page.rows);
                if page.next.is_some() {
                    self.scan_rows(key, page.next);
                } else if let Some(scan) = slot.scan.take() {
                    self.inbox.push_back((key, Event::CaughtUp(Ok(scan.missed))));
                }
            }
            StoreAnswer::MissedConfig(key, Err(error))
            | StoreAnswer::MissedRows(key, Err(error)) => {
                if let Some(slot) = self.slots.get_mut(&key) {
                    slot.scan = None;
                }
                self.inbox.push_back((key, Event::CaughtUp(Err(error))));
            }
            StoreAnswer::Flushed(lane, verdicts) => {
                match lane {
                    FlushLane::Small => self.flushing = false,
                    FlushLane::Large => self.flushing_large = false,
                }
                for (key, verdict) in verdicts {
                    self.inbox.push_back((key, Event::Flushed(verdict)));
                }
            }
        }
    }

    /// Sends everything that groups have to write as one batch, unless one is under way: while it
    /// is, the next one gathers. Large updates go one by one beside them.
    pub(super) fn flush(&mut self) {
        if !self.flushing && !self.flushes.is_empty() {
            let count = self.flushes.len().min(FLUSH_BATCH);
            let batch = self.flushes.drain(..count).collect();
            self.flushing = true;
            self.send_flushes(FlushLane::Small, batch);
        }
        if !self.flushing_large
            && let Some(large) = self.large_flushes.pop_front()
        {
            self.flushing_large = true;
            self.send_flushes(FlushLane::Large, vec![large]);
        }
    }

    fn send_flushes(&mut self, lane: FlushLane, batch: Vec<(GroupKey, GroupFlush)>) {
        self.counters.flush_batches += 1;
        self.counters.flushes += batch.len() as u64;
        let (keys, batch): (Vec<GroupKey>, Vec<GroupFlush>) = batch.into_iter().unzip();
        let mailbox = self.mailbox.clone();
        self.store.flush(
            batch,
            Box::new(move |verdicts| {
                let verdicts = keys.into_iter().zip(verdicts.into_iter().map(|v| v.result));
                mailbox.put(StoreAnswer::Flushed(lane, verdicts.collect()));
            }),
        );
    }

    // ---- the engine ---------------------------------------------------------------------------

    /// Hands an advance to the groups that it concerns, and to nobody else.
    pub(super) fn advanced(&mut self, advanced: Advanced) {
        self.counters.advances += 1;
        let mut affected: BTreeSet<GroupKey> = std::mem::take(&mut self.waiting);
        for (instance, error) in advanced.failed {
            self.instance_failed(instance, &error.to_string(), &mut affected);
        }
        for delta in &advanced.deltas {
            let Some(subscribers) = self.subscribers.get(&delta.instance) else { continue };
            let keys: Vec<GroupKey> = subscribers.keys().copied().collect();
            match SharedDelta::of(delta, &self.settings.tables) {
                Ok(shared) => {
                    let shared = Arc::new(shared);
                    for key in keys {
                        self.feed(key, Event::Delta(shared.clone()));
                        affected.insert(key);
                    }
                }
                Err(why) => self.instance_failed(delta.instance, &why, &mut affected),
            }
        }
        self.inbox.extend(affected.into_iter().map(|key| (key, Event::Advanced)));
    }

    fn instance_failed(
        &mut self,
        instance: InstanceId,
        why: &str,
        affected: &mut BTreeSet<GroupKey>,
    ) {
        let subscribers = self.subscribers.get(&instance);
        let keys: Vec<GroupKey> = subscribers.into_iter().flat_map(|s| s.keys().copied()).collect();
        for key in keys {
            self.feed(key, Event::InstanceFailed(instance, why.to_owned()));
            affected.insert(key);
        }
    }

    /// Goes on hydrating for one slice, a job after the other; true if there is more to do.
    pub(super) fn hydrate(&mut self, budget: &mut Budget) -> bool {
        let Some(mut job) = self.hydrations.pop_front() else { return false };
        let mut failed = Vec::new();
        let started = now();
        while let Some((query, instance)) = job.queries.pop_front() {
            let Ok(id) = instance else {
                job.done.push((query, instance));
                continue;
            };
            match self.world.hydrate(id, &query, &mut job.spent, budget) {
                Ok(Progress::Done) => job.done.push((query, Ok(id))),
                Ok(Progress::More | Progress::Blocked)
                | Err(EngineError::SnapshotMismatch { .. }) => {
                    job.queries.push_front((query, Ok(id)));
                    break;
                }
                Err(error) => {
                    failed.push(id);
                    job.done.push((query, Err(error.to_string())));
                }
            }
        }
        for id in failed {
            self.unsubscribe(job.group, id);
        }
        if let Some(slot) = self.slots.get_mut(&job.group) {
            slot.hydrated_for += now().duration_since(started);
        }
        if job.queries.is_empty() {
            self.inbox.push_back((job.group, Event::Hydrated(job.done)));
        } else {
            self.hydrations.push_back(job);
        }
        !self.hydrations.is_empty()
    }

    /// Lets one group compute for a slice; true if one has more to do.
    pub(super) fn compute(&mut self) -> bool {
        if let Some(key) = self.computing.pop_front() {
            self.feed(key, Event::Continue);
        }
        !self.computing.is_empty()
    }

    /// Closes every group and socket at once, without asking: what they stand on is gone.
    pub(super) fn abandon_groups(&mut self) {
        for (_, entry) in std::mem::take(&mut self.conns) {
            entry.writer.close(None);
            self.closing.push(entry.writer);
        }
        self.slots.clear();
        self.by_id.clear();
        self.subscribers.clear();
        self.waiting.clear();
        self.timers.clear();
        self.inbox.clear();
        self.hydrations.clear();
        self.computing.clear();
        self.transforms.clear();
    }
}
