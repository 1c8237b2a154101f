//! What Postgres does alone: the writes of a scenario's search at growing rates, with nobody who
//! replicates them, and with a reader of the change stream that throws everything away.
//!
//! Nothing that follows Postgres can sustain more than that reader on the same machine: what a sync
//! server reaches is to be read beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use postgres::Client;
use zeroring_net::pg::{self, PgConfig, PgError, ReplicationStream, StreamEvent};

use crate::error::LoadError;
use crate::limits::{Meter, Parties};
use crate::pin;
use crate::progress::Progress;
use crate::result::{Distribution, RunResult, Sample, StepResult};
use crate::run::{Database, RunOptions, describe, summary};
use crate::scenario::{Scenario, Step, Writes};
use crate::search::{Search, Tried, is_lost, judge};
use crate::writer::{WritePlan, Writers};

/// What the search with one of the followers takes on two CPUs.
pub(crate) const EXPECTED: Duration = Duration::from_secs(50);

/// Between two looks at what was committed.
const TICK: Duration = Duration::from_millis(20);

/// Length of a sample.
const SAMPLE_EVERY: Duration = Duration::from_millis(500);

/// How long writes may be late before they are given up, and the reader behind them.
const GRACE: Duration = Duration::from_secs(20);

/// What a trial takes besides its writes, at least.
const TRIAL_ENDING: Duration = Duration::from_secs(3);

/// How often the reader confirms what it has: as a server that keeps what it gets would.
const CONFIRM_EVERY: Duration = Duration::from_millis(250);

/// What marks the end of a trial in the change stream.
const MARK: &str = "zeroring-loadtest";

/// Slot and publication of the reader.
const READER: &str = "reader";

/// Who replicates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Follower {
    Nobody,
    /// Reads the change stream and throws it away.
    Reader,
}

impl Follower {
    pub(crate) const ALL: [Follower; 2] = [Follower::Nobody, Follower::Reader];

    /// As the "server" of results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Follower::Nobody => "postgres",
            Follower::Reader => "postgres-reader",
        }
    }

    /// As readers of a report are told.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Follower::Nobody => "Postgres alone",
            Follower::Reader => "Postgres and a reader that throws all changes away",
        }
    }
}

/// Searches for the highest rate of the writes of the scenario's first search.
pub(crate) fn run(
    scenario: &Scenario,
    follower: Follower,
    options: &RunOptions,
) -> Result<RunResult, LoadError> {
    let begin = Instant::now();
    let search = scenario.steps.iter().find_map(|step| match step {
        Step::Search { from, seconds, refine, limit_ms, writes } => {
            let from = from.zeroring;
            Some((step, from, Trials { seconds: *seconds, limit_ms: *limit_ms, writes }, *refine))
        }
        _ => None,
    });
    let Some((step, from, trials, refine)) = search else {
        let cause = format!("{} searches for no highest rate", scenario.name);
        return Err(LoadError::Usage(cause));
    };
    let prefix = format!("{}{} · {}", options.position, scenario.name, follower.name());
    let mut progress = Progress::new(prefix, options.remaining);
    let mut database = Database::start(&options.postgres, &scenario.data, &mut progress)?;
    if let Some(seats) = &options.seats {
        pin::move_tree(database.pid, &seats.postgres).map_err(LoadError::io("pinning to CPUs"))?;
    }
    let mut result = describe(scenario, follower.name(), "", options);
    result.started_at = text(&mut database.sql, "SELECT now()::timestamp(0)::text")?;
    result.postgres_version = text(&mut database.sql, "SHOW server_version")?;
    let reader = match follower {
        Follower::Nobody => None,
        Follower::Reader => Some(Reader::start(&mut database)?),
    };
    let mut bench = Bench { scenario, database, reader, deadline: options.deadline, seed: 0 };
    let search = Search::new(trials.seconds, refine);
    let mut found = search.drive(&step.label(), from, trials.limit_ms, |rate| {
        if bench.left() < Duration::from_secs_f64(trials.seconds) + TRIAL_ENDING {
            return Ok(Err("time was up".to_owned()));
        }
        progress.tell(&format!("trying {rate:.0}/s"));
        bench.trial(rate, &trials).map(Ok)
    })?;
    found.kind = step.kind().to_owned();
    progress.line(&summary(&found));
    result.steps.push(found);
    result.wall_seconds = begin.elapsed().as_secs_f64();
    Ok(result)
}

fn text(sql: &mut Client, query: &str) -> Result<String, LoadError> {
    Ok(sql.query_one(query, &[]).map_err(LoadError::sql("asking"))?.get(0))
}

/// What the trials of a search have in common.
struct Trials<'a> {
    seconds: f64,
    limit_ms: f64,
    writes: &'a Writes,
}

struct Bench<'a> {
    scenario: &'a Scenario,
    // Before the database that it reads from.
    reader: Option<Reader>,
    database: Database,
    deadline: Instant,
    /// Differs for every batch of writes.
    seed: u64,
}

impl Bench<'_> {
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn meter(&self) -> Meter {
        Meter::read(Parties { server: None, postgres: self.database.pid })
    }

    fn plan(&mut self, rate: f64, trials: &Trials<'_>) -> WritePlan {
        self.seed += 1;
        let data = &self.scenario.data;
        WritePlan {
            per_second: rate,
            duration: Duration::from_secs_f64(trials.seconds),
            target: trials.writes.to,
            change: trials.writes.change,
            rows: trials.writes.rows,
            watched: data.watched(),
            data: data.clone(),
            seed: self.seed,
        }
    }

    fn trial(&mut self, rate: f64, trials: &Trials<'_>) -> Result<Tried, LoadError> {
        let plan = self.plan(rate, trials);
        let writers = Writers::start(&self.database.url, plan)?;
        let meter = self.meter();
        let begin = Instant::now();
        let patience = Duration::from_secs_f64(trials.seconds) + GRACE;
        let mut timeline: Vec<Sample> = Vec::new();
        while !writers.is_done() {
            if is_lost(&timeline, trials.limit_ms) || begin.elapsed() > patience {
                writers.stop();
                break;
            }
            std::thread::sleep(TICK);
            let at = begin.elapsed();
            if at > SAMPLE_EVERY * (timeline.len() as u32 + 1) {
                let recent = writers.take_recent();
                timeline.push(Sample {
                    at: at.as_secs_f64(),
                    write_p50: recent.quantile_ms(0.5),
                    write_p99: recent.quantile_ms(0.99),
                    ..Sample::default()
                });
            }
        }
        let usage = meter.until(&self.meter());
        let written = writers.join();
        let behind = self.reader_is_behind()?;
        let commit = Distribution::of(&written.commit);
        let mut step = StepResult {
            seconds: trials.seconds,
            write: commit.clone(),
            commit,
            transactions: written.transactions,
            settled: true,
            timeline,
            usage,
            complaints: written.failure.into_iter().collect(),
            ..StepResult::default()
        };
        let intended = (rate * trials.seconds).round() as u64;
        let mut commits_late = false;
        let reason = judge(&step, intended, trials.limit_ms, &step.timeline, &mut commits_late)
            .or_else(|| {
                let ms = behind.as_secs_f64() * 1000.0;
                (ms > trials.limit_ms).then(|| format!("the reader is {ms:.0} ms behind"))
            });
        let limit = if reason.is_some() { step.usage.limit(commits_late) } else { String::new() };
        step.settled = behind < GRACE;
        Ok(Tried { step, reason, limit })
    }

    /// How long after the last write the reader has it; at most [`GRACE`].
    fn reader_is_behind(&mut self) -> Result<Duration, LoadError> {
        let Some(reader) = &self.reader else { return Ok(Duration::ZERO) };
        let before = reader.seen.marks.load(Ordering::Relaxed);
        let begin = Instant::now();
        self.database
            .sql
            .execute("SELECT pg_logical_emit_message(true, $1, ''::text)", &[&MARK])
            .map_err(LoadError::sql("marking the end of a trial"))?;
        while reader.seen.marks.load(Ordering::Relaxed) == before && begin.elapsed() < GRACE {
            if reader.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                let cause = "it ended".to_owned();
                return Err(LoadError::Server { server: "the reader".to_owned(), cause });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(begin.elapsed())
    }
}

/// What the reader has seen, and whether it is to end.
#[derive(Default)]
struct Seen {
    marks: AtomicU64,
    stop: AtomicBool,
}

/// Reads the change stream on a thread of its own.
struct Reader {
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    fn start(database: &mut Database) -> Result<Reader, LoadError> {
        // In two transactions: a slot is made in one that has written nothing.
        for statement in [
            format!("CREATE PUBLICATION {READER} FOR ALL TABLES"),
            format!("SELECT pg_create_logical_replication_slot('{READER}', 'pgoutput')"),
        ] {
            let done = database.sql.batch_execute(&statement);
            done.map_err(LoadError::sql("making the reader's slot"))?;
        }
        let failed =
            |e: PgError| LoadError::Postgres { doing: "starting the reader", cause: e.to_string() };
        let config = PgConfig::parse(&database.url).map_err(failed)?;
        let stream = pg::Client::connect_replication(&config)
            .and_then(|client| {
                client.start_replication(&format!(
                    "START_REPLICATION SLOT {READER} LOGICAL 0/0 (proto_version '1', \
                     publication_names '{READER}', messages 'true')"
                ))
            })
            .map_err(failed)?;
        let seen = Arc::new(Seen::default());
        let shared = seen.clone();
        let thread = std::thread::Builder::new()
            .name("reader".to_owned())
            .spawn(move || {
                if let Err(error) = discard(stream, &shared) {
                    eprintln!("the reader of the change stream ended: {error}");
                }
            })
            .map_err(LoadError::io("starting the reader"))?;
        Ok(Reader { seen, thread: Some(thread) })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its error was told.
            let _ = thread.join();
        }
    }
}

fn discard(mut stream: ReplicationStream, seen: &Seen) -> Result<(), PgError> {
    let (mut at, mut confirm_at) = (0, Instant::now() + CONFIRM_EVERY);
    while !seen.stop.load(Ordering::Relaxed) {
        match stream.next(Some(confirm_at), None)? {
            StreamEvent::Data { start, payload, .. } => {
                at = at.max(start);
                if payload.first() == Some(&b'M') {
                    seen.marks.fetch_add(1, Ordering::Relaxed);
                }
            }
            StreamEvent::KeepAlive { wal_end, reply_requested } => {
                at = at.max(wal_end);
                if reply_requested {
                    confirm_at = Instant::now();
                }
            }
            StreamEvent::Idle | StreamEvent::Woken => {}
        }
        let now = Instant::now();
        if now >= confirm_at {
            stream.send_status(at)?;
            confirm_at = now + CONFIRM_EVERY;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::writer::{Change, Target};

    #[test]
    fn a_trial_ends_when_the_reader_has_seen_every_write() {
        let text = "name = 'x'\ntitle = 't'\n[data]\nprojects = 1\nitems = 3\n\
                    [[query]]\nkind = 'items'\nproject = 'shared'\n\
                    [[step]]\ndo = 'connect'\ngroups = 1\n";
        let scenario = Scenario::parse(text).unwrap();
        let mut progress = Progress::new("test".to_owned(), None);
        let settings = ["fsync=off".to_owned()];
        let mut database = Database::start(&settings, &scenario.data, &mut progress).unwrap();
        let reader = Some(Reader::start(&mut database).unwrap());
        let deadline = Instant::now() + GRACE;
        let mut bench = Bench { scenario: &scenario, database, reader, deadline, seed: 0 };
        let writes = Writes { to: Target::Shared, change: Change::Title, rows: 1 };
        let trials = Trials { seconds: 0.5, limit_ms: f64::MAX, writes: &writes };
        for rate in [10.0, 40.0] {
            let tried = bench.trial(rate, &trials).unwrap();
            assert!(tried.step.settled, "the reader is behind");
            assert_eq!(tried.step.transactions as f64, rate * trials.seconds);
        }
        let marks = bench.reader.as_ref().unwrap().seen.marks.load(Ordering::Relaxed);
        assert_eq!(marks, 2, "one at the end of each trial");
    }
}
