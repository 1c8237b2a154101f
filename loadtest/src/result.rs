//! What a run found, as it is written to JSON and read by the report.

use serde::{Deserialize, Serialize};

use crate::client::stats::Latency;
use crate::limits::Usage;

/// A distribution of latencies, in milliseconds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Distribution {
    pub(crate) count: u64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
    /// (quantile, ms) for drawing.
    pub(crate) curve: Vec<(f64, f64)>,
}

impl Distribution {
    pub(crate) fn of(latency: &Latency) -> Option<Distribution> {
        let at = |q| latency.quantile_ms(q);
        Some(Distribution {
            count: latency.count(),
            p50: at(0.5)?,
            p90: at(0.9)?,
            p99: at(0.99)?,
            max: latency.max_ms()?,
            curve: latency.curve(),
        })
    }
}

/// A moment of a step.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Sample {
    /// Seconds since the step began.
    pub(crate) at: f64,
    /// Of writes that arrived in this interval, ms.
    pub(crate) write_p50: Option<f64>,
    pub(crate) write_p99: Option<f64>,
    pub(crate) rows: u64,
    pub(crate) connected: usize,
    /// Share of one CPU.
    pub(crate) server_cpu: f64,
    pub(crate) pss_bytes: u64,
}

/// One rate that was tried.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Trial {
    pub(crate) rate: f64,
    pub(crate) sustained: bool,
    /// Why not.
    pub(crate) reason: String,
    /// What was at its end.
    pub(crate) limit: String,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) commit_p99: f64,
    pub(crate) deliveries_per_second: f64,
    pub(crate) server_cpu: f64,
    pub(crate) usage: Usage,
}

/// One step's figures.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StepResult {
    pub(crate) label: String,
    /// What the scenario calls it: `connect`, `write`, …
    pub(crate) kind: String,
    /// From the step's begin until all its effects had arrived.
    pub(crate) seconds: f64,
    pub(crate) clients: usize,
    pub(crate) hydrate: Option<Distribution>,
    pub(crate) reconnect: Option<Distribution>,
    pub(crate) change: Option<Distribution>,
    /// Intended time of a write until a client had the row.
    pub(crate) write: Option<Distribution>,
    /// Intended time of a mutation until its client knew that it was done.
    pub(crate) mutation: Option<Distribution>,
    /// Intended time of a write until Postgres had committed it.
    pub(crate) commit: Option<Distribution>,
    pub(crate) transactions: u64,
    pub(crate) pokes: u64,
    pub(crate) rows: u64,
    pub(crate) deliveries_per_second: f64,
    pub(crate) bytes: u64,
    pub(crate) server_cpu_seconds: f64,
    pub(crate) postgres_cpu_seconds: f64,
    pub(crate) generator_cpu_seconds: f64,
    /// At the end of the step.
    pub(crate) pss_bytes: u64,
    pub(crate) wal_bytes: u64,
    pub(crate) disconnects: u64,
    /// The step went as it should: everybody connected and complete, everything delivered.
    pub(crate) settled: bool,
    pub(crate) sustained_rate: Option<f64>,
    /// What kept a search from a higher rate.
    pub(crate) limit: Option<String>,
    /// Shares of CPUs while writes were made.
    pub(crate) usage: Usage,
    /// Where the server's time went, if it tells.
    pub(crate) stages: Vec<StageTime>,
    pub(crate) trials: Vec<Trial>,
    pub(crate) timeline: Vec<Sample>,
    pub(crate) complaints: Vec<String>,
}

/// What the server spent in one stage of its work during a step (`stages` of its `/statz`).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StageTime {
    pub(crate) stage: String,
    pub(crate) seconds: f64,
    pub(crate) count: u64,
}

impl StageTime {
    /// All stages in the `/statz` of a server that has them, since its start.
    pub(crate) fn all(statz: &serde_json::Value) -> Vec<StageTime> {
        let stages = statz.get("stages").and_then(serde_json::Value::as_object);
        let one = |(name, value): (&String, &serde_json::Value)| {
            Some(StageTime {
                stage: name.clone(),
                seconds: value.get("seconds")?.as_f64()?,
                count: value.get("count")?.as_u64()?,
            })
        };
        stages.into_iter().flatten().filter_map(one).collect()
    }

    /// What was added since `before`.
    pub(crate) fn since(now: Vec<StageTime>, before: &[StageTime]) -> Vec<StageTime> {
        let added = |mut stage: StageTime| {
            if let Some(earlier) = before.iter().find(|b| b.stage == stage.stage) {
                stage.seconds -= earlier.seconds;
                stage.count = stage.count.saturating_sub(earlier.count);
            }
            stage
        };
        now.into_iter().map(added).filter(|stage| stage.count > 0).collect()
    }
}

/// A scenario, run against one server once.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RunResult {
    pub(crate) scenario: String,
    pub(crate) title: String,
    pub(crate) about: String,
    pub(crate) headline: Option<String>,
    pub(crate) server: String,
    pub(crate) server_version: String,
    pub(crate) settings: Vec<String>,
    pub(crate) postgres_version: String,
    pub(crate) hardware: String,
    pub(crate) commit: String,
    pub(crate) started_at: String,
    /// Which CPUs belonged to whom.
    pub(crate) pinning: String,
    /// The whole run, starting and stopping included.
    pub(crate) wall_seconds: f64,
    /// From starting the process until a first client had its rows, initial sync included.
    pub(crate) start_seconds: f64,
    pub(crate) replicated_rows: u64,
    pub(crate) idle_pss_bytes: u64,
    pub(crate) steps: Vec<StepResult>,
    /// Clients whose rows were compared with Postgres at the end.
    pub(crate) compared_clients: usize,
    pub(crate) compared_rows: usize,
    /// Seconds until they were equal.
    pub(crate) converge_seconds: f64,
    /// What the server said about itself at the end, if it can.
    pub(crate) statz: Option<serde_json::Value>,
    /// Why the run does not count.
    pub(crate) void: Option<String>,
}

/// Runs of several servers, in the order in which they were made.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Results {
    /// From the first run's begin to the last one's end.
    pub(crate) wall_seconds: f64,
    /// Runs that were left out, and why.
    pub(crate) left_out: Vec<String>,
    pub(crate) runs: Vec<RunResult>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_of_a_step_are_the_difference_and_other_servers_have_none() {
        let statz = |apply: f64, n: u64| {
            serde_json::json!({"stages": {
                "apply": {"seconds": apply, "count": n},
                "hydrate": {"seconds": 1.0, "count": 1},
                "executors": [{"hydrate": {"seconds": 1.0, "count": 1}}]}})
        };
        let before = StageTime::all(&statz(1.0, 10));
        assert_eq!(before.len(), 2);
        let step = StageTime::since(StageTime::all(&statz(1.5, 30)), &before);
        let want = StageTime { stage: "apply".to_owned(), seconds: 0.5, count: 20 };
        assert_eq!(step, [want]);
        assert!(StageTime::all(&serde_json::json!({"upstream": {}})).is_empty());
    }
}
