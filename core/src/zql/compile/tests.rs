//! What compilation decides, and what it refuses.

use super::*;
use crate::ivm::plan::{Condition, Direction, NodeId, Op, Role};
use crate::schema::{ColumnSpec, TableId, TableSpec, UniqueKey, Unsyncable, ValueType};
use crate::value::Value;
use crate::version::StateVersion;
use crate::zql::ast;
use serde_json::{Value as Json, json};

fn table(id: u32, name: &str, columns: &[(&str, ValueType)]) -> Arc<TableSpec> {
    Arc::new(TableSpec {
        id: TableId(id),
        name: name.into(),
        columns: columns
            .iter()
            .map(|(n, t)| ColumnSpec {
                name: (*n).into(),
                value_type: *t,
                nullable: true,
                upstream_type: "x".into(),
            })
            .collect(),
        primary_key: vec![0],
        replica_key: vec![0],
        unique_keys: [vec![0], vec![1]]
            .into_iter()
            .map(|columns| UniqueKey { columns, not_null: true })
            .collect(),
        min_row_version: StateVersion::zero(),
        indexes: vec![],
    })
}

fn schema() -> Schema {
    use ValueType::*;
    let mut s = Schema::default();
    for t in [
        table(1, "issue", &[("id", String), ("n", Number), ("open", Boolean), ("data", Json)]),
        table(2, "comment", &[("id", String), ("k", Number), ("issue", String), ("text", String)]),
    ] {
        s.tables.insert(Arc::clone(&t.name), t);
    }
    s.unsyncable.insert("log".into(), Unsyncable::NoKey);
    s.invisible_columns.insert(("issue".into(), "blob".into()), "bytea".into());
    s
}

fn run(ast: Json) -> Result<(Plan, Vec<Param>), CompileError> {
    compile(&serde_json::from_value(ast).unwrap(), &schema(), &IdentityKeys::default())
}

fn plan(ast: Json) -> Plan {
    run(ast).unwrap().0
}

fn cond(column: &str, op: &str, value: Json) -> Json {
    json!({"type":"simple","op":op,"left":{"type":"column","name":column},
           "right":{"type":"literal","value":value}})
}

fn exists(op: &str, body: Json) -> Json {
    json!({"type":"correlatedSubquery","op":op,"related":{
        "correlation":{"parentField":["id"],"childField":["issue"]},"subquery":body}})
}

/// The folded condition of `issue where column op value`.
fn folded(column: &str, op: &str, value: Json) -> Result<Condition, CompileError> {
    run(json!({"table":"issue","where":cond(column, op, value)}))
        .map(|(mut p, _)| p.nodes.remove(0).condition)
}

fn op_of(column: &str, op: &str, value: Json) -> Op {
    match folded(column, op, value) {
        Ok(Condition::Simple(s)) => s.op,
        other => panic!("{other:?}"),
    }
}

#[test]
fn comparisons_of_different_types_get_the_clients_answer() {
    let constant = |c: &str, op: &str, v: Json| match folded(c, op, v) {
        Ok(Condition::Const(b)) => b,
        other => panic!("{other:?}"),
    };
    for v in [json!("1"), json!(true), json!([1])] {
        assert!(!constant("n", "=", v.clone()));
        assert!(!constant("n", "IS", v.clone()));
        assert!(constant("n", "IS NOT", v.clone()));
        assert_eq!(op_of("n", "!=", v.clone()), Op::IsNotNull);
        assert!(folded("n", "<", v).is_err());
    }
    assert!(!constant("open", "=", json!(1)));
    assert!(!constant("n", "IN", json!(["1", true])));
    assert_eq!(op_of("n", "NOT IN", json!(["1"])), Op::IsNotNull);
    let (_, params) =
        run(json!({"table":"issue","where":cond("n", "IN", json!([2, "x", 1, 2]))})).unwrap();
    assert_eq!(params, [Param::List([1.0, 2.0].map(Value::Number).into())]);
    assert_eq!(
        folded("n", "LIKE", json!("x")).unwrap_err().to_string(),
        "table \"issue\": number column \"n\": LIKE works on strings only"
    );
    assert!(folded("n", "IN", json!(1)).unwrap_err().to_string().contains("array for IN operator"));
    assert!(folded("data", "=", json!("x")).is_err());
    assert_eq!(op_of("data", "IS", json!(null)), Op::IsNull);
}

#[test]
fn null_literals_are_folded() {
    for op in ["=", "!=", "<", ">", "<=", ">=", "IN", "NOT IN", "LIKE", "NOT ILIKE"] {
        assert_eq!(folded("n", op, json!(null)), Ok(Condition::Const(false)), "{op}");
    }
    assert_eq!(op_of("n", "IS", json!(null)), Op::IsNull);
    assert_eq!(op_of("n", "IS NOT", json!(null)), Op::IsNotNull);
    assert_eq!(op_of("n", "IS", json!(1)), Op::Eq);
    assert_eq!(folded("n", "IN", json!([])), Ok(Condition::Const(false)));
    assert_eq!(op_of("n", "NOT IN", json!([])), Op::IsNotNull);
}

#[test]
fn literals_on_the_left_are_constants() {
    let constant = |l: Json, op: &str, r: Json| {
        run(json!({"table":"issue","where":{"type":"simple","op":op,
            "left":{"type":"literal","value":l},"right":{"type":"literal","value":r}}}))
        .map(|(p, _)| p.nodes[0].condition == Condition::Const(true))
    };
    for (l, op, r, want) in [
        (json!(1), "=", json!(1), true),
        (json!(1), "=", json!("1"), false),
        (json!(1), "!=", json!(0), true),
        (json!(null), "=", json!(null), false),
        (json!(null), "IS", json!(null), true),
        (json!(1), "IS NOT", json!(null), true),
        (json!("a"), "LIKE", json!("A"), false),
        (json!("a"), "ILIKE", json!("A"), true),
        (json!(1), "IN", json!([1, 2]), true),
        (json!(3), "NOT IN", json!([1, 2]), true),
        (json!(null), "NOT IN", json!([]), false),
        (json!(-0.0), "<", json!(0), false),
        (json!("b"), ">", json!("a"), true),
    ] {
        assert_eq!(constant(l.clone(), op, r.clone()), Ok(want), "{l} {op} {r}");
    }
    assert!(constant(json!(1), "<", json!("1")).is_err());
    assert!(constant(json!(1), "IN", json!(1)).is_err());
}

#[test]
fn empty_and_is_true_empty_or_is_false_and_nesting_is_flattened() {
    let condition = |w: Json| plan(json!({"table":"issue","where":w})).nodes.remove(0).condition;
    let and = |c: Json| json!({"type":"and","conditions":c});
    let or = |c: Json| json!({"type":"or","conditions":c});
    let x = || cond("n", "=", json!(1));
    assert_eq!(condition(and(json!([]))), Condition::Const(true));
    assert_eq!(condition(or(json!([]))), Condition::Const(false));
    assert_eq!(condition(and(json!([x(), or(json!([]))]))), Condition::Const(false));
    assert_eq!(condition(or(json!([x(), and(json!([]))]))), Condition::Const(true));
    assert!(matches!(condition(and(json!([or(json!([x()]))]))), Condition::Simple(_)));
    let Condition::And(all) = condition(and(json!([x(), and(json!([x(), and(json!([x()]))]))])))
    else {
        panic!()
    };
    assert_eq!(all.len(), 3);
}

#[test]
fn exists_bodies_lose_limit_and_order_and_impossible_ones_are_constants() {
    let p = plan(json!({"table":"issue","where":exists("EXISTS",
        json!({"table":"comment","limit":1,"orderBy":[["text","desc"]]}))}));
    assert_eq!(p.nodes[1].limit, None);
    assert_eq!(p.nodes[1].order, [(0, Direction::Asc)]);
    let never = json!({"type":"or","conditions":[]});
    for body in [json!({"table":"comment","limit":0}), json!({"table":"comment","where":never})] {
        for (op, truth) in [("EXISTS", false), ("NOT EXISTS", true)] {
            let p = plan(json!({"table":"issue","where":exists(op, body.clone())}));
            assert_eq!(p.nodes[0].condition, Condition::Const(truth));
            assert_eq!(p.nodes.len(), 1);
        }
    }
    let p = plan(json!({"table":"issue","where":exists("EXISTS",
        json!({"table":"comment","orderBy":[["text","desc"]],
               "start":{"row":{"text":"m"},"exclusive":true}}))}));
    let start = p.nodes[1].start.as_ref().unwrap();
    assert_eq!(start.order, [(3, Direction::Desc), (0, Direction::Asc)]);
}

#[test]
fn silence_and_not_exists_are_inherited() {
    let inner = json!({"table":"issue"});
    let edge = |op: &str, system: &str, body: &Json| {
        json!({"type":"correlatedSubquery","op":op,"flip":true,"related":{"system":system,
            "correlation":{"parentField":["id"],"childField":["id"]},"subquery":body}})
    };
    let flags = |p: &Plan| -> Vec<(bool, bool)> {
        p.nodes.iter().map(|n| (n.silent, n.below_not_exists)).collect()
    };
    let nested = json!({"table":"issue","where":edge("EXISTS", "client", &inner)});
    let p = plan(json!({"table":"issue","where":edge("NOT EXISTS", "client", &nested)}));
    assert_eq!(flags(&p), [(false, false), (true, true), (true, true)]);
    let p = plan(json!({"table":"issue","where":edge("EXISTS", "permissions", &nested)}));
    assert_eq!(flags(&p), [(false, false), (true, false), (true, false)]);
    let p = plan(json!({"table":"issue","where":edge("EXISTS", "client", &nested)}));
    assert_eq!(flags(&p), [(false, false); 3]);
    assert_eq!(p.nodes[2].role, Role::Exists { parent: NodeId(1), negated: false });
}

#[test]
fn the_last_related_of_an_alias_wins_and_permissions_edges_vanish() {
    let related = |limit: u32, system: &str| {
        json!({"system":system,"correlation":{"parentField":["id"],"childField":["issue"]},
               "subquery":{"table":"comment","alias":"c","limit":limit}})
    };
    let p = plan(json!({"table":"issue","related":[related(1, "client"), related(2, "client")]}));
    assert_eq!(p.nodes[0].related.len(), 1);
    assert_eq!(p.nodes[1].limit, Some(2));
    let p = plan(json!({"table":"issue","related":[related(2, "permissions")]}));
    assert_eq!(p.nodes.len(), 1);
    let p = plan(json!({"table":"issue","related":[related(0, "client")]}));
    assert_eq!(p.nodes.len(), 1, "a related query of limit 0 has no rows");
}

#[test]
fn queries_that_differ_only_in_literals_share_a_plan() {
    let q = |n: i32, s: &str| {
        run(json!({"table":"issue","where":{"type":"and","conditions":[
            cond("n", "=", json!(n)), exists("EXISTS", json!({"table":"comment",
              "where":cond("text", "LIKE", json!(s))}))]},
            "start":{"row":{"id":s},"exclusive":false}}))
        .unwrap()
    };
    let ((a, pa), (b, pb)) = (q(1, "x"), q(2, "y%"));
    assert_eq!(a, b);
    assert_ne!(pa, pb);
    assert_eq!(usize::from(a.params), pa.len());
}

#[test]
fn identity_keys_of_the_client_schema_complete_the_order() {
    let keys = |c: &[&str]| {
        IdentityKeys([("issue".into(), c.iter().map(|c| (*c).into()).collect())].into())
    };
    let ast = Ast::table("issue");
    let (p, _) = compile(&ast, &schema(), &keys(&["n"])).unwrap();
    assert_eq!(p.nodes[0].order, [(1, Direction::Asc)]);
    assert_eq!(p.nodes[0].table.primary_key, [1]);
    assert!(matches!(compile(&ast, &schema(), &keys(&["open"])), Err(CompileError::BadKey { .. })));
}

#[test]
fn errors_name_table_column_and_cause() {
    let text = |ast: Json| run(ast).unwrap_err().to_string();
    assert!(text(json!({"table":"nope"})).contains("\"nope\""));
    assert!(text(json!({"table":"log"})).contains("no primary key"));
    assert!(text(json!({"table":"issue","where":cond("blob", "=", json!(1))})).contains("bytea"));
    assert!(text(json!({"table":"issue","orderBy":[["zz","asc"]]})).contains("\"zz\""));
    assert!(text(json!({"table":"issue","orderBy":[["data","asc"]]})).contains("no order"));
    assert!(
        text(json!({"table":"issue","where":cond("id", "LIKE", json!("a\\"))}))
            .contains("must not end with escape")
    );
    for limit in [json!(-1), json!(1.5)] {
        assert!(text(json!({"table":"issue","limit":limit})).contains("whole number"));
    }
    assert!(
        text(json!({"table":"issue","where":{"type":"simple","op":"=",
        "left":{"type":"column","name":"id"},
        "right":{"type":"static","anchor":"authData","field":["a","b"]}}}))
        .contains("authData.a.b")
    );
    assert!(
        text(json!({"table":"issue","related":[{
        "correlation":{"parentField":["n"],"childField":["issue"]},
        "subquery":{"table":"comment","alias":"c"}}]}))
        .contains("cannot be joined")
    );
    assert!(
        text(json!({"table":"issue","start":{"row":{"id":1},"exclusive":true}}))
            .contains("start cursor")
    );
}

#[test]
fn sizes_are_bounded() {
    let mut deep = json!({"table":"issue"});
    for _ in 0..=MAX_DEPTH {
        deep = json!({"table":"issue","related":[{
            "correlation":{"parentField":["id"],"childField":["id"]},
            "subquery":{"table":"issue","alias":"x"}}]})
        .as_object()
        .map(|o| {
            let mut o = o.clone();
            let mut sub = deep.clone();
            sub["alias"] = json!("x");
            o["related"][0]["subquery"] = sub;
            Json::Object(o)
        })
        .unwrap();
    }
    assert!(matches!(run(deep), Err(CompileError::TooLarge { .. })));
    let wide: Vec<Json> = (0..=MAX_CONDITIONS).map(|i| cond("n", "=", json!(i))).collect();
    let wide = json!({"table":"issue","where":{"type":"or","conditions":wide}});
    assert!(matches!(run(wide), Err(CompileError::TooLarge { .. })));
    let mut nested = ast::Condition::always();
    for _ in 0..1000 {
        nested = ast::Condition::And { conditions: vec![nested] };
    }
    let ast = Ast { condition: Some(nested), ..Ast::table("issue") };
    assert!(compile(&ast, &schema(), &IdentityKeys::default()).is_err());
}

/// What a comparison of a column with a literal becomes, by the types of both (spec: zql-ivm §2.4,
/// §2.10): `F`, `T` a constant; `nn` "is not null"; `n` "is null"; `✗` an error of the query; `ok`
/// a comparison.
#[test]
fn every_pair_of_column_and_literal_has_its_outcome() {
    // Columns: string, number, boolean, json. Literals across: null, string, number, boolean, list.
    const LITERALS: [&str; 5] = ["null", "'a'", "1", "true", "[…]"];
    let literal = [json!(null), json!("a"), json!(1), json!(true), json!(["a", 1, true])];
    #[rustfmt::skip]
    let table: [(&[&str], &str, [&str; 5]); 24] = [
        (&["=", "IS"],             "id",   ["", "ok", "F",  "F",  "F"]),
        (&["=", "IS"],             "n",    ["", "F",  "ok", "F",  "F"]),
        (&["=", "IS"],             "open", ["", "F",  "F",  "ok", "F"]),
        (&["=", "IS"],             "data", ["", "✗",  "✗",  "✗",  "✗"]),
        (&["!="],                  "id",   ["", "ok", "nn", "nn", "nn"]),
        (&["!="],                  "n",    ["", "nn", "ok", "nn", "nn"]),
        (&["!="],                  "open", ["", "nn", "nn", "ok", "nn"]),
        (&["!="],                  "data", ["", "✗",  "✗",  "✗",  "✗"]),
        (&["IS NOT"],              "id",   ["", "ok", "T",  "T",  "T"]),
        (&["IS NOT"],              "n",    ["", "T",  "ok", "T",  "T"]),
        (&["IS NOT"],              "open", ["", "T",  "T",  "ok", "T"]),
        (&["IS NOT"],              "data", ["", "✗",  "✗",  "✗",  "✗"]),
        (&["<", ">", "<=", ">="],  "id",   ["", "ok", "✗",  "✗",  "✗"]),
        (&["<", ">", "<=", ">="],  "n",    ["", "✗",  "ok", "✗",  "✗"]),
        (&["<", ">", "<=", ">="],  "open", ["", "✗",  "✗",  "ok", "✗"]),
        (&["<", ">", "<=", ">="],  "data", ["", "✗",  "✗",  "✗",  "✗"]),
        (&["LIKE", "NOT LIKE", "ILIKE", "NOT ILIKE"], "id", ["", "ok", "ok", "ok", "✗"]),
        (&["LIKE", "NOT LIKE", "ILIKE", "NOT ILIKE"], "n",  ["", "✗",  "✗",  "✗",  "✗"]),
        (&["LIKE", "NOT LIKE", "ILIKE", "NOT ILIKE"], "open", ["", "✗", "✗", "✗",  "✗"]),
        (&["LIKE", "NOT LIKE", "ILIKE", "NOT ILIKE"], "data", ["", "✗", "✗", "✗",  "✗"]),
        (&["IN", "NOT IN"],        "id",   ["", "✗",  "✗",  "✗",  "ok"]),
        (&["IN", "NOT IN"],        "n",    ["", "✗",  "✗",  "✗",  "ok"]),
        (&["IN", "NOT IN"],        "open", ["", "✗",  "✗",  "✗",  "ok"]),
        (&["IN", "NOT IN"],        "data", ["", "✗",  "✗",  "✗",  "✗"]),
    ];
    let mut cells = 0;
    for (operators, column, outcomes) in table {
        for (op, (i, outcome)) in
            operators.iter().flat_map(|op| outcomes.iter().enumerate().map(move |o| (*op, o)))
        {
            // With null, the type of the column does not matter.
            let want = match (i, op) {
                (0, "IS") => "n",
                (0, "IS NOT") => "nn",
                (0, _) => "F",
                _ => outcome,
            };
            let context = format!("{column} {op} {}", LITERALS[i]);
            let found = match folded(column, op, literal[i].clone()) {
                Ok(Condition::Const(false)) => "F",
                Ok(Condition::Const(true)) => "T",
                Ok(Condition::Simple(s)) if s.op == Op::IsNull => "n",
                Ok(Condition::Simple(s)) if s.op == Op::IsNotNull => "nn",
                Ok(Condition::Simple(_)) => "ok",
                Ok(other) => panic!("{context}: {other:?}"),
                Err(error @ CompileError::Type { .. }) => {
                    let text = error.to_string();
                    assert!(text.contains("\"issue\"") && text.contains(column), "{text}");
                    "✗"
                }
                Err(other) => panic!("{context}: {other}"),
            };
            assert_eq!(found, want, "{context}");
            cells += 1;
        }
    }
    assert_eq!(cells, 4 * 5 * 14, "every type of column and literal with every operator");
}

/// Joins need columns of one type that has an equality.
#[test]
fn every_pair_of_joined_columns_has_its_outcome() {
    let columns = ["id", "n", "open", "data"];
    for parent in columns {
        for child in columns {
            let correlation = json!({"parentField": [parent], "childField": [child]});
            let body = json!({"table": "issue", "alias": "x"});
            let edge = json!({"correlation": correlation, "subquery": body});
            let exists = |op: &str| {
                json!({"table": "issue", "where": {"type": "correlatedSubquery", "op": op,
                    "related": edge.clone()}})
            };
            let related = json!({"table": "issue", "related": [edge.clone()]});
            for query in [exists("EXISTS"), exists("NOT EXISTS"), related] {
                let joined = parent == child && parent != "data";
                match run(query) {
                    Ok(_) => assert!(joined, "{parent} = {child}"),
                    Err(error) => {
                        assert!(!joined, "{error}");
                        let text = error.to_string();
                        assert!(text.contains("cannot be joined with"), "{text}");
                        assert!(text.contains(&format!("\"{parent}\"")), "{text}");
                        assert!(text.contains(&format!("\"{child}\"")), "{text}");
                    }
                }
            }
        }
    }
}

/// A cursor has values of its columns' types, or null.
#[test]
fn every_pair_of_column_and_cursor_value_has_its_outcome() {
    let values = [json!("a"), json!(1), json!(true)];
    for (own, column) in ["id", "n", "open"].into_iter().enumerate() {
        let start = |value: &Json| {
            run(json!({"table": "issue", "orderBy": [[column, "asc"]],
                "start": {"row": {column: value}, "exclusive": true}}))
        };
        assert!(start(&json!(null)).is_ok());
        for (i, value) in values.iter().enumerate() {
            assert_eq!(start(value).is_ok(), i == own, "{column} at {value}");
        }
        for value in [json!([1]), json!({"a": 1})] {
            assert!(start(&value).unwrap_err().to_string().contains("start cursor"), "{value}");
        }
    }
}
