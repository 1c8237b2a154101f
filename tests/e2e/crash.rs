//! `kill -9` at random moments under writes: clients converge, and no cookie chain breaks.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::hydrate::{DDL, TABLES, expect_all, queries, schema, watch_all};
use crate::support::client::Clients;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::support::server::{CVR_IN_POSTGRES, Server};

/// Kills in a run; `ZERORING_CRASHES` makes it longer.
const CRASHES: u64 = 3;

/// One random write to the tables of [`DDL`].
pub fn write(db: &mut Database, rng: &mut StdRng) {
    let i = rng.random_range(1..60);
    let statement = match rng.random_range(0..5) {
        0 => {
            format!("UPDATE issue SET priority = {}, title = title || '.' WHERE id = 'i{i}'", i % 5)
        }
        1 => format!(
            "INSERT INTO issue VALUES ('i{i}', 'Issue {i}', true, {}, 'u1') ON CONFLICT (id) DO UPDATE SET open = NOT issue.open",
            i % 4
        ),
        2 => format!(
            "INSERT INTO comment VALUES ('c{i}', 'i{}', 'again', {i}) ON CONFLICT (id) DO UPDATE SET \"issueId\" = excluded.\"issueId\"",
            i % 40
        ),
        3 => format!("DELETE FROM comment WHERE id = 'c{i}'"),
        _ => format!("DELETE FROM issue WHERE id = 'i{i}'"),
    };
    db.sql.batch_execute(&statement).unwrap();
}

#[test]
fn a_killed_server_comes_back_where_it_was() {
    comes_back(&[]);
}

#[test]
fn a_killed_server_with_its_groups_in_postgres_comes_back_where_it_was() {
    comes_back(&[CVR_IN_POSTGRES]);
}

fn comes_back(env: &[(&str, &str)]) {
    let seed = std::env::var("ZERORING_FUZZ_SEED").ok().and_then(|s| s.parse().ok());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    let crashes = std::env::var("ZERORING_CRASHES").ok().and_then(|s| s.parse().ok());
    println!("seed: ZERORING_FUZZ_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut db = Database::start(DDL, TABLES);
    let mut server = Server::start(&db.url(), env);
    // Clients of a server that refuses them try again after five seconds only.
    let router = Proxy::start(server.port());
    router.wait_for_target();
    let url = format!("http://127.0.0.1:{}", router.port);
    let mut clients = Clients::start();
    let queries = queries();
    for client in ["a", "b"] {
        clients.open(client, &url, client, &schema());
        watch_all(&mut clients, client, &queries);
        expect_all(&mut clients, client, &queries, &mut db);
    }
    let mut lost = BTreeSet::new();
    for _ in 0..crashes.unwrap_or(CRASHES) {
        for _ in 0..rng.random_range(1..60) {
            write(&mut db, &mut rng);
        }
        // The moment of the kill is the random thing under test.
        std::thread::sleep(Duration::from_millis(rng.random_range(0..30)));
        server.kill();
        for _ in 0..rng.random_range(0..20) {
            write(&mut db, &mut rng);
        }
        lost.extend(groups_that_are_owed_rows(env, &mut db, &server));
        server.launch();
        for _ in 0..rng.random_range(0..20) {
            write(&mut db, &mut rng);
        }
        if rng.random_bool(0.5) {
            for client in ["a", "b"] {
                expect_all(&mut clients, client, &queries, &mut db);
            }
        }
    }
    for client in ["a", "b"] {
        expect_all(&mut clients, client, &queries, &mut db);
    }
    // Of a large change, or of many that were made while a server was away, rows follow their
    // metadata: a server that dies in between loses these groups, and no other (`owed.rs`).
    println!("{} groups were lost with the rows that they were owed", lost.len());
    assert_eq!(clients.lost.len(), lost.len(), "{:?}", clients.lost);
    let broken: Vec<&String> =
        clients.complaints.iter().filter(|c| c.contains("base cookie")).collect();
    assert!(broken.is_empty(), "the chain of cookies is broken: {broken:#?}");
}

/// Groups whose rows were not written when their server was killed: they never will be.
fn groups_that_are_owed_rows(
    env: &[(&str, &str)],
    db: &mut Database,
    server: &Server,
) -> BTreeSet<String> {
    if !env.contains(&CVR_IN_POSTGRES) {
        let records = rusqlite::Connection::open(server.path("cvr.db")).unwrap();
        let owed = "SELECT id FROM groups WHERE rows_version IS NOT NULL";
        let mut owed = records.prepare(owed).unwrap();
        let groups = owed.query_map([], |row| row.get(0)).unwrap();
        return groups.map(Result::unwrap).collect();
    }
    eventually("Postgres has done what the server asked it for", || {
        let others = "SELECT count(*) FROM pg_stat_activity
            WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        match db.sql.query_one(others, &[]).unwrap().get::<_, i64>(0) {
            0 => Ok(()),
            n => Err(format!("{n} sessions")),
        }
    });
    let owed = r#"SELECT i."clientGroupID" FROM "zero_0/cvr"."instances" i
        LEFT JOIN "zero_0/cvr"."rowsVersion" v USING ("clientGroupID")
        WHERE i."version" <> coalesce(v."version", '00')"#;
    db.sql.query(owed, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

/// Data, replication and client view records are all in the Postgres that crashes.
#[test]
fn clients_notice_nothing_of_a_crash_of_postgres_but_that_it_takes_time() {
    let crashes = std::env::var("ZERORING_CRASHES").ok().and_then(|s| s.parse().ok());
    let mut rng = crate::interop::seed();
    let mut db = Database::start(DDL, TABLES);
    let server = Server::start(&db.url(), &[CVR_IN_POSTGRES]);
    let mut clients = Clients::start();
    let queries = queries();
    for client in ["a", "b"] {
        clients.open(client, &server.url(), client, &schema());
        watch_all(&mut clients, client, &queries);
        expect_all(&mut clients, client, &queries, &mut db);
    }
    for _ in 0..crashes.unwrap_or(CRASHES) {
        for _ in 0..rng.random_range(1..60) {
            write(&mut db, &mut rng);
        }
        // With commits on their way, and flushes.
        std::thread::sleep(Duration::from_millis(rng.random_range(0..20)));
        db.crash();
        for _ in 0..rng.random_range(1..20) {
            write(&mut db, &mut rng);
        }
        for client in ["a", "b"] {
            expect_all(&mut clients, client, &queries, &mut db);
        }
    }
    let noticed: Vec<&String> =
        clients.complaints.iter().filter(|c| !c.contains("Slow query materialization")).collect();
    assert!(noticed.is_empty(), "{noticed:#?}");
    crate::interop::expect_sound_records(&mut db, 2);
}
