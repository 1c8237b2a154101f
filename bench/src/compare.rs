//! Ours against the original's engine, on the same data and queries and on this machine.
//!
//! The original's part is `original/engine.mjs`: its engine from the published package, run by
//! Node. Both sides run twice, original – ours – ours – original, so that a machine that gets
//! slower or faster meanwhile does not favour either. Each run makes five rounds of each bench;
//! what counts is the median of all rounds, in CPU time of the thread that does the work: a
//! machine that does something else too changes it little.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value as Json, json};

use crate::{Failure, fixture, hydrate, nanoseconds, storage};

/// One piece of work: what it is, its unit, and the benches of both sides that do it.
struct Pair {
    what: &'static str,
    unit: &'static str,
    original: &'static str,
    ours: &'static str,
}

const fn pair(
    what: &'static str,
    unit: &'static str,
    original: &'static str,
    ours: &'static str,
) -> Pair {
    Pair { what, unit, original, ours }
}

const COLD: &str = "hydrate a query of 10,000 rows in 3 levels, with a connection and an engine \
                    of its own";
const SECOND: &str = "the same query for a second subscriber";
const LIMITED: &str = "1,000 parents, of each the newest 3 of 30 children";
const EVIDENCE: &str = "1,000 parents for which one of 30 children exists";
const ROUTE_1K: &str = "a commit of 1 row under 1,000 queries `project_id = ?`, at most one of \
                        them concerned";
const ROUTE_10K: &str = "the same under 10,000 queries";
const PLANS: &str = "the same under 10,000 queries of 1,000 shapes, half of them ranges";
const WINDOW: &str = "a commit of 1 row under the first 100 of 100,000 rows; every other one \
                      moves a row at the top";
const TRANSACTION: &str = "a commit of 10,000 rows under 1,000 queries of 50 rows each";

/// Over SQLite, as the servers run it; then in memory on both sides.
const SQLITE: [Pair; 9] = [
    pair(COLD, "row", "sqlite/hydrate-cold", "hydrate/cold"),
    pair(SECOND, "row", "sqlite/hydrate-second", "hydrate/second"),
    pair(LIMITED, "parent", "sqlite/hydrate-limited", "hydrate/limited"),
    pair(EVIDENCE, "parent", "sqlite/hydrate-evidence", "hydrate/evidence"),
    pair(ROUTE_1K, "commit", "sqlite/route-1k", "live/route-1k"),
    pair(ROUTE_10K, "commit", "sqlite/route-10k", "live/route-10k"),
    pair(PLANS, "commit", "sqlite/plans-1k", "live/plans-1k"),
    pair(WINDOW, "commit", "sqlite/window-100k", "live/window-100k"),
    pair(TRANSACTION, "commit", "sqlite/transaction", "live/transaction"),
];
const MEMORY: [Pair; 5] = [
    pair(ROUTE_1K, "commit", "memory/route-1k", "engine/route-1k"),
    pair(ROUTE_10K, "commit", "memory/route-10k", "engine/route-10k"),
    pair(PLANS, "commit", "memory/plans-1k", "engine/plans-1k"),
    pair(WINDOW, "commit", "memory/window-100k", "engine/window-100k"),
    pair(TRANSACTION, "commit", "memory/transaction", "engine/transaction"),
];

/// What the benches of ours count besides, for the reader: moving to the next version, or making
/// the commit, without a query.
const IDLE: [&str; 3] = ["live/idle", "engine/idle", "engine/window-idle"];

/// What the name of the other side's row of the table stands for.
const HEAD: &str = "\
# The engine against the original's

Written by `zeroring-bench --compare` (`bench/src/compare.rs`, `bench/original/engine.mjs`): the \
original's engine from its npm package and ours, on the same data, the same queries and the same \
changes. No sockets, no client views, no change log on either side.

";

const NOTES: &str = "
How to read it:

- CPU time of the thread that does the work, per unit; median of all rounds of two runs each, in \
the order original – ours – ours – original. Collector and compiler threads of Node are not counted.
- **SQLite**, the original: `PipelineDriver` as its server runs one per client group, with planner, \
operator storage, row keys and signatures. Its changes are handed over ready-made, so reading the \
change log and moving its snapshot are not in its figures; writing the changes into its snapshot is, \
because its engine does so. Ours: replica file, reader and engine as an executor runs them. Moving \
to the new snapshot is in our figures; applying the transaction to the file is not (the replication \
core does it once for all executors).
- **In memory**: the original's operators over its `MemorySource`; our engine over rows in memory. \
Making the commit is in our figures.
- A second subscriber: the original hydrates again, beside the first one in the same client group. \
Ours attaches to the rows that are there. With 200 groups on one query this is what happens 199 \
times.
- The original's figures of a commit are for **one client group**; each further group with these \
queries costs as much again. Ours are for all groups of an executor.
- Neither side runs out of time here: the original's server would give up an advance that takes \
longer than its hydration took, and hydrate again.
";

/// Both sides, and `engine.json` and `engine.md` in `directory`.
pub(crate) fn run(modules: &Path, directory: &Path) -> Result<(), Failure> {
    let data = tempfile::tempdir()?;
    storage::write_replica(&data.path().join("items.db"), 100_000, &fixture::published_by_rank())?;
    hydrate::write_replica(&data.path().join("tree.db"), &hydrate::TREE)?;
    hydrate::write_replica(&data.path().join("families.db"), &hydrate::FAMILIES)?;
    let node = modules.join("node/bin/node");
    let original = || {
        let mut command = Command::new(&node);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/original/engine.mjs");
        command.arg(script).arg(modules).arg(data.path());
        lines(command)
    };
    let ours = || {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--json").args(SQLITE.iter().chain(&MEMORY).map(|p| p.ours)).args(IDLE);
        lines(command)
    };
    let mut rounds = Rounds::default();
    for part in 0..4 {
        eprintln!("{} of 4: {}", part + 1, ["original", "ours", "ours", "original"][part]);
        rounds.add(if part == 0 || part == 3 { original()? } else { ours()? })?;
    }
    let package = modules.join("@rocicorp/zero/package.json");
    let package: Json = serde_json::from_slice(&std::fs::read(package)?)?;
    let machine = json!({
        "cpu": cpu_model(),
        "cpus": std::thread::available_parallelism()?.get(),
        "original": package["version"],
    });
    let page = page(&rounds, &machine)?;
    print!("{page}");
    std::fs::write(directory.join("engine.md"), page)?;
    let all = json!({"machine": machine, "rounds": rounds.0});
    std::fs::write(directory.join("engine.json"), format!("{all:#}\n"))?;
    Ok(())
}

/// Runs a program that prints a line of JSON per bench.
fn lines(mut command: Command) -> Result<Vec<Json>, Failure> {
    let name = format!("{command:?}");
    let output = command.stderr(Stdio::inherit()).output().map_err(|e| format!("{name}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{name}: {}", output.status).into());
    }
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

fn cpu_model() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let model = info.lines().find(|l| l.starts_with("model name"))?;
    Some(model.split_once(':')?.1.trim().to_owned())
}

/// By bench: nanoseconds per unit of each round.
#[derive(Default)]
struct Rounds(BTreeMap<String, Json>);

impl Rounds {
    fn add(&mut self, lines: Vec<Json>) -> Result<(), Failure> {
        for mut line in lines {
            let name = line["name"].as_str().ok_or("a line without a name")?.to_owned();
            let known = self.0.entry(name).or_insert_with(|| json!({"wall_ns": [], "cpu_ns": []}));
            for time in ["wall_ns", "cpu_ns"] {
                let (Some(known), Some(new)) =
                    (known[time].as_array_mut(), line[time].as_array_mut())
                else {
                    return Err(format!("a line without {time}").into());
                };
                known.append(new);
            }
        }
        Ok(())
    }

    /// Median, least and greatest CPU time; wall time where there is none.
    fn of(&self, name: &str) -> Result<[f64; 3], Failure> {
        let bench = self.0.get(name).ok_or_else(|| format!("{name} was not measured"))?;
        let times = |which: &str| -> Option<Vec<f64>> {
            bench[which].as_array()?.iter().map(Json::as_f64).collect()
        };
        let mut all = times("cpu_ns").or_else(|| times("wall_ns")).unwrap_or_default();
        all.sort_by(f64::total_cmp);
        match (all.first(), all.last()) {
            (Some(&least), Some(&greatest)) => Ok([all[all.len() / 2], least, greatest]),
            _ => Err(format!("{name} has no rounds").into()),
        }
    }
}

fn page(rounds: &Rounds, machine: &Json) -> Result<String, Failure> {
    let mut page = HEAD.to_owned();
    let cpu = machine["cpu"].as_str().unwrap_or("a CPU without a name");
    let version = machine["original"].as_str().unwrap_or("unknown");
    let _ = writeln!(page, "{cpu}, {} CPUs; original {version}.", machine["cpus"]);
    for (title, pairs) in [("Over SQLite", &SQLITE[..]), ("In memory", &MEMORY[..])] {
        let _ =
            writeln!(page, "\n## {title}\n\n| | per | original | ours | |\n|---|---|---|---|---|");
        for p in pairs {
            let (theirs, ours) = (rounds.of(p.original)?, rounds.of(p.ours)?);
            let ratio = ratio(theirs[0] / ours[0]);
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | × {ratio} |",
                p.what,
                p.unit,
                shown(theirs),
                shown(ours)
            );
        }
    }
    page.push_str(NOTES);
    let idle: Vec<String> = IDLE
        .iter()
        .map(|name| Ok(format!("`{name}` {}", nanoseconds(rounds.of(name)?[0]))))
        .collect::<Result<_, Failure>>()?;
    let _ = writeln!(
        page,
        "- What our benches of a commit cost without any query, not \
        subtracted above: {}.",
        idle.join(", ")
    );
    Ok(page)
}

/// The median, and how far the rounds are apart.
fn shown([median, least, greatest]: [f64; 3]) -> String {
    format!("{} ({} – {})", nanoseconds(median), nanoseconds(least), nanoseconds(greatest))
}

/// Two digits that count.
fn ratio(x: f64) -> String {
    match x {
        x if x >= 100.0 => {
            let unit = 10_f64.powf(x.log10().floor() - 1.0);
            format!("{:.0}", (x / unit).round() * unit)
        }
        x if x >= 10.0 => format!("{x:.0}"),
        x => format!("{x:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BENCHES;

    #[test]
    fn every_bench_that_is_compared_exists() {
        for name in SQLITE.iter().chain(&MEMORY).map(|p| p.ours).chain(IDLE) {
            assert!(BENCHES.iter().any(|b| b.name == name), "{name}");
        }
        let script = include_str!("../original/engine.mjs");
        for Pair { original, .. } in SQLITE.iter().chain(&MEMORY) {
            let (_, name) = original.split_once('/').unwrap();
            assert!(script.contains(&format!("/{name}'")) || script.contains(&format!("/{name}`")));
        }
    }

    #[test]
    fn the_page_has_the_medians_of_all_rounds_and_their_ratio() {
        let mut rounds = Rounds::default();
        let line =
            |name: &str, cpu: [f64; 2]| json!({"name": name, "wall_ns": [9, 9], "cpu_ns": cpu});
        for p in SQLITE.iter().chain(&MEMORY) {
            rounds.add(vec![line(p.original, [4000.0, 1000.0])]).unwrap();
            rounds.add(vec![line(p.original, [2000.0, 3000.0])]).unwrap();
            rounds.add(vec![line(p.ours, [10.0, 10.0])]).unwrap();
        }
        IDLE.iter().for_each(|name| rounds.add(vec![line(name, [1.0, 1.0])]).unwrap());
        let page = page(&rounds, &json!({"cpu": "Z80", "cpus": 1, "original": "1.9.0"})).unwrap();
        assert!(page.contains("| row | 3.00 µs (1.00 µs – 4.00 µs) | 10.0 ns"), "{page}");
        assert!(page.contains("| × 300 |"), "{page}");
        assert!(Rounds::default().of("hydrate/cold").is_err());
    }

    #[test]
    fn ratios_have_two_digits() {
        assert_eq!([1.26, 12.6, 126.0, 1264.0].map(ratio), ["1.3", "13", "130", "1300"]);
    }
}
