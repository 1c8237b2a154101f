//! Postgres goes away and comes back, or only the connection does: flushes take longer, and each
//! gets the verdict that is true.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use zeroring_core::cvr::{Cvr, PreparedFlush, QueryUpdater, ReceivedRow, RowRecords};
use zeroring_net::pg::PgConfig;
use zeroring_net::pg::local_server::LocalServer;

use super::lab::{PostgresLab, server};
use super::proxy::{Fault, Proxy};
use crate::lab::*;
use crate::suite::{execute, group};

/// A lab behind a proxy, and the proxy.
pub(super) fn proxied(server: &LocalServer, app: &str) -> (PostgresLab, PostgresLab, Proxy) {
    let proxy = Proxy::start(server.port());
    let direct = PostgresLab::new(server, app);
    let mut lab = PostgresLab::new(server, app);
    lab.config.connection = PgConfig { port: proxy.port, ..lab.config.connection.clone() };
    (lab, direct, proxy)
}

/// The next version of a group that holds row 1 for query `q`: the row is referenced once more.
pub(super) fn next(cvr: &Cvr, server: &Server) -> PreparedFlush {
    let at = cvr.version.state.lsn().unwrap() + 1;
    let mut updater = QueryUpdater::new(cvr, &state(at), &state(1)).unwrap();
    let records = RowRecords::new(server.rows(cvr, &["q"], &[]).unwrap());
    let row = ReceivedRow {
        id: row_id("issue", 1),
        row: Some(row(&state(at), 1)),
        counts: counts(&[("q", 1)]),
    };
    updater.received([row], &records).unwrap();
    updater.finish(times(at as f64), |q| (q.as_str() == "q").then_some(at)).unwrap()
}

/// What is stored is exactly this, and nothing of it was applied twice.
fn expect_stored(server: &Server, cvr: &Cvr) {
    assert_eq!(server.load(cvr.id.as_str()), *cvr);
    let rows = server.rows(cvr, &["q"], &[]).unwrap();
    assert_eq!(rows.len(), 1);
    let references = cvr.version.state.lsn().unwrap() as i64 - 4;
    assert_eq!(rows[0].ref_counts, Some(counts(&[("q", references)])));
}

#[test]
fn a_commit_whose_answer_is_lost_is_found_to_have_happened() {
    let postgres = server();
    let (mut lab, direct, proxy) = proxied(&postgres, "lost");
    lab.config.socket_inactivity = Some(Duration::from_millis(500));
    let looker = direct.open("t");
    let store = lab.open("t");
    let mut cvrs: Vec<_> = ["g", "h"]
        .map(|g| execute(&looker, &group(&looker, g, &["q"]), 5, &[(1, &[("q", 1)])]))
        .into();
    for fault in [Fault::CutBefore, Fault::CutAfter, Fault::Silence, Fault::CutAfter] {
        let prepared: Vec<_> = cvrs.iter().map(|cvr| next(cvr, &looker)).collect();
        proxy.set(fault);
        let verdicts = store.flush_all(prepared.iter().map(|p| p.flush.clone()).collect());
        assert!(proxy.is_over(), "{fault:?} did not happen");
        for (verdict, prepared) in verdicts.iter().zip(&prepared) {
            assert_eq!(verdict.result.as_ref().map(|f| f.rows), Ok(1), "{fault:?}");
            expect_stored(&looker, &prepared.cvr);
        }
        cvrs = prepared.into_iter().map(|p| p.cvr).collect();
    }
}

#[test]
fn a_lost_commit_that_somebody_else_overtook_is_refused() {
    let postgres = server();
    let (lab, direct, proxy) = proxied(&postgres, "overtaken");
    let (store, other) = (lab.open("a"), direct.open("b"));
    let cvr = execute(&other, &group(&other, "g", &["q"]), 5, &[(1, &[("q", 1)])]);
    let prepared = next(&cvr, &other);
    // The other server has committed a flush that leads to the same version from the same base.
    other.flush(&prepared.flush).unwrap();
    proxy.set(Fault::CutBefore);
    let refused = store.flush(&prepared.flush).unwrap_err();
    assert!(proxy.is_over());
    assert!(refused.to_string().contains("concurrently modified"), "{refused}");
    expect_stored(&other, &prepared.cvr);
}

/// A half-open connection: what is sent goes nowhere, and nothing ever comes.
#[test]
fn a_connection_on_which_nothing_comes_is_given_up() {
    let postgres = server();
    let (mut lab, direct, proxy) = proxied(&postgres, "silent");
    let looker = direct.open("t");
    let cvr = execute(&looker, &group(&looker, "g", &["q"]), 5, &[(1, &[("q", 1)])]);
    lab.config.socket_inactivity = Some(std::time::Duration::from_millis(300));
    let store = lab.open("t");
    let prepared = next(&cvr, &looker);
    proxy.close_gate();
    let (send, answer) = channel();
    let batch = vec![prepared.flush.clone()];
    store.0.flush(batch, Box::new(move |verdicts| send.send(verdicts).unwrap()));
    // The first one is given up and the flush sent again, on another one.
    proxy.until_waiting(2);
    assert!(answer.try_recv().is_err());
    proxy.open_gate();
    assert_eq!(answer.recv().unwrap()[0].result.as_ref().map(|f| f.rows), Ok(1));
    expect_stored(&looker, &prepared.cvr);
}

#[test]
fn reads_outlive_their_connection() {
    let postgres = server();
    let (lab, _, proxy) = proxied(&postgres, "reads");
    let store = lab.open("t");
    let cvr = execute(&store, &group(&store, "g", &["q"]), 5, &[(1, &[("q", 1)])]);
    for fault in [Fault::CutBefore, Fault::CutAfter] {
        proxy.set(fault);
        expect_stored(&store, &cvr);
        assert!(proxy.is_over());
    }
}

/// Three groups flush without a pause while Postgres crashes again and again.
#[test]
fn a_crashing_postgres_only_costs_time() {
    const CRASHES: usize = 5;
    const GROUPS: usize = 3;
    let mut postgres = server();
    let lab = PostgresLab::new(&postgres, "crash");
    let store = lab.open("t");
    let (send, verdicts) = channel::<()>();
    let stop = AtomicBool::new(false);
    let last = std::thread::scope(|scope| {
        let (store, stop) = (&store, &stop);
        let flushing = scope.spawn(move || {
            let mut cvrs: Vec<_> = (0..GROUPS)
                .map(|n| {
                    let cvr = group(store, &format!("g{n}"), &["q"]);
                    execute(store, &cvr, 5, &[(1, &[("q", 1)])])
                })
                .collect();
            while !stop.load(Ordering::SeqCst) {
                let prepared: Vec<_> = cvrs.iter().map(|cvr| next(cvr, store)).collect();
                let batch = prepared.iter().map(|p| p.flush.clone()).collect();
                for verdict in store.flush_all(batch) {
                    verdict.result.unwrap();
                }
                cvrs = prepared.into_iter().map(|p| p.cvr).collect();
                send.send(()).unwrap();
            }
            cvrs
        });
        for crash in 0..CRASHES {
            for _ in 0..=crash * 3 {
                verdicts.recv().unwrap();
            }
            postgres.restart().unwrap();
        }
        verdicts.recv().unwrap();
        stop.store(true, Ordering::SeqCst);
        flushing.join().unwrap()
    });
    for cvr in last {
        expect_stored(&store, &cvr);
    }
}
