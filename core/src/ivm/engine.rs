//! The engine's surface: instances, hydration, advance, and what can be asked of them.
//!
//! How an executor uses it:
//! 1. [`Engine::subscribe`] per (transformed AST, identity keys): equal plan and parameters share
//!    one instance. [`Engine::hydrate_step`] until [`Progress::Done`], then [`Engine::rows`].
//! 2. On new commits: open the snapshot at the last one's version, [`Engine::begin_advance`]
//!    (or [`Engine::begin_reset`]), [`Engine::rebind`] what it lists, [`Engine::advance_step`]
//!    until it returns [`Advanced`].
//! 3. Between advances every hydrated instance is at [`Engine::version`], and
//!    [`Engine::count`] tells whether a row is still referenced.

use std::sync::Arc;

use super::delta::Advanced;
use super::error::{AdvanceError, EngineError};
use super::plan::{Param, Plan};
use super::source::Source;
use super::stats::{Counters, EngineStats};
use crate::change::Commit;
use crate::row::Row;
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
    /// Overshoot of limited windows.
    pub overshoot: Overshoot,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            max_instances: 1 << 20,
            overshoot: Overshoot::Proportional { min: 8, divisor: 4 },
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
    pub row: &'a Arc<Row>,
    /// Occurrences in `Sync(Q, D)`.
    pub count: u64,
}

/// The engine of one executor.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    version: StateVersion,
    schema: Arc<Schema>,
}

impl Engine {
    /// An engine at a version of the replica.
    pub fn new(config: EngineConfig, version: StateVersion, schema: Arc<Schema>) -> Engine {
        Engine { config, version, schema }
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
        false
    }

    /// Subscribes to the instance of a plan and its parameters; makes it (not hydrated) if it is
    /// the first subscription. Balance with [`Engine::unsubscribe`].
    ///
    /// # Errors
    /// [`EngineError::TooManyInstances`].
    pub fn subscribe(
        &mut self,
        _plan: &Arc<Plan>,
        _params: Arc<[Param]>,
    ) -> Result<InstanceId, EngineError> {
        Err(EngineError::TooManyInstances(self.config.max_instances))
    }

    /// Takes a subscription back; the last one drops the instance and its memory. Unknown ids are
    /// ignored.
    pub fn unsubscribe(&mut self, _id: InstanceId) {}

    /// The state of an instance.
    ///
    /// # Errors
    /// [`EngineError::UnknownInstance`].
    pub fn status(&self, _id: InstanceId) -> Result<Status<'_>, EngineError> {
        Err(EngineError::UnknownInstance)
    }

    /// Goes on hydrating an instance, from a snapshot at [`Engine::version`]. `Done` at once when
    /// it is hydrated. Hydration survives advances in between. Subtracts the work from `budget`.
    ///
    /// # Errors
    /// The instance failed: [`EngineError`]. Other instances are not concerned.
    pub fn hydrate_step(
        &mut self,
        _id: InstanceId,
        _source: &mut dyn Source,
        _budget: &mut Budget,
    ) -> Result<Progress, EngineError> {
        Err(EngineError::UnknownInstance)
    }

    /// The current result: every row once, with its count. For a subscriber that attaches.
    ///
    /// # Errors
    /// [`EngineError::NotReady`] before hydration and during an advance.
    pub fn rows(
        &self,
        _id: InstanceId,
    ) -> Result<Box<dyn Iterator<Item = HeldRow<'_>> + '_>, EngineError> {
        Err(EngineError::NotReady)
    }

    /// Occurrences of a row in an instance. `row` must be the row at [`Engine::version`]: its
    /// values say where to look. A row that does not exist at that version counts 0 everywhere,
    /// without asking.
    ///
    /// # Errors
    /// [`EngineError::NotReady`] before hydration and during an advance.
    pub fn count(&self, _id: InstanceId, _table: TableId, _row: &Row) -> Result<u64, EngineError> {
        Err(EngineError::NotReady)
    }

    /// The row-set signature: XOR of the row ids' 64-bit hashes, once per occurrence
    /// (spec: zql-ivm §5.8).
    ///
    /// # Errors
    /// [`EngineError::NotReady`] before hydration and during an advance.
    pub fn signature(&self, _id: InstanceId) -> Result<u64, EngineError> {
        Err(EngineError::NotReady)
    }

    /// Starts to advance over `commits`, which follow [`Engine::version`] without a gap. The
    /// snapshot given to [`Engine::advance_step`] must be at the last one's version.
    ///
    /// # Errors
    /// [`AdvanceError::ChainBroken`] (reset instead), [`AdvanceError::Busy`].
    pub fn begin_advance(
        &mut self,
        _commits: &[Arc<Commit>],
    ) -> Result<AdvanceStart, AdvanceError> {
        Err(AdvanceError::Idle)
    }

    /// Starts to re-hydrate and compare: at `version`, whose schema is `schema`. With
    /// [`Reset::All`] the commits since are unknown; with [`Reset::Tables`] the version does not
    /// move.
    ///
    /// # Errors
    /// [`AdvanceError::Busy`].
    pub fn begin_reset(
        &mut self,
        _version: StateVersion,
        _schema: Arc<Schema>,
        _scope: &Reset,
    ) -> Result<AdvanceStart, AdvanceError> {
        Err(AdvanceError::Idle)
    }

    /// Gives an instance of [`AdvanceStart::needs_rebind`] its plan under the new schema, or the
    /// reason why there is none. Its subscribers get the difference of the two results.
    ///
    /// # Errors
    /// [`EngineError::UnknownInstance`], [`EngineError::NotReady`] outside an advance.
    pub fn rebind(
        &mut self,
        _id: InstanceId,
        _plan: Result<(Arc<Plan>, Arc<[Param]>), String>,
    ) -> Result<(), EngineError> {
        Err(EngineError::NotReady)
    }

    /// Goes on with the advance. Nothing is visible until it returns `Some`: then every instance
    /// is at the new version.
    ///
    /// # Errors
    /// [`AdvanceError::Idle`], [`AdvanceError::SnapshotMismatch`]. Failures of single instances
    /// are reported in [`Advanced::failed`].
    pub fn advance_step(
        &mut self,
        _source: &mut dyn Source,
        _budget: &mut Budget,
    ) -> Result<Option<Advanced>, AdvanceError> {
        Err(AdvanceError::Idle)
    }

    /// Sizes and counters.
    pub fn stats(&self) -> EngineStats {
        EngineStats::default()
    }

    /// Per plan: the plan, its instances, its work.
    pub fn plan_stats(&self) -> Box<dyn Iterator<Item = (&Arc<Plan>, usize, Counters)> + '_> {
        Box::new(std::iter::empty())
    }
}
