//! One advance of the whole engine: lead the changed rows to instances, then bring the affected
//! instances to the new version one after the other. Can stop between any two pieces of work.

use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use rustc_hash::FxBuildHasher;

use super::change_set::{ChangeSet, NetChange};
use super::delta::{Advanced, InstanceDelta, RowDelta};
use super::emit::{Emission, NetTables, Snapshot};
use super::engine::{Budget, EngineConfig, InstanceId};
use super::error::EngineError;
use super::instance::{Instance, Phase};
use super::mutant::{self, Mutant};
use super::plan::{NodeId, Role};
use super::registry::{Interested, PlanEntry, Registry};
use super::route::{RouteTableId, Target, Who};
use super::settle::Work;
use super::source::Source;
use super::update::{Hit, Update};
use crate::schema::Schema;
use crate::version::StateVersion;
use crate::zql::predicate;

type Hits = HashMap<InstanceId, Vec<Hit>, FxBuildHasher>;

/// See the module.
#[derive(Debug)]
pub(super) struct Advance {
    pub(super) target: StateVersion,
    pub(super) schema: Arc<Schema>,
    changes: NetTables,
    /// Changed tables still to be routed, and how far the last one is.
    to_route: Vec<RouteTableId>,
    routed: usize,
    hits: Hits,
    /// Instances to re-hydrate and compare, whatever changed.
    rehydrate: HashSet<InstanceId, FxBuildHasher>,
    /// Instances to do, once routing is through.
    queue: Option<Vec<InstanceId>>,
    current: Option<(InstanceId, Step)>,
    out: Advanced,
}

/// How far the current instance is.
#[derive(Debug)]
enum Step {
    Update(Update),
    /// With the sum of its changes, unless it is compared as a whole.
    Settle(Option<Emission>),
}

impl Advance {
    pub(super) fn new(
        target: StateVersion,
        schema: Arc<Schema>,
        changes: &ChangeSet,
        rehydrate: HashSet<InstanceId, FxBuildHasher>,
        registry: &Registry,
    ) -> Advance {
        let changed: HashSet<_> = changes.tables().collect();
        let changes: NetTables = registry
            .router
            .tables()
            .filter(|(_, table, _)| changed.contains(table))
            .filter_map(|(id, table, key)| Some((id, changes.table(table, key)?)))
            .filter(|(_, table)| !table.changes.is_empty())
            .collect();
        let to_route = changes.keys().copied().collect();
        Advance {
            out: Advanced { version: target.clone(), ..Advanced::default() },
            target,
            schema,
            changes,
            to_route,
            routed: 0,
            hits: Hits::default(),
            rehydrate,
            queue: None,
            current: None,
        }
    }

    /// Adds an instance to those that are re-hydrated and compared.
    pub(super) fn rehydrate(&mut self, id: InstanceId) {
        self.rehydrate.insert(id);
    }

    /// Reports an instance that failed outside of a step.
    pub(super) fn failed(&mut self, id: InstanceId, error: EngineError) {
        self.out.failed.push((id, error));
    }

    /// Works until everything is done (`Some`) or the budget is spent.
    pub(super) fn step(
        &mut self,
        config: &EngineConfig,
        registry: &mut Registry,
        source: &mut dyn Source,
        budget: &mut Budget,
    ) -> Option<Advanced> {
        if !self.route(registry, budget) {
            return None;
        }
        if self.queue.is_none() {
            self.fail_unbound(registry);
            let mut queue: Vec<InstanceId> = self.rehydrate.iter().copied().collect();
            queue.extend(self.hits.keys().filter(|id| !self.rehydrate.contains(*id)));
            // In order of creation, the oldest last: it is popped first.
            queue.sort_unstable_by(|a, b| b.cmp(a));
            self.queue = Some(queue);
        }
        loop {
            let Some((id, step)) = self.current.take() else {
                let Some(id) = self.queue.as_mut().and_then(Vec::pop) else {
                    return Some(std::mem::take(&mut self.out));
                };
                self.current = self.begin(config, registry, id).map(|step| (id, step));
                continue;
            };
            match self.instance(registry, source, budget, id, step) {
                Ok(next) => self.current = next.map(|step| (id, step)),
                Err(error) => {
                    registry.fail(id, error.clone());
                    self.out.failed.push((id, error));
                }
            }
            if budget.is_spent() && (self.current.is_some() || !self.is_empty()) {
                return None;
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.queue.as_ref().is_some_and(Vec::is_empty)
    }

    fn fail_unbound(&mut self, registry: &mut Registry) {
        let unbound: Vec<InstanceId> =
            registry.instances().filter(|i| i.unbound).map(|i| i.id).collect();
        for id in unbound {
            let plan = registry.get(id).and_then(|i| registry.plan(i.plan));
            let name = plan.map_or("", |p| &p.plan.node(super::plan::Plan::ROOT).table.name);
            let error = EngineError::SchemaChanged(name.to_owned());
            registry.fail(id, error.clone());
            self.out.failed.push((id, error));
        }
    }

    /// Leads changed rows to instances. True when all are.
    fn route(&mut self, registry: &mut Registry, budget: &mut Budget) -> bool {
        let mut targets = Vec::new();
        while let Some(&id) = self.to_route.last() {
            let Some(table) = self.changes.get(&id) else {
                self.to_route.pop();
                continue;
            };
            while let Some(change) = table.changes.get(self.routed) {
                targets.clear();
                let old = change.old.iter().filter(|_| !mutant::is(Mutant::OldNotRouted));
                for row in old.chain(&change.new) {
                    registry.router.find(id, row, &mut targets);
                }
                targets.sort_unstable();
                targets.dedup();
                let number = self.routed as u32;
                for &target in &targets {
                    let Some(at) = registry.interested(target.plan) else { continue };
                    lead(at, target, change, number, &mut self.hits);
                }
                for i in 0..registry.router.rest(id).len() {
                    let (plan, node) = registry.router.rest(id)[i];
                    let Some(at) = registry.interested(plan) else { continue };
                    lead_rest(at, node, change, number, &mut self.hits);
                }
                self.routed += 1;
                budget.spend(1);
                if budget.is_spent() {
                    return false;
                }
            }
            self.to_route.pop();
            self.routed = 0;
        }
        true
    }

    /// What an instance needs; `None` if nothing.
    fn begin(
        &mut self,
        config: &EngineConfig,
        registry: &mut Registry,
        id: InstanceId,
    ) -> Option<Step> {
        let hits = self.hits.remove(&id).unwrap_or_default();
        let instance = registry.get(id)?;
        let (plan, ready) = (instance.plan, matches!(instance.phase, Phase::Ready));
        if matches!(instance.phase, Phase::Failed(_)) {
            return None;
        }
        let many = hits.len() > config.rehydrate_above && hits.len() > instance.size().1;
        if self.rehydrate.contains(&id) || many {
            if ready && instance.known.is_none() {
                let known = Snapshot::of(instance, &registry.plan(plan)?.shape);
                registry.get_mut(id)?.known = Some(known);
            }
            registry.restart(id);
            if !ready {
                // Its hydration begins again, after the advance.
                return None;
            }
            registry.counters(plan).rehydrations += 1;
            return Some(Step::Settle(None));
        }
        if !instance.is_started() {
            return None;
        }
        let nodes = instance.nodes.len();
        registry.counters(plan).advances += 1;
        Some(Step::Update(Update::new(hits, nodes)))
    }

    /// Goes on with one instance; `None` when it is at the new version.
    fn instance(
        &mut self,
        registry: &mut Registry,
        source: &mut dyn Source,
        budget: &mut Budget,
        id: InstanceId,
        step: Step,
    ) -> Result<Option<Step>, EngineError> {
        if registry.get(id).is_none() {
            // Unsubscribed between two steps.
            return Ok(None);
        }
        let changes = &self.changes;
        let out = &mut self.out;
        registry.work(id, source, budget, |instance, w| match step {
            Step::Update(mut update) => {
                if !update.step(instance, changes, w)? {
                    return Ok(Some(Step::Update(update)));
                }
                let ready = matches!(instance.phase, Phase::Ready);
                // Nobody knows a hydrating instance's rows: settling it is hydration's.
                Ok(ready.then(|| Step::Settle(Some(Emission::default()))))
            }
            Step::Settle(mut emission) => {
                if !instance.settle(w, emission.as_mut())? {
                    return Ok(Some(Step::Settle(emission)));
                }
                let rows = deltas(instance, emission, changes, w)?;
                w.counters.deltas += rows.len() as u64;
                if !rows.is_empty() {
                    out.deltas.push(InstanceDelta { instance: id, rows: rows.into() });
                }
                Ok(None)
            }
        })
    }
}

fn deltas(
    instance: &mut Instance,
    emission: Option<Emission>,
    changes: &NetTables,
    w: &Work<'_>,
) -> Result<Vec<RowDelta>, EngineError> {
    if let Some(emission) = emission {
        return emission.finish(instance, w.shape, w.tables, changes);
    }
    let known = instance.known.take().unwrap_or_default();
    Ok(known.difference(Snapshot::of(instance, w.shape)))
}

/// Leads a changed row to the instances of one target, if its weak predicate matches.
fn lead(at: Interested<'_>, target: Target, change: &NetChange, number: u32, hits: &mut Hits) {
    let hit = Hit { node: target.node, change: number };
    match target.who {
        Who::Group(group) => {
            let Interested { plan, instances } = at;
            let members = plan.members(target.node, group);
            let count = lead_group(plan, instances, target.node, members, change, hit, hits);
            if matches!(plan.plan.node(target.node).role, Role::Exists { .. }) {
                plan.counters.leaf_fanouts += count;
            }
        }
        Who::Instance(slot) => {
            let one = [slot];
            lead_group(at.plan, at.instances, target.node, &one, change, hit, hits);
        }
    }
}

/// Leads a changed row to the instances of every group of a node that has no index.
fn lead_rest(at: Interested<'_>, node: NodeId, change: &NetChange, number: u32, hits: &mut Hits) {
    let Interested { plan, instances } = at;
    let hit = Hit { node, change: number };
    let (mut groups, mut count) = (0, 0);
    for members in plan.groups(node) {
        groups += 1;
        count += lead_group(plan, instances, node, members, change, hit, hits);
    }
    plan.counters.rest_evaluations += groups;
    if matches!(plan.plan.node(node).role, Role::Exists { .. }) {
        plan.counters.leaf_fanouts += count;
    }
}

/// Members agree on the node's parameters: the first one's decide for all.
fn lead_group(
    plan: &PlanEntry,
    instances: &[Option<Box<Instance>>],
    node: NodeId,
    members: &[u32],
    change: &NetChange,
    hit: Hit,
    hits: &mut Hits,
) -> u64 {
    let instance = |slot: u32| instances.get(slot as usize).and_then(|i| i.as_deref());
    let Some(first) = members.first().and_then(|&slot| instance(slot)) else { return 0 };
    let planned = plan.shape.plan.node(node);
    let mut sides = change.old.iter().chain(&change.new);
    if !sides.any(|row| predicate::weak(planned, row, &first.params)) {
        return 0;
    }
    for member in members.iter().filter_map(|&slot| instance(slot)) {
        hits.entry(member.id).or_default().push(hit);
    }
    members.len() as u64
}
