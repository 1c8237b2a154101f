//! What flushes cost Postgres and us, in CPU time. Printed, not judged: `CVR_COST=1` runs it.

use zeroring_core::cvr::advance::{AdvancedRow, CountChange};
use zeroring_core::cvr::{Cvr, PreparedFlush, QueryUpdater};

use super::lab::{PostgresLab, fast_server};
use crate::lab::*;
use crate::suite::execute;

/// CPU seconds of a process so far.
fn cpu_of(pid: &str) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|t| t.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn advance(cvr: &Cvr, at: u64) -> PreparedFlush {
    let mut updater = QueryUpdater::new(cvr, &state(at), &state(1)).unwrap();
    let changed = AdvancedRow {
        id: row_id("issue", 1),
        row: Some(row(&state(at), at as i64)),
        counts: [CountChange { query: "q".into(), before: 1, after: 1 }].into_iter().collect(),
        others: false,
        by_advance: true,
    };
    updater.advanced([changed], &cvr.version.state).unwrap();
    finish(updater, at as f64).unwrap()
}

#[test]
fn of_small_flushes_of_many_groups() {
    if std::env::var_os("CVR_COST").is_none() {
        return;
    }
    let postgres = fast_server();
    let mut lab = PostgresLab::new(&postgres, "cost");
    lab.config.max_connections = 8;
    let store = lab.open("t");
    for groups in [1usize, 20, 200] {
        let mut cvrs: Vec<Cvr> = (0..groups)
            .map(|n| {
                let mut updater =
                    zeroring_core::cvr::ConfigUpdater::new(&store.load(&format!("{groups}-{n}")));
                updater.ensure_client(&"c".into(), &shard());
                updater.put_desired(&"c".into(), &[crate::suite::custom("q")]).unwrap();
                let cvr = store.commit(updater.finish(times(1.0)));
                let rows: Vec<_> = (0..50).map(|id| (id, &[("q", 1)][..])).collect();
                execute(&store, &cvr, 5, &rows)
            })
            .collect();
        lab.client().batch_execute("VACUUM ANALYZE").unwrap();
        let pids = || -> Vec<String> {
            lab.values(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'zero-sync-worker%'",
            )
            .into_iter()
            .map(|mut r| r.remove(0))
            .collect()
        };
        let rounds = (20_000 / groups.max(20)) as u64;
        let cpu = || pids().iter().map(|pid| cpu_of(pid)).sum::<f64>();
        let (theirs, ours) = (cpu(), cpu_of("self"));
        let began = std::time::Instant::now();
        for round in 0..rounds {
            let prepared: Vec<_> = cvrs.iter().map(|cvr| advance(cvr, 10 + round)).collect();
            let batch = prepared.iter().map(|p| p.flush.clone()).collect();
            for verdict in store.flush_all(batch) {
                verdict.result.unwrap();
            }
            cvrs = prepared.into_iter().map(|p| p.cvr).collect();
        }
        let us = |seconds: f64| seconds * 1e6 / (rounds * groups as u64) as f64;
        eprintln!(
            "{groups} groups: per group and flush Postgres {:.0} µs, we {:.0} µs CPU, {:.0} µs in all",
            us(cpu() - theirs),
            us(cpu_of("self") - ours),
            us(began.elapsed().as_secs_f64()),
        );
        eprintln!("{:?}", lab.values("SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE n_tup_upd > 0"));
    }
}

/// Groups that come back after an absence: they are loaded, one row of each has changed, and its
/// client missed that of the change before.
#[test]
fn of_reconnects() {
    if std::env::var_os("CVR_COST").is_none() {
        return;
    }
    const GROUPS: usize = 512;
    let postgres = fast_server();
    let mut lab = PostgresLab::new(&postgres, "reconnects");
    lab.config.max_connections = 8;
    let store = lab.open("t");
    let cvrs: Vec<Cvr> = (0..GROUPS)
        .map(|n| {
            let cvr = crate::suite::group(&store, &format!("g{n}"), &["q"]);
            let rows: Vec<_> = (0..100).map(|id| (id, &[("q", 1)][..])).collect();
            execute(&store, &cvr, 5, &rows)
        })
        .collect();
    lab.client().batch_execute("VACUUM ANALYZE").unwrap();
    let pids = || {
        lab.values(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'zero-sync-worker%'",
        )
    };
    let cpu = || pids().iter().map(|pid| cpu_of(&pid[0])).sum::<f64>();
    let report = |what: &str, rounds: usize, ask: &mut dyn FnMut(usize)| {
        ask(0);
        let (theirs, ours) = (cpu(), cpu_of("self"));
        for round in 1..=rounds {
            ask(round);
        }
        let us = |seconds: f64| seconds * 1e6 / (rounds * GROUPS) as f64;
        let (theirs, ours) = (us(cpu() - theirs), us(cpu_of("self") - ours));
        eprintln!("{what}: per group Postgres {theirs:.0} µs, we {ours:.0} µs CPU");
    };
    report("load", 20, &mut |_| {
        let (send, answers) = std::sync::mpsc::channel();
        for cvr in &cvrs {
            let send = send.clone();
            let reply = Box::new(move |loaded: Result<_, _>| send.send(loaded.is_ok()).unwrap());
            store.0.load(cvr.id.clone(), 1e15, reply);
        }
        assert!(answers.iter().take(GROUPS).all(|ok| ok));
    });
    report("catch-up", 20, &mut |_| {
        let (send, answers) = std::sync::mpsc::channel();
        for cvr in &cvrs {
            let send = send.clone();
            let range = range(cvr, Some(version(4, 0)));
            let scan = zeroring_storage::cvr_store::CatchupScan {
                range,
                without: vec!["q".into()],
                from: None,
                limit: 2_000,
            };
            let reply = Box::new(move |page: Result<_, _>| send.send(page.is_ok()).unwrap());
            store.0.catch_up(scan, reply);
        }
        assert!(answers.iter().take(GROUPS).all(|ok| ok));
    });
    let mut cvrs = cvrs;
    report("flush of a row", 20, &mut |round| {
        let prepared: Vec<_> = cvrs.iter().map(|cvr| advance(cvr, 10 + round as u64)).collect();
        for verdict in store.flush_all(prepared.iter().map(|p| p.flush.clone()).collect()) {
            verdict.result.unwrap();
        }
        cvrs = prepared.into_iter().map(|p| p.cvr).collect();
    });
}
