//! What of the engine's work an operator should know: slow hydrations, missing indexes, numbers.

use std::collections::BTreeMap;
use std::time::Duration;

use zeroring_core::cvr::QueryHash;
use zeroring_core::ivm::describe::describe;
use zeroring_core::ivm::engine::{Budget, InstanceId, Progress};
use zeroring_core::ivm::error::EngineError;
use zeroring_net::rt::now;

use super::world::World;
use crate::ops::registry::Numbers;

/// Plans whose numbers are published: those with the most work off the fast path.
const MAX_PLANS: usize = 50;

impl World {
    /// Goes on hydrating an instance for a query; `spent` is the time that it took so far. Logs a
    /// hydration that took long, and indexes that were missing.
    ///
    /// # Errors
    /// As `Engine::hydrate_step`.
    pub(super) fn hydrate(
        &mut self,
        id: InstanceId,
        query: &QueryHash,
        spent: &mut Duration,
        budget: &mut Budget,
    ) -> Result<Progress, EngineError> {
        let begun = now();
        let step = self.engine.hydrate_step(id, &mut self.source, budget);
        *spent += now().duration_since(begun);
        self.report_missing_indexes(Some((query, id)));
        if !matches!(step, Ok(Progress::More | Progress::Blocked)) {
            let took = std::mem::take(spent);
            if took > self.slow_hydrate {
                self.slow_hydrations += 1;
                self.report_slow_hydration(query, id, took);
            }
        }
        step
    }

    fn report_slow_hydration(&self, query: &QueryHash, id: InstanceId, took: Duration) {
        let transformed = self.recipes.get(&id).map(|r| &r.transformed);
        let ast = transformed.and_then(|t| serde_json::to_string(&*t.ast).ok());
        tracing::warn!(
            hash = %query,
            transformationHash = transformed.map_or("", |t| &*t.hash),
            elapsed_ms = took.as_secs_f64() * 1_000.0,
            ast = ast.as_deref().unwrap_or_default(),
            "Slow query materialization"
        );
    }

    /// Logs the missing indexes that were noticed; outside a hydration no single query is to
    /// blame.
    pub(super) fn report_missing_indexes(&mut self, at: Option<(&QueryHash, InstanceId)>) {
        for missing in self.source.take_missing_indexes() {
            let recipe = at.and_then(|(_, id)| self.recipes.get(&id));
            tracing::warn!(
                hash = at.map(|(query, _)| tracing::field::display(query)),
                transformationHash = recipe.map(|r| &*r.transformed.hash),
                plan = missing.plan,
                "{missing}"
            );
        }
    }

    /// Numbers of engine and source, for `/statz`.
    pub(super) fn numbers(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let engine = self.engine.stats();
        let scans = self.source.scans();
        [
            ("plans", engine.plans as u64),
            ("instances", engine.instances as u64),
            ("subscriptions", engine.subscriptions as u64),
            ("partitions", engine.partitions as u64),
            ("residentRows", engine.resident_rows as u64),
            ("distinctRows", engine.interned_rows as u64),
            ("parked", engine.parked as u64),
            ("routes", engine.routes as u64),
            ("replicaStatements", self.source.statements()),
            ("largeScans", scans.large_scans),
            ("missingIndexes", scans.missing_indexes),
            ("slowHydrations", self.slow_hydrations),
        ]
        .into_iter()
        .chain(engine.counters.named().map(|(name, n)| match name {
            // Those of the executor and the engine differ: it may skip an instance.
            "advances" => ("instanceAdvances", n),
            name => (name, n),
        }))
    }

    /// Numbers of the most expensive plans, by description.
    pub(super) fn plan_numbers(&self) -> BTreeMap<String, Numbers> {
        let mut plans: Vec<_> = self.engine.plan_stats().collect();
        plans.sort_by_key(|(_, _, counters)| std::cmp::Reverse(counters.slow_work()));
        let mut numbers: BTreeMap<String, Numbers> = BTreeMap::new();
        for (plan, instances, counters) in plans.into_iter().take(MAX_PLANS) {
            // Plans that differ in what a description leaves out are one entry.
            let sums = numbers.entry(describe(plan)).or_default();
            let instances = ("instances", instances as u64);
            for (name, n) in counters.named().into_iter().chain([instances]) {
                *sums.entry(name).or_default() += n;
            }
        }
        numbers
    }
}
