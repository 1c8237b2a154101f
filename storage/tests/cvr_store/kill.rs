//! `kill -9` in the middle of flushes: what was acknowledged is there, and what is there is one
//! flush as a whole. One group has so many rows that they follow: killed between metadata and rows
//! it is lost, and a load says so.
//!
//! The parent starts this test binary again as a child, which flushes as fast as it can and prints
//! the version of every verdict. After a random number of verdicts the parent kills it, opens the
//! file and looks; the next child goes on with the same file.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use zeroring_core::cvr::store::{CatchupRange, ConfigChange, CvrStoreError};
use zeroring_core::cvr::{
    ConfigUpdater, Cvr, DesiredPut, Executed, QueryBody, QueryUpdater, ReceivedRow, RowRecords,
};
use zeroring_core::version::CvrVersion;
use zeroring_storage::cvr_store::{CatchupScan, RowOptions};

use crate::lab::*;

const KILLS: usize = 12;
const GROUPS: usize = 3;
/// Of each group.
const ROWS: [i64; GROUPS] = [40, 40, 300];
const FILE: &str = "CVR_KILL_FILE";
/// How often the group with many rows was lost.
const LOST: &str = "CVR_KILL_LOST";

fn name(group: usize, lost: usize) -> String {
    if ROWS[group] > 100 { format!("g{group}-{lost}") } else { format!("g{group}") }
}

#[test]
fn a_killed_server_loses_nothing_that_it_acknowledged() {
    if let Some(file) = std::env::var_os(FILE) {
        be_the_child(Path::new(&file));
    }
    let seed: u64 =
        std::env::var("CVR_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("CVR_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let lab = EmbeddedLab::new();
    let mut acknowledged = vec![CvrVersion::empty(); GROUPS];
    let mut lost = 0;
    for _ in 0..KILLS {
        run_and_kill(&lab.path(), rng.random_range(1..60), lost, &mut acknowledged);
        let load_delay = std::time::Duration::from_millis(1);
        let server = lab.open_with("looker", RowOptions { load_delay, ..RowOptions::default() });
        for (group, acknowledged) in acknowledged.iter_mut().enumerate() {
            if !check(&server, &name(group, lost), ROWS[group], acknowledged) {
                // Its clients start afresh.
                *acknowledged = CvrVersion::empty();
                lost += 1;
            }
        }
    }
    eprintln!("killed {lost} times between metadata and rows");
}

/// Starts a child, kills it after so many verdicts, and takes everything it acknowledged.
fn run_and_kill(file: &Path, verdicts: usize, lost: usize, acknowledged: &mut [CvrVersion]) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "kill::a_killed_server_loses_nothing_that_it_acknowledged",
            "--nocapture",
        ])
        .env(FILE, file)
        .env(LOST, lost.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut seen = 0;
    let mut killed = false;
    // Lines that were in the pipe before the kill count: their verdicts were given.
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let Some((group, version)) = line.strip_prefix("ack ").and_then(|l| l.split_once(' '))
        else {
            continue;
        };
        // The last line may be cut short.
        if let Some(version) = version.strip_suffix(';') {
            acknowledged[group.parse::<usize>().unwrap()] = CvrVersion::parse(version).unwrap();
        }
        seen += 1;
        if seen >= verdicts && !killed {
            child.kill().unwrap();
            killed = true;
        }
    }
    child.wait().unwrap();
    assert!(killed, "the child ended by itself after {seen} verdicts");
}

/// Every flush writes the same number everywhere; no two numbers may meet. False if the rows were
/// lost.
fn check(server: &Server, group: &str, rows: i64, acknowledged: &CvrVersion) -> bool {
    let cvr = match server.try_load(group, 1e15) {
        Ok(loaded) => loaded.cvr,
        Err(CvrStoreError::ClientNotFound(why)) if rows > 100 => {
            assert!(why.contains("to catch up from"), "{why}");
            return false;
        }
        Err(error) => panic!("{error}"),
    };
    assert!(cvr.version >= *acknowledged, "{} is behind {acknowledged:?}", cvr.version.cookie());
    if cvr.version.state.lsn() == Ok(0) {
        return true; // its first flushes only
    }
    let query = cvr.query(&"q".into()).unwrap();
    let number = query.signature.unwrap();
    assert_eq!(cvr.version, version(number, 0), "metadata is of one flush");
    assert_eq!(query.transformation_version, Some(cvr.version.clone()));
    let range = range(&cvr, None);
    let scan = CatchupScan { range: range.clone(), without: vec![], from: None, limit: 10_000 };
    let found = server.page(scan).unwrap();
    assert_eq!(found.next, None);
    let live: Vec<_> = found.rows.iter().filter(|r| r.ref_counts.is_some()).collect();
    assert_eq!(live.len() as i64, rows, "rows are of the same flush as the metadata");
    for row in &found.rows {
        assert!(row.patch_version <= cvr.version, "{}", row.id);
    }
    for row in live {
        assert_eq!(row.row_version, state(number));
        assert_eq!(row.ref_counts, Some(counts(&[("q", number as i64)])));
    }
    for change in changes(server, range) {
        assert!(change <= cvr.version);
    }
    true
}

fn changes(server: &Server, range: CatchupRange) -> Vec<CvrVersion> {
    let version = |c| match c {
        ConfigChange::Got { patch_version, .. } | ConfigChange::Desire { patch_version, .. } => {
            patch_version
        }
    };
    server.config_changes(range).unwrap().into_iter().map(version).collect()
}

/// The child: flushes all groups over and over, with several flushes in flight.
fn be_the_child(file: &Path) -> ! {
    let store = zeroring_storage::cvr_store::embedded::EmbeddedCvrStore::open(file, "child");
    let server = Server(Box::new(store.unwrap()));
    let lost = std::env::var(LOST).unwrap().parse().unwrap();
    let mut cvrs: Vec<_> = (0..GROUPS).map(|n| set_up(&server, &name(n, lost))).collect();
    loop {
        let (send, verdicts) = channel();
        let mut next = Vec::new();
        for (n, cvr) in cvrs.iter().enumerate() {
            let prepared = step(&server, cvr, ROWS[n]);
            next.push(prepared.cvr);
            let send = send.clone();
            let reply = Box::new(move |v: Vec<zeroring_storage::cvr_store::Verdict>| {
                send.send((n, v)).unwrap();
            });
            server.0.flush(vec![prepared.flush], reply);
        }
        drop(send);
        for (n, verdict) in verdicts {
            verdict[0].result.clone().unwrap();
            println!("ack {n} {};", next[n].version.cookie());
        }
        cvrs = next;
    }
}

fn set_up(server: &Server, group: &str) -> Cvr {
    let cvr = server.load(group);
    if cvr.stored {
        return cvr;
    }
    let mut updater = ConfigUpdater::new(&cvr);
    updater.ensure_client(&"c".into(), &shard());
    let body = QueryBody::Custom { name: "n".into(), args: "[]".into() };
    let put = DesiredPut { query: "q".into(), body, ttl_ms: 1.0 };
    updater.put_desired(&"c".into(), &[put]).unwrap();
    server.commit(updater.finish(times(1.0)))
}

/// The next flush: everything of the group becomes the next number; rows come and go.
fn step(server: &Server, cvr: &Cvr, count: i64) -> zeroring_core::cvr::PreparedFlush {
    let number = cvr.version.state.lsn().unwrap() + 1;
    let mut updater = QueryUpdater::new(cvr, &state(number), &state(0)).unwrap();
    let hash = format!("h{number}").into();
    updater.track_queries(&[Executed { id: "q".into(), transformation_hash: hash }], &[]).unwrap();
    let records = RowRecords::new(server.rows(cvr, &["q"], &[]).unwrap());
    let first = number as i64 % 20;
    let rows = (first..first + count).map(|id| ReceivedRow {
        id: row_id("issue", id),
        row: Some(row(&state(number), id)),
        counts: counts(&[("q", number as i64)]),
    });
    updater.received(rows, &records).unwrap();
    updater.delete_unreferenced_rows(&records).unwrap();
    updater.finish(times(number as f64), |q| (q.as_str() == "q").then_some(number)).unwrap()
}
