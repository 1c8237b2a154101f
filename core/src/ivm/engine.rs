//! The engine's surface: instances, hydration, advance, and what can be asked of them.
//!
//! How an executor uses it:
//! 1. [`Engine::subscribe`] per (transformed AST, identity keys): equal plan and parameters share
//!    one instance. [`Engine::hydrate_step`] until [`Progress::Done`], then [`Engine::read`].
//! 2. On new commits: open the snapshot at the last one's version, [`Engine::begin_advance`]
//!    (or [`Engine::begin_reset`]), [`Engine::rebind`] what it lists, [`Engine::advance_step`]
//!    until it returns [`Advanced`].
//! 3. Between advances every hydrated instance is at [`Engine::version`], and
//!    [`Engine::count`] tells whether a row is still referenced.

use std::sync::Arc;

use hashbrown::HashSet;
use rustc_hash::FxBuildHasher;

use super::advance::Advance;
use super::change_set::ChangeSet;
use super::delta::{Advanced, InstanceDelta};
use super::error::{AdvanceError, EngineError};
use super::garbage::Garbage;
use super::instance::{Instance, Phase};
use super::mutant::{self, Mutant};
use super::plan::{Occurrence, Param, Plan};
use super::reading::Place;
use super::registry::Registry;
use super::source::Source;
use super::stats::{Counters, EngineStats};
use crate::change::Commit;
use crate::row::{Row, RowRef};
use crate::schema::{Schema, TableId, TableSpec};
use crate::version::StateVersion;

/// Names an instance; never reused while the engine lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub(super) u64);

/// How many rows beyond its limit a window keeps, so that a row that leaves seldom costs a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overshoot {
    /// That many.
    Fixed(u64),
    /// The larger of `min` and `limit / divisor`.
    Proportional {
        /// At least.
        min: u64,
        /// Part of the limit; not 0.
        divisor: u64,
    },
}

/// Bounds and choices of an engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Most instances at a time; more subscriptions fail.
    pub max_instances: usize,
    /// Most distinct rows in memory. Beyond, instances give theirs up, the largest first
    /// (*parked*): their subscribers stay, of each row its key, version and count are kept (140
    /// bytes), and a commit on a table that they read, or a subscriber who wants the rows,
    /// reads them anew. One instance that is larger than the bound alone is served all the same.
    pub max_rows: usize,
    /// Overshoot of limited windows.
    pub overshoot: Overshoot,
    /// An instance that more changed rows than this reach in one advance, and more than it holds,
    /// is re-hydrated and compared.
    pub rehydrate_above: usize,
    /// The parents of a changed row of an EXISTS body are searched once for all instances that
    /// agree on the body, if there are more of them than this; otherwise once per instance, with
    /// its own filter.
    pub lead_above: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            max_instances: 1 << 20,
            // At 250 to 500 bytes a row: 1 to 2 GB per executor.
            max_rows: 4_000_000,
            overshoot: Overshoot::Proportional { min: 8, divisor: 4 },
            rehydrate_above: 4_096,
            lead_above: 4,
        }
    }
}

/// Work allowed in one step, in units of about one row read (a statement costs
/// [`Budget::STATEMENT`]); on the reference machine 1,000 units are of the order of 1 ms.
/// A step always does something, so any budget makes progress.
#[derive(Debug, Clone, Copy)]
pub struct Budget(pub(super) u64);

impl Budget {
    /// What preparing and starting one SQL statement costs.
    pub const STATEMENT: u64 = 8;

    /// That many units.
    pub fn units(units: u64) -> Budget {
        Budget(units)
    }

    /// No limit.
    pub fn unlimited() -> Budget {
        Budget(u64::MAX)
    }

    /// Nothing left.
    pub fn is_spent(&self) -> bool {
        self.0 == 0
    }
}

/// What a step achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Call again.
    More,
    /// The instance is hydrated, at the engine's version.
    Done,
    /// An advance is running: hydration goes on after it.
    Blocked,
}

/// The state of an instance.
#[derive(Debug, Clone, Copy)]
pub enum Status<'a> {
    /// Not hydrated yet.
    Hydrating,
    /// At the engine's version.
    Ready,
    /// An advance is running; at the old version or on its way.
    Advancing,
    /// Failed for good: unsubscribe. A new subscription tries anew with a new instance.
    Failed(&'a EngineError),
}

/// What to re-hydrate and compare.
#[derive(Debug, Clone)]
pub enum Reset {
    /// Every instance: the commits since the engine's version are not known.
    All,
    /// Instances that read one of these tables, on top of what the commits say.
    Tables(Vec<TableId>),
}

/// An advance has begun.
#[derive(Debug, Default)]
pub struct AdvanceStart {
    /// Instances that read a table whose schema changed: give each a new plan with
    /// [`Engine::rebind`] before the first step, or it fails with
    /// [`EngineError::SchemaChanged`].
    pub needs_rebind: Vec<InstanceId>,
}

/// A row of an instance's current result.
#[derive(Debug, Clone)]
pub struct HeldRow<'a> {
    /// Its table, with the identity key.
    pub table: &'a Arc<TableSpec>,
    /// The row.
    pub row: &'a RowRef,
    /// Occurrences in `Sync(Q, D)`.
    pub count: u64,
}

/// The engine of one executor.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    version: StateVersion,
    schema: Arc<Schema>,
    pub(super) registry: Registry,
    advance: Option<Box<Advance>>,
}

impl Engine {
    /// An engine at a version of the replica.
    pub fn new(config: EngineConfig, version: StateVersion, schema: Arc<Schema>) -> Engine {
        Engine { config, version, schema, registry: Registry::default(), advance: None }
    }

    /// The version that every hydrated instance is at.
    pub fn version(&self) -> &StateVersion {
        &self.version
    }

    /// The replica's schema at that version.
    pub fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    /// True between the start of an advance and its end.
    pub fn is_advancing(&self) -> bool {
        self.advance.is_some()
    }

    /// Subscribes to the instance of a plan and its parameters; makes it (not hydrated) if it is
    /// the first subscription. Balance with [`Engine::unsubscribe`].
    ///
    /// # Errors
    /// [`EngineError::TooManyInstances`].
    pub fn subscribe(
        &mut self,
        plan: &Arc<Plan>,
        params: Arc<[Param]>,
    ) -> Result<InstanceId, EngineError> {
        self.registry.subscribe(&self.config, plan, params)
    }

    /// Takes a subscription back; the last one drops the instance and its memory. Unknown ids are
    /// ignored.
    pub fn unsubscribe(&mut self, id: InstanceId) {
        self.registry.unsubscribe(id);
    }

    /// The state of an instance.
    ///
    /// # Errors
    /// [`EngineError::UnknownInstance`].
    pub fn status(&self, id: InstanceId) -> Result<Status<'_>, EngineError> {
        let instance = self.registry.get(id).ok_or(EngineError::UnknownInstance)?;
        Ok(match &instance.phase {
            Phase::Failed(error) => Status::Failed(error),
            Phase::Hydrating => Status::Hydrating,
            Phase::Ready if self.is_advancing() => Status::Advancing,
            Phase::Ready => Status::Ready,
        })
    }

    /// Goes on hydrating an instance, from a snapshot at [`Engine::version`]. `Done` at once when
    /// it is hydrated. Hydration survives advances in between. Subtracts the work from `budget`.
    ///
    /// # Errors
    /// The instance failed: [`EngineError`]. Other instances are not concerned. With
    /// [`EngineError::SnapshotMismatch`] nothing happened: come back with the right snapshot.
    pub fn hydrate_step(
        &mut self,
        id: InstanceId,
        source: &mut dyn Source,
        budget: &mut Budget,
    ) -> Result<Progress, EngineError> {
        let instance = self.registry.get(id).ok_or(EngineError::UnknownInstance)?;
        match &instance.phase {
            Phase::Failed(error) => return Err(error.clone()),
            Phase::Ready if instance.parked.is_none() => return Ok(Progress::Done),
            Phase::Ready | Phase::Hydrating if self.is_advancing() => return Ok(Progress::Blocked),
            Phase::Ready | Phase::Hydrating => {}
        }
        if *source.version() != self.version {
            return Err(EngineError::SnapshotMismatch {
                snapshot: source.version().clone(),
                engine: self.version.clone(),
            });
        }
        // The routes of what was given up are those of what will be read.
        if !mutant::is(Mutant::ReadBeforeTakenApart)
            && self.registry.take_apart(id, budget).is_none()
        {
            return Ok(Progress::More);
        }
        let done = self.registry.work(id, source, budget, |instance, w| {
            let done = instance.settle(w, None)?;
            if done {
                w.counters.hydrations += 1;
                instance.phase = Phase::Ready;
            }
            Ok(done)
        });
        if matches!(done, Ok(true)) {
            let known = self.registry.get_mut(id).and_then(|i| i.known.take());
            self.registry.forget(known);
            self.registry.hydrated(id);
            self.registry.unpark(id);
            self.registry.parking.spare(id);
            self.registry.make_room(self.config.max_rows, budget);
        }
        match done {
            Ok(true) => Ok(Progress::Done),
            Ok(false) => Ok(Progress::More),
            Err(error) if self.is_parked(id) => {
                // Whoever knows its rows already is not concerned.
                self.registry.start_over(id, false);
                Err(error)
            }
            Err(error) => {
                self.registry.fail(id, error.clone());
                Err(error)
            }
        }
    }

    fn at_rest(&self, id: InstanceId) -> Result<(&Instance, &super::shape::Shape), EngineError> {
        let instance = self.registry.get(id).ok_or(EngineError::UnknownInstance)?;
        match &instance.phase {
            Phase::Failed(error) => return Err(error.clone()),
            Phase::Ready if !self.is_advancing() => {}
            Phase::Ready | Phase::Hydrating => return Err(EngineError::NotReady),
        }
        let plan = self.registry.plan(instance.plan).ok_or(EngineError::UnknownInstance)?;
        Ok((instance, &plan.shape))
    }

    /// Whether an instance holds no rows (`EngineConfig::max_rows`): [`Engine::hydrate_step`]
    /// reads them anew.
    pub fn is_parked(&self, id: InstanceId) -> bool {
        self.registry.get(id).is_some_and(|i| i.parked.is_some())
    }

    /// The current result: every row once, with its count. All at once: for tests and tools; a
    /// subscriber has it by [`Engine::read`].
    ///
    /// # Errors
    /// [`EngineError::NotReady`] before hydration and during an advance, and if it is parked.
    pub fn rows(
        &self,
        id: InstanceId,
    ) -> Result<impl ExactSizeIterator<Item = HeldRow<'_>>, EngineError> {
        let (instance, shape) = self.at_rest(id)?;
        if instance.parked.is_some() {
            return Err(EngineError::NotReady);
        }
        let mut rows = Vec::new();
        Place::default().walk(instance, shape, &mut Budget::unlimited(), |node, row, mult| {
            if let Some(count) = instance.told_at(shape, node, row, mult) {
                rows.push(HeldRow { table: &node.table, row, count });
            }
        });
        Ok(rows.into_iter())
    }

    /// Occurrences of a row in an instance. `row` must be the row at [`Engine::version`]: its
    /// values say where to look. A row that does not exist at that version counts 0 everywhere,
    /// without asking.
    ///
    /// # Errors
    /// [`EngineError::NotReady`] before hydration and during an advance.
    pub fn count(&self, id: InstanceId, table: TableId, row: &Row) -> Result<u64, EngineError> {
        let (instance, shape) = self.at_rest(id)?;
        if instance.parked.is_some() {
            let node = shape.nodes.iter().find(|n| n.table.id == table && n.is_held());
            let known = instance.known.as_ref();
            let count = |n: &super::shape::NodeShape| {
                known.map_or(0, |k| k.count(&crate::row::RowId::of(&n.table, row)))
            };
            return Ok(node.map_or(0, count));
        }
        Ok(instance.count(shape, table, row))
    }

    /// Whether an instance reads a table; otherwise [`Engine::count`] is 0 for all its rows.
    pub fn reads(&self, id: InstanceId, table: TableId) -> bool {
        let plan = self.registry.get(id).and_then(|i| self.registry.plan(i.plan));
        plan.is_some_and(|p| p.plan.nodes.iter().any(|n| n.table.id == table))
    }

    /// How often a row can be in an instance's result; [`Occurrence::Many`] if it is unknown.
    pub fn occurrence(&self, id: InstanceId) -> Occurrence {
        let plan = self.registry.get(id).and_then(|i| self.registry.plan(i.plan));
        plan.map_or(Occurrence::Many, |p| p.plan.occurrence())
    }

    /// The row-set signature: XOR of the row ids' 64-bit hashes, once per occurrence
    /// (spec: zql-ivm §5.8).
    ///
    /// # Errors
    /// [`EngineError::NotReady`] before hydration and during an advance.
    pub fn signature(&self, id: InstanceId) -> Result<u64, EngineError> {
        let instance = self.at_rest(id)?.0;
        Ok(instance.parked.unwrap_or(instance.signature))
    }

    /// Starts to advance over `commits`, which follow [`Engine::version`] without a gap. The
    /// snapshot given to [`Engine::advance_step`] must be at the last one's version.
    ///
    /// # Errors
    /// [`AdvanceError::ChainBroken`] (reset instead), [`AdvanceError::Busy`].
    pub fn begin_advance(&mut self, commits: &[Arc<Commit>]) -> Result<AdvanceStart, AdvanceError> {
        if self.is_advancing() {
            return Err(AdvanceError::Busy);
        }
        let mut at = &self.version;
        for commit in commits {
            if commit.previous != *at {
                return Err(AdvanceError::ChainBroken {
                    commit: commit.version.clone(),
                    previous: commit.previous.clone(),
                    engine: at.clone(),
                });
            }
            at = &commit.version;
        }
        let target = at.clone();
        let schema = commits.iter().rev().find_map(|c| c.schema.clone());
        let schema = schema.unwrap_or_else(|| Arc::clone(&self.schema));
        let (needs_rebind, mut skip) = self.rebind_for(&schema);
        let truncated: HashSet<TableId, FxBuildHasher> = commits
            .iter()
            .flat_map(|c| &c.tables)
            .filter(|t| t.truncated)
            .map(|t| t.table.id)
            .collect();
        let mut rehydrate = self.readers(&truncated);
        if !self.registry.parked.is_empty() && !mutant::is(Mutant::ParkedForgotten) {
            let changed = commits.iter().flat_map(|c| &c.tables).map(|t| t.table.id).collect();
            let readers = self.readers(&changed);
            rehydrate.extend(readers.intersection(&self.registry.parked));
        }
        skip.extend(&truncated);
        let changes = ChangeSet::new(commits, skip);
        let mut advance = Advance::new(target, schema, changes, rehydrate, &self.registry);
        advance.await_plans(&needs_rebind);
        self.advance = Some(Box::new(advance));
        Ok(AdvanceStart { needs_rebind })
    }

    /// Starts to re-hydrate and compare: at `version`, whose schema is `schema`. With
    /// [`Reset::All`] the commits since are unknown; with [`Reset::Tables`] the version does not
    /// move.
    ///
    /// # Errors
    /// [`AdvanceError::Busy`].
    pub fn begin_reset(
        &mut self,
        version: StateVersion,
        schema: Arc<Schema>,
        scope: &Reset,
    ) -> Result<AdvanceStart, AdvanceError> {
        if self.is_advancing() {
            return Err(AdvanceError::Busy);
        }
        let (needs_rebind, _) = self.rebind_for(&schema);
        let rehydrate = match scope {
            Reset::All => self.registry.instances().map(|i| i.id).collect(),
            Reset::Tables(tables) => self.readers(&tables.iter().copied().collect()),
        };
        let changes = ChangeSet::default();
        let mut advance = Advance::new(version, schema, changes, rehydrate, &self.registry);
        advance.await_plans(&needs_rebind);
        self.advance = Some(Box::new(advance));
        Ok(AdvanceStart { needs_rebind })
    }

    /// Marks the instances that read a table which differs between the schemas, and forgets the
    /// tables' rows: their columns may have moved.
    fn rebind_for(&mut self, to: &Schema) -> (Vec<InstanceId>, HashSet<TableId, FxBuildHasher>) {
        let mut changed: HashSet<TableId, FxBuildHasher> = HashSet::default();
        for (name, old) in &self.schema.tables {
            if to.table(name).is_none_or(|new| new != old) {
                changed.insert(old.id);
            }
        }
        let known = |id| self.schema.tables.values().any(|t| t.id == id);
        changed.extend(to.tables.values().map(|t| t.id).filter(|&id| !known(id)));
        let mut ids: Vec<InstanceId> = self.readers(&changed).into_iter().collect();
        ids.sort_unstable();
        for &id in &ids {
            if let Some(instance) = self.registry.get_mut(id) {
                instance.unbound = true;
            }
        }
        changed.iter().for_each(|&table| self.registry.interner.forget(table));
        (ids, changed)
    }

    /// Instances that read one of the tables.
    fn readers(
        &self,
        tables: &HashSet<TableId, FxBuildHasher>,
    ) -> HashSet<InstanceId, FxBuildHasher> {
        if tables.is_empty() {
            return HashSet::default();
        }
        let reads = |plan: &Plan| plan.nodes.iter().any(|n| tables.contains(&n.table.id));
        let plans: HashSet<u32, FxBuildHasher> =
            self.registry.plans().filter(|(_, p)| reads(&p.plan)).map(|(i, _)| i).collect();
        self.registry
            .instances()
            .filter(|i| !matches!(i.phase, Phase::Failed(_)) && plans.contains(&i.plan))
            .map(|i| i.id)
            .collect()
    }

    /// Gives an instance of [`AdvanceStart::needs_rebind`] its plan under the new schema, or the
    /// reason why there is none. Its subscribers get the difference of the two results.
    ///
    /// # Errors
    /// [`EngineError::UnknownInstance`], [`EngineError::NotReady`] outside an advance or for an
    /// instance that does not wait for a plan.
    pub fn rebind(
        &mut self,
        id: InstanceId,
        plan: Result<(Arc<Plan>, Arc<[Param]>), String>,
    ) -> Result<(), EngineError> {
        let Some(advance) = &mut self.advance else { return Err(EngineError::NotReady) };
        let instance = self.registry.get(id).ok_or(EngineError::UnknownInstance)?;
        if !instance.unbound {
            return Err(EngineError::NotReady);
        }
        let (plan, params) = match plan {
            Ok(plan) => plan,
            Err(reason) => {
                let error = EngineError::Rebind(reason);
                self.registry.fail(id, error.clone());
                advance.failed(id, error);
                return Ok(());
            }
        };
        let knows = matches!(instance.phase, Phase::Ready) && instance.parked.is_none();
        self.registry.unpark(id);
        let mut remains = self.registry.detach(id);
        if self.registry.get(id).is_some_and(|i| i.remains.is_some()) {
            // It was parked just now: nothing was read since.
            remains.take().into_iter().for_each(|remains| self.registry.bury(remains));
        }
        if let Some(instance) = self.registry.get_mut(id) {
            instance.remains = instance.remains.take().or(remains);
            if let Some(remains) = instance.remains.as_mut().filter(|_| knows) {
                remains.note_known();
            }
            instance.params = params;
            instance.unbound = false;
        }
        self.registry.attach(&self.config, id, &plan);
        advance.rehydrate(id);
        Ok(())
    }

    /// Goes on with the advance. Nothing is visible until it returns `Some`: then every instance
    /// is at the new version.
    ///
    /// # Errors
    /// [`AdvanceError::Idle`], [`AdvanceError::SnapshotMismatch`]. Failures of single instances
    /// are reported in [`Advanced::failed`].
    pub fn advance_step(
        &mut self,
        source: &mut dyn Source,
        budget: &mut Budget,
    ) -> Result<Option<Advanced>, AdvanceError> {
        let advance = self.advance.as_mut().ok_or(AdvanceError::Idle)?;
        if *source.version() != advance.target {
            return Err(AdvanceError::SnapshotMismatch {
                snapshot: source.version().clone(),
                target: advance.target.clone(),
            });
        }
        let done = advance.step(&self.config, &mut self.registry, source, budget);
        if done.is_some()
            && let Some(advance) = self.advance.take()
        {
            self.version = advance.target;
            self.schema = advance.schema;
        }
        Ok(done)
    }

    /// Takes the states of instances apart that are gone, and parks others if there are too many
    /// rows ([`EngineConfig::max_rows`]), until the budget is spent: false if there is more to do.
    /// Their memory is in use until then, nothing else: call it when there is time. During an
    /// advance nothing happens.
    pub fn release(&mut self, budget: &mut Budget) -> bool {
        self.is_advancing()
            || (self.registry.release(budget)
                && self.registry.make_room(self.config.max_rows, budget))
    }

    /// Takes the deltas of an advance back that nobody needs any more: [`Engine::release`] drops
    /// them, because there may be a million.
    pub fn discard(&mut self, deltas: Vec<InstanceDelta>) {
        let mut garbage = Garbage::default();
        for delta in deltas {
            Arc::into_inner(delta.rows).into_iter().for_each(|rows| garbage.add(rows));
        }
        self.registry.discard(garbage);
    }

    /// [`Engine::release`]s, and looks for rows that no query holds any more (somebody else did
    /// when the last query gave them up), a part of all rows at a time. Not needed for
    /// correctness; for a quiet moment, from time to time. During an advance nothing happens.
    pub fn sweep(&mut self, budget: &mut Budget) {
        if !self.is_advancing() {
            self.registry.sweep(budget);
        }
    }

    /// Sizes and counters. Walks all partitions.
    pub fn stats(&self) -> EngineStats {
        self.registry.stats()
    }

    /// Per plan: the plan, its instances, its work.
    pub fn plan_stats(&self) -> Box<dyn Iterator<Item = (&Arc<Plan>, usize, Counters)> + '_> {
        Box::new(self.registry.plans().map(|(_, p)| (&p.plan, p.instances, p.counters)))
    }
}
