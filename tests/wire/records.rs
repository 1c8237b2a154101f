//! What is stored of a group beside its queries, what that takes, and when it is thrown away (spec:
//! view-syncer-cvr §1.7, §2.3, §2.10; checklist 24, 25).

use std::time::Duration;

use crate::socket::{Connect, Socket};
use crate::support::eventually;
use crate::support::server::{CVR_IN_POSTGRES, is_original};
use crate::world::{World, again, init, items, put};

fn joined(connect: &Connect) -> Socket {
    let mut socket = connect.clone().init(init(&[put("q", &items())])).connected();
    socket.until_got("q");
    socket
}

#[test]
fn the_profile_of_a_group_is_that_of_the_client_that_came_last() {
    let mut world = World::new(&[CVR_IN_POSTGRES]);
    let stored = |world: &mut World| -> (Option<String>, String) {
        let sql = r#"SELECT "profileID", "version" FROM "zero_0/cvr"."instances""#;
        let row = world.db.sql.query_one(sql, &[]).unwrap();
        (row.get(0), row.get(1))
    };
    // Without one it is named for the group.
    let mut socket = joined(&world.connect("g", "c").param("profileID", None));
    let (profile, version) = stored(&mut world);
    assert_eq!(profile.as_deref(), Some("cgg"));
    for profile in ["p1", "p1", "p2"] {
        let connect = world.connect("g", "c").param("profileID", profile).cookie(&version);
        socket = connect.init(again(&[])).connected();
        assert!(socket.poke().is_empty());
        let (stored, unchanged) = stored(&mut world);
        assert_eq!((stored.as_deref(), &unchanged), (Some(profile), &version));
    }
    assert!(socket.ping().is_empty());
}

#[test]
fn no_more_connections_than_allowed_serve_the_groups_of_all_executors() {
    const ALLOWED: i64 = 2;
    let env = [CVR_IN_POSTGRES, ("ZERO_CVR_MAX_CONNS", "2"), ("ZERO_NUM_SYNC_WORKERS", "2")];
    let mut world = World::new(&env);
    let mut sockets: Vec<Socket> = (0..10)
        .map(|n| {
            let name = format!("g{n}");
            let connect = world.connect(&name, &name);
            connect.init(init(&[put("q", &items())])).connected()
        })
        .collect();
    let mut most = 0;
    let mut look = |world: &mut World| {
        let sql = "SELECT count(*) FROM pg_stat_activity
            WHERE application_name LIKE 'zero-sync-worker-%-cvr'";
        let open: i64 = world.db.sql.query_one(sql, &[]).unwrap().get(0);
        most = most.max(open);
    };
    for socket in &mut sockets {
        look(&mut world);
        socket.until_got("q");
    }
    for n in 0..4 {
        // More rows than are written at once.
        world.sql(&format!(
            "INSERT INTO item SELECT 'r{n}-' || g, g, NULL FROM generate_series(1, 150) g"
        ));
        for socket in &mut sockets {
            look(&mut world);
            assert_eq!(socket.poke().puts("item").len(), 150);
        }
    }
    assert!((1..=ALLOWED).contains(&most), "{most} connections");
}

/// Inactive after a second, and looked for every second.
const IMPATIENT: [(&str, &str); 2] = [
    ("ZERO_CVR_GARBAGE_COLLECTION_INACTIVITY_THRESHOLD_HOURS", "0.0003"),
    ("ZERO_CVR_GARBAGE_COLLECTION_INITIAL_INTERVAL_SECONDS", "1"),
];

/// The original sends a client away once while it takes leave of its group.
fn is_told_of_the_purge(connect: &Connect) {
    let mut error = connect.connected().error();
    while is_original() && error["message"] == "Reconnect required" {
        error = connect.connected().error();
    }
    let told = (error["kind"].as_str(), error["message"].as_str());
    assert_eq!(told, (Some("ClientNotFound"), Some("Client has been purged due to inactivity")));
}

fn is_purged_from(records: &[(&str, &str)]) {
    let world = World::new(&[records, &IMPATIENT].concat());
    let left = joined(&world.connect("left", "c"));
    let cookie = left.cookie.clone().unwrap();
    left.close();
    // Who is still in memory is told later.
    eventually("the group is gone", || {
        std::thread::sleep(Duration::from_secs(7));
        let connect = world.connect("left", "c").cookie(&cookie).init(again(&[]));
        let mut socket = connect.connected();
        if socket.frame()[0] == "pokeStart" {
            socket.close();
            return Err("remembered".to_owned());
        }
        is_told_of_the_purge(&connect);
        Ok(())
    });
    // A tombstone stays one; another group is as any.
    is_told_of_the_purge(&world.connect("left", "d").init(init(&[])));
    joined(&world.connect("new", "c"));
}

#[test]
fn an_inactive_group_is_purged() {
    is_purged_from(&[]);
}

#[test]
fn an_inactive_group_is_purged_from_postgres() {
    is_purged_from(&[CVR_IN_POSTGRES]);
}

/// As when the clocks of two servers differ by much.
#[test]
fn a_group_that_is_purged_while_it_is_served_sends_its_clients_away_for_good() {
    let mut world = World::new(&[CVR_IN_POSTGRES, IMPATIENT[1]]);
    let mut served = joined(&world.connect("served", "c"));
    let mut other = joined(&world.connect("other", "c"));
    world.sql(
        r#"UPDATE "zero_0/cvr"."instances" SET "lastActive" = now() - interval '3 days'
           WHERE "clientGroupID" = 'served'"#,
    );
    eventually("the group is purged", || {
        let sql = r#"SELECT 1 FROM "zero_0/cvr"."instances" WHERE "deleted""#;
        let found = world.db.sql.query(sql, &[]).unwrap();
        if found.is_empty() { Err("not yet".to_owned()) } else { Ok(()) }
    });
    world.sql("INSERT INTO item VALUES ('i4', 4, NULL)");
    assert_eq!(other.poke().puts("item").len(), 1);
    let error = served.error();
    assert_eq!(error["kind"], "Rehome", "{error}");
    let cookie = served.cookie.clone().unwrap();
    is_told_of_the_purge(&world.connect("served", "c").cookie(&cookie).init(again(&[])));
}
