//! Random queries, random transactions: after each, every view of the real client equals what
//! Postgres answers.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::generate::{DDL, Generator, TABLES, schema};
use crate::support::client::Clients;
use crate::support::database::Database;
use crate::support::oracle::expected_view;
use crate::support::server::Server;

/// Rounds of a run: each has its own queries. `ZERORING_FUZZ_ROUNDS` makes a run longer.
const ROUNDS: u64 = 3;
/// Queries watched in a round, and transactions in it.
const QUERIES: usize = 12;
const TRANSACTIONS: usize = 12;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn random_queries_follow_random_transactions() {
    let seed = number("ZERORING_FUZZ_SEED").unwrap_or_else(rand::random);
    let rounds = number("ZERORING_FUZZ_ROUNDS").unwrap_or(ROUNDS);
    println!("seed: ZERORING_FUZZ_SEED={seed}");
    let mut generator = Generator { rng: StdRng::seed_from_u64(seed) };
    let mut db = Database::start(DDL, TABLES);
    let server = Server::start(&db.url(), &[]);
    let mut clients = Clients::start();
    let schema = schema();
    let mut given_up = 0;
    for round in 0..rounds {
        let client = format!("c{round}");
        // Now and then the same group as in the round before, with other queries.
        let storage = format!("s{}", round / 2);
        clients.open(&client, &server.url(), &storage, &schema);
        let queries: Vec<_> = (0..QUERIES).map(|_| generator.query()).collect();
        for (i, query) in queries.iter().enumerate() {
            clients.watch(&client, &format!("q{i}"), query);
        }
        for step in 0..TRANSACTIONS {
            if clients.engine_failed {
                break;
            }
            let statements = generator.transaction();
            db.sql.batch_execute(&statements).unwrap_or_else(|_| {
                // A statement may violate a key: then nothing happened.
                db.sql.batch_execute("ROLLBACK").unwrap();
            });
            // Sometimes several commits reach the server before anyone looks.
            if generator.rng.random_bool(0.3) {
                continue;
            }
            for (i, query) in queries.iter().enumerate() {
                let want = expected_view(&mut db.sql, &schema, query);
                println!("seed {seed} round {round} step {step} query {i}: {query}");
                clients.expect_view(&client, &format!("q{i}"), &want);
            }
        }
        if clients.engine_failed {
            given_up += 1;
            clients = Clients::start();
        } else {
            clients.close(&client);
        }
    }
    println!("{} rounds agree, {given_up} given up by the client", rounds - given_up);
    assert!(given_up < rounds, "no round went through: the client's engine failed in all of them");
}
