//! Plans, instances and what leads changed rows to them.

use std::collections::VecDeque;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use rustc_hash::FxBuildHasher;

use super::emit::Snapshot;
use super::engine::{Budget, EngineConfig, InstanceId};
use super::error::EngineError;
use super::garbage::Garbage;
use super::instance::{Instance, Phase};
use super::intern::Interner;
use super::parking::Parking;
use super::plan::{NodeId, Param, Plan};
use super::remains::{Grave, Remains};
use super::route::{RouteTableId, Router, Target, Who};
use super::settle::Work;
use super::shape::{Access, NodeShape, Shape};
use super::small_set::SmallSet;
use super::source::Source;
use super::stats::{Counters, EngineStats};
use crate::value::Value;

/// No group: the node is routed by join keys, by the groups of another node, or not at all.
const NO_GROUP: u32 = u32::MAX;

/// Bits of an [`InstanceId`] that are its slot; also bounds the number of instances.
const SLOT_BITS: u32 = 24;

/// Work with which the state of an instance that is gone is taken apart at once: most have few
/// rows. Tests have fewer, and shall see some that are not through.
const RELEASE_AT_ONCE: u64 = if cfg!(test) { 2 } else { 512 };

/// A plan in use.
#[derive(Debug)]
pub(super) struct PlanEntry {
    /// As it was subscribed.
    pub(super) plan: Arc<Plan>,
    pub(super) shape: Arc<Shape>,
    /// Router numbers of the nodes' tables.
    pub(super) tables: Arc<[RouteTableId]>,
    groups: Box<[NodeGroups]>,
    by_params: HashMap<Arc<[Param]>, InstanceId, FxBuildHasher>,
    pub(super) instances: usize,
    /// Instances, and remains of instances: their routes name the plan's number.
    users: usize,
    pub(super) counters: Counters,
}

/// Instances of a plan by the parameters that one node reads.
#[derive(Debug, Default)]
struct NodeGroups {
    by_params: HashMap<Box<[Param]>, u32, FxBuildHasher>,
    groups: Vec<Group>,
    free: Vec<u32>,
}

#[derive(Debug, Default)]
struct Group {
    params: Box<[Param]>,
    /// Slots.
    members: SmallSet<u32>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Registry {
    plans: Vec<Option<PlanEntry>>,
    free_plans: Vec<u32>,
    by_plan: HashMap<Arc<Plan>, u32, FxBuildHasher>,
    instances: Vec<Option<Box<Instance>>>,
    free_slots: Vec<u32>,
    serial: u64,
    live: usize,
    subscriptions: usize,
    /// Instances that nobody knows the rows of yet.
    pub(super) hydrating: HashSet<InstanceId, FxBuildHasher>,
    pub(super) router: Router,
    pub(super) interner: Interner,
    /// How room is made.
    pub(super) parking: Parking,
    /// Ready instances that hold no rows.
    pub(super) parked: HashSet<InstanceId, FxBuildHasher>,
    /// Instances that somebody reads, or did.
    pub(super) read: HashSet<InstanceId, FxBuildHasher>,
    /// What is taken apart by and by, the oldest first.
    graves: VecDeque<Grave>,
    /// Work of plans that are gone.
    retired: Counters,
}

/// Instances that a target stands for.
pub(super) struct Interested<'a> {
    pub(super) plan: &'a mut PlanEntry,
    pub(super) instances: &'a [Option<Box<Instance>>],
    pub(super) hydrating: &'a HashSet<InstanceId, FxBuildHasher>,
}

impl Interested<'_> {
    /// The instance in a slot.
    pub(super) fn instance(&self, slot: u32) -> Option<&Instance> {
        self.instances.get(slot as usize)?.as_deref()
    }
}

impl Registry {
    pub(super) fn get(&self, id: InstanceId) -> Option<&Instance> {
        self.instances.get(slot(id) as usize)?.as_deref().filter(|i| i.id == id)
    }

    pub(super) fn get_mut(&mut self, id: InstanceId) -> Option<&mut Instance> {
        self.instances.get_mut(slot(id) as usize)?.as_deref_mut().filter(|i| i.id == id)
    }

    pub(super) fn plan(&self, number: u32) -> Option<&PlanEntry> {
        self.plans.get(number as usize)?.as_ref()
    }

    pub(super) fn counters(&mut self, plan: u32) -> &mut Counters {
        match self.plans.get_mut(plan as usize) {
            Some(Some(entry)) => &mut entry.counters,
            _ => &mut self.retired,
        }
    }

    pub(super) fn plans(&self) -> impl Iterator<Item = (u32, &PlanEntry)> {
        self.plans.iter().enumerate().filter_map(|(i, p)| Some((i as u32, p.as_ref()?)))
    }

    pub(super) fn instances(&self) -> impl Iterator<Item = &Instance> {
        self.instances.iter().filter_map(|i| i.as_deref())
    }

    pub(super) fn subscribe(
        &mut self,
        config: &EngineConfig,
        plan: &Arc<Plan>,
        params: Arc<[Param]>,
    ) -> Result<InstanceId, EngineError> {
        let known = self.by_plan.get(plan).and_then(|&p| self.plan(p)?.by_params.get(&params));
        if let Some(&id) = known
            && let Some(instance) = self.get_mut(id)
            && !matches!(instance.phase, Phase::Failed(_))
        {
            instance.subscriptions += 1;
            self.subscriptions += 1;
            return Ok(id);
        }
        let most = config.max_instances.min(1 << SLOT_BITS);
        if self.live >= most {
            return Err(EngineError::TooManyInstances(most));
        }
        let slot = self.free_slots.pop().unwrap_or(self.instances.len() as u32);
        self.serial += 1;
        let id = InstanceId((self.serial << SLOT_BITS) | u64::from(slot));
        let mut instance = Box::new(Instance::new(id, 0, params));
        instance.subscriptions = 1;
        if self.instances.len() == slot as usize {
            self.instances.push(None);
        }
        self.instances[slot as usize] = Some(instance);
        self.live += 1;
        self.subscriptions += 1;
        self.hydrating.insert(id);
        self.attach(config, id, plan);
        Ok(id)
    }

    pub(super) fn unsubscribe(&mut self, id: InstanceId) {
        let Some(instance) = self.get_mut(id) else { return };
        instance.subscriptions = instance.subscriptions.saturating_sub(1);
        let gone = instance.subscriptions == 0;
        self.subscriptions -= 1;
        if !gone {
            return;
        }
        let slot = slot(id);
        let remains = self.detach(id);
        self.hydrating.remove(&id);
        self.parked.remove(&id);
        self.live -= 1;
        if let Some(instance) = self.instances[slot as usize].take() {
            if let Some(earlier) = instance.remains {
                self.bury(earlier);
            }
            self.forget(instance.known);
            let mut garbage = Garbage::default();
            instance.readers.discard(&mut garbage);
            self.discard(garbage);
        }
        if let Some(remains) = remains {
            self.bury(remains);
        }
        let theirs =
            |g: &&mut Grave| matches!(g, Grave::State { remains, .. } if remains.slot == slot);
        match self.graves.iter_mut().rev().find(theirs) {
            Some(Grave::State { frees_slot, .. }) => *frees_slot = true,
            _ => self.free_slots.push(slot),
        }
        self.release(&mut Budget::units(RELEASE_AT_ONCE));
    }

    /// Leaves a state to be taken apart by [`Registry::release`].
    pub(super) fn bury(&mut self, remains: Box<Remains>) {
        self.graves.push_back(Grave::State { remains, frees_slot: false });
    }

    /// The same for lists that nobody needs any more.
    pub(super) fn discard(&mut self, garbage: Garbage) {
        if garbage.is_empty() {
            return;
        }
        self.graves.push_back(Grave::Lists(garbage));
    }

    /// The same for what subscribers of an instance knew.
    pub(super) fn forget(&mut self, known: Option<Snapshot>) {
        let Some(known) = known else { return };
        let mut garbage = Garbage::default();
        garbage.add(known.into_rows());
        self.discard(garbage);
    }

    /// Takes apart what is gone, until the budget is spent (false) or nothing is left.
    pub(super) fn release(&mut self, budget: &mut Budget) -> bool {
        self.clean_up_readers();
        while let Some(grave) = self.graves.front_mut() {
            let done = match grave {
                Grave::State { remains, .. } => {
                    remains.step(&mut self.router, &mut self.interner, budget)
                }
                Grave::Lists(lists) => lists.give_back(budget),
            };
            if !done {
                return false;
            }
            if let Some(Grave::State { remains, frees_slot }) = self.graves.pop_front() {
                if frees_slot {
                    self.free_slots.push(remains.slot);
                }
                self.leave_plan(remains.plan);
            }
        }
        true
    }

    /// Goes on taking apart the state that an instance had before it started over. `Some` when it
    /// is through: with what its subscribers know, if that was asked for.
    pub(super) fn take_apart(
        &mut self,
        id: InstanceId,
        budget: &mut Budget,
    ) -> Option<Option<Snapshot>> {
        let slot = slot(id) as usize;
        let instance = self.instances.get_mut(slot)?.as_deref_mut().filter(|i| i.id == id)?;
        let Some(remains) = &mut instance.remains else { return Some(None) };
        if !remains.step(&mut self.router, &mut self.interner, budget) {
            return None;
        }
        let remains = instance.remains.take()?;
        self.leave_plan(remains.plan);
        Some(remains.into_known())
    }

    /// Gives an instance its plan, an unread state and its routes.
    pub(super) fn attach(&mut self, config: &EngineConfig, id: InstanceId, plan: &Arc<Plan>) {
        let number = self.intern_plan(config, plan);
        let slot = slot(id);
        let mut garbage = Garbage::default();
        let Some(mut instance) = self.instances[slot as usize].take() else { return };
        if let Some(entry) = &mut self.plans[number as usize] {
            instance.plan = number;
            let shape = Arc::clone(&entry.shape);
            instance.restart(&shape, &mut garbage);
            entry.instances += 1;
            entry.users += 1;
            // A second instance with the same key (after a rebind) stays without one.
            entry.by_params.entry(Arc::clone(&instance.params)).or_insert(id);
            let router = &mut self.router;
            instance.groups = shape
                .nodes
                .iter()
                .map(|n| entry.join_group(n, number, slot, &instance.params, router))
                .collect();
        }
        self.instances[slot as usize] = Some(instance);
        self.discard(garbage);
    }

    fn intern_plan(&mut self, config: &EngineConfig, plan: &Arc<Plan>) -> u32 {
        if let Some(&number) = self.by_plan.get(plan) {
            return number;
        }
        let shape = Arc::new(Shape::new(plan, config.overshoot));
        let router = &mut self.router;
        let entry = PlanEntry {
            plan: Arc::clone(plan),
            tables: shape
                .nodes
                .iter()
                .map(|n| router.table(n.table.id, &n.table.primary_key))
                .collect(),
            groups: shape.nodes.iter().map(|_| NodeGroups::default()).collect(),
            shape,
            by_params: HashMap::default(),
            instances: 0,
            users: 0,
            counters: Counters::default(),
        };
        let number = self.free_plans.pop().unwrap_or(self.plans.len() as u32);
        if self.plans.len() == number as usize {
            self.plans.push(None);
        }
        self.plans[number as usize] = Some(entry);
        self.by_plan.insert(Arc::clone(plan), number);
        number
    }

    /// Drops rows that nobody holds, until the budget is spent; without instances the places of
    /// those that are gone, too. Not during an advance, which remembers places.
    pub(super) fn sweep(&mut self, budget: &mut Budget) {
        if !self.release(budget) {
            return;
        }
        self.interner.sweep(budget);
        if self.live == 0 {
            self.instances = Vec::new();
            self.free_slots = Vec::new();
            self.plans = Vec::new();
            self.free_plans = Vec::new();
            self.by_plan = HashMap::default();
            self.graves = VecDeque::new();
            self.router = Router::default();
        }
    }

    /// Takes an instance's state, routes and plan away. The state is the caller's to take apart.
    pub(super) fn detach(&mut self, id: InstanceId) -> Option<Box<Remains>> {
        let remains = self.take_state(id);
        let slot = slot(id);
        let instance = self.instances[slot as usize].as_deref_mut()?;
        let number = instance.plan;
        let groups = std::mem::take(&mut instance.groups);
        if groups.is_empty() {
            // Detached before.
            return remains;
        }
        let entry = self.plans.get_mut(number as usize).and_then(Option::as_mut)?;
        for (n, group) in groups.into_iter().enumerate() {
            if group != NO_GROUP {
                entry.leave_group(NodeId(n as u16), number, slot, group, &mut self.router);
            }
        }
        if entry.by_params.get(&instance.params) == Some(&id) {
            entry.by_params.remove(&instance.params);
        }
        entry.instances -= 1;
        self.leave_plan(number);
        remains
    }

    /// One user of a plan less; a plan that nobody uses is dropped.
    fn leave_plan(&mut self, number: u32) {
        let Some(Some(entry)) = self.plans.get_mut(number as usize) else { return };
        entry.users -= 1;
        if entry.users == 0
            && let Some(entry) = self.plans[number as usize].take()
        {
            self.retired.add(&entry.counters);
            self.by_plan.remove(&entry.plan);
            self.free_plans.push(number);
        }
    }

    /// Takes an instance's partitions away; it stays attached, without any. Nothing, if there are
    /// none.
    fn take_state(&mut self, id: InstanceId) -> Option<Box<Remains>> {
        let slot = slot(id);
        let instance = self.instances[slot as usize].as_deref_mut()?;
        let entry = self.plans.get_mut(instance.plan as usize)?.as_mut()?;
        let nodes = std::mem::take(&mut instance.nodes);
        instance.resident = 0;
        if nodes.is_empty() {
            return None;
        }
        entry.users += 1;
        Some(Box::new(Remains::new(&entry.shape, &entry.tables, instance.plan, slot, nodes)))
    }

    /// Starts an instance over, keeping its plan. What it held is to be taken apart by
    /// [`Registry::take_apart`]; with `note_known` that says what its subscribers know.
    pub(super) fn start_over(&mut self, id: InstanceId, note_known: bool) {
        let remains = self.take_state(id);
        let Some(instance) = self.instances[slot(id) as usize].as_deref_mut() else { return };
        let mut garbage = Garbage::default();
        if let Some(entry) = self.plans.get(instance.plan as usize).and_then(Option::as_ref) {
            instance.restart(&entry.shape, &mut garbage);
        }
        let earlier = remains.and_then(|mut remains| {
            if note_known {
                remains.note_known();
            }
            // A new plan: what was held by the old one counts, and this was never read.
            match &instance.remains {
                Some(_) => Some(remains),
                None => instance.remains.replace(remains),
            }
        });
        self.discard(garbage);
        earlier.into_iter().for_each(|remains| self.bury(remains));
    }

    /// An instance is hydrated.
    pub(super) fn hydrated(&mut self, id: InstanceId) {
        self.hydrating.remove(&id);
    }

    /// Number of instances.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    /// A parked instance is being read anew; true if it was parked.
    pub(super) fn unpark(&mut self, id: InstanceId) -> bool {
        if let Some(instance) = self.get_mut(id) {
            instance.parked = None;
        }
        self.parked.remove(&id)
    }

    /// An instance gives up: its memory goes, the error stays until it is unsubscribed.
    pub(super) fn fail(&mut self, id: InstanceId, error: EngineError) {
        let remains = self.detach(id);
        let earlier = self.get_mut(id).and_then(|i| i.remains.take());
        earlier.into_iter().chain(remains).for_each(|remains| self.bury(remains));
        self.hydrating.remove(&id);
        self.unpark(id);
        let known = self.get_mut(id).and_then(|i| i.known.take());
        self.forget(known);
        if let Some(instance) = self.get_mut(id) {
            instance.unbound = false;
            instance.phase = Phase::Failed(error);
        }
    }

    /// Works on one instance with everything it needs.
    pub(super) fn work<T>(
        &mut self,
        id: InstanceId,
        source: &mut dyn Source,
        budget: &mut Budget,
        run: impl FnOnce(&mut Instance, &mut Work<'_>) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let slot = slot(id);
        let mut instance = self
            .instances
            .get_mut(slot as usize)
            .and_then(|i| i.take_if(|i| i.id == id))
            .ok_or(EngineError::UnknownInstance)?;
        let result = match self.plans.get_mut(instance.plan as usize) {
            Some(Some(entry)) => {
                let mut work = Work {
                    shape: &entry.shape,
                    tables: &entry.tables,
                    plan: instance.plan,
                    slot,
                    router: &mut self.router,
                    interner: &mut self.interner,
                    source,
                    budget,
                    counters: &mut entry.counters,
                };
                run(&mut instance, &mut work)
            }
            _ => Err(EngineError::Invariant("an instance has no plan")),
        };
        self.instances[slot as usize] = Some(instance);
        result
    }

    /// The plan of a target and all instances.
    pub(super) fn interested(&mut self, plan: u32) -> Option<Interested<'_>> {
        let plan = self.plans.get_mut(plan as usize)?.as_mut()?;
        Some(Interested { plan, instances: &self.instances, hydrating: &self.hydrating })
    }

    /// The plan of each node on the rest list of a table, and all instances; how many.
    pub(super) fn for_each_rest(
        &mut self,
        table: RouteTableId,
        visit: &mut dyn FnMut(&mut Interested<'_>, u32, NodeId),
    ) -> u64 {
        let Registry { router, plans, instances, hydrating, .. } = self;
        let mut nodes = 0;
        for (number, node) in router.rest(table) {
            nodes += 1;
            if let Some(Some(plan)) = plans.get_mut(number as usize) {
                visit(&mut Interested { plan, instances, hydrating }, number, node);
            }
        }
        nodes
    }

    pub(super) fn stats(&self) -> EngineStats {
        let mut stats = EngineStats {
            plans: self.by_plan.len(),
            instances: self.live,
            subscriptions: self.subscriptions,
            interned_rows: self.interner.len(),
            parked: self.parked.len(),
            routes: self.router.len(),
            counters: self.retired,
            ..EngineStats::default()
        };
        for instance in self.instances() {
            let (partitions, rows) = instance.size();
            stats.partitions += partitions;
            stats.resident_rows += rows;
        }
        self.plans().for_each(|(_, p)| stats.counters.add(&p.counters));
        stats
    }
}

impl PlanEntry {
    /// Slots of a group of the owner of a node.
    pub(super) fn members(&self, node: NodeId, group: u32) -> Option<&SmallSet<u32>> {
        let owner = self.shape.node(node).owner.unwrap_or(node);
        let groups = &self.groups[usize::from(owner.0)].groups;
        groups.get(group as usize).map(|g| &g.members)
    }

    /// Numbers of groups of the owner of a node end here.
    pub(super) fn groups_end(&self, node: NodeId) -> u32 {
        let owner = self.shape.node(node).owner.unwrap_or(node);
        self.groups[usize::from(owner.0)].groups.len() as u32
    }

    /// Groups of the owner of a node that have members.
    pub(super) fn groups(&self, node: NodeId) -> impl Iterator<Item = (u32, &SmallSet<u32>)> {
        let owner = self.shape.node(node).owner.unwrap_or(node);
        self.groups[usize::from(owner.0)]
            .groups
            .iter()
            .enumerate()
            .map(|(i, g)| (i as u32, &g.members))
            .filter(|(_, m)| !m.is_empty())
    }

    fn join_group(
        &mut self,
        owner: &NodeShape,
        plan: u32,
        slot: u32,
        params: &[Param],
        router: &mut Router,
    ) -> u32 {
        if owner.owner != Some(owner.id) {
            return NO_GROUP;
        }
        let own: Box<[Param]> =
            owner.group_params.iter().map(|p| params[usize::from(p.0)].clone()).collect();
        let groups = &mut self.groups[usize::from(owner.id.0)];
        if let Some(&group) = groups.by_params.get(&own) {
            groups.groups[group as usize].members.insert(slot);
            return group;
        }
        let first = groups.by_params.is_empty();
        let group = groups.free.pop().unwrap_or(groups.groups.len() as u32);
        let mut made = Group { params: own.clone(), members: SmallSet::default() };
        made.members.insert(slot);
        match groups.groups.get_mut(group as usize) {
            Some(free) => *free = made,
            None => groups.groups.push(made),
        }
        groups.by_params.insert(own, group);
        for node in self.shape.owned(owner.id) {
            let table = self.tables[usize::from(node.id.0)];
            let to = Target { plan, node: node.id, who: Who::Group(group) };
            match &node.access {
                Access::Equal(any) => {
                    for equal in any {
                        for key in equal.keys(params) {
                            router.add(table, &equal.columns, key, to);
                        }
                    }
                }
                Access::Between(between) => {
                    router.add_range(table, between.column, between.range(params), to);
                }
                Access::All if first => router.add_rest(table, plan, node.id),
                Access::All => {}
            }
        }
        group
    }

    fn leave_group(
        &mut self,
        owner: NodeId,
        plan: u32,
        slot: u32,
        group: u32,
        router: &mut Router,
    ) {
        let groups = &mut self.groups[usize::from(owner.0)];
        let members = &mut groups.groups[group as usize].members;
        members.remove(slot);
        if !members.is_empty() {
            return;
        }
        let own = std::mem::take(&mut groups.groups[group as usize].params);
        groups.by_params.remove(&own);
        groups.free.push(group);
        let last = groups.by_params.is_empty();
        // The group's own parameters, put back where the access paths look for them.
        let shape = &self.shape;
        let mut params = vec![Param::Value(Value::Null); usize::from(shape.plan.params)];
        for (id, param) in shape.node(owner).group_params.iter().zip(own) {
            params[usize::from(id.0)] = param;
        }
        for node in shape.owned(owner) {
            let table = self.tables[usize::from(node.id.0)];
            let to = Target { plan, node: node.id, who: Who::Group(group) };
            match &node.access {
                Access::Equal(any) => {
                    for equal in any {
                        for key in equal.keys(&params) {
                            router.remove(table, &equal.columns, &key, to);
                        }
                    }
                }
                Access::Between(between) => {
                    router.remove_range(table, between.column, &between.range(&params), to);
                }
                Access::All if last => router.remove_rest(table, plan, node.id),
                Access::All => {}
            }
        }
    }
}

/// Where an instance lives.
pub(super) fn slot(id: InstanceId) -> u32 {
    (id.0 & ((1 << SLOT_BITS) - 1)) as u32
}
