//! Writes on an open loop: each has its intended time, is late if Postgres or the server holds it
//! up, and carries the intended time in its row, so that no delay hides another.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use postgres::{Client, NoTls};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::client::stats::Latency;
use crate::data_set::PEOPLE;
use crate::error::LoadError;

/// Connections that write at the same time, at most.
const MAX_WRITERS: usize = 16;

/// One connection for so many writes a second, besides two.
const RATE_PER_WRITER: f64 = 60.0;

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
    /// Projects that have a group.
    pub(crate) projects: usize,
    pub(crate) items: usize,
    pub(crate) seed: u64,
}

/// What became of it.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub(crate) transactions: u64,
    /// From the intended time to the commit's return.
    pub(crate) commit: Latency,
    pub(crate) failure: Option<String>,
}

/// Writers at work.
pub(crate) struct Writers {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    written: Arc<Mutex<Written>>,
}

struct Shared {
    plan: WritePlan,
    next: AtomicU64,
    start: Instant,
    start_us: u64,
    stop: Arc<AtomicBool>,
    written: Arc<Mutex<Written>>,
}

impl Writers {
    /// Connects, and starts to write a moment later.
    pub(crate) fn start(url: &str, plan: WritePlan) -> Result<Writers, LoadError> {
        let count = ((plan.per_second / RATE_PER_WRITER) as usize + 2).min(MAX_WRITERS);
        let connections = (0..count)
            .map(|_| Client::connect(url, NoTls).map_err(LoadError::sql("connecting a writer")))
            .collect::<Result<Vec<_>, _>>()?;
        let lead = Duration::from_millis(50);
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stop = Arc::new(AtomicBool::new(false));
        let written = Arc::new(Mutex::new(Written::default()));
        let shared = Arc::new(Shared {
            plan,
            next: AtomicU64::new(0),
            start: Instant::now() + lead,
            start_us: (epoch + lead).as_micros() as u64,
            stop: stop.clone(),
            written: written.clone(),
        });
        let threads = connections
            .into_iter()
            .map(|sql| {
                let shared = shared.clone();
                std::thread::spawn(move || shared.work(sql))
            })
            .collect();
        Ok(Writers { threads, stop, written })
    }

    /// Whether all writes are done.
    pub(crate) fn is_done(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// No further writes: what is late stays undone.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Waits for all writes.
    pub(crate) fn join(self) -> Written {
        for thread in self.threads {
            // A panicked writer shows as missing writes.
            let _ = thread.join();
        }
        std::mem::take(&mut *self.written.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Shared {
    fn work(&self, mut sql: Client) {
        let total = (self.plan.per_second * self.plan.duration.as_secs_f64()).round() as u64;
        let mut mine = Written::default();
        while !self.stop.load(Ordering::Relaxed) {
            let k = self.next.fetch_add(1, Ordering::Relaxed);
            if k >= total {
                break;
            }
            let offset = Duration::from_secs_f64(k as f64 / self.plan.per_second);
            let due = self.start + offset;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let sent_us = self.start_us + offset.as_micros() as u64;
            if let Err(e) = self.write(&mut sql, k, sent_us) {
                mine.failure = Some(LoadError::sql("writing")(e).to_string());
                break;
            }
            mine.transactions += 1;
            mine.commit.record(due.elapsed().as_micros() as u64);
        }
        let mut all = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        all.transactions += mine.transactions;
        all.commit.merge(&mine.commit);
        all.failure = all.failure.take().or(mine.failure);
    }

    fn write(&self, sql: &mut Client, k: u64, sent_us: u64) -> Result<(), postgres::Error> {
        let mut rng = StdRng::seed_from_u64(self.plan.seed.wrapping_mul(1 << 32) + k);
        let project = match self.plan.target {
            Target::Own => rng.random_range(0..self.plan.projects.max(1)),
            Target::Shared => 0,
        };
        let first = rng.random_range(0..self.plan.items.max(1));
        let items: Vec<String> = (0..self.plan.rows)
            .map(|i| format!("p{project}-i{}", (first + i) % self.plan.items.max(1)))
            .collect();
        let sent = sent_us as i64;
        let change = match (self.plan.change, k % 10) {
            (Change::Mixed, 0..=5) => Change::Title,
            (Change::Mixed, 6) => Change::Rank,
            (Change::Mixed, 7) => Change::Comment,
            (Change::Mixed, 8) => {
                let id = self.new_item(k);
                let owner = format!("u{}", rng.random_range(0..PEOPLE));
                let rank = rng.random_range(0..100_000);
                let (project, title) = (format!("p{project}"), format!("New {k}"));
                sql.execute(
                    "INSERT INTO item VALUES ($1, $2, $3, 'open', $4, $5, '', $6)",
                    &[&id, &project, &owner, &rank, &title, &sent],
                )?;
                return Ok(());
            }
            (Change::Mixed, _) => {
                // One that was added some time before, if it was.
                let id = self.new_item(k.wrapping_sub(101));
                sql.execute("DELETE FROM item WHERE id = $1", &[&id])?;
                return Ok(());
            }
            (plain, _) => plain,
        };
        match change {
            Change::Title | Change::Mixed => sql.execute(
                "UPDATE item SET title = $1, sent_us = $2 WHERE id = ANY($3)",
                &[&format!("Changed by write {k}"), &sent, &items],
            )?,
            Change::Rank => sql.execute(
                "UPDATE item SET rank = $1, sent_us = $2 WHERE id = ANY($3)",
                &[&rng.random_range(0..100_000), &sent, &items],
            )?,
            Change::Comment => sql.execute(
                "INSERT INTO comment SELECT i || $1, i, $2, 'New', $3 FROM unnest($4::text[]) i",
                &[
                    &format!("-w{}-{k}", self.plan.seed),
                    &format!("u{}", rng.random_range(0..PEOPLE)),
                    &sent,
                    &items,
                ],
            )?,
        };
        Ok(())
    }

    fn new_item(&self, k: u64) -> String {
        format!("w{}-{k}", self.plan.seed)
    }
}
