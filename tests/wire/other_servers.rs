//! What a server does when others write to the client view records: servers that take a group over,
//! or had it for a while, and the purger (spec: sync-protocol §5.6, §5.7, checklist 36–38; view-
//! syncer-cvr §2.11, checklist 18–20, 25, 63).

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::socket::{Next, Socket};
use crate::support::eventually;
use crate::support::server::{CVR_IN_POSTGRES, is_original};
use crate::world::{World, again, init, items, put};

/// How long a group stays that nobody is connected to.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

fn world(env: &[(&str, &str)]) -> World {
    World::new(&[&[CVR_IN_POSTGRES], env].concat())
}

fn joined(world: &World, group: &str, client: &str) -> Socket {
    let mut socket = world.connect(group, client).init(init(&[put("q", &items())])).connected();
    socket.until_got("q");
    socket
}

/// Version and owner of a group.
fn record(world: &mut World, group: &str) -> (String, String) {
    let sql =
        r#"SELECT "version", "owner" FROM "zero_0/cvr"."instances" WHERE "clientGroupID" = $1"#;
    let row = world.db.sql.query_one(sql, &[&group]).unwrap();
    (row.get(0), row.get(1))
}

/// Another server had the group: it let a client `other` join that wants `q`, too.
fn another_server_had(world: &mut World, group: &str) -> String {
    let (version, _) = record(world, group);
    let version = format!("{}:0z", version.split(':').next().unwrap());
    world.sql(&format!(
        r#"BEGIN;
        UPDATE "zero_0/cvr"."instances" SET "version" = '{version}', "owner" = 'elsewhere',
            "grantedAt" = now() WHERE "clientGroupID" = '{group}';
        UPDATE "zero_0/cvr"."rowsVersion" SET "version" = '{version}'
            WHERE "clientGroupID" = '{group}';
        INSERT INTO "zero_0/cvr"."clients" VALUES ('{group}', 'other');
        INSERT INTO "zero_0/cvr"."desires" ("clientGroupID", "clientID", "queryHash",
            "patchVersion", "deleted", "ttl", "ttlMs")
            VALUES ('{group}', 'other', 'q', '{version}', false, '300'::interval, 300000);
        COMMIT"#
    ));
    version
}

/// Another server has the group from a later connection on than any of ours.
fn another_server_has(world: &mut World, group: &str) {
    world.sql(&format!(
        r#"UPDATE "zero_0/cvr"."instances" SET "owner" = 'elsewhere',
            "grantedAt" = now() + interval '1 hour' WHERE "clientGroupID" = '{group}'"#
    ));
}

fn expect_rehome(error: &Value) {
    assert_eq!((&error["kind"], &error["origin"]), (&json!("Rehome"), &json!("zeroCache")));
    assert_eq!(error["maxBackoffMs"], 0);
    let message = error["message"].as_str().unwrap();
    assert!(message.starts_with("CVR ownership was transferred to elsewhere at 2"), "{message}");
    assert!(message.contains("Z (last connect time: 2"), "{message}");
}

#[test]
fn who_joins_a_group_that_was_elsewhere_meanwhile_is_taken_in() {
    let mut world = world(&[]);
    let early = joined(&world, "g", "c");
    let cookie = early.cookie.clone().unwrap();
    early.close();
    // The server still remembers the group.
    let foreign = another_server_had(&mut world, "g");
    let init = init(&[put("q", &items())]);
    let mut late = world.connect("g", "late").init(init.clone()).connected();
    if is_original() {
        // It sends the client away once, without a hint when to come back.
        let error = late.error();
        assert_eq!((&error["kind"], &error["maxBackoffMs"]), (&json!("Rehome"), &Value::Null));
        let text = error["message"].as_str().unwrap();
        assert!(text.starts_with("CVR has been concurrently modified. Expected "), "{text}");
        late = world.connect("g", "late").init(init).connected();
    }
    late.until_got("q");
    assert!(late.aside.is_empty(), "{:?}", late.aside);
    assert!(late.cookie.as_ref().is_some_and(|cookie| *cookie > foreign), "{:?}", late.cookie);
    assert!(late.heard_of("other"), "what happened elsewhere is known");
    let (version, owner) = record(&mut world, "g");
    assert_eq!(Some(version), late.cookie);
    assert_ne!(owner, "elsewhere");
    let mut early = world.connect("g", "c").cookie(&cookie).init(again(&[])).connected();
    early.catch_up_with(&late);
    assert!(early.heard_of("other") && early.heard_of("late"));
    world.sql("INSERT INTO item VALUES ('i4', 4, NULL)");
    for socket in [&mut early, &mut late] {
        assert_eq!(socket.poke().puts("item").len(), 1);
    }
}

#[test]
fn a_group_that_is_elsewhere_sends_its_clients_after_it_and_disturbs_no_other() {
    let mut world = world(&[]);
    let mut sockets: Vec<Socket> =
        ["g", "h", "i"].iter().map(|name| joined(&world, name, name)).collect();
    another_server_has(&mut world, "g");
    // One commit, one flush of all groups.
    world.sql("INSERT INTO item VALUES ('i4', 4, NULL)");
    expect_rehome(&sockets[0].error());
    for socket in &mut sockets[1..] {
        assert_eq!(socket.poke().puts("item").len(), 1);
    }
    // Nothing of it was written, and it is not to be had.
    let (version, owner) = record(&mut world, "g");
    assert_eq!((Some(version), owner.as_str()), (sockets[0].cookie.clone(), "elsewhere"));
    let connect = world.connect("g", "g").cookie(sockets[0].cookie.as_ref().unwrap());
    expect_rehome(&connect.clone().init(again(&[])).connected().error());
    // Given back, it is served where it was left.
    world.sql(r#"UPDATE "zero_0/cvr"."instances" SET "grantedAt" = now() - interval '1 hour'"#);
    let mut socket = connect.init(again(&[])).connected();
    assert_eq!(socket.pokes_until(|p| !p.rows.is_empty()).puts("item").len(), 1);
    for socket in &mut sockets[1..] {
        assert!(socket.ping().iter().all(|frame| frame[0] != "error"));
    }
}

#[test]
fn a_group_that_somebody_holds_keeps_no_other_waiting() {
    let mut world = world(&[]);
    let mut held = joined(&world, "g", "g");
    // On every executor.
    let mut free: Vec<Socket> =
        ["h", "i", "j", "k"].iter().map(|name| joined(&world, name, name)).collect();
    let mut somebody = postgres::Client::connect(&world.db.url(), postgres::NoTls).unwrap();
    let mut holds = somebody.transaction().unwrap();
    let lock = r#"SELECT 1 FROM "zero_0/cvr"."instances" WHERE "clientGroupID" = 'g' FOR UPDATE"#;
    holds.execute(lock, &[]).unwrap();
    for n in 4..8 {
        world.sql(&format!("INSERT INTO item VALUES ('i{n}', {n}, NULL)"));
        for socket in &mut free {
            assert_eq!(socket.poke().puts("item").len(), 1);
        }
    }
    assert!(held.ping().is_empty(), "nothing that is not durable is told");
    holds.rollback().unwrap();
    held.pokes_until(|p| p.puts("item").len() == 4);
}

#[test]
fn clients_of_a_group_that_was_purged_start_anew() {
    let often = [("ZERO_CVR_GARBAGE_COLLECTION_INITIAL_INTERVAL_SECONDS", "1")];
    let mut world = world(&often);
    let mut stays = joined(&world, "stays", "stays");
    let gone = joined(&world, "gone", "gone");
    let cookie = gone.cookie.clone().unwrap();
    gone.close();
    let age = r#"UPDATE "zero_0/cvr"."instances" SET "lastActive" = now() - interval '3 days'
        WHERE "clientGroupID" = 'gone'"#;
    let is_purged =
        r#"SELECT "deleted" FROM "zero_0/cvr"."instances" WHERE "clientGroupID" = 'gone'"#;
    eventually("the group is purged", || {
        // Its end here may still say that it lives.
        world.sql(age);
        let purged: bool = world.db.sql.query_one(is_purged, &[]).unwrap().get(0);
        if purged { Ok(()) } else { Err("not yet".to_owned()) }
    });
    world.sql("INSERT INTO item VALUES ('i4', 4, NULL)");
    assert_eq!(stays.poke().puts("item").len(), 1);
    // The server may remember it for a moment.
    eventually("the client is told", || {
        let connect = world.connect("gone", "gone").cookie(&cookie);
        let mut socket = connect.init(again(&[])).connected();
        let frame = socket.frame();
        if frame[0] == "pokeStart" {
            socket.close();
            std::thread::sleep(KEEP_ALIVE);
            return Err("remembered".to_owned());
        }
        assert_eq!(frame[1]["kind"], "ClientNotFound", "{frame}");
        assert_eq!(frame[1]["message"], "Client has been purged due to inactivity");
        assert_eq!(socket.next(), Next::Closed(None, String::new()));
        Ok(())
    });
    // Not even as a new one: the tombstone stays.
    eventually("the tombstone stays", || {
        let error = world.connect("gone", "d").init(init(&[])).connected().error();
        if is_original() && error["message"] == "Reconnect required" {
            return Err("the group has not quite ended".to_owned());
        }
        assert_eq!(error["kind"], "ClientNotFound", "{error}");
        assert_eq!(error["message"], "Client has been purged due to inactivity");
        Ok(())
    });
    joined(&world, "new", "new");
}

#[test]
fn a_group_outlives_its_last_client_by_five_seconds() {
    let world = world(&[]);
    let mine = joined(&world, "g", "c");
    let since = Instant::now();
    mine.close();
    // As long as it is there it belongs to one user.
    let other = world.connect("g", "d").param("userID", "u2");
    // Of the original everybody who asks extends its life.
    let pause = if is_original() { KEEP_ALIVE * 2 } else { KEEP_ALIVE / 20 };
    eventually("the group ends", || {
        let mut socket = other.open();
        let frame = socket.frame();
        if frame[0] == "connected" {
            return Ok(());
        }
        assert_eq!(frame[1]["kind"], "Unauthorized", "{frame}");
        std::thread::sleep(pause);
        Err("it belongs to another user".to_owned())
    });
    let lived = since.elapsed();
    assert!(lived >= KEEP_ALIVE, "{lived:?}");
}
