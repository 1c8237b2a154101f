//! Cookies, and when a client is told that its own is no good (spec: sync-protocol §4.1, §5.3,
//! checklist 16, 17, 19, 30, 31; view-syncer-cvr 39–42).

use serde_json::json;

use crate::world::{World, again, change, del, init, items, others, put, schema};

#[test]
fn a_new_group_goes_from_null_over_its_configuration_to_the_replica() {
    let mut world = World::new(&[]);
    let mut socket = world.connect("g", "c").init(init(&[put("q", &items())])).connected();
    let config = socket.poke();
    assert_eq!((config.base, config.cookie.as_str()), (None, "00:01"));
    assert_eq!(config.id, "00:01");
    assert_eq!(config.desired["c"], ["+q"]);
    assert!(config.got.is_empty() && config.rows.is_empty());
    let first = socket.poke();
    assert_eq!(first.base.as_deref(), Some("00:01"));
    assert_eq!(first.got, ["+q"]);
    assert_eq!(first.puts("item").len(), 3);
    assert_eq!(first.id, first.cookie);
    let state = first.cookie;
    assert!(!state.contains(':'), "{state}");

    // Configuration changes count up from there, each got query included.
    socket.send(&change(&[put("r", &others())]));
    let desired = socket.poke();
    assert_eq!((&desired.desired["c"][..], desired.got.len()), (&["+r".to_owned()][..], 0));
    assert_eq!(desired.cookie, format!("{state}:01"));
    let got = socket.poke();
    assert_eq!((&got.got[..], got.puts("other").len()), (&["+r".to_owned()][..], 1));
    assert_eq!(got.cookie, format!("{state}:02"));
    socket.send(&change(&[del("r")]));
    let deleted = socket.poke();
    assert_eq!(deleted.desired["c"], ["-r"]);
    assert_eq!(deleted.cookie, format!("{state}:03"));

    // A commit starts a new count.
    world.sql("UPDATE item SET n = 7 WHERE id = 'i2'");
    let update = socket.poke();
    assert_eq!(update.puts("item"), [json!({"id": "i2", "n": 7, "label": "label 2"})]);
    assert!(!update.cookie.contains(':') && update.cookie > state);
    // In one poke, with a config version of two digits beyond 36.
    for _ in 0..20 {
        socket.send(&change(&[put("s", &items()), del("s")]));
    }
    let mut last = update.cookie;
    while !last.ends_with(":110") {
        let poke = socket.poke();
        assert!(poke.cookie > last);
        last = poke.cookie;
        socket.send(&change(&[put("t", &items()), del("t")]));
    }
}

#[test]
fn a_client_that_is_current_gets_one_empty_poke() {
    let world = World::new(&[]);
    let mut socket = world.connect("g", "c").init(init(&[put("q", &items())])).connected();
    socket.until_got("q");
    let cookie = socket.cookie.clone().unwrap();
    socket.close();
    let bare = || world.connect("g", "c").cookie(&cookie);
    for by_header in [true, false] {
        let mut socket = if by_header {
            bare().init(again(&[])).connected()
        } else {
            let mut socket = bare().connected();
            socket.send(&json!(["initConnection", again(&[])]));
            socket
        };
        let poke = socket.poke();
        assert!(poke.is_empty());
        assert_eq!((poke.id.as_str(), poke.cookie.as_str()), (&*cookie, &*cookie));
        socket.send(&change(&[put("q", &items())]));
        assert_eq!(socket.ping().len(), 0, "and nothing else");
        socket.close();
    }
}

#[test]
fn header_and_message_lead_to_the_same_pokes() {
    let world = World::new(&[]);
    let body = init(&[put("q", &items()), put("r", &others())]);
    let mut by_header = world.connect("g1", "c1").init(body.clone()).connected();
    let mut by_message = world.connect("g2", "c2").connected();
    by_message.send(&json!(["initConnection", body]));
    let (mut config, same) = (by_header.poke(), by_message.poke());
    let desired = config.desired.remove("c1").unwrap();
    config.desired.insert("c2".to_owned(), desired);
    assert_eq!(config, same);
    assert_eq!(by_header.poke(), by_message.poke());
}

#[test]
fn cookies_that_the_server_does_not_know() {
    let world = World::new(&[]);
    // An unknown group.
    for cookie in ["00:01", "a2gosa7pa2gv"] {
        let mut socket = world.connect("new", "c").cookie(cookie).init(again(&[])).connected();
        socket.fails("ClientNotFound", "Client not found");
    }
    let mut socket = world.connect("g", "c").init(init(&[put("q", &items())])).connected();
    socket.until_got("q");
    let cookie = socket.cookie.clone().unwrap();
    for newer in [format!("{cookie}:01"), "a2gosa7pa2gv".to_owned()] {
        let mut other = world.connect("g", "d").cookie(&newer).init(again(&[])).connected();
        let text = format!("CVR is at version {cookie}");
        other.fails("InvalidConnectionRequestBaseCookie", &text);
    }
    for bad in ["x", "00:", "1", "00:01:02", "zz"] {
        let mut other = world.connect("g", "d").cookie(bad).init(again(&[])).connected();
        let error = other.error();
        assert_eq!(error["kind"], "Internal", "{bad}: {error}");
    }
    // Nobody else noticed.
    assert_eq!(socket.ping().len(), 0);
    let mut other = world.connect("g", "d").cookie(&cookie).init(again(&[])).connected();
    assert!(other.poke().is_empty());
}

#[test]
fn the_first_client_of_a_group_brings_the_schema() {
    let world = World::new(&[]);
    let none = json!({"desiredQueriesPatch": []});
    let mut socket = world.connect("g", "c").init(none.clone()).connected();
    socket.fails(
        "InvalidConnectionRequest",
        "The initConnection message for a new client group must include client schema.",
    );
    let mut first = world.connect("g", "c").init(init(&[])).connected();
    first.poke();
    // The same, whatever the order of its keys; none; another one.
    let reordered = json!({"tables": {"other": schema()["tables"]["other"],
        "item": {"primaryKey": ["id"], "columns": {
            "label": {"type": "string"}, "id": {"type": "string"}, "n": {"type": "number"}}}}});
    let with = |schema| json!({"desiredQueriesPatch": [], "clientSchema": schema});
    for body in [with(reordered), none] {
        world.connect("g", "d").init(body).connected().poke();
    }
    let mut less = schema();
    less["tables"].as_object_mut().unwrap().remove("other");
    world
        .connect("g", "e")
        .init(with(less))
        .connected()
        .fails("InvalidConnectionRequest", "Provided schema does not match previous schema");
    assert_eq!(first.ping().iter().filter(|m| m[0] == "error").count(), 0);
}
