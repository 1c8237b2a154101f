//! From the replication core to the executors: every commit, once, in order, by reference.
//!
//! ```text
//!   core ── CommitBus ──┬─ ring (SPSC, bounded) + control words ──▶ BusReceiver of executor 0
//!                       └─ …                                    ──▶ BusReceiver of executor N-1
//! ```
//!
//! Invariants worth naming:
//! - A commit is in the replica before it is on the bus. An executor whose snapshot is at B finds
//!   all commits up to B on its ring, at most microseconds later.
//! - The core never waits for a slow executor: when its ring is full (commits or rows, see
//!   [`MAX_COMMITS`], [`MAX_ROWS`]) the executor is marked as lagging and gets no commits until it
//!   has taken notice. What it missed was in the replica before the mark was seen, so a snapshot
//!   opened *after* [`Taken::Lagged`] contains it.
//! - What must not be lost is not on the ring but in control words beside it: that the replica
//!   file was replaced, and the barrier that lets the WAL shrink (`storage::replica::checkpoint`).
//!
//! An executor's turn: `ready().await` → [`BusReceiver::control`] until it is `None` → reader
//! `refresh()` to B → [`BusReceiver::take`] from A to B → `Engine::advance`.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use zeroring_core::change::Commit;
use zeroring_core::version::StateVersion;
use zeroring_net::rt::{Doorbell, LocalDoorbell, Ringer, now};
use zeroring_storage::replica::checkpoint::ReaderBarrier;

use super::{CommitSink, ReplicaInfo};

/// Commits on the way to one executor; enough for seconds of small transactions.
pub const MAX_COMMITS: usize = 4096;

/// Changed rows on the way to one executor: bounds the memory that a stuck one holds on to. One
/// transaction may exceed it when nothing else is on the way.
pub const MAX_ROWS: usize = 1_000_000;

/// A replica file that took the place of another.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplacedReplica {
    /// The file.
    pub path: PathBuf,
    /// What it is.
    pub replica: ReplicaInfo,
}

/// What an executor has to do before it goes on.
#[derive(Debug, Clone, PartialEq)]
pub enum Control {
    /// Close the reader and tell the clients to start anew, then open this file. All commits of
    /// the old file are gone from the bus.
    ReplicaReplaced(Arc<ReplacedReplica>),
    /// Give the snapshot up (`ReplicaReader::release`), then `hold` the ticket, then go on.
    ReleaseSnapshot(Ticket),
    /// The core has ended; nothing more will come.
    Closed,
}

/// One barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// The answer to "give me the commits from A to B".
#[derive(Debug)]
pub enum Taken {
    /// A chain: the first follows A, the last is B. Empty if A is B.
    Commits(Vec<Arc<Commit>>),
    /// The snapshot is ahead of the ring: wait until it is `ready`, and ask again.
    NotYet,
    /// Commits were dropped. Open a new snapshot, read the schema from it, treat permissions as
    /// changed, and hydrate everything anew; then take from its version.
    Lagged,
}

/// What the core and one executor share.
#[derive(Debug, Default)]
struct Shared {
    lagging: AtomicBool,
    /// Rows on the ring.
    rows: AtomicUsize,
    /// Commits dropped so far, for `/statz`.
    dropped: AtomicU64,
    /// Tickets: asked for, given, and finished.
    release: AtomicU64,
    released: AtomicU64,
    resume: AtomicU64,
    /// Replica files so far.
    generation: AtomicU64,
    replaced: Mutex<Option<Arc<ReplacedReplica>>>,
    core_gone: AtomicBool,
    executor_gone: AtomicBool,
}

/// A commit of a replica file.
#[derive(Debug)]
struct Entry {
    generation: u64,
    commit: Arc<Commit>,
}

#[derive(Debug)]
struct Line {
    ring: rtrb::Producer<Entry>,
    shared: Arc<Shared>,
    ringer: Ringer,
}

/// The core's end.
#[derive(Debug)]
pub struct CommitBus {
    lines: Vec<Line>,
    generation: u64,
    ticket: u64,
    /// Rung by executors that gave their snapshot up.
    bell: Doorbell,
}

/// An executor's end, before it is bound to its thread.
#[derive(Debug)]
pub struct BusReceiver {
    state: Receiver,
    bell: Doorbell,
}

/// An executor's end.
pub struct LocalBusReceiver {
    state: Receiver,
    bell: LocalDoorbell,
}

#[derive(Debug)]
struct Receiver {
    ring: rtrb::Consumer<Entry>,
    shared: Arc<Shared>,
    core: Ringer,
    /// Taken from the ring, not yet by the executor.
    pending: VecDeque<Arc<Commit>>,
    generation: u64,
    held: u64,
    closed_told: bool,
    /// The last `take` found too little: what is pending is no news.
    wants_more: bool,
}

/// A bus with one receiver per executor.
///
/// # Errors
/// No file descriptor is left for the doorbells.
pub fn commit_bus(executors: usize) -> io::Result<(CommitBus, Vec<BusReceiver>)> {
    commit_bus_of(executors, MAX_COMMITS)
}

/// A bus on which so many commits may be on the way to an executor.
///
/// # Errors
/// No file descriptor is left for the doorbells.
pub fn commit_bus_of(
    executors: usize,
    commits: usize,
) -> io::Result<(CommitBus, Vec<BusReceiver>)> {
    let core_bell = Doorbell::new()?;
    let mut lines = Vec::with_capacity(executors);
    let mut receivers = Vec::with_capacity(executors);
    for _ in 0..executors {
        let bell = Doorbell::new()?;
        let (producer, ring) = rtrb::RingBuffer::new(commits);
        let shared = Arc::new(Shared::default());
        lines.push(Line { ring: producer, shared: shared.clone(), ringer: bell.ringer() });
        let state = Receiver {
            ring,
            shared,
            core: core_bell.ringer(),
            pending: VecDeque::new(),
            generation: 0,
            held: 0,
            closed_told: false,
            wants_more: false,
        };
        receivers.push(BusReceiver { state, bell });
    }
    Ok((CommitBus { lines, generation: 0, ticket: 0, bell: core_bell }, receivers))
}

fn rows_of(commit: &Commit) -> usize {
    commit.tables.iter().map(|t| t.rows.len()).sum()
}

impl Line {
    fn push(&mut self, entry: Entry) {
        let shared = &self.shared;
        if shared.executor_gone.load(Ordering::Acquire) {
            return;
        }
        if shared.lagging.load(Ordering::SeqCst) {
            shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let rows = rows_of(&entry.commit);
        let queued = shared.rows.load(Ordering::Acquire);
        let fits = queued == 0 || queued + rows <= MAX_ROWS;
        // Counted before it can be taken, so that the count never goes below zero.
        shared.rows.fetch_add(rows, Ordering::AcqRel);
        if !fits || self.ring.push(entry).is_err() {
            shared.rows.fetch_sub(rows, Ordering::AcqRel);
            shared.dropped.fetch_add(1, Ordering::Relaxed);
            shared.lagging.store(true, Ordering::SeqCst);
            tracing::warn!("an executor is too slow for the change stream: it starts over");
        }
        self.ringer.ring();
    }
}

impl CommitBus {
    /// Commits that were dropped because an executor lagged, per executor.
    pub fn dropped(&self) -> impl Iterator<Item = u64> + '_ {
        self.lines.iter().map(|l| l.shared.dropped.load(Ordering::Relaxed))
    }
}

impl CommitSink for CommitBus {
    fn commit(&mut self, commit: Arc<Commit>) {
        for line in &mut self.lines {
            line.push(Entry { generation: self.generation, commit: commit.clone() });
        }
    }

    fn replica_replaced(&mut self, path: &Path, replica: &ReplicaInfo) {
        self.generation += 1;
        let replaced =
            Arc::new(ReplacedReplica { path: path.to_owned(), replica: replica.clone() });
        for line in &self.lines {
            // The lock is taken only here and when an executor takes notice.
            *line.shared.replaced.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(replaced.clone());
            line.shared.generation.store(self.generation, Ordering::SeqCst);
            line.ringer.ring();
        }
    }
}

impl ReaderBarrier for CommitBus {
    fn release_all(&mut self, timeout: Duration) -> bool {
        self.ticket += 1;
        let ticket = self.ticket;
        for line in &self.lines {
            line.shared.release.store(ticket, Ordering::SeqCst);
            line.ringer.ring();
        }
        let all_released = || {
            self.lines.iter().all(|l| {
                l.shared.executor_gone.load(Ordering::Acquire)
                    || l.shared.released.load(Ordering::SeqCst) >= ticket
            })
        };
        self.bell.wait_until(all_released, Some(now() + timeout)).unwrap_or_else(|error| {
            tracing::error!(%error, "waiting for the executors' snapshots failed");
            false
        })
    }

    fn resume(&mut self) {
        for line in &self.lines {
            line.shared.resume.store(self.ticket, Ordering::SeqCst);
            line.ringer.ring();
        }
    }
}

impl Drop for CommitBus {
    fn drop(&mut self) {
        for line in &self.lines {
            line.shared.resume.store(u64::MAX, Ordering::SeqCst);
            line.shared.core_gone.store(true, Ordering::SeqCst);
            line.ringer.ring();
        }
    }
}

impl Receiver {
    fn has_news(&self) -> bool {
        let s = &self.shared;
        !self.ring.is_empty()
            || (!self.pending.is_empty() && !self.wants_more)
            || s.lagging.load(Ordering::SeqCst)
            || self.wanted_ticket().is_some()
            || s.generation.load(Ordering::SeqCst) != self.generation
            || (s.core_gone.load(Ordering::SeqCst) && !self.closed_told)
    }

    fn wanted_ticket(&self) -> Option<u64> {
        let wanted = self.shared.release.load(Ordering::SeqCst);
        (wanted > self.held && wanted > self.shared.resume.load(Ordering::SeqCst)).then_some(wanted)
    }

    fn control(&mut self) -> Option<Control> {
        let generation = self.shared.generation.load(Ordering::SeqCst);
        if generation != self.generation {
            // What was dropped so far belongs to the old file, or is in the new one already.
            self.shared.lagging.store(false, Ordering::SeqCst);
            let replaced =
                self.shared.replaced.lock().unwrap_or_else(PoisonError::into_inner).clone();
            self.generation = generation;
            self.pending.clear();
            if let Some(replaced) = replaced {
                return Some(Control::ReplicaReplaced(replaced));
            }
        }
        if let Some(ticket) = self.wanted_ticket() {
            return Some(Control::ReleaseSnapshot(Ticket(ticket)));
        }
        if self.shared.core_gone.load(Ordering::SeqCst) && !self.closed_told {
            self.closed_told = true;
            return Some(Control::Closed);
        }
        None
    }

    fn take(&mut self, from: &StateVersion, to: &StateVersion) -> Taken {
        self.drain();
        self.wants_more = false;
        if self.shared.lagging.load(Ordering::SeqCst) {
            self.drain();
            self.pending.clear();
            // From here on commits come again; the snapshot that is opened next has the others.
            self.shared.lagging.store(false, Ordering::SeqCst);
            return Taken::Lagged;
        }
        while self.pending.front().is_some_and(|c| c.version <= *from) {
            self.pending.pop_front();
        }
        if from == to {
            return Taken::Commits(Vec::new());
        }
        self.wants_more = self.pending.back().is_none_or(|c| c.version < *to);
        if self.wants_more {
            return Taken::NotYet;
        }
        let count = self.pending.iter().take_while(|c| c.version <= *to).count();
        let commits: Vec<Arc<Commit>> = self.pending.drain(..count).collect();
        let mut last = from;
        for commit in &commits {
            if commit.previous != *last {
                return Taken::Lagged;
            }
            last = &commit.version;
        }
        if last == to { Taken::Commits(commits) } else { Taken::Lagged }
    }

    fn drain(&mut self) {
        while let Ok(entry) = self.ring.pop() {
            self.shared.rows.fetch_sub(rows_of(&entry.commit), Ordering::AcqRel);
            // An older file's commits are void; a newer one's come after its `control`.
            if entry.generation >= self.generation {
                self.pending.push_back(entry.commit);
            }
        }
    }

    fn released(&mut self, ticket: Ticket) {
        self.held = ticket.0;
        self.shared.released.store(ticket.0, Ordering::SeqCst);
        self.core.ring();
    }

    fn is_resumed(&self, ticket: Ticket) -> bool {
        self.shared.resume.load(Ordering::SeqCst) >= ticket.0
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.shared.executor_gone.store(true, Ordering::SeqCst);
        self.core.ring();
    }
}

impl BusReceiver {
    /// Binds this end to the executor that runs on this thread.
    ///
    /// # Errors
    /// No file descriptor is left, or the thread runs no executor.
    pub fn into_local(self) -> io::Result<LocalBusReceiver> {
        Ok(LocalBusReceiver { state: self.state, bell: self.bell.into_local()? })
    }

    /// Blocks until something is there to take or to do, at most for `timeout`; says whether.
    ///
    /// # Errors
    /// Waiting failed in the kernel.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        self.bell.wait_until(|| self.state.has_news(), Some(now() + timeout))
    }

    /// As [`LocalBusReceiver::control`].
    pub fn control(&mut self) -> Option<Control> {
        self.state.control()
    }

    /// As [`LocalBusReceiver::take`].
    pub fn take(&mut self, from: &StateVersion, to: &StateVersion) -> Taken {
        self.state.take(from, to)
    }

    /// As [`LocalBusReceiver::hold`], blocking.
    ///
    /// # Errors
    /// Waiting failed in the kernel.
    pub fn hold(&mut self, ticket: Ticket) -> io::Result<()> {
        self.state.released(ticket);
        self.bell.wait_until(|| self.state.is_resumed(ticket), None).map(drop)
    }
}

impl LocalBusReceiver {
    /// Completes when something is there to take or to do. Cancel-safe.
    pub async fn ready(&self) {
        if let Err(error) = self.bell.wait_until(|| self.state.has_news()).await {
            tracing::error!(%error, "waiting for commits failed");
        }
    }

    /// What must be done first; ask again until it is `None`.
    pub fn control(&mut self) -> Option<Control> {
        self.state.control()
    }

    /// The commits that lead from `from` (where the engine is) to `to` (where the snapshot is).
    pub fn take(&mut self, from: &StateVersion, to: &StateVersion) -> Taken {
        self.state.take(from, to)
    }

    /// Tells the core that this executor has no snapshot, and completes when it may have one
    /// again.
    pub async fn hold(&mut self, ticket: Ticket) {
        self.state.released(ticket);
        if let Err(error) = self.bell.wait_until(|| self.state.is_resumed(ticket)).await {
            tracing::error!(%error, "waiting for the end of a checkpoint failed");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;
    use std::sync::atomic::AtomicU64;

    fn version(n: u64) -> StateVersion {
        StateVersion::from_lsn(n)
    }

    fn commit(n: u64) -> Arc<Commit> {
        Arc::new(Commit {
            version: version(n),
            previous: version(n - 1),
            tables: Vec::new(),
            schema: None,
            upstream_commit_ms: 0.0,
            permissions_changed: false,
        })
    }

    fn info(generation: u64) -> ReplicaInfo {
        ReplicaInfo { replica_version: version(0), generation }
    }

    const SECOND: Duration = Duration::from_secs(120);

    /// A replica that is a number: the snapshot is what it holds.
    #[test]
    fn every_executor_gets_an_unbroken_chain_or_knows_that_it_does_not() {
        const COMMITS: u64 = 20_000;
        let replica = Arc::new(AtomicU64::new(0));
        let (mut bus, receivers) = commit_bus_of(2, 8).unwrap();
        let threads: Vec<_> = receivers
            .into_iter()
            .enumerate()
            .map(|(i, mut rx)| {
                let replica = replica.clone();
                std::thread::spawn(move || {
                    let (mut at, mut lags, mut chained) = (0, 0, 0);
                    while at < COMMITS {
                        assert!(rx.wait(SECOND).unwrap(), "executor {i} starves at {at}");
                        while rx.control().is_some() {}
                        let snapshot = replica.load(Ordering::SeqCst);
                        loop {
                            match rx.take(&version(at), &version(snapshot)) {
                                Taken::Commits(commits) => {
                                    chained += commits.len();
                                    for c in commits {
                                        assert_eq!(c.previous, version(at));
                                        at += 1;
                                        assert_eq!(c.version, version(at));
                                    }
                                    assert_eq!(at, snapshot);
                                    break;
                                }
                                Taken::NotYet => assert!(rx.wait(SECOND).unwrap()),
                                Taken::Lagged => {
                                    lags += 1;
                                    at = replica.load(Ordering::SeqCst);
                                    break;
                                }
                            }
                        }
                        if i == 1 {
                            std::thread::yield_now();
                        }
                    }
                    (lags, chained)
                })
            })
            .collect();
        for n in 1..=COMMITS {
            replica.store(n, Ordering::SeqCst);
            bus.commit(commit(n));
        }
        for thread in threads {
            let (lags, chained) = thread.join().unwrap();
            assert!(lags > 0 || chained == COMMITS as usize);
        }
    }

    #[test]
    fn a_full_ring_never_blocks_the_core_and_is_told_once() {
        let (mut bus, mut receivers) = commit_bus_of(1, 4).unwrap();
        let rx = &mut receivers[0];
        (1..=10).for_each(|n| bus.commit(commit(n)));
        assert_eq!(bus.dropped().collect::<Vec<_>>(), [6]);
        assert!(matches!(rx.take(&version(0), &version(10)), Taken::Lagged));
        assert!(!rx.wait(Duration::ZERO).unwrap(), "nothing is left");
        bus.commit(commit(11));
        match rx.take(&version(10), &version(11)) {
            Taken::Commits(c) => assert_eq!(c.len(), 1),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_snapshot_may_be_ahead_of_the_ring_and_the_ring_of_the_snapshot() {
        let (mut bus, mut receivers) = commit_bus(1).unwrap();
        let rx = &mut receivers[0];
        (1..=3).for_each(|n| bus.commit(commit(n)));
        assert!(matches!(rx.take(&version(0), &version(4)), Taken::NotYet));
        assert!(!rx.wait(Duration::ZERO).unwrap(), "waits for more");
        bus.commit(commit(4));
        bus.commit(commit(5));
        assert!(rx.wait(Duration::ZERO).unwrap());
        match rx.take(&version(0), &version(4)) {
            Taken::Commits(c) => assert_eq!(c.len(), 4),
            other => panic!("{other:?}"),
        }
        assert!(rx.wait(Duration::ZERO).unwrap(), "commit 5 is still news");
        // Hydrated at 5 meanwhile: the commit is old.
        assert!(matches!(rx.take(&version(5), &version(5)), Taken::Commits(c) if c.is_empty()));
        bus.commit(commit(7));
        assert!(matches!(rx.take(&version(5), &version(7)), Taken::Lagged), "6 is missing");
    }

    #[test]
    fn a_barrier_lets_all_go_or_nobody_wait() {
        let (mut bus, receivers) = commit_bus(2).unwrap();
        let mut receivers = receivers.into_iter();
        let (mut first, second) = (receivers.next().unwrap(), receivers.next().unwrap());
        let holder = std::thread::spawn(move || {
            let mut held = 0;
            loop {
                assert!(first.wait(SECOND).unwrap());
                match first.control() {
                    Some(Control::ReleaseSnapshot(ticket)) => {
                        held += 1;
                        first.hold(ticket).unwrap();
                    }
                    Some(Control::Closed) => return held,
                    other => assert!(other.is_none()),
                }
            }
        });
        // The second does not answer: the core goes on, and so does the first.
        assert!(!bus.release_all(Duration::from_millis(5)));
        bus.resume();
        // A late executor does not hold a ticket that is over.
        let mut second = second;
        assert_eq!(second.control(), None);
        drop(second);
        assert!(bus.release_all(SECOND));
        bus.resume();
        drop(bus);
        assert!(holder.join().unwrap() >= 1);
    }

    #[test]
    fn commits_of_a_replaced_replica_are_gone() {
        let (mut bus, mut receivers) = commit_bus_of(1, 4).unwrap();
        let rx = &mut receivers[0];
        (1..=9).for_each(|n| bus.commit(commit(n)));
        bus.replica_replaced(Path::new("new.db"), &info(1));
        let replaced = ReplacedReplica { path: "new.db".into(), replica: info(1) };
        assert!(rx.wait(Duration::ZERO).unwrap());
        assert_eq!(rx.control(), Some(Control::ReplicaReplaced(Arc::new(replaced))));
        assert_eq!(rx.control(), None);
        assert!(matches!(rx.take(&version(20), &version(20)), Taken::Commits(c) if c.is_empty()));
        bus.commit(commit(21));
        assert!(matches!(rx.take(&version(20), &version(21)), Taken::Commits(c) if c.len() == 1));
        drop(bus);
        assert_eq!(rx.control(), Some(Control::Closed));
        assert_eq!(rx.control(), None);
    }
}
