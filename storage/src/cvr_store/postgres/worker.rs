//! Workers: each has a connection of its own and serves some lanes of the queue.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;
use zeroring_core::cvr::store::{CvrStoreError, Flushed};
use zeroring_core::cvr::{ClientGroupId, TtlClock};

use super::super::Answer;
use super::job::{FlushPart, Job, LoadJob, answer};
use super::queue::{Lane, Queue, Taken};
use super::read::{Attempt, Reader};
use super::session::{IDLE, Session};
use super::write::{Settled, Writer};

/// Requests that are taken at once; for reads, also the groups of one load.
const MAX_TAKEN: usize = 256;
/// Groups of one transaction: bounds the time to the first verdict, and what its failure costs.
const MAX_GROUPS: usize = 256;
/// Row records of one transaction, unless a single group has more.
const MAX_ROWS: usize = 8_192;
/// Attempts to load a group whose rows another server has still to write, and their distance.
const LOAD_ATTEMPTS: usize = 10;
const LOAD_DELAY: Duration = Duration::from_millis(500);

/// A worker and its connection.
pub(super) struct Worker {
    queue: Arc<Queue<Job>>,
    lanes: &'static [Lane],
    session: Session,
    known_schemas: HashSet<ClientGroupId>,
    schema: Arc<str>,
}

impl Worker {
    pub(super) fn new(
        queue: Arc<Queue<Job>>,
        lanes: &'static [Lane],
        session: Session,
        schema: Arc<str>,
    ) -> Worker {
        Worker { queue, lanes, session, known_schemas: HashSet::new(), schema }
    }

    fn writer(&mut self) -> Writer<'_> {
        Writer { session: &mut self.session, known_schemas: &mut self.known_schemas }
    }

    fn reader(&mut self) -> Reader<'_> {
        Reader { session: &mut self.session }
    }

    /// Works until the queue is closed and empty.
    pub(super) fn run(mut self) {
        loop {
            match self.queue.take(self.lanes, MAX_TAKEN, IDLE) {
                Taken::Jobs(jobs) => self.work(jobs),
                Taken::Idle => self.session.close(),
                Taken::Closed => return,
            }
        }
    }

    /// All of one lane. Flushes are taken together, and so are loads, and notes of clocks; a
    /// purge comes after the notes that came before it.
    fn work(&mut self, jobs: Vec<Job>) {
        let (mut flushes, mut clocks) = (Vec::new(), Vec::new());
        let (mut loads, mut reads) = (Vec::new(), Vec::new());
        for job in jobs {
            match job {
                Job::Flush(part) => match part.locked {
                    None => flushes.push(part),
                    Some(maybe_done) => {
                        let result = self.writer().commit_waiting(&part.flush, maybe_done);
                        settle(part, result);
                    }
                },
                Job::Load(job) => loads.push(job),
                Job::TtlClock(group, clock, now_ms) => clocks.push((group, clock, now_ms)),
                Job::Purge(limits, reply) => {
                    self.ttl_clocks(&mut clocks);
                    let schema = self.schema.clone();
                    answer(reply, self.writer().purge(&limits, &schema));
                }
                Job::Read(read) => reads.push(read),
            }
        }
        self.flush(flushes);
        self.ttl_clocks(&mut clocks);
        self.load(loads);
        self.reader().answer(reads);
    }

    fn ttl_clocks(&mut self, clocks: &mut Vec<(ClientGroupId, TtlClock, f64)>) {
        if !clocks.is_empty() {
            self.writer().ttl_clocks(&std::mem::take(clocks));
        }
    }

    /// Commits flushes in as few transactions as the limits allow; a group that comes twice is
    /// written twice, in order.
    fn flush(&mut self, parts: Vec<FlushPart>) {
        let mut waiting = parts;
        while !waiting.is_empty() {
            let mut groups: HashSet<ClientGroupId> = HashSet::new();
            let mut rows = 0;
            let (mut now, mut later) = (Vec::new(), Vec::new());
            for part in waiting {
                let fits = now.is_empty()
                    || (now.len() < MAX_GROUPS && rows + part.flush.rows.len() <= MAX_ROWS);
                // A group that has to wait keeps its place before its next flush.
                if groups.insert(part.flush.group.clone()) && fits {
                    rows += part.flush.rows.len();
                    now.push(part);
                } else {
                    later.push(part);
                }
            }
            let flushes: Vec<_> = now.iter().map(|part| &part.flush).collect();
            let settled = self.writer().commit(&flushes);
            for (part, settled) in now.into_iter().zip(settled) {
                match settled {
                    Settled::Verdict(result) => settle(part, result),
                    Settled::Locked { maybe_done } => self.wait(part, maybe_done),
                }
            }
            waiting = later;
        }
    }

    /// Lets the slow lane wait for a group's lock.
    fn wait(&mut self, mut part: FlushPart, maybe_done: bool) {
        part.locked = Some(maybe_done);
        let Err((jobs, _)) = self.queue.push_all(Lane::Slow, vec![Job::Flush(part)]) else {
            return;
        };
        // The store shuts down.
        self.work(jobs);
    }

    fn load(&mut self, jobs: Vec<LoadJob>) {
        if jobs.is_empty() {
            return;
        }
        let groups: Vec<_> = jobs.iter().map(|j| (j.group.clone(), j.connect_ms)).collect();
        for (mut job, attempt) in jobs.into_iter().zip(self.reader().load(&groups)) {
            let (version, rows) = match attempt {
                Attempt::Done(result) => {
                    answer(job.reply, result);
                    continue;
                }
                Attempt::RowsBehind { version, rows } => (version, rows),
            };
            job.attempts += 1;
            info!(group = %job.group, version, rows, attempt = job.attempts,
                "the rows of a CVR are behind");
            let behind = || {
                CvrStoreError::ClientNotFound(format!(
                    "max attempts exceeded waiting for CVR@{version} to catch up from {rows}"
                ))
            };
            if job.attempts >= LOAD_ATTEMPTS {
                answer(job.reply, Err(behind()));
            } else if let Err((job, _)) = self.queue.push_later(LOAD_DELAY, Job::Load(job)) {
                job.refuse(behind());
            }
        }
    }
}

fn settle(part: FlushPart, result: Answer<Flushed>) {
    if let Ok(flushed) = &result
        && flushed.anomalies > 0
    {
        tracing::warn!(group = %part.flush.group, rows = flushed.anomalies,
            "rows changed that the CVR did not hold as live");
    }
    part.settle(result);
}
