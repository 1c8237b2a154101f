//! `kill -9` at random moments under writes: clients converge, and no cookie chain breaks.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::hydrate::{DDL, TABLES, expect_all, queries, schema, watch_all};
use crate::interop::expect_rows_written;
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
    // A server that is killed while it owes the rows of a large change loses their groups (`owed.rs`
    // tests that): the changes from here on are small.
    if env.contains(&CVR_IN_POSTGRES) {
        expect_rows_written(&mut db, 2);
    } else {
        let records = rusqlite::Connection::open(server.path("cvr.db")).unwrap();
        let owed = "SELECT count(*), count(rows_version) FROM groups";
        eventually("all rows are written", || {
            let counts = records.query_row(owed, [], |row| Ok((row.get(0)?, row.get(1)?)));
            let counts: (i64, i64) = counts.map_err(|e| e.to_string())?;
            if counts == (2, 0) { Ok(()) } else { Err(format!("{counts:?}")) }
        });
    }
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
    let broken: Vec<&String> = clients
        .complaints
        .iter()
        .filter(|c| c.contains("base cookie") || c.contains("ClientNotFound"))
        .collect();
    assert!(broken.is_empty() && clients.lost.is_empty(), "a client was reset: {broken:#?}");
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
