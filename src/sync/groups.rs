//! The client groups of an executor: who is where, what goes to whom, what they want done.
//!
//! Everything here runs to completion on the executor's thread; whatever has to wait becomes a
//! request to the store, a job of the executor or a timer, and comes back as an event.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use zeroring_core::cvr::store::GroupFlush;
use zeroring_core::cvr::{ClientGroupId, QueryHash};
use zeroring_core::group::{
    ConnId, Credentials, Effect, Event, Group, Hydrate, Note, Settings, SharedDelta, Timer,
};
use zeroring_core::ivm::engine::InstanceId;
use zeroring_core::ivm::error::EngineError;
use zeroring_core::protocol::custom_query::TransformRequest;
use zeroring_core::protocol::error::ErrorBody;
use zeroring_core::waste::Waste;
use zeroring_net::rt::{Instant, now};
use zeroring_net::ws::WsWriter;
use zeroring_storage::cvr_store::CvrStore;

use super::admission::{Admission, PLACES};
use super::answers::Mailbox;
use super::counters::Counters;
use super::drain::Draining;
use super::fanout::WireFrames;
use super::hydrations::Hydrations;
use super::pushes::MutateCall;
use super::sockets::Conn;
use super::world::World;

/// Names one life of a group: a group that ends and comes back is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct GroupKey(pub(super) u64);

/// Rows that are dropped at once: not even a millisecond.
const SHED_ROWS: usize = 2_000;

/// Every timer of a group, at the index that it is as a number.
const TIMERS: [Timer; 4] = [Timer::Expiry, Timer::TtlClock, Timer::Maintenance, Timer::Idle];
const _: () = assert!(
    matches!(TIMERS, [a, b, c, d] if a as u8 == 0 && b as u8 == 1 && c as u8 == 2 && d as u8 == 3)
);

pub(super) struct Slot {
    pub(super) group: Group,
    /// By [`Timer`].
    timers: [Option<Instant>; TIMERS.len()],
    /// How long its queries were hydrated here.
    hydrated_for: Duration,
}

/// What a group does in its next slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slice {
    /// It goes on with its operation.
    Compute,
    /// It merges what has gathered meanwhile.
    Merge,
}

/// Queries that the engine has hydrated, or cannot.
type Hydrated = Vec<(QueryHash, Result<InstanceId, String>)>;

/// Who is subscribed to an instance, and how often: one group for most, thousands for some.
#[derive(Default)]
pub(super) struct Subscribers(SmallVec<[(GroupKey, u32); 1]>);

impl Subscribers {
    fn groups(&self) -> impl Iterator<Item = GroupKey> + '_ {
        self.0.iter().map(|(group, _)| *group)
    }

    fn add(&mut self, group: GroupKey) {
        // Keys rise: a new group is nearly always the last.
        match self.0.binary_search_by_key(&group, |(known, _)| *known) {
            Ok(at) => self.0[at].1 += 1,
            Err(at) => self.0.insert(at, (group, 1)),
        }
    }

    fn remove(&mut self, group: GroupKey) {
        let Ok(at) = self.0.binary_search_by_key(&group, |(known, _)| *known) else { return };
        self.0[at].1 -= 1;
        if self.0[at].1 == 0 {
            self.0.remove(at);
        }
    }
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
    pub(super) settings: Arc<Settings>,
    pub(super) store: Arc<dyn CvrStore>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) compress: bool,
    /// Boxed: the table has places for up to twice as many.
    pub(super) slots: FxHashMap<GroupKey, Box<Slot>>,
    pub(super) by_id: FxHashMap<ClientGroupId, GroupKey>,
    /// Who is subscribed to an instance, and how often.
    pub(super) subscribers: FxHashMap<InstanceId, Subscribers>,
    /// Groups that cannot go on before a newer version.
    pub(super) waiting: BTreeSet<GroupKey>,
    pub(super) timers: BTreeSet<(Instant, GroupKey, Timer)>,
    pub(super) conns: FxHashMap<ConnId, Conn>,
    /// Events in order; handled between advances only.
    pub(super) inbox: VecDeque<(GroupKey, Event)>,
    pub(super) hydrations: Hydrations,
    /// Groups that come up.
    pub(super) admission: Admission,
    /// Sockets that a large poke has just begun for.
    pub(super) pumping: Vec<ConnId>,
    /// Groups that have more to do, one slice per turn.
    pub(super) computing: VecDeque<(GroupKey, Slice)>,
    /// What nobody needs, dropped a slice per turn.
    pub(super) waste: Waste,
    pub(super) transforms: Vec<Transform>,
    /// For the mutate endpoint, in order.
    pub(super) calls: Vec<(ClientGroupId, MutateCall)>,
    pub(super) frames: WireFrames,
    pub(super) flushes: VecDeque<(GroupKey, GroupFlush)>,
    /// A batch is under way of which nothing was heard.
    pub(super) flushing: bool,
    /// Groups whose verdict is awaited, sent or not.
    pub(super) unsettled: FxHashMap<GroupKey, ClientGroupId>,
    /// Those among them that are no more, and their successors that wait to be loaded, with the
    /// time of their connection.
    pub(super) orphaned: FxHashMap<ClientGroupId, Vec<(GroupKey, f64)>>,
    pub(super) draining: Option<Draining>,
    pub(super) next_key: u64,
    pub(super) next_conn: u64,
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
            hydrations: Hydrations::default(),
            admission: Admission::new(PLACES),
            pumping: Vec::new(),
            computing: VecDeque::new(),
            waste: Waste::default(),
            transforms: Vec::new(),
            calls: Vec::new(),
            frames: WireFrames::default(),
            flushes: VecDeque::new(),
            flushing: false,
            unsettled: FxHashMap::default(),
            orphaned: FxHashMap::default(),
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
        // Groups stay until their rows are written.
        self.store.hurry();
    }

    /// Closes the groups whose turn it is.
    pub(super) fn drain(&mut self) {
        let Some(draining) = &mut self.draining else { return };
        let slots = &self.slots;
        while let Some(key) = draining.due(now(), |key| slots.get(&key).map(|s| s.hydrated_for)) {
            self.inbox.push_back((key, Event::Drain));
        }
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
        let slot = Slot { group, timers, hydrated_for: Duration::ZERO };
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
    pub(super) fn may_join(&self, key: GroupKey, user: Option<&str>) -> Result<(), Box<ErrorBody>> {
        self.slots.get(&key).map_or(Ok(()), |slot| slot.group.admit(user))
    }

    // ---- events and effects -------------------------------------------------------------------

    /// Feeds one event; events of groups that are gone come to nothing but clean-up.
    pub(super) fn feed(&mut self, key: GroupKey, event: Event) {
        if !self.slots.contains_key(&key) {
            return self.after_its_end(key, event);
        }
        let event = match event {
            Event::Hydrated(results) => Event::Hydrated(self.hydrated(key, results)),
            event => event,
        };
        let Some(slot) = self.slots.get_mut(&key) else { return };
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

    /// Hydrated queries on their way to a group: an advance in between may have ended some.
    fn hydrated(&mut self, key: GroupKey, mut results: Hydrated) -> Hydrated {
        for (_, result) in &mut results {
            if let Ok(id) = *result
                && let Some(why) = self.world.failure(id)
            {
                self.unsubscribe(key, id);
                *result = Err(why);
            }
        }
        results
    }

    /// What was under way to a group that has ended.
    fn after_its_end(&mut self, key: GroupKey, event: Event) {
        match event {
            Event::Hydrated(results) => {
                for id in results.into_iter().filter_map(|(_, result)| result.ok()) {
                    self.unsubscribe(key, id);
                }
            }
            // It came while the group was ending, which did not know of it: it comes back at once.
            Event::Connected(connection) => {
                self.close_with(connection.conn, &ErrorBody::rehome("Reconnect required"));
            }
            _ => {}
        }
    }

    /// How long queries of a group were hydrated, on top of before.
    pub(super) fn hydrated_for(&mut self, key: GroupKey, time: Duration) {
        if let Some(slot) = self.slots.get_mut(&key) {
            slot.hydrated_for += time;
        }
    }

    /// Lets in as many groups as there are places.
    pub(super) fn admit(&mut self) {
        while let Some(key) = self.admission.admit() {
            self.inbox.push_back((key, Event::Admitted));
        }
    }

    fn carry_out(&mut self, key: GroupKey, effect: Effect) {
        match effect {
            Effect::Send(conn, list) => self.send(conn, &list),
            Effect::SendLarge(conn, poke) => self.send_large(conn, poke),
            Effect::GrowLarge(conn, growth) => self.grow_large(conn, growth),
            Effect::LetGo(waste) => self.waste.append(waste),
            Effect::Fail(conn, error) => self.close_with(conn, &error),
            Effect::Close(conn, reason) => {
                if let Some(entry) = self.take_conn(conn) {
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
            Effect::Enter => self.admission.enter(key, now()),
            Effect::Leave { up } => self.admission.leave(key, up),
            Effect::Hydrate(wanted) => self.start_hydration(key, &wanted),
            Effect::Release(instance) => self.unsubscribe(key, instance),
            Effect::Continue => self.computing.push_back((key, Slice::Compute)),
            Effect::Merge => self.computing.push_back((key, Slice::Merge)),
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
            Effect::Flush(flush) => self.gather(key, *flush),
            Effect::Load { .. }
            | Effect::ReadRows { .. }
            | Effect::CatchUp { .. }
            | Effect::AwaitRows
            | Effect::StoreTtlClock { .. } => self.ask_store(key, effect),
        }
    }

    fn call(&mut self, key: GroupKey, call: MutateCall) {
        if let Some(slot) = self.slots.get(&key) {
            self.calls.push((slot.group.id().clone(), call));
        }
    }

    /// Subscribes a group to the instance of a query.
    ///
    /// # Errors
    /// See [`World::subscribe`].
    pub(super) fn subscribe(
        &mut self,
        key: GroupKey,
        wanted: &Hydrate,
    ) -> Result<InstanceId, String> {
        let id = self.world.subscribe(wanted)?;
        self.subscribers.entry(id).or_default().add(key);
        Ok(id)
    }

    /// Takes a subscription back.
    pub(super) fn unsubscribe(&mut self, key: GroupKey, instance: InstanceId) {
        self.world.unsubscribe(instance);
        if let Some(of) = self.subscribers.get_mut(&instance) {
            of.remove(key);
            if of.0.is_empty() {
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
        self.orphan(key);
        self.waiting.remove(&key);
        self.admission.forget(key);
        for instance in self.hydrations.forget(key) {
            self.unsubscribe(key, instance);
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

    // ---- the engine ---------------------------------------------------------------------------

    /// Somebody is to hear of changes of this instance.
    pub(super) fn has_subscribers(&self, instance: InstanceId) -> bool {
        self.subscribers.contains_key(&instance)
    }

    /// Hands instances that failed to the groups that they concern, and to nobody else; deltas are
    /// to follow ([`State::delta`]), then [`State::advanced`].
    pub(super) fn failed(
        &mut self,
        failed: Vec<(InstanceId, EngineError)>,
        affected: &mut BTreeSet<GroupKey>,
    ) {
        self.counters.advances += 1;
        affected.append(&mut self.waiting);
        for (instance, error) in failed {
            self.instance_failed(instance, &error.to_string(), affected);
        }
    }

    /// Who is subscribed to an instance.
    pub(super) fn subscribers(&self, instance: InstanceId) -> Vec<GroupKey> {
        let subscribers = self.subscribers.get(&instance);
        subscribers.into_iter().flat_map(Subscribers::groups).collect()
    }

    /// Hands the delta of an instance to some of its groups, as it was prepared.
    pub(super) fn delta(&mut self, delta: &Arc<SharedDelta>, groups: &[GroupKey]) {
        for key in groups {
            self.feed(*key, Event::Delta(delta.clone()));
        }
    }

    /// All of an advance was handed over.
    pub(super) fn advanced(&mut self, affected: BTreeSet<GroupKey>) {
        self.inbox.extend(affected.into_iter().map(|key| (key, Event::Advanced)));
    }

    pub(super) fn instance_failed(
        &mut self,
        instance: InstanceId,
        why: &str,
        affected: &mut BTreeSet<GroupKey>,
    ) {
        for key in self.subscribers(instance) {
            self.feed(key, Event::InstanceFailed(instance, why.to_owned()));
            affected.insert(key);
        }
    }

    /// Lets one group compute for a slice; true if one has more to do.
    pub(super) fn compute(&mut self) -> bool {
        match self.computing.pop_front() {
            Some((key, Slice::Compute)) => self.feed(key, Event::Continue),
            Some((key, Slice::Merge)) => self.feed(key, Event::Merge),
            None => {}
        }
        self.waste.shed(SHED_ROWS);
        !self.computing.is_empty() || !self.waste.is_empty()
    }

    /// Closes every group and socket at once, without asking: what they stand on is gone, with all
    /// that was in memory. (There is nobody left who would wait.)
    pub(super) fn abandon_groups(&mut self) {
        for (_, entry) in std::mem::take(&mut self.conns) {
            entry.writer.close(None);
            self.closing.push(entry.writer);
        }
        let abandoned = std::mem::take(&mut self.slots);
        abandoned.keys().for_each(|key| self.orphan(*key));
        self.by_id.clear();
        self.subscribers.clear();
        self.waiting.clear();
        self.timers.clear();
        self.inbox.clear();
        self.hydrations.clear();
        self.admission = Admission::new(PLACES);
        self.pumping.clear();
        self.computing.clear();
        self.transforms.clear();
    }
}
