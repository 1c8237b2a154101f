//! A CVR that an original wrote is understood, and what we write back is what it wrote (conformance
//! checklist 10). That an original goes on with a CVR after us is for the end-to-end tests.

use zeroring_core::cvr::store::{
    CvrStoreError, DesireWrite, GroupFlush, QueryWrite, RowChange, RowWrite,
};
use zeroring_core::cvr::{ConfigUpdater, Cvr, FlushTimes, RowRecord, TtlClock};
use zeroring_core::version::CvrVersion;
use zeroring_storage::cvr_store::CatchupScan;

use super::lab::{PostgresLab, server};
use super::schema::database;
use crate::lab::*;

const GROUP: &str = "qufilnlojhu67mbpv5";
const CLIENT: &str = "cis1469lu5av5lqkjb";
/// When the original last heard of a connection.
const GRANTED_MS: f64 = 1_795_303_654_185.0;

/// Everything but the group's own record.
fn contents(lab: &PostgresLab) -> Vec<Vec<Vec<String>>> {
    ["queries", "desires", "rows", "clients"]
        .map(|table| lab.values(&format!(r#"SELECT t::text FROM @."{table}" t ORDER BY 1"#)))
        .into()
}

/// A flush that writes everything anew, as it is.
fn rewrite(cvr: &Cvr, rows: &[RowRecord]) -> (GroupFlush, Cvr) {
    let times = FlushTimes { connect_ms: GRANTED_MS, now_ms: GRANTED_MS, ttl_clock: cvr.ttl_clock };
    let mut updater = ConfigUpdater::new(cvr);
    updater.ensure_client(&"ours".into(), &shard());
    let prepared = updater.finish(times).unwrap();
    let puts = rows.iter().filter_map(|r| {
        let change = RowChange::Put {
            row_version: r.row_version.clone(),
            patch_version: r.patch_version.clone(),
            ref_counts: r.ref_counts.clone()?,
        };
        Some(RowWrite { id: r.id.clone(), change })
    });
    let desires = cvr.queries.values().flat_map(|q| {
        q.client_state.iter().map(|(client, state)| DesireWrite {
            client: client.clone(),
            query: q.id.clone(),
            patch_version: state.version.clone(),
            deleted: state.inactivated_at.is_some(),
            ttl_ms: state.ttl_ms,
            inactivated_at: state.inactivated_at,
        })
    });
    let flush = GroupFlush {
        rows: puts.collect(),
        queries: cvr.queries.values().map(|q| QueryWrite::Full(q.clone())).collect(),
        desires: desires.collect(),
        ..prepared.flush
    };
    (flush, prepared.cvr)
}

#[test]
fn the_original_and_we_write_the_same() {
    let postgres = server();
    let lab = database(&postgres, "interop");
    let store = lab.open("ours");
    lab.client().batch_execute(include_str!("original_contents.sql")).unwrap();

    let refused = store.try_load(GROUP, GRANTED_MS - 1.0).unwrap_err();
    assert!(
        matches!(refused, CvrStoreError::Ownership { granted_ms, .. } if granted_ms == GRANTED_MS)
    );
    let loaded = store.try_load(GROUP, GRANTED_MS).unwrap();
    assert_eq!(loaded.taken_over_from.as_deref(), Some("CjQLs4DrE0VWGekDGmpSY"));
    let cvr = loaded.cvr;
    assert_eq!(cvr.version, CvrVersion::parse("4drd3s").unwrap());
    assert_eq!((cvr.ttl_clock, cvr.queries.len()), (TtlClock(496.0), 5));
    let desired: Vec<_> = cvr.clients[CLIENT].desired.iter().map(|q| q.as_str()).collect();
    assert_eq!(desired, ["144jinzxzyscm", "2krwu77h5sl9b"]);
    let released = &cvr.queries["30epwcxjm0zys"].client_state[CLIENT];
    assert_eq!((released.inactivated_at, released.ttl_ms), (Some(TtlClock(326.0)), 600_000.0));
    assert_eq!(cvr.queries["2krwu77h5sl9b"].signature, Some(0x55c9_ca67_24c9_a5b9));
    assert!(cvr.queries["lmids"].is_internal());
    assert_eq!(cvr.client_schema.as_ref().unwrap().tables().len(), 2);

    // The signature that the original stored is that of the keys as we read them.
    let pairs = store.rows(&cvr, &["2krwu77h5sl9b"], &[]).unwrap();
    let signature = pairs.iter().fold(0, |s, r| s ^ r.id.signature_unit());
    assert_eq!((pairs.len(), Some(signature)), (5, cvr.queries["2krwu77h5sl9b"].signature));

    let scan = CatchupScan { range: range(&cvr, None), without: vec![], from: None, limit: 1_000 };
    let rows = store.page(scan).unwrap().rows;
    let gone: Vec<_> = rows.iter().filter(|r| r.ref_counts.is_none()).map(|r| &r.id).collect();
    assert_eq!(gone.iter().map(|id| id.text()).collect::<Vec<_>>(), [r#"["","issue","id","i7"]"#]);

    let before = contents(&lab);
    let (flush, after) = rewrite(&cvr, &rows);
    assert_eq!(store.flush(&flush).unwrap().rows, rows.len() - 1);
    let mut written = contents(&lab);
    written[3].retain(|client| !client[0].contains("ours"));
    assert_eq!(written, before);
    assert_eq!(store.load(GROUP), after);
}
