//! One advance of the whole engine: lead the changed rows to instances (through
//! [`super::lead`] where many share an EXISTS body), then bring the affected
//! instances to the new version one after the other. Can stop between any two pieces of work.

use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use rustc_hash::FxBuildHasher;

use super::change_set::{ChangeSet, NetChange, Pairing};
use super::delta::{Advanced, InstanceDelta, RowDelta};
use super::dirty::{Hit, HitRow};
use super::emit::{Comparison, Emission, NetTables, Telling};
use super::engine::{Budget, EngineConfig, InstanceId};
use super::error::EngineError;
use super::garbage::Garbage;
use super::instance::{Instance, Phase};
use super::lead::{Leading, LeafGroup, LeafHits, Led, Needs};
use super::mutant::{self, Mutant};
use super::plan::{NodeId, Plan};
use super::registry::{Interested, Registry, slot};
use super::route::{RouteTableId, Target, Who};
use super::settle::Work;
use super::shape::{Access, NodeShape, Shape, possible};
use super::small_set::SmallSet;
use super::source::Source;
use super::update::{Input, Update};
use crate::row::{Key, RowRef};
use crate::schema::Schema;
use crate::version::StateVersion;
use crate::zql::predicate;

type Hits = HashMap<InstanceId, Vec<Hit>, FxBuildHasher>;

/// See the module.
#[derive(Debug)]
pub(super) struct Advance {
    pub(super) target: StateVersion,
    pub(super) schema: Arc<Schema>,
    /// What the commits say, until it is netted by the identity keys in use.
    commits: ChangeSet,
    to_pair: Vec<Pairing>,
    changes: NetTables,
    /// Changed tables still to be routed, and how far the last one is.
    to_route: Vec<RouteTableId>,
    routed: usize,
    hits: Hits,
    /// What reached EXISTS bodies that many instances share, and what came of it.
    leaf_hits: HashMap<LeafGroup, LeafHits, FxBuildHasher>,
    led: HashMap<LeafGroup, Arc<Led>, FxBuildHasher>,
    /// The leaf group that is being looked up.
    leading: Option<Box<Leading>>,
    /// Parent rows found for whole groups; so many of them were led on, the others are of this
    /// group.
    found: Vec<RowRef>,
    parents_led: usize,
    parents_of: Option<(LeafGroup, Arc<Shape>)>,
    /// Instances that wait for a plan under the new schema.
    unbound: Vec<InstanceId>,
    /// Instances to re-hydrate and compare, whatever changed.
    rehydrate: HashSet<InstanceId, FxBuildHasher>,
    /// Instances to do, once routing is through.
    queue: Option<Vec<InstanceId>>,
    current: Option<(InstanceId, Step)>,
    /// An instance was brought to the new version: perhaps others must make room.
    makes_room: bool,
    /// What is done with.
    garbage: Garbage,
    out: Advanced,
}

/// How far the current instance is.
#[derive(Debug)]
enum Step {
    Update(Update),
    /// With the sum of its changes.
    Settle(Emission),
    Tell(Telling),
    /// It starts over: what it held is taken apart.
    TakeApart,
    /// It started over and is compared as a whole.
    Compare(Comparison),
}

impl Advance {
    pub(super) fn new(
        target: StateVersion,
        schema: Arc<Schema>,
        commits: ChangeSet,
        rehydrate: HashSet<InstanceId, FxBuildHasher>,
        registry: &Registry,
    ) -> Advance {
        let changed: HashSet<_> = commits.tables().collect();
        let tables = registry.router.tables().filter(|(_, table, _)| changed.contains(table));
        let to_pair = tables.map(|(id, table, key)| commits.pair(id, table, key)).collect();
        Advance {
            out: Advanced { version: target.clone(), ..Advanced::default() },
            target,
            schema,
            commits,
            to_pair,
            changes: NetTables::default(),
            to_route: Vec::new(),
            routed: 0,
            hits: Hits::default(),
            unbound: Vec::new(),
            leaf_hits: HashMap::default(),
            led: HashMap::default(),
            leading: None,
            found: Vec::new(),
            parents_led: 0,
            parents_of: None,
            rehydrate,
            queue: None,
            current: None,
            makes_room: false,
            garbage: Garbage::default(),
        }
    }

    /// These get a plan by `Engine::rebind`, or fail.
    pub(super) fn await_plans(&mut self, unbound: &[InstanceId]) {
        self.unbound = unbound.to_vec();
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
        if !self.pair(budget)
            || !self.route(config, registry, budget)
            || !self.lead(registry, source, budget)
        {
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
            if self.makes_room && !registry.make_room(config.max_rows, budget) {
                return None;
            }
            self.makes_room = false;
            let Some((id, step)) = self.current.take() else {
                let Some(id) = self.queue.as_mut().and_then(Vec::pop) else {
                    return self.clear(budget).then(|| std::mem::take(&mut self.out));
                };
                self.current = self.begin(config, registry, id).map(|step| (id, step));
                continue;
            };
            match self.instance(registry, source, budget, id, step) {
                Ok(Some(step)) => self.current = Some((id, step)),
                Ok(None) => self.makes_room = true,
                Err(error) => {
                    registry.fail(id, error.clone());
                    self.out.failed.push((id, error));
                }
            }
            let more = self.current.is_some() || self.makes_room || !self.is_empty();
            if budget.is_spent() && more {
                return None;
            }
        }
    }

    /// Gives the changed rows back, until none is left (true) or the budget is spent.
    fn clear(&mut self, budget: &mut Budget) -> bool {
        for (_, net) in self.changes.drain() {
            self.garbage.add(net.changes);
        }
        for (_, led) in self.led.drain() {
            let nodes = Arc::into_inner(led).into_iter().flat_map(|led| led.nodes);
            nodes.for_each(|(_, rows)| self.garbage.add(rows));
        }
        self.garbage.add(std::mem::take(&mut self.found));
        self.garbage.give_back(budget)
    }

    fn is_empty(&self) -> bool {
        self.queue.as_ref().is_some_and(Vec::is_empty)
    }

    fn fail_unbound(&mut self, registry: &mut Registry) {
        for id in std::mem::take(&mut self.unbound) {
            if registry.get(id).is_none_or(|i| !i.unbound) {
                continue;
            }
            let plan = registry.get(id).and_then(|i| registry.plan(i.plan));
            let name = plan.map_or("", |p| &p.plan.node(Plan::ROOT).table.name);
            let error = EngineError::SchemaChanged(name.to_owned());
            registry.fail(id, error.clone());
            self.out.failed.push((id, error));
        }
    }

    /// Nets the commits by the identity keys in use. True when all are.
    fn pair(&mut self, budget: &mut Budget) -> bool {
        while let Some(pairing) = self.to_pair.last_mut() {
            if !pairing.step(&self.commits, budget) {
                return false;
            }
            if let Some(Pairing { id, net, .. }) = self.to_pair.pop()
                && !net.changes.is_empty()
            {
                self.changes.insert(id, net);
                self.to_route.push(id);
            }
        }
        true
    }

    /// Leads changed rows to instances and leaf groups. True when all are.
    fn route(
        &mut self,
        config: &EngineConfig,
        registry: &mut Registry,
        budget: &mut Budget,
    ) -> bool {
        let mut targets = Vec::new();
        while let Some(&id) = self.to_route.last() {
            let Some(table) = self.changes.get(&id) else {
                self.to_route.pop();
                continue;
            };
            while let Some(change) = table.changes.get(self.routed) {
                targets.clear();
                if !change.is_real() {
                    self.routed += 1;
                    continue;
                }
                let old = change.old.iter().filter(|_| !mutant::is(Mutant::OldNotRouted));
                for row in old.chain(&change.new) {
                    registry.router.find(id, row, &mut targets);
                }
                targets.sort_unstable();
                targets.dedup();
                let mut reached = 0;
                let mut route = Route {
                    config,
                    change,
                    row: HitRow::Changed(self.routed as u32),
                    hits: &mut self.hits,
                    leaf_hits: &mut self.leaf_hits,
                    reached: &mut reached,
                };
                for &target in &targets {
                    if let Some(mut at) = registry.interested(target.plan) {
                        route.target(&mut at, target);
                    }
                }
                let rest = registry.for_each_rest(id, &mut |at, plan, node| {
                    route.rest(at, plan, node);
                });
                self.routed += 1;
                budget.spend(1 + reached / 8 + rest / 4);
                if budget.is_spent() {
                    return false;
                }
            }
            self.to_route.pop();
            self.routed = 0;
        }
        true
    }

    /// Finds the dirty rows and parents of leaf groups, and leads those. True when all are.
    fn lead(
        &mut self,
        registry: &mut Registry,
        source: &mut dyn Source,
        budget: &mut Budget,
    ) -> bool {
        loop {
            while let Some((group, shape)) = self.parents_of.clone()
                && self.parents_led < self.found.len()
            {
                let reached = self.lead_parent(registry, group, &shape, self.parents_led);
                self.parents_led += 1;
                budget.spend(1 + reached / 8);
                if budget.is_spent() {
                    return false;
                }
            }
            self.parents_of = None;
            let Some(mut leading) = self.leading.take().or_else(|| self.next_group()) else {
                return true;
            };
            let group = leading.group;
            let Some(at) = registry.interested(group.plan) else { continue };
            if !Arc::ptr_eq(&at.plan.shape, leading.shape()) {
                continue;
            }
            let first = at.plan.members(group.top, group.group).and_then(SmallSet::first);
            let first = first.and_then(|slot| at.instance(slot));
            let Some(params) = first.map(|i| Arc::clone(&i.params)) else { continue };
            let mut needs = Needs {
                tables: &at.plan.tables,
                params: &params,
                changes: &self.changes,
                source: &mut *source,
                budget: &mut *budget,
                counters: &mut at.plan.counters,
            };
            match leading.step(&mut needs) {
                Ok(false) => {
                    self.leading = Some(leading);
                    return false;
                }
                Ok(true) => {
                    self.parents_of = Some((group, Arc::clone(leading.shape())));
                    let (led, parents, garbage) = leading.close();
                    self.garbage.append(garbage);
                    self.led.insert(group, Arc::new(led));
                    self.parents_led = self.found.len();
                    self.found.extend(parents);
                }
                Err(error) => self.fail_group(registry, group, &error),
            }
        }
    }

    /// The next leaf group, in a fixed order: the same commits do the same work.
    fn next_group(&mut self) -> Option<Box<Leading>> {
        let group = *self.leaf_hits.keys().min()?;
        let reached = self.leaf_hits.remove(&group)?;
        Some(Box::new(Leading::new(group, reached)))
    }

    /// Fails the members of a group: each of them would have met the error.
    fn fail_group(&mut self, registry: &mut Registry, group: LeafGroup, error: &EngineError) {
        let Some(at) = registry.interested(group.plan) else { return };
        let members = at.plan.members(group.top, group.group);
        let slots = members.into_iter().flat_map(SmallSet::iter);
        let failed: Vec<InstanceId> = slots.filter_map(|s| Some(at.instance(s)?.id)).collect();
        for id in failed {
            registry.fail(id, error.clone());
            self.out.failed.push((id, error.clone()));
        }
    }

    /// Leads a parent row that was found for a group to those members that may hold it; how many.
    fn lead_parent(
        &mut self,
        registry: &mut Registry,
        group: LeafGroup,
        shape: &Shape,
        found: usize,
    ) -> u64 {
        let Some(parent) = shape.node(group.top).parent.map(|p| shape.node(p)) else { return 0 };
        let row = &self.found[found];
        let hit = Hit { node: parent.id, row: HitRow::Found(found as u32) };
        let Some(table) = registry.plan(group.plan).map(|p| p.tables[usize::from(parent.id.0)])
        else {
            return 0;
        };
        let mut targets = Vec::new();
        registry.router.find(table, row, &mut targets);
        targets.retain(|t| t.plan == group.plan && t.node == parent.id);
        targets.sort_unstable();
        targets.dedup();
        let Some(at) = registry.interested(group.plan) else { return 0 };
        let planned = shape.plan.node(parent.id);
        let Some(members) = at.plan.members(group.top, group.group).map(Members::All) else {
            return 0;
        };
        let mut reached = 0;
        let mut lead = |slots: Members<'_>| {
            // All of `slots` agree on the parent's parameters.
            let Some(first) = slots.first().and_then(|s| at.instance(s)) else { return };
            if !predicate::weak(planned, row, &first.params) {
                return;
            }
            let (few, many) =
                if slots.len() < members.len() { (slots, members) } else { (members, slots) };
            reached += few.len() as u64;
            for slot in few.iter().filter(|&s| many.contains(s)) {
                if let Some(instance) = at.instance(slot) {
                    self.hits.entry(instance.id).or_default().push(hit);
                }
            }
        };
        for target in targets {
            match target.who {
                Who::Group(g) => {
                    at.plan.members(parent.id, g).map(Members::All).into_iter().for_each(&mut lead);
                }
                Who::Instance(slot) => lead(Members::One(slot)),
            }
        }
        if parent.owner.is_some() && parent.access == Access::All {
            at.plan.groups(parent.id).for_each(|(_, slots)| lead(Members::All(slots)));
        }
        reached
    }

    /// What was found for the leaf groups of an instance.
    fn led_for(&self, instance: &Instance) -> Vec<Arc<Led>> {
        if self.led.is_empty() || !matches!(instance.phase, Phase::Ready) {
            return Vec::new();
        }
        let plan = instance.plan;
        let groups = instance.groups.iter().enumerate();
        groups
            .filter_map(|(n, &group)| {
                self.led.get(&LeafGroup { plan, top: NodeId(n as u16), group }).cloned()
            })
            .collect()
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
        let many = hits.len() > config.rehydrate_above && hits.len() > instance.resident;
        let parked = instance.parked.is_some();
        if parked || self.rehydrate.contains(&id) || many {
            let note_known = ready && instance.known.is_none();
            registry.unpark(id);
            registry.start_over(id, note_known);
            if ready {
                registry.counters(plan).rehydrations += 1;
            }
            return Some(Step::TakeApart);
        }
        if !instance.is_started() {
            return None;
        }
        let led = self.led_for(instance);
        let update = Update::new(hits, led, &registry.plan(plan)?.shape);
        registry.counters(plan).advances += 1;
        Some(Step::Update(update))
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
        let Some(instance) = registry.get(id) else {
            // Unsubscribed between two steps.
            return Ok(None);
        };
        if matches!(step, Step::TakeApart) {
            // An instance that nobody knows goes on hydrating after the advance.
            let ready = matches!(instance.phase, Phase::Ready);
            let Some(known) = registry.take_apart(id, budget) else {
                return Ok(Some(Step::TakeApart));
            };
            if let Some(instance) = registry.get_mut(id)
                && known.is_some()
            {
                instance.known = known;
            }
            return Ok(ready.then(|| Step::Settle(Emission::default())));
        }
        let changes = &self.changes;
        let input = Input { changes, found: &self.found };
        let out = &mut self.out;
        registry.work(id, source, budget, |instance, w| match step {
            Step::TakeApart => Ok(None),
            Step::Update(mut update) => {
                if !update.step(instance, &input, w)? {
                    return Ok(Some(Step::Update(update)));
                }
                let ready = matches!(instance.phase, Phase::Ready);
                // Nobody knows a hydrating instance's rows: settling it is hydration's.
                Ok(ready.then(|| Step::Settle(Emission::default())))
            }
            Step::Settle(mut emission) => {
                if !instance.settle(w, Some(&mut emission))? {
                    return Ok(Some(Step::Settle(emission)));
                }
                Ok(Some(match instance.known.take() {
                    Some(known) => Step::Compare(emission.compare(known)),
                    None => Step::Tell(emission.close()),
                }))
            }
            Step::Compare(mut comparison) => {
                let rows = comparison.step(instance, w.shape, w.budget)?;
                let Some(rows) = rows else { return Ok(Some(Step::Compare(comparison))) };
                report(id, rows, w, out);
                Ok(None)
            }
            Step::Tell(mut telling) => {
                let told = telling.step(instance, w.shape, w.tables, changes, w.budget)?;
                let Some(rows) = told else { return Ok(Some(Step::Tell(telling))) };
                report(id, rows, w, out);
                Ok(None)
            }
        })
    }
}

fn report(instance: InstanceId, rows: Vec<RowDelta>, w: &mut Work<'_>, out: &mut Advanced) {
    w.counters.deltas += rows.len() as u64;
    if !rows.is_empty() {
        out.deltas.push(InstanceDelta { instance, rows: Arc::new(rows) });
    }
}

/// Instances that agree on the parameters of a node.
#[derive(Clone, Copy)]
enum Members<'a> {
    One(u32),
    All(&'a SmallSet<u32>),
}

impl<'a> Members<'a> {
    fn len(self) -> usize {
        match self {
            Members::One(_) => 1,
            Members::All(slots) => slots.len(),
        }
    }

    fn first(self) -> Option<u32> {
        match self {
            Members::One(slot) => Some(slot),
            Members::All(slots) => slots.first(),
        }
    }

    fn contains(self, slot: u32) -> bool {
        match self {
            Members::One(one) => one == slot,
            Members::All(slots) => slots.contains(slot),
        }
    }

    fn iter(self) -> impl Iterator<Item = u32> + 'a {
        let (one, all) = match self {
            Members::One(slot) => (Some(slot), None),
            Members::All(slots) => (None, Some(slots.iter())),
        };
        one.into_iter().chain(all.into_iter().flatten())
    }
}

/// Leads one changed row.
struct Route<'a> {
    config: &'a EngineConfig,
    change: &'a NetChange,
    row: HitRow,
    hits: &'a mut Hits,
    leaf_hits: &'a mut HashMap<LeafGroup, LeafHits, FxBuildHasher>,
    /// Instances that were reached, for the budget.
    reached: &'a mut u64,
}

impl Route<'_> {
    /// To one target of an index.
    fn target(&mut self, at: &mut Interested<'_>, target: Target) {
        match target.who {
            Who::Group(group) => self.group(at, target.plan, target.node, group),
            Who::Instance(slot) => {
                self.members(at, target.node, Members::One(slot));
            }
        }
    }

    /// To the groups of a node that has no index.
    fn rest(&mut self, at: &mut Interested<'_>, plan: u32, node: NodeId) {
        // What does not depend on parameters is decided once for the plan.
        let condition = &at.plan.shape.plan.node(node).condition;
        let mut sides = self.change.old.iter().chain(&self.change.new);
        if !sides.any(|row| possible(condition, row)) {
            return;
        }
        for group in 0..at.plan.groups_end(node) {
            if at.plan.members(node, group).is_some_and(|m| !m.is_empty()) {
                at.plan.counters.rest_evaluations += 1;
                self.group(at, plan, node, group);
            }
        }
    }

    /// Members agree on what the node's weak predicate reads: the first one's parameters decide.
    fn matches(&self, at: &Interested<'_>, node: NodeId, members: Members<'_>) -> bool {
        let Some(first) = members.first().and_then(|slot| at.instance(slot)) else {
            return false;
        };
        let planned = at.plan.shape.plan.node(node);
        let mut sides = self.change.old.iter().chain(&self.change.new);
        sides.any(|row| predicate::weak(planned, row, &first.params))
    }

    fn group(&mut self, at: &mut Interested<'_>, plan: u32, node: NodeId, group: u32) {
        let Some(members) = at.plan.members(node, group).map(Members::All) else { return };
        let top = at.plan.shape.node(node).owner.filter(|_| at.plan.shape.node(node).below_leaf);
        let Some(top) = top else {
            self.members(at, node, members);
            return;
        };
        if members.len() <= self.config.lead_above {
            let fanout = self.members(at, node, members);
            at.plan.counters.leaf_fanouts += fanout;
            return;
        }
        if !self.matches(at, node, members) {
            return;
        }
        let hit = Hit { node, row: self.row };
        for &id in at.hydrating.iter().filter(|_| !mutant::is(Mutant::HydratingLed)) {
            let instance = at.instance(slot(id)).filter(|i| i.id == id && i.plan == plan);
            if instance.is_some_and(|i| i.groups.get(usize::from(top.0)) == Some(&group)) {
                self.hits.entry(id).or_default().push(hit);
            }
        }
        self.leaf_hits
            .entry(LeafGroup { plan, top, group })
            .or_insert_with(|| LeafHits { shape: Arc::clone(&at.plan.shape), hits: Vec::new() })
            .hits
            .push(hit);
    }

    /// Whether the change lies behind the bound of an instance's window, before and after: then
    /// the row is not resident, and does not enter.
    fn is_behind(&self, instance: &Instance, root: &NodeShape) -> bool {
        let partition = instance.nodes.first().and_then(|n| n.partitions.get(&Key::new()));
        let mut sides = self.change.old.iter().chain(&self.change.new);
        partition.is_some_and(|p| !sides.any(|row| p.covers(&root.order, row)))
    }

    /// To instances that agree on the node's parameters; how many.
    fn members(&mut self, at: &Interested<'_>, node: NodeId, members: Members<'_>) -> u64 {
        if !self.matches(at, node, members) {
            return 0;
        }
        *self.reached += members.len() as u64;
        for instance in members.iter().filter_map(|slot| at.instance(slot)) {
            if node == Plan::ROOT && self.is_behind(instance, at.plan.shape.node(node)) {
                continue;
            }
            self.hits.entry(instance.id).or_default().push(Hit { node, row: self.row });
        }
        members.len() as u64
    }
}
