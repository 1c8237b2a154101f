//! Quiet servers, and servers that end (spec: sync-protocol §5.5, §5.8, checklist 33–36; view-
//! syncer-cvr 46, 52).

use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::api::{Api, answer};
use crate::socket::Next;
use crate::support::server::{CVR_IN_POSTGRES, is_original};
use crate::world::{World, again, change, init, items, others, put, put_named};

#[test]
fn a_quiet_server_says_pong_now_and_then() {
    let world = World::new(&[]);
    let mut idle = world.connect("g", "idle").connected();
    let mut active = world.connect("g", "c").init(init(&[put("q", &items())])).connected();
    active.until_got("q");
    for socket in [&mut idle, &mut active] {
        assert_eq!(socket.next(), Next::Frame(json!(["pong", {}])));
    }
}

#[test]
fn pings_are_not_held_up_by_the_app() {
    let api = Api::start();
    let url = api.url();
    let world = World::new(&[("ZERO_QUERY_URL", url.as_str()), ("ZERO_MUTATE_URL", &url)]);
    let mut socket = world.connect("g", "c").init(init(&[])).connected();
    socket.pokes_until(|p| p.cookie.as_str() > "00:02");
    let (go, wait) = std::sync::mpsc::channel::<()>();
    api.answer(move |request| {
        wait.recv().unwrap();
        answer(request, json!({}))
    });
    socket.send(&change(&[put_named("q", "items", json!([]))]));
    assert_eq!(socket.poke().desired["c"], ["+q"]);
    // Ours answers at once, the original says so by itself after a while.
    socket.send(&json!(["ping", {}]));
    assert_eq!(socket.next(), Next::Frame(json!(["pong", {}])));
    go.send(()).unwrap();
    socket.until_got("q");
}

#[test]
fn sigterm_closes_all_groups_plainly() {
    let mut world = World::new(&[]);
    let mut sockets: Vec<_> = (0..6)
        .map(|i| {
            let name = format!("g{i}");
            let mut socket =
                world.connect(&name, &name).init(init(&[put("q", &items())])).connected();
            socket.until_got("q");
            socket
        })
        .collect();
    let cookie = sockets[0].cookie.clone().unwrap();
    let readers = thread::spawn(move || {
        for socket in &mut sockets {
            socket.closes_plainly();
        }
    });
    assert_eq!(world.server.terminate(), Some(0));
    readers.join().unwrap();
    // Everything that was said was kept.
    world.server.launch();
    let mut socket = world.connect("g0", "g0").cookie(&cookie).init(again(&[])).connected();
    let poke = socket.poke();
    assert!(poke.rows.is_empty() && poke.got.is_empty(), "{poke:?}");
    world.sql("UPDATE item SET n = 33 WHERE id = 'i3'");
    assert_eq!(socket.poke().puts("item"), [json!({"id": "i3", "n": 33, "label": "label 3"})]);
}

/// The moment between metadata and rows is made to last: whoever writes rows needs `rowsVersion`.
#[test]
fn sigterm_waits_for_the_rows_that_are_owed() {
    if is_original() {
        // 1.9.0 closes its groups one after the other, in an order of its own.
        return;
    }
    let mut world = World::new(&[CVR_IN_POSTGRES]);
    let mut socket = world.connect("g", "c").init(init(&[put("q", &items())])).connected();
    socket.until_got("q");
    let mut other = world.connect("h", "h").init(init(&[put("q", &others())])).connected();
    other.until_got("q");
    let mut hold = postgres::Client::connect(&world.db.url(), postgres::NoTls).unwrap();
    let lock = r#"BEGIN; SELECT FROM "zero_0/cvr"."rowsVersion" WHERE "clientGroupID" = 'g'
        FOR UPDATE"#;
    hold.batch_execute(lock).unwrap();
    world.sql("INSERT INTO item SELECT 'r' || g, g, NULL FROM generate_series(1, 150) g");
    assert_eq!(socket.poke().puts("item").len(), 150);
    let cookie = socket.cookie.clone().unwrap();
    world.server.ask_to_terminate();
    other.closes_plainly();
    // It would be gone long before this is over.
    thread::sleep(Duration::from_secs(1));
    assert!(!world.server.whole_log().contains("exiting with code"));
    let mut versions = || -> (String, String, i64) {
        let sql = r#"SELECT i."version", v."version", (SELECT count(*) FROM "zero_0/cvr"."rows" r
                WHERE r."clientGroupID" = 'g' AND r."table" = 'item')
            FROM "zero_0/cvr"."instances" i JOIN "zero_0/cvr"."rowsVersion" v
                USING ("clientGroupID") WHERE i."clientGroupID" = 'g'"#;
        let row = world.db.sql.query_one(sql, &[]).unwrap();
        (row.get(0), row.get(1), row.get(2))
    };
    let (metadata, rows, count) = versions();
    assert!(metadata == cookie && rows < metadata && count == 3, "{metadata} {rows} {count}");
    hold.batch_execute("COMMIT").unwrap();
    socket.closes_plainly();
    assert_eq!(world.server.terminated(), Some(0));
    assert_eq!(versions(), (cookie.clone(), cookie.clone(), 153));
    world.server.launch();
    let mut socket = world.connect("g", "c").cookie(&cookie).init(again(&[])).connected();
    assert!(socket.poke().is_empty());
}

#[test]
fn permissions_take_effect_at_once() {
    let mut world = World::new(&[]);
    let mut socket =
        world.connect("g", "c").init(init(&[put("q", &items()), put("r", &others())])).connected();
    socket.pokes_until(|p| p.got.len() == 2);
    // Only `other` may be read from now on.
    world.sql(
        "UPDATE zero.permissions SET permissions = permissions #- '{tables,item}', hash = 'x'",
    );
    let poke = socket.pokes_until(|p| !p.rows.is_empty());
    assert_eq!(poke.dels("item").len(), 3);
    assert_eq!(poke.rows.len(), 3);
    assert!(poke.got.is_empty(), "both are still got: {poke:?}");
    world.sql("UPDATE other SET v = 'still'");
    assert_eq!(socket.poke().puts("other"), [json!({"a": 1, "b": "x", "v": "still"})]);
}

#[test]
fn truncation_is_one_poke_of_deletions() {
    let mut world = World::new(&[]);
    let mut socket =
        world.connect("g", "c").init(init(&[put("q", &items()), put("r", &others())])).connected();
    socket.pokes_until(|p| p.got.len() == 2);
    world.sql("BEGIN; TRUNCATE item; INSERT INTO item VALUES ('i1', 1, 'label 1'), ('z', 0, NULL); COMMIT");
    let poke = socket.poke();
    let mut dels: Vec<String> = poke.dels("item").iter().map(|id| id["id"].to_string()).collect();
    dels.sort();
    assert_eq!(dels, ["\"i2\"", "\"i3\""]);
    assert!(poke.puts("item").contains(&json!({"id": "z", "n": 0, "label": null})));
    assert!(poke.puts("other").is_empty() && poke.got.is_empty());
}
