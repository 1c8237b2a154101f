//! Stops, crashes and take-overs: nothing is lost, nothing doubled, nothing acknowledged too early.

use std::time::Duration;

use zeroring::replication::Phase;
use zeroring_net::pg::Client;
use zeroring_net::pg::replication::parse_lsn;

use super::support::{Fixture, Running, eventually, texts};

const COUNTER: &str = "CREATE TABLE t (id serial PRIMARY KEY, n int);
    INSERT INTO t (n) SELECT 0 FROM generate_series(1, 100);";

fn count(f: &Fixture) -> Vec<String> {
    texts(&f.config.replica_path, "SELECT count(*), sum(n), max(id) FROM t")
}

#[test]
fn a_restart_resumes_without_a_new_copy() {
    let mut f = Fixture::new(COUNTER);
    let running = f.start_ready();
    let first = running.ready();
    f.exec("UPDATE t SET n = n + 1; INSERT INTO t (n) VALUES (5)");
    f.catch_up(&running);
    running.stop();
    f.exec("UPDATE t SET n = n + 1; DELETE FROM t WHERE id = 1");
    let running = f.start_ready();
    assert_eq!(running.ready().replica_version, first.replica_version);
    f.catch_up(&running);
    assert_eq!(count(&f), ["100|204|101"]);
    assert_eq!(running.handle.status().snapshot().initial_syncs, 0);
    let slots = f.scalar("SELECT string_agg(slot_name, ',') FROM pg_replication_slots");
    assert_eq!(slots.as_deref(), Some("zero_0_a"));
    running.stop();
}

#[test]
fn a_lost_connection_in_the_middle_of_a_transaction_is_mended() {
    let mut f = Fixture::new(COUNTER);
    let running = f.start_ready();
    running.wait_streaming();
    for round in 0..2 {
        // Postgres crashes; the core reconnects by itself.
        f.exec("INSERT INTO t (n) SELECT 1 FROM generate_series(1, 5000)");
        f.server.kill();
        f.server.restart().unwrap();
        f.sql = eventually("Postgres is back", || Client::connect(&f.config.upstream).ok());
        f.exec("UPDATE t SET n = n + 1 WHERE id <= 10");
        f.catch_up(&running);
        let upstream = f.scalar("SELECT count(*) || '|' || sum(n) || '|' || max(id) FROM t");
        assert_eq!(count(&f), [upstream.unwrap()], "round {round}");
    }
    assert!(running.handle.status().snapshot().reconnects >= 1);
    running.commits();
    running.stop();
}

#[test]
fn only_what_is_durable_is_acknowledged_and_an_idle_slot_moves_on() {
    let mut f = Fixture::new(COUNTER);
    f.exec("CREATE TABLE zz (id int); CREATE PUBLICATION only_t FOR TABLE t, marker;");
    f.exec("ALTER SYSTEM SET wal_sender_timeout = '2s'");
    f.exec("SELECT pg_reload_conf()");
    f.config.publications = vec!["only_t".into()];
    let running = f.start_ready();
    f.exec("UPDATE t SET n = n + 1");
    f.catch_up(&running);
    let confirmed = |f: &mut Fixture| {
        let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots";
        parse_lsn(&f.scalar(sql).unwrap()).unwrap()
    };
    let commits = running.commits();
    let last = commits.last().unwrap().version.lsn().unwrap();
    eventually("the commits are acknowledged", || (confirmed(&mut f) >= last).then_some(()));
    // Only unpublished tables write: the slot must follow, or WAL piles up.
    f.exec("INSERT INTO zz SELECT generate_series(1, 1000)");
    let now = parse_lsn(&f.scalar("SELECT pg_current_wal_lsn()::text").unwrap()).unwrap();
    eventually("the idle slot moves on", || (confirmed(&mut f) >= now).then_some(()));
    running.stop();
}

#[test]
fn a_second_server_takes_the_slot_over_and_the_first_ends_cleanly() {
    let mut f = Fixture::new(COUNTER);
    let first = f.start_ready();
    first.wait_streaming();
    let mut second = f.config.clone();
    second.replica_path = f.dir.path().join("second.db");
    // The second has a copy of the first's file, as from a backup.
    let source = rusqlite::Connection::open(&f.config.replica_path).unwrap();
    source.execute("VACUUM INTO ?", [second.replica_path.to_str().unwrap()]).unwrap();
    let second = Running::start(&second);
    eventually("the first ends", || first.handle.is_finished().then_some(()));
    assert_eq!(first.handle.status().phase(), Phase::Stopped);
    first.handle.join().unwrap();
    second.wait_streaming();
    f.config.replica_path = f.dir.path().join("second.db");
    f.exec("UPDATE t SET n = 7");
    f.catch_up(&second);
    assert_eq!(count(&f), ["100|700|100"]);
    second.stop();
}

#[test]
fn a_new_replica_replaces_an_older_one_and_its_slot() {
    let mut f = Fixture::new(COUNTER);
    let first = f.start_ready();
    first.wait_streaming();
    // The file is lost with its machine.
    let mut second = f.config.clone();
    second.replica_path = f.dir.path().join("second.db");
    let second = Running::start(&second);
    second.ready();
    first.handle.stop();
    first.handle.join().unwrap();
    eventually("only the newest replica and its slot are left", || {
        let replicas = f.scalar("SELECT string_agg(slot, ',') FROM zero_0.replicas");
        let slots = f.scalar("SELECT string_agg(slot_name, ',') FROM pg_replication_slots");
        let done = replicas.as_deref() == Some("zero_0_b") && replicas == slots;
        if !done && second.handle.status().phase() == Phase::Streaming {
            // The clean-up looks again after 30 s if the first was still there: a restart of the
            // stream looks at once.
            f.exec(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
                 WHERE NOT active AND slot_name NOT IN (SELECT slot FROM zero_0.replicas)",
            );
        }
        done.then_some(())
    });
    second.stop();
}

#[test]
fn an_initial_sync_that_is_stopped_leaves_nothing_behind() {
    let mut f = Fixture::new(
        "CREATE TABLE big (id int PRIMARY KEY, pad text);
         INSERT INTO big SELECT g, repeat('x', 500) FROM generate_series(1, 60000) g;",
    );
    // A copy that waits: the table is locked.
    let mut blocker = Client::connect(&f.config.upstream).unwrap();
    let running = f.start();
    eventually("the initial sync starts", || {
        (running.handle.status().phase() == Phase::InitialSync).then_some(())
    });
    blocker.batch_execute("BEGIN; LOCK TABLE big IN ACCESS EXCLUSIVE MODE").unwrap();
    running.handle.stop();
    // It may have been done with the table already: then it ends with a replica.
    blocker.batch_execute("COMMIT").unwrap();
    running.handle.join().unwrap();
    let temporary = std::fs::read_dir(f.dir.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains("tmp"))
        .count();
    assert_eq!(temporary, 0);
    let running = f.start_ready();
    f.catch_up(&running);
    assert_eq!(texts(&f.config.replica_path, "SELECT count(*) FROM big"), ["60000"]);
    eventually("one slot, one replica", || {
        let counts = "SELECT (SELECT count(*) FROM pg_replication_slots) || '|' ||
            (SELECT count(*) FROM zero_0.replicas)";
        (f.scalar(counts).as_deref() == Some("1|1")).then_some(())
    });
    running.stop();
}

/// Whose replica is the newer one goes on. The other one goes on as well if it streamed before the
/// newer one was ready; else it ends, and not by a failure.
#[test]
fn two_servers_that_start_together_do_not_share_a_slot() {
    let mut f = Fixture::new(COUNTER);
    let mut other = f.config.clone();
    other.replica_path = f.dir.path().join("other.db");
    let servers =
        [(f.start(), f.config.replica_path.clone()), (Running::start(&other), other.replica_path)];
    let streams = servers.each_ref().map(|(running, _)| running.streams_or_ended());
    eventually("the older replica gives way", || {
        let rows = f.scalar("SELECT count(*)::text FROM zero_0.replicas");
        (rows.as_deref() == Some("1")).then_some(())
    });
    let newest = f.scalar("SELECT version FROM zero_0.replicas").unwrap();
    let used = "SELECT count(*) FROM pg_replication_slots WHERE active";
    let slots = f.sql.query_one(used, &[]).unwrap().get::<i64>(0).unwrap();
    assert_eq!(slots, streams.iter().filter(|s| **s).count() as i64, "one slot each");
    f.exec("UPDATE t SET n = 1");
    for ((running, path), streams) in servers.into_iter().zip(streams) {
        if streams {
            f.config.replica_path = path;
            f.catch_up(&running);
            assert_eq!(count(&f), ["100|100|100"]);
        } else {
            let mine = running.handle.status().replica();
            assert!(mine.is_none_or(|mine| mine.replica_version.as_str() < newest.as_str()));
        }
        running.stop();
    }
    assert!(streams.contains(&true));
}

/// A server with a new replica; `moment` of it, its row of `replicas` and its slot go, as the server
/// of a newer replica removes them.
fn overtaken(f: &mut Fixture, moment: &str, and: &str) -> Running {
    f.start_ready().stop();
    f.exec(&format!(
        "CREATE FUNCTION overtake() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           DELETE FROM zero_0.replicas WHERE id = NEW.id;
           PERFORM pg_drop_replication_slot(NEW.slot);
           {and}
           RETURN NULL;
         END $$;
         CREATE TRIGGER overtake {moment} ON zero_0.replicas
           FOR EACH ROW EXECUTE FUNCTION overtake()"
    ));
    f.config.replica_path = f.dir.path().join("overtaken.db");
    f.start()
}

#[test]
fn a_newer_replica_that_is_ready_first_ends_an_initial_sync_cleanly() {
    let mut f = Fixture::new(COUNTER);
    // The name of its slot is free again, and taken for another replica: it is not its to drop.
    let taken = "PERFORM pg_create_physical_replication_slot(NEW.slot);
        INSERT INTO zero_0.replicas (id, slot, version) VALUES ('newer', NEW.slot, 'zz');";
    let running = overtaken(&mut f, "BEFORE UPDATE OF \"initialSyncContext\"", taken);
    assert!(!running.streams_or_ended());
    running.handle.join().unwrap();
    let slots = f.scalar("SELECT string_agg(slot_name, ',' ORDER BY 1) FROM pg_replication_slots");
    assert_eq!(slots.as_deref(), Some("zero_0_a,zero_0_b"));
    let files = std::fs::read_dir(f.dir.path()).unwrap().map(|e| e.unwrap().file_name());
    let files: Vec<_> = files.filter(|name| name.to_string_lossy().contains("overtaken")).collect();
    assert!(files.is_empty(), "{files:?}");
}

#[test]
fn a_newer_replica_that_is_ready_before_the_stream_of_another_ends_it_cleanly() {
    let mut f = Fixture::new(COUNTER);
    // It has taken the slot over, and then there is none.
    let running = overtaken(&mut f, "AFTER UPDATE OF \"subscriberContext\"", "");
    assert!(!running.streams_or_ended());
    running.handle.join().unwrap();
}

#[test]
fn a_slot_that_older_transactions_hold_up_is_tried_again_and_none_is_left_behind() {
    let mut f = Fixture::new(COUNTER);
    f.config.slot_creation = Duration::from_millis(300);
    let mut older = Client::connect(&f.config.upstream).unwrap();
    older.batch_execute("BEGIN; CREATE TEMP TABLE older (); ").unwrap();
    let running = f.start();
    let error = eventually("it waits for the older transaction", || {
        running.handle.status().snapshot().last_error
    });
    assert!(error.contains("could not be created within 300ms"), "{error}");
    older.batch_execute("COMMIT").unwrap();
    running.wait_streaming();
    f.exec("UPDATE t SET n = 1");
    f.catch_up(&running);
    assert_eq!(count(&f), ["100|100|100"]);
    let slots = f.scalar("SELECT string_agg(slot_name, ',') FROM pg_replication_slots");
    assert_eq!(slots.as_deref(), Some("zero_0_a"));
    running.stop();
}

/// Names of slots are those of the whole cluster, and its databases know nothing of each other.
#[test]
fn servers_of_several_databases_that_start_together_do_not_want_the_same_slot() {
    const DATABASES: usize = 5;
    let mut f = Fixture::new("");
    let configs: Vec<_> = (0..DATABASES)
        .map(|n| {
            f.use_new_database(&format!("db{n}"));
            f.config.replica_path = f.dir.path().join(format!("{n}.db"));
            f.config.clone()
        })
        .collect();
    let servers: Vec<_> = configs.iter().map(Running::start).collect();
    for running in &servers {
        running.wait_streaming();
    }
    let slots = f.scalar("SELECT string_agg(slot_name, ',' ORDER BY 1) FROM pg_replication_slots");
    assert_eq!(slots.as_deref(), Some("zero_0_a,zero_0_b,zero_0_c,zero_0_d,zero_0_e"));
    servers.into_iter().for_each(Running::stop);
}
