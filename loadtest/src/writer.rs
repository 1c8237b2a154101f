//! Writes on an open loop: each has its intended time, is late if Postgres or the server holds it
//! up, and carries the intended time in its row, so that no delay hides another.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Statement};

use crate::client::stats::Latency;
use crate::data_set::{DataSize, PEOPLE};
use crate::error::LoadError;
use crate::models::ModelWrite;

/// Connections that write at the same time, at most. One connection's commits follow each other,
/// each with a sync of the log; those of many connections share one.
const MAX_CONNECTIONS: usize = 32;

/// One connection for so many writes a second, besides two.
const RATE_PER_CONNECTION: f64 = 60.0;

/// How often the writer looks whether it is to stop.
const STOP_POLL: Duration = Duration::from_millis(50);

/// How long the connections' last answers may take when the writer is stopped.
const LAST_ANSWERS: Duration = Duration::from_secs(3);

/// Writes that are sent without looking at answers in between, at most.
const YIELD_EVERY: u64 = 64;

/// Which projects are written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// One of the connected groups' own projects, any.
    Own,
    /// Project 0: what all groups share.
    Shared,
}

/// What a write does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Change {
    /// Updates a title.
    Title,
    /// Updates a rank: rows move in, out and about windows.
    Rank,
    /// Adds a comment.
    Comment,
    /// What the data's model does; `to = "shared"` is its hot variant.
    Model,
    /// Of ten: six titles, a rank, a comment, a new item, a deleted item.
    Mixed,
}

/// How to write.
#[derive(Debug, Clone)]
pub(crate) struct WritePlan {
    pub(crate) per_second: f64,
    pub(crate) duration: Duration,
    pub(crate) target: Target,
    pub(crate) change: Change,
    /// Rows changed by one transaction.
    pub(crate) rows: usize,
    /// Projects or partitions that have a group.
    pub(crate) watched: usize,
    pub(crate) data: DataSize,
    pub(crate) seed: u64,
}

/// What became of it.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub(crate) transactions: u64,
    /// From the intended time to the commit's return.
    pub(crate) commit: Latency,
    /// The same, since somebody last looked.
    recent: Latency,
    pub(crate) failure: Option<String>,
}

/// A writer at work: one thread, several connections. A connection does not wait for the answer to
/// one write before it sends the next that is due.
pub(crate) struct Writers {
    thread: JoinHandle<()>,
    done: Arc<AtomicBool>,
    /// Dropped, it lets the thread end: until then its CPU time can be seen.
    hold: mpsc::Sender<()>,
    stop: Arc<AtomicBool>,
    written: Arc<Mutex<Written>>,
}

impl Writers {
    /// Connects, and starts to write a moment later.
    pub(crate) fn start(url: &str, plan: WritePlan) -> Result<Writers, LoadError> {
        let stop = Arc::new(AtomicBool::new(false));
        let written = Arc::new(Mutex::new(Written::default()));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(LoadError::io("starting a writer"))?;
        let count = ((plan.per_second / RATE_PER_CONNECTION) as usize + 2).min(MAX_CONNECTIONS);
        let connections = runtime.block_on(connect(url, count, &plan))?;
        let (ended, result) = (stop.clone(), written.clone());
        let done = Arc::new(AtomicBool::new(false));
        let all_done = done.clone();
        let (hold, held) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("writer".to_owned())
            .spawn(move || {
                runtime.block_on(write_all(connections, plan, &ended, &result));
                all_done.store(true, Ordering::Relaxed);
                // Nothing is ever sent.
                let _: Result<(), _> = held.recv();
            })
            .map_err(LoadError::io("starting a writer"))?;
        Ok(Writers { thread, done, hold, stop, written })
    }

    /// Whether all writes are done.
    pub(crate) fn is_done(&self) -> bool {
        self.done.load(Ordering::Relaxed) || self.thread.is_finished()
    }

    /// No further writes: what is late stays undone.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// From the intended time to the commit's return, of the writes since the last call.
    pub(crate) fn take_recent(&self) -> Latency {
        std::mem::take(&mut lock(&self.written).recent)
    }

    /// Waits for all writes.
    pub(crate) fn join(self) -> Written {
        drop(self.hold);
        // A panicked writer shows as missing writes.
        let _ = self.thread.join();
        std::mem::take(&mut *lock(&self.written))
    }
}

fn lock(written: &Mutex<Written>) -> std::sync::MutexGuard<'_, Written> {
    written.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection with its statements.
struct Connection {
    client: Client,
    statements: Prepared,
}

/// What is written with.
enum Prepared {
    Projects(ProjectStatements),
    Model(ModelStatements),
}

struct ProjectStatements {
    title: Statement,
    rank: Statement,
    comment: Statement,
    insert: Statement,
    delete: Statement,
}

/// Statements of the plan's model.
struct ModelStatements {
    add: Statement,
    touch: Statement,
}

async fn connect(
    url: &str,
    count: usize,
    plan: &WritePlan,
) -> Result<Vec<Arc<Connection>>, LoadError> {
    let refused = || LoadError::sql("connecting a writer");
    let mut all = Vec::new();
    for _ in 0..count {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.map_err(refused())?;
        // Its end shows as a failed write.
        tokio::spawn(connection);
        let prepare = async |sql: &str| client.prepare(sql).await.map_err(refused());
        if let Some(texts) = plan.data.model.statements(plan.is_hot()) {
            let (add, touch) = (prepare(&texts.add).await?, prepare(&texts.touch).await?);
            let statements = Prepared::Model(ModelStatements { add, touch });
            all.push(Arc::new(Connection { client, statements }));
            continue;
        }
        let title = prepare("UPDATE item SET title = $1, sent_us = $2 WHERE id = ANY($3)").await?;
        let rank = prepare("UPDATE item SET rank = $1, sent_us = $2 WHERE id = ANY($3)").await?;
        let comment = prepare(
            "INSERT INTO comment SELECT i || $1, i, $2, 'New', $3 FROM unnest($4::text[]) i",
        )
        .await?;
        let insert =
            prepare("INSERT INTO item VALUES ($1, $2, $3, 'open', $4, $5, '', $6)").await?;
        let delete = prepare("DELETE FROM item WHERE id = $1").await?;
        let statements = ProjectStatements { title, rank, comment, insert, delete };
        all.push(Arc::new(Connection { client, statements: Prepared::Projects(statements) }));
    }
    Ok(all)
}

/// Sends every write when it is due.
async fn write_all(
    connections: Vec<Arc<Connection>>,
    plan: WritePlan,
    stop: &AtomicBool,
    written: &Arc<Mutex<Written>>,
) {
    let total = (plan.per_second * plan.duration.as_secs_f64()).round() as u64;
    let lead = Duration::from_millis(50);
    let start = Instant::now() + lead;
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let start_us = (epoch + lead).as_micros() as u64;
    let plan = Arc::new(plan);
    let mut under_way = JoinSet::new();
    for k in 0..total {
        let offset = Duration::from_secs_f64(k as f64 / plan.per_second);
        let due = start + offset;
        // In short naps, so that a long pause can be broken off.
        while due > Instant::now() && !stop.load(Ordering::Relaxed) {
            let nap = due.min(Instant::now() + STOP_POLL);
            tokio::time::sleep_until(nap.into()).await;
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let connection = connections[k as usize % connections.len()].clone();
        let (plan, written) = (plan.clone(), written.clone());
        let sent_us = start_us + offset.as_micros() as u64;
        under_way.spawn(async move {
            let result = plan.write(&connection, k, sent_us).await;
            let mut written = lock(&written);
            match result {
                Ok(()) => {
                    written.transactions += 1;
                    let us = due.elapsed().as_micros() as u64;
                    written.commit.record(us);
                    written.recent.record(us);
                }
                Err(e) => {
                    let text = LoadError::sql("writing")(e).to_string();
                    written.failure.get_or_insert(text);
                }
            }
        });
        while under_way.try_join_next().is_some() {}
        if k % YIELD_EVERY == 0 {
            // When everything is late, the connections must get their turn too.
            tokio::task::yield_now().await;
        }
    }
    let all = async { while under_way.join_next().await.is_some() {} };
    let stopped = async {
        while !stop.load(Ordering::Relaxed) {
            tokio::time::sleep(STOP_POLL).await;
        }
        tokio::time::sleep(LAST_ANSWERS).await;
    };
    tokio::select! {
        () = all => {}
        () = stopped => {}
    }
}

impl WritePlan {
    fn is_hot(&self) -> bool {
        self.target == Target::Shared
    }

    fn rng(&self, k: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed.wrapping_mul(1 << 32) + k)
    }

    async fn write(
        &self,
        to: &Connection,
        k: u64,
        sent_us: u64,
    ) -> Result<(), tokio_postgres::Error> {
        let sent = sent_us as i64;
        let client = &to.client;
        match &to.statements {
            Prepared::Projects(statements) => self.write_project(client, statements, k, sent).await,
            Prepared::Model(statements) => self.write_model(client, statements, k, sent).await,
        }
        .map(drop)
    }

    async fn write_model(
        &self,
        client: &Client,
        statements: &ModelStatements,
        k: u64,
        sent: i64,
    ) -> Result<u64, tokio_postgres::Error> {
        let model = self.data.model;
        let write = model.write(self.is_hot(), k, &self.data, self.watched, &mut self.rng(k));
        match write {
            ModelWrite::Add { part, parent } => {
                let (id, body) = (self.new_item(k), "x".repeat(self.data.body_bytes));
                // Newer than everything that was written before, and seeded.
                let values: [&(dyn ToSql + Sync); 6] = [&id, &part, &parent, &body, &sent, &sent];
                client.execute(&statements.add, &values).await
            }
            ModelWrite::Touch { id } => client.execute(&statements.touch, &[&id, &sent]).await,
        }
    }

    async fn write_project(
        &self,
        client: &Client,
        to: &ProjectStatements,
        k: u64,
        sent: i64,
    ) -> Result<u64, tokio_postgres::Error> {
        let mut rng = self.rng(k);
        let project = match self.target {
            Target::Own => rng.random_range(0..self.watched.max(1)),
            Target::Shared => 0,
        };
        let all = self.data.items.max(1);
        let first = rng.random_range(0..all);
        let items: Vec<String> =
            (0..self.rows).map(|i| format!("p{project}-i{}", (first + i) % all)).collect();
        let rank: i32 = rng.random_range(0..100_000);
        let person = format!("u{}", rng.random_range(0..PEOPLE));
        let change = match (self.change, k % 10) {
            (Change::Mixed, 0..=5) => Change::Title,
            (Change::Mixed, 6) => Change::Rank,
            (Change::Mixed, 7) => Change::Comment,
            (Change::Mixed, 8) => {
                let (id, project) = (self.new_item(k), format!("p{project}"));
                let title = format!("New {k}");
                let values: [&(dyn ToSql + Sync); 6] =
                    [&id, &project, &person, &rank, &title, &sent];
                return client.execute(&to.insert, &values).await;
            }
            (Change::Mixed, _) => {
                // One that was added some time before, if it was.
                let id = self.new_item(k.wrapping_sub(101));
                return client.execute(&to.delete, &[&id]).await;
            }
            (plain, _) => plain,
        };
        match change {
            Change::Title | Change::Mixed | Change::Model => {
                let title = format!("Changed by write {k}");
                client.execute(&to.title, &[&title, &sent, &items]).await
            }
            Change::Rank => client.execute(&to.rank, &[&rank, &sent, &items]).await,
            Change::Comment => {
                let suffix = format!("-w{}-{k}", self.seed);
                client.execute(&to.comment, &[&suffix, &person, &sent, &items]).await
            }
        }
    }

    fn new_item(&self, k: u64) -> String {
        format!("w{}-{k}", self.seed)
    }
}
