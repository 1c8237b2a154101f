//! Two servers share groups: whoever's connection is the latest has the group, the other sends its
//! clients away, and nobody loses or doubles a row.

use std::net::SocketAddr;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use zeroring_net::pg::local_server::LocalServer;
use zeroring_net::pg::{Client as Sql, PgConfig};
use zeroring_storage::cvr_store::postgres::PostgresCvrConfig;

use crate::roaming::{Issues, Over, Roamer};
use crate::support::*;

const ROUNDS: i64 = 30;

fn server(postgres: &LocalServer, task: &'static str) -> Server {
    let connection = PgConfig::parse(&postgres.url("postgres")).unwrap();
    let records = PostgresCvrConfig { max_connections: 3, ..PostgresCvrConfig::new(connection) };
    Server::start(&Setup { task, records: Some(records), ..Setup::default() })
}

fn two_servers(postgres: &LocalServer) -> [Server; 2] {
    ["a", "b"].map(|task| server(postgres, task))
}

fn seed() -> StdRng {
    let seed = std::env::var("ZERORING_WIRE_SEED").ok().map(|text| text.parse().unwrap());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    println!("ZERORING_WIRE_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Records and metadata of these groups are of one version, and of every issue there is one.
fn expect_sound_records(postgres: &LocalServer, groups: &[&str], issues: &Issues) {
    let mut sql = Sql::connect(&PgConfig::parse(&postgres.url("postgres")).unwrap()).unwrap();
    let live = r#"SELECT i."clientGroupID", i."version" = v."version", count(r."rowKey")
        FROM "zero_0/cvr"."instances" i JOIN "zero_0/cvr"."rowsVersion" v USING ("clientGroupID")
        LEFT JOIN "zero_0/cvr"."rows" r ON r."clientGroupID" = i."clientGroupID"
          AND r."table" = 'issue' AND r."refCounts" = '{"q": 1}'
        GROUP BY 1, 2 ORDER BY 1"#;
    let rows = sql.simple_query(live).unwrap().remove(0).rows;
    let found: Vec<(String, String, i64)> = rows
        .iter()
        .map(|r| {
            let count: String = r.get(2).unwrap();
            (r.get(0).unwrap(), r.get(1).unwrap(), count.parse().unwrap())
        })
        .collect();
    let count = issues.0.len() as i64;
    let sound = |group: &&str| ((*group).to_owned(), "t".to_owned(), count);
    assert_eq!(found, groups.iter().map(sound).collect::<Vec<_>>());
}

/// Reads until all is there, at another server if it is sent there.
fn converge(roamer: &mut Roamer, addrs: &[SocketAddr; 2], issues: &Issues, rng: &mut StdRng) {
    while let Err(over) = roamer.read_until(|rows| *rows == issues.0) {
        if let Over::Error(kind, message) = &over {
            assert_eq!(kind, "Rehome", "{message}");
        }
        roamer.connect(addrs[rng.random_range(0..2)]);
    }
}

#[test]
fn the_latest_connection_has_the_group_and_the_others_are_sent_after_it() {
    let postgres = LocalServer::start(&["fsync=off"]).unwrap();
    let mut servers = two_servers(&postgres);
    let mut issues = Issues::default();
    issues.commit(&mut servers, "i1", Some(1));
    let (mut c, mut d) = (Roamer::new("g", "c"), Roamer::new("g", "d"));
    c.connect(servers[0].addr);
    c.read_until(|rows| rows.len() == 1).unwrap();
    d.connect(servers[1].addr);
    d.read_until(|rows| rows.len() == 1).unwrap();
    // The first server learns of it when it has something to write.
    issues.commit(&mut servers, "i2", Some(2));
    let over = c.read_until(|rows| rows.len() == 2).unwrap_err();
    let Over::Error(kind, message) = over else { panic!("{over:?}") };
    assert_eq!(kind, "Rehome");
    assert!(message.starts_with("CVR ownership was transferred to b at "), "{message}");
    c.connect(servers[1].addr);
    c.read_until(|rows| *rows == issues.0).unwrap();
    d.read_until(|rows| *rows == issues.0).unwrap();
    // It comes back with a cookie that the first server, which has just had the group, never saw.
    for k in 3..6 {
        issues.commit(&mut servers, &format!("i{k}"), Some(k));
        c.read_until(|rows| *rows == issues.0).unwrap();
    }
    c.connect(servers[0].addr);
    c.poke().unwrap();
    // The store notes who took a group over behind its answer.
    let sql = Sql::connect(&PgConfig::parse(&postgres.url("postgres")).unwrap()).unwrap();
    let sql = std::cell::RefCell::new(sql);
    let owner = r#"SELECT "owner" FROM "zero_0/cvr"."instances" WHERE "clientGroupID" = 'g'"#;
    eventually("the first server has it", || {
        let rows = sql.borrow_mut().simple_query(owner).unwrap().remove(0).rows;
        rows[0].get::<String>(0).unwrap() == "a"
    });
    issues.commit(&mut servers, "i6", Some(6));
    c.read_until(|rows| *rows == issues.0).unwrap();
    assert!(matches!(d.read_until(|_| false), Err(Over::Error(kind, _)) if kind == "Rehome"));
}

/// Clients of two groups go from one server to the other as they like, while both write.
#[test]
fn nobody_loses_a_row_whoever_wins() {
    let mut rng = seed();
    let postgres = LocalServer::start(&["fsync=off"]).unwrap();
    let mut servers = two_servers(&postgres);
    let addrs = [servers[0].addr, servers[1].addr];
    let mut issues = Issues::default();
    let mut roamers: Vec<Roamer> = ["c", "d", "e", "f"]
        .iter()
        .map(|id| Roamer::new(if *id == "f" { "h" } else { "g" }, id))
        .collect();
    for (n, roamer) in roamers.iter_mut().enumerate() {
        roamer.connect(servers[n % 2].addr);
    }
    for round in 0..ROUNDS {
        for k in 0..rng.random_range(1..4) {
            issues.step(&mut servers, round * 5 + k);
        }
        let seeds: Vec<(bool, u64)> =
            roamers.iter().map(|_| (rng.random_bool(0.4), rng.random())).collect();
        std::thread::scope(|scope| {
            for (roamer, (moves, seed)) in roamers.iter_mut().zip(seeds) {
                let issues = &issues;
                let mut rng = StdRng::seed_from_u64(seed);
                scope.spawn(move || {
                    if moves {
                        roamer.connect(addrs[rng.random_range(0..2)]);
                    }
                    converge(roamer, &addrs, issues, &mut rng);
                });
            }
        });
    }
    expect_sound_records(&postgres, &["g", "h"], &issues);
}

/// One server after the other ends, and a new one takes its place, while rows are written and
/// clients go where they like.
#[test]
fn servers_are_replaced_one_by_one_and_nobody_loses_a_row() {
    let mut rng = seed();
    let postgres = LocalServer::start(&["fsync=off"]).unwrap();
    let mut servers = two_servers(&postgres);
    let mut issues = Issues::default();
    let groups = ["g", "h", "i", "j"];
    let mut roamers: Vec<Roamer> =
        (0..6).map(|n| Roamer::new(groups[n % groups.len()], &format!("c{n}"))).collect();
    for (n, roamer) in roamers.iter_mut().enumerate() {
        roamer.connect(servers[n % 2].addr);
        roamer.poke().unwrap();
    }
    let mut k = 0;
    for (round, task) in ["c", "d", "e", "f"].into_iter().enumerate() {
        let (old, stays) = (round % 2, servers[(round + 1) % 2].addr);
        let stopping = servers[old].begin_stop();
        for _ in 0..rng.random_range(5..30) {
            issues.step(&mut servers, k);
            k += 1;
        }
        std::thread::scope(|scope| {
            for (roamer, seed) in roamers.iter_mut().map(|r| (r, rng.random())) {
                let issues = &issues;
                let mut rng = StdRng::seed_from_u64(seed);
                scope.spawn(move || converge(roamer, &[stays, stays], issues, &mut rng));
            }
        });
        assert!(stopping.join().unwrap(), "it ends in time");
        servers[old] = server(&postgres, task);
        issues.replay(&mut servers[old]);
        let addrs = [servers[0].addr, servers[1].addr];
        for roamer in roamers.iter_mut().filter(|_| rng.random_bool(0.5)) {
            roamer.connect(addrs[old]);
        }
        issues.step(&mut servers, k);
        k += 1;
        std::thread::scope(|scope| {
            for (roamer, seed) in roamers.iter_mut().map(|r| (r, rng.random())) {
                let (issues, addrs) = (&issues, &addrs);
                let mut rng = StdRng::seed_from_u64(seed);
                scope.spawn(move || converge(roamer, addrs, issues, &mut rng));
            }
        });
    }
    expect_sound_records(&postgres, &groups, &issues);
}
