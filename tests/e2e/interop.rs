//! An original 1.9.0 and we on one upstream database and one database of client view records:
//! groups go from one to the other and back, under writes, with real clients. Nobody is reset, every
//! view is what Postgres says, and the tables stay the original's.
//!
//! `ZERORING_FUZZ_SEED` repeats a run (but not the order of events between processes),
//! `ZERORING_MOVES` makes it longer.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::crash::write;
use crate::hydrate::{DDL, TABLES, expect_all, queries, schema, watch_all};
use crate::support::client::Clients;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::support::server::{CVR_IN_POSTGRES, Kind, Server};

/// So many of the queries have no EXISTS.
const PLAIN: usize = 11;
/// Moves of all groups in a run.
const MOVES: u64 = 4;

/// What clients say when they lose what they had, or when a server breaks the protocol.
const RESETS: [&str; 6] = [
    "ClientNotFound",
    "base cookie",
    "BaseCookie",
    "SchemaVersionNotSupported",
    "InvalidConnectionRequest",
    "Internal",
];

/// With this the original ends a group for good whose only client is just coming back: a version
/// that its queries wait for is there, and nobody's credentials are checked yet. (Loads of reconnects
/// show it: see the reconnect scenarios of `docs/benchmarks`.) We wait for the client.
const ORIGINALS_REFUSAL: &str = "No validated connection is available";

/// Everything of a schema that a dump would show, from the catalogs: as the store's own tests ask.
const DESCRIBE: &str = include_str!("../../storage/tests/cvr_store/postgres/catalog.sql");

/// What the CVR schema says of its version.
const VERSIONS: &str = r#"
SELECT 'versions ' || "dataVersion" || ' ' || "schemaVersion" || ' ' || "minSafeVersion"
FROM "zero_0/cvr"."versionHistory""#;

fn describe(db: &mut Database) -> Vec<String> {
    let catalog = DESCRIBE.replace("NAME", "\"zero_0/cvr\"");
    let mut ask = |sql: &str| db.sql.query(sql, &[]).unwrap();
    let rows = [ask(&catalog), ask(VERSIONS)].concat();
    let lines: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert!(lines.len() > 50, "{lines:?}");
    assert!(lines.contains(&"versions 17 17 1".to_owned()), "{lines:?}");
    lines
}

/// An original with a change log of its own, so that it can run next to another server.
pub fn original(db: &mut Database, change_db: &str) -> Server {
    db.sql.batch_execute(&format!("CREATE DATABASE {change_db}")).unwrap();
    let change_db = db.server.url(change_db);
    let env = [("ZERO_CHANGE_DB", change_db.as_str()), ("ZERO_LOG_FORMAT", "json")];
    Server::start_as(Kind::Original, &db.url(), &env)
}

pub fn ours(db: &Database) -> Server {
    Server::start_as(Kind::Ours, &db.url(), &[CVR_IN_POSTGRES, ("ZERO_LOG_FORMAT", "json")])
}

/// The replica versions that upstream knows, the newest last.
fn replica_versions(db: &mut Database) -> Vec<String> {
    let rows = db.sql.query("SELECT version FROM zero_0.replicas ORDER BY rank", &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Two replicas of one database have two versions, and a group cannot return to the older one. In
/// a fleet all servers have copies of one replica; this makes ours look like a copy of `version`.
fn pretend_to_be_a_copy(ours: &mut Server, db: &mut Database, version: &str) {
    assert_eq!(ours.terminate(), Some(0));
    let own = replica_versions(db).pop().unwrap();
    assert!(*own > *version);
    let replica = rusqlite::Connection::open(ours.path("replica.db")).unwrap();
    let config = "UPDATE \"_zero.replicationConfig\" SET replicaVersion = ?1";
    assert_eq!(replica.execute(config, [version]).unwrap(), 1);
    for table in TABLES {
        let rows = format!("UPDATE \"{table}\" SET _0_version = ?1 WHERE _0_version = ?2");
        assert!(replica.execute(&rows, [version, &own]).unwrap() > 0);
    }
    let known = "UPDATE zero_0.replicas SET version = $1 WHERE version = $2";
    assert_eq!(db.sql.execute(known, &[&version, &own]).unwrap(), 1);
    ours.launch();
}

/// A client and what it watches.
type Watching = (&'static str, Vec<Value>);

fn expect_everybody(clients: &mut Clients, watching: &[Watching], db: &mut Database) {
    for (client, queries) in watching {
        expect_all(clients, client, queries, db);
    }
}

pub fn expect_no_reset(clients: &Clients) {
    let forgiven = |c: &str| clients.forgives.is_some_and(|text| c.contains(text));
    let is_reset = |c: &&String| RESETS.iter().any(|r| c.contains(r)) && !forgiven(c);
    let resets: Vec<&String> = clients.complaints.iter().filter(is_reset).collect();
    assert!(resets.is_empty(), "a client was reset: {resets:#?}");
    assert!(clients.lost.is_empty(), "clients started anew: {:?}", clients.lost);
}

/// There are so many groups, and no rows of theirs are owed: a server that is killed now loses none.
pub fn expect_rows_written(db: &mut Database, groups: i64) {
    let behind = r#"SELECT count(*) FILTER (WHERE v."version" = i."version"), count(*)
        FROM "zero_0/cvr"."instances" i LEFT JOIN "zero_0/cvr"."rowsVersion" v
        USING ("clientGroupID")"#;
    eventually("rows and metadata are of one version", || {
        let row = db.sql.query_one(behind, &[]).unwrap();
        let counts: (i64, i64) = (row.get(0), row.get(1));
        if counts == (groups, groups) { Ok(()) } else { Err(format!("{counts:?}")) }
    });
}

/// What the records say is what is there: metadata and rows of one version, live rows that exist,
/// and tombstones for the others.
pub fn expect_sound_records(db: &mut Database, groups: i64) {
    expect_rows_written(db, groups);
    let live = TABLES.iter().map(|table| {
        let key = match *table {
            "issueLabel" => {
                r#"t."issueId" = r."rowKey"->>'issueId' AND t."labelId" = r."rowKey"->>'labelId'"#
            }
            _ => r#"t.id = r."rowKey"->>'id'"#,
        };
        format!(
            r#"SELECT r."clientGroupID", r."table", r."rowKey"::text, r."refCounts"::text
               FROM "zero_0/cvr"."rows" r WHERE r."table" = '{table}' AND r."refCounts" IS NOT NULL
               AND NOT EXISTS (SELECT FROM "{table}" t WHERE {key})"#
        )
    });
    let live: Vec<String> = live.collect();
    eventually("live records are of rows that exist", || {
        for sql in &live {
            if let Some(row) = db.sql.query(sql, &[]).unwrap().first() {
                let columns: Vec<String> = (0..4).map(|c| row.get(c)).collect();
                return Err(format!("{columns:?}"));
            }
        }
        Ok(())
    });
}

/// The lines of a server's log that are objects.
fn log(server: &Server) -> Vec<Value> {
    server.whole_log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// No server found fault with what it read or was told.
fn expect_no_errors(server: &Server) {
    let log = log(server);
    assert!(log.len() > 5, "not a log: {log:?}");
    let serving = |l: &&Value| l["worker"] == "syncer" || l["worker"] == "reaper";
    let errors: Vec<&Value> =
        log.iter().filter(serving).filter(|l| l["level"] == "ERROR").collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

/// The original judges a cookie by what it has in memory, and keeps that for seconds after the
/// last client left: one that comes back in between is sent away for good. So nobody may come back
/// to it before it has noticed, by a write that all groups are affected by, that they are gone.
fn wait_until_it_let_go(original: &Server, db: &mut Database) {
    db.sql.batch_execute("UPDATE issue SET title = title || ','").unwrap();
    eventually("the original lets go of its groups", || {
        let log = log(original);
        let of_groups = || log.iter().filter(|l| l["instance"].is_string());
        let ended: BTreeSet<&str> = of_groups()
            .filter(|l| l["message"].as_str().is_some_and(|m| m.ends_with(" finished")))
            .filter_map(|l| l["instance"].as_str())
            .collect();
        let running: BTreeSet<&str> = of_groups()
            .filter_map(|l| l["instance"].as_str())
            .filter(|instance| !ended.contains(instance))
            .collect();
        if running.is_empty() { Ok(()) } else { Err(format!("{running:?} of {}", ended.len())) }
    });
}

/// A group goes to the original at a version that both servers have. It compares what we wrote with
/// what it would have written: hashes of queries, and signatures of their rows. (Of EXISTS it keeps
/// other witnesses than we do, so this is a group without.)
fn expect_accepted_as_written(original: &Server, db: &mut Database, move_to_it: impl FnOnce()) {
    let group: String = db
        .sql
        .query_one(
            "SELECT \"clientGroupID\" FROM \"zero_0/cvr\".\"desires\" GROUP BY 1 \
             HAVING count(DISTINCT \"queryHash\") = $1",
            &[&(PLAIN as i64)],
        )
        .unwrap()
        .get(0);
    let before = log(original).len();
    move_to_it();
    let said = eventually("the original compares", || {
        let lines = log(original).split_off(before);
        let of_group = lines.into_iter().filter(|l| l["clientGroupID"] == *group);
        let said: Vec<String> =
            of_group.filter_map(|l| l["message"].as_str().map(str::to_owned)).collect();
        let compared = said.iter().any(|m| m.starts_with("syncQueryPipelineSet: "));
        if compared { Ok(said) } else { Err(format!("{said:#?}")) }
    });
    // With the two internal queries. What it does not accept it executes again.
    let queries = PLAIN + 2;
    for accepted in [
        format!(" 0 other hash mismatches, {queries} hydrated"),
        format!("syncQueryPipelineSet: {queries} CVR queries"),
        " 0 to remove, 0 to add".to_owned(),
    ] {
        assert!(said.iter().any(|m| m.contains(&accepted)), "no `{accepted}`: {said:#?}");
    }
    assert!(said.iter().all(|m| !m.contains("drift")), "{said:#?}");
}

pub fn seed() -> StdRng {
    let seed = std::env::var("ZERORING_FUZZ_SEED").ok().and_then(|s| s.parse().ok());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    println!("seed: ZERORING_FUZZ_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

#[test]
fn groups_move_between_an_original_and_us_while_both_run() {
    let moves = std::env::var("ZERORING_MOVES").ok().and_then(|s| s.parse().ok());
    let mut rng = seed();
    let mut db = Database::start(DDL, TABLES);
    let original = original(&mut db, "changes");
    let tables = describe(&mut db);
    let version = replica_versions(&mut db).pop().unwrap();
    let mut ours = ours(&db);
    pretend_to_be_a_copy(&mut ours, &mut db, &version);

    let router = Proxy::start(original.port());
    let url = format!("http://127.0.0.1:{}", router.port);
    let mut clients = Clients::start();
    clients.forgives = Some(ORIGINALS_REFUSAL);
    let all = queries();
    // Two groups of one client, and one of two that want different things.
    let mut watching: Vec<Watching> = vec![
        ("a", all.clone()),
        ("b", all[7..14].to_vec()),
        ("s1", all[..8].to_vec()),
        ("s2", all[8..].to_vec()),
        ("plain", all[..PLAIN].to_vec()),
    ];
    for (client, queries) in &watching {
        clients.open(client, &url, if client.starts_with('s') { "s" } else { client }, &schema());
        watch_all(&mut clients, client, queries);
    }
    expect_everybody(&mut clients, &watching, &mut db);

    for turn in 0..moves.unwrap_or(MOVES) {
        let at_original = turn % 2 == 1;
        if at_original {
            wait_until_it_let_go(&original, &mut db);
        }
        for _ in 0..rng.random_range(0..25) {
            write(&mut db, &mut rng);
        }
        router.route(if at_original { original.port() } else { ours.port() });
        match (at_original, rng.random_range(0..3)) {
            // Ours dies under its groups.
            (true, 0) => {
                // What it owes would be lost.
                expect_rows_written(&mut db, 4);
                ours.kill();
                ours.launch();
            }
            // The others hear of it from the server that they are at: it has lost the group.
            (_, 1) => {
                let late = ["t0", "t1", "t2", "t3", "t4", "t5"][turn as usize % 6];
                if watching.iter().all(|(client, _)| *client != late) {
                    let wanted = all[rng.random_range(0..9)..][..4].to_vec();
                    clients.open(late, &url, "s", &schema());
                    watch_all(&mut clients, late, &wanted);
                    watching.push((late, wanted));
                    expect_everybody(&mut clients, &watching[watching.len() - 1..], &mut db);
                }
                router.cut();
            }
            _ => router.cut(),
        }
        // Some are cut off again, when they are only just there.
        let cut_at = rng.random_range(0..30);
        for write_number in 0..rng.random_range(0..15) {
            write(&mut db, &mut rng);
            // In the middle of a reconnect, a load, a flush.
            std::thread::sleep(Duration::from_millis(rng.random_range(0..20)));
            if write_number == cut_at {
                router.cut();
            }
        }
        // Some moves are over before the last one was finished.
        if turn % 3 < 2 {
            expect_everybody(&mut clients, &watching, &mut db);
        }
    }
    expect_everybody(&mut clients, &watching, &mut db);
    router.route(ours.port());
    router.cut();
    wait_until_it_let_go(&original, &mut db);
    db.sql.batch_execute("UPDATE issue SET title = title || ';'").unwrap();
    expect_everybody(&mut clients, &watching, &mut db);
    expect_accepted_as_written(&original, &mut db, || {
        router.route(original.port());
        router.cut();
    });
    expect_no_reset(&clients);
    let refused = clients.refused.len();
    println!("{refused} times a client was refused");
    assert!(refused == 0 || original.whole_log().contains(ORIGINALS_REFUSAL), "it was us");
    assert!(!ours.whole_log().contains(ORIGINALS_REFUSAL), "we did as well");
    expect_sound_records(&mut db, 4);
    assert_eq!(describe(&mut db), tables, "the tables are the original's");
    expect_no_errors(&original);
    expect_no_errors(&ours);
}

/// The way of an installation: ours first, the original instead of it, and back; each makes a new
/// replica, and the tables are ours.
#[test]
fn an_original_takes_over_from_us_and_gives_back() {
    let mut rng = seed();
    let mut db = Database::start(DDL, TABLES);
    let mut first = ours(&db);
    let tables = describe(&mut db);
    let router = Proxy::start(first.port());
    let url = format!("http://127.0.0.1:{}", router.port);
    let mut clients = Clients::start();
    let all = queries();
    let watching: Vec<Watching> = vec![("a", all[..10].to_vec()), ("b", all[10..].to_vec())];
    for (client, queries) in &watching {
        clients.open(client, &url, "shared", &schema());
        watch_all(&mut clients, client, queries);
    }
    expect_everybody(&mut clients, &watching, &mut db);
    for _ in 0..20 {
        write(&mut db, &mut rng);
    }
    assert_eq!(first.terminate(), Some(0));
    for _ in 0..10 {
        write(&mut db, &mut rng);
    }
    let mut second = original(&mut db, "changes");
    router.route(second.port());
    for _ in 0..10 {
        write(&mut db, &mut rng);
    }
    expect_everybody(&mut clients, &watching, &mut db);
    expect_sound_records(&mut db, 1);
    expect_no_errors(&second);
    let _ = second.terminate();
    for _ in 0..10 {
        write(&mut db, &mut rng);
    }
    // Its replica is older than the original's was: it makes a new one.
    first.launch();
    router.route(first.port());
    expect_everybody(&mut clients, &watching, &mut db);
    expect_no_reset(&clients);
    expect_sound_records(&mut db, 1);
    assert_eq!(describe(&mut db), tables, "the original found nothing to change");
    expect_no_errors(&first);
}
