//! What the log says of a query that takes long, and of the index that it lacks.

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::server::is_original;
use crate::world::{DDL, World, init, put};

#[test]
fn a_slow_query_is_logged_with_its_plan_and_the_missing_index() {
    // The original logs other things about it.
    if is_original() {
        return;
    }
    let ddl = format!(
        "{DDL} INSERT INTO item SELECT 'x' || g, g % 100, 'l' FROM generate_series(1, 12000) g;"
    );
    let env = [("ZERO_LOG_SLOW_HYDRATE_THRESHOLD", "0"), ("ZERO_LOG_FORMAT", "json")];
    let world = World::with(&ddl, &["item", "other"], &env);
    let few = |n: i64| {
        json!({"table": "item", "orderBy": [["id", "asc"]], "where": {"type": "simple", "op": "=",
            "left": {"type": "column", "name": "n"}, "right": {"type": "literal", "value": n}}})
    };
    let patch = [put("seven", &few(7)), put("eight", &few(8))];
    let mut socket = world.connect("g", "c").init(init(&patch)).connected();
    // Both come in one poke.
    socket.until_got("seven");
    let logged = |message: &str| -> Vec<Value> {
        let log = world.server.whole_log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|l| l["message"].as_str().is_some_and(|m| m.contains(message))).collect()
    };
    let slow = eventually("both queries are logged", || {
        let slow = logged("Slow query materialization");
        let ours = |hash: &str| slow.iter().find(|l| l["hash"] == hash).cloned();
        ours("seven").zip(ours("eight")).ok_or(format!("{slow:?}"))
    });
    for line in [&slow.0, &slow.1] {
        assert_eq!(line["level"], "WARN", "{line}");
        let ast = line["ast"].as_str().unwrap();
        assert!(ast.contains("\"table\":\"item\"") && ast.contains("\"n\""), "{line}");
        assert!(line["elapsed_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{line}");
    }
    // One shape is one statement: it is said once.
    let missing = logged("for want of an index");
    let [line] = missing.as_slice() else { panic!("{missing:?}") };
    let message = line["message"].as_str().unwrap();
    assert!(message.contains("for want of an index on \"item\" (\"n\")"), "{line}");
    assert!(line["plan"].as_str().is_some_and(|plan| plan.contains("SCAN t0")), "{line}");
    assert!(["seven", "eight"].iter().any(|hash| line["hash"] == *hash), "{line}");
}
