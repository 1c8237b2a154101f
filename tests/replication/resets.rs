//! Conditions that call for a new initial sync, and those that must be told to a human.

use zeroring_net::pg::{Client, PgConfig};

use super::support::{Fixture, eventually, texts};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, a text); INSERT INTO t VALUES (1, 'x');";

#[test]
fn a_schema_change_leads_to_a_new_replica() {
    let mut f = Fixture::new(TABLE);
    let running = f.start_ready();
    running.wait_streaming();
    let first = running.ready();
    f.exec(
        "BEGIN; INSERT INTO t VALUES (2, 'before'); ALTER TABLE t ADD COLUMN b int DEFAULT 7;
         INSERT INTO t VALUES (3, 'after', 8); COMMIT;",
    );
    eventually("a new replica", || {
        (!running.told.lock().unwrap().replaced.is_empty()).then_some(())
    });
    f.catch_up(&running);
    let path = f.config.replica_path.clone();
    let sql = "SELECT id, a, b FROM t ORDER BY id";
    assert_eq!(texts(&path, sql), ["1|x|7", "2|before|7", "3|after|8"]);
    let now = running.ready();
    assert!(now.replica_version > first.replica_version && now.generation > first.generation);

    // New tables too, also those without a primary key: they get a replica identity.
    f.exec("CREATE TABLE nopk (k text NOT NULL UNIQUE, v int); INSERT INTO nopk VALUES ('k', 1)");
    eventually("the new table", || (!texts(&path, "SELECT * FROM nopk").is_empty()).then_some(()));
    f.exec("UPDATE nopk SET v = 2");
    f.catch_up(&running);
    assert_eq!(texts(&path, "SELECT k, v FROM nopk"), ["k|2"]);
    running.stop();
}

#[test]
fn changes_of_tables_that_no_event_announced_lead_to_a_new_replica() {
    let mut f = Fixture::new(TABLE);
    let running = f.start_ready();
    running.wait_streaming();
    let path = f.config.replica_path.clone();
    // No event trigger fires for these; the second comes while the first is answered.
    for n in 1..=3 {
        f.exec(&format!("CREATE TABLE ctas_{n} AS SELECT {n} AS id"));
    }
    for n in 1..=3 {
        eventually("the table", || {
            (texts(&path, &format!("SELECT id FROM ctas_{n}")) == [n.to_string()]).then_some(())
        });
    }
    f.exec("INSERT INTO t VALUES (2, 'y')");
    f.catch_up(&running);
    running.stop();
}

#[test]
fn what_is_not_published_may_change_freely() {
    let mut f = Fixture::new(TABLE);
    f.exec("CREATE SCHEMA private; CREATE PUBLICATION mine FOR TABLE t, marker");
    f.config.publications = vec!["mine".into()];
    let running = f.start_ready();
    running.wait_streaming();
    f.exec(
        "CREATE TABLE private.x (id int); ALTER TABLE private.x ADD y int; DROP TABLE private.x;
         CREATE TABLE other (id int PRIMARY KEY); CREATE INDEX ON other (id);
         COMMENT ON TABLE t IS 'hello'; COMMENT ON PUBLICATION mine IS 'hello';
         ALTER TABLE t ALTER a SET DEFAULT 'd'; CREATE TABLE IF NOT EXISTS t (id int);
         SELECT zero_0.update_schemas();
         INSERT INTO t (id) VALUES (2);",
    );
    f.catch_up(&running);
    assert_eq!(texts(&f.config.replica_path, "SELECT a FROM t WHERE id = 2"), ["d"]);
    assert!(running.told.lock().unwrap().replaced.is_empty());
    running.stop();
}

#[test]
fn without_auto_reset_a_schema_change_stops_replication_with_its_reason() {
    let mut f = Fixture::new(TABLE);
    f.config.auto_reset = false;
    let running = f.start_ready();
    running.wait_streaming();
    f.exec("ALTER TABLE t RENAME COLUMN a TO b");
    let failure = running.failure();
    assert!(failure.contains("column b was added or renamed of table public.t"), "{failure}");
    assert!(failure.contains("ALTER TABLE"), "{failure}");
}

#[test]
fn every_condition_at_start_makes_a_new_replica() {
    let mut f = Fixture::new(TABLE);
    f.exec("CREATE PUBLICATION mine FOR TABLE t, marker");
    let running = f.start_ready();
    let mut last = running.ready().replica_version;
    running.stop();
    let conditions: [(&str, &str); 4] = [
        ("no row of replicas", "DELETE FROM zero_0.replicas"),
        ("no slot", "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"),
        ("no shard", "DROP SCHEMA zero_0 CASCADE"),
        ("an ancient shard", "UPDATE zero_0.\"versionHistory\" SET \"dataVersion\" = 3"),
    ];
    for (what, sql) in conditions {
        eventually("Postgres notices that the stream has ended", || {
            let active = f.scalar("SELECT count(*)::text FROM pg_replication_slots WHERE active");
            (active.as_deref() == Some("0")).then_some(())
        });
        f.exec(sql);
        let running = f.start_ready();
        let version = running.ready().replica_version;
        assert!(version > last, "{what}");
        last = version;
        f.catch_up(&running);
        running.stop();
    }
    // Other publications.
    f.config.publications = vec!["mine".into()];
    let running = f.start_ready();
    assert!(running.ready().replica_version > last);
    let stored = "SELECT publications FROM \"_zero.replicationConfig\"";
    assert_eq!(texts(&f.config.replica_path, stored), [r#"["_zero_metadata_0","mine"]"#]);
    running.stop();
    // A file that is none.
    std::fs::write(&f.config.replica_path, "garbage").unwrap();
    let running = f.start_ready();
    f.catch_up(&running);
    running.stop();
}

#[test]
fn an_invalidated_slot_makes_a_new_replica() {
    let mut f = Fixture::new(TABLE);
    let running = f.start_ready();
    let first = running.ready().replica_version;
    running.stop();
    f.exec("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'");
    f.exec("SELECT pg_reload_conf()");
    for _ in 0..4 {
        f.exec("INSERT INTO marker SELECT coalesce(max(n), 0) + 1 FROM marker");
        f.exec("SELECT pg_switch_wal()");
        f.exec("CHECKPOINT");
    }
    let lost = f.scalar("SELECT wal_status FROM pg_replication_slots");
    assert_eq!(lost.as_deref(), Some("lost"));
    let running = f.start_ready();
    assert!(running.ready().replica_version > first);
    f.catch_up(&running);
    running.stop();
}

#[test]
fn what_cannot_be_replicated_is_named_with_its_fix() {
    let mut f = Fixture::new("");
    let mut case = 0;
    for (sql, publications, expected) in [
        ("CREATE TABLE x (\"10\" int PRIMARY KEY)", &[][..], "column \"10\""),
        ("CREATE TABLE x (id int PRIMARY KEY, _0_version text)", &[], "reserved name"),
        (
            "CREATE TABLE x (id int PRIMARY KEY); ALTER TABLE x REPLICA IDENTITY NOTHING",
            &[],
            "REPLICA IDENTITY is NOTHING",
        ),
        ("CREATE TABLE \"a.b\" (id int PRIMARY KEY)", &[], "its name must consist"),
        ("", &["missing"], "\"missing\", which does not exist"),
        ("", &["_internal"], "reserved for internal use"),
        (
            "CREATE PUBLICATION p FOR TABLE marker WITH (publish = 'insert,update,delete')",
            &["p"],
            "must publish insert, update, delete and truncate",
        ),
        (
            "CREATE TABLE x (id int PRIMARY KEY, a int); CREATE PUBLICATION p FOR TABLE x;
             CREATE PUBLICATION q FOR TABLE x (id)",
            &["p", "q"],
            "different columns",
        ),
    ] {
        case += 1;
        f.use_new_database(&format!("case_{case}"));
        f.exec(sql);
        f.config.publications = publications.iter().map(|p| (*p).to_owned()).collect();
        let failure = f.start().failure();
        assert!(failure.contains(expected), "{failure}");
        // Nothing holds WAL back.
        assert_eq!(f.scalar("SELECT count(*)::text FROM pg_replication_slots").unwrap(), "0");
        assert!(!f.config.replica_path.exists());
    }
    f.config.publications.clear();
    let server =
        zeroring_net::pg::local_server::LocalServer::start(&["wal_level=replica"]).unwrap();
    f.config.upstream = PgConfig::parse(&server.url("postgres")).unwrap();
    let failure = f.start().failure();
    assert!(failure.contains("wal_level = logical"), "{failure}");
    f.config.upstream = PgConfig::parse(&server.url("missing")).unwrap();
    assert!(f.start().failure().contains("\"missing\" does not exist"));
}

#[test]
fn a_role_without_event_triggers_works_in_degraded_mode() {
    let mut f = Fixture::new("");
    f.exec("CREATE ROLE app LOGIN REPLICATION; CREATE ROLE plain LOGIN;");
    f.exec("CREATE DATABASE app OWNER app");
    let admin = PgConfig::parse(&f.server.url("app")).unwrap();
    let owner = PgConfig { user: "app".into(), ..admin };
    f.sql = Client::connect(&owner).unwrap();
    f.exec("CREATE TABLE marker (n int PRIMARY KEY)");
    f.exec(TABLE);
    // FOR TABLES IN SCHEMA needs a superuser; FOR TABLE needs ownership.
    f.exec("CREATE PUBLICATION mine FOR TABLE marker, t");
    f.config.upstream = owner;
    f.config.publications = vec!["mine".into()];
    let running = f.start_ready();
    running.wait_streaming();
    assert_eq!(
        f.scalar("SELECT \"ddlDetection\"::text FROM zero_0.\"shardConfig\"").unwrap(),
        "false"
    );
    f.exec("INSERT INTO t VALUES (2, 'y')");
    f.catch_up(&running);
    assert!(running.told.lock().unwrap().replaced.is_empty());
    // The first change after the ALTER tells.
    f.exec("ALTER TABLE t ADD COLUMN b int; INSERT INTO t VALUES (3, 'z', 9)");
    eventually("a new replica", || {
        (!running.told.lock().unwrap().replaced.is_empty()).then_some(())
    });
    f.catch_up(&running);
    let sql = "SELECT id, a, b FROM t ORDER BY id";
    assert_eq!(texts(&f.config.replica_path, sql), ["1|x|NULL", "2|y|NULL", "3|z|9"]);
    running.stop();

    // A role that is not allowed to replicate, nor to change that.
    let mut plain = f.config.clone();
    plain.upstream.user = "plain".into();
    plain.replica_path = f.dir.path().join("plain.db");
    let failure = super::support::Running::start(&plain).failure();
    assert!(failure.contains("permission denied") || failure.contains("42501"), "{failure}");
}

#[test]
fn a_role_that_may_create_roles_gives_itself_replication() {
    let mut f = Fixture::new("CREATE ROLE app LOGIN SUPERUSER NOREPLICATION;");
    f.config.upstream.user = "app".into();
    let running = f.start_ready();
    f.catch_up(&running);
    running.stop();
}
