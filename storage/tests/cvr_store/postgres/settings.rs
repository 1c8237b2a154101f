//! What the store's sessions and transactions are set to, as Postgres sees it (spec:
//! view-syncer-cvr §2.3).

use std::time::Duration;

use zeroring_core::cvr::TtlClock;
use zeroring_core::cvr::store::CvrStoreError;
use zeroring_storage::cvr_store::postgres::ConnectionLife;
use zeroring_storage::cvr_store::{CatchupScan, PurgeLimits};

use super::lab::{PostgresLab, server};
use crate::lab::*;
use crate::suite::{group, large};

/// The settings as one text.
const SETTINGS: &str = "concat_ws(' ', current_setting('application_name'),
    current_setting('transaction_isolation'), current_setting('transaction_read_only'),
    current_setting('statement_timeout'), current_setting('idle_in_transaction_session_timeout'))";

/// The settings as a transaction of ours should have them.
fn ours(isolation: &str, read_only: &str) -> String {
    let name = format!("zero-sync-worker-{}-cvr", std::process::id());
    format!("{name} {isolation} {read_only} 0 7s")
}

/// A lab on a database whose own settings are all others.
fn lab(postgres: &zeroring_net::pg::local_server::LocalServer, app: &str) -> PostgresLab {
    let mut lab = PostgresLab::new(postgres, app);
    lab.client()
        .batch_execute(
            "ALTER DATABASE postgres SET statement_timeout = '33s';
             ALTER DATABASE postgres SET idle_in_transaction_session_timeout = '44s';
             ALTER DATABASE postgres SET default_transaction_isolation = 'serializable'",
        )
        .unwrap();
    lab.config.idle_in_transaction = std::time::Duration::from_secs(7);
    lab
}

#[test]
fn writes_have_the_settings_of_the_specification() {
    let postgres = server();
    let lab = lab(&postgres, "writes");
    let store = lab.open("a");
    let cvr = group(&store, "g", &["q"]);
    lab.client()
        .batch_execute(&lab.sql(&format!(
            r#"CREATE TABLE seen (what text, settings text);
               CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN
                 INSERT INTO seen VALUES (TG_TABLE_NAME || coalesce('' '' || TG_ARGV[0], ''''), {});
                 RETURN NEW; END';
               CREATE TRIGGER note AFTER INSERT OR UPDATE ON @."rows"
                 FOR EACH ROW EXECUTE FUNCTION note();
               CREATE TRIGGER note AFTER UPDATE ON @."instances" FOR EACH ROW
                 WHEN (OLD."version" IS DISTINCT FROM NEW."version" AND NOT NEW."deleted")
                 EXECUTE FUNCTION note('flushed');
               CREATE TRIGGER note_clock AFTER UPDATE ON @."instances" FOR EACH ROW
                 WHEN (NEW."ttlClock" = 77) EXECUTE FUNCTION note('clock');
               CREATE TRIGGER note_purge AFTER UPDATE ON @."instances" FOR EACH ROW
                 WHEN (NEW."deleted") EXECUTE FUNCTION note('purged');
               CREATE TRIGGER note_claim AFTER UPDATE ON @."instances" FOR EACH ROW
                 WHEN (NEW."owner" = 'b') EXECUTE FUNCTION note('claimed')"#,
            SETTINGS.replace('\'', "''")
        )))
        .unwrap();
    let (_, flushed) = large(&store, &cvr, 5, 0..101);
    assert!(flushed.rows_follow);
    assert_eq!(store.await_rows("g"), Ok(()));
    store.0.write_ttl_clock("g".into(), TtlClock(77.0), 88.0);
    let limits = PurgeLimits { now_ms: 1e9, inactive_ms: 1e12, batch: 3 };
    store.purge(limits);
    lab.open("b").try_load("g", 2e15).unwrap();
    store.purge(PurgeLimits { inactive_ms: 1.0, ..limits });
    let seen = lab.values("SELECT DISTINCT what, settings FROM seen ORDER BY what");
    let all =
        ["instances claimed", "instances clock", "instances flushed", "instances purged", "rows"];
    assert_eq!(seen, all.map(|what| [what.to_owned(), ours("read committed", "off")]));
}

/// Five connections are there and have run their statements, before anybody asks for anything.
#[test]
fn a_store_that_starts_is_warm() {
    let postgres = server();
    let mut lab = PostgresLab::new(&postgres, "warm");
    for (allowed, made) in [(1, "1"), (2, "2"), (3, "3"), (30, "5")] {
        lab.config.max_connections = allowed;
        let store = lab.open("a");
        // What failed would have been rolled back.
        let sessions = "SELECT count(*), bool_and(query = 'COMMIT'), bool_and(state = 'idle')
            FROM pg_stat_activity WHERE application_name LIKE 'zero-sync-worker-%-cvr'";
        lab.until(sessions, |found| found[0] == [made, "t", "t"]);
        let name = "SELECT DISTINCT application_name FROM pg_stat_activity
            WHERE application_name LIKE 'zero-sync-worker-%'";
        let expected = format!("zero-sync-worker-{}-cvr", std::process::id());
        assert_eq!(lab.values(name), [[expected]]);
        drop(store);
        let rest = "SELECT 1 FROM pg_stat_activity
            WHERE application_name LIKE 'zero-sync-worker-%-cvr'";
        lab.until(rest, <[_]>::is_empty);
    }
}

/// A read cannot note anything: it is stopped, and says in its last words what it was.
#[test]
fn reads_have_the_settings_of_the_specification() {
    let postgres = server();
    let lab = lab(&postgres, "reads");
    let store = lab.open("a");
    let cvr = group(&store, "g", &["q"]);
    lab.client()
        .batch_execute(&lab.sql(&format!(
            r#"CREATE FUNCTION tell() RETURNS boolean LANGUAGE plpgsql AS
                 'BEGIN RAISE EXCEPTION ''<%>'', {}; END';
               ALTER TABLE @."instances" RENAME TO "instances_behind";
               CREATE VIEW @."instances" AS SELECT * FROM @."instances_behind" WHERE tell();
               ALTER TABLE @."queries" RENAME TO "queries_behind";
               CREATE VIEW @."queries" AS SELECT * FROM @."queries_behind" WHERE tell()"#,
            SETTINGS.replace('\'', "''")
        )))
        .unwrap();
    let expect = |what: &str, error: CvrStoreError| {
        let error = error.to_string();
        let told = error.split_once('<').and_then(|(_, rest)| rest.split_once('>')).map(|t| t.0);
        assert_eq!(told, Some(&*ours("repeatable read", "on")), "{what}: {error}");
    };
    expect("load", store.try_load("g", 1e15).unwrap_err());
    expect("rows", store.rows(&cvr, &["q"], &[]).unwrap_err());
    let scan = CatchupScan { range: range(&cvr, None), without: vec![], from: None, limit: 1 };
    expect("catch-up", store.page(scan).unwrap_err());
    let (send, answer) = std::sync::mpsc::channel();
    let reply = Box::new(move |list: Result<_, _>| send.send(list.map(drop)).unwrap());
    store.0.inspect("g".into(), None, TtlClock(1.0), reply);
    expect("inspect", answer.recv().unwrap().unwrap_err());
}

#[test]
fn connections_are_renewed_when_they_are_old_and_closed_when_nobody_needs_them() {
    const LONG: Duration = Duration::from_secs(3_600);
    let postgres = server();
    let sessions = "SELECT pid FROM pg_stat_activity
        WHERE application_name LIKE 'zero-sync-worker-%-cvr' ORDER BY pid";
    let mut lab = PostgresLab::new(&postgres, "idle");
    let short = Duration::from_millis(100);
    lab.config.connections = ConnectionLife { idle: short, shortest: LONG, spread: LONG };
    let store = lab.open("a");
    for round in 0..3 {
        lab.until(sessions, <[_]>::is_empty);
        assert_eq!(group(&store, &format!("g{round}"), &["q"]).version, version(0, 1));
    }
    drop(store);

    let mut lab = PostgresLab::new(&postgres, "old");
    lab.config.connections = ConnectionLife { idle: LONG, shortest: short / 4, spread: short / 4 };
    let store = lab.open("a");
    let cvr = group(&store, "g", &["q"]);
    // Whoever is asked finds an old connection now and then, and makes a new one.
    let seen = std::cell::RefCell::new(std::collections::BTreeSet::new());
    lab.until(sessions, |found| {
        assert_eq!(store.load("g"), cvr);
        store.rows(&cvr, &["q"], &[]).unwrap();
        let mut seen = seen.borrow_mut();
        seen.extend(found.iter().map(|row| row[0].clone()));
        // Those that end take a moment.
        assert!(found.len() <= 2 * 3, "{found:?}");
        seen.len() >= 3 * 3
    });
}
