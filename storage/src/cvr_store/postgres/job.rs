//! What workers are asked, and how answers that come in parts are put together.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zeroring_core::cvr::store::{
    CatchupPage, CvrStoreError, Flushed, InspectedQuery, Loaded, Purged, RowPage,
};
use zeroring_core::cvr::{ClientGroupId, ClientId, GroupFlush, TtlClock};

use super::super::{Answer, CatchupScan, PurgeLimits, Reply, RowLookup, Verdict, Verdicts};

/// A request.
pub(super) enum Job {
    Flush(FlushPart),
    /// Rows that follow are to be written, if it is time.
    WriteRows,
    TtlClock(ClientGroupId, TtlClock, f64),
    Purge(PurgeLimits, Reply<Answer<Purged>>),
    Load(LoadJob),
    Read(Read),
}

/// A read of one group.
pub(super) enum Read {
    Rows(RowLookup, Reply<Answer<RowPage>>),
    CatchUp(CatchupScan, Reply<Answer<CatchupPage>>),
    Inspect(ClientGroupId, Option<ClientId>, TtlClock, Reply<Answer<Vec<InspectedQuery>>>),
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job")
    }
}

impl Job {
    /// Answers that the request is not taken.
    pub(super) fn refuse(self, error: CvrStoreError) {
        match self {
            Job::Flush(part) => part.settle(Err(error)),
            // They stay owed; others look after them.
            Job::WriteRows => tracing::debug!(%error, "nobody was asked to write rows"),
            Job::TtlClock(group, ..) => {
                tracing::warn!(%group, %error, "a TTL clock was not written");
            }
            Job::Purge(_, reply) => answer(reply, Err(error)),
            Job::Load(job) => answer(job.reply, Err(error)),
            Job::Read(read) => read.refuse(error),
        }
    }
}

impl Read {
    /// Answers that it failed.
    pub(super) fn refuse(self, error: CvrStoreError) {
        match self {
            Read::Rows(_, reply) => answer(reply, Err(error)),
            Read::CatchUp(_, reply) => answer(reply, Err(error)),
            Read::Inspect(.., reply) => answer(reply, Err(error)),
        }
    }
}

/// A group to be loaded.
pub(super) struct LoadJob {
    pub(super) group: ClientGroupId,
    pub(super) connect_ms: f64,
    /// How often it was found behind its rows.
    pub(super) attempts: usize,
    pub(super) reply: Reply<Answer<Loaded>>,
}

/// One group's flush of a batch.
pub(super) struct FlushPart {
    pub(super) flush: GroupFlush,
    /// Found locked: to be taken alone, and to wait. The flag: an earlier attempt may have
    /// committed.
    pub(super) locked: Option<bool>,
    /// How often it was found locked.
    pub(super) attempts: usize,
    at: usize,
    held: bool,
    batch: Arc<Mutex<Gathered>>,
}

/// The verdicts of a batch, whose groups are written in several transactions.
struct Gathered {
    ready: Vec<Verdict>,
    /// Neither settled nor held: the ready ones are given when there are none of these.
    missing: usize,
    reply: Verdicts,
}

impl Gathered {
    fn give(&mut self) {
        if self.missing == 0 && !self.ready.is_empty() {
            let ready = std::mem::take(&mut self.ready);
            if catch_unwind(AssertUnwindSafe(|| (self.reply)(ready))).is_err() {
                tracing::error!("the receiver of CVR verdicts panicked");
            }
        }
    }
}

impl FlushPart {
    /// The parts of a batch.
    pub(super) fn split(batch: Vec<GroupFlush>, reply: Verdicts) -> Vec<FlushPart> {
        let gathered = Gathered { ready: Vec::new(), missing: batch.len(), reply };
        let gathered = Arc::new(Mutex::new(gathered));
        let part = |(at, flush)| {
            let batch = gathered.clone();
            FlushPart { flush, locked: None, attempts: 0, at, held: false, batch }
        };
        batch.into_iter().enumerate().map(part).collect()
    }

    /// Row records.
    pub(super) fn rows(&self) -> usize {
        self.flush.rows.len()
    }

    fn gathered(&self) -> MutexGuard<'_, Gathered> {
        self.batch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It has to wait for somebody else: the others of its batch need not.
    pub(super) fn hold(&mut self) {
        if !std::mem::replace(&mut self.held, true) {
            let mut gathered = self.gathered();
            gathered.missing -= 1;
            gathered.give();
        }
    }

    /// Gives this group's verdict.
    pub(super) fn settle(self, result: Answer<Flushed>) {
        let mut gathered = self.gathered();
        let verdict = Verdict { at: self.at, group: self.flush.group.clone(), result };
        gathered.ready.push(verdict);
        if !self.held {
            gathered.missing -= 1;
        }
        gathered.give();
    }
}

/// Gives an answer. A reply that panics is a bug of its owner and must not stop the store.
pub(super) fn answer<T>(reply: Reply<T>, value: T) {
    if catch_unwind(AssertUnwindSafe(|| reply(value))).is_err() {
        tracing::error!("the receiver of a CVR answer panicked");
    }
}
