//! Somebody holds what a flush needs, or the rows that follow it, for longer than a transaction
//! waits for locks.

use std::sync::mpsc::channel;

use zeroring_core::cvr::store::CvrStoreError;

use super::lab::{PostgresLab, server};
use crate::lab::*;
use crate::suite::{group, large};

#[test]
fn rows_are_written_however_long_somebody_holds_their_group() {
    let postgres = server();
    let mut lab = PostgresLab::new(&postgres, "held");
    lab.config.max_connections = 8;
    let store = lab.open("a");
    let cvr = group(&store, "g", &["q"]);
    let mut holder = lab.client();
    let hold = r#"BEGIN; SELECT 1 FROM @."rowsVersion" WHERE "clientGroupID" = 'g' FOR UPDATE"#;
    holder.batch_execute(&lab.sql(hold)).unwrap();
    let (cvr, flushed) = large(&store, &cvr, 5, 0..101);
    assert!(flushed.rows_follow);
    let waits = "SELECT xact_start FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    lab.until(waits, |found| found.len() == 1);
    let first = lab.values(waits);
    lab.until(waits, |found| found.len() == 1 && *found != first);
    holder.batch_execute("COMMIT").unwrap();
    assert_eq!(store.await_rows("g"), Ok(()));
    assert_eq!(store.rows(&cvr, &["q"], &[]).unwrap().len(), 101);
}

/// And no group waits for another one that is held.
#[test]
fn a_flush_waits_however_long_somebody_holds_its_group() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "flush");
    let store = lab.open("a");
    let cvrs = ["g", "h"].map(|id| group(&store, id, &["q"]));
    let hold = |id: &str| {
        let mut holder = lab.client();
        let sql = format!(
            r#"BEGIN; SELECT 1 FROM @."instances" WHERE "clientGroupID" = '{id}' FOR UPDATE"#
        );
        holder.batch_execute(&lab.sql(&sql)).unwrap();
        holder
    };
    let [mut holds_g, mut holds_h] = ["g", "h"].map(hold);
    let joins = cvrs.each_ref().map(|cvr| join(cvr, "late"));
    let (send, verdicts) = channel();
    let batch = joins.iter().map(|p| p.flush.clone()).collect();
    store.0.flush(batch, Box::new(move |found| send.send(found).unwrap()));
    let waits = "SELECT xact_start FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    lab.until(waits, |found| found.len() == 1);
    let first = lab.values(waits);
    holds_h.batch_execute("COMMIT").unwrap();
    let verdict = || verdicts.recv().unwrap().pop().unwrap();
    let h = verdict();
    assert_eq!((h.group.as_str(), h.result.is_ok()), ("h", true), "{h:?}");
    lab.until(waits, |found| found.len() == 1 && *found != first);
    holds_g.batch_execute("COMMIT").unwrap();
    let g = verdict();
    assert_eq!((g.group.as_str(), g.result.is_ok()), ("g", true), "{g:?}");
    for prepared in joins {
        assert_eq!(store.load(prepared.cvr.id.as_str()), prepared.cvr);
    }
}

/// What was not told to anybody need not be written.
#[test]
fn a_server_that_is_about_to_go_does_not_wait_for_ever() {
    let postgres = server();
    let lab = PostgresLab::new(&postgres, "goes");
    let store = lab.open("a");
    let cvr = group(&store, "g", &["q"]);
    let mut holder = lab.client();
    let hold = r#"BEGIN; SELECT 1 FROM @."instances" WHERE "clientGroupID" = 'g' FOR UPDATE"#;
    holder.batch_execute(&lab.sql(hold)).unwrap();
    let (send, verdicts) = channel();
    let batch = vec![join(&cvr, "late").flush];
    store.0.flush(batch, Box::new(move |found| send.send(found).unwrap()));
    store.0.hurry();
    let error = verdicts.recv().unwrap().remove(0).result.unwrap_err();
    assert!(
        matches!(&error, CvrStoreError::Storage(why) if why.contains("somebody holds")),
        "{error}"
    );
    holder.batch_execute("COMMIT").unwrap();
    assert_eq!(store.load("g"), cvr);
}
