//! The bounded search for the highest rate of writes that a server sustains.

use crate::error::LoadError;
use crate::result::{Sample, StepResult, Trial};

/// Rates above this are beyond one Postgres: the search ends there, and says so.
pub(crate) const MAX_RATE: f64 = 50_000.0;

/// Trials of a search, at most (one that is repeated counts once).
const MAX_TRIALS: usize = 10;

/// When already the first rate was too much: halvings, at most.
const MAX_DESCENTS: u32 = 4;

/// A trial has at least so many writes: fewer show nothing.
const MIN_WRITES: f64 = 3.0;

/// Closer than by this factor, two rates are the same.
const RESOLUTION: f64 = 1.15;

/// The lag of a sustained rate may grow over a trial to this multiple, plus this.
const SLOPE_FACTOR: f64 = 2.0;
const SLOPE_MS: f64 = 50.0;

/// A failed rate whose p99 is beyond the limit by this factor is not tried again: whatever else
/// the machine did, that was not the reason.
const CLEAR_FAILURE: f64 = 2.0;

/// A trial's figures, and why the rate was not sustained.
pub(crate) struct Tried {
    pub(crate) step: StepResult,
    pub(crate) reason: Option<String>,
    /// What was at its end, if the rate was not sustained.
    pub(crate) limit: String,
}

impl Tried {
    /// It failed so clearly that a second trial would not help.
    pub(crate) fn is_hopeless(&self, limit_ms: f64) -> bool {
        let p99 = self.step.write.as_ref().map(|w| w.p99);
        self.reason.is_some() && p99.is_none_or(|p99| p99 > limit_ms * CLEAR_FAILURE)
    }
}

/// Why a rate was not sustained, if it was not. `commits_late` is set if it was so before the
/// server had anything to do with the writes.
pub(crate) fn judge(
    step: &StepResult,
    intended: u64,
    limit_ms: f64,
    timeline: &[Sample],
    commits_late: &mut bool,
) -> Option<String> {
    let commit_p99 = step.commit.as_ref().map_or(0.0, |c| c.p99);
    *commits_late = commit_p99 > limit_ms;
    if !step.settled {
        return Some("clients did not converge".to_owned());
    }
    if step.disconnects > 0 {
        return Some(format!("{} connections were lost", step.disconnects));
    }
    if *commits_late {
        return Some(format!("p99 of the commits alone: {commit_p99:.0} ms"));
    }
    let Some(write) = &step.write else {
        return Some("no write arrived".to_owned());
    };
    if write.p99 > limit_ms {
        return Some(format!("p99 {:.0} ms", write.p99));
    }
    if step.transactions < intended {
        return Some(format!("only {} of {intended} writes were made", step.transactions));
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

/// Whether a trial under way cannot become a sustained rate any more: the last samples say that
/// most of what arrives is later than the limit, or nothing arrives at all.
pub(crate) fn is_lost(samples: &[Sample], limit_ms: f64) -> bool {
    let [.., before, last] = samples else { return false };
    let late = |s: &Sample| s.write_p50.is_some_and(|ms| ms > limit_ms);
    let silent = |s: &Sample| s.write_p50.is_none();
    let patience = 2.0 * limit_ms / 1000.0 + 1.0;
    (late(before) && late(last)) || (last.at > patience && samples.iter().all(silent))
}

/// The search: doubling until a rate fails (or halving until one does not), then the gap in
/// geometric halves.
pub(crate) struct Search {
    /// Length of a trial, seconds.
    seconds: f64,
    refinements: u32,
    descents: u32,
    low: f64,
    high: Option<f64>,
    best: Option<StepResult>,
    trials: Vec<Trial>,
    limit: Option<String>,
}

impl Search {
    pub(crate) fn new(seconds: f64, refinements: u32) -> Search {
        Search {
            seconds,
            refinements,
            descents: MAX_DESCENTS,
            low: 0.0,
            high: None,
            best: None,
            trials: Vec::new(),
            limit: None,
        }
    }

    /// Tries rates from `from` on until the limit is found. `attempt` makes a trial, or says why
    /// there can be no further one; a rate that fails narrowly is tried twice.
    pub(crate) fn drive(
        mut self,
        label: &str,
        from: f64,
        limit_ms: f64,
        mut attempt: impl FnMut(f64) -> Result<Result<Tried, String>, LoadError>,
    ) -> Result<StepResult, LoadError> {
        let mut rate = from;
        let cut_short = loop {
            let mut tried = match attempt(rate)? {
                Ok(tried) => tried,
                Err(why) => break Some(why),
            };
            let narrowly = tried.reason.is_some() && !tried.is_hopeless(limit_ms);
            // Something else may have kept the machine busy: then a rate fails twice.
            if narrowly
                && tried.step.settled
                && let Ok(again) = attempt(rate)?
            {
                tried = again;
            }
            let settled = tried.step.settled;
            self.note(rate, tried);
            match self.next() {
                Some(next) if settled => rate = next,
                Some(_) => break Some("clients did not converge any more".to_owned()),
                None => break None,
            }
        };
        Ok(self.result(label.to_owned(), cut_short))
    }

    fn note(&mut self, rate: f64, tried: Tried) {
        let step = tried.step;
        let (p50, p99) = step.write.as_ref().map_or((0.0, 0.0), |w| (w.p50, w.p99));
        let sustained = tried.reason.is_none();
        self.trials.push(Trial {
            rate,
            sustained,
            reason: tried.reason.unwrap_or_default(),
            limit: tried.limit.clone(),
            p50,
            p99,
            commit_p99: step.commit.as_ref().map_or(0.0, |c| c.p99),
            deliveries_per_second: step.deliveries_per_second,
            server_cpu: step.usage.server,
            usage: step.usage.clone(),
        });
        if sustained {
            self.low = rate;
            self.best = Some(step);
        } else {
            self.high = Some(rate);
            self.limit = Some(tried.limit);
            if self.best.is_none() {
                self.best = Some(step);
            }
        }
    }

    /// The next rate to try.
    fn next(&mut self) -> Option<f64> {
        if self.trials.len() >= MAX_TRIALS {
            return None;
        }
        match self.high {
            None if self.low >= MAX_RATE => {
                self.limit = Some("none was found: end of the search".to_owned());
                None
            }
            None => Some((self.low * 2.0).min(MAX_RATE)),
            Some(high) if self.low == 0.0 => {
                let next = high / 2.0;
                if self.descents == 0 || next * self.seconds < MIN_WRITES {
                    return None;
                }
                self.descents -= 1;
                Some(next)
            }
            Some(high) => {
                if self.refinements == 0 || high / self.low < RESOLUTION {
                    return None;
                }
                self.refinements -= 1;
                let middle = (self.low * high).sqrt();
                Some(if middle > 10.0 { middle.round() } else { middle })
            }
        }
    }

    /// The search as a step. `cut_short`: why it ended before its time, if it did.
    fn result(self, label: String, cut_short: Option<String>) -> StepResult {
        let mut step = self.best.unwrap_or_default();
        step.label = label;
        step.settled = true; // the last trial may not have; the final check decides
        step.sustained_rate = Some(self.low);
        step.trials = self.trials;
        step.limit = match cut_short {
            Some(why) => Some(format!("none was found: {why}")),
            None => self.limit,
        };
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(limit: f64, from: f64, refinements: u32) -> (f64, Vec<f64>) {
        let mut search = Search::new(5.0, refinements);
        let mut rate = from;
        loop {
            let reason = (rate > limit).then(|| "too much".to_owned());
            let limit = "the server".to_owned();
            search.note(rate, Tried { step: StepResult::default(), reason, limit });
            match search.next() {
                Some(next) => rate = next,
                None => break,
            }
        }
        let rates = search.trials.iter().map(|t| t.rate).collect();
        let step = search.result("s".to_owned(), None);
        (step.sustained_rate.unwrap(), rates)
    }

    #[test]
    fn the_search_brackets_the_limit_and_ends() {
        assert_eq!(search(75.0, 10.0, 2), (68.0, vec![10., 20., 40., 80., 57., 68.]));
        assert_eq!(search(5.0, 10.0, 0), (5.0, vec![10., 5.]));
        assert_eq!(search(0.1, 10.0, 2), (0.0, vec![10., 5., 2.5, 1.25, 0.625]));
        let (rate, trials) = search(f64::MAX, 30_000.0, 2);
        assert_eq!((rate, trials), (MAX_RATE, vec![30_000.0, MAX_RATE]));
        assert!(search(1e9, 1.0, 2).1.len() <= MAX_TRIALS);
    }

    fn timeline(medians: &[f64]) -> Vec<Sample> {
        let sample = |(i, ms): (usize, &f64)| Sample {
            at: i as f64,
            write_p50: (*ms > 0.0).then_some(*ms),
            ..Sample::default()
        };
        medians.iter().enumerate().map(sample).collect()
    }

    #[test]
    fn a_lag_that_grows_is_no_sustained_rate() {
        assert!(growing(&timeline(&[10.0, 200.0, 400.0, 600.0, 800.0, 1000.0])).is_some());
        assert!(growing(&timeline(&[10.0, 12.0, 300.0, 11.0, 10.0, 12.0])).is_none());
        assert!(growing(&timeline(&[10.0])).is_none());
    }

    #[test]
    fn a_lost_trial_is_seen_before_its_end_and_a_single_stall_is_none() {
        assert!(is_lost(&timeline(&[10.0, 900.0, 2100.0, 2600.0]), 2000.0));
        assert!(!is_lost(&timeline(&[10.0, 2500.0, 20.0]), 2000.0));
        assert!(!is_lost(&timeline(&[0.0, 0.0, 0.0]), 2000.0), "within its patience");
        assert!(is_lost(&timeline(&[0.0; 8]), 2000.0));
    }
}
