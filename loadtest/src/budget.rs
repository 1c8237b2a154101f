//! How long everything may take: the order of runs, and the time that each may use.

use std::time::{Duration, Instant};

use crate::scenario::Scenario;
use crate::server::ServerKind;

/// A run may take this multiple of what is expected of it, and this much more, before it is
/// broken off: a slower machine is no reason, a server that hangs is one.
const RUN_BOUND: f64 = 2.0;
const RUN_EXTRA: Duration = Duration::from_secs(30);

/// What ending a run takes: the final comparison, and stopping the processes.
const ENDING: Duration = Duration::from_secs(25);

/// One run to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Planned<'a> {
    pub(crate) scenario: &'a Scenario,
    pub(crate) server: &'a ServerKind,
}

/// How many servers are compared; with `abba` a further one is a variant that runs once.
const COMPARED: usize = 2;

/// All runs in their order: each scenario by each server, then (`abba`) all once more with the
/// servers in the opposite order. So every scenario is A-B-B-A, and a budget that runs out takes
/// repetitions away before it takes scenarios. With `abba` the servers after the second one
/// follow at the end, once.
pub(crate) fn order<'a>(
    scenarios: &'a [Scenario],
    servers: &'a [ServerKind],
    abba: bool,
) -> Vec<Planned<'a>> {
    let (compared, variants) =
        servers.split_at(if abba { servers.len().min(COMPARED) } else { servers.len() });
    let mut all = Vec::new();
    for scenario in scenarios {
        all.extend(compared.iter().map(|server| Planned { scenario, server }));
    }
    if abba {
        for scenario in scenarios.iter().filter(|s| !s.once) {
            all.extend(compared.iter().rev().map(|server| Planned { scenario, server }));
        }
    }
    for scenario in scenarios {
        all.extend(variants.iter().map(|server| Planned { scenario, server }));
    }
    all
}

/// The time that is there, and what runs took so far.
pub(crate) struct Budget {
    begin: Instant,
    total: Option<Duration>,
    /// (scenario, server, seconds) of runs that were made.
    taken: Vec<(String, &'static str, Duration)>,
}

impl Budget {
    pub(crate) fn new(total: Option<Duration>) -> Budget {
        Budget { begin: Instant::now(), total, taken: Vec::new() }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.begin.elapsed()
    }

    pub(crate) fn note(&mut self, run: Planned<'_>, taken: Duration) {
        self.taken.push((run.scenario.name.clone(), run.server.name(), taken));
    }

    /// What a run will take: what it took before, else what the scenario says.
    pub(crate) fn estimate(&self, run: Planned<'_>) -> Duration {
        let before =
            self.taken.iter().rev().find(|(name, server, _)| {
                *name == run.scenario.name && *server == run.server.name()
            });
        before.map_or_else(|| run.scenario.expected(run.server), |(.., taken)| *taken)
    }

    pub(crate) fn estimate_all(&self, runs: &[Planned<'_>]) -> Duration {
        runs.iter().map(|run| self.estimate(*run)).sum()
    }

    /// When a run that begins now has to end; none if there is no time for it.
    pub(crate) fn deadline(&self, run: Planned<'_>) -> Option<Instant> {
        self.end_of(run.scenario.expected(run.server), self.estimate(run))
    }

    /// The same of something else that is expected to take so long.
    pub(crate) fn deadline_within(&self, expected: Duration) -> Option<Instant> {
        self.end_of(expected, expected)
    }

    fn end_of(&self, expected: Duration, estimate: Duration) -> Option<Instant> {
        let now = Instant::now();
        let bound = expected.mul_f64(RUN_BOUND) + RUN_EXTRA;
        let Some(total) = self.total else { return Some(now + bound) };
        let end = self.begin + total.saturating_sub(ENDING);
        (now + estimate < end).then(|| end.min(now + bound))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn scenario(name: &str, once: bool) -> Scenario {
        let text = format!(
            "name = '{name}'\ntitle = 't'\nonce = {once}\n\
             expect = {{ original = 40.0, zeroring = 20.0 }}\n\
             [data]\nprojects = 1\nitems = 1\n[[query]]\nkind = 'items'\nproject = 'own'\n\
             [[step]]\ndo = 'connect'\ngroups = 1\n"
        );
        Scenario::parse(&text).unwrap()
    }

    #[test]
    fn every_scenario_is_run_a_b_b_a_and_repetitions_come_last() {
        let scenarios = [scenario("x", false), scenario("y", true)];
        let servers = [ServerKind::Original(PathBuf::new()), ServerKind::Zeroring(PathBuf::new())];
        let name = |p: &Planned<'_>| format!("{}{}", p.scenario.name, &p.server.name()[..1]);
        let names: Vec<String> = order(&scenarios, &servers, true).iter().map(name).collect();
        assert_eq!(names, ["xo", "xz", "yo", "yz", "xz", "xo"]);
        let three = [&servers[..], &[ServerKind::ZeroringFile(PathBuf::new())]].concat();
        let names: Vec<&str> =
            order(&scenarios, &three, true).iter().map(|p| p.server.name()).collect();
        assert_eq!(names[6..], ["zeroring-file", "zeroring-file"]);
    }

    #[test]
    fn a_run_without_time_is_left_out_and_what_it_took_is_remembered() {
        let scenarios = [scenario("x", false)];
        let servers = [ServerKind::Original(PathBuf::new())];
        let run = Planned { scenario: &scenarios[0], server: &servers[0] };
        let mut budget = Budget::new(Some(Duration::from_secs(100)));
        assert_eq!(budget.estimate(run), Duration::from_secs(40));
        let deadline = budget.deadline(run).unwrap();
        assert!(deadline <= budget.begin + Duration::from_secs(75), "ends within the budget");
        budget.note(run, Duration::from_secs(80));
        assert!(budget.deadline(run).is_none(), "80 s do not fit into 100 with the ending");
        assert!(Budget::new(None).deadline(run).is_some());
    }
}
