//! Rows that follow their metadata: whose do, what becomes of them while they wait, and who has
//! them written before their time.

use std::sync::mpsc::channel;
use std::time::Duration;

use zeroring_core::cvr::store::CvrStoreError;
use zeroring_core::cvr::{Cvr, PreparedFlush, QueryUpdater};
use zeroring_storage::cvr_store::RowPace;

use super::lab::{PostgresLab, server};
use crate::lab::*;
use crate::suite::{advance, entering, group, large};

/// A lab where rows that follow are written only when somebody asks for them.
fn lazy(postgres: &zeroring_net::pg::local_server::LocalServer, app: &str) -> PostgresLab {
    const NEVER: Duration = Duration::from_secs(3_600);
    let mut lab = PostgresLab::new(postgres, app);
    lab.config.max_connections = 8;
    lab.config.rows.pace = RowPace { quiet: NEVER, delay: NEVER, limit: NEVER };
    lab
}

fn enter(cvr: &Cvr, at: u64, rows: std::ops::Range<i64>) -> PreparedFlush {
    let mut updater = QueryUpdater::new(cvr, &state(at), &state(1)).unwrap();
    updater.advanced(entering(rows), &cvr.version.state).unwrap();
    finish(updater, 3.0).unwrap()
}

/// Flushes together; whether the rows of each follow.
fn follow(server: &Server, flushes: &[PreparedFlush]) -> Vec<bool> {
    let verdicts = server.flush_all(flushes.iter().map(|p| p.flush.clone()).collect());
    verdicts.into_iter().map(|v| v.result.unwrap().rows_follow).collect()
}

#[test]
fn the_rows_of_small_flushes_follow_if_many_come_together() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "crowd");
    let store = lab.open("a");
    let mut cvrs: Vec<_> = (0..12).map(|n| group(&store, &format!("g{n}"), &["q"])).collect();
    let mut next = |at, count: usize, rows: i64| {
        let flushes: Vec<_> = cvrs[..count].iter().map(|cvr| enter(cvr, at, 0..rows)).collect();
        let followed = follow(&store, &flushes);
        cvrs.splice(..count, flushes.into_iter().map(|p| p.cvr));
        followed
    };
    assert_eq!(next(5, 10, 100), [false; 10], "a thousand in all");
    assert_eq!(next(6, 11, 91), [true; 11]);
    for n in 0..11 {
        assert_eq!(store.await_rows(&format!("g{n}")), Ok(()));
    }
    assert_eq!(next(7, 1, 1), [false], "alone, and nothing is owed any more");
    // One of many rows does not make the small ones beside it follow.
    let (few, many) = (enter(&cvrs[1], 8, 0..1), enter(&cvrs[2], 8, 0..5_000));
    assert_eq!(follow(&store, &[few, many]), [false, true]);
}

/// However often a row changes while it is owed, it is written once, with the last of its versions.
#[test]
fn rows_that_wait_coalesce() {
    let postgres = server();
    let lab = lazy(&postgres, "coalesce");
    let store = lab.open("a");
    let cvr = group(&store, "g", &["q"]);
    lab.client()
        .batch_execute(&lab.sql(
            r#"CREATE TABLE written (what text);
               CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN INSERT INTO written VALUES (TG_TABLE_NAME); RETURN NEW; END';
               CREATE TRIGGER note AFTER INSERT OR UPDATE ON @."rowsVersion"
                 FOR EACH ROW EXECUTE FUNCTION note();
               CREATE TRIGGER note AFTER INSERT OR UPDATE ON @."rows"
                 FOR EACH ROW EXECUTE FUNCTION note()"#,
        ))
        .unwrap();
    let (mut cvr, flushed) = large(&store, &cvr, 5, 0..101);
    assert!(flushed.rows_follow);
    for at in 6..20 {
        let value = Some(at);
        let deltas: Vec<_> = (0..101).map(|id| (id, value, "q", 1, 1, false)).collect();
        cvr = advance(&store, &cvr, at, &deltas);
    }
    cvr = advance(&store, &cvr, 20, &[(7, None, "q", 1, 0, false)]);
    // Who reads does not wait for the pace.
    let rows = store.rows(&cvr, &["q"], &[]).unwrap();
    assert_eq!(rows.len(), 100);
    assert!(rows.iter().all(|r| r.row_version == state(19) && r.patch_version == version(19, 0)));
    let count = r#"SELECT what, count(*) FROM written GROUP BY what ORDER BY what"#;
    assert_eq!(lab.values(count), [["rows", "101"], ["rowsVersion", "1"]]);
    assert_eq!(store.load("g"), cvr);
}

/// Another server takes a group over whose rows wait for their time: they are written as soon as
/// this one hears of it.
#[test]
fn who_takes_a_group_over_does_not_wait_for_the_pace() {
    let postgres = server();
    let lab = lazy(&postgres, "over");
    let (a, b) = (lab.open("a"), lab.open("b"));
    let (cvr, flushed) = large(&a, &group(&a, "g", &["q"]), 5, 0..101);
    assert!(flushed.rows_follow);
    let (send, theirs) = channel();
    b.0.load("g".into(), 2_000.0, Box::new(move |loaded| send.send(loaded).unwrap()));
    let owner = r#"SELECT "owner" FROM @."instances" WHERE "clientGroupID" = 'g'"#;
    lab.until(owner, |found| *found == [["b"]]);
    assert!(theirs.try_recv().is_err());
    let late = a.flush(&join(&cvr, "late").flush).unwrap_err();
    assert!(matches!(late, CvrStoreError::Ownership { .. }), "{late}");
    assert_eq!(theirs.recv().unwrap().unwrap().cvr, cvr);
    assert_eq!(b.rows(&cvr, &["q"], &[]).unwrap().len(), 101);
}

#[test]
fn a_server_that_is_about_to_go_writes_what_it_owes_without_pauses() {
    let postgres = server();
    let lab = lazy(&postgres, "hurry");
    let store = lab.open("a");
    let mut owe = |n: u64| {
        let (cvr, flushed) = large(&store, &group(&store, &format!("g{n}"), &["q"]), 5, 0..101);
        assert!(flushed.rows_follow);
        cvr
    };
    let mut cvrs: Vec<_> = (0..40).map(&mut owe).collect();
    store.0.hurry();
    for cvr in &cvrs {
        assert_eq!(store.await_rows(cvr.id.as_str()), Ok(()));
    }
    cvrs.push(owe(40));
    assert_eq!(store.await_rows("g40"), Ok(()), "later ones, too");
    drop(store);
    // And without having been told, when it ends.
    let store = lab.open("b");
    let later: Vec<_> =
        cvrs.iter().map(|cvr| large(&store, &Cvr::clone(cvr), 6, 0..101).0).collect();
    drop(store);
    let store = lab.open("c");
    for cvr in later {
        assert_eq!(store.try_load(cvr.id.as_str(), 3e15).unwrap().cvr, cvr);
        assert_eq!(store.rows(&cvr, &["q"], &[]).unwrap().len(), 101);
    }
}

/// A server dies while it owes rows: those groups are lost, and nobody takes what is there of them.
#[test]
fn a_server_that_dies_loses_the_groups_whose_rows_it_owes() {
    let postgres = server();
    let mut lab = lazy(&postgres, "dies");
    lab.config.rows.load_attempts = 2;
    lab.config.rows.load_delay = Duration::from_millis(1);
    let store = lab.open("a");
    let safe =
        advance(&store, &group(&store, "safe", &["q"]), 5, &[(1, Some(1), "q", 0, 1, false)]);
    let (mut owing, _) = large(&store, &group(&store, "owing", &["q"]), 5, 0..101);
    owing = advance(&store, &owing, 6, &[(1, Some(2), "q", 1, 1, false)]);
    // Nothing of it runs on: its threads wait for an hour.
    std::mem::forget(store);
    let other = lab.open("b");
    assert_eq!(other.load("safe"), safe);
    let gone = other.try_load("owing", 2e15).unwrap_err();
    let why = "max attempts exceeded waiting for CVR@06 to catch up from 00:01".to_owned();
    assert_eq!(gone, CvrStoreError::ClientNotFound(why));
    assert!(other.rows(&owing, &["q"], &[]).is_err());
}
