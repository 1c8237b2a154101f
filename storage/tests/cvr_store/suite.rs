//! The contract of a CVR store (spec: view-syncer-cvr §2, conformance checklist 10–26).

use std::sync::Arc;

use serde_json::json;
use zeroring_core::cvr::advance::{AdvancedRow, CountChange};
use zeroring_core::cvr::store::{ConfigChange, CvrStoreError, Flushed, QueryWrite, RowChange};
use zeroring_core::cvr::{
    ClientSchema, ConfigUpdater, Cvr, DesiredPut, Executed, FlushTimes, GroupFlush, QueryBody,
    QueryUpdater, ReceivedRow, RowRecords, TtlClock,
};
use zeroring_core::version::CvrVersion;
use zeroring_storage::cvr_store::{CatchupScan, PurgeLimits};

use crate::lab::*;

pub fn custom(query: &str) -> DesiredPut {
    DesiredPut {
        query: query.into(),
        body: QueryBody::Custom { name: "byOwner".into(), args: r#"[true,{"b":1,"a":[]}]"#.into() },
        ttl_ms: 300_000.0,
    }
}

pub fn legacy(query: &str) -> DesiredPut {
    let ast = json!({"table": "issue", "where": {"type": "simple", "op": "=",
        "left": {"type": "column", "name": "id"}, "right": {"type": "literal", "value": 1.5}}});
    let ast = Arc::new(serde_json::from_value(ast).unwrap());
    DesiredPut { query: query.into(), body: QueryBody::Client { ast }, ttl_ms: -1.0 }
}

/// A stored group with client `c` that desires the queries.
pub fn group(server: &Server, id: &str, queries: &[&str]) -> Cvr {
    let mut updater = ConfigUpdater::new(&server.load(id));
    updater.ensure_client(&"c".into(), &shard());
    let puts: Vec<_> = queries.iter().map(|q| custom(q)).collect();
    updater.put_desired(&"c".into(), &puts).unwrap();
    server.commit(updater.finish(times(1.0)))
}

/// Executes the queries at `at`, each row referenced as given.
pub fn execute(server: &Server, cvr: &Cvr, at: u64, rows: &[(i64, &[(&str, i64)])]) -> Cvr {
    let mut updater = QueryUpdater::new(cvr, &state(at), &state(1)).unwrap();
    let executed: Vec<_> = cvr
        .queries
        .values()
        .filter(|q| !q.is_internal())
        .map(|q| Executed { id: q.id.clone(), transformation_hash: format!("h{at}").into() })
        .collect();
    updater.track_queries(&executed, &[]).unwrap();
    let queries: Vec<_> = executed.iter().map(|e| e.id.as_str()).collect();
    let records = RowRecords::new(server.rows(cvr, &queries, &[]).unwrap());
    let received = rows.iter().map(|(id, refs)| ReceivedRow {
        id: row_id("issue", *id),
        row: Some(row(&state(at), *id)),
        counts: counts(refs),
    });
    updater.received(received, &records).unwrap();
    updater.delete_unreferenced_rows(&records).unwrap();
    server.commit(finish(updater, 2.0))
}

pub fn an_unknown_group_loads_empty(lab: &dyn Lab) {
    let server = lab.open("t");
    let loaded = server.try_load("g", 5.0).unwrap();
    assert_eq!(loaded.cvr, empty("g"));
    assert_eq!(loaded.taken_over_from, None);
    assert!(server.rows(&loaded.cvr, &["q"], &[]).unwrap().is_empty());
}

pub fn the_first_flush_is_never_a_no_op_and_loads_back(lab: &dyn Lab) {
    let server = lab.open("t");
    let cvr = server.load("g");
    let prepared = ConfigUpdater::new(&cvr).finish(times(7.0)).unwrap();
    assert_eq!(prepared.flush.expected, CvrVersion::empty());
    server.flush(&prepared.flush).unwrap();
    assert_eq!(server.load("g"), prepared.cvr);
    assert_eq!(prepared.cvr.version, CvrVersion::empty());
    drop(server);
    assert_eq!(lab.open("t").load("g"), prepared.cvr, "it survives a restart");
}

pub fn a_second_flush_without_changes_is_none(lab: &dyn Lab) {
    let server = lab.open("t");
    let cvr = group(&server, "g", &["q"]);
    let mut updater = ConfigUpdater::new(&cvr);
    assert!(!updater.ensure_client(&"c".into(), &shard()));
    assert!(updater.put_desired(&"c".into(), &[custom("q")]).unwrap().is_empty());
    assert!(updater.finish(times(9.0)).is_none());
    let ahead = QueryUpdater::new(&cvr, &state(99), &state(1)).unwrap();
    assert!(ahead.finish(times(9.0), |_| Some(0)).is_none(), "a moved replica alone is nothing");
    assert_eq!(server.load("g"), cvr);
}

pub fn all_kinds_of_queries_and_desires_load_back(lab: &dyn Lab) {
    let server = lab.open("t");
    let mut updater = ConfigUpdater::new(&server.load("g"));
    let schema = json!({"tables": {"issue": {"columns": {"id": {"type": "string"}},
        "primaryKey": ["id"]}}});
    updater.set_client_schema(&Arc::new(ClientSchema::from_json(schema).unwrap())).unwrap();
    assert_eq!(updater.set_profile_id("p1"), None);
    for client in ["c", "d"] {
        updater.ensure_client(&client.into(), &shard());
        let puts = ["active", "inactive", "cleared"].map(custom);
        updater.put_desired(&client.into(), &puts).unwrap();
        updater.put_desired(&client.into(), &[legacy("ast")]).unwrap();
    }
    let cvr = server.commit(updater.finish(times(1.0)));
    assert_eq!(cvr.version, version(0, 1));
    assert_eq!(server.load("g"), cvr);

    let mut updater = ConfigUpdater::new(&cvr);
    updater.inactivate_desired(&"c".into(), &["inactive".into()], TtlClock(123_456.0));
    updater.delete_desired(&"c".into(), &["cleared".into()]);
    let cvr = server.commit(updater.finish(times(2.0)));
    assert_eq!(server.load("g"), cvr);
    let inactive = &cvr.query(&"inactive".into()).unwrap().client_state;
    assert_eq!(inactive["c"].inactivated_at, Some(TtlClock(123_456.0)));
    assert_eq!(cvr.query(&"ast".into()).unwrap().client_state["c"].ttl_ms, 600_000.0);
    assert!(!cvr.query(&"cleared".into()).unwrap().client_state.contains_key("c"));

    let cvr = execute(&server, &cvr, 5, &[(1, &[("active", 1)])]);
    let loaded = server.load("g");
    assert_eq!(loaded, cvr);
    let got = loaded.query(&"active".into()).unwrap();
    assert_eq!(got.patch_version, Some(version(5, 0)));
    assert_eq!(got.transformation_version, Some(version(5, 0)));
    assert_eq!(loaded.replica_version, Some(state(1)));
}

pub fn of_two_flushes_from_one_base_one_commits(lab: &dyn Lab) {
    let server = lab.open("t");
    for base in [server.load("g"), group(&server, "h", &[])] {
        let (first, second) = (join(&base, "x"), join(&base, "y"));
        let results: Vec<_> = server
            .flush_all(vec![first.flush.clone(), second.flush])
            .into_iter()
            .map(|v| v.result)
            .collect();
        assert!(results[0].is_ok(), "{results:?}");
        assert_eq!(
            results[1],
            Err(CvrStoreError::ConcurrentModification {
                expected: base.version.cookie(),
                actual: first.cvr.version.cookie(),
            })
        );
        assert_eq!(server.load(base.id.as_str()), first.cvr);
    }
    let error =
        server.flush(&GroupFlush { expected: version(3, 0), ..join(&empty("i"), "x").flush });
    assert!(matches!(error, Err(CvrStoreError::ConcurrentModification { .. })), "{error:?}");
    assert!(!server.load("i").stored);
}

pub fn at_connect(mut flush: GroupFlush, connect_ms: f64) -> GroupFlush {
    flush.connect_ms = connect_ms;
    flush
}

pub fn a_later_connection_elsewhere_owns_the_group(lab: &dyn Lab) {
    let (a, b) = (lab.open("a"), lab.open("b"));
    let base = join(&empty("g"), "x");
    a.flush(&at_connect(base.flush.clone(), 200.0)).unwrap();
    let refused =
        CvrStoreError::Ownership { owner: "a".into(), granted_ms: 200.0, connect_ms: 199.0 };
    assert_eq!(b.try_load("g", 199.0).err(), Some(refused.clone()));
    let late = at_connect(join(&base.cvr, "y").flush, 199.0);
    assert_eq!(b.flush(&late).err(), Some(refused));
    assert_eq!(a.load("g"), base.cvr);
}

pub fn an_earlier_connection_elsewhere_is_taken_over(lab: &dyn Lab) {
    let (a, b) = (lab.open("a"), lab.open("b"));
    let base = join(&empty("g"), "x");
    a.flush(&at_connect(base.flush.clone(), 200.0)).unwrap();
    let loaded = b.try_load("g", 201.0).unwrap();
    assert_eq!(loaded.taken_over_from.as_deref(), Some("a"));
    assert_eq!(loaded.cvr, base.cvr);
    // The hint travels beside the load; a flush of the new owner makes it certain.
    let mine = at_connect(join(&loaded.cvr, "y").flush, 201.0);
    b.flush(&mine).unwrap();
    let lost = a.flush(&at_connect(join(&base.cvr, "z").flush, 200.0));
    assert!(matches!(&lost, Err(CvrStoreError::Ownership { owner, .. }) if &**owner == "b"));
    assert_eq!(
        lost.unwrap_err().to_string(),
        "CVR ownership was transferred to b at 1970-01-01T00:00:00.201Z (last connect time: \
         1970-01-01T00:00:00.200Z)"
    );
    assert!(b.load("g").clients.contains_key("y"));
    assert!(!b.load("g").clients.contains_key("z"));
    let back = a.try_load("g", 201.0).unwrap();
    assert_eq!(back.taken_over_from.as_deref(), Some("b"), "equal times: whoever comes");
}

pub fn ownership_is_looked_at_before_the_version(lab: &dyn Lab) {
    let (a, b) = (lab.open("a"), lab.open("b"));
    let base = join(&empty("g"), "x");
    a.flush(&at_connect(base.flush.clone(), 100.0)).unwrap();
    let newer = b.try_load("g", 200.0).unwrap().cvr;
    b.flush(&at_connect(join(&newer, "y").flush, 200.0)).unwrap();
    let stale = join(&base.cvr, "z").flush;
    let early = a.flush(&at_connect(stale.clone(), 150.0));
    assert!(matches!(early, Err(CvrStoreError::Ownership { .. })), "{early:?}");
    let late = a.flush(&at_connect(stale, 250.0));
    assert!(matches!(late, Err(CvrStoreError::ConcurrentModification { .. })), "{late:?}");
}

pub fn a_refused_flush_leaves_the_rest_of_its_batch_alone(lab: &dyn Lab) {
    let server = lab.open("t");
    let cvrs: Vec<_> = (0..5).map(|n| group(&server, &format!("g{n}"), &[])).collect();
    let mut batch: Vec<_> = cvrs.iter().map(|cvr| join(cvr, "n").flush).collect();
    batch[1].expected = version(9, 9);
    batch[3]
        .queries
        .push(QueryWrite::Removed { id: "no such".into(), patch_version: version(0, 2) });
    let verdicts = server.flush_all(batch);
    let ok: Vec<_> = verdicts.iter().map(|v| v.result.is_ok()).collect();
    assert_eq!(ok, [true, false, true, false, true]);
    for (n, before) in cvrs.iter().enumerate() {
        assert_eq!(verdicts[n].group, before.id);
        let joined = server.load(before.id.as_str()).clients.contains_key("n");
        assert_eq!(joined, ok[n], "group {n}");
    }
}

pub fn a_poisoned_flush_leaves_no_trace(lab: &dyn Lab) {
    let server = lab.open("t");
    let before = execute(&server, &group(&server, "g", &["q"]), 5, &[(1, &[("q", 1)])]);
    let mut poisoned = join(&before, "n").flush;
    poisoned.rows.push(zeroring_core::cvr::store::RowWrite {
        id: row_id("issue", 1),
        change: RowChange::Delete,
    });
    poisoned.rows.push(zeroring_core::cvr::store::RowWrite {
        id: row_id("issue", 2),
        change: RowChange::Put {
            row_version: state(5),
            patch_version: version(5, 1),
            ref_counts: counts(&[("no such query", 1)]),
        },
    });
    let error = server.flush(&poisoned).unwrap_err();
    assert!(matches!(error, CvrStoreError::Damaged { .. }), "{error}");
    assert_eq!(server.load("g"), before);
    assert_eq!(server.rows(&before, &["q"], &[]).unwrap().len(), 1);
    // A client that is there already cannot join again.
    let mut twice = join(&before, "n").flush;
    twice.clients.extend(twice.clients.clone());
    assert!(server.flush(&twice).is_err());
    assert_eq!(server.load("g"), before);
}

pub fn row_lookups_find_live_records_only(lab: &dyn Lab) {
    let server = lab.open("t");
    let cvr = group(&server, "g", &["p", "q"]);
    let cvr = execute(
        &server,
        &cvr,
        5,
        &[(1, &[("p", 1)]), (2, &[("p", 1), ("q", 3)]), (3, &[("q", 1)])],
    );
    let cvr = execute(&server, &cvr, 6, &[(1, &[("p", 1)]), (2, &[("q", 2)])]);
    let ids = |rows: Vec<zeroring_core::cvr::RowRecord>| -> Vec<_> {
        rows.into_iter().map(|r| (r.id, r.ref_counts.unwrap())).collect()
    };
    let (one, two, three) = (row_id("issue", 1), row_id("issue", 2), row_id("issue", 3));
    let (p1, q2) = (counts(&[("p", 1)]), counts(&[("q", 2)]));
    let found = server.rows(&cvr, &["q"], &[]).unwrap();
    assert_eq!(ids(found), [(two.clone(), q2.clone())]);
    let found = server.rows(&cvr, &["q"], &[one.clone(), two.clone(), three.clone()]).unwrap();
    assert_eq!(ids(found), [(one.clone(), p1.clone()), (two.clone(), q2.clone())]);
    let found = server.rows(&cvr, &[], &[three, two.clone(), one.clone(), row_id("x", 1)]).unwrap();
    assert_eq!(found[0].row_version, state(6));
    assert_eq!(ids(found), [(one, p1), (two, q2)]);
}

/// Row id, version of its contents if given, query, count before and after, other references.
type Delta<'a> = (i64, Option<u64>, &'a str, i64, i64, bool);

/// Advances `cvr` to `at`.
pub fn advance(server: &Server, cvr: &Cvr, at: u64, rows: &[Delta<'_>]) -> Cvr {
    let mut updater = QueryUpdater::new(cvr, &state(at), &state(1)).unwrap();
    let rows = rows.iter().map(|&(id, written, query, before, after, others)| AdvancedRow {
        id: row_id("issue", id),
        row: written.map(|v| row(&state(v), id)),
        counts: [CountChange { query: query.into(), before, after }].into_iter().collect(),
        others,
        by_advance: true,
    });
    updater.advanced(rows, &cvr.version.state).unwrap();
    server.commit(finish(updater, 3.0))
}

pub fn adjusted_rows_keep_what_the_flush_did_not_name(lab: &dyn Lab) {
    let server = lab.open("t");
    let cvr = group(&server, "g", &["p", "q"]);
    let cvr = execute(
        &server,
        &cvr,
        5,
        &[
            (1, &[("q", 2)]),
            (2, &[("p", 1), ("q", 1)]),
            (3, &[("p", 1), ("q", 1)]),
            (4, &[("p", 1)]),
        ],
    );
    let cvr = advance(
        &server,
        &cvr,
        6,
        &[
            (1, Some(5), "p", 0, 1, true), // one more query has it: nothing new for clients
            (2, None, "p", 1, 0, true),    // left a window, still held by q
            (3, Some(6), "p", 1, 1, true), // contents changed
            (4, None, "p", 1, 0, false),   // gone
            (5, Some(6), "p", 0, 1, false), // new
        ],
    );
    let found: Vec<_> = server
        .rows(&cvr, &["p", "q"], &[])
        .unwrap()
        .into_iter()
        .map(|r| (r.id, r.row_version, r.patch_version, r.ref_counts.unwrap()))
        .collect();
    assert_eq!(
        found,
        [
            (row_id("issue", 1), state(5), version(5, 0), counts(&[("p", 1), ("q", 2)])),
            (row_id("issue", 2), state(5), version(6, 0), counts(&[("q", 1)])),
            (row_id("issue", 3), state(6), version(6, 0), counts(&[("p", 1), ("q", 1)])),
            (row_id("issue", 5), state(6), version(6, 0), counts(&[("p", 1)])),
        ]
    );
    let page = scan(&server, &cvr, Some(version(5, 0)), &[], 10);
    let gone: Vec<_> = page.iter().filter(|r| r.ref_counts.is_none()).collect();
    assert_eq!(gone.len(), 1);
    assert_eq!((&gone[0].id, &gone[0].row_version), (&row_id("issue", 4), &state(5)));
    // A row that the CVR does not hold is made of what is known, and counted.
    let mut updater = QueryUpdater::new(&cvr, &state(7), &state(1)).unwrap();
    let counts_7 = [CountChange { query: "p".into(), before: 1, after: 2 }];
    let odd = |id, row| AdvancedRow {
        id: row_id("issue", id),
        row,
        counts: counts_7.iter().cloned().collect(),
        others: false,
        by_advance: true,
    };
    updater.advanced([odd(8, Some(row(&state(7), 8))), odd(9, None)], &state(6)).unwrap();
    let prepared = finish(updater, 4.0).unwrap();
    assert_eq!(server.flush(&prepared.flush).unwrap().anomalies, 2);
    let ids = [row_id("issue", 8), row_id("issue", 9)];
    let found = server.rows(&prepared.cvr, &[], &ids).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].ref_counts, Some(counts(&[("p", 2)])));
}

fn scan(
    server: &Server,
    cvr: &Cvr,
    after: Option<CvrVersion>,
    without: &[&str],
    limit: usize,
) -> Vec<zeroring_core::cvr::RowRecord> {
    let mut found = Vec::new();
    let mut from = None;
    loop {
        let without = without.iter().map(|q| (*q).into()).collect();
        let page =
            server.page(CatchupScan { range: range(cvr, after.clone()), without, from, limit });
        let page = page.unwrap();
        assert!(page.rows.len() <= limit);
        found.extend(page.rows);
        from = page.next;
        if from.is_none() {
            found.sort_by(|a, b| a.id.cmp(&b.id));
            return found;
        }
    }
}

/// Rows that enter query `q`.
pub fn entering(rows: std::ops::Range<i64>) -> impl Iterator<Item = AdvancedRow> {
    rows.map(|id| AdvancedRow {
        id: row_id("issue", id),
        row: Some(row(&state(1), id)),
        counts: [CountChange { query: "q".into(), before: 0, after: 1 }].into_iter().collect(),
        others: false,
        by_advance: true,
    })
}

/// As [`execute`] of query `q`, without waiting for rows that follow.
pub fn large(server: &Server, cvr: &Cvr, at: u64, rows: std::ops::Range<i64>) -> (Cvr, Flushed) {
    let mut updater = QueryUpdater::new(cvr, &state(at), &state(1)).unwrap();
    updater.advanced(entering(rows), &cvr.version.state).unwrap();
    let prepared = finish(updater, 3.0).unwrap();
    let flushed = server.flush(&prepared.flush).unwrap();
    (prepared.cvr, flushed)
}

pub fn rows_of_a_large_flush_follow_in_order(lab: &dyn Lab) {
    let (server, other) = (lab.open("t"), lab.open("other"));
    let cvr = group(&server, "g", &["q"]);
    let (cvr, flushed) = large(&server, &cvr, 5, 0..100);
    assert!(!flushed.rows_follow, "100 are written at once");
    assert_eq!(server.await_rows("g"), Ok(()), "nothing is owed");
    let (cvr, flushed) = large(&server, &cvr, 6, 100..5_100);
    assert!(flushed.rows_follow && flushed.rows == 5_000);
    // Later ones are of the same rows: they must come after them.
    let deltas: Vec<_> = (100..5_100).map(|id| (id, Some(7), "q", 1, 2, false)).collect();
    let cvr = advance(&server, &cvr, 7, &deltas);
    let cvr =
        advance(&server, &cvr, 8, &[(100, None, "q", 2, 0, false), (0, None, "q", 1, 0, false)]);
    let cvr = server.commit(Some(join(&cvr, "d")));
    // Reads wait for them, here and elsewhere.
    let rows = server.rows_in_pages(&cvr, &["q"], &[], 700).unwrap();
    assert_eq!(rows.len(), 99 + 4_999);
    let of = |id| rows.iter().find(|r| r.id == row_id("issue", id));
    assert!(of(0).is_none() && of(100).is_none());
    let changed = of(101).unwrap();
    assert_eq!((&changed.row_version, &changed.patch_version), (&state(7), &version(7, 0)));
    assert_eq!(changed.ref_counts, Some(counts(&[("q", 2)])));
    assert_eq!(scan(&server, &cvr, Some(version(7, 0)), &[], 2_000).len(), 2, "two tombstones");
    assert_eq!(server.await_rows("g"), Ok(()));
    let taken = other.try_load("g", 2e15).unwrap();
    assert_eq!(taken.cvr, cvr);
    // A server that ends finishes what it owes.
    let (cvr, flushed) = large(&other, &cvr, 10, 10_000..14_000);
    assert!(flushed.rows_follow);
    drop((server, other));
    let server = lab.open("again");
    assert_eq!(server.try_load("g", 3e15).unwrap().cvr, cvr);
    assert_eq!(server.rows(&cvr, &["q"], &[]).unwrap().len(), 99 + 4_999 + 4_000);
    // Nothing is owed any more: one row above the limit follows.
    assert!(large(&server, &cvr, 11, 20_000..20_101).1.rows_follow);
}

pub fn row_catch_up_pages_filters_and_includes_tombstones(lab: &dyn Lab) {
    let server = lab.open("t");
    let cvr = group(&server, "g", &["p", "q"]);
    let five: Vec<_> = (1..=9).map(|n| (n, &[("p", 1)][..])).collect();
    let cvr = execute(&server, &cvr, 5, &five);
    let cvr = execute(
        &server,
        &cvr,
        6,
        &[(1, &[("p", 1)]), (2, &[("p", 1), ("q", 1)]), (10, &[("q", 1)])],
    );
    let ids = |rows: &[zeroring_core::cvr::RowRecord]| -> Vec<i64> {
        let id = |r: &zeroring_core::cvr::RowRecord| match r.id.key()[0].1 {
            zeroring_core::value::Value::Number(n) => n as i64,
            _ => panic!("{}", r.id),
        };
        let mut ids: Vec<_> = rows.iter().map(id).collect();
        ids.sort_unstable();
        ids
    };
    for limit in [1, 3, 100] {
        let all = scan(&server, &cvr, None, &[], limit);
        assert_eq!(ids(&all), (1..=10).collect::<Vec<_>>());
        assert_eq!(all.iter().filter(|r| r.ref_counts.is_none()).count(), 7);
        let without_q = scan(&server, &cvr, Some(version(5, 0)), &["q"], limit);
        assert_eq!(ids(&without_q), [1, 3, 4, 5, 6, 7, 8, 9]);
    }
    assert!(scan(&server, &cvr, Some(cvr.version.clone()), &[], 5).is_empty());
}

pub fn catch_up_compares_versions_structurally(lab: &dyn Lab) {
    let server = lab.open("t");
    let v = |s: &str| CvrVersion::parse(s).unwrap();
    let cvr = execute(&server, &group(&server, "g", &["q"]), 5, &[(1, &[("q", 1)])]);
    // A backfill: the next state is 5.01, whose text is below that of 5 with a config change.
    let minor = v("05.01").state;
    let mut updater = QueryUpdater::new(&cvr, &minor, &state(1)).unwrap();
    updater
        .received(
            [ReceivedRow {
                id: row_id("issue", 1),
                row: Some(row(&minor, 1)),
                counts: counts(&[("q", 0)]),
            }],
            &RowRecords::new(server.rows(&cvr, &["q"], &[]).unwrap()),
        )
        .unwrap();
    let cvr = server.commit(finish(updater, 3.0));
    assert_eq!(cvr.version, v("05.01"));
    let missed = scan(&server, &cvr, Some(v("05:01")), &[], 10);
    assert_eq!(missed.len(), 1);
    assert_eq!(missed[0].patch_version, v("05.01"));
}

pub fn config_catch_up_returns_all_clients_in_range(lab: &dyn Lab) {
    let server = lab.open("t");
    let first = group(&server, "g", &["p"]);
    let mut updater = ConfigUpdater::new(&first);
    updater.ensure_client(&"d".into(), &shard());
    updater.put_desired(&"d".into(), &[custom("q")]).unwrap();
    updater.inactivate_desired(&"c".into(), &["p".into()], TtlClock(5.0));
    let second = server.commit(updater.finish(times(2.0)));
    let third = execute(&server, &second, 7, &[]);
    let desire = |client: &str, query: &str, deleted| ConfigChange::Desire {
        client: client.into(),
        query: query.into(),
        deleted,
        patch_version: version(0, 2),
    };
    let got = |query: &str, deleted, patch_version| ConfigChange::Got {
        query: query.into(),
        deleted,
        patch_version,
    };
    let changes = |range| {
        let mut changes = server.config_changes(range).unwrap();
        changes.sort_by_key(|c| format!("{c:?}"));
        changes
    };
    assert_eq!(
        changes(range(&third, Some(first.version.clone()))),
        [
            desire("c", "p", true),
            desire("d", "q", false),
            got("p", false, version(7, 0)),
            got("q", false, version(7, 0)),
        ]
    );
    let mut updater = QueryUpdater::new(&third, &state(7), &state(1)).unwrap();
    updater.track_queries(&[], &["p".into()]).unwrap();
    let fourth = server.commit(finish(updater, 3.0));
    assert_eq!(changes(range(&fourth, Some(third.version))), [got("p", true, version(7, 1))]);
    // Up to an older version than the current one: the poke goes on from there by itself.
    let mut older = range(&fourth, None);
    older.up_to = first.version;
    assert_eq!(changes(older), []);
}

pub fn reads_at_another_version_are_refused(lab: &dyn Lab) {
    let server = lab.open("t");
    let old = group(&server, "g", &["q"]);
    let new = execute(&server, &old, 5, &[(1, &[("q", 1)])]);
    let refused = CvrStoreError::ConcurrentModification {
        expected: old.version.cookie(),
        actual: new.version.cookie(),
    };
    let at = || range(&old, None);
    assert_eq!(server.rows(&old, &["q"], &[]).err(), Some(refused.clone()));
    let scan = CatchupScan { range: at(), without: vec![], from: None, limit: 1 };
    assert_eq!(server.page(scan).err(), Some(refused.clone()));
    assert_eq!(server.config_changes(at()).err(), Some(refused));
    assert!(server.rows(&Cvr { version: version(1, 0), ..empty("none") }, &["q"], &[]).is_err());
}

pub fn the_clock_is_written_without_a_flush(lab: &dyn Lab) {
    let server = lab.open("t");
    let cvr = group(&server, "g", &[]);
    server.0.write_ttl_clock("g".into(), TtlClock(77.0), 88.0);
    server.0.write_ttl_clock("unknown".into(), TtlClock(77.0), 88.0);
    // Requests to the writer keep their order: this one tells that the others are done.
    server.purge(PurgeLimits { now_ms: 0.0, inactive_ms: 1.0, batch: 1 });
    let loaded = server.load("g");
    assert_eq!((loaded.ttl_clock, loaded.last_active_ms), (TtlClock(77.0), 88.0));
    assert_eq!(loaded.version, cvr.version);
    assert!(!server.load("unknown").stored);
}

pub fn purging_leaves_tombstones_and_forgets_old_ones(lab: &dyn Lab) {
    const HOUR: f64 = 3_600_000.0;
    let server = lab.open("t");
    for (n, active) in [(0, 30.0), (1, 10.0), (2, 20.0), (3, 90.0)] {
        let mut updater = ConfigUpdater::new(&server.load(&format!("g{n}")));
        updater.ensure_client(&"c".into(), &shard());
        let now_ms = active * HOUR;
        updater
            .finish(FlushTimes { now_ms, ..times(0.0) })
            .map(|p| server.flush(&p.flush).unwrap());
    }
    let base = execute(&server, &group(&server, "rows", &["q"]), 5, &[(1, &[("q", 1)])]);
    server.0.write_ttl_clock("rows".into(), TtlClock(1.0), 5.0 * HOUR);
    let mut limits = PurgeLimits { now_ms: 100.0 * HOUR, inactive_ms: 48.0 * HOUR, batch: 2 };
    let purged = server.purge(limits);
    assert_eq!((purged.groups, purged.remaining, purged.tombstones), (2, 2, 0));
    let is_gone = |g: &str| match server.try_load(g, 1e15) {
        Ok(loaded) => {
            assert!(loaded.cvr.stored);
            false
        }
        Err(CvrStoreError::ClientNotFound(why)) => {
            assert_eq!(why, "Client has been purged due to inactivity");
            true
        }
        Err(e) => panic!("{e}"),
    };
    let gone = ["rows", "g1", "g2", "g0", "g3"].map(is_gone);
    assert_eq!(gone, [true, true, false, false, false], "the longest inactive first");
    // A server that still holds the group is told at its next flush.
    let late = server.flush(&join(&base, "late").flush);
    assert!(matches!(late, Err(CvrStoreError::ConcurrentModification { .. })), "{late:?}");
    // … and so is one that believes to be the first.
    let late = server.flush(&join(&empty("g1"), "late").flush);
    assert!(matches!(late, Err(CvrStoreError::ConcurrentModification { .. })), "{late:?}");
    assert_eq!(server.purge(limits).groups, 2);
    assert_eq!(server.purge(limits).groups, 0);
    // 31 days after they were last active, tombstones go; a group of that name is a new one.
    // Later if groups are kept longer than that.
    let long = PurgeLimits { inactive_ms: 32.0 * 24.0 * HOUR, ..limits };
    let purged = server.purge(PurgeLimits { now_ms: (31.0 * 24.0 + 15.0) * HOUR, ..long });
    assert_eq!((purged.groups, purged.tombstones), (0, 0), "31 days are not 32");
    limits.now_ms = (31.0 * 24.0 + 15.0) * HOUR;
    let purged = server.purge(limits);
    assert_eq!((purged.groups, purged.tombstones), (1, 2), "g3 goes, rows and g1 are forgotten");
    assert!(!server.load("g1").stored);
    let again = group(&server, "rows", &["q"]);
    assert!(server.rows(&again, &["q"], &[]).unwrap().is_empty());
    assert_eq!(scan(&server, &again, None, &[], 10).len(), 0);
}

pub fn desires_of_a_deleted_client_keep_their_query(lab: &dyn Lab) {
    let server = lab.open("t");
    let cvr = group(&server, "g", &["q"]);
    let mut updater = ConfigUpdater::new(&cvr);
    assert_eq!(updater.delete_client(&"c".into(), TtlClock(50.0)).len(), 1);
    let cvr = server.commit(updater.finish(times(2.0)));
    let loaded = server.load("g");
    assert_eq!(loaded, cvr);
    assert!(loaded.clients.is_empty());
    let state = &loaded.query(&"q".into()).unwrap().client_state["c"];
    assert_eq!(state.inactivated_at, Some(TtlClock(50.0)));
}

pub fn a_removed_query_that_is_put_again_starts_anew(lab: &dyn Lab) {
    let server = lab.open("t");
    let cvr = execute(&server, &group(&server, "g", &["q"]), 5, &[(1, &[("q", 1)])]);
    let mut updater = QueryUpdater::new(&cvr, &state(5), &state(1)).unwrap();
    updater.track_queries(&[], &["q".into()]).unwrap();
    let records = RowRecords::new(server.rows(&cvr, &["q"], &[]).unwrap());
    assert_eq!(updater.delete_unreferenced_rows(&records).unwrap().len(), 1);
    let cvr = server.commit(finish(updater, 3.0));
    let loaded = server.load("g");
    assert_eq!(loaded, cvr);
    assert!(loaded.query(&"q".into()).is_none());
    assert!(loaded.clients["c"].desired.contains("q"), "still desired");
    let mut updater = ConfigUpdater::new(&loaded);
    assert_eq!(updater.put_desired(&"c".into(), &[custom("q")]).unwrap().len(), 1);
    let cvr = server.commit(updater.finish(times(4.0)));
    assert_eq!(server.load("g"), cvr);
    let query = cvr.query(&"q".into()).unwrap();
    assert_eq!((&query.patch_version, &query.transformation_hash), (&None, &None));
    // Its row comes back as a new one: tombstones count as nothing.
    let cvr = execute(&server, &cvr, 5, &[(1, &[("q", 1)])]);
    assert_eq!(server.rows(&cvr, &["q"], &[]).unwrap()[0].patch_version, version(5, 3));
}

pub fn the_inspector_counts_rows_per_query(lab: &dyn Lab) {
    let server = lab.open("t");
    let cvr = group(&server, "g", &["p", "q"]);
    let cvr = execute(&server, &cvr, 5, &[(1, &[("p", 1)]), (2, &[("p", 2), ("q", 1)])]);
    let mut updater = ConfigUpdater::new(&cvr);
    updater.ensure_client(&"d".into(), &shard());
    updater.put_desired(&"d".into(), &[legacy("r")]).unwrap();
    updater.inactivate_desired(&"c".into(), &["q".into()], TtlClock(10.0));
    server.commit(updater.finish(times(3.0)));
    let list = |client: Option<&str>, clock| {
        let (send, answer) = std::sync::mpsc::channel();
        let reply = Box::new(move |list| send.send(list).unwrap());
        server.0.inspect("g".into(), client.map(Into::into), TtlClock(clock), reply);
        let list = answer.recv().unwrap().unwrap();
        list.into_iter()
            .map(|q| (q.client.to_string(), q.query.to_string(), q.rows, q.got))
            .collect()
    };
    let line = |c: &str, q: &str, rows, got| (c.to_owned(), q.to_owned(), rows, got);
    let all: Vec<_> = list(None, 11.0);
    assert_eq!(all, [line("c", "p", 2, true), line("c", "q", 1, true), line("d", "r", 0, false)]);
    let later: Vec<_> = list(Some("c"), 300_010.0);
    assert_eq!(later, [line("c", "p", 2, true)], "q's time is over");
}
