//! The loop of an executor: commits, then events, then a slice of hydration, then the flush.
//!
//! Between two advances everything is at one version, and events are handled only then; while an
//! advance or a hydration is sliced, sockets are served in between. When commits come faster than
//! they are taken, one advance takes all that are there.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, pin_mut, select_biased};
use zeroring_core::change::Commit;
use zeroring_core::cvr::internal::ShardTables;
use zeroring_core::group::{Event, ResetReason, Settings, SharedDelta};
use zeroring_core::ivm::delta::{Advanced, InstanceDelta};
use zeroring_core::ivm::engine::{Budget, InstanceId, Reset};
use zeroring_core::ivm::error::EngineError;
use zeroring_core::version::StateVersion;
use zeroring_net::http::RawIncoming;
use zeroring_net::rt::local::Notify;
use zeroring_net::rt::{
    ExecutorCtx, Instant, LocalDoorbell, MeshSender, now, sleep, sleep_until, slices, spawn,
    timeout, yield_now,
};
use zeroring_storage::replica::ReplicaError;
use zeroring_storage::replica::schema::TableIds;

use super::SyncConfig;
use super::answers::{Mailbox, StoreAnswer};
use super::groups::{State, Transform};
use super::world::World;
use crate::api::Caller;
use crate::mutations::Mutations;
use crate::ops::registry::ExecutorStats;
use crate::queries;
use crate::replication::commit_bus::{Control, LocalBusReceiver, ReplacedReplica, Taken};
use crate::stages::Stage;

/// Work of one slice of an advance or a hydration: about a millisecond.
const SLICE: u64 = 1_000;
/// Rows of a delta that are prepared at once: about as long.
const SLICE_ROWS: usize = 1_000;
/// Groups that are handed a delta at once: not even a millisecond.
const SLICE_GROUPS: usize = 1_000;
/// Events are handled for so long before sockets get a turn.
const EVENT_SLICE: Duration = Duration::from_millis(1);
/// Turns of events that an advance waits at most.
const MAX_TURNS: u32 = 4;
/// The commits up to a snapshot follow it within microseconds; after this long they are lost.
const BUS_PATIENCE: Duration = Duration::from_secs(2);
/// How often quiet connections are looked for, and numbers published.
const SWEEP: Duration = Duration::from_secs(3);
const PUBLISH: Duration = Duration::from_secs(1);
/// How long the end of the process waits for sockets to take what was sent, and for the app.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_POLL: Duration = Duration::from_millis(5);

/// Why an executor had to give up.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// The replica.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// A doorbell or ring could not be bound.
    #[error("an executor cannot be set up: {0}")]
    Io(#[from] std::io::Error),
    /// The engine and the bus disagree in a way that a reset did not cure.
    #[error("the engine cannot follow the replica: {0}")]
    Engine(String),
}

/// An executor's shared parts.
pub(super) struct Executor {
    pub(super) config: Arc<SyncConfig>,
    pub(super) ctx: ExecutorCtx,
    pub(super) state: RefCell<State>,
    /// Something was put into the state from outside the loop.
    pub(super) work: Notify,
    pub(super) mesh: RefCell<MeshSender<RawIncoming>>,
    queries: Option<Rc<Caller>>,
    pub(super) mutations: Option<Rc<Mutations>>,
    stats: Arc<ExecutorStats>,
    /// When the batch that the CVR store has in hand was given to it.
    flush_began: Cell<Instant>,
}

/// What an executor asks of the app.
#[derive(Default)]
pub(super) struct App {
    pub(super) queries: Option<Rc<Caller>>,
    pub(super) mutations: Option<Rc<Mutations>>,
}

/// What an executor's loop owns alone.
pub(super) struct Inputs {
    pub(super) bus: LocalBusReceiver,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) answers: LocalDoorbell,
    pub(super) table_ids: TableIds,
}

impl Executor {
    pub(super) fn new(
        config: Arc<SyncConfig>,
        ctx: ExecutorCtx,
        state: State,
        mesh: MeshSender<RawIncoming>,
        app: App,
        stats: Arc<ExecutorStats>,
    ) -> Rc<Executor> {
        Rc::new(Executor {
            config,
            ctx,
            state: RefCell::new(state),
            work: Notify::new(),
            mesh: RefCell::new(mesh),
            queries: app.queries,
            mutations: app.mutations,
            stats,
            flush_began: Cell::new(now()),
        })
    }

    /// Runs until the process stops and every group was drained.
    pub(super) async fn run(self: Rc<Self>, mut inputs: Inputs) -> Result<(), SyncError> {
        let stopper = self.clone();
        spawn(async move {
            stopper.ctx.stopped().await;
            stopper.work.notify_one();
        });
        let mut duties = Duties::new(now());
        let (mut draining, mut turns) = (false, 0);
        loop {
            // Better after all events of the last one: then groups take several at once. But
            // thousands of clients that connect must not keep the others from theirs.
            if self.state.borrow().inbox.is_empty() || turns >= MAX_TURNS {
                turns = 0;
                self.follow(&mut inputs).await?;
            }
            turns += 1;
            if self.ctx.is_stopping() && !draining {
                draining = true;
                self.state.borrow_mut().start_drain();
            }
            let more = self.turn(&inputs.mailbox);
            let time = now();
            if duties.sweep.is_due(time) {
                let mut state = self.state.borrow_mut();
                state.signs_of_life(self.config.stalled);
                // Of a million rows that is a round in six minutes.
                state.world.engine.sweep(&mut Budget::units(SLICE));
                drop(state);
                self.report_progress(time);
            }
            if duties.publish.is_due(time) {
                self.publish();
            }
            if draining && self.is_drained() {
                self.linger().await;
                return Ok(());
            }
            if more {
                yield_now().await;
            } else {
                self.rest(&inputs, duties.next()).await;
            }
        }
    }

    /// Handles what is there; true if there is more to do at once.
    fn turn(self: &Rc<Self>, mailbox: &Mailbox) -> bool {
        let mut state = self.state.borrow_mut();
        let begin = now();
        for answer in mailbox.take() {
            if matches!(answer, StoreAnswer::Flushed { .. }) {
                let took = begin.duration_since(self.flush_began.get());
                self.stats.stages.add(Stage::Flush, took);
            }
            state.store_answer(answer);
        }
        state.fire_timers();
        state.drain();
        state.admit();
        let until = now() + EVENT_SLICE;
        let mut ended = begin;
        while let Some((key, event)) = state.inbox.pop_front() {
            state.feed(key, event);
            ended = now();
            if ended >= until {
                break;
            }
        }
        if ended > begin {
            self.stats.stages.add(Stage::Events, ended.duration_since(begin));
        }
        let begin = now();
        let hydrates = !state.hydrations.is_empty();
        let hydrating = state.hydrate(&mut Budget::units(SLICE));
        if hydrates {
            self.stats.stages.add(Stage::Hydrate, begin.elapsed());
        }
        let releasing = !state.world.engine.release(&mut Budget::units(SLICE));
        let computing = state.compute();
        let batches = state.counters.flush_batches;
        state.flush();
        if state.counters.flush_batches > batches {
            self.flush_began.set(now());
        }
        state.admit();
        for conn in std::mem::take(&mut state.pumping) {
            spawn(self.clone().pump(conn));
        }
        let transforms = std::mem::take(&mut state.transforms);
        let calls = std::mem::take(&mut state.calls);
        drop(state);
        for transform in transforms {
            self.ask_endpoint(transform);
        }
        self.forward(calls);
        let waits = !self.state.borrow().inbox.is_empty();
        hydrating || releasing || computing || waits || mailbox.has_answers()
    }

    fn ask_endpoint(self: &Rc<Self>, transform: Transform) {
        let Transform { group, credentials, queries } = transform;
        let Some(endpoint) = self.queries.clone() else {
            // Groups ask only where there is an endpoint.
            tracing::error!("a group asked a query endpoint that is not configured");
            return;
        };
        let this = self.clone();
        spawn(async move {
            let answer = queries::transform(&endpoint, &credentials, &queries).await;
            this.state.borrow_mut().inbox.push_back((group, Event::Transformed(answer)));
            this.work.notify_one();
        });
    }

    async fn rest(&self, inputs: &Inputs, latest: Instant) {
        let timer = self.state.borrow().next_timer();
        let deadline = timer.map_or(latest, |at| at.min(latest));
        let commits = inputs.bus.ready().fuse();
        let answers = inputs.answers.wait_until(|| inputs.mailbox.has_answers()).fuse();
        let work = self.work.notified().fuse();
        let alarm = sleep_until(deadline).fuse();
        pin_mut!(commits, answers, work, alarm);
        select_biased! {
            () = work => {}
            result = answers => {
                if let Err(error) = result {
                    tracing::error!(%error, "waiting for the CVR store's answers failed");
                }
            }
            () = commits => {}
            () = alarm => {}
        }
    }

    // ---- commits ------------------------------------------------------------------------------

    /// Follows the replica to its newest version, if there is news.
    async fn follow(&self, inputs: &mut Inputs) -> Result<(), SyncError> {
        if inputs.bus.ready().now_or_never().is_none() {
            return Ok(());
        }
        let mut refreshed = false;
        while let Some(control) = inputs.bus.control() {
            match control {
                Control::ReplicaReplaced(replaced) => {
                    self.replace(&replaced, &inputs.table_ids)?;
                    refreshed = true;
                }
                Control::ReleaseSnapshot(ticket) => {
                    self.state.borrow_mut().world.source.release()?;
                    inputs.bus.hold(ticket).await;
                    refreshed = false;
                }
                Control::Closed => tracing::info!("no more commits: the replication core ended"),
            }
        }
        let (from, to) = {
            let world = &mut self.state.borrow_mut().world;
            let from = world.engine.version().clone();
            let to = if refreshed { from.clone() } else { world.source.refresh()?.clone() };
            (from, to)
        };
        let patience = now() + BUS_PATIENCE;
        loop {
            match inputs.bus.take(&from, &to) {
                Taken::Commits(commits) if commits.is_empty() => return Ok(()),
                Taken::Commits(commits) => return self.advance(&commits).await,
                Taken::NotYet if now() < patience => {
                    // The doorbell rings for this; the time-out is for a core that died in between.
                    let _ = timeout(BUS_PATIENCE, inputs.bus.ready()).await;
                }
                Taken::NotYet => {
                    tracing::warn!(%from, %to, "commits up to the snapshot did not come");
                    return self.start_over().await;
                }
                Taken::Lagged => {
                    tracing::warn!(%from, "this executor fell behind the change stream");
                    return self.start_over().await;
                }
            }
        }
    }

    async fn advance(&self, commits: &[Arc<Commit>]) -> Result<(), SyncError> {
        let schema_changed = commits.iter().any(|c| c.schema.is_some());
        let permissions_changed = commits.iter().any(|c| c.permissions_changed);
        let begun = {
            let world = &mut self.state.borrow_mut().world;
            let begun = world.engine.begin_advance(commits);
            if let Ok(begun) = &begun {
                let schema = commits.iter().rev().find_map(|c| c.schema.clone());
                let schema = schema.unwrap_or_else(|| world.engine.schema().clone());
                begun.needs_rebind.iter().for_each(|id| world.rebind(*id, &schema));
            }
            begun.map(drop)
        };
        if let Err(error) = begun {
            tracing::warn!("the engine starts over: {error}");
            return self.start_over().await;
        }
        let advanced = self.steps().await?;
        self.deliver(advanced, schema_changed, permissions_changed).await;
        Ok(())
    }

    /// The commits since the engine's version are not known: everything is read anew and compared.
    async fn start_over(&self) -> Result<(), SyncError> {
        let old = {
            let state = &mut *self.state.borrow_mut();
            state.counters.resets += 1;
            let world = &mut state.world;
            let version = world.source.refresh()?.clone();
            let schema = world.read_schema()?;
            let old = world.engine.schema().clone();
            let begun = world
                .engine
                .begin_reset(version, schema.clone(), &Reset::All)
                .map_err(|e| SyncError::Engine(e.to_string()))?;
            begun.needs_rebind.iter().for_each(|id| world.rebind(*id, &schema));
            old
        };
        let advanced = self.steps().await?;
        let schema_changed = **self.state.borrow().world.engine.schema() != *old;
        self.deliver(advanced, schema_changed, true).await;
        Ok(())
    }

    /// Steps an advance to its end; sockets are served in between.
    async fn steps(&self) -> Result<Advanced, SyncError> {
        loop {
            {
                let world = &mut self.state.borrow_mut().world;
                let mut budget = Budget::units(SLICE);
                let begin = now();
                let step = world.engine.advance_step(&mut world.source, &mut budget);
                self.stats.stages.add(Stage::Advance, begin.elapsed());
                world.report_missing_indexes(None);
                match step {
                    Ok(Some(advanced)) => return Ok(advanced),
                    Ok(None) => {}
                    Err(error) => return Err(SyncError::Engine(error.to_string())),
                }
            }
            yield_now().await;
        }
    }

    /// Prepares deltas for groups, once for all that subscribe, in slices: sockets are served in
    /// between.
    async fn prepare(
        &self,
        deltas: &[InstanceDelta],
    ) -> Vec<(InstanceId, Result<Arc<SharedDelta>, String>)> {
        let tables = self.state.borrow().settings.tables.clone();
        let mut prepared = Vec::with_capacity(deltas.len());
        let mut since = 0;
        for delta in deltas {
            if !self.state.borrow().has_subscribers(delta.instance) {
                continue;
            }
            let mut made = SharedDelta::begin(delta);
            let mut result = Ok(());
            for rows in delta.rows.chunks(SLICE_ROWS) {
                since += rows.len();
                if since > SLICE_ROWS {
                    since = rows.len();
                    yield_now().await;
                }
                let begin = now();
                result = result.and_then(|()| made.extend(rows, &tables));
                self.stats.stages.add(Stage::Fanout, begin.elapsed());
            }
            let made = Arc::new(made.end());
            prepared.push(match result {
                Ok(()) => (delta.instance, Ok(made)),
                Err(why) => {
                    made.discard(&mut self.state.borrow_mut().waste);
                    (delta.instance, Err(why))
                }
            });
        }
        prepared
    }

    async fn deliver(&self, advanced: Advanced, schema_changed: bool, permissions_changed: bool) {
        let deltas = self.prepare(&advanced.deltas).await;
        let reason = {
            let mut state = self.state.borrow_mut();
            let reason = if schema_changed {
                Some(ResetReason::SchemaChange)
            } else if permissions_changed && state.world.reload_permissions() {
                Some(ResetReason::PermissionsChange)
            } else {
                None
            };
            if schema_changed {
                state.world.reload_permissions();
            }
            reason
        };
        self.hand_out(deltas, advanced.failed).await;
        self.state.borrow_mut().world.engine.discard(advanced.deltas);
        if let Some(reason) = reason {
            let state = &mut *self.state.borrow_mut();
            for key in state.keys() {
                state.inbox.push_back((key, Event::Reset(reason)));
            }
        }
    }

    /// Hands an advance to the groups that it concerns, in slices: sockets are served in between,
    /// and nothing else happens to groups.
    async fn hand_out(
        &self,
        deltas: Vec<(InstanceId, Result<Arc<SharedDelta>, String>)>,
        failed: Vec<(InstanceId, EngineError)>,
    ) {
        let mut affected = BTreeSet::new();
        let begin = now();
        self.state.borrow_mut().failed(failed, &mut affected);
        self.stats.stages.add(Stage::Fanout, begin.elapsed());
        let mut since = 0;
        for (instance, delta) in deltas {
            let delta = match delta {
                Ok(delta) => delta,
                Err(why) => {
                    self.state.borrow_mut().instance_failed(instance, &why, &mut affected);
                    continue;
                }
            };
            let groups = self.state.borrow().subscribers(instance);
            for groups in groups.chunks(SLICE_GROUPS) {
                since += groups.len();
                if since > SLICE_GROUPS {
                    since = groups.len();
                    yield_now().await;
                }
                let begin = now();
                self.state.borrow_mut().delta(&delta, groups);
                affected.extend(groups);
                self.stats.stages.add(Stage::Fanout, begin.elapsed());
            }
            // Perhaps no group keeps it.
            delta.discard(&mut self.state.borrow_mut().waste);
        }
        self.state.borrow_mut().advanced(affected);
    }

    /// Another replica file: groups stood on the old one. Their clients come back at once.
    fn replace(&self, replaced: &ReplacedReplica, table_ids: &TableIds) -> Result<(), SyncError> {
        tracing::info!(file = %replaced.path.display(), "the replica was replaced");
        let version = replaced.replica.replica_version.clone();
        let world = open_world(&self.config, &replaced.path, version, table_ids.clone())?;
        let mut state = self.state.borrow_mut();
        state.abandon_groups();
        state.world = world;
        Ok(())
    }

    // ---- the end --------------------------------------------------------------------------------

    fn is_drained(&self) -> bool {
        let state = self.state.borrow();
        state.groups() == 0 && state.inbox.is_empty() && state.is_flushed()
    }

    /// Lets sockets take the close frames that were sent to them.
    async fn linger(&self) {
        let writers = std::mem::take(&mut self.state.borrow_mut().closing);
        let flushed = async {
            for writer in writers {
                // Some last words wait until the client can hear them.
                while writer.is_open() {
                    sleep(LINGER_POLL).await;
                }
                writer.flushed().await;
            }
            // Clients push again what was not confirmed; better not leave it half done.
            while self.mutations.as_ref().is_some_and(|m| !m.is_idle()) {
                sleep(LINGER_POLL).await;
            }
        };
        if timeout(LINGER, flushed).await.is_err() {
            tracing::debug!("not everybody took the close frame, or the app is slow");
        }
        // One more turn of the runtime for what was just handed to it.
        sleep(Duration::from_millis(1)).await;
    }

    /// Says how far those who come up are, while some of them wait.
    fn report_progress(&self, time: Instant) {
        let state = self.state.borrow();
        let admission = &state.admission;
        if admission.waiting() > 0 {
            tracing::info!(
                waiting = admission.waiting(),
                comingUp = admission.inside(),
                up = admission.counters.up,
                hydrating = state.hydrations.len(),
                longest_ms = admission.longest(time).as_secs_f64() * 1_000.0,
                "many client groups connect: they are served in the order in which they came"
            );
        }
    }

    fn publish(&self) {
        let state = self.state.borrow();
        let c = state.counters;
        let m = self.mutations.as_ref().map(|m| m.counters()).unwrap_or_default();
        let slices = slices();
        let own = [
            ("clientGroups", state.groups() as u64),
            ("connections", state.connections() as u64),
            ("connectionsTotal", c.connections_total),
            ("messages", c.messages),
            ("frames", c.frames),
            ("slowClients", c.slow_clients),
            ("largePokes", c.large_pokes),
            ("earlyRows", c.early_rows),
            ("mostQueuedBytes", c.most_queued_bytes),
            ("groupsWaiting", state.admission.waiting() as u64),
            ("groupsComingUp", state.admission.inside() as u64),
            ("mostGroupsComingUp", state.admission.counters.most),
            ("groupsAdmitted", state.admission.counters.admitted),
            ("groupsUp", state.admission.counters.up),
            ("hydrating", state.hydrations.len() as u64),
            ("cvrFlushes", c.flushes),
            ("cvrFlushBatches", c.flush_batches),
            ("advances", c.advances),
            ("engineResets", c.resets),
            ("groupFailures", c.group_failures),
            ("pushes", m.pushes),
            ("pushesFailed", m.failed),
            ("pushQueueBytes", m.queued_bytes),
            ("customMutations", m.mutations),
            ("slices", slices.count),
            ("longSlices", slices.long),
            ("longestSliceUs", u64::try_from(slices.longest.as_micros()).unwrap_or(u64::MAX)),
        ];
        self.stats.publish(own.into_iter().chain(state.world.numbers()));
        self.stats.publish_plans(state.world.plan_numbers());
    }
}

/// Something that is done again and again.
struct Duty {
    every: Duration,
    next: Instant,
}

impl Duty {
    fn new(every: Duration, now: Instant) -> Duty {
        Duty { every, next: now + every }
    }

    /// True once per period.
    fn is_due(&mut self, now: Instant) -> bool {
        let due = now >= self.next;
        if due {
            self.next = now + self.every;
        }
        due
    }
}

/// What an executor does whether or not anything happens.
struct Duties {
    sweep: Duty,
    publish: Duty,
}

impl Duties {
    fn new(now: Instant) -> Duties {
        Duties { sweep: Duty::new(SWEEP, now), publish: Duty::new(PUBLISH, now) }
    }

    /// Until then the executor may sleep.
    fn next(&self) -> Instant {
        self.sweep.next.min(self.publish.next)
    }
}

/// Opens a replica for an executor.
pub(super) fn open_world(
    config: &SyncConfig,
    path: &Path,
    replica_version: StateVersion,
    table_ids: TableIds,
) -> Result<World, ReplicaError> {
    let tables = ShardTables::new(&config.app_id, config.shard_num);
    World::open(path, &config.app_id, &tables, replica_version, table_ids, config.slow_hydrate)
}

/// What groups need to know.
pub(super) fn group_settings(config: &SyncConfig) -> Arc<Settings> {
    let ms = |d: Duration| d.as_secs_f64() * 1_000.0;
    Arc::new(Settings {
        app_id: config.app_id.as_str().into(),
        shard_num: config.shard_num,
        tables: ShardTables::new(&config.app_id, config.shard_num),
        has_query_endpoint: !config.query.urls.is_empty(),
        has_mutate_endpoint: !config.mutate.urls.is_empty(),
        crud_mutations: config.crud_mutations,
        refuses_tokens: config.refuses_tokens.as_deref().map(Arc::from),
        revalidate_ms: ms(config.auth_revalidate),
        retransform_ms: ms(config.auth_retransform),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_executor_without_work_wakes_only_for_its_duties() {
        let start = now();
        let mut duties = Duties::new(start);
        let (mut time, mut wakes, mut sweeps, mut publications) = (start, 0, 0, 0);
        while time < start + Duration::from_secs(60) {
            sweeps += u32::from(duties.sweep.is_due(time));
            publications += u32::from(duties.publish.is_due(time));
            wakes += 1;
            assert!(duties.next() > time, "it would not sleep");
            time = duties.next();
        }
        assert_eq!((wakes, sweeps, publications), (60, 19, 59));
    }
}
