//! The updaters' rules, one by one (spec: view-syncer-cvr §3, conformance checklist 1–5, 27–38, 59,
//! 60). No store: a flush is adopted at once, and row records are kept in a map.

// All of this is test code; clippy sees tests only in functions marked as such.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::sync::Arc;

use zeroring_core::cvr::advance::{AdvancedRow, CountChange, RowDeltas};
use zeroring_core::cvr::catchup::row_patch;
use zeroring_core::cvr::internal::ShardTables;
use zeroring_core::cvr::store::{ClientWrite, QueryWrite, RowChange};
use zeroring_core::cvr::*;
use zeroring_core::row::{Row, RowRef};
use zeroring_core::value::Value;
use zeroring_core::version::{CvrVersion, StateVersion};

const C: &str = "c";

fn state(n: u64) -> StateVersion {
    StateVersion::from_lsn(n)
}

fn version(n: u64, config: u64) -> CvrVersion {
    CvrVersion { state: state(n), config }
}

fn times() -> FlushTimes {
    FlushTimes { connect_ms: 1.0, now_ms: 2.0, ttl_clock: TtlClock(3.0) }
}

fn put(query: &str, ttl_ms: f64) -> DesiredPut {
    let body = QueryBody::Custom { name: "n".into(), args: "[]".into() };
    DesiredPut { query: query.into(), body, ttl_ms }
}

fn id(n: i64) -> Arc<RowIdentity> {
    Arc::new(RowIdentity::new("issue".into(), vec![("id".into(), Value::from_i64(n))]))
}

fn row(at: u64) -> RowRef {
    Row::new(state(at), vec![Value::from_i64(at as i64)])
}

fn counts(entries: &[(&str, i64)]) -> RefCounts {
    entries.iter().map(|(q, n)| ((*q).into(), *n)).collect()
}

fn got(n: i64, at: Option<u64>, refs: &[(&str, i64)]) -> ReceivedRow {
    ReceivedRow { id: id(n), row: at.map(row), counts: counts(refs) }
}

/// Patches in short: `c+q` desired, `G+q` got, `R+1` row, each `@version`.
fn short(patches: &[VersionedPatch]) -> Vec<String> {
    let row = |id: &RowIdentity| match &id.key()[0].1 {
        Value::Number(n) => n.to_string(),
        other => panic!("{other:?}"),
    };
    let one = |p: &Patch| match p {
        Patch::DesiredPut(c, q) => format!("{c}+{q}"),
        Patch::DesiredDel(c, q) => format!("{c}-{q}"),
        Patch::GotPut(q) => format!("G+{q}"),
        Patch::GotDel(q) => format!("G-{q}"),
        Patch::RowPut(id, _) => format!("R+{}", row(id)),
        Patch::RowDel(id) => format!("R-{}", row(id)),
    };
    patches.iter().map(|p| format!("{}@{}", one(&p.patch), p.to_version.cookie())).collect()
}

/// A group whose flushes always succeed.
struct Group {
    cvr: Cvr,
    records: BTreeMap<Arc<RowIdentity>, RowRecord>,
}

impl Group {
    /// Client `c` desires the queries, with a TTL of 100 ms.
    fn with(queries: &[&str]) -> Group {
        let mut group = Group { cvr: Cvr::empty("g".into()), records: BTreeMap::new() };
        let mut updater = ConfigUpdater::new(&group.cvr);
        assert!(updater.ensure_client(&C.into(), &ShardTables::new("zero", 0)));
        let puts: Vec<_> = queries.iter().map(|q| put(q, 100.0)).collect();
        updater.put_desired(&C.into(), &puts).unwrap();
        group.adopt(updater.finish(times()));
        group
    }

    fn adopt(&mut self, prepared: Option<PreparedFlush>) -> Option<GroupFlush> {
        let PreparedFlush { flush, cvr } = prepared?;
        assert_eq!(flush.expected, self.cvr.version);
        assert_eq!(flush.instance.version, cvr.version);
        self.cvr = cvr;
        for write in &flush.rows {
            let id = write.id.clone();
            match write.change.clone() {
                RowChange::Put { row_version, patch_version, ref_counts } => {
                    let ref_counts = Some(ref_counts);
                    let record =
                        RowRecord { id: id.clone(), row_version, patch_version, ref_counts };
                    self.records.insert(id, record);
                }
                RowChange::Tombstone { patch_version, .. } => {
                    let record = self.records.get_mut(&id).unwrap();
                    *record = RowRecord { patch_version, ref_counts: None, ..record.clone() };
                }
                other => panic!("{other:?}"),
            }
        }
        Some(flush)
    }

    fn records(&self) -> RowRecords {
        RowRecords::new(self.records.values().cloned())
    }

    fn updater(&self, at: u64) -> QueryUpdater {
        QueryUpdater::new(&self.cvr, &state(at), &state(1)).unwrap()
    }

    /// Executes queries (id, hash) at `at`; all patches in short, and the flush.
    fn execute(
        &mut self,
        at: u64,
        queries: &[(&str, &str)],
        removed: &[&str],
        rows: &[ReceivedRow],
    ) -> (Vec<String>, Option<GroupFlush>) {
        let mut updater = self.updater(at);
        let executed: Vec<_> = queries.iter().map(|(q, h)| executed(q, h)).collect();
        let removed: Vec<_> = removed.iter().map(|q| QueryHash::from(*q)).collect();
        let mut patches = updater.track_queries(&executed, &removed).unwrap();
        let records = self.records();
        patches.extend(updater.received(rows.iter().cloned(), &records).unwrap());
        patches.extend(updater.delete_unreferenced_rows(&records).unwrap());
        let flush = self.adopt(updater.finish(times(), |_| None));
        (short(&patches), flush)
    }

    fn record(&self, n: i64) -> (String, String, Option<RefCounts>) {
        let record = &self.records[&id(n)];
        let (row, patch) = (record.row_version.to_string(), record.patch_version.cookie());
        (row, patch, record.ref_counts.clone())
    }
}

fn executed(query: &str, hash: &str) -> Executed {
    Executed { id: query.into(), transformation_hash: hash.into() }
}

#[test]
fn the_first_client_brings_the_internal_queries() {
    let mut updater = ConfigUpdater::new(&Cvr::empty("g".into()));
    updater.ensure_client(&C.into(), &ShardTables::new("zero", 0));
    let ast = Arc::new(zeroring_core::zql::ast::Ast::table("t"));
    let ast_query =
        DesiredPut { query: "ast".into(), body: QueryBody::Client { ast }, ttl_ms: 1.0 };
    let patches = updater.put_desired(&C.into(), &[ast_query, put("q", 1.0)]).unwrap();
    assert_eq!(short(&patches), ["c+ast@00:01", "c+q@00:01"]);
    let PreparedFlush { flush, cvr } = updater.finish(times()).unwrap();
    assert_eq!((flush.clients.len(), flush.queries.len(), flush.desires.len()), (1, 4, 2));
    assert_eq!(cvr.version, version(0, 1));
    let mut second = ConfigUpdater::new(&cvr);
    assert!(second.ensure_client(&"d".into(), &ShardTables::new("zero", 0)));
    let PreparedFlush { flush, cvr } = second.finish(times()).unwrap();
    assert_eq!((flush.clients.len(), flush.queries.len()), (1, 0));
    assert_eq!(cvr.version, version(0, 2));
}

#[test]
fn repeating_a_put_changes_nothing_unless_the_ttl_grows() {
    let group = Group::with(&["q"]);
    let again = |ttl| {
        let mut updater = ConfigUpdater::new(&group.cvr);
        let patches = short(&updater.put_desired(&C.into(), &[put("q", ttl)]).unwrap());
        (patches, updater.finish(times()).map(|p| p.flush.desires[0].ttl_ms))
    };
    assert_eq!(again(100.0), (vec![], None));
    assert_eq!(again(50.0), (vec![], None));
    assert_eq!(again(101.0), (vec!["c+q@00:02".into()], Some(101.0)));
    assert_eq!(again(FOREVER), (vec!["c+q@00:02".into()], Some(MAX_TTL_MS)));
}

#[test]
fn letting_go_runs_the_ttl_and_clearing_does_not() {
    let group = Group::with(&["p", "q", "r"]);
    let mut updater = ConfigUpdater::new(&group.cvr);
    let clock = TtlClock(50.0);
    let gone = updater.inactivate_desired(&C.into(), &["p".into(), "unknown".into()], clock);
    assert_eq!(short(&gone), ["c-p@00:02"]);
    assert_eq!(short(&updater.clear_desired(&C.into())), ["c-q@00:02", "c-r@00:02"]);
    let PreparedFlush { flush, cvr } = updater.finish(times()).unwrap();
    let desires: Vec<_> = flush
        .desires
        .iter()
        .map(|d| (d.query.as_str(), d.deleted, d.ttl_ms, d.inactivated_at))
        .collect();
    assert_eq!(
        desires,
        [
            ("p", true, 100.0, Some(clock)),
            ("q", true, DEFAULT_TTL_MS, None),
            ("r", true, DEFAULT_TTL_MS, None)
        ]
    );
    let expired = |q: &str, at| is_expired(cvr.query(&q.into()).unwrap(), TtlClock(at));
    assert_eq!((expired("p", 149.0), expired("p", 150.0), expired("q", 0.0)), (false, true, true));
    assert_eq!(next_eviction(&cvr), Some(TtlClock(150.0)), "q and r schedule nothing");
    // A put within the TTL takes it up again.
    let mut updater = ConfigUpdater::new(&cvr);
    assert_eq!(short(&updater.put_desired(&C.into(), &[put("p", 1.0)]).unwrap()), ["c+p@00:03"]);
    assert!(!is_expired(updater.cvr().query(&"p".into()).unwrap(), TtlClock(1e9)));
}

#[test]
fn letting_go_of_what_is_not_desired_is_nothing() {
    let group = Group::with(&["q"]);
    let mut updater = ConfigUpdater::new(&group.cvr);
    assert!(updater.delete_desired(&C.into(), &["x".into(), "lmids".into()]).is_empty());
    assert!(updater.delete_client(&"nobody".into(), TtlClock(1.0)).is_empty());
    assert!(updater.inactivate_desired(&"nobody".into(), &["q".into()], TtlClock(1.0)).is_empty());
    assert!(updater.finish(times()).is_none());
}

#[test]
fn a_client_without_desires_leaves_without_a_new_version() {
    let group = Group::with(&[]);
    let mut updater = ConfigUpdater::new(&group.cvr);
    assert!(updater.delete_client(&C.into(), TtlClock(1.0)).is_empty());
    let PreparedFlush { flush, cvr } = updater.finish(times()).unwrap();
    assert_eq!(cvr.version, group.cvr.version);
    assert_eq!(flush.clients, [ClientWrite::Delete(C.into())]);
}

#[test]
fn internal_names_are_not_for_clients() {
    let group = Group::with(&[]);
    let mut updater = ConfigUpdater::new(&group.cvr);
    assert!(updater.put_desired(&C.into(), &[put("lmids", 1.0)]).unwrap().is_empty(), "skipped");
    let mut bare = Cvr::empty("g".into());
    bare.clients = group.cvr.clients;
    let error = ConfigUpdater::new(&bare).put_desired(&C.into(), &[put("lmids", 1.0)]).unwrap_err();
    assert_eq!(error.to_string(), "Query ID lmids is reserved for internal use");
    let unknown = updater.put_desired(&"nobody".into(), &[put("q", 1.0)]);
    assert_eq!(unknown.unwrap_err(), UpdateError::UnknownClient("nobody".into()));
}

#[test]
fn schema_and_profile_are_written_without_a_new_version() {
    let group = Group::with(&[]);
    let schema = |t: &str| {
        let text = format!(r#"{{"tables":{{"{t}":{{"columns":{{}},"primaryKey":[]}}}}}}"#);
        Arc::new(ClientSchema::parse(&text).unwrap())
    };
    let mut updater = ConfigUpdater::new(&group.cvr);
    updater.set_client_schema(&schema("a")).unwrap();
    assert_eq!(updater.set_profile_id("cgg"), None);
    let cvr = updater.finish(times()).unwrap().cvr;
    assert_eq!(cvr.version, group.cvr.version);
    let mut updater = ConfigUpdater::new(&cvr);
    updater.set_client_schema(&schema("a")).unwrap();
    assert_eq!(updater.set_profile_id("cgg"), None);
    assert_eq!(
        updater.set_client_schema(&schema("b")).unwrap_err().to_string(),
        "Provided schema does not match previous schema"
    );
    assert!(updater.finish(times()).is_none());
    let mut updater = ConfigUpdater::new(&cvr);
    assert_eq!(updater.set_profile_id("p1"), None, "a provisional one may change");
    let cvr = updater.finish(times()).unwrap().cvr;
    assert_eq!(ConfigUpdater::new(&cvr).set_profile_id("p2").as_deref(), Some("p1"));
}

#[test]
fn a_query_becomes_got_once() {
    let mut group = Group::with(&["q"]);
    let (patches, _) = group.execute(5, &[("q", "h1"), ("lmids", "l")], &[], &[]);
    assert_eq!(patches, ["G+q@05"]);
    let (patches, flush) = group.execute(5, &[("q", "h2")], &[], &[]);
    assert!(patches.is_empty());
    let query = group.cvr.query(&"q".into()).unwrap();
    assert_eq!(query.patch_version, Some(version(5, 0)), "it was got before");
    assert_eq!(query.transformation_version, Some(version(5, 1)));
    assert!(matches!(&flush.unwrap().queries[..],
        [QueryWrite::Partial { executed: Some(e), .. }] if &*e.transformation_hash == "h2"));
    let lmids = group.cvr.query(&"lmids".into()).unwrap();
    assert_eq!(lmids.patch_version, None);
    assert_eq!(lmids.transformation_version, Some(version(5, 0)));
    let error = group.updater(5).track_queries(&[], &["lmids".into()]).unwrap_err();
    assert_eq!(error, UpdateError::ReservedQuery("lmids".into()));
    assert!(group.updater(5).track_queries(&[executed("q", "h")], &["q".into()]).is_err());
}

#[test]
fn a_known_row_is_put_with_its_old_version_for_late_clients() {
    let mut group = Group::with(&["p", "q"]);
    group.execute(5, &[("p", "h")], &[], &[got(1, Some(5), &[("p", 1)])]);
    let (patches, _) = group.execute(6, &[("q", "h")], &[], &[got(1, Some(5), &[("q", 2)])]);
    assert_eq!(patches, ["G+q@06", "R+1@05"]);
    let both = counts(&[("p", 1), ("q", 2)]);
    assert_eq!(group.record(1), ("05".into(), "05".into(), Some(both)));
    let (patches, _) = group.execute(7, &[("q", "h2")], &[], &[got(1, Some(7), &[("q", 1)])]);
    assert_eq!(patches, ["R+1@07"], "contents changed");
    assert_eq!(group.record(1).1, "07");
}

#[test]
fn a_row_lives_as_long_as_a_query_references_it() {
    let mut group = Group::with(&["p", "q"]);
    let row = got(1, Some(5), &[("p", 1), ("q", 1)]);
    group.execute(5, &[("p", "h"), ("q", "h")], &[], &[row]);
    let (patches, _) = group.execute(5, &[], &["p"], &[]);
    assert_eq!(patches, ["G-p@05:01"]);
    assert_eq!(group.record(1), ("05".into(), "05".into(), Some(counts(&[("q", 1)]))));
    let (patches, flush) = group.execute(5, &[], &["q"], &[]);
    assert_eq!(patches, ["G-q@05:02", "R-1@05:02"]);
    assert_eq!(group.record(1), ("05".into(), "05:02".into(), None));
    let removed = QueryWrite::Removed { id: "q".into(), patch_version: version(5, 2) };
    assert_eq!(flush.unwrap().queries, [removed]);
}

#[test]
fn a_returning_row_counts_as_new() {
    let mut group = Group::with(&["q"]);
    group.execute(5, &[("q", "h")], &[], &[got(1, Some(5), &[("q", 1)])]);
    group.execute(6, &[("q", "h2")], &[], &[]);
    assert_eq!(group.record(1).2, None);
    let (patches, _) = group.execute(7, &[("q", "h3")], &[], &[got(1, Some(5), &[("q", 1)])]);
    assert_eq!(patches, ["R+1@07"]);
    assert_eq!(group.record(1).1, "07", "tombstones are no records");
}

#[test]
fn a_row_that_comes_and_goes_in_one_update_is_never_written() {
    let mut group = Group::with(&["q"]);
    let rows = [got(1, Some(5), &[("q", 1)]), got(1, None, &[("q", -1)])];
    let (patches, flush) = group.execute(5, &[("q", "h")], &[], &rows);
    assert_eq!(patches, ["G+q@05", "R+1@05", "R-1@05"]);
    assert!(flush.unwrap().rows.is_empty());
}

#[test]
fn a_row_that_goes_and_comes_in_one_update_is_there() {
    let mut group = Group::with(&["q"]);
    group.execute(5, &[("q", "h")], &[], &[got(1, Some(5), &[("q", 1)])]);
    let mut updater = group.updater(6);
    let rows = [got(1, None, &[("q", -1)]), got(1, Some(6), &[("q", 1)])];
    let patches = updater.received(rows, &group.records()).unwrap();
    assert_eq!(short(&patches), ["R-1@06", "R+1@06"]);
    group.adopt(updater.finish(times(), |_| None));
    assert_eq!(group.record(1), ("06".into(), "06".into(), Some(counts(&[("q", 1)]))));
}

#[test]
fn a_del_is_sent_once() {
    let mut group = Group::with(&["q"]);
    group.execute(5, &[("q", "h")], &[], &[got(1, Some(5), &[("q", 1)])]);
    // Executed anew it comes, and goes in a later batch: nobody repeats the del.
    let rows = [got(1, Some(5), &[("q", 1)]), got(1, None, &[("q", -1)])];
    let (patches, _) = group.execute(6, &[("q", "h2")], &[], &rows);
    assert_eq!(patches, ["R+1@05", "R-1@06"]);
    assert_eq!(group.record(1), ("05".into(), "06".into(), None));
}

#[test]
fn executing_the_same_again_bumps_once_or_not_at_all() {
    let mut group = Group::with(&["q"]);
    group.execute(5, &[("q", "h")], &[], &[got(1, Some(5), &[("q", 1)])]);
    let again = |group: &Group, row: ReceivedRow| {
        let mut updater = group.updater(5);
        assert_eq!(updater.ensure_new_version(), version(5, 1));
        assert!(updater.track_queries(&[executed("q", "h")], &[]).unwrap().is_empty());
        let records = group.records();
        updater.received([row], &records).unwrap();
        updater.delete_unreferenced_rows(&records).unwrap();
        updater.finish(times(), |_| None)
    };
    assert!(again(&group, got(1, Some(5), &[("q", 1)])).is_none());
    assert_eq!(group.cvr.version, version(5, 0));
    let prepared = again(&group, got(2, Some(5), &[("q", 1)]));
    group.adopt(prepared).unwrap();
    assert_eq!(group.cvr.version, version(5, 1));
    assert_eq!(group.record(1).2, None);
    // Without the forced bump it is an error, not a wrong version.
    let mut updater = group.updater(5);
    updater.track_queries(&[executed("q", "h")], &[]).unwrap();
    let error = updater.received([got(3, Some(5), &[("q", 1)])], &group.records()).unwrap_err();
    assert!(matches!(error, UpdateError::VersionNotBumped { .. }), "{error}");
}

#[test]
fn signatures_are_written_when_they_change() {
    let mut group = Group::with(&["q"]);
    let finish = |group: &Group, at, executed_hash: Option<&str>, signature: Option<u64>| {
        let mut updater = group.updater(at);
        if let Some(hash) = executed_hash {
            updater.track_queries(&[executed("q", hash)], &[]).unwrap();
        }
        updater.finish(times(), |q| signature.filter(|_| q.as_str() == "q"))
    };
    // Executed to nothing: stored all the same, so that it can be attached to later.
    let prepared = finish(&group, 5, Some("h"), Some(0));
    group.adopt(prepared).unwrap();
    assert_eq!(group.cvr.query(&"q".into()).unwrap().signature, Some(0));
    assert!(finish(&group, 6, None, Some(0)).is_none());
    assert!(finish(&group, 6, None, None).is_none(), "it does not run: left alone");
    let prepared = finish(&group, 6, None, Some(7));
    assert_eq!(group.adopt(prepared).unwrap().queries.len(), 1);
    assert_eq!(group.cvr.version, version(6, 0), "a signature alone is a change");
    let prepared = finish(&group, 7, None, Some(0));
    group.adopt(prepared).unwrap();
    assert_eq!(group.cvr.query(&"q".into()).unwrap().signature, Some(0));
    // A record of an original without one is not touched for nothing.
    let mut old = group.cvr.clone();
    Arc::make_mut(Arc::make_mut(&mut old.queries).get_mut("q").unwrap()).signature = None;
    let group = Group { cvr: old, records: BTreeMap::new() };
    assert!(finish(&group, 8, None, Some(0)).is_none());
}

#[test]
fn an_older_replica_is_refused() {
    let mut group = Group::with(&["q"]);
    group.execute(5, &[("q", "h")], &[], &[]);
    let error = QueryUpdater::new(&group.cvr, &state(4), &state(1)).unwrap_err();
    assert!(matches!(error, UpdateError::ReplicaBehind { .. }));
    let error = QueryUpdater::new(&group.cvr, &state(6), &state(0)).unwrap_err();
    assert_eq!(error.to_string(), "Cannot sync from older replica: CVR=01, DB=00");
}

fn change(query: &str, before: i64, after: i64) -> CountChange {
    CountChange { query: query.into(), before, after }
}

fn advanced(at: Option<u64>, counts: &[CountChange], others: bool) -> AdvancedRow {
    let counts = counts.iter().cloned().collect();
    AdvancedRow { id: id(1), row: at.map(row), counts, others, by_advance: true }
}

/// Advances a group from 5 to 6 by one row: patches in short, and what is written.
fn advance(row: AdvancedRow) -> (Vec<String>, Option<RowChange>) {
    let mut group = Group::with(&["p", "q"]);
    group.execute(5, &[("p", "h"), ("q", "h")], &[], &[]);
    let mut updater = group.updater(6);
    let patches = updater.advanced([row], &state(5)).unwrap();
    let change = updater.finish(times(), |_| None).map(|p| p.flush.rows[0].change.clone());
    (short(&patches), change)
}

fn adjust(counts: RefCounts, row_version: Option<u64>, keep_patch_version: bool) -> RowChange {
    let (row_version, patch_version) = (row_version.map(state), version(6, 0));
    RowChange::Adjust { counts, row_version, patch_version, keep_patch_version }
}

#[test]
fn rows_that_stay_with_the_group_are_adjusted_unread() {
    for (what, row, patches, write) in [
        (
            "held by another query already",
            advanced(Some(3), &[change("p", 0, 2)], true),
            vec![],
            adjust(counts(&[("p", 2)]), Some(3), true),
        ),
        (
            "held already, but changed",
            advanced(Some(6), &[change("p", 0, 1)], true),
            vec!["R+1@06"],
            adjust(counts(&[("p", 1)]), Some(6), false),
        ),
        (
            "changed",
            advanced(Some(6), &[change("p", 1, 1)], false),
            vec!["R+1@06"],
            adjust(counts(&[("p", 1)]), Some(6), false),
        ),
        (
            "moved between queries",
            advanced(Some(3), &[change("p", 1, 0), change("q", 0, 1)], false),
            vec![],
            adjust([("p".into(), 0), ("q".into(), 1)].into_iter().collect(), Some(3), true),
        ),
        (
            "left one of two queries",
            advanced(Some(3), &[change("p", 1, 0)], true),
            vec![],
            adjust(counts(&[("p", 0)]), None, false),
        ),
    ] {
        assert_eq!(
            advance(row),
            (patches.into_iter().map(str::to_owned).collect(), Some(write)),
            "{what}"
        );
    }
}

#[test]
fn rows_that_enter_or_leave_the_group_are_written_whole() {
    let (patches, write) = advance(advanced(Some(3), &[change("p", 0, 2)], false));
    assert_eq!(patches, ["R+1@06"]);
    let (row_version, patch_version) = (state(3), version(6, 0));
    let ref_counts = counts(&[("p", 2)]);
    assert_eq!(write, Some(RowChange::Put { row_version, patch_version, ref_counts }));

    let (patches, write) = advance(advanced(None, &[change("p", 1, 0)], false));
    assert_eq!(patches, ["R-1@06"]);
    let patch_version = version(6, 0);
    assert_eq!(write, Some(RowChange::Tombstone { row_version: None, patch_version }));

    let (patches, write) = advance(advanced(None, &[change("p", 0, 0)], false));
    assert!(patches.is_empty() && write.is_none(), "it came and went");
}

#[test]
fn a_new_row_without_contents_is_an_error() {
    let mut group = Group::with(&["p"]);
    group.execute(5, &[("p", "h")], &[], &[]);
    let row = advanced(None, &[change("p", 0, 1)], false);
    let error = group.updater(6).advanced([row.clone()], &state(5)).unwrap_err();
    assert!(matches!(error, UpdateError::RowWithoutContents(_)));
    let error = group.updater(5).advanced([row], &state(5)).unwrap_err();
    assert!(matches!(error, UpdateError::VersionNotBumped { .. }));
}

#[test]
fn deltas_of_queries_and_advances_merge_per_row() {
    let mut deltas = RowDeltas::default();
    deltas.add(&id(1), change("p", 1, 0), None);
    deltas.add(&id(1), change("q", 0, 1), Some(&row(6)));
    deltas.add(&id(2), change("p", 0, 1), Some(&row(6)));
    deltas.add(&id(2), change("p", 1, 3), Some(&row(7)));
    deltas.add(&id(2), change("p", 3, 0), None);
    let rows = deltas.into_rows().collect::<Vec<_>>();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0].counts[..], [change("p", 1, 0), change("q", 0, 1)]);
    assert!(!rows[0].needs_others());
    assert_eq!(rows[1].counts[..], [change("p", 0, 0)]);
    assert!(rows[1].needs_others());
    let record = RowRecord {
        id: id(2),
        row_version: state(5),
        patch_version: version(5, 0),
        ref_counts: Some(counts(&[("p", 1)])),
    };
    assert!(!rows[1].others_of_record(None));
    assert!(!rows[1].others_of_record(Some(&record)));
    let record = RowRecord { ref_counts: Some(counts(&[("p", 1), ("z", 1)])), ..record };
    assert!(rows[1].others_of_record(Some(&record)));
}

#[test]
fn queries_come_and_go_without_reading_records() {
    let whole = |row: AdvancedRow| AdvancedRow { by_advance: false, ..row };
    for (what, row, patches, write) in [
        (
            "a new query's row that the group has already",
            whole(advanced(Some(3), &[change("p", 0, 1)], true)),
            vec![],
            adjust(counts(&[("p", 1)]), Some(3), true),
        ),
        (
            "a removed query's row that another one keeps: its patch version stays (32)",
            whole(advanced(Some(3), &[change("p", 1, 0)], true)),
            vec![],
            adjust(counts(&[("p", 0)]), Some(3), true),
        ),
        (
            "the same, but changed since",
            advanced(Some(6), &[change("p", 1, 0)], true),
            vec!["R+1@06"],
            adjust(counts(&[("p", 0)]), Some(6), false),
        ),
        (
            "from a removed query to a new one",
            whole(advanced(Some(3), &[change("p", 1, 0), change("q", 0, 2)], false)),
            vec![],
            adjust(counts(&[("p", 0), ("q", 2)]), Some(3), true),
        ),
    ] {
        assert_eq!(
            advance(row),
            (patches.iter().map(|p| (*p).into()).collect(), Some(write)),
            "{what}"
        );
    }
}

#[test]
fn what_was_received_of_a_row_is_not_undone_by_its_old_record() {
    // Found by the group simulation: `q` is executed anew and lost the row, while an advance of
    // `p` brought it once more. The record still mentions `q`.
    let mut group = Group::with(&["p", "q"]);
    let row = got(1, Some(5), &[("p", 1), ("q", 1)]);
    group.execute(5, &[("p", "h"), ("q", "h")], &[], &[row]);
    let (patches, _) = group.execute(6, &[("q", "h2")], &[], &[got(1, Some(5), &[("p", 1)])]);
    assert_eq!(patches, ["R+1@05"]);
    assert_eq!(group.record(1).2, Some(counts(&[("p", 2)])));
    // And one that left everything is deleted once.
    let (patches, _) = group.execute(7, &[("q", "h3")], &[], &[got(1, None, &[("p", -2)])]);
    assert_eq!(patches, ["R-1@07"]);
    assert_eq!(group.record(1), ("05".into(), "07".into(), None));
}

#[test]
fn catch_up_sends_contents_or_a_del() {
    let mut record = RowRecord {
        id: id(1),
        row_version: state(5),
        patch_version: version(5, 2),
        ref_counts: Some(counts(&[("p", 1)])),
    };
    let patch = row_patch(&record, |_| Some(row(5))).unwrap();
    assert_eq!(short(&[patch]), ["R+1@05:02"]);
    assert!(row_patch(&record, |_| None).is_err(), "the CVR is inconsistent");
    record.ref_counts = None;
    let patch = row_patch(&record, |_| panic!("not asked")).unwrap();
    assert_eq!(short(&[patch]), ["R-1@05:02"]);
}
