//! A steady stream of writes for as long as wanted: no difference ever, and flat memory.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::crash::write;
use crate::hydrate::{DDL, TABLES, expect_all, queries, schema, watch_all};
use crate::support::client::Clients;
use crate::support::database::Database;
use crate::support::server::Server;

/// Length of a run; `ZERORING_SOAK_SECONDS=600` is the acceptance run.
const SECONDS: u64 = 10;
/// 50 writes a second.
const PERIOD: Duration = Duration::from_millis(20);
/// Writes between two comparisons of all views.
const WRITES_PER_CHECK: u32 = 100;
/// Memory that a run may gain between its first fifth and its end.
const MAX_GROWTH_BYTES: u64 = 16 << 20;

#[test]
fn views_equal_postgres_under_steady_writes_in_flat_memory() {
    let seconds = std::env::var("ZERORING_SOAK_SECONDS").ok().and_then(|s| s.parse().ok());
    let length = Duration::from_secs(seconds.unwrap_or(SECONDS));
    let seed: u64 = rand::random();
    println!("seed: {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut db = Database::start(DDL, TABLES);
    let server = Server::start(&db.url(), &[]);
    let mut clients = Clients::start();
    let queries = queries();
    clients.open("a", &server.url(), "s", &schema());
    watch_all(&mut clients, "a", &queries);
    expect_all(&mut clients, "a", &queries, &mut db);
    let (begin, mut checks, mut warm_bytes) = (Instant::now(), 0u64, None);
    while begin.elapsed() < length {
        for _ in 0..WRITES_PER_CHECK {
            let at = Instant::now();
            write(&mut db, &mut rng);
            if rng.random_bool(0.02) {
                db.sql.batch_execute(refill()).unwrap();
            }
            std::thread::sleep(PERIOD.saturating_sub(at.elapsed()));
        }
        expect_all(&mut clients, "a", &queries, &mut db);
        checks += 1;
        if begin.elapsed() > length / 5 && warm_bytes.is_none() {
            warm_bytes = Some(server.resident_bytes());
        }
    }
    let (warm, end) = (warm_bytes.unwrap_or_default(), server.resident_bytes());
    println!(
        "{checks} comparisons of {} queries; memory {warm} → {end} bytes; {} stale views",
        queries.len(),
        clients.stale_views
    );
    assert!(end < warm + MAX_GROWTH_BYTES, "memory grew from {warm} to {end} bytes");
}

/// Deletes win over inserts in the mix: bring some rows back.
fn refill() -> &'static str {
    "INSERT INTO comment SELECT 'c' || g, 'i' || (g * 7 % 50), 'text ' || g, g / 4.0
        FROM generate_series(1, 120) g ON CONFLICT DO NOTHING;
     INSERT INTO \"issueLabel\" SELECT DISTINCT 'i' || (g % 40 + 1), 'l' || (g * 3 % 5 + 1)
        FROM generate_series(1, 60) g ON CONFLICT DO NOTHING"
}
