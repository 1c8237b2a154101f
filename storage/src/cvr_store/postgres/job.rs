//! What workers are asked, and how answers that come in parts are put together.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use zeroring_core::cvr::store::{
    CatchupRange, ConfigChange, CvrStoreError, InspectedQuery, Loaded, Purged, RowPage,
};
use zeroring_core::cvr::{ClientGroupId, ClientId, GroupFlush, RowRecord, TtlClock};

use super::super::{Answer, PurgeLimits, Reply, RowLookup, RowScan, Verdict};

/// A request.
pub(super) enum Job {
    Flush(FlushPart),
    TtlClock(ClientGroupId, TtlClock, f64),
    Purge(PurgeLimits, Reply<Answer<Purged>>),
    Load(LoadJob),
    Read(Read),
}

/// A read of one group.
pub(super) enum Read {
    Rows(RowLookup, Reply<Answer<Vec<RowRecord>>>),
    CatchupRows(RowScan, Reply<Answer<RowPage>>),
    CatchupConfig(CatchupRange, Reply<Answer<Vec<ConfigChange>>>),
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
            Read::CatchupRows(_, reply) => answer(reply, Err(error)),
            Read::CatchupConfig(_, reply) => answer(reply, Err(error)),
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
    at: usize,
    batch: Arc<Verdicts>,
}

/// The verdicts of a batch, whose groups are written in several transactions.
struct Verdicts(Mutex<Gathered>);

struct Gathered {
    verdicts: Vec<Option<Verdict>>,
    missing: usize,
    reply: Option<Reply<Vec<Verdict>>>,
}

impl FlushPart {
    /// The parts of a batch; when all are settled, the reply is given.
    pub(super) fn split(batch: Vec<GroupFlush>, reply: Reply<Vec<Verdict>>) -> Vec<FlushPart> {
        if batch.is_empty() {
            answer(reply, Vec::new());
            return Vec::new();
        }
        let verdicts = Arc::new(Verdicts(Mutex::new(Gathered {
            verdicts: batch.iter().map(|_| None).collect(),
            missing: batch.len(),
            reply: Some(reply),
        })));
        let part = |(at, flush)| FlushPart { flush, locked: None, at, batch: verdicts.clone() };
        batch.into_iter().enumerate().map(part).collect()
    }

    /// Gives this group's verdict.
    pub(super) fn settle(self, result: Answer<zeroring_core::cvr::store::Flushed>) {
        let mut gathered = self.batch.0.lock().unwrap_or_else(PoisonError::into_inner);
        gathered.verdicts[self.at] = Some(Verdict { group: self.flush.group, result });
        gathered.missing -= 1;
        if gathered.missing > 0 {
            return;
        }
        let verdicts = std::mem::take(&mut gathered.verdicts).into_iter().flatten().collect();
        let reply = gathered.reply.take();
        drop(gathered);
        if let Some(reply) = reply {
            answer(reply, verdicts);
        }
    }
}

/// Gives an answer. A reply that panics is a bug of its owner and must not stop the store.
pub(super) fn answer<T>(reply: Reply<T>, value: T) {
    if catch_unwind(AssertUnwindSafe(|| reply(value))).is_err() {
        tracing::error!("the receiver of a CVR answer panicked");
    }
}
