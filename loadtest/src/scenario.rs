//! Scenarios: what is run, as small TOML files (`loadtest/scenarios/`).

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::client::connection::PROTOCOL_VERSION;
use crate::data_set::{DataSize, QuerySpec};
use crate::error::LoadError;
use crate::models::Model;
use crate::search::MAX_RATE;
use crate::server::ServerKind;
use crate::writer::{Change, Target};

/// Bounds of what a file may ask for: a mistyped zero must not fill the machine.
const MAX_CLIENTS: usize = 50_000;
const MAX_ROWS: usize = 20_000_000;
const MAX_STEP_SECONDS: f64 = 600.0;

/// What a run takes if its scenario does not say, seconds.
const UNKNOWN_RUN_SECONDS: f64 = 60.0;

/// A figure for each server.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PerServer {
    pub(crate) original: f64,
    pub(crate) zeroring: f64,
}

impl PerServer {
    pub(crate) fn of(self, server: &ServerKind) -> f64 {
        match server {
            ServerKind::Original(_) => self.original,
            ServerKind::Zeroring(_) | ServerKind::ZeroringFile(_) => self.zeroring,
        }
    }
}

/// A scenario.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scenario {
    /// Short name; results are filed under it.
    pub(crate) name: String,
    /// One line for the report.
    pub(crate) title: String,
    /// What it shows, what limits it.
    #[serde(default)]
    pub(crate) about: String,
    /// The figure that the summary shows instead of the steps' own: `memory` or `start`.
    #[serde(default)]
    pub(crate) headline: Option<String>,
    /// Run by each server once, also where others are repeated: it takes long.
    #[serde(default)]
    pub(crate) once: bool,
    /// What a run takes on two CPUs, seconds, with starting and stopping everything.
    #[serde(default)]
    pub(crate) expect: Option<PerServer>,
    /// The search is also made with Postgres alone, and with a mere reader of its change stream.
    #[serde(default)]
    pub(crate) upstream_limit: bool,
    pub(crate) data: DataSize,
    /// Every client asks for all of these.
    #[serde(rename = "query")]
    pub(crate) queries: Vec<QuerySpec>,
    /// Tabs (clients) of a group.
    #[serde(default = "one")]
    pub(crate) tabs: usize,
    /// The version of the protocol that clients speak. From 52 on pokes come as binary chunks; the
    /// original's release 1.9.0 knows 51 at most.
    #[serde(default = "protocol")]
    pub(crate) protocol: u32,
    #[serde(rename = "step")]
    pub(crate) steps: Vec<Step>,
}

fn one() -> usize {
    1
}

fn protocol() -> u32 {
    PROTOCOL_VERSION
}

fn title() -> Change {
    Change::Title
}

fn limit_ms() -> f64 {
    2000.0
}

/// How rows are written during a step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Writes {
    pub(crate) to: Target,
    #[serde(default = "title")]
    pub(crate) change: Change,
    /// Rows changed by one transaction.
    #[serde(default = "one")]
    pub(crate) rows: usize,
}

/// One thing after the other.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Step {
    /// Nothing; memory and CPU of doing nothing.
    Idle { seconds: f64 },
    /// Connects groups until there are `groups`, and waits for all their queries.
    Connect {
        groups: usize,
        /// All at once if absent.
        #[serde(default)]
        per_second: Option<f64>,
    },
    /// Writes at a rate.
    Write {
        rate: f64,
        seconds: f64,
        /// Share of the clients that wait before each read …
        #[serde(default)]
        slow: f64,
        /// … and of those that do not read at all.
        #[serde(default)]
        stalled: f64,
        #[serde(flatten)]
        writes: Writes,
    },
    /// Looks for the highest rate that is sustained: doubling from `from` until one fails (or
    /// halving until one does not), then dividing the gap `refine` times.
    Search {
        /// Near what is expected of each server: that saves trials.
        from: PerServer,
        /// Length of a trial.
        seconds: f64,
        #[serde(default)]
        refine: u32,
        /// What p99 of write-to-client has to stay below.
        #[serde(default = "limit_ms")]
        limit_ms: f64,
        #[serde(flatten)]
        writes: Writes,
    },
    /// All clients go away, some rows change, and all come back at once with their cookies.
    Reconnect {
        #[serde(default)]
        writes_meanwhile: u32,
        /// How long they stay away. Servers keep a group that nobody uses for 5 s.
        away_seconds: f64,
        #[serde(flatten)]
        writes: Writes,
    },
    /// Clients change rows by mutations, at a rate. The application's endpoint is the load
    /// generator, which applies them to Postgres.
    Mutate { rate: f64, seconds: f64 },
    /// Clients exchange a query for the one of another project, at a rate.
    Churn { rate: f64, seconds: f64 },
}

impl Step {
    /// As in the file.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Step::Idle { .. } => "idle",
            Step::Connect { .. } => "connect",
            Step::Write { .. } => "write",
            Step::Search { .. } => "search",
            Step::Reconnect { .. } => "reconnect",
            Step::Churn { .. } => "churn",
            Step::Mutate { .. } => "mutate",
        }
    }

    pub(crate) fn label(&self) -> String {
        match self {
            Step::Idle { .. } => "idle".to_owned(),
            Step::Connect { groups, .. } => format!("connect {groups} groups"),
            Step::Write { rate, stalled, slow, .. } if stalled + slow > 0.0 => {
                format!("{rate} writes/s, {:.0} % slow or stalled", (stalled + slow) * 100.0)
            }
            Step::Write { rate, .. } => format!("{rate} writes/s"),
            Step::Search { limit_ms, .. } => format!("highest rate, p99 < {limit_ms} ms"),
            Step::Reconnect { away_seconds, .. } => format!("reconnect after {away_seconds} s"),
            Step::Churn { rate, .. } => format!("{rate} query changes/s"),
            Step::Mutate { rate, .. } => format!("{rate} mutations/s"),
        }
    }
}

impl Scenario {
    /// Reads and checks a file.
    pub(crate) fn read(file: &Path) -> Result<Scenario, LoadError> {
        let wrong = |cause: String| LoadError::Scenario { file: file.display().to_string(), cause };
        let text = std::fs::read_to_string(file).map_err(|e| wrong(e.to_string()))?;
        Scenario::parse(&text).map_err(wrong)
    }

    pub(crate) fn parse(text: &str) -> Result<Scenario, String> {
        let scenario: Scenario = basic_toml::from_str(text).map_err(|e| e.to_string())?;
        scenario.check()?;
        Ok(scenario)
    }

    /// Whether the application's endpoint for mutations is needed.
    pub(crate) fn mutates(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Mutate { .. }))
    }

    fn has_search(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Search { .. }))
    }

    /// What a run against `server` is expected to take.
    pub(crate) fn expected(&self, server: &ServerKind) -> Duration {
        let seconds = self.expect.map_or(UNKNOWN_RUN_SECONDS, |e| e.of(server));
        Duration::from_secs_f64(seconds.clamp(1.0, MAX_STEP_SECONDS))
    }

    fn check(&self) -> Result<(), String> {
        let ok = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };
        let data = &self.data;
        let rows = data.projects.saturating_mul(data.items).saturating_mul(1 + data.comments);
        ok(data.projects > 0 && data.items > 0, "needs projects and items")?;
        ok(rows <= MAX_ROWS, "too many rows")?;
        ok((30..=52).contains(&self.protocol), "protocol: from 30 to 52")?;
        let headline = self.headline.as_deref();
        ok(matches!(headline, None | Some("memory" | "start")), "headline: memory or start")?;
        ok(!self.queries.is_empty() && self.tabs > 0, "needs queries and tabs")?;
        ok(!self.upstream_limit || self.has_search(), "upstream_limit needs a search")?;
        let seconds = |s: f64| ok(s > 0.0 && s <= MAX_STEP_SECONDS, "seconds: above 0, up to 600");
        let rate = |r: f64| ok(r > 0.0 && r <= 1e6, "rates are above 0, up to a million");
        for step in &self.steps {
            match step {
                Step::Idle { seconds: s } => seconds(*s)?,
                Step::Connect { groups, per_second } => {
                    ok(groups.saturating_mul(self.tabs) <= MAX_CLIENTS, "too many clients")?;
                    per_second.map_or(Ok(()), rate)?;
                }
                Step::Write { rate: r, seconds: s, slow, stalled, .. } => {
                    rate(*r)?;
                    seconds(*s)?;
                    ok(*slow >= 0.0 && *stalled >= 0.0 && slow + stalled <= 1.0, "shares: 0 to 1")?;
                }
                Step::Mutate { rate: r, seconds: s } => {
                    ok(data.model == Model::Projects, "mutations are for items of projects")?;
                    rate(*r)?;
                    seconds(*s)?;
                }
                Step::Churn { rate: r, seconds: s } => {
                    rate(*r)?;
                    seconds(*s)?;
                }
                Step::Search { from, seconds: s, refine, .. } => {
                    for from in [from.original, from.zeroring] {
                        ok(from > 0.0 && from <= MAX_RATE, "from: above 0, up to 50,000")?;
                    }
                    seconds(*s)?;
                    ok(*refine <= 8, "refine ≤ 8")?;
                }
                Step::Reconnect { writes_meanwhile, away_seconds, .. } => {
                    seconds(*away_seconds)?;
                    ok(*writes_meanwhile <= 100_000, "too many writes meanwhile")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_scenarios_of_the_repository_are_valid_and_named_as_their_files() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let mut found = 0;
        for dir in [dir.clone(), dir.join("more"), dir.join("extra")] {
            for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
                let path = entry.path();
                if path.extension().is_some_and(|e| e == "toml") {
                    let scenario = Scenario::read(&path).unwrap();
                    assert_eq!(path.file_stem().unwrap().to_str(), Some(scenario.name.as_str()));
                    found += 1;
                }
            }
        }
        assert!(found >= 10, "{found}");
    }

    #[test]
    fn mistakes_in_a_file_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let read = |steps: &str| {
            let file = dir.path().join("s.toml");
            let head = "name = 's'\ntitle = 't'\n[data]\nprojects = 1\nitems = 1\n\
                        [[query]]\nkind = 'items'\nproject = 'own'\n";
            std::fs::write(&file, format!("{head}{steps}")).unwrap();
            Scenario::read(&file).map(|_| ()).map_err(|e| e.to_string())
        };
        read("[[step]]\ndo = 'connect'\ngroups = 3").unwrap();
        for (steps, complaint) in [
            ("[[step]]\ndo = 'connect'\ngroups = 3000000", "too many clients"),
            ("[[step]]\ndo = 'idle'\nseconds = 0", "seconds"),
            ("[[step]]\ndo = 'dance'", "dance"),
            ("[[step]]\ndo = 'write'\nrate = -1.0\nseconds = 1.0\nto = 'own'", "rates"),
        ] {
            let error = read(steps).unwrap_err();
            assert!(error.contains(complaint) && error.contains("s.toml"), "{error}");
        }
    }
}
