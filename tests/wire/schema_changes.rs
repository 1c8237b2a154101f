//! Tables change under the clients' feet: they get the difference, or are told what does not fit
//! any more (spec: view-syncer-cvr §5.5, checklist 45, 46).

use serde_json::json;

use crate::socket::{Next, Socket};
use crate::support::server::is_original;
use crate::world::{World, again, items, others, put, schema};

/// The original changes its replica in place; ours makes a new one and closes all sockets plainly.
fn comes_back(world: &World, socket: Socket, group: &str) -> Socket {
    if is_original() {
        return socket;
    }
    let mut socket = socket;
    loop {
        match socket.next() {
            Next::Frame(frame) => assert_eq!(frame[0], "pong", "{frame}"),
            end => {
                assert_eq!(end, Next::Closed(None, String::new()));
                break;
            }
        }
    }
    let cookie = socket.cookie.unwrap();
    world.connect(group, group).cookie(&cookie).init(again(&[])).connected()
}

#[test]
fn clients_get_what_a_changed_table_differs_by_or_are_told_what_does_not_fit() {
    let mut world = World::new(&[]);
    let join = |group: &str, schema| {
        let patch = [put("q", &items()), put("r", &others())];
        let body = json!({"desiredQueriesPatch": patch, "clientSchema": schema});
        let mut socket = world.connect(group, group).init(body).connected();
        socket.pokes_until(|p| p.got.len() == 2);
        socket
    };
    let mut without_label = schema();
    without_label["tables"]["item"]["columns"].as_object_mut().unwrap().remove("label");
    let sockets = [join("all", schema()), join("less", without_label)];

    world.sql("ALTER TABLE item ADD COLUMN extra int DEFAULT 5");
    let [mut all, mut less] = ["all", "less"]
        .into_iter()
        .zip(sockets)
        .map(|(group, socket)| {
            let mut socket = comes_back(&world, socket, group);
            // Nothing is got anew, and nothing is deleted.
            let poke = socket.pokes_until(|p| p.puts("item").len() == 3);
            assert!(poke.puts("item").iter().all(|row| row["extra"] == 5), "{poke:?}");
            assert!(poke.got.is_empty() && poke.dels("item").is_empty(), "{poke:?}");
            socket
        })
        .collect::<Vec<_>>()
        .try_into()
        .unwrap_or_else(|_| panic!("two"));
    world.sql("INSERT INTO item VALUES ('i4', 4, NULL, 6)");
    let row = json!({"id": "i4", "n": 4, "label": null, "extra": 6});
    for socket in [&mut all, &mut less] {
        assert_eq!(
            socket.pokes_until(|p| !p.rows.is_empty()).puts("item")[..],
            std::slice::from_ref(&row)[..]
        );
    }

    world.sql("ALTER TABLE item DROP COLUMN label");
    let mut all = comes_back(&world, all, "all");
    all.fails(
        "SchemaVersionNotSupported",
        "The \"item\".\"label\" column does not exist or is not one of the replicated columns: \
         \"extra\",\"id\",\"n\".",
    );
    let mut less = comes_back(&world, less, "less");
    less.pokes_until(|p| p.puts("item").iter().any(|row| row.get("label").is_none()));
    world.sql("INSERT INTO item VALUES ('i5', 5, 7)");
    let poke = less.pokes_until(|p| p.puts("item").iter().any(|row| row["id"] == "i5"));
    assert_eq!(poke.puts("item").last(), Some(&json!({"id": "i5", "n": 5, "extra": 7})));
}
