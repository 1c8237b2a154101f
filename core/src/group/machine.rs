//! The machine: what is known, what is in flight, what comes next.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::by_conn::ByConn;
use super::context::{Connection, Contexts, Target};
use super::early::OpenPoke;
use super::interface::{Effect, Event, Note, ResetReason, Timer, Transformed, World};
use super::maintenance::Planned;
use super::op::{Failure, Level, Op, Stage, Step, StepResult, Task, Trigger};
use super::pending::Pending;
use super::poke::Frame;
use super::transform_cache::TransformCache;
use super::{ConnId, Settings};
use crate::cvr::store::{CvrStoreError, Flushed};
use crate::cvr::{ClientGroupId, ClientId, Cvr, QueryHash, RowIdentity, TtlTimer};
use crate::ivm::engine::InstanceId;
use crate::protocol::down;
use crate::protocol::error::{ErrorBody, ErrorKind};
use crate::protocol::mutate::CleanUp;
use crate::protocol::up::{InitConnection, InspectOp, Upstream};
use crate::row::RowRef;
use crate::version::CvrVersion;
use crate::waste::Waste;

/// How long a group stays after its last connection has gone, milliseconds.
pub const KEEP_ALIVE_MS: f64 = 5_000.0;
/// The TTL clock is stored this long after the last flush, milliseconds.
pub(super) const TTL_CLOCK_INTERVAL_MS: f64 = 60_000.0;

/// A client group. See the [module](super).
#[derive(Debug)]
pub struct Group {
    pub(super) id: ClientGroupId,
    pub(super) settings: Arc<Settings>,
    pub(super) contexts: Contexts,
    /// Connections whose `initConnection` was accepted.
    pub(super) clients: ByConn<Client>,
    pub(super) cvr: Option<Cvr>,
    pub(super) clock: Option<TtlTimer>,
    pub(super) pipelines: BTreeMap<QueryHash, Pipeline>,
    pub(super) pending: Pending,
    pub(super) cache: TransformCache<Transformed>,
    /// Every query that should run does, as of `cvr` and `pending`.
    pub(super) synced: bool,
    /// Some client's `initConnection` was applied.
    pub(super) initialized: bool,
    /// The replica is behind the CVR.
    pub(super) behind: bool,
    pub(super) due: Due,
    pub(super) reset: Option<ResetReason>,
    /// Nothing may be attached as it was: records and results have to be compared.
    pub(super) compare_all: bool,
    /// This server had the CVR already when it was loaded.
    pub(super) own_view: bool,
    pub(super) planned: Planned,
    pub(super) last_connect_ms: f64,
    /// It has a place among the groups that come up.
    pub(super) admitted: bool,
    /// Rows of the operation in flight that went out before its end.
    pub(super) open: Option<Box<OpenPoke>>,
    keep_alive_until_ms: f64,
    op: Option<Op>,
    /// What has gathered is being merged ([`Effect::Merge`]).
    pub(super) merges: bool,
    owed: Owed,
    /// At most one message per connection.
    queue: VecDeque<(ConnId, Task)>,
    /// Shared work has its turn before the next message.
    shared_first: bool,
    draining: bool,
    stopped: bool,
}

/// Rows that follow their metadata, and are not known to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owed {
    No,
    /// The store was asked to tell when they are.
    Asked,
    /// More followed since.
    AskAgain,
}

/// Timers that have fired and wait for their turn.
#[derive(Debug, Default)]
pub(super) struct Due {
    pub(super) expiry: bool,
    pub(super) maintenance: bool,
}

/// A connection that takes part.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) id: ClientId,
    /// The cookie it is at.
    pub(super) base: Option<CvrVersion>,
    pub(super) ever_poked: bool,
    /// Its `initConnection` was validated and applied: it may get pokes.
    pub(super) active: bool,
    /// Poke payloads travel in binary chunks.
    pub(super) binary: bool,
}

/// A query that runs.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) instance: InstanceId,
    pub(super) hash: Arc<str>,
}

/// What an event handler has at hand.
pub(super) struct Cx<'a> {
    pub(super) now_ms: f64,
    pub(super) world: &'a mut dyn World,
    pub(super) out: &'a mut Vec<Effect>,
}

impl Cx<'_> {
    pub(super) fn emit(&mut self, effect: Effect) {
        self.out.push(effect);
    }

    /// A row as it is now, read once for all groups that ask at this version.
    pub(super) fn read_row(&mut self, id: &Arc<RowIdentity>) -> Result<Option<RowRef>, String> {
        let version = self.world.version().clone();
        if let Some(known) = self.world.shared().rows.get(&version, id) {
            return Ok(known);
        }
        let row = self.world.read_row(id)?;
        self.world.shared().rows.put(id.clone(), row.clone());
        Ok(row)
    }

    /// Leaves behind what nobody needs.
    pub(super) fn let_go(&mut self, waste: Waste) {
        if !waste.is_empty() {
            self.emit(Effect::LetGo(waste));
        }
    }

    /// As [`Cx::let_go`], of what `work` leaves behind.
    pub(super) fn leave<R>(&mut self, work: impl FnOnce(&mut Waste) -> R) -> R {
        let mut waste = Waste::default();
        let result = work(&mut waste);
        self.let_go(waste);
        result
    }

    pub(super) fn info(&mut self, text: String) {
        self.out.push(Effect::Note(Note::Info(text)));
    }

    pub(super) fn warn(&mut self, text: String) {
        self.out.push(Effect::Note(Note::Warn(text)));
    }
}

impl Group {
    /// A group that nobody is connected to yet.
    pub fn new(id: ClientGroupId, settings: Arc<Settings>, now_ms: f64) -> Group {
        Group {
            id,
            settings,
            contexts: Contexts::default(),
            clients: ByConn::default(),
            cvr: None,
            clock: None,
            pipelines: BTreeMap::new(),
            pending: Pending::default(),
            cache: TransformCache::default(),
            synced: false,
            initialized: false,
            behind: false,
            due: Due::default(),
            reset: None,
            compare_all: false,
            own_view: false,
            planned: Planned::default(),
            last_connect_ms: now_ms,
            admitted: false,
            keep_alive_until_ms: now_ms + KEEP_ALIVE_MS,
            open: None,
            op: None,
            merges: false,
            owed: Owed::No,
            queue: VecDeque::new(),
            shared_first: false,
            draining: false,
            stopped: false,
        }
    }

    /// Its id.
    pub fn id(&self) -> &ClientGroupId {
        &self.id
    }

    /// Whether a connection of this user may join. To be asked before the connection is told
    /// anything and before [`Event::Connected`], which closes another socket of the same client.
    ///
    /// # Errors
    /// `Unauthorized`: the group belongs to another user.
    pub fn admit(&self, user: Option<&str>) -> Result<(), Box<ErrorBody>> {
        self.contexts.admit(user)
    }

    /// Wants [`Event::Advanced`] for every new version: it cannot go on before a newer one.
    pub fn waits_for_version(&self) -> bool {
        self.behind && !self.stopped
    }

    /// True after [`Effect::Stop`].
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Connections, attached or not.
    pub fn connections(&self) -> usize {
        self.contexts.len()
    }

    /// Queries that run for this group.
    pub fn queries(&self) -> usize {
        self.pipelines.len()
    }

    /// The version at which the group's clients are or will be.
    pub fn version(&self) -> Option<&CvrVersion> {
        self.cvr.as_ref().map(|cvr| &cvr.version)
    }

    /// Takes an event and appends what is to be done. `now_ms` is wall time, milliseconds since
    /// the Unix epoch.
    pub fn handle(
        &mut self,
        event: Event,
        now_ms: f64,
        world: &mut dyn World,
        out: &mut Vec<Effect>,
    ) {
        let mut cx = Cx { now_ms, world, out };
        if self.stopped {
            self.after_the_end(event, &mut cx);
            return;
        }
        match event {
            Event::Connected(connection) => self.connected(*connection, &mut cx),
            Event::Message(conn, message) => self.message(conn, *message, &mut cx),
            Event::Disconnected(conn) => self.disconnected(conn, &mut cx),
            // Nothing starts before all of an advance is here: its last event is `Advanced`.
            Event::Delta(delta) => return self.delta(&delta, &mut cx),
            Event::Merge => return self.merge_pending(&mut cx),
            Event::InstanceFailed(instance, why) => return self.instance_failed(instance, &why),
            Event::Advanced => self.behind = false,
            Event::Early(query, rows) => return self.early(&query, rows, &mut cx),
            // An operation in flight ends on what it began with.
            Event::Reset(reason) => self.reset = Some(reason),
            Event::Pushed(pushed) => self.pushed(*pushed, &mut cx),
            Event::RowsWritten(written) => self.rows_written(written, &mut cx),
            Event::Timer(timer) => self.timer(timer, &mut cx),
            Event::Drain => self.draining = true,
            answer => self.answer(answer, &mut cx),
        }
        self.run(&mut cx);
    }

    // ---- connections ------------------------------------------------------------------------

    fn connected(&mut self, connection: Connection, cx: &mut Cx<'_>) {
        self.last_connect_ms = cx.now_ms.max(self.last_connect_ms);
        self.keep_alive_until_ms = cx.now_ms + KEEP_ALIVE_MS;
        cx.emit(Effect::SetTimer(Timer::Idle, None));
        if let Some(old) = self.contexts.register(connection) {
            self.detach(old);
            cx.emit(Effect::Close(old, "replaced by a newer connection of the same client"));
        }
    }

    fn disconnected(&mut self, conn: ConnId, cx: &mut Cx<'_>) {
        let known = self.contexts.remove(conn);
        let attached = self.detach(conn);
        if known || attached {
            self.someone_left(cx);
        }
    }

    /// Forgets a client's connection; its context stays or goes separately.
    fn detach(&mut self, conn: ConnId) -> bool {
        self.queue.retain(|(of, _)| *of != conn);
        self.clients.remove(conn)
    }

    /// Consequences of one connection less.
    fn someone_left(&mut self, cx: &mut Cx<'_>) {
        if self.clients.is_empty() {
            self.pause_timers(cx);
            self.due = Due::default();
            if let (Some(clock), Some(_)) = (&mut self.clock, &self.cvr) {
                let clock = clock.read(cx.now_ms);
                cx.emit(Effect::StoreTtlClock { clock, now_ms: cx.now_ms });
            }
        }
        if self.contexts.len() == 0 {
            self.keep_alive_until_ms = cx.now_ms + KEEP_ALIVE_MS;
            cx.emit(Effect::SetTimer(Timer::Idle, Some(KEEP_ALIVE_MS)));
        }
    }

    /// Sends a connection its error and forgets it.
    pub(super) fn fail_connection(&mut self, conn: ConnId, error: Box<ErrorBody>, cx: &mut Cx<'_>) {
        let known = self.contexts.remove(conn);
        if self.detach(conn) | known {
            cx.emit(Effect::Fail(conn, error));
            self.someone_left(cx);
        }
    }

    pub(super) fn send(&mut self, conn: ConnId, frames: Vec<Frame>, cx: &mut Cx<'_>) {
        if !frames.is_empty() {
            cx.emit(Effect::Send(conn, frames.into()));
        }
    }

    // ---- messages ---------------------------------------------------------------------------

    fn message(&mut self, conn: ConnId, message: Upstream, cx: &mut Cx<'_>) {
        if self.contexts.get(conn).is_none() {
            // Replaced or failed meanwhile; its socket is being closed.
            return;
        }
        let attached = self.clients.contains(conn);
        let task = match message {
            Upstream::InitConnection(init) => match self.attach(conn, *init, cx) {
                Ok(task) => task,
                Err(error) => return self.fail_connection(conn, error, cx),
            },
            Upstream::ChangeDesiredQueries(change) if attached => {
                Task::Change { conn, ops: change.desired_queries_patch }
            }
            Upstream::DeleteClients(delete) if attached => {
                Task::Delete { conn, clients: delete.client_ids.unwrap_or_default() }
            }
            Upstream::UpdateAuth(token) => Task::UpdateAuth { conn, token },
            Upstream::Inspect(request) if attached => {
                // Without inspector every request is one of somebody not authenticated.
                let value = crate::json::RawJson::from_trusted("false");
                let reply = down::inspect("authenticated", &request.id, &value);
                if !matches!(request.op, InspectOp::Authenticate(_)) {
                    cx.info(format!("inspector request of {conn:?} refused: not authenticated"));
                }
                self.send(conn, vec![Frame::text(reply)], cx);
                return cx.emit(Effect::MessageDone(conn));
            }
            Upstream::Push(push) => return self.push(conn, push, cx),
            Upstream::AckMutationResponses(id) => {
                self.clean_up(conn, CleanUp::Single(id), cx);
                return cx.emit(Effect::MessageDone(conn));
            }
            Upstream::Pull
            | Upstream::CloseConnection
            | Upstream::Ping
            | Upstream::ChangeDesiredQueries(_)
            | Upstream::DeleteClients(_)
            | Upstream::Inspect(_) => return cx.emit(Effect::MessageDone(conn)),
        };
        debug_assert!(self.queue.iter().all(|(of, _)| *of != conn), "messages come one by one");
        self.queue.push_back((conn, task));
    }

    /// The part of `initConnection` that does not wait.
    fn attach(
        &mut self,
        conn: ConnId,
        init: InitConnection,
        cx: &mut Cx<'_>,
    ) -> Result<Task, Box<ErrorBody>> {
        if self.clients.contains(conn) {
            return Err(Box::new(ErrorBody::internal(if self.settings.has_mutate_endpoint {
                "Connection was already initialized"
            } else {
                "Outbound stream already set for this connection!"
            })));
        }
        self.contexts.change_credentials(conn, |credentials| {
            let target = |url: &Option<String>, headers: &Option<_>| Target {
                url: url.as_deref().map(Arc::from),
                headers: headers.clone().unwrap_or_default(),
            };
            credentials.query = target(&init.user_query_url, &init.user_query_headers);
            credentials.mutate = target(&init.user_push_url, &init.user_push_headers);
        });
        let Some(context) = self.contexts.get(conn) else {
            return Err(no_auth_state());
        };
        let connection = &context.connection;
        let base = match &connection.base_cookie {
            None => None,
            Some(cookie) => Some(
                CvrVersion::parse(cookie)
                    .map_err(|e| Box::new(ErrorBody::internal(e.to_string())))?,
            ),
        };
        if self.clients.is_empty()
            && let Some(clock) = &mut self.clock
        {
            clock.skip_pause(cx.now_ms);
        }
        let client = Client {
            id: ClientId::from(&*connection.client_id),
            base,
            ever_poked: false,
            active: false,
            binary: connection.protocol >= crate::protocol::BINARY_POKES_SINCE,
        };
        self.clients.insert(conn, client);
        Ok(Task::Init { conn, init: Box::new(init) })
    }

    // ---- timers, resets, the end --------------------------------------------------------------

    fn timer(&mut self, timer: Timer, cx: &mut Cx<'_>) {
        match timer {
            Timer::Expiry => {
                self.planned.expiry_at_ms = None;
                self.due.expiry = true;
            }
            Timer::Maintenance => {
                self.planned.maintenance_at_ms = None;
                self.due.maintenance = true;
            }
            Timer::TtlClock => {
                if let (Some(clock), Some(_), false) =
                    (&mut self.clock, &self.cvr, self.clients.is_empty())
                {
                    let clock = clock.read(cx.now_ms);
                    cx.emit(Effect::StoreTtlClock { clock, now_ms: cx.now_ms });
                    cx.emit(Effect::SetTimer(Timer::TtlClock, Some(TTL_CLOCK_INTERVAL_MS)));
                }
            }
            // Looked at in `run`, when nothing is in flight. The timer is right even if the wall
            // clock was set back meanwhile.
            Timer::Idle => self.keep_alive_until_ms = self.keep_alive_until_ms.min(cx.now_ms),
        }
    }

    /// Drops every subscription; the next bring-up compares with the CVR.
    pub(super) fn forget_pipelines(&mut self, cx: &mut Cx<'_>) {
        for (_, pipeline) in std::mem::take(&mut self.pipelines) {
            cx.emit(Effect::Release(pipeline.instance));
        }
        cx.leave(|waste| self.pending.discard(waste));
        self.cache = TransformCache::default();
        self.synced = false;
        self.behind = false;
    }

    /// Nothing in memory is trusted any more.
    pub(super) fn forget_all(&mut self, cx: &mut Cx<'_>) {
        self.forget_pipelines(cx);
        self.cvr = None;
    }

    /// Ends the service because of an error: every client gets it, and the log.
    fn stop_failed(&mut self, failure: &Failure, what: &'static str, cx: &mut Cx<'_>) {
        let Failure { error, level, .. } = failure;
        let clients = self.clients.len();
        let others = self.contexts.len().saturating_sub(clients);
        cx.emit(level.note(format!(
            "group {}: {what}: {error}. Its {clients} clients were told so and {others} other \
             sockets were closed",
            self.id
        )));
        self.stop(Some(error), what, cx);
    }

    /// Ends the service: every connection gets the error, or a plain close without one.
    fn stop(&mut self, error: Option<&ErrorBody>, reason: &'static str, cx: &mut Cx<'_>) {
        self.stopped = true;
        self.cancel_open_poke(cx);
        let conns: Vec<ConnId> = self.contexts.all().collect();
        for conn in conns {
            match error {
                Some(error) if self.clients.contains(conn) => {
                    cx.emit(Effect::Fail(conn, Box::new(error.clone())));
                }
                // A socket that has not asked for anything yet comes back by itself.
                _ => cx.emit(Effect::Close(conn, reason)),
            }
            self.contexts.remove(conn);
        }
        if let (Some(clock), Some(_), false) = (&mut self.clock, &self.cvr, self.clients.is_empty())
        {
            let clock = clock.read(cx.now_ms);
            cx.emit(Effect::StoreTtlClock { clock, now_ms: cx.now_ms });
        }
        self.clients.clear();
        self.queue.clear();
        if let Some(op) = self.op.take() {
            op.stage.discard(cx);
        }
        self.forget_all(cx);
        self.pause_timers(cx);
        cx.emit(Effect::SetTimer(Timer::Idle, None));
        cx.emit(Effect::Stop);
    }

    /// A stopped group only cleans up after answers that were under way.
    fn after_the_end(&mut self, event: Event, cx: &mut Cx<'_>) {
        match event {
            Event::Hydrated(results) => {
                for (_, result) in results {
                    if let Ok(instance) = result {
                        cx.emit(Effect::Release(instance));
                    }
                }
            }
            Event::Connected(connection) => {
                let error = ErrorBody::rehome("Reconnect required");
                cx.emit(Effect::Fail(connection.conn, Box::new(error)));
            }
            _ => {}
        }
    }

    // ---- rows that follow ---------------------------------------------------------------------

    fn rows_follow(&mut self, cx: &mut Cx<'_>) {
        self.owed = match self.owed {
            Owed::No => {
                cx.emit(Effect::AwaitRows);
                Owed::Asked
            }
            Owed::Asked | Owed::AskAgain => Owed::AskAgain,
        };
    }

    fn rows_written(&mut self, written: Result<(), CvrStoreError>, cx: &mut Cx<'_>) {
        let again = std::mem::replace(&mut self.owed, Owed::No) == Owed::AskAgain;
        match written {
            Ok(()) if again => self.rows_follow(cx),
            Ok(()) => {}
            // The metadata in the store are ahead of their rows, for good.
            Err(error) => {
                self.stop_failed(&error.into(), "rows of its CVR were not written", cx);
            }
        }
    }

    // ---- operations ---------------------------------------------------------------------------

    fn answer(&mut self, answer: Event, cx: &mut Cx<'_>) {
        if let Event::Flushed(Ok(Flushed { rows_follow: true, .. })) = &answer {
            self.rows_follow(cx);
        }
        let Some(Op { trigger, stage }) = self.op.take() else {
            cx.emit(Effect::Note(Note::Error(format!(
                "group {}: an answer without a question: {answer:?}",
                self.id
            ))));
            return;
        };
        let result = self.resume(trigger, stage, answer, cx);
        self.drive(trigger, result, cx);
    }

    fn drive(&mut self, trigger: Trigger, result: StepResult, cx: &mut Cx<'_>) {
        match result {
            Ok(Step::Wait(stage)) => self.op = Some(Op { trigger, stage }),
            Ok(Step::Done) => {
                self.cancel_open_poke(cx);
                self.op_done(trigger, cx);
            }
            Err(failure) => {
                self.cancel_open_poke(cx);
                self.op_failed(trigger, failure, cx);
            }
        }
    }

    /// What is waited for.
    pub(super) fn stage(&self) -> Option<&Stage> {
        self.op.as_ref().map(|op| &op.stage)
    }

    pub(super) fn stage_mut(&mut self) -> Option<&mut Stage> {
        self.op.as_mut().map(|op| &mut op.stage)
    }

    fn op_done(&mut self, trigger: Trigger, cx: &mut Cx<'_>) {
        if let Trigger::Message(conn) = trigger
            && self.contexts.get(conn).is_some()
        {
            cx.emit(Effect::MessageDone(conn));
        }
        if let Trigger::Retransform(_) = trigger {
            self.contexts.retransform_at_ms = Some(cx.now_ms + self.settings.retransform_ms);
        }
        self.plan_timers(cx);
    }

    fn op_failed(&mut self, trigger: Trigger, failure: Failure, cx: &mut Cx<'_>) {
        if failure.distrust {
            self.forget_all(cx);
        }
        match trigger {
            // What it asked for is written, or was nothing: the bring-up that follows does the rest.
            Trigger::Message(conn)
                if failure.overtaken && self.clients.get(conn).is_some_and(|c| c.active) =>
            {
                cx.info(format!("group {}: another server has had it meanwhile", self.id));
                self.op_done(trigger, cx);
            }
            Trigger::Message(conn) => self.message_failed(conn, failure, cx),
            Trigger::Revalidate(conn) | Trigger::Retransform(conn) => {
                match (is_auth_failure(&failure.error), &*failure.error) {
                    (true, _) => self.message_failed(conn, failure, cx),
                    (false, error @ ErrorBody::TransformFailed { .. }) => {
                        cx.warn(format!(
                            "group {}: maintenance of credentials put off: {error}",
                            self.id
                        ));
                        self.contexts.not_before_ms = cx.now_ms + self.settings.revalidate_ms;
                    }
                    (false, _) => self.stop_failed(&failure, "it failed", cx),
                }
            }
            // Everybody whom the work was for has left; who comes next starts it anew.
            Trigger::Shared if !self.clients.values().any(|c| c.active) => self.forget_all(cx),
            Trigger::Shared => self.stop_failed(&failure, "it failed", cx),
        }
        if !self.stopped {
            self.plan_timers(cx);
        }
    }

    /// What a client asked for failed: it alone hears of it, and the log. An internal error that
    /// leaves the group as it was is the client's own doing.
    fn message_failed(&mut self, conn: ConnId, failure: Failure, cx: &mut Cx<'_>) {
        let Failure { error, distrust, level, .. } = failure;
        if let Some(context) = self.contexts.get(conn) {
            let level = if distrust { level } else { level.min(Level::Warn) };
            let client = &context.connection.client_id;
            cx.emit(level.note(format!("group {}: client {client} failed: {error}", self.id)));
        }
        self.fail_connection(conn, error, cx);
    }

    /// Starts what comes next until something is in flight or nothing is left.
    fn run(&mut self, cx: &mut Cx<'_>) {
        self.run_on(cx);
        let comes_up = |op: &Op| !self.synced && !op.stage.waits_for_app();
        if self.admitted && !self.stopped && !self.op.as_ref().is_some_and(comes_up) {
            self.admitted = false;
            cx.emit(Effect::Leave { up: self.synced });
        }
    }

    fn run_on(&mut self, cx: &mut Cx<'_>) {
        while self.op.is_none() && !self.stopped {
            if self.draining {
                // Whoever has the group next is to find its rows.
                if self.owed == Owed::No {
                    self.stop(None, "the server is draining", cx);
                }
                return;
            }
            if let Some(reason) = self.reset.take() {
                cx.info(format!("group {}: resetting its queries: {}", self.id, reason.name()));
                self.forget_pipelines(cx);
                self.compare_all |= reason == ResetReason::LostRow;
            }
            let Some((trigger, task)) = self.next(cx) else { break };
            let result = self.begin(trigger, task, cx);
            self.drive(trigger, result, cx);
        }
        if self.op.is_none()
            && !self.stopped
            && self.owed == Owed::No
            && self.contexts.len() == 0
            && cx.now_ms >= self.keep_alive_until_ms
        {
            self.stop(None, "idle", cx);
        }
    }

    fn next(&mut self, cx: &mut Cx<'_>) -> Option<(Trigger, Task)> {
        let shared = self.next_shared(cx);
        if (self.shared_first || self.queue.is_empty())
            && let Some(work) = shared
        {
            self.shared_first = false;
            return Some(work);
        }
        let (conn, task) = self.queue.pop_front()?;
        self.shared_first = true;
        Some((Trigger::Message(conn), task))
    }

    fn next_shared(&mut self, cx: &mut Cx<'_>) -> Option<(Trigger, Task)> {
        if !self.initialized || !self.clients.values().any(|c| c.active) {
            return None;
        }
        if !self.synced {
            return (!self.behind).then_some((Trigger::Shared, Task::BringUp));
        }
        if !self.pending.is_empty() {
            return Some((Trigger::Shared, Task::Advance));
        }
        if std::mem::take(&mut self.due.expiry) {
            return Some((Trigger::Shared, Task::Evict));
        }
        if std::mem::take(&mut self.due.maintenance) {
            if let Some(conn) = self.contexts.due(cx.now_ms) {
                // There may be more: looked at again after this one.
                self.due.maintenance = true;
                return Some((Trigger::Revalidate(conn), Task::Revalidate { conn }));
            }
            let retransform = self.settings.has_query_endpoint
                && self.contexts.retransform_at_ms.is_some_and(|at| at <= cx.now_ms)
                && cx.now_ms >= self.contexts.not_before_ms;
            if retransform && let Ok(conn) = self.contexts.background() {
                self.due.maintenance = true;
                return Some((Trigger::Retransform(conn), Task::Retransform));
            }
            // The wall clock is not as far as the timer was.
            self.plan_timers(cx);
        }
        None
    }
}

/// The connection's context was dropped by an earlier error.
pub(super) fn no_auth_state() -> Box<ErrorBody> {
    Box::new(ErrorBody::basic(
        ErrorKind::InvalidConnectionRequest,
        "Connection auth state was not available for this websocket.",
    ))
}

/// The endpoint or we refused the credentials, as opposed to not being able to check them.
pub(super) fn is_auth_failure(error: &ErrorBody) -> bool {
    match error {
        ErrorBody::Basic { kind: ErrorKind::Unauthorized | ErrorKind::AuthInvalidated, .. } => true,
        ErrorBody::TransformFailed { failure, .. } => failure.auth_status().is_some(),
        _ => false,
    }
}
