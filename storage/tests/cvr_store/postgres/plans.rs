//! Work is proportional to what is asked for: no statement reads a table as a whole, even while
//! Postgres knows nothing about tables that have just grown; what waits together is one round trip.

use std::sync::mpsc::channel;

use zeroring_core::cvr::advance::{AdvancedRow, CountChange};
use zeroring_core::cvr::store::{CvrStoreError, RowCursor};
use zeroring_core::cvr::{QueryUpdater, TtlClock};
use zeroring_storage::cvr_store::{CatchupScan, RowLookup};

use super::lab::{PostgresLab, server};
use crate::lab::*;
use crate::suite::{execute, group};

const GROUPS: i64 = 40;
const ROWS: i64 = 100;

/// Whole reads of each table so far. Sessions report them when they end.
fn whole_reads(lab: &PostgresLab) -> Vec<Vec<String>> {
    lab.until(
        "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'zero-sync-worker-%-cvr'",
        <[_]>::is_empty,
    );
    lab.values(
        "SELECT relname, seq_scan FROM pg_stat_user_tables
         WHERE relname <> 'versionHistory' ORDER BY 1",
    )
}

#[test]
fn no_table_is_read_as_a_whole() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "plans");
    drop(lab.connect("t"));
    let before = whole_reads(&lab);
    assert_eq!(before.len(), 6);
    let store = lab.open("t");
    let cvrs: Vec<_> = (0..GROUPS)
        .map(|n| {
            let rows: Vec<_> = (0..ROWS).map(|id| (id, &[("q", 1)][..])).collect();
            execute(&store, &group(&store, &format!("g{n}"), &["q"]), 5, &rows)
        })
        .collect();
    let prepared: Vec<_> = cvrs
        .iter()
        .map(|cvr| {
            let mut updater = QueryUpdater::new(cvr, &state(6), &state(1)).unwrap();
            // Adjusted, buried and put.
            let rows =
                [(1, 1, 2), (2, 1, 0), (ROWS, 0, 1)].map(|(id, before, after)| AdvancedRow {
                    id: row_id("issue", id),
                    row: Some(row(&state(6), 1)),
                    counts: [CountChange { query: "q".into(), before, after }]
                        .into_iter()
                        .collect(),
                    others: false,
                    by_advance: true,
                });
            updater.advanced(rows, &cvr.version.state).unwrap();
            finish(updater, 3.0).unwrap()
        })
        .collect();
    for verdict in store.flush_all(prepared.iter().map(|p| p.flush.clone()).collect()) {
        assert_eq!(verdict.result.unwrap().anomalies, 0);
    }
    for p in &prepared {
        store.0.write_ttl_clock(p.cvr.id.clone(), TtlClock(4.0), 4.0);
        let loaded = store.load(p.cvr.id.as_str());
        assert_eq!(loaded.version, p.cvr.version);
        assert_eq!(
            store.rows(&loaded, &["q"], &[row_id("issue", 3)]).unwrap().len(),
            ROWS as usize
        );
        assert!(!store.config_changes(range(&loaded, None)).unwrap().is_empty());
    }
    drop(store);
    assert_eq!(whole_reads(&lab), before);
}

/// Many groups read at once, most of them in one transaction: each gets its own, and trouble stays
/// where it is.
#[test]
fn reads_that_wait_together_are_answered_apart() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "together");
    let store = lab.open("t");
    let cvrs: Vec<_> = (0..GROUPS)
        .map(|n| {
            let rows: Vec<_> = (0..=n).map(|id| (100 * n + id, &[("q", 1)][..])).collect();
            execute(&store, &group(&store, &format!("g{n}"), &["q"]), 5, &rows)
        })
        .collect();
    let (send, answers) = channel();
    let (send_page, pages) = channel();
    for (n, cvr) in (0..).zip(&cvrs) {
        let mut current = cvr.version.clone();
        if n == 7 {
            current = version(3, 0);
        }
        let (group, queries) = (cvr.id.clone(), vec!["q".into()]);
        let ids = vec![row_id("issue", 100 * n)];
        let lookup = RowLookup { group, current, queries, ids, from: None, limit: 1_000 };
        let send = send.clone();
        store.0.rows(lookup, Box::new(move |rows| send.send((n, rows)).unwrap()));
        let from = (n == 9).then(|| RowCursor("nonsense".to_owned()));
        let scan = CatchupScan { range: range(cvr, None), without: vec![], from, limit: 1_000 };
        let send = send_page.clone();
        store.0.catch_up(scan, Box::new(move |page| send.send((n, page)).unwrap()));
    }
    drop((send, send_page));
    let mine = |n: i64, found: &[zeroring_core::cvr::RowRecord]| {
        let mut ids: Vec<_> = found.iter().map(|r| r.id.clone()).collect();
        let mut wanted: Vec<_> = (0..=n).map(|id| row_id("issue", 100 * n + id)).collect();
        ids.sort();
        wanted.sort();
        assert_eq!(ids, wanted);
    };
    for (n, rows) in answers {
        match rows {
            Ok(page) => mine(n, &page.rows),
            Err(CvrStoreError::ConcurrentModification { .. }) => assert_eq!(n, 7),
            Err(e) => panic!("{e}"),
        }
    }
    for (n, page) in pages {
        match page {
            Ok(page) => mine(n, &page.rows),
            Err(e) => assert!(n == 9 && e.to_string().contains("cursor"), "{e}"),
        }
    }
}
