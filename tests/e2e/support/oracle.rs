//! Postgres as oracle: the view that a client must see, asked of Postgres in one statement.
//!
//! Queries are the driver's specs (`tests/client/driver.mjs`); the schema is its schema too.

use postgres::Client;
use serde_json::Value;

/// The view of `spec` over the database right now.
pub fn expected_view(sql: &mut Client, schema: &Value, spec: &Value) -> Value {
    let mut compiler = Compiler { schema, aliases: 0 };
    let table = spec["table"].as_str().unwrap();
    let text = format!("SELECT {}", compiler.list(table, spec, None));
    let row = sql.query_one(&text, &[]).unwrap_or_else(|e| panic!("{e:?} in {text}"));
    let json: String = row.get(0);
    serde_json::from_str(&json).unwrap()
}

struct Compiler<'a> {
    schema: &'a Value,
    aliases: usize,
}

impl Compiler<'_> {
    fn alias(&mut self) -> String {
        self.aliases += 1;
        format!("t{}", self.aliases)
    }

    fn hops(&self, table: &str, relationship: &str) -> Vec<Value> {
        self.schema["relationships"][table][relationship].as_array().unwrap().clone()
    }

    /// A JSON list of the rows of `spec` (text), correlated by `join` on the row's alias.
    fn list(&mut self, table: &str, spec: &Value, join: Option<Join<'_>>) -> String {
        let t = self.alias();
        let (from, condition) = self.source(table, &t, join);
        let columns = self.schema["tables"][table]["columns"].as_object().unwrap().clone();
        let mut fields: Vec<String> = columns
            .iter()
            .map(|(c, kind)| format!("'{c}', {}", wire(&t, c, kind.as_str().unwrap())))
            .collect();
        for edge in spec["related"].as_array().into_iter().flatten() {
            let name = edge["rel"].as_str().unwrap();
            let hops = self.hops(table, name);
            let child = hops.last().unwrap()["destTable"].as_str().unwrap().to_owned();
            let empty = Value::Object(Default::default());
            let inner = edge.get("spec").unwrap_or(&empty).clone();
            let list = self.list(&child, &inner, Some(Join { parent: &t, hops: &hops }));
            fields.push(format!("'{name}', ({list})::json"));
        }
        let mut wheres = vec![condition];
        if !spec["where"].is_null() {
            wheres.push(self.condition(table, &t, &spec["where"]));
        }
        let order = self.order(table, spec);
        if !spec["start"].is_null() {
            wheres.push(start(&t, &order, &spec["start"], &columns));
        }
        let order_by: Vec<String> = order
            .iter()
            .map(|(c, descending)| {
                let kind = columns[c].as_str().unwrap();
                let dir = if *descending { "DESC NULLS LAST" } else { "ASC NULLS FIRST" };
                format!("{} {dir}", sortable(&t, c, kind))
            })
            .collect();
        let limit = spec["limit"].as_u64().map(|n| format!(" LIMIT {n}")).unwrap_or_default();
        format!(
            "(SELECT coalesce(json_agg(x.j), '[]')::text FROM (SELECT json_build_object({}) AS j FROM {from} WHERE {} ORDER BY {}{limit}) x)",
            fields.join(", "),
            wheres.join(" AND "),
            order_by.join(", "),
        )
    }

    /// FROM and join condition of a table reached over zero, one or two hops.
    fn source(&mut self, table: &str, t: &str, join: Option<Join<'_>>) -> (String, String) {
        let Some(Join { parent, hops }) = join else {
            return (format!("\"{table}\" {t}"), "TRUE".to_owned());
        };
        let mut from = String::new();
        let mut conditions = Vec::new();
        let mut left = parent.to_owned();
        for (i, hop) in hops.iter().enumerate() {
            let alias = if i + 1 == hops.len() { t.to_owned() } else { self.alias() };
            if !from.is_empty() {
                from.push_str(", ");
            }
            from.push_str(&format!("\"{}\" {alias}", hop["destTable"].as_str().unwrap()));
            let columns = hop["sourceField"].as_array().unwrap().iter();
            for (s, d) in columns.zip(hop["destField"].as_array().unwrap()) {
                conditions.push(format!(
                    "{left}.\"{}\" = {alias}.\"{}\"",
                    s.as_str().unwrap(),
                    d.as_str().unwrap()
                ));
            }
            left = alias;
        }
        (from, conditions.join(" AND "))
    }

    fn condition(&mut self, table: &str, t: &str, c: &Value) -> String {
        for (key, word, empty) in [("and", " AND ", "TRUE"), ("or", " OR ", "FALSE")] {
            if let Some(list) = c[key].as_array() {
                let parts: Vec<String> = list.iter().map(|c| self.condition(table, t, c)).collect();
                let all = if parts.is_empty() { empty.to_owned() } else { parts.join(word) };
                return format!("({all})");
            }
        }
        if let Some(cmp) = c["cmp"].as_array() {
            return compare(t, cmp[0].as_str().unwrap(), cmp[1].as_str().unwrap(), &cmp[2]);
        }
        let name = c["exists"].as_str().unwrap();
        let hops = self.hops(table, name);
        let child = self.alias();
        let table = hops.last().unwrap()["destTable"].as_str().unwrap().to_owned();
        let (from, mut join) = self.source(&table, &child, Some(Join { parent: t, hops: &hops }));
        if !c["spec"]["where"].is_null() {
            join = format!("{join} AND {}", self.condition(&table, &child, &c["spec"]["where"]));
        }
        format!("EXISTS (SELECT 1 FROM {from} WHERE {join})")
    }

    /// The order, completed by the primary key: (column, descending).
    fn order(&self, table: &str, spec: &Value) -> Vec<(String, bool)> {
        let mut order: Vec<(String, bool)> = Vec::new();
        for pair in spec["orderBy"].as_array().into_iter().flatten() {
            order.push((pair[0].as_str().unwrap().to_owned(), pair[1] == "desc"));
        }
        for key in self.schema["tables"][table]["primaryKey"].as_array().unwrap() {
            let key = key.as_str().unwrap();
            if !order.iter().any(|(c, _)| c == key) {
                order.push((key.to_owned(), false));
            }
        }
        order
    }
}

#[derive(Clone, Copy)]
struct Join<'a> {
    parent: &'a str,
    hops: &'a [Value],
}

/// Text compares by code point, everywhere.
fn sortable(t: &str, column: &str, kind: &str) -> String {
    let collate = if kind == "string" { " COLLATE \"C\"" } else { "" };
    format!("{t}.\"{column}\"{collate}")
}

/// A column as the client sees it. Test schemas use text, numbers, booleans and jsonb only.
fn wire(t: &str, column: &str, _kind: &str) -> String {
    format!("{t}.\"{column}\"")
}

fn literal(v: &Value) -> String {
    match v {
        Value::Null => "NULL".to_owned(),
        Value::String(s) => format!("'{}'", s.replace('\'', "''")),
        other => other.to_string(),
    }
}

fn compare(t: &str, column: &str, op: &str, right: &Value) -> String {
    let left = format!("{t}.\"{column}\"");
    let list = |v: &Value| v.as_array().unwrap().iter().map(literal).collect::<Vec<_>>().join(", ");
    let inner = match op {
        "IS" => return format!("({left} IS NOT DISTINCT FROM {})", literal(right)),
        "IS NOT" => return format!("({left} IS DISTINCT FROM {})", literal(right)),
        "IN" if right.as_array().is_some_and(Vec::is_empty) => "FALSE".to_owned(),
        "NOT IN" if right.as_array().is_some_and(Vec::is_empty) => format!("{left} IS NOT NULL"),
        "IN" | "NOT IN" => format!("{left} {op} ({})", list(right)),
        "LIKE" | "NOT LIKE" | "ILIKE" | "NOT ILIKE" => format!("{left} {op} {}", literal(right)),
        "<" | ">" | "<=" | ">=" if right.is_string() => {
            format!("{left} COLLATE \"C\" {op} {}", literal(right))
        }
        _ => format!("{left} {op} {}", literal(right)),
    };
    format!("coalesce({inner}, FALSE)")
}

/// Rows at or after the cursor in the completed order; missing cursor columns are null.
fn start(
    t: &str,
    order: &[(String, bool)],
    start: &Value,
    columns: &serde_json::Map<String, Value>,
) -> String {
    let mut branches = Vec::new();
    for i in 0..order.len() {
        let mut parts: Vec<String> = order[..i]
            .iter()
            .map(|(c, _)| format!("{t}.\"{c}\" IS NOT DISTINCT FROM {}", literal(&start["row"][c])))
            .collect();
        let (column, descending) = &order[i];
        let left = sortable(t, column, columns[column].as_str().unwrap());
        let value = &start["row"][column];
        parts.push(match (value.is_null(), descending) {
            (true, false) => format!("{left} IS NOT NULL"),
            (true, true) => "FALSE".to_owned(),
            (false, false) => format!("coalesce({left} > {}, FALSE)", literal(value)),
            (false, true) => format!("coalesce({left} < {}, TRUE)", literal(value)),
        });
        branches.push(format!("({})", parts.join(" AND ")));
    }
    if start["inclusive"] == true {
        let equal: Vec<String> = order
            .iter()
            .map(|(c, _)| format!("{t}.\"{c}\" IS NOT DISTINCT FROM {}", literal(&start["row"][c])))
            .collect();
        branches.push(format!("({})", equal.join(" AND ")));
    }
    format!("({})", branches.join(" OR "))
}
