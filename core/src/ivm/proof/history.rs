//! Random histories: an engine with a few instances, commits merged or not, budgets of any size,
//! instances dropped and subscribed anew, schema changes, resets; compared with the oracle at
//! each stop. A history that fails is reported as a small script.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::runner::{Failure, MakeSource, Replayed, Runner};
use super::script::{Operation, Script, edits};
use super::shrink::shrink;
use super::worlds::{PlanWorld, QueryWorld, World};
use crate::ivm::engine::{EngineConfig, Overshoot};

/// Commits per history.
const COMMITS: usize = 12;
/// Commits per history of a large world.
const LARGE_COMMITS: usize = 4;
/// One history in this many has a large world.
const LARGE_EVERY: u64 = 512;
/// Most subscribers at a time.
const SUBSCRIBERS: usize = 12;

/// Runs the history of a seed and returns the number of advances that were compared.
///
/// # Errors
/// What is wrong, and a small script that shows it.
pub fn run<S: Replayed>(seed: u64, make: MakeSource<'_, S>) -> Result<u64, String> {
    let mut history = History::new(seed);
    let what = match history.guarded(make) {
        Ok(steps) => return Ok(steps),
        Err(what) => what,
    };
    let small = shrink(&history.script, &mut |s| fails(s, make));
    Err(format!("seed {seed}: {what}\nreduced to:\n{small}\n{:?}", replay(&small, make)))
}

/// Whether the history of a seed fails; without reducing it.
pub fn is_wrong<S: Replayed>(seed: u64, make: MakeSource<'_, S>) -> bool {
    History::new(seed).guarded(make).is_err()
}

/// Runs a script.
///
/// # Errors
/// [`Failure`]; a panic of the engine is one.
pub fn replay<S: Replayed>(script: &Script, make: MakeSource<'_, S>) -> Result<u64, Failure> {
    let result = catch_unwind(AssertUnwindSafe(|| {
        let mut runner = Runner::new(script, make)?;
        script.operations.iter().try_for_each(|o| runner.execute(o))?;
        runner.finish()
    }));
    result.unwrap_or_else(|_| Err(Failure::Wrong("the engine panicked".into())))
}

/// Runs a script; if it fails, makes it small.
///
/// # Errors
/// What is wrong, and a small script that shows it.
pub fn check<S: Replayed>(script: &Script, make: MakeSource<'_, S>) -> Result<u64, String> {
    match replay(script, make) {
        Ok(steps) => Ok(steps),
        Err(what) => {
            let small = shrink(script, &mut |s| fails(s, make));
            Err(format!("{what:?}\nreduced to:\n{small}\n{:?}", replay(&small, make)))
        }
    }
}

fn fails<S: Replayed>(script: &Script, make: MakeSource<'_, S>) -> bool {
    matches!(replay(script, make), Err(Failure::Wrong(_)))
}

/// A script that is being invented while it runs.
struct History {
    world: Box<dyn World>,
    rng: StdRng,
    commits: usize,
    script: Script,
}

impl History {
    fn new(seed: u64) -> History {
        let (mut world, commits): (Box<dyn World>, _) = if seed % LARGE_EVERY == LARGE_EVERY - 1 {
            (Box::new(PlanWorld::large(seed)), LARGE_COMMITS)
        } else if seed.is_multiple_of(4) {
            (Box::new(QueryWorld::new(seed)), COMMITS)
        } else {
            (Box::new(PlanWorld::new(seed)), COMMITS)
        };
        let mut rng = StdRng::seed_from_u64(!seed);
        let db = world.database();
        let schema = world.schema();
        // Of a few only: a parked instance is compared as a whole, which hides what is wrong. By
        // the seed, not by a draw, so that the seeds of the mutants stay what they are.
        let max_rows = match seed % 16 {
            7 | 8 | 13 => (seed / 16 % 6) as usize,
            _ => usize::MAX,
        };
        let config = EngineConfig {
            max_instances: 16,
            max_rows,
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
        let tables = schema.tables.values();
        let rows =
            tables.flat_map(|t| db.rows(t.id).map(|r| (t.id, Box::from(&r.values)))).collect();
        let script = Script { config, schema, rows, queries, operations: Vec::new() };
        History { world, rng, commits, script }
    }

    /// Plays; a panic of the engine is an error like any other.
    fn guarded<S: Replayed>(&mut self, make: MakeSource<'_, S>) -> Result<u64, String> {
        let result = catch_unwind(AssertUnwindSafe(|| self.play(make)));
        match result.unwrap_or_else(|_| Err(Failure::Wrong("the engine panicked".into()))) {
            Ok(steps) => Ok(steps),
            Err(Failure::Wrong(what)) => Err(what),
            Err(Failure::Invalid) => Err("the generator made two rows with one key".into()),
        }
    }

    fn play<S: Replayed>(&mut self, make: MakeSource<'_, S>) -> Result<u64, Failure> {
        let mut runner = Runner::new(&self.script, make)?;
        for query in 0..self.script.queries.len() {
            self.go(&mut runner, Operation::Subscribe(query))?;
        }
        for i in 0..runner.subscribers() {
            // Some are still hydrating when the first commits come.
            let fully = self.rng.random_range(0..4) > 0;
            self.hydrate(&mut runner, i, fully)?;
        }
        for _ in 0..self.commits {
            if self.rng.random_range(0..40) == 0
                && let Some(table) = self.world.alterable()
            {
                self.go(&mut runner, Operation::Alter(table))?;
            }
            let mut db = runner.database().clone();
            let commit = self.world.commit(&mut db, runner.version());
            self.go(&mut runner, Operation::Commit(edits(&commit)))?;
            if self.rng.random_range(0..4) > 0 {
                self.advance(&mut runner)?;
                self.churn(&mut runner)?;
            }
        }
        runner.finish()
    }

    /// Executes and remembers.
    fn go<S: Replayed>(&mut self, runner: &mut Runner<S>, op: Operation) -> Result<(), Failure> {
        self.script.operations.push(op);
        let op = &self.script.operations[self.script.operations.len() - 1];
        runner.execute(op)
    }

    fn units(&mut self) -> Option<u64> {
        match self.rng.random_range(0..4) {
            0 => Some(1),
            1 => Some(self.rng.random_range(2..40)),
            _ => None,
        }
    }

    fn hydrate<S: Replayed>(
        &mut self,
        runner: &mut Runner<S>,
        i: usize,
        fully: bool,
    ) -> Result<(), Failure> {
        while !runner.is_hydrated(i) && !runner.is_behind() {
            let units = if fully { self.units() } else { Some(1) };
            self.go(runner, Operation::Hydrate(i, units))?;
            if !fully && self.rng.random_range(0..2) > 0 {
                break;
            }
        }
        Ok(())
    }

    fn advance<S: Replayed>(&mut self, runner: &mut Runner<S>) -> Result<(), Failure> {
        let reset = self.rng.random_range(0..40) == 0;
        self.go(runner, if reset { Operation::Reset } else { Operation::Advance })?;
        while runner.engine().is_advancing() {
            let units = self.units();
            self.go(runner, Operation::Step(units))?;
            // Comes and goes in the middle of an advance.
            if runner.engine().is_advancing() && self.rng.random_range(0..8) == 0 {
                if self.rng.random_range(0..3) == 0 && runner.subscribers() > 0 {
                    let i = self.rng.random_range(0..runner.subscribers());
                    self.go(runner, Operation::Unsubscribe(i))?;
                } else if runner.subscribers() < SUBSCRIBERS {
                    self.go(runner, Operation::Subscribe(0))?;
                }
            }
        }
        Ok(())
    }

    /// Drops and adds subscriptions; hydrates what is not.
    fn churn<S: Replayed>(&mut self, runner: &mut Runner<S>) -> Result<(), Failure> {
        if self.rng.random_range(0..6) == 0 && runner.subscribers() > 0 {
            let i = self.rng.random_range(0..runner.subscribers());
            self.go(runner, Operation::Unsubscribe(i))?;
        }
        if self.rng.random_range(0..6) == 0 && runner.subscribers() < SUBSCRIBERS {
            let query = self.rng.random_range(0..self.script.queries.len());
            self.go(runner, Operation::Subscribe(query))?;
        }
        for i in 0..runner.subscribers() {
            if !runner.is_hydrated(i) {
                let fully = self.rng.random_range(0..2) == 0;
                self.hydrate(runner, i, fully)?;
            }
        }
        Ok(())
    }
}
