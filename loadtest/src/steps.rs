//! The steps of a scenario.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::api::Api;
use crate::client::connection::{ClientSetup, Pace};
use crate::data_set::{Query, client_schema};
use crate::error::LoadError;
use crate::result::{Distribution, StepResult};
use crate::run::{Stage, Watch};
use crate::scenario::{Step, Writes};
use crate::search::{Search, Tried, is_lost, judge};
use crate::writer::{WritePlan, Writers};

/// How long clients may take to get all that they asked for.
const COMPLETE_TIMEOUT: Duration = Duration::from_secs(180);

/// Writes may be late by this before they are given up: then nothing is sustained anyhow.
const WRITE_GRACE: Duration = Duration::from_secs(20);

/// What a trial takes besides its writes, at least.
const TRIAL_ENDING: Duration = Duration::from_secs(3);

/// How fast rows change while clients are away.
const MEANWHILE_PER_SECOND: f64 = 500.0;

/// So long before the first connect all clients are made, and so long for each of them: browsers do
/// not wait for each other's pages either.
const LEAD: Duration = Duration::from_millis(20);
const LEAD_PER_CLIENT: Duration = Duration::from_micros(100);

/// A slow client waits this long before each read.
const SLOW_PAUSE: Duration = Duration::from_millis(200);

impl Stage<'_> {
    /// Plays one step. Counts protocol violations.
    pub(crate) fn step(
        &mut self,
        step: &Step,
        violations: &mut u64,
    ) -> Result<StepResult, LoadError> {
        let label = step.label();
        let result = match step {
            Step::Idle { seconds } => {
                let mut watch = self.watch(&label)?;
                self.wait(&mut watch, Duration::from_secs_f64(*seconds), |_| false)?;
                *violations += watch.total.violations;
                self.finish(watch, *seconds, true)
            }
            Step::Connect { groups, per_second } => {
                self.connect(&label, *groups, *per_second, violations)
            }
            Step::Write { rate, seconds, slow, stalled, writes } => {
                self.set_paces(*slow, *stalled)?;
                let tried = self.write(&label, *rate, *seconds, f64::MAX, writes, violations)?;
                Ok(tried.step)
            }
            Step::Search { from, seconds, refine, limit_ms, writes } => {
                let search = Search::new(*seconds, *refine);
                let from = from.of(self.kind);
                self.search(search, &label, from, *seconds, *limit_ms, writes, violations)
            }
            Step::Reconnect { writes_meanwhile, away_seconds, writes } => {
                let away = Duration::from_secs_f64(*away_seconds);
                self.reconnect(&label, away, *writes_meanwhile, writes, violations)
            }
            Step::Mutate { rate, seconds } => self.mutate(&label, *rate, *seconds, violations),
            Step::Churn { rate, seconds } => self.churn(&label, *rate, *seconds, violations),
        }?;
        Ok(result)
    }

    /// Tries rates until the limit is found or time is up.
    #[expect(clippy::too_many_arguments, reason = "the fields of a step")]
    fn search(
        &mut self,
        search: Search,
        label: &str,
        from: f64,
        seconds: f64,
        limit_ms: f64,
        writes: &Writes,
        violations: &mut u64,
    ) -> Result<StepResult, LoadError> {
        search.drive(label, from, limit_ms, |rate| {
            if *violations > 0 {
                return Ok(Err("the protocol was violated".to_owned()));
            }
            if self.left() < Duration::from_secs_f64(seconds) + TRIAL_ENDING {
                return Ok(Err("time was up".to_owned()));
            }
            let name = format!("{label}: trying {rate:.0}/s");
            self.write(&name, rate, seconds, limit_ms, writes, violations).map(Ok)
        })
    }

    /// Waits for all clients, then for their rows to be right.
    fn settle(&mut self, mut watch: Watch, violations: &mut u64) -> Result<StepResult, LoadError> {
        let clients = self.queries.len();
        let complete =
            self.wait(&mut watch, COMPLETE_TIMEOUT, |fleet| fleet.complete() == clients)?;
        // The last client's own time: looking every few milliseconds adds up to a tick to it.
        let end = self.fleet.completed_at().filter(|_| complete).unwrap_or_else(Instant::now);
        let seconds = end.saturating_duration_since(watch.begin).as_secs_f64();
        let step = self.finish(watch, seconds, complete)?;
        *violations += step.complaints.iter().filter(|c| c.contains("violation")).count() as u64;
        Ok(step)
    }

    fn connect(
        &mut self,
        label: &str,
        groups: usize,
        per_second: Option<f64>,
        violations: &mut u64,
    ) -> Result<StepResult, LoadError> {
        let tabs = self.scenario.tabs;
        let present = self.queries.len() / tabs;
        let setups = self.setups(present..groups);
        let mut watch = self.watch(label)?;
        let clients = u32::try_from(setups.len()).unwrap_or(u32::MAX);
        let start = Instant::now() + LEAD + LEAD_PER_CLIENT.saturating_mul(clients);
        watch.begin = start;
        for (nth, setup) in setups.into_iter().enumerate() {
            let group = (nth / tabs) as f64;
            let delay = per_second.map_or(0.0, |rate| group / rate);
            let at = start + Duration::from_secs_f64(delay);
            self.fleet.open(setup, at).map_err(LoadError::io("opening a client"))?;
        }
        self.settle(watch, violations)
    }

    /// The clients of these groups.
    fn setups(&mut self, groups: Range<usize>) -> Vec<ClientSetup> {
        let schema: Arc<str> = client_schema(&self.scenario.data).to_string().into();
        let mut setups = Vec::new();
        for group in groups {
            for tab in 0..self.scenario.tabs {
                let data = &self.scenario.data;
                let queries: Vec<Query> =
                    self.scenario.queries.iter().map(|q| q.for_group(group, data)).collect();
                setups.push(ClientSetup {
                    index: self.queries.len(),
                    client_id: format!("c{group}-{tab}"),
                    group_id: format!("g{group}"),
                    queries: queries.iter().map(Query::ask).collect(),
                    client_schema: schema.clone(),
                    counts_new: data.model.only_adds(),
                    protocol: self.scenario.protocol,
                });
                self.queries.push(queries);
            }
        }
        setups
    }

    fn set_paces(&mut self, slow: f64, stalled: f64) -> Result<(), LoadError> {
        let clients = self.queries.len();
        let stalled = (clients as f64 * stalled).round() as usize;
        let slow = (clients as f64 * slow).round() as usize;
        for nth in 0..stalled + slow {
            // Spread evenly over all clients.
            let index = nth * clients / (stalled + slow);
            let pace = if nth < stalled { Pace::Stalled } else { Pace::Slow(SLOW_PAUSE) };
            self.fleet.set_pace(index, pace).map_err(LoadError::io("slowing a client"))?;
        }
        Ok(())
    }

    fn plan(&mut self, rate: f64, seconds: f64, writes: &Writes) -> WritePlan {
        self.write_seed += 1;
        let groups = self.queries.len() / self.scenario.tabs;
        WritePlan {
            per_second: rate,
            duration: Duration::from_secs_f64(seconds),
            target: writes.to,
            change: writes.change,
            rows: writes.rows,
            watched: groups.min(self.scenario.data.watched()),
            data: self.scenario.data.clone(),
            seed: self.write_seed,
        }
    }

    /// Writes for some time, waits until everything has arrived, and judges.
    fn write(
        &mut self,
        label: &str,
        rate: f64,
        seconds: f64,
        limit_ms: f64,
        writes: &Writes,
        violations: &mut u64,
    ) -> Result<Tried, LoadError> {
        let plan = self.plan(rate, seconds, writes);
        let mut watch = self.watch(label)?;
        let writers = Writers::start(&self.url, plan)?;
        let meter = self.meter();
        let patience = Duration::from_secs_f64(seconds) + WRITE_GRACE;
        let begin = Instant::now();
        while !writers.is_done() {
            let lost = is_lost(&watch.samples, limit_ms);
            if lost || begin.elapsed() > patience || self.left().is_zero() {
                writers.stop();
                self.wait(&mut watch, WRITE_GRACE, |_| writers.is_done())?;
                break;
            }
            self.tick(&mut watch)?;
        }
        let usage = meter.until(&self.meter());
        let writing = begin.elapsed().as_secs_f64();
        let written = writers.join();
        let samples = watch.samples.len();
        for index in 0..self.queries.len() {
            self.fleet.set_pace(index, Pace::Normal).map_err(LoadError::io("waking a client"))?;
        }
        let mut comparison = self.comparison()?;
        let difference = self.converge(&mut watch, &mut comparison)?;
        let clients = self.queries.len();
        let all_there =
            self.wait(&mut watch, COMPLETE_TIMEOUT, |fleet| fleet.complete() == clients)?;
        *violations += watch.total.violations;
        let settled = difference.is_none() && all_there;
        // A trial that was given up lasted shorter, one that was late longer.
        let lasted = if writing < seconds { writing } else { seconds };
        let mut step = self.finish(watch, lasted, settled)?;
        step.complaints.extend(written.failure.clone());
        step.complaints.extend(difference);
        step.transactions = written.transactions;
        step.commit = Distribution::of(&written.commit);
        step.usage = usage;
        let intended = (rate * seconds).round() as u64;
        let timeline = &step.timeline[..samples.min(step.timeline.len())];
        let mut commits_late = false;
        let reason = judge(&step, intended, limit_ms, timeline, &mut commits_late);
        let limit = if reason.is_some() { step.usage.limit(commits_late) } else { String::new() };
        Ok(Tried { step, reason, limit })
    }

    fn reconnect(
        &mut self,
        label: &str,
        away: Duration,
        writes_meanwhile: u32,
        writes: &Writes,
        violations: &mut u64,
    ) -> Result<StepResult, LoadError> {
        let clients = self.queries.len();
        let mut leaving = self.watch(label)?;
        for index in 0..clients {
            self.fleet.close(index).map_err(LoadError::io("closing a client"))?;
        }
        let begin = Instant::now();
        self.wait(&mut leaving, COMPLETE_TIMEOUT, |fleet| fleet.connected() == 0)?;
        if writes_meanwhile > 0 {
            let seconds = f64::from(writes_meanwhile) / MEANWHILE_PER_SECOND;
            let plan = self.plan(MEANWHILE_PER_SECOND, seconds, writes);
            let written = Writers::start(&self.url, plan)?.join();
            if let Some(cause) = written.failure {
                return Err(LoadError::Postgres { doing: "writing", cause });
            }
        }
        self.wait(&mut leaving, away.saturating_sub(begin.elapsed()), |_| false)?;
        let mut watch = self.watch(label)?;
        let now = Instant::now();
        for index in 0..clients {
            self.fleet.reopen(index, now).map_err(LoadError::io("opening a client"))?;
        }
        let complete =
            self.wait(&mut watch, COMPLETE_TIMEOUT, |fleet| fleet.complete() == clients)?;
        let mut comparison = self.comparison()?;
        let difference = self.converge(&mut watch, &mut comparison)?;
        *violations += watch.total.violations;
        self.fleet.caught_up(clients).map_err(LoadError::io("asking a worker"))?;
        let mut step = self.finish(watch, 0.0, complete && difference.is_none())?;
        // They all began at the same time.
        step.seconds = step.reconnect.as_ref().map_or(0.0, |d| d.max / 1000.0);
        step.complaints.extend(difference);
        Ok(step)
    }

    /// Mutations on an open loop, by all clients in turn.
    fn mutate(
        &mut self,
        label: &str,
        rate: f64,
        seconds: f64,
        violations: &mut u64,
    ) -> Result<StepResult, LoadError> {
        let total = (rate * seconds).round() as usize;
        let data = &self.scenario.data;
        let (projects, items) = (data.watched(), data.items);
        let before = self.api.as_ref().map_or(0, Api::mutations);
        let mut watch = self.watch(label)?;
        let meter = self.meter();
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let clients = self.queries.len();
        for k in 0..total {
            let offset = Duration::from_secs_f64(k as f64 / rate);
            while Instant::now() < watch.begin + offset {
                self.tick(&mut watch)?;
            }
            let index = k % clients.max(1);
            let item = format!("p{}-i{}", index / self.scenario.tabs % projects, k * 7 % items);
            let meant_us = (epoch + offset).as_micros() as u64;
            self.fleet.mutate(index, item, meant_us).map_err(LoadError::io("mutating"))?;
        }
        let usage = meter.until(&self.meter());
        let confirmed = |watch: &Watch| watch.mutations() >= total as u64;
        let deadline = Instant::now() + WRITE_GRACE.min(self.left());
        while !confirmed(&watch) && Instant::now() < deadline {
            self.tick(&mut watch)?;
        }
        let all = confirmed(&watch);
        let mut comparison = self.comparison()?;
        let difference = self.converge(&mut watch, &mut comparison)?;
        *violations += watch.total.violations;
        let missing = total as u64 - watch.mutations().min(total as u64);
        let mut step = self.finish(watch, seconds, all && difference.is_none())?;
        step.transactions = self.api.as_ref().map_or(0, Api::mutations) - before;
        step.usage = usage;
        step.complaints.extend(difference);
        if missing > 0 {
            step.complaints.push(format!("{missing} mutations were not confirmed"));
        }
        Ok(step)
    }

    fn churn(
        &mut self,
        label: &str,
        rate: f64,
        seconds: f64,
        violations: &mut u64,
    ) -> Result<StepResult, LoadError> {
        let mut watch = self.watch(label)?;
        let total = (rate * seconds).round() as usize;
        let projects = self.scenario.data.projects;
        for k in 0..total {
            let due = watch.begin + Duration::from_secs_f64(k as f64 / rate);
            while Instant::now() < due {
                self.tick(&mut watch)?;
            }
            let index = k % self.queries.len();
            let old = self.queries[index][0].clone();
            let new = old.moved_to((index * 31 + k * 17 + 1) % projects);
            if self.queries[index].contains(&new) {
                continue;
            }
            self.fleet
                .swap(index, old.hash(), new.ask())
                .map_err(LoadError::io("changing a query"))?;
            self.queries[index][0] = new;
        }
        let clients = self.queries.len();
        let complete =
            self.wait(&mut watch, COMPLETE_TIMEOUT, |fleet| fleet.complete() == clients)?;
        let taken = watch.begin.elapsed().as_secs_f64();
        let mut comparison = self.comparison()?;
        let difference = self.converge(&mut watch, &mut comparison)?;
        *violations += watch.total.violations;
        let mut step = self.finish(watch, taken, complete && difference.is_none())?;
        step.complaints.extend(difference);
        Ok(step)
    }
}
