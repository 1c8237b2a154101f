//! Work is proportional to what is asked for: no statement reads a table as a whole, even while
//! Postgres knows nothing about tables that have just grown.

use zeroring_core::cvr::advance::{AdvancedRow, CountChange};
use zeroring_core::cvr::{QueryUpdater, TtlClock};

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
