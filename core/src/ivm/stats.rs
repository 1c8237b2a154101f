//! Counters for `/statz`: how much work the engine did, and how often it took a slow path.

/// Work of one plan (or of the whole engine) since it was made.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Hydrations finished.
    pub hydrations: u64,
    /// Instances re-hydrated and compared, because of a schema change, a truncate, a lost chain,
    /// or because it was estimated to be cheaper.
    pub rehydrations: u64,
    /// Instances touched by an advance.
    pub advances: u64,
    /// Row deltas emitted.
    pub deltas: u64,
    /// SQL statements that filled a new partition.
    pub fills: u64,
    /// SQL statements that refilled a window.
    pub refills: u64,
    /// SQL existence checks of an EXISTS leaf for one row.
    pub point_checks: u64,
    /// SQL look-ups of parent rows by join key with the whole `where`.
    pub parent_lookups: u64,
    /// The same with every EXISTS leaf taken as true.
    pub weak_searches: u64,
    /// The same without a predicate, once for all instances that share an EXISTS body.
    pub shared_searches: u64,
    /// Weak predicates evaluated because no equality index led to the instances.
    pub rest_evaluations: u64,
    /// Times that an instance gave its rows up to make room (`EngineConfig::max_rows`).
    pub parkings: u64,
    /// Instances that each searched for the parents of a changed row of an EXISTS body.
    pub leaf_fanouts: u64,
}

impl Counters {
    /// Adds another set of counters.
    pub fn add(&mut self, o: &Counters) {
        self.hydrations += o.hydrations;
        self.rehydrations += o.rehydrations;
        self.advances += o.advances;
        self.deltas += o.deltas;
        self.fills += o.fills;
        self.refills += o.refills;
        self.point_checks += o.point_checks;
        self.parent_lookups += o.parent_lookups;
        self.weak_searches += o.weak_searches;
        self.shared_searches += o.shared_searches;
        self.rest_evaluations += o.rest_evaluations;
        self.leaf_fanouts += o.leaf_fanouts;
        self.parkings += o.parkings;
    }
}

impl Counters {
    /// The counters by the names of `/statz` (docs/engine.md says what each means).
    pub fn named(&self) -> [(&'static str, u64); 13] {
        [
            ("hydrations", self.hydrations),
            ("rehydrations", self.rehydrations),
            ("advances", self.advances),
            ("rowDeltas", self.deltas),
            ("fills", self.fills),
            ("refills", self.refills),
            ("pointChecks", self.point_checks),
            ("parentLookups", self.parent_lookups),
            ("weakSearches", self.weak_searches),
            ("sharedSearches", self.shared_searches),
            ("restEvaluations", self.rest_evaluations),
            ("leafFanouts", self.leaf_fanouts),
            ("parkings", self.parkings),
        ]
    }

    /// Work off the fast path: what to sort plans by when looking for the expensive one.
    pub fn slow_work(&self) -> u64 {
        self.rehydrations
            + self.fills
            + self.refills
            + self.point_checks
            + self.parent_lookups
            + self.weak_searches
            + self.shared_searches
            + self.leaf_fanouts
    }
}

/// The engine at a glance.
#[derive(Debug, Default, Clone, Copy)]
pub struct EngineStats {
    /// Distinct plans.
    pub plans: usize,
    /// Instances.
    pub instances: usize,
    /// Subscriptions.
    pub subscriptions: usize,
    /// Partitions of all instances.
    pub partitions: usize,
    /// Rows resident in partitions, counted once per occurrence.
    pub resident_rows: usize,
    /// Instances without rows in memory, to make room.
    pub parked: usize,
    /// Distinct rows in memory.
    pub interned_rows: usize,
    /// Entries of the routing index.
    pub routes: usize,
    /// Work since the start, of all plans.
    pub counters: Counters,
}
