//! Workers: each has a connection of its own and serves some lanes of the queue.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use tracing::info;
use zeroring_core::cvr::store::{CvrStoreError, Flushed};
use zeroring_core::cvr::{ClientGroupId, TtlClock};

use super::super::owed::{Owed, Part, RowsPlan};
use super::super::{Answer, rows_behind};
use super::batch::Item;
use super::job::{FlushPart, Job, LoadJob, answer};
use super::pace::Pace;
use super::queue::{Lane, Queue, Taken};
use super::read::{Attempt, Reader};
use super::session::Session;
use super::warm;
use super::write::{HELD_ATTEMPTS, Settled, Writer};

/// Requests that are taken at once; for reads, also the groups of one load.
const MAX_TAKEN: usize = 256;
/// Groups of one transaction: bounds the time to the first verdict, and what its failure costs.
const MAX_GROUPS: usize = 256;
/// Row records of one transaction, unless a single group has more.
const MAX_ROWS: usize = 8_192;
/// The same of rows that follow and are not urgent: some 50 ms of Postgres.
const MAX_PACED_ROWS: usize = 2_048;
/// A worker and its connection.
pub(super) struct Worker {
    queue: Arc<Queue<Job>>,
    owed: Arc<Owed<Job>>,
    pace: Arc<Pace>,
    lanes: &'static [Lane],
    session: Session,
    known_schemas: HashSet<ClientGroupId>,
    schema: Arc<str>,
    /// Groups of whom more rows are owed since the last look.
    grown: Vec<ClientGroupId>,
}

impl Worker {
    pub(super) fn new(
        queue: Arc<Queue<Job>>,
        owed: Arc<Owed<Job>>,
        pace: Arc<Pace>,
        lanes: &'static [Lane],
        session: Session,
        schema: Arc<str>,
    ) -> Worker {
        let known_schemas = HashSet::new();
        Worker { queue, owed, pace, lanes, session, known_schemas, schema, grown: Vec::new() }
    }

    fn writer(&mut self) -> Writer<'_> {
        Writer { session: &mut self.session, known_schemas: &mut self.known_schemas }
    }

    fn reader(&mut self) -> Reader<'_> {
        Reader { session: &mut self.session }
    }

    /// Makes the connection before it is needed.
    pub(super) fn warm_up(&mut self) {
        warm::up(&mut self.session, self.lanes);
    }

    /// Works until the queue is closed and empty.
    pub(super) fn run(mut self) {
        loop {
            match self.queue.take(self.lanes, MAX_TAKEN, self.session.shared.life.idle) {
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
        let mut rows = false;
        for job in jobs {
            match job {
                Job::Flush(part) if part.locked.is_none() => flushes.push(part),
                Job::Flush(part) => self.flush_waiting(part),
                Job::WriteRows => rows = true,
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
        self.ttl_clocks(&mut clocks);
        if rows {
            self.write_rows();
        }
        if !(flushes.is_empty() && loads.is_empty() && reads.is_empty()) {
            self.pace.busy(Instant::now());
            self.flush(flushes);
            self.load(loads);
            self.reader().answer(reads);
            self.pace.busy(Instant::now());
        }
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
            let (now, later) = self.plan(waiting);
            let items: Vec<_> =
                now.iter().map(|(part, rows)| Item { flush: &part.flush, rows: *rows }).collect();
            let settled = self.writer().commit(&items);
            for ((part, plan), settled) in now.into_iter().zip(settled) {
                match settled {
                    Settled::Verdict(result) => self.settle(part, plan, result),
                    Settled::Locked { maybe_done } => self.wait(part, maybe_done),
                }
            }
            self.look_after_rows();
            waiting = later;
        }
    }

    /// Those that are to be committed now, and what becomes of their rows; and those that have to
    /// wait for the next transaction.
    fn plan(&self, waiting: Vec<FlushPart>) -> (Vec<(FlushPart, RowsPlan)>, Vec<FlushPart>) {
        let mut groups: HashSet<ClientGroupId> = HashSet::new();
        let first: Vec<usize> = waiting.iter().take(MAX_GROUPS).map(FlushPart::rows).collect();
        let together = first.iter().filter(|rows| **rows <= self.owed.options.sync_rows).sum();
        let mut rows = 0;
        let (mut now, mut later) = (Vec::new(), Vec::new());
        for part in waiting {
            let fits = now.len() < MAX_GROUPS && rows < MAX_ROWS;
            // A group that has to wait keeps its place before its next flush.
            if !groups.insert(part.flush.group.clone()) || !fits {
                later.push(part);
                continue;
            }
            let Some(plan) = self.owed.plan(&part.flush.group, part.rows(), together) else {
                later.extend(self.block(part));
                continue;
            };
            rows += if plan.follow() { 0 } else { part.rows() };
            now.push((part, plan));
        }
        (now, later)
    }

    /// Commits a flush that was found locked.
    fn flush_waiting(&mut self, part: FlushPart) {
        let Some(maybe_done) = part.locked else { return };
        // The bound on what is owed is not for the few that come this way.
        let plan = self.owed.plan(&part.flush.group, part.rows(), 0);
        let plan = plan.unwrap_or(RowsPlan::FollowOwed);
        let item = Item { flush: &part.flush, rows: plan };
        match self.writer().commit_waiting(item, maybe_done) {
            Settled::Verdict(result) => self.settle(part, plan, result),
            Settled::Locked { maybe_done } if self.may_wait(&part) => self.wait(part, maybe_done),
            Settled::Locked { .. } => {
                let why =
                    "somebody holds its record: look for idle transactions in the CVR database";
                let error = CvrStoreError::Storage(why.to_owned());
                self.settle(part, plan, Err(error));
            }
        }
        self.look_after_rows();
    }

    /// Others of the slow lane have their turn, and then it is tried again; unless the server is
    /// about to go.
    fn may_wait(&self, part: &FlushPart) -> bool {
        part.attempts < HELD_ATTEMPTS && !self.pace.hurries()
    }

    /// Lets a flush wait until less is owed; gives it back if that is so already.
    fn block(&self, mut part: FlushPart) -> Option<FlushPart> {
        part.hold();
        match self.owed.block(Job::Flush(part)) {
            Some(Job::Flush(part)) => Some(part),
            _ => None,
        }
    }

    /// Lets the slow lane wait for a group's lock.
    fn wait(&mut self, mut part: FlushPart, maybe_done: bool) {
        part.locked = Some(maybe_done);
        part.attempts += 1;
        part.hold();
        let Err((jobs, _)) = self.queue.push_all(Lane::Slow, vec![Job::Flush(part)]) else {
            return;
        };
        // The store shuts down.
        self.work(jobs);
    }

    /// Gives a verdict; rows that follow are owed from now on.
    fn settle(&mut self, mut part: FlushPart, plan: RowsPlan, result: Answer<Flushed>) {
        if let Ok(flushed) = &result
            && flushed.anomalies > 0
        {
            tracing::warn!(group = %part.flush.group, rows = flushed.anomalies,
                "rows changed that the CVR did not hold as live");
        }
        let group = part.flush.group.clone();
        match &result {
            Ok(_) => {
                if let Some(rows) = Part::of(plan, &mut part.flush) {
                    if self.owed.add(&group, rows) {
                        self.pace.owe(group.clone(), Instant::now());
                    }
                    self.grown.push(group);
                }
            }
            // Whoever has it now waits for its rows.
            Err(CvrStoreError::Ownership { .. }) => drop(self.pace.awaited(group)),
            Err(_) => {}
        }
        part.settle(result);
    }

    /// After verdicts: coalesces what is owed, and sees to it that it is written.
    fn look_after_rows(&mut self) {
        for group in std::mem::take(&mut self.grown) {
            self.owed.coalesce(&group);
        }
        if !self.set_alarm() {
            self.write_rows();
        }
    }

    /// Has somebody look when it is time to write rows. False: the store shuts down, nobody will.
    fn set_alarm(&self) -> bool {
        match self.pace.set_alarm(self.owed.is_full(), Instant::now()) {
            Some(delay) => self.queue.push_later(Lane::Rows, delay, Job::WriteRows).is_ok(),
            None => true,
        }
    }

    /// Writes rows that follow and whose time has come, in one transaction.
    fn write_rows(&mut self) {
        loop {
            let owed = self.due_rows();
            if !owed.is_empty() {
                self.pace.write();
            }
            // While they are being written, others may have to be.
            let mut others_look = self.set_alarm();
            if !owed.is_empty() {
                self.write_due_rows(owed);
                others_look &= self.set_alarm();
            }
            if others_look {
                return;
            }
        }
    }

    /// Takes rows that are to be written now, as many as a transaction may have.
    fn due_rows(&mut self) -> Vec<(ClientGroupId, Vec<Part>)> {
        let (now, full) = (Instant::now(), self.owed.is_full());
        let mut owed = Vec::new();
        let (mut rows, mut most) = (0, MAX_PACED_ROWS);
        while rows < most && owed.len() < MAX_GROUPS {
            let Some(turn) = self.pace.next(full, now) else { break };
            if turn.urgent {
                most = MAX_ROWS;
            }
            let parts = self.owed.take(&turn.group);
            rows += parts.iter().map(|part| part.rows.len()).sum::<usize>();
            if !parts.is_empty() {
                owed.push((turn.group, parts));
            }
        }
        owed
    }

    fn write_due_rows(&mut self, owed: Vec<(ClientGroupId, Vec<Part>)>) {
        let began = Instant::now();
        let results = self.writer().write_rows(&owed);
        let now = Instant::now();
        self.pace.wrote(now - began, now);
        for ((group, parts), result) in owed.into_iter().zip(results) {
            match &result {
                Ok(()) => tracing::debug!(%group, parts = parts.len(), "rows were written"),
                Err(error) => tracing::warn!(%group, %error, "rows of a CVR are lost: its \
                    clients will start afresh"),
            }
            self.rows_done(group, &result);
        }
    }

    fn rows_done(&mut self, group: ClientGroupId, result: &Answer<()>) {
        let released = self.owed.done(&group, result);
        for (lane, jobs) in [(Lane::Read, released.ready), (Lane::Flush, released.unblocked)] {
            if let Err((jobs, _)) = self.queue.push_all(lane, jobs) {
                // The store shuts down.
                self.work(jobs);
            }
        }
        match (released.more, released.awaited) {
            (false, _) => {}
            (true, false) => self.pace.owe(group, Instant::now()),
            (true, true) => drop(self.pace.awaited(group)),
        }
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
            if job.attempts >= self.owed.options.load_attempts {
                answer(job.reply, Err(rows_behind(&version, &rows)));
                continue;
            }
            // They may be our own by now.
            let group = job.group.clone();
            let Some(job) = self.owed.wait(&group, Job::Load(job)) else {
                self.pace.awaited(group);
                self.look_after_rows();
                continue;
            };
            if let Err((job, _)) =
                self.queue.push_later(Lane::Read, self.owed.options.load_delay, job)
            {
                job.refuse(rows_behind(&version, &rows));
            }
        }
    }
}
