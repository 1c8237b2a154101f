//! One random history: an engine with a few instances, commits merged or not, budgets of any
//! size, instances dropped and subscribed anew, resets; checked against the oracle at each stop.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::generator::{PlanWorld, QueryWorld, World};
use crate::change::Commit;
use crate::ivm::brute::{self, Multiset};
use crate::ivm::delta::{Advanced, RowDelta};
use crate::ivm::engine::{
    Budget, Engine, EngineConfig, InstanceId, Overshoot, Progress, Reset, Status,
};
use crate::ivm::memory_source::MemorySource;
use crate::ivm::plan::{Param, Plan};
use crate::ivm::signature::RowName;
use crate::version::StateVersion;

/// What a subscriber knows.
struct Subscriber {
    id: InstanceId,
    plan: Arc<Plan>,
    params: Arc<[Param]>,
    /// Empty until hydrated.
    rows: Option<Multiset>,
}

pub(super) struct History {
    world: Box<dyn World>,
    rng: StdRng,
    engine: Engine,
    source: MemorySource,
    queries: Vec<(Arc<Plan>, Arc<[Param]>)>,
    subscribers: Vec<Subscriber>,
    /// Commits that the source has seen and the engine has not.
    pending: Vec<Arc<Commit>>,
}

/// Commits per history.
const COMMITS: usize = 12;

/// Runs the history of a seed; the error says what is wrong.
pub(super) fn run(seed: u64) -> Result<(), String> {
    let mut history = History::new(seed);
    let all = history.play();
    all.map_err(|e| format!("seed {seed}: {e}\n{}", history.describe()))
}

impl History {
    fn new(seed: u64) -> History {
        let mut world: Box<dyn World> = if seed.is_multiple_of(4) {
            Box::new(QueryWorld::new(seed))
        } else {
            Box::new(PlanWorld::new(seed))
        };
        let mut rng = StdRng::seed_from_u64(!seed);
        let db = world.database();
        let version = StateVersion::from_lsn(1);
        let config = EngineConfig {
            max_instances: 16,
            max_rows: *[usize::MAX, usize::MAX, 0, 5].choose(&mut rng).unwrap_or(&0),
            overshoot: Overshoot::Fixed(rng.random_range(0..3)),
            lead_above: rng.random_range(0..3),
            rehydrate_above: *[usize::MAX, usize::MAX, usize::MAX, 0, 2]
                .choose(&mut rng)
                .unwrap_or(&0),
        };
        let mut queries = Vec::new();
        for _ in 0..*[1, 1, 2].choose(&mut rng).unwrap_or(&1) {
            let (plan, params) = world.query();
            for _ in 0..*[0, 0, 1, 2].choose(&mut rng).unwrap_or(&0) {
                queries.push((plan.clone(), world.vary(&params).into()));
            }
            queries.push((plan, params.into()));
        }
        History {
            engine: Engine::new(config, version.clone(), world.schema()),
            source: MemorySource::new(db, version),
            queries,
            subscribers: Vec::new(),
            pending: Vec::new(),
            world,
            rng,
        }
    }

    fn play(&mut self) -> Result<(), String> {
        for (plan, params) in self.queries.clone() {
            self.subscribe(plan, params)?;
        }
        for i in 0..self.subscribers.len() {
            // Some are still hydrating when the first commits come.
            if self.rng.random_range(0..4) > 0 {
                self.hydrate(i, true)?;
            } else {
                self.hydrate(i, false)?;
            }
        }
        for _ in 0..COMMITS {
            let commit = self.world.commit(&mut self.source.db, &self.source.version);
            self.source.version = commit.version.clone();
            self.pending.push(commit);
            if self.rng.random_range(0..4) > 0 {
                self.advance()?;
                self.churn()?;
            }
        }
        self.advance()?;
        for i in 0..self.subscribers.len() {
            self.hydrate(i, true)?;
        }
        for subscriber in std::mem::take(&mut self.subscribers) {
            self.engine.unsubscribe(subscriber.id);
        }
        // The database and the commits hold rows too.
        let db = std::mem::take(&mut self.source.db);
        drop(db);
        self.engine.sweep();
        let s = self.engine.stats();
        let left = [s.plans, s.instances, s.subscriptions, s.partitions, s.interned_rows, s.routes];
        if left == [0; 6] { Ok(()) } else { Err(format!("memory stays behind: {s:?}")) }
    }

    fn budget(&mut self) -> Budget {
        match self.rng.random_range(0..4) {
            0 => Budget::units(1),
            1 => Budget::units(self.rng.random_range(2..40)),
            _ => Budget::unlimited(),
        }
    }

    fn subscribe(&mut self, plan: Arc<Plan>, params: Arc<[Param]>) -> Result<(), String> {
        let id = self.engine.subscribe(&plan, params.clone()).map_err(|e| e.to_string())?;
        self.subscribers.push(Subscriber { id, plan, params, rows: None });
        Ok(())
    }

    fn hydrate(&mut self, i: usize, fully: bool) -> Result<(), String> {
        loop {
            let mut budget = if fully { self.budget() } else { Budget::units(1) };
            let id = self.subscribers[i].id;
            let step = self.engine.hydrate_step(id, &mut self.source, &mut budget);
            match step.map_err(|e| format!("hydration: {e}"))? {
                Progress::Done => break,
                Progress::More if fully || self.rng.random_range(0..2) == 0 => {}
                Progress::More => return Ok(()),
                Progress::Blocked => return Err("blocked without an advance".into()),
            }
        }
        let s = &mut self.subscribers[i];
        if s.rows.is_none() {
            s.rows = Some(held(&self.engine, s.id)?);
        }
        self.check(i)
    }

    fn advance(&mut self) -> Result<(), String> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let commits = std::mem::take(&mut self.pending);
        if self.rng.random_range(0..40) == 0 {
            let version = self.source.version.clone();
            self.engine
                .begin_reset(version, self.world.schema(), &Reset::All)
                .map_err(|e| e.to_string())?;
        } else {
            self.engine.begin_advance(&commits).map_err(|e| e.to_string())?;
        }
        let advanced = loop {
            let mut budget = self.budget();
            let step = self.engine.advance_step(&mut self.source, &mut budget);
            if let Some(advanced) = step.map_err(|e| e.to_string())? {
                break advanced;
            }
            if self.rng.random_range(0..8) == 0 {
                // Comes and goes in the middle of an advance.
                let (plan, params) = self.queries[0].clone();
                self.subscribe(plan, params)?;
            }
        };
        self.apply(&advanced)?;
        (0..self.subscribers.len()).try_for_each(|i| self.check(i))
    }

    fn apply(&mut self, advanced: &Advanced) -> Result<(), String> {
        if let Some((_, error)) = advanced.failed.first() {
            return Err(format!("an instance failed: {error}"));
        }
        if advanced.version != self.source.version {
            return Err("advanced to another version".into());
        }
        let mut seen = std::collections::BTreeSet::new();
        for delta in &advanced.deltas {
            if delta.rows.is_empty() || !seen.insert(delta.instance) {
                return Err("an empty or second list of deltas".into());
            }
            for s in self.subscribers.iter_mut().filter(|s| s.id == delta.instance) {
                let Some(rows) = &mut s.rows else {
                    // Subscribed in the middle: reads the rows when it attaches.
                    continue;
                };
                delta.rows.iter().try_for_each(|d| apply(rows, d))?;
            }
        }
        Ok(())
    }

    /// Drops and adds subscriptions; hydrates what is not.
    fn churn(&mut self) -> Result<(), String> {
        if self.rng.random_range(0..6) == 0 && !self.subscribers.is_empty() {
            let i = self.rng.random_range(0..self.subscribers.len());
            let gone = self.subscribers.swap_remove(i);
            self.engine.unsubscribe(gone.id);
        }
        if self.rng.random_range(0..6) == 0 && self.subscribers.len() < 12 {
            let at = self.rng.random_range(0..self.queries.len());
            let (plan, params) = self.queries[at].clone();
            self.subscribe(plan, params)?;
        }
        for i in 0..self.subscribers.len() {
            if self.subscribers[i].rows.is_none() {
                let fully = self.rng.random_range(0..2) == 0;
                self.hydrate(i, fully)?;
            }
        }
        Ok(())
    }

    /// The subscriber's rows, the engine's answers and the oracle agree.
    fn check(&mut self, i: usize) -> Result<(), String> {
        self.check_answers(i)?;
        let s = &self.subscribers[i];
        if s.rows.is_some() && self.engine.is_parked(s.id) {
            let mut budget = Budget::unlimited();
            let step = self.engine.hydrate_step(s.id, &mut self.source, &mut budget);
            step.map_err(|e| format!("reading a parked instance: {e}"))?;
            return self.check_answers(i);
        }
        Ok(())
    }

    fn check_answers(&self, i: usize) -> Result<(), String> {
        let s = &self.subscribers[i];
        let Some(known) = &s.rows else { return Ok(()) };
        let wanted = brute::sync(&s.plan, &s.params, &self.source.db);
        compare("what was emitted", known, &wanted)?;
        if !self.engine.is_parked(s.id) {
            compare("what is held", &held(&self.engine, s.id)?, &wanted)?;
        }
        let status = self.engine.status(s.id).map_err(|e| e.to_string())?;
        if !matches!(status, Status::Ready) {
            return Err(format!("status {status:?}"));
        }
        let mut signature = 0;
        let specs: BTreeMap<_, _> = s.plan.nodes.iter().map(|n| (n.table.id, &n.table)).collect();
        for table in specs.into_values() {
            let name = RowName::new(table);
            for row in self.source.db.rows(table.id) {
                let id = crate::row::RowId::of(table, row);
                let count = self.engine.count(s.id, table.id, row).map_err(|e| e.to_string())?;
                if count != wanted.get(&id).map_or(0, |w| w.0) {
                    return Err(format!("count of {id:?} is {count}"));
                }
                if count % 2 == 1 {
                    signature ^= name.hash(row);
                }
            }
        }
        if self.engine.signature(s.id).map_err(|e| e.to_string())? != signature {
            return Err("signature".into());
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let mut out = format!("{:#?}\n", self.queries);
        for table in self.world.schema().tables.values() {
            out += &format!("{} by {:?}\n", table.name, table.primary_key);
            for row in self.source.db.rows(table.id) {
                out += &format!("  {:?}\n", row.values);
            }
        }
        out
    }
}

fn held(engine: &Engine, id: InstanceId) -> Result<Multiset, String> {
    let mut rows = Multiset::new();
    for held in engine.rows(id).map_err(|e| e.to_string())? {
        let row_id = crate::row::RowId::of(held.table, held.row);
        if rows.insert(row_id.clone(), (held.count, held.row.clone())).is_some() {
            return Err(format!("{row_id:?} is listed twice"));
        }
    }
    Ok(rows)
}

fn apply(rows: &mut Multiset, d: &RowDelta) -> Result<(), String> {
    let known = rows.get(&d.id);
    if known.map_or(0, |k| k.0) != d.count_before {
        return Err(format!("{d:?} for {known:?}"));
    }
    let (Some(row), true) = (&d.row, d.count_after > 0) else {
        rows.remove(&d.id);
        return if d.row.is_none() && d.count_before > 0 && d.count_after == 0 {
            Ok(())
        } else {
            Err(format!("{d:?}"))
        };
    };
    let changed = known.is_some_and(|k| k.1.version != row.version);
    if changed != d.content_changed || (!changed && d.count_before == d.count_after) {
        return Err(format!("{d:?} for {known:?}"));
    }
    rows.insert(d.id.clone(), (d.count_after, row.clone()));
    Ok(())
}

fn compare(what: &str, have: &Multiset, want: &Multiset) -> Result<(), String> {
    type Plain<'a> =
        BTreeMap<&'a crate::row::RowId, (u64, &'a StateVersion, &'a [crate::value::Value])>;
    fn plain(m: &Multiset) -> Plain<'_> {
        m.iter().map(|(id, (n, row))| (id, (*n, &row.version, &*row.values))).collect()
    }
    let (have, want) = (plain(have), plain(want));
    if have == want {
        return Ok(());
    }
    let mut text = format!("{what} differs from the oracle (id: have / want)\n");
    for id in have.keys().chain(want.keys()).collect::<std::collections::BTreeSet<_>>() {
        let (h, w) = (have.get(*id), want.get(*id));
        if h != w {
            text += &format!("  {id:?}: {h:?} / {w:?}\n");
        }
    }
    Err(text)
}
