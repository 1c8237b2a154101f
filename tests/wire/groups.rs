//! Several clients in a group, and several groups (spec: sync-protocol §5.4, checklist 25, 32;
//! view-syncer-cvr 43, 50, 58, 60).

use serde_json::json;

use crate::socket::Next;
use crate::support::server::is_original;
use crate::world::{DDL, World, again, change, del, init, items, items_from, others, put};

#[test]
fn two_tabs_see_each_others_queries_and_each_row_once() {
    let mut world = World::new(&[]);
    let mut a = world.connect("g", "a").init(init(&[put("q", &items())])).connected();
    a.until_got("q");
    let before = a.cookie.clone().unwrap();
    let mut b = world.connect("g", "b").init(init(&[put("r", &items_from(2))])).connected();
    let late = b.until_got("r");
    // The late one gets everything, each row once, and the other's desires.
    assert_eq!(late.desired["a"], ["+q"]);
    assert_eq!(late.desired["b"], ["+r"]);
    let mut got = late.got.clone();
    got.sort();
    assert_eq!(got, ["+q", "+r"]);
    assert_eq!(late.puts("item").len(), 3);
    // The other one learns of the query, and gets no row again.
    let seen = a.until_got("r");
    assert_eq!(seen.base, Some(before));
    assert_eq!(seen.desired.len(), 1);
    assert_eq!(seen.desired["b"], ["+r"]);
    assert_eq!(seen.rows, [] as [serde_json::Value; 0]);
    assert_eq!(a.cookie, b.cookie);
    // From now on both get the same.
    world.sql("INSERT INTO item VALUES ('i9', 9, NULL)");
    let (to_a, to_b) = (a.poke(), b.poke());
    assert_eq!(to_a, to_b);
    assert_eq!(to_a.puts("item"), [json!({"id": "i9", "n": 9, "label": null})]);
    // A row leaves one query and stays in the other: nothing is deleted.
    world.sql("UPDATE item SET n = 0 WHERE id = 'i9'");
    assert_eq!(a.poke().puts("item"), [json!({"id": "i9", "n": 0, "label": null})]);
    b.poke();
    b.send(&change(&[del("r")]));
    assert_eq!(a.poke().desired["b"], ["-r"]);
    // One that comes back gets what it missed.
    let cookie = b.cookie.clone().unwrap();
    b.close();
    world.sql("DELETE FROM item WHERE id = 'i9'; UPDATE item SET label = 'x' WHERE id = 'i1'");
    let poke = a.poke();
    assert_eq!(poke.dels("item"), [json!({"id": "i9"})]);
    let mut b = world.connect("g", "b").cookie(&cookie).init(again(&[])).connected();
    let missed = b.pokes_until(|p| p.cookie == poke.cookie);
    assert_eq!(missed.desired["b"], ["-r"]);
    assert_eq!(missed.puts("item"), [json!({"id": "i1", "n": 1, "label": "x"})]);
    assert_eq!(missed.dels("item"), [json!({"id": "i9"})]);
}

#[test]
fn a_new_socket_of_a_client_replaces_the_old_one() {
    let world = World::new(&[]);
    let mut old = world.connect("g", "c").init(init(&[put("q", &items())])).connected();
    old.until_got("q");
    let cookie = old.cookie.clone().unwrap();
    // Another user does not.
    let mut stranger = world.connect("g", "c").param("userID", "u2").open();
    let text = "Client groups are pinned to a single userID. Connection userID does not match \
                existing client group userID.";
    let error = stranger.error_frame();
    assert_eq!((&error["kind"], &error["message"]), (&json!("Unauthorized"), &json!(text)));
    assert_eq!(stranger.next(), Next::Closed(Some(3000), text.to_owned()));
    assert_eq!(old.ping().len(), 0);
    let mut new = world.connect("g", "c").param("wsid", "ws-2").cookie(&cookie).open();
    assert_eq!(new.frame()[1]["wsid"], "ws-2");
    old.closes_plainly();
    new.send(&json!(["initConnection", again(&[])]));
    assert!(new.poke().is_empty());
    // A socket that was never initialised is replaced too; another group's client of that name
    // is another client.
    let _ = world.connect("g2", "d").connected();
    let mut third = world.connect("g", "c").cookie(&cookie).init(again(&[])).connected();
    assert!(third.poke().is_empty());
    new.closes_plainly();
}

#[test]
fn deleted_clients_are_confirmed_to_everybody() {
    let world = World::new(&[]);
    let mut a = world.connect("g", "a").init(init(&[put("q", &items())])).connected();
    a.until_got("q");
    let mut b = world.connect("g", "b").init(init(&[put("r", &others())])).connected();
    b.until_got("r");
    a.until_got("r");
    b.close();
    // One that is known, one that is not.
    a.send(&json!(["deleteClients", {"clientIDs": ["b", "never"]}]));
    let poke = a.poke();
    assert_eq!(poke.desired["b"], ["-r"]);
    let ack = a.take_aside("deleteClients");
    assert_eq!(ack, json!(["deleteClients", {"clientIDs": ["b", "never"]}]));
    // Unknown ones are confirmed without a poke.
    a.send(&json!(["deleteClients", {"clientIDs": ["ghost"], "clientGroupIDs": ["x"]}]));
    assert_eq!(a.frame(), json!(["deleteClients", {"clientIDs": ["ghost"]}]));
    a.send(&json!(["deleteClients", {"clientIDs": []}]));
    a.send(&json!(["deleteClients", {}]));
    // By a client that joins.
    let body = json!({"desiredQueriesPatch": [], "clientSchema": crate::world::schema(),
        "deleted": {"clientIDs": ["x"], "clientGroupIDs": ["y"]}});
    let mut c = world.connect("g", "c").init(body).connected();
    c.poke();
    let ack = json!(["deleteClients", {"clientIDs": ["x"]}]);
    assert_eq!(c.take_aside("deleteClients"), ack);
    a.catch_up_with(&c);
    assert_eq!(a.take_aside("deleteClients"), ack);
    // Not itself.
    let body = json!({"desiredQueriesPatch": [put("s", &items())],
        "deleted": {"clientIDs": ["d"]}});
    let mut d = world.connect("g", "d").init(body).connected();
    d.fails("Internal", "cannot delete self");
    // What failed left no trace.
    a.send(&change(&[put("t", &items())]));
    let poke = a.until_got("t");
    assert_eq!(poke.desired.keys().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn clients_that_are_not_active_any_more_are_deleted() {
    let world = World::new(&[]);
    let join = |client: &str, query: &str, active: &[&str]| {
        let mut body = init(&[put(query, &items())]);
        body["activeClients"] = json!(active);
        world.connect("g", client).init(body).connected()
    };
    let mut a = join("a", "qa", &["a"]);
    a.until_got("qa");
    let mut b = join("b", "qb", &["a", "b"]);
    b.until_got("qb");
    b.close();
    let mut c = join("c", "qc", &["a", "c"]);
    let poke = c.until_got("qc");
    // Its queries are inactivated, and nobody asked for an acknowledgement.
    assert_eq!(poke.desired["b"], ["-qb"]);
    assert_eq!(c.aside, [] as [serde_json::Value; 0]);
    let poke = a.until_got("qc");
    assert_eq!(poke.desired["b"], ["+qb", "-qb"]);
}

#[test]
fn groups_of_all_executors_follow_the_same_commits() {
    let mut world = World::new(&[("ZERO_NUM_SYNC_WORKERS", "2")]);
    let join =
        |name: String| world.connect(&name, &name).init(init(&[put("q", &items())])).connected();
    let mut sockets: Vec<_> = (0..12).map(|i| join(format!("group-{i}"))).collect();
    for socket in &mut sockets {
        assert_eq!(socket.until_got("q").puts("item").len(), 3);
    }
    world.sql("UPDATE item SET n = 100 WHERE id = 'i1'");
    for socket in &mut sockets {
        assert_eq!(socket.poke().puts("item"), [json!({"id": "i1", "n": 100, "label": "label 1"})]);
    }
    let cookies: std::collections::BTreeSet<_> = sockets.iter().map(|s| s.cookie.clone()).collect();
    assert_eq!(cookies.len(), 1, "one commit is one version: {cookies:?}");
}

#[test]
fn a_tab_that_does_not_read_holds_up_nobody() {
    if is_original() {
        // 1.9.0 waits for the slowest client of a group.
        return;
    }
    // Together more than may usually wait for a socket (16 MiB); one is less than that.
    let large = "UPDATE item SET label = repeat('x', 6000000);";
    let mut world = World::with(&format!("{DDL}{large}"), &["item", "other"], &[]);
    let body = || init(&[put("q", &items()), put("r", &others())]);
    let mut a = world.connect("g", "a").init(body()).connected();
    a.pokes_until(|p| p.got.len() == 2);
    let mut slow = world.connect("g", "slow").init(body()).connected();
    let mut stalled = world.connect("g", "stalled").init(body()).connected();
    while !(a.heard_of("slow") && a.heard_of("stalled")) {
        a.poke();
    }
    // A few small changes behind the first rows are kept.
    for v in ["two", "three"] {
        world.sql(&format!("UPDATE other SET v = '{v}'"));
        assert_eq!(a.poke().puts("other")[0]["v"], v);
    }
    let poke = slow.pokes_until(|p| p.cookie == *a.cookie.as_ref().unwrap());
    assert_eq!((poke.puts("item").len(), poke.puts("other").len()), (3, 3));
    // More than that is not kept: it is sent away, and comes back to where the others are.
    for i in 0..4 {
        world.sql(&format!("UPDATE item SET label = repeat('{i}', 6000000) WHERE id = 'i1'"));
        assert_eq!(a.poke().puts("item").len(), 1);
        slow.poke();
    }
    let mut frames = 0;
    let end = loop {
        match stalled.next() {
            Next::Frame(_) | Next::Binary(_) => frames += 1,
            end => break end,
        }
    };
    assert!(frames < 20, "{frames} frames were kept for it");
    // Unless it did not even read as far as that.
    let reason = "the client does not read fast enough".to_owned();
    assert!(end == Next::Dropped || end == Next::Closed(Some(1013), reason), "{end:?}");
    let cookie = a.cookie.clone().unwrap();
    let mut back = world.connect("g", "stalled").cookie(&cookie).init(again(&[])).connected();
    assert!(back.poke().is_empty());
}
