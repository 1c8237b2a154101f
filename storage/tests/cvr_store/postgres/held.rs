//! Somebody holds what rows that follow need, for longer than a transaction waits for locks.

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
