//! Readers stay on their version while the writer commits and checkpoints, and the WAL stays
//! small whatever readers do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod kit;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kit::*;
use zeroring_core::change::message::{ChangeMessage, Relation, ReplicaIdentity};
use zeroring_core::change::published::PublishedSchema;
use zeroring_core::ivm::source::SourceError;
use zeroring_core::value::Value;
use zeroring_storage::replica::checkpoint::{
    Checkpointer, NoReaders, ReaderBarrier, WalLimits, WalState,
};
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader};
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::snapshot::{self, OpenSnapshot};
use zeroring_storage::replica::writer::ReplicaWriter;

fn replica(path: &Path) -> (ReplicaWriter, Arc<Relation>) {
    let t = table("public", "t", &[("id", "int4!"), ("v", "int4!"), ("pad", "text")]);
    let schema = PublishedSchema {
        tables: vec![t.clone()],
        indexes: vec![index("public", "t", "t_pkey", true, &["id"])],
    };
    let rows = (0..200).map(|i| vec![int(i), int(0), text(&"x".repeat(200))]).collect();
    create(path, &schema, &[rows]);
    (writer(path), relation(&t, ReplicaIdentity::Default, &["id"]))
}

/// All rows get the value `n`, so a torn read shows.
fn set_all(w: &mut ReplicaWriter, r: &Arc<Relation>, n: u64) {
    let update = |i: i64| ChangeMessage::Update {
        relation: r.clone(),
        old: None,
        new: tuple([int(i), int(n as i64), text(&format!("{n}").repeat(200))]),
    };
    transact(w, n, (0..200).map(update).collect());
}

fn open(path: &Path) -> ReplicaReader {
    ReplicaReader::open(path, &ReaderOptions::default()).unwrap()
}

/// The one value of all rows.
fn value(reader: &ReplicaReader) -> i64 {
    let mut s = reader.prepare("SELECT min(v), max(v) FROM t").unwrap();
    let (low, high): (i64, i64) = s.query_row([], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
    assert_eq!(low, high, "a snapshot is whole");
    low
}

#[test]
fn a_reader_keeps_its_version_until_it_moves() {
    let (_dir, path) = place();
    let (mut w, r) = replica(&path);
    let mut reader = open(&path);
    assert_eq!(reader.version(), None);
    reader.refresh().unwrap();
    for n in 1..=5 {
        set_all(&mut w, &r, n);
        Checkpointer::new(WalLimits { passive_bytes: 1, ..WalLimits::default() })
            .maintain(&w, &mut NoReaders)
            .unwrap();
        assert_eq!(value(&reader), 0);
        assert_eq!(reader.version().unwrap().as_str(), INITIAL);
    }
    assert_eq!(reader.refresh().unwrap(), &version(5));
    assert_eq!(value(&reader), 5);
    reader.release().unwrap();
    assert_eq!(reader.version(), None);
    reader.refresh().unwrap();
}

#[test]
fn readers_never_see_a_torn_or_older_state_while_the_writer_checkpoints() {
    let (_dir, path) = place();
    let (mut w, r) = replica(&path);
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let (mut reader, stop) = (open(&path), stop.clone());
            std::thread::spawn(move || {
                let (mut last, mut moves) = (0, 0u64);
                while !stop.load(Ordering::SeqCst) || moves == 0 {
                    let at = reader.refresh().unwrap().clone();
                    let seen = value(&reader);
                    assert!(seen >= last);
                    if seen > 0 {
                        assert_eq!(at, version(seen as u64), "rows and version agree");
                    }
                    last = seen;
                    moves += 1;
                }
            })
        })
        .collect();
    let limits = WalLimits { passive_bytes: 1, barrier_bytes: 200_000, ..WalLimits::default() };
    let mut checkpointer = Checkpointer::new(limits);
    for n in 1..=60 {
        set_all(&mut w, &r, n);
        checkpointer.maintain(&w, &mut NoReaders).unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert!(checkpointer.counters().passive > 0);
    assert_eq!(dump(&path, "PRAGMA integrity_check"), ["ok"]);
}

/// Readers of this thread that obey, or do not.
struct Crowd {
    readers: Vec<ReplicaReader>,
    obeys: bool,
    resumed: u32,
}

impl ReaderBarrier for Crowd {
    fn release_all(&mut self, _timeout: Duration) -> bool {
        if self.obeys {
            self.readers.iter_mut().for_each(|r| r.release().unwrap());
        }
        self.obeys
    }
    fn resume(&mut self) {
        self.resumed += 1;
        if self.obeys {
            for reader in &mut self.readers {
                reader.refresh().unwrap();
            }
        }
    }
}

#[test]
fn the_wal_is_emptied_when_all_readers_let_go() {
    let (_dir, path) = place();
    let (mut w, r) = replica(&path);
    let mut crowd = Crowd { readers: vec![open(&path), open(&path)], obeys: true, resumed: 0 };
    crowd.resume();
    let limits = WalLimits {
        passive_bytes: 100_000,
        barrier_bytes: 300_000,
        stop_bytes: 3_000_000,
        release_timeout: Duration::ZERO,
    };
    let mut checkpointer = Checkpointer::new(limits);
    let mut largest = 0;
    for n in 1..=60 {
        set_all(&mut w, &r, n);
        largest = largest.max(w.wal_bytes().unwrap());
        assert_eq!(checkpointer.maintain(&w, &mut crowd).unwrap(), WalState::Fine);
        let seen: Vec<i64> = crowd.readers.iter().map(value).collect();
        assert!(seen[0] == seen[1] && seen[0] <= n as i64);
    }
    let counters = checkpointer.counters();
    assert!(counters.truncated >= 2 && counters.missed == 0, "{counters:?}");
    assert!(largest < 1_000_000, "{largest}");
}

#[test]
fn one_stuck_reader_bounds_the_wal_by_stopping_the_writer() {
    let (_dir, path) = place();
    let (mut w, r) = replica(&path);
    let mut crowd = Crowd { readers: vec![open(&path)], obeys: true, resumed: 0 };
    crowd.resume();
    crowd.obeys = false;
    let limits = WalLimits {
        passive_bytes: 100_000,
        barrier_bytes: 300_000,
        stop_bytes: 1_000_000,
        release_timeout: Duration::ZERO,
    };
    let mut checkpointer = Checkpointer::new(limits);
    let (mut n, mut stopped) = (0, 0);
    while stopped < 3 {
        match checkpointer.maintain(&w, &mut crowd).unwrap() {
            WalState::Full => stopped += 1,
            WalState::Fine => {
                n += 1;
                assert!(n < 1000, "the limit is never reached");
                set_all(&mut w, &r, n);
            }
        }
    }
    let size = w.wal_bytes().unwrap();
    assert!(size < 1_000_000 + 300_000, "limit plus one transaction: {size}");
    assert_eq!(value(&crowd.readers[0]), 0, "the reader still has its version");
    crowd.obeys = true;
    assert_eq!(checkpointer.maintain(&w, &mut crowd).unwrap(), WalState::Fine);
    assert_eq!(w.wal_bytes().unwrap(), 0);
    assert_eq!(value(&crowd.readers[0]), n as i64);
    set_all(&mut w, &r, n + 1);
}

#[test]
fn several_readers_open_exactly_one_version() {
    let (_dir, path) = place();
    let (mut w, r) = replica(&path);
    set_all(&mut w, &r, 1);
    let (mut pin, other) = (open(&path), open(&path));
    snapshot::require_support(pin.connection(), &path).unwrap();
    pin.refresh().unwrap();
    let taken = snapshot::current(pin.connection(), &path).unwrap();
    set_all(&mut w, &r, 2);
    // A fresh connection has to have read something once.
    value(&other);
    let open_at = |s| {
        other.connection().execute_batch("BEGIN").unwrap();
        snapshot::open(other.connection(), &path, s).unwrap()
    };
    assert_eq!(open_at(&taken), OpenSnapshot::Opened);
    assert_eq!(value(&other), 1);
    other.connection().execute_batch("COMMIT").unwrap();
    assert_eq!(value(&other), 2);
    // Nobody pins it any more, and a checkpoint has passed.
    pin.release().unwrap();
    Checkpointer::new(WalLimits { passive_bytes: 1, ..WalLimits::default() })
        .maintain(&w, &mut NoReaders)
        .unwrap();
    assert_eq!(open_at(&taken), OpenSnapshot::Gone);
}

#[test]
fn a_reader_cannot_write_and_matches_case_sensitively() {
    let (_dir, path) = place();
    let _w = replica(&path);
    let mut reader = open(&path);
    reader.refresh().unwrap();
    assert!(reader.connection().execute("DELETE FROM t", []).is_err());
    let like = |sql: &str| reader.connection().query_row(sql, [], |r| r.get::<_, bool>(0)).unwrap();
    assert!(!like("SELECT 'ABC' LIKE 'abc'"));
    assert!(like("SELECT 'abc' LIKE 'a%'"));
    match reader.prepare("SELECT * FROM gone") {
        Err(SourceError::NoTable(table)) => assert_eq!(table, "gone"),
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn rows_older_than_the_tables_minimum_count_as_written_then() {
    let (_dir, path) = place();
    let (w, _) = replica(&path);
    drop(w);
    rusqlite::Connection::open(&path)
        .unwrap()
        .execute(
            "INSERT INTO \"_zero.tableMetadata\" (\"schema\", \"table\", \"minRowVersion\") VALUES ('public', 't', ?)",
            [version(9).as_str()],
        )
        .unwrap();
    let mut reader = open(&path);
    reader.refresh().unwrap();
    let seen = reader.schema(&TableIds::default()).unwrap().visible;
    let t = seen.table("t").unwrap();
    assert_eq!(t.min_row_version, version(9));
    let row = reader.get(t, &t.primary_key, &[Value::Number(3.0)]).unwrap().unwrap();
    assert_eq!(row.version, version(9));
}
