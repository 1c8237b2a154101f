//! Results as a table for the terminal, with ratios where two servers ran the same step.

use std::fmt::Write as _;

use crate::result::{Distribution, Results, RunResult, StepResult};
use crate::upstream::Follower;

/// A figure of a step, and whether a smaller one is better.
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    /// None: nothing to compare, it follows from the scenario.
    pub(crate) less_is_better: Option<bool>,
    pub(crate) of: fn(&StepResult) -> Option<f64>,
}

fn p50(d: Option<&Distribution>) -> Option<f64> {
    d.map(|d| d.p50)
}

fn p99(d: Option<&Distribution>) -> Option<f64> {
    d.map(|d| d.p99)
}

/// What is printed and compared, where a step has it.
pub(crate) const FIGURES: [Figure; 18] = [
    Figure {
        name: "all complete after",
        unit: "s",
        less_is_better: Some(true),
        of: |s| (s.hydrate.is_some() || s.reconnect.is_some()).then_some(s.seconds),
    },
    Figure {
        name: "hydrate p50",
        unit: "ms",
        less_is_better: Some(true),
        of: |s| p50(s.hydrate.as_ref()),
    },
    Figure {
        name: "hydrate p99",
        unit: "ms",
        less_is_better: Some(true),
        of: |s| p99(s.hydrate.as_ref()),
    },
    Figure {
        name: "reconnect p50",
        unit: "ms",
        less_is_better: Some(true),
        of: |s| p50(s.reconnect.as_ref()),
    },
    Figure {
        name: "reconnect p99",
        unit: "ms",
        less_is_better: Some(true),
        of: |s| p99(s.reconnect.as_ref()),
    },
    Figure {
        name: "query change p50",
        unit: "ms",
        less_is_better: Some(true),
        of: |s| p50(s.change.as_ref()),
    },
    Figure {
        name: "query change p99",
        unit: "ms",
        less_is_better: Some(true),
        of: |s| p99(s.change.as_ref()),
    },
    Figure {
        name: "write to client p50",
        unit: "ms",
        less_is_better: Some(true),
        of: |s| p50(s.write.as_ref()),
    },
    Figure {
        name: "write to client p99",
        unit: "ms",
        less_is_better: Some(true),
        of: |s| p99(s.write.as_ref()),
    },
    Figure {
        name: "mutation confirmed p50",
        unit: "ms",
        less_is_better: Some(true),
        of: |s| p50(s.mutation.as_ref()),
    },
    Figure {
        name: "mutation confirmed p99",
        unit: "ms",
        less_is_better: Some(true),
        of: |s| p99(s.mutation.as_ref()),
    },
    Figure {
        name: "sustained writes",
        unit: "/s",
        less_is_better: Some(false),
        of: |s| s.sustained_rate,
    },
    Figure {
        name: "deliveries",
        unit: "rows/s",
        less_is_better: None,
        of: |s| s.write.is_some().then_some(s.deliveries_per_second),
    },
    Figure {
        name: "server CPU",
        unit: "s",
        less_is_better: Some(true),
        of: |s| Some(s.server_cpu_seconds),
    },
    Figure {
        name: "Postgres CPU",
        unit: "s",
        less_is_better: Some(true),
        of: |s| Some(s.postgres_cpu_seconds),
    },
    Figure {
        name: "Postgres WAL written",
        unit: "MB",
        less_is_better: Some(true),
        of: |s| (s.wal_bytes > 0).then_some(s.wal_bytes as f64 / 1e6),
    },
    Figure {
        name: "sent to clients",
        unit: "MB",
        less_is_better: None,
        of: |s| (s.bytes > 0).then_some(s.bytes as f64 / 1e6),
    },
    Figure {
        name: "server memory (PSS)",
        unit: "MB",
        less_is_better: Some(true),
        of: |s| Some(s.pss_bytes as f64 / 1e6),
    },
];

/// The lowest, mean and highest value of several runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) low: f64,
    pub(crate) mean: f64,
    pub(crate) high: f64,
}

impl Spread {
    pub(crate) fn of(values: &[f64]) -> Option<Spread> {
        let low = values.iter().copied().reduce(f64::min)?;
        let high = values.iter().copied().reduce(f64::max)?;
        Some(Spread { low, mean: values.iter().sum::<f64>() / values.len() as f64, high })
    }

    fn text(self) -> String {
        if self.low == self.high {
            number(self.mean)
        } else {
            format!("{} ({}…{})", number(self.mean), number(self.low), number(self.high))
        }
    }
}

/// A figure with as many digits as it deserves.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Scenario names in order of appearance.
pub(crate) fn scenarios(results: &Results) -> Vec<&RunResult> {
    let mut found: Vec<&RunResult> = Vec::new();
    for run in &results.runs {
        if !found.iter().any(|r| r.scenario == run.scenario) {
            found.push(run);
        }
    }
    found
}

/// Runs of a scenario by a server that count.
fn valid<'a>(results: &'a Results, scenario: &str, server: &str) -> Vec<&'a RunResult> {
    let matches = |r: &&RunResult| r.scenario == scenario && r.server == server;
    results.runs.iter().filter(matches).filter(|r| r.void.is_none()).collect()
}

/// Something of each server that is compared.
pub(crate) struct Sides<T> {
    pub(crate) original: T,
    pub(crate) ours: T,
    /// Ours with client views in a local file.
    pub(crate) file: T,
}

impl<'a> Sides<Vec<&'a RunResult>> {
    /// The runs of a scenario that count.
    pub(crate) fn of(results: &'a Results, scenario: &str) -> Self {
        let runs = |server| valid(results, scenario, server);
        Sides { original: runs("original"), ours: runs("zeroring"), file: runs("zeroring-file") }
    }

    /// A figure of each side.
    pub(crate) fn spread(
        &self,
        figure: impl Fn(&[&RunResult]) -> Option<Spread>,
    ) -> Sides<Option<Spread>> {
        let Sides { original, ours, file } = self;
        Sides { original: figure(original), ours: figure(ours), file: figure(file) }
    }

    /// All runs.
    pub(crate) fn all(&self) -> impl Iterator<Item = &'a RunResult> {
        self.original.iter().chain(&self.ours).chain(&self.file).copied()
    }

    /// The run that got furthest: it has all steps.
    pub(crate) fn longest(&self) -> Option<&'a RunResult> {
        self.all().max_by_key(|r| r.steps.len())
    }

    /// From the start of the process until a first client has its rows, seconds.
    pub(crate) fn start(&self) -> Sides<Option<Spread>> {
        self.spread(|runs| mean_of(runs, |r| r.start_seconds))
    }

    /// Memory before any client, MB.
    pub(crate) fn idle(&self) -> Sides<Option<Spread>> {
        self.spread(|runs| mean_of(runs, |r| r.idle_pss_bytes as f64 / 1e6))
    }
}

fn mean_of(runs: &[&RunResult], figure: fn(&RunResult) -> f64) -> Option<Spread> {
    Spread::of(&runs.iter().map(|r| figure(r)).collect::<Vec<_>>())
}

impl Sides<Option<Spread>> {
    /// Whether no server has it.
    pub(crate) fn is_empty(&self) -> bool {
        self.original.is_none() && self.ours.is_none() && self.file.is_none()
    }

    /// How much better ours is than the original: with the same durability, and with a file.
    pub(crate) fn advantages(&self, less_is_better: Option<bool>) -> (Option<f64>, Option<f64>) {
        let of = |ours: Option<Spread>| advantage(self.original?, ours?, less_is_better);
        (of(self.ours), of(self.file))
    }
}

/// A figure over the runs of one server.
pub(crate) fn spread(runs: &[&RunResult], step: usize, figure: &Figure) -> Option<Spread> {
    let of = |step: &StepResult| {
        // The figures of a search are those of its best trial: of another rate for each server.
        let comparable = step.kind != "search" || matches!(figure.unit, "/s" | "rows/s");
        if comparable { (figure.of)(step) } else { None }
    };
    let values: Vec<f64> = runs.iter().filter_map(|r| of(r.steps.get(step)?)).collect();
    Spread::of(&values)
}

/// What Postgres sustains without a sync server, and how near ours comes to it.
pub(crate) fn beside_postgres(results: &Results, scenario: &str) -> Option<String> {
    let rate = |server: &str| {
        let runs = valid(results, scenario, server);
        let steps = runs.iter().flat_map(|r| &r.steps);
        let rates: Vec<f64> = steps.filter_map(|step| step.sustained_rate).collect();
        Spread::of(&rates).map(|rates| rates.mean)
    };
    let mut parts = Vec::new();
    for follower in Follower::ALL {
        let Some(limit) = rate(follower.name()) else { continue };
        let mut part = format!("{}: {} writes/s", follower.title(), number(limit));
        if let Some(ours) = rate("zeroring").filter(|_| limit > 0.0) {
            part += &format!(" (zeroring sustains {:.0} % of that)", ours / limit * 100.0);
        }
        parts.push(part);
    }
    (!parts.is_empty()).then(|| parts.join(". "))
}

/// original ÷ zeroring, or the reverse where more is better: above 1 = zeroring is better.
fn advantage(original: Spread, ours: Spread, less_is_better: Option<bool>) -> Option<f64> {
    let (over, under) =
        if less_is_better? { (original.mean, ours.mean) } else { (ours.mean, original.mean) };
    (under > 0.0 && over > 0.0).then(|| over / under)
}

/// The whole table.
pub(crate) fn text(results: &Results) -> String {
    let mut out = String::new();
    for first in scenarios(results) {
        let name = first.scenario.as_str();
        let _ = writeln!(out, "\n{name}: {}", first.title);
        let sides = Sides::of(results, name);
        let mut row = |label: &str, sides: Sides<Option<Spread>>, less: Option<bool>| {
            if sides.is_empty() {
                return;
            }
            let ratio = |r: Option<f64>| r.map(|r| format!("× {}", number(r))).unwrap_or_default();
            let cell = |s: Option<Spread>| s.map(Spread::text).unwrap_or_default();
            let (ours, file) = sides.advantages(less);
            let line = format!(
                "  {label:<44} {:>24} {:>24} {:>8} {:>14} {:>8}",
                cell(sides.original),
                cell(sides.ours),
                ratio(ours),
                cell(sides.file),
                ratio(file)
            );
            let _ = writeln!(out, "{}", line.trim_end());
        };
        row("start to ready, with initial sync, s", sides.start(), Some(true));
        row("memory at start, MB", sides.idle(), Some(true));
        for (index, step) in sides.longest().iter().flat_map(|r| r.steps.iter().enumerate()) {
            for figure in &FIGURES {
                let label = format!("{}: {}, {}", step.label, figure.name, figure.unit);
                row(&label, sides.spread(|r| spread(r, index, figure)), figure.less_is_better);
            }
        }
        if let Some(line) = beside_postgres(results, name) {
            let _ = writeln!(out, "  {line}");
        }
        for run in results.runs.iter().filter(|r| r.scenario == name) {
            for step in &run.steps {
                if let (Some(limit), Some(rate)) = (&step.limit, step.sustained_rate) {
                    let rate = number(rate);
                    let _ = writeln!(out, "  limit of {} at {rate}/s: {limit}", run.server);
                }
            }
            if let Some(why) = &run.void {
                let _ =
                    writeln!(out, "  VOID {}: {}", run.server, why.lines().next().unwrap_or(""));
            }
        }
    }
    for what in &results.left_out {
        let _ = writeln!(out, "  LEFT OUT {what}");
    }
    if !out.is_empty() {
        let head = format!(
            "{:<46} {:>24} {:>24} {:>8} {:>14} {:>8}",
            "", "original", "zeroring", "better", "views in file", "better"
        );
        out.insert_str(0, &head);
    }
    out
}
