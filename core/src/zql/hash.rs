//! Names of queries: 64- and 128-bit hashes, and the text forms that clients and CVRs use
//! (spec: zql-ivm §1.10, view-syncer-cvr §1.3).

use serde_json::Value;
use xxhash_rust::xxh32::xxh32;

use super::ast::Ast;
use super::js;
use super::normalize::{jsonb_order, normalize};

/// 64 bits: two 32-bit hashes, seeds 0 and 1, most significant first.
pub fn h64(text: &[u8]) -> u64 {
    u64::from(xxh32(text, 0)) << 32 | u64::from(xxh32(text, 1))
}

/// 128 bits: four 32-bit hashes, seeds 0 to 3, most significant first.
pub fn h128(text: &[u8]) -> u128 {
    (0..4).fold(0, |h, seed| h << 32 | u128::from(xxh32(text, seed)))
}

/// Base-36 digits, lower case.
pub fn base36(mut n: u64) -> String {
    let mut digits = Vec::with_capacity(13);
    loop {
        digits.push(char::from_digit((n % 36) as u32, 36).unwrap_or('0'));
        n /= 36;
        if n == 0 {
            return digits.into_iter().rev().collect();
        }
    }
}

/// The hash of an AST as received: for the answers of the query endpoint, whose key order counts.
pub fn received(ast: &Value) -> String {
    base36(h64(js::stringify(&normalize(ast)).as_bytes()))
}

/// The hash of an AST that is (or was derived from one that is) stored in the CVR: client queries
/// and internal ones, after permissions and parameters. Taken in the key order of `jsonb`, so
/// that it is the same before and after a reload, and the same in the original after a reload.
pub fn stored(ast: &Ast) -> String {
    base36(h64(stored_text(ast).as_bytes()))
}

/// What [`stored`] is the hash of.
pub fn stored_text(ast: &Ast) -> String {
    let json = serde_json::to_value(ast).unwrap_or_default();
    js::stringify(&normalize(&jsonb_order(&json)))
}

/// The id of a named query, as its client computes it.
pub fn custom_query(name: &str, args: &[Value]) -> String {
    let args = js::stringify(&Value::Array(args.to_vec()));
    base36(h64(format!("{name}:{args}").as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn vectors_of_the_spec() {
        assert_eq!(xxh32(b"", 0), 46_947_589);
        assert_eq!(h64(b""), 0x02cc_5d05_0b2c_b792);
        assert_eq!(h64(b"abc"), 0x32d1_53ff_aa3d_a8ff);
        assert_eq!(h64("é😀".as_bytes()), 0x89d4_69a0_8855_9b8b);
        assert_eq!(h128(b"abc"), 0x32d1_53ff_aa3d_a8ff_4e80_099d_1819_910f);
        assert_eq!(received(&json!({"table":"track"})), "3erl7awxu8h9i");
        assert_eq!(custom_query("issues", &[json!({"a":1})]), "3neagm4481sdu");
        assert_eq!(custom_query("issues", &[]), "3111ertu4u16a");
        let ast = json!({"limit":5,"table":"track","orderBy":[["ms","desc"]],"where":{"type":"and",
            "conditions":[
                {"type":"simple","left":{"type":"column","name":"ms"},"op":">",
                 "right":{"type":"literal","value":3}},
                {"type":"and","conditions":[
                    {"type":"simple","left":{"type":"column","name":"id"},"op":"=",
                     "right":{"type":"literal","value":"x"}}]}]}});
        assert_eq!(received(&ast), "27311474w8hcr");
        let unit = br#"["","issue","id","i1"]"#;
        assert_eq!(h64(unit), 0x3957_5b73_a345_022a);
        assert_eq!(base36(0), "0");
        assert_eq!(base36(u64::MAX), "3w5e11264sgsf");
    }

    fn internal(conditions: bool, order: &[&str]) -> Value {
        let simple = json!({"type":"simple","left":{"type":"column","name":"clientGroupID"},
            "op":"=","right":{"type":"literal","value":"cg1"}});
        let condition =
            if conditions { json!({"type":"and","conditions":[simple]}) } else { simple };
        let table = if conditions { "zero_0.mutations" } else { "zero_0.clients" };
        let order: Vec<_> = order.iter().map(|c| json!([c, "asc"])).collect();
        json!({"schema":"","table":table,"where":condition,"orderBy":order})
    }

    #[test]
    fn internal_queries_hash_as_the_original_does_fresh_and_reloaded() {
        let lmids = internal(false, &["clientGroupID", "clientID"]);
        let results = internal(true, &["clientGroupID", "clientID", "mutationID"]);
        assert_eq!(received(&lmids), "j6lz6brhx0l3");
        assert_eq!(received(&results), "2hn3hkvfldsth");
        let typed = |v: Value| stored(&serde_json::from_value(v).unwrap());
        assert_eq!(typed(lmids), "26xwqx0nntqrk");
        assert_eq!(typed(results), "28zncz4ps1kwt");
    }

    /// Random ASTs with the hashes that release 1.9.0 computes for them.
    #[test]
    fn hashes_equal_the_originals() {
        let vectors: Vec<Value> =
            serde_json::from_str(include_str!("testdata/hash_vectors.json")).unwrap();
        assert_eq!(vectors.len(), 90);
        for v in vectors {
            let ast = &v["ast"];
            assert_eq!(received(ast), v["received"], "{}", js::stringify(ast));
            let typed: Ast = serde_json::from_value(ast.clone()).unwrap();
            assert_eq!(stored(&typed), v["stored"], "{}", js::stringify(ast));
        }
    }

    #[test]
    fn order_of_operands_does_not_matter_and_windows_do() {
        let c = |n: &str| {
            json!({"type":"simple","op":"=","left":{"type":"column","name":n},
                   "right":{"type":"literal","value":1}})
        };
        let and = |a: &str, b: &str| {
            received(&json!({"table":"t","where":{"type":"and","conditions":[c(a), c(b)]}}))
        };
        assert_eq!(and("a", "b"), and("b", "a"));
        let base = received(&json!({"table":"t"}));
        for other in [
            json!({"table":"t","limit":1}),
            json!({"table":"t","orderBy":[["a","asc"]]}),
            json!({"table":"t","start":{"row":{},"exclusive":true}}),
        ] {
            assert_ne!(received(&other), base);
        }
        let never = json!({"table":"t","where":{"type":"or","conditions":[]}});
        assert_eq!(received(&never), base, "which is why a normal form is never executed");
    }

    /// Why what was normalised must never be executed: a condition that is false is gone.
    #[test]
    fn a_false_condition_vanishes_from_the_normal_form_and_hints_do_not() {
        let never = json!({"type":"or","conditions":[]});
        let x = json!({"type":"simple","op":"=","left":{"type":"column","name":"x"},
            "right":{"type":"literal","value":1}});
        let query = |w: &Value| received(&json!({"table":"t","where":w}));
        assert_eq!(query(&never), received(&json!({"table":"t"})));
        assert_eq!(query(&json!({"type":"and","conditions":[never, x]})), query(&x));
        let related = |aliases: [&str; 2]| {
            let one = |alias: &str| {
                json!({"correlation":{"parentField":["a"],"childField":["b"]},
                    "subquery":{"table":"c","alias":alias}})
            };
            received(&json!({"table":"t","related":aliases.map(one)}))
        };
        assert_eq!(related(["p", "q"]), related(["q", "p"]));
        let exists = |hint: &str, value: Value| {
            let mut exists = json!({"type":"correlatedSubquery","op":"EXISTS","related":{
                "correlation":{"parentField":["a"],"childField":["b"]},
                "subquery":{"table":"c","alias":"zsubq_c"}}});
            if !value.is_null() {
                exists[hint] = value;
            }
            query(&exists)
        };
        for hint in ["flip", "scalar"] {
            let hashes = [json!(null), json!(false), json!(true)].map(|v| exists(hint, v));
            assert!(hashes[0] != hashes[1] && hashes[1] != hashes[2] && hashes[0] != hashes[2]);
        }
    }
}
