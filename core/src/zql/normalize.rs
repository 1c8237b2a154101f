//! The normal form of an AST, for hashing only (spec: zql-ivm §1.9).
//!
//! Never execute what comes out of here: normalisation drops FALSE (`or []`), so that "deny all"
//! would become "allow all".
//!
//! Works on JSON, not on [`super::ast`]: keys inside conditions and cursors keep the order in which
//! they were sent, and unknown keys of conditions survive into the hash.

use std::cmp::Ordering;

use serde_json::{Map, Value};

use super::js;

/// The normal form: keys in fixed order, conditions flattened and sorted, related sorted by alias.
pub fn normalize(ast: &Value) -> Value {
    let Some(ast) = ast.as_object() else { return ast.clone() };
    let mut out = Map::new();
    let copy = |out: &mut Map<String, Value>, key: &str| {
        if let Some(v) = ast.get(key) {
            out.insert(key.to_owned(), v.clone());
        }
    };
    for key in ["schema", "table", "alias"] {
        copy(&mut out, key);
    }
    if let Some(c) = ast.get("where").and_then(flatten) {
        out.insert("where".into(), sort_condition(c));
    }
    if let Some(related) = ast.get("related").and_then(Value::as_array) {
        let mut related: Vec<Value> = related.iter().map(normalize_related).collect();
        sort_as_v8(&mut related, &|a, b| alias(a).cmp(alias(b)));
        out.insert("related".into(), Value::Array(related));
    }
    for key in ["start", "limit", "orderBy"] {
        copy(&mut out, key);
    }
    Value::Object(out)
}

/// The same JSON with the keys of every object in the order of Postgres' `jsonb`: by length in
/// bytes, then by bytes (spec: view-syncer-cvr §1.3).
pub fn jsonb_order(v: &Value) -> Value {
    match v {
        Value::Array(items) => Value::Array(items.iter().map(jsonb_order).collect()),
        Value::Object(map) => {
            let mut entries: Vec<(&String, &Value)> = map.iter().collect();
            entries.sort_by(|(a, _), (b, _)| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
            Value::Object(entries.into_iter().map(|(k, v)| (k.clone(), jsonb_order(v))).collect())
        }
        scalar => scalar.clone(),
    }
}

/// An element of `related` of a query: exactly these keys, in this order.
fn normalize_related(r: &Value) -> Value {
    let mut out = Map::new();
    if let Some(c) = r.get("correlation") {
        out.insert("correlation".into(), normalize_correlation(c));
    }
    if let Some(h) = r.get("hidden") {
        out.insert("hidden".into(), h.clone());
    }
    if let Some(s) = r.get("subquery") {
        out.insert("subquery".into(), normalize(s));
    }
    if let Some(s) = r.get("system") {
        out.insert("system".into(), s.clone());
    }
    Value::Object(out)
}

fn normalize_correlation(c: &Value) -> Value {
    let mut out = Map::new();
    for key in ["parentField", "childField"] {
        if let Some(v) = c.get(key) {
            out.insert(key.to_owned(), v.clone());
        }
    }
    Value::Object(out)
}

fn kind(c: &Value) -> &str {
    text(c, "type")
}

fn text<'a>(v: &'a Value, key: &str) -> &'a str {
    v.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn conditions(c: &Value) -> &[Value] {
    c.get("conditions").and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Merges one level of equal nesting, unwraps single operands; nothing left is no condition.
fn flatten(c: &Value) -> Option<Value> {
    let t = kind(c);
    if t != "and" && t != "or" {
        return Some(c.clone());
    }
    let mut kept: Vec<Value> = Vec::new();
    for k in conditions(c) {
        if kind(k) == t {
            kept.extend(conditions(k).iter().filter_map(flatten));
        } else {
            kept.extend(flatten(k));
        }
    }
    match kept.len() {
        0 => None,
        1 => kept.pop(),
        _ => Some(Value::Object(Map::from_iter([
            ("type".to_owned(), Value::from(t)),
            ("conditions".to_owned(), Value::Array(kept)),
        ]))),
    }
}

/// Sorts operands bottom-up, and normalises the bodies of subqueries on the way.
fn sort_condition(c: Value) -> Value {
    let Value::Object(mut map) = c else { return c };
    if let Some(list) = map.get_mut("conditions").and_then(Value::as_array_mut) {
        let mut sorted: Vec<Value> = std::mem::take(list).into_iter().map(sort_condition).collect();
        sort_as_v8(&mut sorted, &compare_conditions);
        *list = sorted;
    }
    if let Some(Value::Object(related)) = map.get_mut("related") {
        // Keys keep their places here, unlike in `related` of a query.
        if let Some(correlation) = related.get_mut("correlation") {
            *correlation = normalize_correlation(correlation);
        }
        if let Some(subquery) = related.get_mut("subquery") {
            *subquery = normalize(subquery);
        }
    }
    Value::Object(map)
}

fn alias(related: &Value) -> &str {
    related.get("subquery").map_or("", |s| text(s, "alias"))
}

fn compare_conditions(a: &Value, b: &Value) -> Ordering {
    match (kind(a), kind(b)) {
        ("simple", "simple") => compare_operands(a.get("left"), b.get("left"))
            .then_with(|| text(a, "op").cmp(text(b, "op")))
            .then_with(|| compare_operands(a.get("right"), b.get("right"))),
        ("simple", _) => Ordering::Less,
        (_, "simple") => Ordering::Greater,
        ("correlatedSubquery", "correlatedSubquery") => {
            let of = |c: &Value| c.get("related").map_or(String::new(), |r| alias(r).to_owned());
            let flag = |c: &Value, k: &str| c.get(k).and_then(Value::as_bool);
            of(a)
                .cmp(&of(b))
                .then_with(|| text(a, "op").cmp(text(b, "op")))
                .then_with(|| flag(a, "flip").cmp(&flag(b, "flip")))
                .then_with(|| flag(a, "scalar").cmp(&flag(b, "scalar")))
        }
        // The original answers "less" in both directions; the sort below makes the same of it.
        ("correlatedSubquery", _) | (_, "correlatedSubquery") => Ordering::Less,
        (ka, kb) => ka.cmp(kb).then_with(|| {
            let (a, b) = (conditions(a), conditions(b));
            a.iter()
                .zip(b)
                .map(|(x, y)| compare_conditions(x, y))
                .find(|o| o.is_ne())
                .unwrap_or_else(|| a.len().cmp(&b.len()))
        }),
    }
}

fn compare_operands(a: Option<&Value>, b: Option<&Value>) -> Ordering {
    let (Some(a), Some(b)) = (a, b) else { return a.is_some().cmp(&b.is_some()) };
    kind(a).cmp(kind(b)).then_with(|| match kind(a) {
        "column" => text(a, "name").cmp(text(b, "name")),
        "literal" => {
            let of = |v: &Value| js::to_string(v.get("value").unwrap_or(&Value::Null));
            of(a).cmp(&of(b))
        }
        // The original refuses to compare parameters; they are bound before anything is hashed.
        _ => js::stringify(a).cmp(&js::stringify(b)),
    })
}

/// Sorts as JavaScript engines sort short arrays: the leading run (reversed if it descends), then
/// binary insertion. With a consistent comparison any stable sort would do.
fn sort_as_v8(items: &mut [Value], compare: &dyn Fn(&Value, &Value) -> Ordering) {
    let n = items.len();
    if n < 2 {
        return;
    }
    let descending = compare(&items[1], &items[0]).is_lt();
    let mut run = 2;
    while run < n && compare(&items[run], &items[run - 1]).is_lt() == descending {
        run += 1;
    }
    if descending {
        items[..run].reverse();
    }
    for i in run..n {
        let (mut left, mut right) = (0, i);
        while left < right {
            let mid = left + (right - left) / 2;
            if compare(&items[i], &items[mid]).is_lt() {
                right = mid;
            } else {
                left = mid + 1;
            }
        }
        items[left..=i].rotate_right(1);
    }
}
