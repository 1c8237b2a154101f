//! The steps of a scenario.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::connection::{ClientSetup, Pace};
use crate::data_set::{Query, client_schema};
use crate::error::LoadError;
use crate::result::{Distribution, Sample, StepResult, Trial};
use crate::run::{Stage, Watch};
use crate::scenario::{Step, Writes};
use crate::writer::{WritePlan, Writers};

/// How long clients may take to get all that they asked for.
const COMPLETE_TIMEOUT: Duration = Duration::from_secs(180);

/// Writes may be late by this before they are given up: then nothing is sustained anyhow.
const WRITE_GRACE: Duration = Duration::from_secs(20);

/// How fast rows change while clients are away.
const MEANWHILE_PER_SECOND: f64 = 500.0;

/// A slow client waits this long before each read.
const SLOW_PAUSE: Duration = Duration::from_millis(200);

/// The lag of a sustained rate may grow over a trial to this multiple, plus this.
const SLOPE_FACTOR: f64 = 2.0;
const SLOPE_MS: f64 = 50.0;

/// A trial's figures, and why the rate was not sustained.
struct Tried {
    step: StepResult,
    reason: Option<String>,
}

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
                let watch = self.watch(&label)?;
                self.connect(watch, *groups, *per_second, violations)
            }
            Step::Write { rate, seconds, slow, stalled, writes } => {
                self.set_paces(*slow, *stalled)?;
                let tried = self.write(&label, *rate, *seconds, f64::MAX, writes, violations)?;
                Ok(tried.step)
            }
            Step::Search { from, up_to, seconds, refine, limit_ms, writes } => {
                let mut search = Search { low: 0.0, high: None, best: None, trials: Vec::new() };
                let mut rate = *from;
                let mut refinements = *refine;
                loop {
                    let name = format!("{label}: trying {rate:.0}/s");
                    let mut tried =
                        self.write(&name, rate, *seconds, *limit_ms, writes, violations)?;
                    if tried.reason.is_some() && tried.step.settled && *violations == 0 {
                        // Something else may have kept the machine busy: a rate fails twice.
                        tried = self.write(&name, rate, *seconds, *limit_ms, writes, violations)?;
                    }
                    let settled = tried.step.settled;
                    search.note(rate, tried);
                    match search.next(*up_to, &mut refinements) {
                        Some(next) if settled && *violations == 0 => rate = next,
                        _ => break,
                    }
                }
                Ok(search.result(label))
            }
            Step::Reconnect { writes_meanwhile, away_seconds, writes } => {
                let away = Duration::from_secs_f64(*away_seconds);
                self.reconnect(&label, away, *writes_meanwhile, writes, violations)
            }
            Step::Churn { rate, seconds } => self.churn(&label, *rate, *seconds, violations),
        }?;
        Ok(result)
    }

    /// Waits for all clients, then for their rows to be right.
    fn settle(&mut self, mut watch: Watch, violations: &mut u64) -> Result<StepResult, LoadError> {
        let clients = self.queries.len();
        let complete =
            self.wait(&mut watch, COMPLETE_TIMEOUT, |fleet| fleet.complete() == clients)?;
        let seconds = watch.begin.elapsed().as_secs_f64();
        let step = self.finish(watch, seconds, complete)?;
        *violations += step.complaints.iter().filter(|c| c.contains("violation")).count() as u64;
        Ok(step)
    }

    fn connect(
        &mut self,
        watch: Watch,
        groups: usize,
        per_second: Option<f64>,
        violations: &mut u64,
    ) -> Result<StepResult, LoadError> {
        let schema: Arc<Value> = Arc::new(client_schema());
        let tabs = self.scenario.tabs;
        let start = Instant::now();
        let present = self.queries.len() / tabs;
        for group in present..groups {
            let number = (group - present) as f64;
            let delay = per_second.map_or(0.0, |rate| number / rate);
            for tab in 0..tabs {
                let projects = self.scenario.data.projects;
                let queries: Vec<Query> =
                    self.scenario.queries.iter().map(|q| q.for_group(group, projects)).collect();
                let setup = ClientSetup {
                    index: self.queries.len(),
                    client_id: format!("c{group}-{tab}"),
                    group_id: format!("g{group}"),
                    queries: queries.iter().map(Query::ask).collect(),
                    client_schema: schema.clone(),
                };
                self.queries.push(queries);
                self.fleet
                    .open(setup, start + Duration::from_secs_f64(delay))
                    .map_err(LoadError::io("opening a client"))?;
            }
        }
        self.settle(watch, violations)
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
            projects: groups.min(self.scenario.data.projects),
            items: self.scenario.data.items,
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
        let patience = Duration::from_secs_f64(seconds) + WRITE_GRACE;
        if !self.wait(&mut watch, patience, |_| writers.is_done())? {
            writers.stop();
        }
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
        let mut step = self.finish(watch, seconds, difference.is_none() && all_there)?;
        step.complaints.extend(written.failure.clone());
        step.complaints.extend(difference);
        step.transactions = written.transactions;
        step.commit = Distribution::of(&written.commit);
        let intended = (rate * seconds).round() as u64;
        let reason =
            judge(&step, intended, limit_ms, &step.timeline[..samples.min(step.timeline.len())]);
        Ok(Tried { step, reason })
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

/// Why a rate was not sustained, if it was not.
fn judge(step: &StepResult, intended: u64, limit_ms: f64, timeline: &[Sample]) -> Option<String> {
    if step.transactions < intended {
        return Some(format!("only {} of {intended} writes were made", step.transactions));
    }
    if !step.settled {
        return Some("clients did not converge".to_owned());
    }
    if step.disconnects > 0 {
        return Some(format!("{} connections were lost", step.disconnects));
    }
    let Some(write) = &step.write else {
        return Some("no write arrived".to_owned());
    };
    if let Some(commit) = step.commit.as_ref().filter(|c| c.p99 > limit_ms) {
        return Some(format!(
            "Postgres or the generator is the limit: commit p99 {:.0} ms",
            commit.p99
        ));
    }
    if write.p99 > limit_ms {
        return Some(format!("p99 {:.0} ms", write.p99));
    }
    growing(timeline).map(|(from, to)| format!("the lag grows: {from:.0} → {to:.0} ms"))
}

/// The median lag of the first and of the last third, if it grew.
fn growing(timeline: &[Sample]) -> Option<(f64, f64)> {
    let medians: Vec<f64> = timeline.iter().filter_map(|s| s.write_p50).collect();
    let third = medians.len() / 3;
    if third == 0 {
        return None;
    }
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&medians[..third]), mean(&medians[medians.len() - third..]));
    (last > first * SLOPE_FACTOR + SLOPE_MS).then_some((first, last))
}

/// The bounded search for the highest sustained rate.
struct Search {
    low: f64,
    high: Option<f64>,
    best: Option<StepResult>,
    trials: Vec<Trial>,
}

impl Search {
    fn note(&mut self, rate: f64, tried: Tried) {
        let step = tried.step;
        let (p50, p99) = step.write.as_ref().map_or((0.0, 0.0), |w| (w.p50, w.p99));
        self.trials.push(Trial {
            rate,
            sustained: tried.reason.is_none(),
            reason: tried.reason.clone().unwrap_or_default(),
            p50,
            p99,
            deliveries_per_second: step.deliveries_per_second,
            server_cpu: step.server_cpu_seconds / step.seconds.max(0.001),
        });
        if tried.reason.is_none() {
            self.low = rate;
            self.best = Some(step);
        } else {
            self.high = Some(rate);
            if self.best.is_none() {
                self.best = Some(step);
            }
        }
    }

    /// The next rate to try.
    fn next(&self, up_to: f64, refinements: &mut u32) -> Option<f64> {
        match self.high {
            None if self.low >= up_to => None,
            None => Some((self.low * 2.0).min(up_to)),
            Some(_) if *refinements == 0 || self.low == 0.0 => None,
            Some(high) => {
                *refinements -= 1;
                Some(((self.low + high) / 2.0).round())
            }
        }
    }

    fn result(self, label: String) -> StepResult {
        let mut step = self.best.unwrap_or_default();
        step.label = label;
        step.settled = true; // the last trial may not have; the final check decides
        step.sustained_rate = Some(self.low);
        step.trials = self.trials;
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(limit: f64, from: f64, up_to: f64, mut refine: u32) -> (f64, Vec<f64>) {
        let mut search = Search { low: 0.0, high: None, best: None, trials: Vec::new() };
        let mut rate = from;
        loop {
            let reason = (rate > limit).then(|| "too much".to_owned());
            search.note(rate, Tried { step: StepResult::default(), reason });
            match search.next(up_to, &mut refine) {
                Some(next) => rate = next,
                None => break,
            }
        }
        (search.low, search.trials.iter().map(|t| t.rate).collect())
    }

    #[test]
    fn the_search_brackets_the_limit_and_ends() {
        assert_eq!(search(70.0, 10.0, 1000.0, 2), (70.0, vec![10., 20., 40., 80., 60., 70.]));
        assert_eq!(search(5000.0, 10.0, 30.0, 2), (30.0, vec![10., 20., 30.]));
        assert_eq!(search(5.0, 10.0, 1000.0, 2), (0.0, vec![10.]));
    }

    #[test]
    fn a_lag_that_grows_is_no_sustained_rate() {
        let timeline = |medians: &[f64]| -> Vec<Sample> {
            let sample = |ms: &f64| Sample { write_p50: Some(*ms), ..Sample::default() };
            medians.iter().map(sample).collect()
        };
        assert!(growing(&timeline(&[10.0, 200.0, 400.0, 600.0, 800.0, 1000.0])).is_some());
        assert!(growing(&timeline(&[10.0, 12.0, 300.0, 11.0, 10.0, 12.0])).is_none());
        assert!(growing(&timeline(&[10.0])).is_none());
    }
}
