//! Micro-benchmarks of single parts, without a framework.
//!
//! ```text
//! zeroring-bench [FILTER]             time: best and median of a few rounds, per unit of work
//! zeroring-bench --count NAME N       exactly N batches of one bench, and no clock
//! zeroring-bench --check [FILTER]     counts, against committed figures: see `check`
//! zeroring-bench --check-instructions [FILTER]
//! zeroring-bench --json NAME...       every round of these benches, a line of JSON each
//! zeroring-bench --compare NODE_MODULES DIRECTORY
//!                                     against the original's engine: see `compare`
//! ```
//!
//! The second form is for tools that count instead of timing, because instruction counts do not
//! depend on what else the machine does:
//! `perf stat -e instructions:u zeroring-bench --count json/row 1000`, or `valgrind --tool=none`.
//! Take the difference of two counts to get rid of the set-up.
//!
//! Every bench checks that its work had an effect: a bench of nothing is an error.

use std::process::ExitCode;
use std::time::Duration;

mod check;
mod clock;
mod compare;
mod engine;
mod fixture;
mod hydrate;
mod live;
mod storage;
mod store;
mod wire;

use clock::Watch;

#[global_allocator]
static ALLOCATOR: check::Counting = check::Counting;

/// What a bench may fail with.
type Failure = Box<dyn std::error::Error>;

/// Does one batch of work; the number of units done.
type Batch = Box<dyn FnMut() -> Result<u64, Failure>>;

/// A bench: name, unit of work, set-up.
struct Bench {
    name: &'static str,
    unit: &'static str,
    /// Counted by `--check`: its work is on few threads and always the same.
    steady: bool,
    make: fn() -> Result<Batch, Failure>,
}

const BENCHES: [Bench; 32] = [
    Bench { name: "engine/idle", unit: "commit", steady: true, make: engine::idle },
    Bench { name: "engine/route-1k", unit: "commit", steady: true, make: engine::route_1k },
    Bench { name: "engine/route-10k", unit: "commit", steady: true, make: engine::route },
    Bench { name: "engine/ranges-10k", unit: "commit", steady: true, make: engine::ranges },
    Bench { name: "engine/plans-1k", unit: "commit", steady: true, make: engine::route_plans },
    Bench {
        name: "engine/untouched",
        unit: "commit and plan",
        steady: true,
        make: engine::untouched,
    },
    Bench { name: "engine/shared", unit: "commit", steady: true, make: engine::shared },
    Bench { name: "engine/window-100k", unit: "commit", steady: true, make: engine::window },
    Bench { name: "engine/window-idle", unit: "commit", steady: true, make: engine::window_idle },
    Bench { name: "engine/all-100k", unit: "commit", steady: true, make: engine::unlimited },
    Bench { name: "engine/exists-10k", unit: "commit", steady: true, make: engine::exists },
    Bench {
        name: "engine/transaction",
        unit: "10,000 rows",
        steady: true,
        make: engine::transaction,
    },
    Bench { name: "engine/attach", unit: "row", steady: true, make: engine::attach },
    Bench { name: "hydrate/cold", unit: "row", steady: true, make: hydrate::cold },
    Bench { name: "hydrate/second", unit: "row", steady: true, make: hydrate::second },
    Bench { name: "hydrate/limited", unit: "parent", steady: true, make: hydrate::limited },
    Bench { name: "hydrate/evidence", unit: "parent", steady: true, make: hydrate::evidence },
    Bench { name: "live/idle", unit: "commit", steady: false, make: live::idle },
    Bench { name: "live/route-1k", unit: "commit", steady: true, make: live::route_1k },
    Bench { name: "live/route-10k", unit: "commit", steady: false, make: live::route },
    Bench { name: "live/plans-1k", unit: "commit", steady: false, make: live::route_plans },
    Bench { name: "live/window-100k", unit: "commit", steady: false, make: live::window },
    Bench { name: "live/transaction", unit: "10,000 rows", steady: false, make: live::transaction },
    Bench { name: "json/row", unit: "row", steady: true, make: wire::row_json },
    Bench { name: "poke/part", unit: "row", steady: true, make: wire::poke_part },
    Bench { name: "ws/frame", unit: "frame", steady: true, make: wire::frame },
    Bench { name: "ws/decode", unit: "message", steady: true, make: wire::decode },
    Bench { name: "zql/hash", unit: "query", steady: true, make: wire::query_hash },
    Bench {
        name: "replica/apply-1",
        unit: "transaction",
        steady: true,
        make: storage::apply_single,
    },
    Bench { name: "replica/apply-1000", unit: "row", steady: true, make: storage::apply_bulk },
    Bench { name: "cvr/flush-200", unit: "group", steady: true, make: storage::cvr_flush },
    Bench {
        name: "cvr/flush-200-postgres",
        unit: "group",
        steady: false,
        make: storage::cvr_flush_postgres,
    },
];

/// Rounds of a bench, and the least length of one.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        [] => time_all(""),
        ["--count", name, batches] => count(name, batches),
        ["--check"] => check::check("", false),
        ["--check", filter] => check::check(filter, false),
        ["--check-instructions"] => check::check("", true),
        ["--check-instructions", filter] => check::check(filter, true),
        ["--json", names @ ..] => names.iter().try_for_each(|name| print_rounds(name)),
        ["--compare", modules, directory] => compare::run(modules.as_ref(), directory.as_ref()),
        [option, ..] if option.starts_with('-') => {
            let usage = "usage: zeroring-bench [FILTER] | --count NAME BATCHES | \
                         --check [FILTER] | --check-instructions [FILTER] | --json NAME... | \
                         --compare NODE_MODULES DIRECTORY";
            Err(usage.into())
        }
        [filter, ..] => time_all(filter),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn time_all(filter: &str) -> Result<(), Failure> {
    let chosen: Vec<&Bench> = BENCHES.iter().filter(|b| b.name.contains(filter)).collect();
    if chosen.is_empty() {
        return Err(format!("no bench has {filter:?} in its name").into());
    }
    println!("{:<20} {:>12} {:>12}", "", "best", "median");
    for bench in chosen {
        let mut rounds: Vec<f64> = rounds(bench)?.iter().map(|r| r.wall_ns).collect();
        rounds.sort_by(f64::total_cmp);
        println!(
            "{:<20} {:>12} {:>12}  per {}",
            bench.name,
            nanoseconds(rounds[0]),
            nanoseconds(rounds[ROUNDS / 2]),
            bench.unit
        );
    }
    Ok(())
}

/// Nanoseconds per unit of work, in one round.
struct Round {
    wall_ns: f64,
    /// Of the thread that does the work.
    cpu_ns: f64,
}

fn rounds(bench: &Bench) -> Result<Vec<Round>, Failure> {
    let mut batch = (bench.make)().map_err(|e| format!("{}: {e}", bench.name))?;
    run(bench, &mut batch)?; // warms up
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let watch = Watch::start();
        let mut units = 0;
        let spent = loop {
            units += run(bench, &mut batch)?;
            let spent = watch.spent();
            if spent.wall >= ROUND {
                break spent;
            }
        };
        let per_unit = |time: Duration| time.as_nanos() as f64 / units as f64;
        rounds.push(Round { wall_ns: per_unit(spent.wall), cpu_ns: per_unit(spent.cpu) });
    }
    Ok(rounds)
}

fn print_rounds(name: &str) -> Result<(), Failure> {
    let bench = find(name)?;
    let rounds = rounds(bench)?;
    let of = |time: fn(&Round) -> f64| rounds.iter().map(time).collect::<Vec<_>>();
    let line = serde_json::json!({
        "name": name,
        "unit": bench.unit,
        "wall_ns": of(|r| r.wall_ns),
        "cpu_ns": of(|r| r.cpu_ns),
    });
    println!("{line}");
    Ok(())
}

fn find(name: &str) -> Result<&'static Bench, Failure> {
    let bench = BENCHES.iter().find(|b| b.name == name);
    bench.ok_or_else(|| format!("there is no bench {name:?}").into())
}

fn run(bench: &Bench, batch: &mut Batch) -> Result<u64, Failure> {
    match batch() {
        Ok(0) => Err(format!("{}: did nothing", bench.name).into()),
        Ok(units) => Ok(units),
        Err(e) => Err(format!("{}: {e}", bench.name).into()),
    }
}

fn count(name: &str, batches: &str) -> Result<(), Failure> {
    let bench = find(name)?;
    let batches: u64 = batches.parse()?;
    let mut batch = (bench.make)()?;
    let mut units = 0;
    for _ in 0..batches {
        units += run(bench, &mut batch)?;
    }
    println!("{units} × {}", bench.unit);
    Ok(())
}

fn nanoseconds(ns: f64) -> String {
    match ns {
        n if n >= 1e6 => format!("{:.2} ms", n / 1e6),
        n if n >= 1e3 => format!("{:.2} µs", n / 1e3),
        n => format!("{n:.1} ns"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs alone: the counter is the process's, and the runner gives each test a process.
    #[test]
    fn every_bench_does_its_work_and_allocates_no_more_than_its_base() {
        check::check("", false).unwrap_or_else(|e| panic!("{e}"));
    }
}
