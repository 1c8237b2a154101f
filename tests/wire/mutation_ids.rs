//! Mutations as the sync service sees them: rows of `zero_0.clients` and `zero_0.mutations`
//! (spec: sync-protocol §4.3, checklist 21; view-syncer-cvr 55).

use serde_json::json;

use crate::world::{World, again, init, items, put};

#[test]
fn a_mutations_id_result_and_rows_come_in_one_poke() {
    let mut world = World::new(&[]);
    // Without any query of its own a client still learns what became of its mutations.
    let mut idle = world.connect("idle", "c").init(init(&[])).connected();
    let mut a = world.connect("g", "a").init(init(&[put("q", &items())])).connected();
    let mut b = world.connect("g", "b").init(init(&[])).connected();
    a.until_got("q");
    b.pokes_until(|p| !p.got.is_empty());
    a.catch_up_with(&b);
    idle.pokes_until(|p| p.cookie.as_str() > "00:01");

    let lmid = |group: &str, client: &str, id: i64| {
        format!(
            "INSERT INTO zero_0.clients (\"clientGroupID\", \"clientID\", \"lastMutationID\") \
             VALUES ('{group}', '{client}', {id}) ON CONFLICT (\"clientGroupID\", \"clientID\") \
             DO UPDATE SET \"lastMutationID\" = {id};"
        )
    };
    world.sql(&lmid("idle", "c", 1));
    let poke = idle.poke();
    assert_eq!((poke.lmids["c"].clone(), poke.rows.len()), (json!(1), 0));

    world.sql(&format!("{} UPDATE item SET n = 50 WHERE id = 'i1';", lmid("g", "a", 1)));
    for socket in [&mut a, &mut b] {
        let poke = socket.poke();
        assert_eq!(poke.lmids.len(), 1, "{poke:?}");
        assert_eq!(poke.lmids["a"], 1);
        assert_eq!(poke.puts("item"), [json!({"id": "i1", "n": 50, "label": "label 1"})]);
        assert_eq!(poke.parts.len(), 1);
    }
    // An app error: id and result together.
    let result = |id: i64, result: serde_json::Value| {
        format!(
            "INSERT INTO zero_0.mutations (\"clientGroupID\", \"clientID\", \"mutationID\", result) \
             VALUES ('g', 'a', {id}, '{result}');"
        )
    };
    let failed = json!({"error": "app", "message": "too long", "details": {"max": [1, 2.5]}});
    world.sql(&format!("{} {}", lmid("g", "a", 2), result(2, failed.clone())));
    for socket in [&mut a, &mut b] {
        let poke = socket.poke();
        assert_eq!(poke.lmids["a"], 2);
        let put =
            json!({"op": "put", "mutation": {"id": {"clientID": "a", "id": 2}, "result": failed}});
        assert_eq!(poke.mutations, [put]);
        assert!(poke.rows.is_empty(), "internal rows are no rows: {poke:?}");
    }
    world.sql("DELETE FROM zero_0.mutations WHERE \"mutationID\" = 2");
    for socket in [&mut a, &mut b] {
        let poke = socket.poke();
        assert_eq!(poke.mutations, [json!({"op": "del", "id": {"clientID": "a", "id": 2}})]);
        assert!(poke.lmids.is_empty());
    }
    // Other groups' mutations are none of its business; its own go on.
    world.sql(&lmid("elsewhere", "a", 77));
    world.sql(&lmid("g", "b", 1));
    assert_eq!(b.poke().lmids, [("b".to_owned(), json!(1))].into());
    a.poke();
    // A late client is told all of them.
    world.sql(&format!("{} {}", lmid("g", "a", 3), result(3, json!({}))));
    a.poke();
    b.poke();
    let mut c = world.connect("g", "c").init(again(&[])).connected();
    let late = c.pokes_until(|p| !p.lmids.is_empty());
    assert_eq!(late.lmids, [("a".to_owned(), json!(3)), ("b".to_owned(), json!(1))].into());
    let put = json!({"op": "put", "mutation": {"id": {"clientID": "a", "id": 3}, "result": {}}});
    assert_eq!(late.mutations.iter().filter(|m| m["op"] == "put").collect::<Vec<_>>(), [&put]);
    assert_eq!(late.puts("item").len(), 3);
    // The rows of clients that are deleted say nothing.
    world.sql("DELETE FROM zero_0.clients WHERE \"clientID\" = 'b'");
    world.sql(&lmid("g", "a", 4));
    let next = a.pokes_until(|p| p.lmids.contains_key("a"));
    assert_eq!(next.lmids, [("a".to_owned(), json!(4))].into());
}
