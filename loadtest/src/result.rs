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
    pub(crate) trials: Vec<Trial>,
    pub(crate) timeline: Vec<Sample>,
    pub(crate) complaints: Vec<String>,
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
