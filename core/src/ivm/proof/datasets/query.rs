//! Queries in few words.

use serde_json::{Value as Json, json};

/// A query with more fields: `with(table("album"), json!({"limit": 3}))`.
pub(super) fn with(mut query: Json, fields: Json) -> Json {
    if let (Some(query), Json::Object(fields)) = (query.as_object_mut(), fields) {
        query.extend(fields);
    }
    query
}

pub(super) fn table(name: &str) -> Json {
    json!({"table": name})
}

/// A query with a condition.
pub(super) fn filter(query: Json, condition: Json) -> Json {
    with(query, json!({"where": condition}))
}

pub(super) fn cmp(column: &str, op: &str, value: impl Into<Json>) -> Json {
    let value: Json = value.into();
    json!({"type": "simple", "op": op, "left": {"type": "column", "name": column},
        "right": {"type": "literal", "value": value}})
}

pub(super) fn and(conditions: Vec<Json>) -> Json {
    json!({"type": "and", "conditions": conditions})
}

pub(super) fn or(conditions: Vec<Json>) -> Json {
    json!({"type": "or", "conditions": conditions})
}

fn subquery(join: &str, alias: &str, body: Json) -> Json {
    let (parent, child) = join.split_once('=').unwrap_or((join, join));
    json!({"correlation": {"parentField": [parent], "childField": [child]},
        "subquery": with(body, json!({"alias": alias}))})
}

/// EXISTS; `join` is `parent column=child column`.
pub(super) fn exists(join: &str, body: Json) -> Json {
    json!({"type": "correlatedSubquery", "op": "EXISTS", "related": subquery(join, "zsubq", body)})
}

pub(super) fn not_exists(join: &str, body: Json) -> Json {
    with(exists(join, body), json!({"op": "NOT EXISTS"}))
}

/// An EXISTS of a permission rule: what it reads stays on the server.
pub(super) fn allowed_by(join: &str, body: Json) -> Json {
    let mut condition = exists(join, body);
    condition["related"]["system"] = "permissions".into();
    condition
}

/// A query with related rows.
pub(super) fn related(mut query: Json, alias: &str, join: &str, body: Json) -> Json {
    let edge = subquery(join, alias, body);
    if let Some(edges) = query.get_mut("related").and_then(Json::as_array_mut) {
        edges.push(edge);
        return query;
    }
    with(query, json!({"related": [edge]}))
}

/// A query with rows behind a junction, whose own rows are hidden in the client.
pub(super) fn through(
    query: Json,
    alias: &str,
    (join, junction): (&str, &str),
    onward: &str,
    body: Json,
) -> Json {
    let mut query = related(query, alias, join, related(table(junction), alias, onward, body));
    if let Some(edge) = query["related"].as_array_mut().and_then(|e| e.last_mut()) {
        edge["hidden"] = true.into();
    }
    query
}
