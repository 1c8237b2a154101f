//! How long queries live that nobody wants any more (spec: sync-protocol §5.4, checklist 57;
//! view-syncer-cvr 27, 28, 30, 32).

use serde_json::{Value, json};

use crate::socket::{Poke, Socket};
use crate::world::{World, change, del, init, items, items_from, others, put, put_ttl};

/// Sends a change and expects that nothing comes of it: the next poke is that of another change.
#[track_caller]
fn nothing_comes_of(socket: &mut Socket, patch: &[Value], marker: &str) {
    socket.send(&change(patch));
    socket.send(&change(&[put_ttl(marker, &others(), 60_000)]));
    let poke = socket.poke();
    assert_eq!(poke.desired["c"], [format!("+{marker}")], "{poke:?}");
    socket.until_got(marker);
}

#[track_caller]
fn desired_only(poke: &Poke, ops: &[&str]) {
    assert_eq!(poke.desired["c"], ops);
    assert!(poke.got.is_empty() && poke.rows.is_empty(), "{poke:?}");
}

#[test]
fn a_put_again_matters_only_with_a_longer_ttl() {
    let world = World::new(&[]);
    let mut socket =
        world.connect("g", "c").init(init(&[put_ttl("q", &items(), 60_000)])).connected();
    socket.until_got("q");
    nothing_comes_of(&mut socket, &[put_ttl("q", &items(), 60_000)], "m1");
    nothing_comes_of(&mut socket, &[put_ttl("q", &items(), 1_000)], "m2");
    // Without one it is five minutes.
    socket.send(&change(&[put("q", &items())]));
    desired_only(&socket.poke(), &["+q"]);
    nothing_comes_of(&mut socket, &[put_ttl("q", &items(), 300_000)], "m3");
    // Ten minutes at most are kept; what asks for more is longer each time.
    for ttl in [600_000, 600_001, 600_001, -1, -1] {
        socket.send(&change(&[put_ttl("q", &items(), ttl)]));
        desired_only(&socket.poke(), &["+q"]);
    }
    nothing_comes_of(&mut socket, &[put_ttl("q", &items(), 600_000)], "m4");
    nothing_comes_of(&mut socket, &[del("unknown")], "m5");
    // The last `del` counts, another one is nothing.
    socket.send(&change(&[del("q")]));
    desired_only(&socket.poke(), &["-q"]);
    nothing_comes_of(&mut socket, &[del("q")], "m6");
    // It is still there: wanted again, it is at once.
    socket.send(&change(&[put_ttl("q", &items(), 1_000)]));
    desired_only(&socket.poke(), &["+q"]);
    nothing_comes_of(&mut socket, &[], "m7");
}

#[test]
fn an_inactive_query_goes_when_its_time_is_over() {
    let mut world = World::new(&[]);
    let body = init(&[put_ttl("all", &items(), 300), put_ttl("some", &items_from(3), 60_000)]);
    let mut socket = world.connect("g", "c").init(body).connected();
    socket.pokes_until(|p| p.got.len() == 2);
    socket.send(&change(&[del("all")]));
    desired_only(&socket.poke(), &["-all"]);
    // The rows that another query holds stay.
    let gone = socket.poke();
    assert_eq!((&gone.got[..], gone.desired.len()), (&["-all".to_owned()][..], 0));
    let mut ids = gone.dels("item");
    ids.sort_by_key(Value::to_string);
    assert_eq!(ids, [json!({"id": "i1"}), json!({"id": "i2"})]);
    assert!(gone.puts("item").is_empty());
    // A change of what is gone is not told any more.
    world.sql("UPDATE item SET label = 'unseen' WHERE id = 'i1'");
    world.sql("UPDATE item SET label = 'seen' WHERE id = 'i3'");
    assert_eq!(socket.poke().puts("item"), [json!({"id": "i3", "n": 3, "label": "seen"})]);
    // Wanted again, it comes anew.
    socket.send(&change(&[put_ttl("all", &items(), 0)]));
    let poke = socket.until_got("all");
    assert_eq!(poke.desired["c"], ["+all"]);
    let mut puts = poke.puts("item");
    puts.sort_by_key(|row| row["id"].to_string());
    assert_eq!(puts[0], json!({"id": "i1", "n": 1, "label": "unseen"}));
    assert_eq!(puts.len(), 2, "one of the three is there: {puts:?}");
    // Without a ttl it goes with the message.
    socket.send(&change(&[del("all")]));
    let poke = socket.pokes_until(|p| !p.got.is_empty());
    assert_eq!(
        (&poke.desired["c"][..], &poke.got[..]),
        (&["-all".to_owned()][..], &["-all".to_owned()][..])
    );
    assert_eq!(poke.dels("item").len(), 2);
    // `clear` waits for nothing either.
    socket.send(&change(&[json!({"op": "clear"})]));
    let poke = socket.pokes_until(|p| !p.got.is_empty());
    assert_eq!(
        (&poke.desired["c"][..], &poke.got[..]),
        (&["-some".to_owned()][..], &["-some".to_owned()][..])
    );
    assert_eq!(poke.dels("item"), [json!({"id": "i3"})]);
}

#[test]
fn a_query_lives_as_long_as_one_client_wants_it() {
    let world = World::new(&[]);
    let join = |client: &str, ttl| {
        world.connect("g", client).init(init(&[put_ttl("q", &items(), ttl)])).connected()
    };
    let mut a = join("a", 0);
    a.until_got("q");
    let mut b = join("b", 60_000);
    b.until_got("q");
    a.catch_up_with(&b);
    // It has a longer life with the other one.
    a.send(&change(&[del("q")]));
    let poke = a.poke();
    assert_eq!((&poke.desired["a"][..], poke.got.len()), (&["-q".to_owned()][..], 0));
    b.poke();
    b.send(&change(&[del("q")]));
    let poke = a.poke();
    assert_eq!((&poke.desired["b"][..], poke.got.len()), (&["-q".to_owned()][..], 0));
    b.poke();
    // The other one gives up at once.
    b.send(&change(&[put_ttl("q", &items(), 60_000), json!({"op": "clear"})]));
    let poke = a.pokes_until(|p| !p.got.is_empty());
    assert_eq!((&poke.got[..], poke.dels("item").len()), (&["-q".to_owned()][..], 3));
}
