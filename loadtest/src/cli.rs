//! The command line.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::budget::{Budget, order};
use crate::error::LoadError;
use crate::null::{self, NullLoad};
use crate::pin::{self, Seats};
use crate::result::{Results, RunResult};
use crate::run::{RunOptions, run};
use crate::scenario::Scenario;
use crate::server::ServerKind;
use crate::upstream::{self, Follower};
use crate::{report, table};

const HELP: &str = "\
zeroring-loadtest: load, measure and compare sync servers.

  zeroring-loadtest run SCENARIO.toml... --server SERVER [--server SERVER]
      Runs each scenario against each server and prints a table. Postgres is private, and new
      for every run. Exit code 1 if a run is void.

  zeroring-loadtest upstream-limit SCENARIO.toml...
      The search of each scenario with Postgres alone, and with a reader that throws the changes
      away. `run` does it at its end for scenarios that ask for it.

  zeroring-loadtest report RESULTS.json... --html FILE
      Makes one report of results that were written before.

  zeroring-loadtest null [--clients N] [--rate N] [--pokes N] [--seconds N] [--workers N]
      What the load generator itself can do: N clients, to each of which a server that does
      nothing else makes N writes a second of N pokes each.

Options
  --server zeroring[=BINARY]         default target/release/zeroring; client views in Postgres,
                                     as the original's
  --server zeroring-file[=BINARY]    the same with client views in a local file
  --server original[=NODE_MODULES]   default tests/client/node_modules
  --abba                 run the servers in the order A B B A; a third only once, at the end
  --minutes N            end within this time: runs that do not fit are left out, and named
  --no-pin               with four CPUs or more: do not share them out
  --json FILE            write the results
  --html FILE            write the report
  --set NAME=VALUE       a setting of both servers (repeatable)
  --set-zeroring NAME=VALUE, --set-original NAME=VALUE
  --postgres NAME=VALUE  a setting of Postgres (repeatable)
  --workers N            threads of the load generator (1)
";

/// Client sockets, with room for files and pipes.
const WANTED_FILES: u64 = 60_000;

#[derive(Default)]
struct Arguments {
    files: Vec<PathBuf>,
    servers: Vec<ServerKind>,
    abba: bool,
    json: Option<PathBuf>,
    html: Option<PathBuf>,
    set: Vec<String>,
    set_zeroring: Vec<String>,
    set_original: Vec<String>,
    postgres: Vec<String>,
    workers: Option<NonZeroUsize>,
    minutes: Option<f64>,
    no_pin: bool,
}

/// Runs the program; false if a run that it made was void.
///
/// # Errors
/// [`LoadError`]: wrong arguments, or a run that could not be made.
pub fn main(arguments: &[String]) -> Result<bool, LoadError> {
    match arguments.split_first() {
        Some((command, rest)) if command == "run" => run_all(&parse(rest)?),
        Some((command, rest)) if command == "upstream-limit" => upstream_limits(&parse(rest)?),
        Some((command, rest)) if command == "report" => join_reports(&parse(rest)?),
        Some((command, rest)) if command == "null" => null(rest),
        Some((command, [rate, pokes])) if command == "null-server" => {
            null::serve(positive("rate", rate)?, positive("pokes", pokes)? as usize).map(|()| true)
        }
        Some((command, _)) if matches!(command.as_str(), "help" | "--help" | "-h") => {
            print!("{HELP}");
            Ok(true)
        }
        _ => Err(LoadError::Usage("which command?".to_owned())),
    }
}

fn positive(name: &str, text: &str) -> Result<f64, LoadError> {
    let wrong = || LoadError::Usage(format!("{name} {text}: a positive number"));
    text.parse().ok().filter(|n| *n > 0.0).ok_or_else(wrong)
}

fn null(arguments: &[String]) -> Result<bool, LoadError> {
    allow_many_files();
    let mut load = NullLoad {
        clients: 20_000,
        rate: 2.0,
        pokes: 5,
        seconds: 10.0,
        workers: NonZeroUsize::MIN,
    };
    for pair in arguments.chunks(2) {
        let [name, value] = pair else {
            return Err(LoadError::Usage(format!("{} needs a value", pair[0])));
        };
        let number = positive(name, value)?;
        match name.as_str() {
            "--clients" => load.clients = number as usize,
            "--rate" => load.rate = number,
            "--pokes" => load.pokes = number as usize,
            "--seconds" => load.seconds = number,
            "--workers" => {
                load.workers = NonZeroUsize::new(number as usize).unwrap_or(NonZeroUsize::MIN);
            }
            other => return Err(LoadError::Usage(format!("unknown option {other}"))),
        }
    }
    null::measure(&load)
}

fn parse(arguments: &[String]) -> Result<Arguments, LoadError> {
    let mut parsed = Arguments::default();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = || {
            let missing = || LoadError::Usage(format!("{argument} needs a value"));
            rest.next().cloned().ok_or_else(missing)
        };
        match argument.as_str() {
            "--server" => parsed.servers.push(ServerKind::parse(&value()?)?),
            "--abba" => parsed.abba = true,
            "--no-pin" => parsed.no_pin = true,
            "--minutes" => parsed.minutes = Some(positive("--minutes", &value()?)?),
            "--json" => parsed.json = Some(value()?.into()),
            "--html" => parsed.html = Some(value()?.into()),
            "--set" => parsed.set.push(value()?),
            "--set-zeroring" => parsed.set_zeroring.push(value()?),
            "--set-original" => parsed.set_original.push(value()?),
            "--postgres" => parsed.postgres.push(value()?),
            "--workers" => {
                let text = value()?;
                let wrong = |_| LoadError::Usage(format!("--workers {text}: a number from 1"));
                parsed.workers = Some(text.parse().map_err(wrong)?);
            }
            option if option.starts_with("--") => {
                return Err(LoadError::Usage(format!("unknown option {option}")));
            }
            file => parsed.files.push(file.into()),
        }
    }
    if parsed.files.is_empty() {
        return Err(LoadError::Usage("needs a file".to_owned()));
    }
    Ok(parsed)
}

impl Arguments {
    fn seats(&self) -> Option<Seats> {
        if self.no_pin { None } else { Seats::of(&pin::allowed()) }
    }

    /// `seats` is how the CPUs were shared out before this process moved to its own.
    fn settings(&self, kind: &ServerKind, seats: Option<&Seats>) -> Vec<String> {
        let cpus = seats.map_or_else(|| pin::allowed().len(), |s| s.server.len());
        let mut settings = vec![format!("ZERO_NUM_SYNC_WORKERS={}", cpus.max(1))];
        settings.extend(self.set.iter().cloned());
        match kind {
            ServerKind::Zeroring(_) => settings.extend(self.set_zeroring.iter().cloned()),
            ServerKind::ZeroringFile(_) => {
                settings.push("ZERO_CVR_DB=file:{dir}/cvr.db".to_owned());
                settings.extend(self.set_zeroring.iter().cloned());
            }
            ServerKind::Original(_) => settings.extend(self.set_original.iter().cloned()),
        }
        settings
    }
}

fn commit() -> String {
    let output = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    text.unwrap_or_default()
}

fn join_reports(arguments: &Arguments) -> Result<bool, LoadError> {
    let mut all = Results::default();
    for file in &arguments.files {
        let doing = || format!("reading {}", file.display());
        let text = std::fs::read_to_string(file).map_err(LoadError::io(doing()))?;
        let results: Results = serde_json::from_str(&text)
            .map_err(|e| LoadError::Io { doing: doing(), cause: std::io::Error::other(e) })?;
        all.runs.extend(results.runs);
        all.left_out.extend(results.left_out);
        all.wall_seconds += results.wall_seconds;
    }
    finish(arguments, &all)?;
    // A void run is told of in the report; making the report did not fail.
    Ok(true)
}

/// Writes what was asked for, prints the table.
fn finish(arguments: &Arguments, results: &Results) -> Result<(), LoadError> {
    write_files(arguments, results)?;
    print!("{}", table::text(results));
    Ok(())
}

fn write_files(arguments: &Arguments, results: &Results) -> Result<(), LoadError> {
    if let Some(file) = &arguments.json {
        write_json(file, results)?;
    }
    if let Some(file) = &arguments.html {
        let doing = format!("writing {}", file.display());
        std::fs::write(file, report::html(results)).map_err(LoadError::io(doing))?;
    }
    Ok(())
}

/// What all runs of a command have in common.
struct Session<'a> {
    arguments: &'a Arguments,
    seats: Option<Seats>,
    budget: Budget,
    results: Results,
}

impl<'a> Session<'a> {
    fn begin(arguments: &'a Arguments) -> Result<Session<'a>, LoadError> {
        allow_many_files();
        let seats = arguments.seats();
        if let Some(seats) = &seats {
            // Later threads are born there too.
            pin::move_tree(std::process::id(), &seats.generator)
                .map_err(LoadError::io("pinning to CPUs"))?;
        }
        let minutes = arguments.minutes.map(|m| Duration::from_secs_f64(m * 60.0));
        Ok(Session { arguments, seats, budget: Budget::new(minutes), results: Results::default() })
    }

    fn options(&self, settings: Vec<String>, deadline: Instant) -> RunOptions {
        RunOptions {
            workers: self.arguments.workers.unwrap_or(NonZeroUsize::MIN),
            postgres: self.arguments.postgres.clone(),
            settings,
            commit: commit(),
            seats: self.seats.clone(),
            deadline,
            position: String::new(),
            remaining: None,
        }
    }

    fn leave_out(&mut self, scenario: &Scenario, server: &str) {
        let what = format!("{} by {server}: no time was left", scenario.name);
        eprintln!("left out: {what}");
        self.results.left_out.push(what);
    }

    /// Keeps what a run found, or why it could not be made.
    fn note(
        &mut self,
        scenario: &Scenario,
        server: &str,
        run: Result<RunResult, LoadError>,
    ) -> Result<(), LoadError> {
        let result = run.unwrap_or_else(|error| {
            eprintln!("{} · {server}: {error}", scenario.name);
            RunResult {
                scenario: scenario.name.clone(),
                title: scenario.title.clone(),
                server: server.to_owned(),
                void: Some(error.to_string()),
                ..RunResult::default()
            }
        });
        self.results.runs.push(result);
        self.results.wall_seconds = self.budget.elapsed().as_secs_f64();
        // Each time: a run that is broken off leaves what it has.
        write_files(self.arguments, &self.results)
    }

    /// What Postgres does without us.
    fn upstream_limit(&mut self, scenario: &Scenario) -> Result<(), LoadError> {
        for follower in Follower::ALL {
            let Some(deadline) = self.budget.deadline_within(upstream::EXPECTED) else {
                self.leave_out(scenario, follower.name());
                continue;
            };
            let run = upstream::run(scenario, follower, &self.options(Vec::new(), deadline));
            self.note(scenario, follower.name(), run)?;
        }
        Ok(())
    }

    fn end(self) -> Result<bool, LoadError> {
        finish(self.arguments, &self.results)?;
        Ok(self.results.runs.iter().all(|r| r.void.is_none()))
    }
}

fn read_scenarios(arguments: &Arguments) -> Result<Vec<Scenario>, LoadError> {
    arguments.files.iter().map(|f| Scenario::read(f)).collect()
}

fn upstream_limits(arguments: &Arguments) -> Result<bool, LoadError> {
    let scenarios = read_scenarios(arguments)?;
    let mut session = Session::begin(arguments)?;
    for scenario in &scenarios {
        session.upstream_limit(scenario)?;
    }
    session.end()
}

fn run_all(arguments: &Arguments) -> Result<bool, LoadError> {
    if arguments.servers.is_empty() {
        return Err(LoadError::Usage("needs a --server".to_owned()));
    }
    let scenarios = read_scenarios(arguments)?;
    let mut session = Session::begin(arguments)?;
    let runs = order(&scenarios, &arguments.servers, arguments.abba);
    for (index, planned) in runs.iter().enumerate() {
        let (scenario, kind) = (planned.scenario, planned.server);
        let Some(deadline) = session.budget.deadline(*planned) else {
            session.leave_out(scenario, kind.name());
            continue;
        };
        let settings = arguments.settings(kind, session.seats.as_ref());
        let options = RunOptions {
            position: format!("[{}/{}] ", index + 1, runs.len()),
            remaining: Some(session.budget.estimate_all(&runs[index..])),
            ..session.options(settings, deadline)
        };
        let begin = Instant::now();
        let result = run(scenario, kind, &options);
        session.budget.note(*planned, begin.elapsed());
        session.note(scenario, kind.name(), result)?;
    }
    for scenario in scenarios.iter().filter(|s| s.upstream_limit) {
        session.upstream_limit(scenario)?;
    }
    session.end()
}

fn write_json(file: &Path, results: &Results) -> Result<(), LoadError> {
    let doing = || format!("writing {}", file.display());
    let text = serde_json::to_string(results)
        .map_err(|e| LoadError::Io { doing: doing(), cause: std::io::Error::other(e) })?;
    std::fs::write(file, text + "\n").map_err(LoadError::io(doing()))
}

/// Every client is a file descriptor.
fn allow_many_files() {
    if let Err(error) = raise_file_limit().and_then(|()| zeroring_net::rt::reserve_files()) {
        eprintln!("cannot have {WANTED_FILES} open files: {error}");
    }
}

fn raise_file_limit() -> std::io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if now.current.is_none_or(|n| n >= WANTED_FILES) {
        return Ok(());
    }
    // Only root may raise the hard limit; everybody may go up to it.
    let limit = Rlimit {
        current: Some(WANTED_FILES),
        maximum: now.maximum.map(|most| most.max(WANTED_FILES)),
    };
    if setrlimit(Resource::Nofile, limit).is_err() {
        setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    // A failed unwrap is a failed test.
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// `make bench` says with its exit code that a run is void; the report of one is a report.
    #[test]
    fn making_a_report_of_a_void_run_does_not_fail() {
        let dir = tempfile::tempdir().unwrap();
        let (json, html) = (dir.path().join("results.json"), dir.path().join("report.html"));
        let void = RunResult { void: Some("diverged".to_owned()), ..RunResult::default() };
        write_json(&json, &Results { runs: vec![void], ..Results::default() }).unwrap();
        let arguments = ["report", json.to_str().unwrap(), "--html", html.to_str().unwrap()];
        assert!(main(&arguments.map(str::to_owned)).unwrap());
        assert!(std::fs::read_to_string(&html).unwrap().contains("is void: diverged"));
    }
}
