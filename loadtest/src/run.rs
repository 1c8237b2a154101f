//! One run: a fresh Postgres, a fresh server, a scenario's steps one after the other, the check.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use zeroring_net::pg::local_server::LocalServer;

use crate::api::Api;
use crate::check::Comparison;
use crate::client::connection::{ClientSetup, PROTOCOL_VERSION};
use crate::client::fleet::Fleet;
use crate::client::stats::Interval;
use crate::data_set::{self, DataSize, Query, QuerySpec};
use crate::error::LoadError;
use crate::limits::{Meter, Parties};
use crate::pin::{self, Seats};
use crate::process;
use crate::progress::Progress;
use crate::result::{Distribution, RunResult, Sample, StageTime, StepResult};
use crate::scenario::Scenario;
use crate::server::{Server, ServerKind};

/// Between two looks at the workers' counters.
const TICK: Duration = Duration::from_millis(20);

/// Length of a sample of a step's timeline.
const SAMPLE_EVERY: Duration = Duration::from_millis(500);

/// How long the first client may wait for its row.
const PROBE_TIMEOUT: Duration = Duration::from_secs(180);

/// How long the last changes may take to arrive before clients count as diverged.
const CONVERGE_TIMEOUT: Duration = Duration::from_secs(90);

/// What is left for the final comparison when the run's time is up.
const LAST_COMPARISON: Duration = Duration::from_secs(8);

/// What a run is made with, besides the scenario and the server.
#[derive(Debug, Clone)]
pub(crate) struct RunOptions {
    /// Threads of the load generator.
    pub(crate) workers: NonZeroUsize,
    /// `name=value` settings of the private Postgres.
    pub(crate) postgres: Vec<String>,
    /// `NAME=value` settings of the server.
    pub(crate) settings: Vec<String>,
    pub(crate) commit: String,
    /// Which CPUs belong to whom, if that is settled.
    pub(crate) seats: Option<Seats>,
    /// When the run has to end.
    pub(crate) deadline: Instant,
    /// Begins every line of progress.
    pub(crate) position: String,
    /// What everything is expected to take from now on.
    pub(crate) remaining: Option<Duration>,
}

/// All that is running, and what the steps need to know of it.
pub(crate) struct Stage<'a> {
    pub(crate) scenario: &'a Scenario,
    pub(crate) kind: &'a ServerKind,
    pub(crate) fleet: Fleet,
    pub(crate) url: String,
    /// The queries of each client, by its index.
    pub(crate) queries: Vec<Vec<Query>>,
    /// Differs for every batch of writes.
    pub(crate) write_seed: u64,
    pub(crate) api: Option<Api>,
    deadline: Instant,
    server: Server,
    sql: Client,
    postgres_pid: u32,
    progress: Progress,
    // Last: the database outlives who uses it.
    _postgres: LocalServer,
}

/// The counters of one step.
pub(crate) struct Watch {
    pub(crate) begin: Instant,
    pub(crate) total: Interval,
    pub(crate) samples: Vec<Sample>,
    sample: Interval,
    sample_begin: Instant,
    sample_cpu: f64,
    cpu: Cpu,
    wal: i64,
    stages: Vec<StageTime>,
    label: String,
}

#[derive(Clone, Copy)]
struct Cpu {
    server: f64,
    postgres: f64,
    generator: f64,
}

/// A private, new Postgres with a scenario's data.
pub(crate) struct Database {
    pub(crate) url: String,
    pub(crate) sql: Client,
    /// Of its first process.
    pub(crate) pid: u32,
    pub(crate) postgres: LocalServer,
}

impl Database {
    /// Starts it with `name=value` settings, and fills it.
    pub(crate) fn start(
        settings: &[String],
        data: &DataSize,
        progress: &mut Progress,
    ) -> Result<Database, LoadError> {
        progress.tell("starting Postgres");
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let postgres = LocalServer::start(&settings)?;
        let url = postgres.url("postgres");
        let mut sql = Client::connect(&url, NoTls).map_err(LoadError::sql("connecting"))?;
        progress.tell("seeding");
        data_set::seed(&mut sql, data)?;
        let pid = process::child_with_argument(&format!("port={}", postgres.port())).ok_or_else(
            || LoadError::Server {
                server: "postgres".to_owned(),
                cause: "its process was not found".to_owned(),
            },
        )?;
        Ok(Database { url, sql, pid, postgres })
    }
}

/// Runs `scenario` against `kind`.
pub(crate) fn run(
    scenario: &Scenario,
    kind: &ServerKind,
    options: &RunOptions,
) -> Result<RunResult, LoadError> {
    let begin = Instant::now();
    let prefix = format!("{}{} · {}", options.position, scenario.name, kind.name());
    let mut progress = Progress::new(prefix, options.remaining);
    let seats = options.seats.as_ref();
    let pinned = || LoadError::io("pinning to CPUs");
    let Database { postgres, url, mut sql, pid: postgres_pid } =
        Database::start(&options.postgres, &scenario.data, &mut progress)?;
    if let Some(seats) = seats {
        pin::move_tree(postgres_pid, &seats.postgres).map_err(pinned())?;
    }
    progress.tell("starting the server");
    let api = if scenario.mutates() { Some(Api::start(&url)?) } else { None };
    let mut settings = options.settings.clone();
    settings.extend(api.as_ref().map(|api| format!("ZERO_MUTATE_URL={}", api.url())));
    let cpus = seats.map(|s| s.server.as_slice());
    let server = pin::born_on(cpus, || Server::start(kind, &url, &settings, options.deadline))
        .map_err(pinned())??;
    let fleet = Fleet::start(options.workers, server.address())?;
    let mut result = describe(scenario, kind.name(), &kind.version(), options);
    let version = sql.query_one("SHOW server_version", &[]).map_err(LoadError::sql("asking"))?;
    result.postgres_version = version.get(0);
    let mut stage = Stage {
        scenario,
        kind,
        fleet,
        url,
        queries: Vec::new(),
        write_seed: 0,
        api,
        deadline: options.deadline,
        server,
        sql,
        postgres_pid,
        progress,
        _postgres: postgres,
    };
    stage.probe()?;
    result.start_seconds = stage.server.started.elapsed().as_secs_f64();
    result.idle_pss_bytes = process::pss_bytes(stage.server.pid());
    stage.play(&mut result)?;
    result.statz = stage.server.statz();
    drop(stage);
    result.wall_seconds = begin.elapsed().as_secs_f64();
    Ok(result)
}

/// A result without figures.
pub(crate) fn describe(
    scenario: &Scenario,
    server: &str,
    server_version: &str,
    options: &RunOptions,
) -> RunResult {
    let data = &scenario.data;
    RunResult {
        scenario: scenario.name.clone(),
        title: scenario.title.clone(),
        about: scenario.about.clone(),
        headline: scenario.headline.clone(),
        server: server.to_owned(),
        server_version: server_version.to_owned(),
        settings: [options.postgres.as_slice(), options.settings.as_slice()].concat(),
        hardware: process::hardware(),
        commit: options.commit.clone(),
        pinning: Seats::describe(options.seats.as_ref(), pin::allowed().len()),
        replicated_rows: (data.projects * (1 + data.items * (1 + data.comments))) as u64,
        ..RunResult::default()
    }
}

impl Stage<'_> {
    /// A first client: the server is ready when it has its row.
    fn probe(&mut self) -> Result<(), LoadError> {
        self.progress.tell("waiting for the first rows");
        let data = &self.scenario.data;
        let spec = QuerySpec::probe(data);
        let index = usize::MAX;
        let setup = ClientSetup {
            index,
            client_id: "probe".to_owned(),
            group_id: "probe".to_owned(),
            queries: vec![spec.for_group(0, data).ask()],
            client_schema: data_set::client_schema(data).to_string().into(),
            counts_new: false,
            protocol: PROTOCOL_VERSION,
        };
        self.fleet.open(setup, Instant::now()).map_err(LoadError::io("opening a client"))?;
        let begin = Instant::now();
        for wanted in [1, 0] {
            while self.fleet.complete() != wanted {
                self.server.check_alive()?;
                if begin.elapsed() > PROBE_TIMEOUT || self.left().is_zero() {
                    let complaints = self.fleet.take_interval().complaints.join("; ");
                    return Err(LoadError::Server {
                        server: "the first client".to_owned(),
                        cause: format!("{complaints}\n{}", self.server.log_tail()),
                    });
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            if wanted == 1 {
                self.fleet.close(index).map_err(LoadError::io("closing a client"))?;
            }
        }
        Ok(())
    }

    fn play(&mut self, result: &mut RunResult) -> Result<(), LoadError> {
        result.started_at = self.text("SELECT to_char(now(), 'YYYY-MM-DD HH24:MI:SS TZ')")?;
        let mut violations = 0;
        for step in &self.scenario.steps {
            let mut done = self.step(step, &mut violations)?;
            done.kind = step.kind().to_owned();
            self.progress.line(&summary(&done));
            let broken = !done.settled;
            result.steps.push(done);
            if violations > 0 || broken {
                break;
            }
        }
        let begin = Instant::now();
        self.deadline = self.deadline.max(begin + LAST_COMPARISON);
        let mut watch = self.watch("comparing with Postgres")?;
        let mut comparison = self.comparison()?;
        let difference = self.converge(&mut watch, &mut comparison)?;
        result.compared_clients = comparison.clients();
        result.compared_rows = comparison.rows();
        result.converge_seconds = begin.elapsed().as_secs_f64();
        violations += watch.total.violations;
        if let Some(difference) = difference {
            result.void = Some(format!("clients diverged from Postgres: {difference}"));
        }
        if violations > 0 {
            let first = result.steps.iter().flat_map(|s| &s.complaints).next();
            let first = first.cloned().unwrap_or_default();
            result.void = Some(format!("{violations} protocol violations, first: {first}"));
        }
        if let Some(why) = &result.void {
            self.progress.line(&format!("VOID: {why}\n{}", self.server.log_tail()));
        }
        Ok(())
    }

    fn text(&mut self, sql: &str) -> Result<String, LoadError> {
        Ok(self.sql.query_one(sql, &[]).map_err(LoadError::sql("asking"))?.get(0))
    }

    fn wal(&mut self) -> Result<i64, LoadError> {
        let text = self.text("SELECT (pg_current_wal_lsn() - '0/0')::bigint::text")?;
        Ok(text.parse().unwrap_or(0))
    }

    /// Until the run has to end.
    pub(crate) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// What everybody has used until now.
    pub(crate) fn meter(&self) -> Meter {
        Meter::read(Parties { server: Some(self.server.pid()), postgres: self.postgres_pid })
    }

    /// Where the server's time went since its start. The original does not tell, and would ask
    /// Postgres a lot for its `/statz`.
    fn stages(&self) -> Vec<StageTime> {
        match self.kind {
            ServerKind::Original(_) => Vec::new(),
            ServerKind::Zeroring(_) | ServerKind::ZeroringFile(_) => {
                self.server.statz().map(|s| StageTime::all(&s)).unwrap_or_default()
            }
        }
    }

    fn cpu(&self) -> Cpu {
        let seconds = |pid| process::cpu_seconds(pid);
        let (server, postgres) = (seconds(self.server.pid()), seconds(self.postgres_pid));
        let generator = process::own_cpu_seconds();
        Cpu { server, postgres, generator }
    }

    /// Starts counting anew.
    pub(crate) fn watch(&mut self, label: &str) -> Result<Watch, LoadError> {
        let stages = self.stages();
        let cpu = self.cpu();
        let wal = self.wal()?;
        let now = Instant::now();
        Ok(Watch {
            begin: now,
            total: self.fleet.take_interval(),
            samples: Vec::new(),
            sample: Interval::default(),
            sample_begin: now,
            sample_cpu: cpu.server,
            cpu,
            wal,
            stages,
            label: label.to_owned(),
        }
        .emptied())
    }

    /// Lets a little time pass and looks at the counters.
    pub(crate) fn tick(&mut self, watch: &mut Watch) -> Result<(), LoadError> {
        std::thread::sleep(TICK);
        watch.sample.merge(self.fleet.take_interval());
        if watch.sample_begin.elapsed() >= SAMPLE_EVERY {
            self.server.check_alive()?;
            self.push_sample(watch);
        }
        Ok(())
    }

    fn push_sample(&mut self, watch: &mut Watch) {
        let interval = std::mem::take(&mut watch.sample);
        let seconds = watch.sample_begin.elapsed().as_secs_f64().max(0.001);
        watch.sample_begin = Instant::now();
        let cpu = process::cpu_seconds(self.server.pid());
        let sample = Sample {
            at: watch.begin.elapsed().as_secs_f64(),
            write_p50: interval.write.quantile_ms(0.5),
            write_p99: interval.write.quantile_ms(0.99),
            rows: interval.row_ops,
            connected: self.fleet.connected(),
            server_cpu: (cpu - watch.sample_cpu) / seconds,
            pss_bytes: process::pss_bytes(self.server.pid()),
        };
        watch.sample_cpu = cpu;
        self.progress.tell(&format!(
            "{} · {:.0} s · {}/{} complete · {:.0} rows/s · p50 {} ms · cpu {:.0} % · {:.0} MB",
            watch.label,
            sample.at,
            self.fleet.complete(),
            self.queries.len(),
            interval.row_ops as f64 / seconds,
            sample.write_p50.map_or("–".to_owned(), |ms| format!("{ms:.1}")),
            sample.server_cpu * 100.0,
            sample.pss_bytes as f64 / 1e6,
        ));
        watch.samples.push(sample);
        watch.total.merge(interval);
    }

    /// Ticks until `done`; false if that is not so within `timeout`.
    pub(crate) fn wait(
        &mut self,
        watch: &mut Watch,
        timeout: Duration,
        mut done: impl FnMut(&Fleet) -> bool,
    ) -> Result<bool, LoadError> {
        let deadline = self.deadline.min(Instant::now() + timeout);
        while !done(&self.fleet) {
            if Instant::now() > deadline {
                return Ok(false);
            }
            self.tick(watch)?;
        }
        Ok(true)
    }

    /// What a sample of clients has to hold now.
    pub(crate) fn comparison(&mut self) -> Result<Comparison, LoadError> {
        Comparison::with_postgres(&mut self.sql, &self.queries, self.scenario.tabs)
    }

    /// Ticks until the sample is equal; the difference if it stays.
    pub(crate) fn converge(
        &mut self,
        watch: &mut Watch,
        comparison: &mut Comparison,
    ) -> Result<Option<String>, LoadError> {
        let deadline = self.deadline.min(Instant::now() + CONVERGE_TIMEOUT);
        loop {
            match comparison.difference(&mut self.fleet)? {
                Some(difference) if Instant::now() > deadline => return Ok(Some(difference)),
                Some(_) => self.tick(watch)?,
                None => return Ok(None),
            }
        }
    }

    /// The step's figures. `seconds` is the time that deliveries are related to.
    pub(crate) fn finish(
        &mut self,
        mut watch: Watch,
        seconds: f64,
        settled: bool,
    ) -> Result<StepResult, LoadError> {
        self.fleet_settles(&mut watch);
        let cpu = self.cpu();
        let stages = StageTime::since(self.stages(), &watch.stages);
        let wal = self.wal()?;
        let total = watch.total;
        Ok(StepResult {
            label: watch.label,
            seconds,
            clients: self.queries.len(),
            hydrate: Distribution::of(&total.hydrate),
            reconnect: Distribution::of(&total.reconnect),
            change: Distribution::of(&total.change),
            write: Distribution::of(&total.write),
            mutation: Distribution::of(&total.mutation),
            pokes: total.pokes,
            rows: total.row_ops,
            deliveries_per_second: total.row_ops as f64 / seconds.max(0.001),
            bytes: total.bytes,
            server_cpu_seconds: cpu.server - watch.cpu.server,
            postgres_cpu_seconds: cpu.postgres - watch.cpu.postgres,
            generator_cpu_seconds: cpu.generator - watch.cpu.generator,
            pss_bytes: process::pss_bytes(self.server.pid()),
            wal_bytes: u64::try_from(wal - watch.wal).unwrap_or(0),
            disconnects: total.disconnects,
            stages,
            settled,
            timeline: watch.samples,
            complaints: total.complaints,
            ..StepResult::default()
        })
    }

    fn fleet_settles(&mut self, watch: &mut Watch) {
        watch.sample.merge(self.fleet.take_interval());
        self.push_sample(watch);
    }
}

impl Watch {
    /// Mutations that were confirmed.
    pub(crate) fn mutations(&self) -> u64 {
        self.total.mutation.count() + self.sample.mutation.count()
    }

    /// What was counted before the step is not its own.
    fn emptied(mut self) -> Watch {
        self.total = Interval::default();
        self
    }
}

/// One line about a step.
pub(crate) fn summary(step: &StepResult) -> String {
    let mut parts = vec![format!("{:.2} s", step.seconds)];
    let latencies = [
        ("mutation", &step.mutation),
        ("hydrate", &step.hydrate),
        ("reconnect", &step.reconnect),
        ("change", &step.change),
        ("write", &step.write),
    ];
    for (name, distribution) in latencies {
        if let Some(d) = distribution {
            parts.push(format!("{name} p50 {:.1} p99 {:.1} max {:.1} ms", d.p50, d.p99, d.max));
        }
    }
    if let Some(rate) = step.sustained_rate {
        let rate = crate::table::number(rate);
        parts.push(format!("sustains {rate} writes/s"));
        parts.extend(step.limit.as_ref().map(|limit| format!("limit: {limit}")));
    }
    parts.push(format!("{} rows", step.rows));
    parts.push(format!("server {:.2} CPU-s", step.server_cpu_seconds));
    parts.push(format!("{:.0} MB", step.pss_bytes as f64 / 1e6));
    if step.disconnects > 0 {
        parts.push(format!("{} disconnects", step.disconnects));
    }
    if !step.settled {
        parts.push("NOT SETTLED".to_owned());
    }
    parts.extend(step.complaints.first().map(|c| format!("first complaint: {c}")));
    format!("{}: {}", step.label, parts.join(", "))
}
