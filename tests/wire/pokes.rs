//! Shape and content of pokes (spec: sync-protocol §4, checklist 16–18, 22, 23, 29, 57).

use serde_json::{Value, json};

use crate::socket::Poke;
use crate::support::server::is_original;
use crate::world::{DDL, World, change, del, init, items, items_from, newest_version, others, put};

#[test]
fn commits_that_touch_nothing_are_not_poked() {
    let mut world = World::new(&[]);
    let mut socket = world.connect("g", "c").init(init(&[put("q", &items_from(2))])).connected();
    let first = socket.until_got("q");
    assert_eq!(first.puts("item").len(), 2);
    // Another table, a row outside, a write that changes nothing for the query, an empty commit.
    world.sql("UPDATE other SET v = 'two'");
    world.sql("UPDATE item SET label = 'zzz' WHERE id = 'i1'");
    world.sql("INSERT INTO item VALUES ('i4', 1, NULL)");
    world.sql("BEGIN; CREATE TEMP TABLE t (a int); COMMIT");
    world.sql("UPDATE item SET n = 3 WHERE id = 'i2'");
    // `poke` checks that the chain of cookies is not broken.
    let poke = socket.poke();
    assert_eq!(
        poke.rows,
        [json!({"op": "put", "tableName": "item",
        "value": {"id": "i2", "n": 3, "label": "label 2"}})]
    );
    assert_eq!((poke.got.len(), poke.desired.len(), poke.lmids.len()), (0, 0, 0));
    assert_eq!(poke.id, poke.cookie);
    // Leaving and entering the query.
    world.sql("UPDATE item SET n = 1 WHERE id = 'i2'");
    assert_eq!(socket.poke().rows, [json!({"op": "del", "tableName": "item", "id": {"id": "i2"}})]);
    world.sql("UPDATE item SET n = 5 WHERE id IN ('i1', 'i4')");
    let mut entered = socket.poke().puts("item");
    entered.sort_by_key(|row| row["id"].to_string());
    assert_eq!(
        entered,
        [json!({"id": "i1", "n": 5, "label": "zzz"}), json!({"id": "i4", "n": 5, "label": null})]
    );
    // A change of the key is a deletion and a new row.
    world.sql("UPDATE item SET id = 'i44' WHERE id = 'i4'");
    let poke = socket.poke();
    assert_eq!(poke.dels("item"), [json!({"id": "i4"})]);
    assert_eq!(poke.puts("item"), [json!({"id": "i44", "n": 5, "label": null})]);
}

#[test]
fn keys_of_deleted_rows_are_those_of_the_client_schema() {
    let mut world = World::with(
        "CREATE TABLE item (id text PRIMARY KEY, n int NOT NULL UNIQUE, extra text);
         CREATE TABLE other (a int, b text, v text, PRIMARY KEY (a, b));
         INSERT INTO item VALUES ('i1', 1, 'x'), ('i2', 2, 'y');
         INSERT INTO other VALUES (1, 'x', 'one'), (2, 'y', 'two');",
        &["item", "other"],
        &[],
    );
    // Another key than the primary one, and not all columns.
    let schema = json!({"tables": {
        "item": {"columns": {"n": {"type": "number"}}, "primaryKey": ["n"]},
        "other": {"columns": {"a": {"type": "number"}, "b": {"type": "string"}},
            "primaryKey": ["b", "a"]},
    }});
    let ast = json!({"table": "item", "orderBy": [["n", "asc"]]});
    let body = json!({"desiredQueriesPatch": [put("q", &ast), put("r", &others())],
        "clientSchema": schema});
    let mut socket = world.connect("g", "c").init(body).connected();
    let poke = socket.pokes_until(|p| p.got.len() == 2);
    // All columns all the same.
    assert_eq!(poke.puts("item")[0], json!({"id": "i1", "n": 1, "extra": "x"}));
    world.sql("DELETE FROM item WHERE id = 'i2'; DELETE FROM other WHERE a = 2");
    let poke = socket.pokes_until(|p| p.rows.len() == 2);
    assert_eq!(poke.dels("item"), [json!({"n": 2})]);
    assert_eq!(poke.dels("other"), [json!({"a": 2, "b": "y"})]);
}

#[test]
fn groups_whose_schemas_name_different_keys_share_nothing_that_depends_on_them() {
    let mut world = World::with(
        "CREATE TABLE item (id text PRIMARY KEY, n int NOT NULL UNIQUE);
         INSERT INTO item VALUES ('i1', 1), ('i2', 2), ('i3', 3);",
        &["item"],
        &[("ZERO_NUM_SYNC_WORKERS", "1")],
    );
    let columns = json!({"id": {"type": "string"}, "n": {"type": "number"}});
    let ast = json!({"table": "item", "orderBy": [["id", "asc"], ["n", "asc"]]});
    let mut sockets = ["id", "n"].map(|key| {
        let schema = json!({"tables": {"item": {"columns": columns, "primaryKey": [key]}}});
        let body = json!({"desiredQueriesPatch": [put("q", &ast)], "clientSchema": schema});
        let mut socket = world.connect(key, key).init(body).connected();
        socket.until_got("q");
        socket
    });
    world.sql("DELETE FROM item WHERE id = 'i2'");
    assert_eq!(sockets[0].poke().dels("item"), [json!({"id": "i2"})]);
    assert_eq!(sockets[1].poke().dels("item"), [json!({"n": 2})]);
    // The key of one is a content of the other.
    world.sql("UPDATE item SET n = 9 WHERE id = 'i3'");
    let row = json!({"id": "i3", "n": 9});
    let poke = sockets[0].poke();
    assert_eq!((poke.puts("item"), poke.dels("item")), (vec![row.clone()], vec![]));
    let poke = sockets[1].poke();
    assert_eq!((poke.puts("item"), poke.dels("item")), (vec![row], vec![json!({"n": 3})]));
}

#[test]
fn many_patches_come_in_parts_of_a_hundred() {
    let more = "INSERT INTO item SELECT 'x' || g, g, NULL FROM generate_series(1, 347) g;";
    let mut world = World::with(&format!("{DDL}{more}"), &["item", "other"], &[]);
    let mut old = world.connect("g1", "c").init(init(&[put("q", &items())])).connected();
    let first = old.until_got("q");
    assert_eq!(first.puts("item").len(), 350);
    // 350 rows and the query; the first entry is the poke of the configuration.
    assert_eq!(first.parts, [1, 100, 100, 100, 51]);
    world.sql("UPDATE item SET label = 'new'");
    let update = old.poke();
    assert_eq!(update.parts, [100, 100, 100, 50]);
    assert!(update.puts("item").iter().all(|row| row["label"] == "new"));

    let mut new = world
        .connect("g2", "c")
        .version(newest_version())
        .init(init(&[put("q", &items())]))
        .connected();
    let empty_or_config = new.poke();
    assert_eq!(empty_or_config.desired["c"], ["+q"]);
    let poke = new.until_got("q");
    assert_eq!(poke.puts("item").len(), 350);
    assert_eq!(poke.binary, !is_original(), "protocol 52");
    // Both kinds of client in one group.
    let mut older = world.connect("g2", "d").version(51).init(init(&[])).connected();
    let late = older.until_got("q");
    assert!(!late.binary);
    assert_eq!(late.puts("item").len(), 350);
    new.catch_up_with(&older);
    world.sql("DELETE FROM item WHERE id = 'x1'");
    let (to_new, to_older) = (new.poke(), older.poke());
    assert_eq!(to_new.rows, to_older.rows);
    assert_eq!((to_new.binary, to_older.binary), (!is_original(), false));
}

#[test]
fn large_rows_fit() {
    // Three rows of 1.3 MB, with characters of several bytes around every cut.
    let large = "UPDATE item SET label = repeat('äö€😀', 120000) || id;";
    let world = World::with(&format!("{DDL}{large}"), &["item", "other"], &[]);
    for (group, version) in [("g1", 51), ("g2", newest_version())] {
        let connect = world.connect(group, "c").version(version);
        let mut socket = connect.init(init(&[put("q", &items())])).connected();
        let poke = socket.until_got("q");
        let rows = poke.puts("item");
        assert_eq!(rows.len(), 3);
        for row in rows {
            let want = format!("{}{}", "äö€😀".repeat(120_000), row["id"].as_str().unwrap());
            assert!(row["label"] == want.as_str());
        }
        socket.ping();
    }
}

#[test]
fn queries_of_one_message_take_effect_in_order() {
    let world = World::new(&[]);
    let mut socket = world.connect("g", "c").init(init(&[])).connected();
    socket.poke();
    socket.send(&change(&[
        put("a", &items()),
        del("a"),
        put("b", &items()),
        del("never"),
        put("c", &others()),
        json!({"op": "clear"}),
        put("d", &others()),
    ]));
    let poke = socket.until_got("d");
    let last = |hash: &str| {
        let ops = poke.desired["c"].iter().rev();
        ops.clone().find(|op| op[1..] == *hash).map(|op| op[..1].to_owned())
    };
    assert_eq!(last("d").as_deref(), Some("+"));
    for gone in ["a", "b", "c"] {
        assert_ne!(last(gone).as_deref(), Some("+"), "{gone}: {poke:?}");
    }
    assert_eq!(last("never"), None);
    assert_eq!(poke.got.iter().filter(|op| *op == "+d").count(), 1);
}

#[test]
fn every_shape_of_query_is_delivered_with_its_related_rows() {
    let more = "INSERT INTO other VALUES (2, 'i2', 'of two'), (3, 'i2', ''), (4, 'none', '');";
    let world = World::with(&format!("{DDL}{more}"), &["item", "other"], &[]);
    let correlation = json!({"parentField": ["id"], "childField": ["b"]});
    let sub = json!({"correlation": correlation,
        "subquery": {"table": "other", "alias": "others", "orderBy": [["a", "asc"], ["b", "asc"]]}});
    let related = json!({"table": "item", "orderBy": [["n", "desc"], ["id", "asc"]],
        "limit": 2, "related": [sub]});
    let mut exists = sub;
    exists["subquery"]["alias"] = json!("zsubq_others");
    let exists = json!({"table": "item", "orderBy": [["id", "asc"]], "where":
        {"type": "correlatedSubquery", "op": "EXISTS", "related": exists}});
    let one = |ast: &Value, group: &str| -> Poke {
        let mut socket = world.connect(group, "c").init(init(&[put("q", ast)])).connected();
        socket.until_got("q")
    };
    let ids = |poke: &Poke, table: &str, key: &str| {
        let mut ids: Vec<String> = poke.puts(table).iter().map(|r| r[key].to_string()).collect();
        ids.sort();
        ids.join(" ")
    };
    let poke = one(&related, "g1");
    assert_eq!(ids(&poke, "item", "id"), r#""i2" "i3""#);
    assert_eq!(ids(&poke, "other", "a"), "2 3");
    let poke = one(&exists, "g2");
    assert_eq!(ids(&poke, "item", "id"), r#""i2""#);
    assert_eq!(ids(&poke, "other", "a"), "2 3", "what proves it comes along");
    let start = json!({"table": "item", "orderBy": [["id", "asc"]],
        "start": {"row": {"id": "i1"}, "exclusive": true}, "limit": 1});
    assert_eq!(ids(&one(&start, "g3"), "item", "id"), r#""i2""#);
}

#[test]
fn versions_that_were_passed_in_silence_come_with_the_next_results() {
    let mut world = World::new(&[("ZERO_NUM_SYNC_WORKERS", "1")]);
    let mut socket = world.connect("g", "c").init(init(&[put("q", &items())])).connected();
    let before = socket.until_got("q").cookie;
    let mut other = world.connect("h", "d").init(init(&[put("r", &others())])).connected();
    other.until_got("r");
    // Nothing for the first one.
    world.sql("UPDATE other SET v = 'two'");
    let now = other.poke().cookie;
    assert!(now > before && socket.ping().is_empty());
    // Configuration stays at the version of the results; new results are of the new one.
    socket.send(&change(&[put("r", &others())]));
    assert_eq!(socket.poke().cookie, format!("{before}:01"));
    let poke = socket.poke();
    assert_eq!(poke.got, ["+r"]);
    assert_eq!(poke.puts("other"), [json!({"a": 1, "b": "x", "v": "two"})]);
    assert_eq!(poke.cookie, now);
}
