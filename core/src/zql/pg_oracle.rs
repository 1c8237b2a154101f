//! AST → Postgres SQL: an oracle for results that shares nothing with plans, predicates or SQLite.
//!
//! One statement returns the whole tree of rows as JSON. Differences of Postgres that the text
//! smooths out: collation (`COLLATE "C"`), the place of nulls, `NULL NOT IN ()`, numbers of
//! different types (all compared as doubles), comparisons of different types (the client's answer,
//! spec zql-ivm §2.10). ILIKE folds ASCII only: keep capitals of other alphabets out of the data.

use serde_json::Value as Json;

use super::ast::{
    Ast, Condition, CorrelatedSubquery, Direction, ExistsOp, Literal, Op, Operand, Simple, Start,
    System,
};
use super::compile::IdentityKeys;
use crate::row::Row;
use crate::schema::{Schema, TableSpec, ValueType};
use crate::value::Value;

/// A query that the oracle has no text for; only broken tests meet it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the oracle cannot compile this: {0}")]
pub struct OracleError(String);

/// A statement that returns one text: the JSON list of the query's rows. A row is
/// `[[column values], [children of each related edge]]`, edges in the order of their aliases'
/// first mention, permissions edges left out.
///
/// # Errors
/// [`OracleError`].
pub fn tree(ast: &Ast, schema: &Schema, keys: &IdentityKeys) -> Result<String, OracleError> {
    let mut o = Oracle { schema, keys, aliases: 0 };
    Ok(format!("SELECT ({})::text", o.list(ast, None)?))
}

/// `CREATE TABLE` statements of a schema made by [`super::gen_world`].
pub fn ddl(schema: &Schema) -> String {
    let mut out = String::new();
    for t in schema.tables.values() {
        let columns: Vec<String> = t
            .columns
            .iter()
            .map(|c| {
                let not_null = if c.nullable { "" } else { " NOT NULL" };
                // An extension's type, and an array whose literal form is not JSON.
                let upstream = match &*c.upstream_type {
                    "upc" => "text",
                    "int4[]" => "jsonb",
                    other => other,
                };
                format!("{} {upstream}{not_null}", ident(&c.name))
            })
            .collect();
        let names = |key: &[usize]| {
            key.iter().map(|&c| ident(&t.columns[c].name)).collect::<Vec<_>>().join(",")
        };
        out.push_str(&format!(
            "CREATE TABLE {} ({}, PRIMARY KEY ({}));\n",
            ident(&t.name),
            columns.join(", "),
            names(&t.replica_key)
        ));
    }
    out
}

/// An `INSERT` of one row.
pub fn insert(table: &TableSpec, row: &Row) -> String {
    let values: Vec<String> = row
        .values
        .iter()
        .map(|v| match v {
            Value::Null => "NULL".to_owned(),
            Value::Bool(b) => b.to_string(),
            Value::Number(n) => format!("'{n}'"),
            Value::UnsafeInt(n) => n.to_string(),
            Value::String(s) | Value::Json(s) => quote(s),
        })
        .collect();
    format!("INSERT INTO {} VALUES ({});\n", ident(&table.name), values.join(", "))
}

struct Oracle<'a> {
    schema: &'a Schema,
    keys: &'a IdentityKeys,
    aliases: usize,
}

/// One use of a table.
struct Scope<'a> {
    table: &'a TableSpec,
    alias: String,
}

impl Scope<'_> {
    /// A column, in a form in which it compares and orders as in ZQL.
    fn column(&self, name: &str) -> Result<(String, ValueType), OracleError> {
        let at = self
            .table
            .column(name)
            .ok_or_else(|| OracleError(format!("no column {name} in {}", self.table.name)))?;
        let t = self.table.columns[at].value_type;
        let plain = format!("{}.{}", self.alias, ident(name));
        let sql = match t {
            ValueType::Number => format!("{plain}::float8"),
            ValueType::String => format!("({plain}::text COLLATE \"C\")"),
            ValueType::Boolean | ValueType::Json => plain,
        };
        Ok((sql, t))
    }
}

impl<'a> Oracle<'a> {
    fn scope(&mut self, table: &str) -> Result<Scope<'a>, OracleError> {
        self.aliases += 1;
        let table =
            self.schema.table(table).ok_or_else(|| OracleError(format!("no table {table}")))?;
        Ok(Scope { table, alias: format!("t{}", self.aliases) })
    }

    /// The rows of a query as a JSON list; `join` is a condition on its alias.
    fn list(
        &mut self,
        ast: &Ast,
        parent: Option<(&Scope<'_>, &CorrelatedSubquery)>,
    ) -> Result<String, OracleError> {
        let s = self.scope(&ast.table)?;
        let columns: Vec<String> =
            s.table.columns.iter().map(|c| format!("{}.{}", s.alias, ident(&c.name))).collect();
        let mut children = Vec::new();
        for edge in by_alias(ast) {
            if edge.system != Some(System::Permissions) {
                children.push(self.list(&edge.subquery, Some((&s, edge)))?);
            }
        }
        let order = self.order(ast, &s)?;
        let by: Vec<String> = order
            .iter()
            .map(|(name, d)| {
                let direction = match d {
                    Direction::Asc => "ASC NULLS FIRST",
                    Direction::Desc => "DESC NULLS LAST",
                };
                Ok(format!("{} {direction}", s.column(name)?.0))
            })
            .collect::<Result<_, _>>()?;
        let limit = ast.limit.map_or(String::new(), |l| format!(" LIMIT {l}"));
        Ok(format!(
            "(SELECT coalesce(json_agg(x.j), '[]') FROM (SELECT json_build_array(\
             json_build_array({}), json_build_array({})) AS j FROM {} {} WHERE {} ORDER BY {}{limit}) x)",
            columns.join(", "),
            children.join(", "),
            ident(&s.table.name),
            s.alias,
            self.filter(ast, &s, parent)?,
            by.join(", "),
        ))
    }

    /// Join, cursor and `where`.
    fn filter(
        &mut self,
        ast: &Ast,
        s: &Scope<'_>,
        parent: Option<(&Scope<'_>, &CorrelatedSubquery)>,
    ) -> Result<String, OracleError> {
        let mut all = vec!["TRUE".to_owned()];
        if let Some((p, edge)) = parent {
            let c = &edge.correlation;
            for (pf, cf) in c.parent_field.iter().zip(&c.child_field) {
                all.push(format!("{} = {}", p.column(pf)?.0, s.column(cf)?.0));
            }
        }
        if let Some(start) = &ast.start {
            all.push(cursor(s, &self.order(ast, s)?, start)?);
        }
        if let Some(c) = &ast.condition {
            all.push(self.condition(s, c)?);
        }
        Ok(all.join(" AND "))
    }

    /// The order, completed by the identity key.
    fn order(&self, ast: &Ast, s: &Scope<'_>) -> Result<Vec<(String, Direction)>, OracleError> {
        let mut order: Vec<(String, Direction)> = ast.order_by.clone().unwrap_or_default();
        let key: Vec<String> = match self.keys.0.get(&s.table.name) {
            Some(key) => key.iter().map(|c| c.to_string()).collect(),
            None => {
                let name = |&c: &usize| s.table.columns[c].name.to_string();
                s.table.primary_key.iter().map(name).collect()
            }
        };
        for column in key {
            if !order.iter().any(|(c, _)| *c == column) {
                order.push((column, Direction::Asc));
            }
        }
        Ok(order)
    }

    fn condition(&mut self, s: &Scope<'_>, c: &Condition) -> Result<String, OracleError> {
        let mut join = |list: &[Condition], operator: &str, empty: &str| {
            let parts = list.iter().map(|c| self.condition(s, c)).collect::<Result<Vec<_>, _>>()?;
            Ok(if parts.is_empty() {
                empty.to_owned()
            } else {
                format!("({})", parts.join(operator))
            })
        };
        match c {
            Condition::And { conditions } => join(conditions, " AND ", "TRUE"),
            Condition::Or { conditions } => join(conditions, " OR ", "FALSE"),
            Condition::Simple(c) => simple(s, c),
            Condition::CorrelatedSubquery(e) => {
                let body = &e.related.subquery;
                let child = self.scope(&body.table)?;
                let filter = self.filter(body, &child, Some((s, &e.related)))?;
                let limit = body.limit.map_or(String::new(), |l| format!(" LIMIT {l}"));
                let not = if e.op == ExistsOp::NotExists { "NOT " } else { "" };
                Ok(format!(
                    "{not}EXISTS (SELECT 1 FROM {} {} WHERE {filter}{limit})",
                    ident(&child.table.name),
                    child.alias
                ))
            }
        }
    }
}

/// The related edges; the last definition of an alias counts, at the place of the first.
fn by_alias(ast: &Ast) -> Vec<&CorrelatedSubquery> {
    let mut edges: Vec<&CorrelatedSubquery> = Vec::new();
    for r in ast.related.iter().flatten() {
        match edges.iter_mut().find(|e| e.subquery.alias == r.subquery.alias) {
            Some(slot) => *slot = r,
            None => edges.push(r),
        }
    }
    edges
}

fn simple(s: &Scope<'_>, c: &Simple) -> Result<String, OracleError> {
    let (Operand::Column { name }, Operand::Literal { value }) = (&c.left, &c.right) else {
        return Err(OracleError("literals on the left and parameters".into()));
    };
    let (column, t) = s.column(name)?;
    let null = match t {
        ValueType::Json => format!("({column} IS NULL OR {column}::jsonb = 'null')"),
        _ => format!("({column} IS NULL)"),
    };
    let text = match (c.op, value) {
        (Op::Is, Literal::Null) => null,
        (Op::IsNot, Literal::Null) => format!("NOT {null}"),
        (_, Literal::Null) => "FALSE".to_owned(),
        (Op::In | Op::NotIn, Literal::Array(items)) => {
            let list: Vec<String> = items.iter().filter_map(|l| literal(l, t)).collect();
            match (c.op, list.is_empty()) {
                (Op::In, true) => "FALSE".to_owned(),
                (Op::In, false) => format!("{column} IN ({})", list.join(", ")),
                (_, true) => format!("NOT {null}"),
                (_, false) => format!("{column} NOT IN ({})", list.join(", ")),
            }
        }
        (Op::Like | Op::NotLike | Op::ILike | Op::NotILike, Literal::String(pattern)) => {
            format!("{column} {} {} ESCAPE '\\'", c.op.text(), quote(pattern))
        }
        (op, v) => match (op, literal(v, t)) {
            (Op::Is, Some(v)) => format!("{column} IS NOT DISTINCT FROM {v}"),
            (Op::IsNot, Some(v)) => format!("{column} IS DISTINCT FROM {v}"),
            (op, Some(v)) => format!("{column} {} {v}", op.text()),
            (Op::Eq | Op::Is, None) => "FALSE".to_owned(),
            (Op::IsNot, None) => "TRUE".to_owned(),
            (Op::Ne, None) => format!("NOT {null}"),
            (op, None) => return Err(OracleError(format!("{} across types", op.text()))),
        },
    };
    Ok(format!("coalesce({text}, FALSE)"))
}

/// A scalar literal of the column's type.
fn literal(l: &Literal, t: ValueType) -> Option<String> {
    match (l, t) {
        (Literal::Bool(b), ValueType::Boolean) => Some(b.to_string()),
        (Literal::Number(n), ValueType::Number) => Some(format!("'{n}'::float8")),
        (Literal::String(s), ValueType::String) => Some(quote(s)),
        _ => None,
    }
}

/// Rows at or after the cursor; a missing column of it is null.
fn cursor(
    s: &Scope<'_>,
    order: &[(String, Direction)],
    start: &Start,
) -> Result<String, OracleError> {
    let mut branches = Vec::new();
    let mut equal = Vec::new();
    for (name, direction) in order {
        let (column, t) = s.column(name)?;
        let json = start.row.get(name).unwrap_or(&Json::Null);
        let value = Literal::from_json(json).map_err(OracleError)?;
        let value = literal(&value, t);
        let beyond = match (&value, direction) {
            (None, Direction::Asc) => format!("{column} IS NOT NULL"),
            (None, Direction::Desc) => "FALSE".to_owned(),
            (Some(v), Direction::Asc) => format!("coalesce({column} > {v}, FALSE)"),
            (Some(v), Direction::Desc) => format!("coalesce({column} < {v}, TRUE)"),
        };
        let mut branch: Vec<String> = equal.clone();
        branch.push(beyond);
        branches.push(format!("({})", branch.join(" AND ")));
        let v = value.unwrap_or_else(|| "NULL".to_owned());
        equal.push(format!("{column} IS NOT DISTINCT FROM {v}"));
    }
    if !start.exclusive {
        branches.push(format!("({})", equal.join(" AND ")));
    }
    Ok(format!("({})", branches.join(" OR ")))
}

fn ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
