//! Stores under test, and blocking calls to them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;

use tempfile::TempDir;
use zeroring_core::cvr::store::{
    CatchupPage, CatchupRange, ConfigChange, Flushed, Loaded, Purged, RowPage,
};
use zeroring_core::cvr::{
    ClientGroupId, ConfigUpdater, Cvr, FlushTimes, GroupFlush, PreparedFlush, QueryHash,
    QueryUpdater, RefCounts, RowIdentity, RowRecord, TtlClock,
};
use zeroring_core::row::{Row, RowRef};
use zeroring_core::value::Value;
use zeroring_core::version::{CvrVersion, StateVersion};
use zeroring_storage::cvr_store::embedded::EmbeddedCvrStore;
use zeroring_storage::cvr_store::{
    Answer, CatchupScan, CvrStore, PAGE_ROWS, PurgeLimits, Reply, RowLookup, RowOptions, Verdict,
};

/// One shared database, and servers that use it.
pub trait Lab {
    /// Another server with this task id.
    fn open(&self, task_id: &str) -> Server {
        self.open_with(task_id, RowOptions::default())
    }

    /// Another server that treats rows so.
    fn open_with(&self, task_id: &str, rows: RowOptions) -> Server;

    /// Steps of a simulation that this store makes in a few seconds.
    fn steps(&self) -> u64 {
        8_000
    }
}

/// An embedded store in a directory of its own.
pub struct EmbeddedLab {
    dir: TempDir,
}

impl EmbeddedLab {
    pub fn new() -> EmbeddedLab {
        EmbeddedLab { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("cvr.db")
    }
}

impl Lab for EmbeddedLab {
    fn open_with(&self, task_id: &str, rows: RowOptions) -> Server {
        Server(Box::new(EmbeddedCvrStore::open_with(&self.path(), task_id, rows).unwrap()))
    }
}

/// A server's store; calls wait for the answer.
pub struct Server(pub Box<dyn CvrStore>);

/// Sends a request and waits for its answer.
fn ask<T: Send + 'static>(request: impl FnOnce(Reply<T>)) -> T {
    let (send, answer) = channel();
    request(Box::new(move |value| {
        // The asker may have given up.
        let _ = send.send(value);
    }));
    answer.recv().unwrap()
}

impl Server {
    pub fn try_load(&self, group: &str, connect_ms: f64) -> Answer<Loaded> {
        ask(|reply| self.0.load(group.into(), connect_ms, reply))
    }

    pub fn load(&self, group: &str) -> Cvr {
        self.try_load(group, 1e15).unwrap().cvr
    }

    pub fn flush_all(&self, batch: Vec<GroupFlush>) -> Vec<Verdict> {
        let count = batch.len();
        let (send, answers) = channel();
        self.0.flush(batch, Box::new(move |verdicts| drop(send.send(verdicts))));
        let mut all: Vec<Verdict> = answers.into_iter().flatten().take(count).collect();
        all.sort_by_key(|v| v.at);
        assert!(all.iter().enumerate().all(|(at, v)| v.at == at), "each once: {all:?}");
        all
    }

    /// Waits until no rows of the group are owed.
    pub fn await_rows(&self, group: &str) -> Answer<()> {
        ask(|reply| self.0.await_rows(group.into(), reply))
    }

    pub fn flush(&self, flush: &GroupFlush) -> Answer<Flushed> {
        let mut verdicts = self.flush_all(vec![flush.clone()]);
        assert_eq!(verdicts.len(), 1);
        verdicts.remove(0).result
    }

    /// Flushes and gives the snapshot after.
    pub fn commit(&self, prepared: Option<PreparedFlush>) -> Cvr {
        let prepared = prepared.unwrap();
        self.flush(&prepared.flush).unwrap();
        prepared.cvr
    }

    pub fn rows(
        &self,
        cvr: &Cvr,
        queries: &[&str],
        ids: &[Arc<RowIdentity>],
    ) -> Answer<Vec<RowRecord>> {
        self.rows_in_pages(cvr, queries, ids, PAGE_ROWS)
    }

    /// All pages of a lookup.
    pub fn rows_in_pages(
        &self,
        cvr: &Cvr,
        queries: &[&str],
        ids: &[Arc<RowIdentity>],
        limit: usize,
    ) -> Answer<Vec<RowRecord>> {
        let mut rows = Vec::new();
        let mut from = None;
        loop {
            let lookup = RowLookup {
                group: cvr.id.clone(),
                current: cvr.version.clone(),
                queries: queries.iter().map(|q| QueryHash::from(*q)).collect(),
                ids: ids.to_vec(),
                from,
                limit,
            };
            let page: RowPage = ask(|reply| self.0.rows(lookup, reply))?;
            assert!(page.rows.len() <= limit + ids.len());
            rows.extend(page.rows);
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        rows.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(rows)
    }

    pub fn page(&self, scan: CatchupScan) -> Answer<CatchupPage> {
        ask(|reply| self.0.catch_up(scan, reply))
    }

    pub fn config_changes(&self, range: CatchupRange) -> Answer<Vec<ConfigChange>> {
        let scan = CatchupScan { range, without: vec![], from: None, limit: 1 };
        Ok(self.page(scan)?.config)
    }

    pub fn purge(&self, limits: PurgeLimits) -> Purged {
        ask(|reply| self.0.purge(limits, reply)).unwrap()
    }
}

pub fn times(now_ms: f64) -> FlushTimes {
    FlushTimes { connect_ms: 1_000.0, now_ms, ttl_clock: TtlClock(now_ms) }
}

pub fn state(n: u64) -> StateVersion {
    StateVersion::from_lsn(n)
}

pub fn version(state: u64, config: u64) -> CvrVersion {
    CvrVersion { state: StateVersion::from_lsn(state), config }
}

pub fn row_id(table: &str, id: i64) -> Arc<RowIdentity> {
    Arc::new(RowIdentity::new(table.into(), vec![("id".into(), Value::from_i64(id))]))
}

pub fn row(version: &StateVersion, value: i64) -> RowRef {
    Row::new(version.clone(), vec![Value::from_i64(value)])
}

pub fn counts(entries: &[(&str, i64)]) -> RefCounts {
    entries.iter().map(|(q, n)| (QueryHash::from(*q), *n)).collect()
}

pub fn range(cvr: &Cvr, after: Option<CvrVersion>) -> CatchupRange {
    CatchupRange {
        group: cvr.id.clone(),
        after,
        up_to: cvr.version.clone(),
        current: cvr.version.clone(),
    }
}

/// Ends an update whose queries have no signatures.
pub fn finish(updater: QueryUpdater, now_ms: f64) -> Option<PreparedFlush> {
    updater.finish(times(now_ms), |_| None)
}

/// A flush that only joins a client.
pub fn join(cvr: &Cvr, client: &str) -> PreparedFlush {
    let mut updater = ConfigUpdater::new(cvr);
    updater.ensure_client(&client.into(), &shard());
    updater.finish(times(1.0)).unwrap()
}

pub fn shard() -> zeroring_core::cvr::internal::ShardTables {
    zeroring_core::cvr::internal::ShardTables::new("zero", 0)
}

pub fn empty(group: &str) -> Cvr {
    Cvr::empty(ClientGroupId::from(group))
}
