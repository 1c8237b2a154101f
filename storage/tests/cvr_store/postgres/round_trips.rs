//! What a commit costs does not depend on how many groups it touches, and groups that it does not
//! touch cost nothing (conformance checklist 54, 63; spec: view-syncer-cvr §10.7). Counted on the
//! wire, not timed.

use std::sync::mpsc::channel;

use zeroring_core::cvr::{Cvr, QueryUpdater};

use super::lab::server;
use super::outage::{next, proxied};
use super::proxy::Asked;
use crate::lab::*;
use crate::suite::{execute, group};

const GROUPS: usize = 200;

fn groups(server: &Server, count: usize) -> Vec<Cvr> {
    let fresh = (0..count).map(|n| {
        let mut updater = zeroring_core::cvr::ConfigUpdater::new(&empty(&format!("g{n:03}")));
        updater.ensure_client(&"c".into(), &shard());
        updater.put_desired(&"c".into(), &[crate::suite::custom("q")]).unwrap();
        updater.finish(times(1.0)).unwrap()
    });
    let fresh: Vec<_> = fresh.collect();
    for verdict in server.flush_all(fresh.iter().map(|p| p.flush.clone()).collect()) {
        verdict.result.unwrap();
    }
    fresh.into_iter().map(|p| execute(server, &p.cvr, 5, &[(1, &[("q", 1)])])).collect()
}

#[test]
fn all_groups_that_a_commit_touches_are_one_round_trip() {
    let postgres = server();
    let (lab, direct, proxy) = proxied(&postgres, "one");
    let looker = direct.open("t");
    let mut cvrs = groups(&looker, GROUPS);
    let store = lab.open("t");
    let mut costs = Vec::new();
    for touched in [1, 2, GROUPS] {
        let prepared: Vec<_> = cvrs[..touched].iter().map(|cvr| next(cvr, &looker)).collect();
        proxy.asked();
        let verdicts = store.flush_all(prepared.iter().map(|p| p.flush.clone()).collect());
        assert!(verdicts.iter().all(|v| v.result.is_ok()), "{verdicts:?}");
        costs.push(proxy.asked());
        for (at, p) in prepared.into_iter().enumerate() {
            cvrs[at] = p.cvr;
        }
    }
    assert_eq!(costs[0].round_trips, 1, "{costs:?}");
    assert!((5..=10).contains(&costs[0].statements), "{costs:?}");
    assert_eq!(costs[1..], [costs[0], costs[0]]);
    // Nothing of the others was asked, and a commit that touches no group has no flush at all.
    let ahead = QueryUpdater::new(&cvrs[0], &state(1_000), &state(1)).unwrap();
    assert!(ahead.finish(times(9.0), |_| None).is_none());
    assert_eq!(proxy.asked(), Asked::default());
    for cvr in &cvrs[..3] {
        assert_eq!(looker.load(cvr.id.as_str()), *cvr);
    }
}

#[test]
fn flushes_that_come_while_one_is_under_way_are_one_after_it() {
    const LATER: usize = 50;
    let postgres = server();
    let (lab, direct, proxy) = proxied(&postgres, "later");
    let looker = direct.open("t");
    let cvrs = groups(&looker, LATER + 1);
    let store = lab.open("t");
    let prepared: Vec<_> = cvrs.iter().map(|cvr| next(cvr, &looker)).collect();
    proxy.asked();
    proxy.close_gate();
    let (send, answers) = channel();
    let flush = |n: usize| {
        let send = send.clone();
        let batch = vec![prepared[n].flush.clone()];
        store.0.flush(batch, Box::new(move |verdicts| send.send(verdicts).unwrap()));
    };
    flush(0);
    proxy.until_waiting(1);
    (1..=LATER).for_each(flush);
    assert!(answers.try_recv().is_err(), "nothing is told before it is durable");
    proxy.open_gate();
    for _ in 0..=LATER {
        assert!(answers.recv().unwrap()[0].result.is_ok());
    }
    let asked = proxy.asked();
    assert_eq!(asked.round_trips, 2, "{asked:?}");
    assert!(asked.statements <= 20, "{asked:?}");
    for p in &prepared {
        assert_eq!(looker.load(p.cvr.id.as_str()), p.cvr);
    }
}

#[test]
fn loads_and_reads_that_wait_together_are_one_round_trip_each() {
    const LATER: usize = 50;
    let postgres = server();
    let (lab, _, proxy) = proxied(&postgres, "reads");
    let store = lab.open("t");
    let cvrs = groups(&store, LATER + 1);
    let (send, answers) = channel();
    let load = |n: usize| {
        let (send, id) = (send.clone(), cvrs[n].id.clone());
        store.0.load(id, 1e15, Box::new(move |loaded| send.send((n, loaded)).unwrap()));
    };
    proxy.asked();
    proxy.close_gate();
    load(0);
    proxy.until_waiting(1);
    (1..=LATER).for_each(load);
    proxy.open_gate();
    for _ in 0..=LATER {
        let (n, loaded) = answers.recv().unwrap();
        assert_eq!(loaded.unwrap().cvr, cvrs[n]);
    }
    assert_eq!(proxy.asked().round_trips, 2);
    assert_eq!(group(&store, "another", &["q"]).version, version(0, 1));
}
