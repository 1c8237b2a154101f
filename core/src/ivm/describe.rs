//! A plan as a line of text for people: `/statz` and logs. Literals are left out.

use std::fmt::{self, Display};

use super::plan::{Condition, Direction, Node, NodeId, Op, Plan};

/// Longest description, in bytes; what is beyond is cut.
pub const MAX_DESCRIPTION_BYTES: usize = 400;

/// `issue where (open = ? and exists (label where name = ?)) order by created desc, id asc limit 20
/// { comments… }`: tables by their replica names.
pub fn describe(plan: &Plan) -> String {
    let mut text = format!("{}", Described { plan, node: Plan::ROOT });
    if text.len() > MAX_DESCRIPTION_BYTES {
        let mut end = MAX_DESCRIPTION_BYTES;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text
}

struct Described<'a> {
    plan: &'a Plan,
    node: NodeId,
}

impl Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let node = self.plan.node(self.node);
        f.write_str(&node.table.name)?;
        if node.condition != Condition::Const(true) {
            f.write_str(" where ")?;
            self.condition(f, node, &node.condition)?;
        }
        if node.start.is_some() {
            f.write_str(" start")?;
        }
        if let Some(limit) = node.limit {
            for (i, &(column, direction)) in node.order.iter().enumerate() {
                f.write_str(if i > 0 { ", " } else { " order by " })?;
                f.write_str(name(node, column))?;
                f.write_str(if direction == Direction::Asc { " asc" } else { " desc" })?;
            }
            write!(f, " limit {limit}")?;
        }
        for (i, edge) in node.related.iter().enumerate() {
            f.write_str(if i > 0 { ", " } else { " { " })?;
            Described { plan: self.plan, node: edge.child }.fmt(f)?;
        }
        f.write_str(if node.related.is_empty() { "" } else { " }" })
    }
}

impl Described<'_> {
    fn condition(&self, f: &mut fmt::Formatter<'_>, node: &Node, c: &Condition) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, all: &[Condition], between: &str| {
            for (i, c) in all.iter().enumerate() {
                f.write_str(if i > 0 { between } else { "(" })?;
                self.condition(f, node, c)?;
            }
            f.write_str(")")
        };
        match c {
            Condition::Const(truth) => write!(f, "{truth}"),
            Condition::And(all) => list(f, all, " and "),
            Condition::Or(any) => list(f, any, " or "),
            Condition::Simple(s) => write!(f, "{} {}", name(node, s.column), operator(s.op)),
            Condition::Exists(e) => {
                f.write_str(if e.negated { "not exists (" } else { "exists (" })?;
                Described { plan: self.plan, node: e.child }.fmt(f)?;
                f.write_str(")")
            }
        }
    }
}

fn name(node: &Node, column: usize) -> &str {
    node.table.columns.get(column).map_or("?", |c| &*c.name)
}

fn operator(op: Op) -> &'static str {
    match op {
        Op::Eq => "= ?",
        Op::Ne => "!= ?",
        Op::Is => "is ?",
        Op::IsNot => "is not ?",
        Op::IsNull => "is null",
        Op::IsNotNull => "is not null",
        Op::Lt => "< ?",
        Op::Gt => "> ?",
        Op::Le => "<= ?",
        Op::Ge => ">= ?",
        Op::In => "in ?",
        Op::NotIn => "not in ?",
        Op::Like => "like ?",
        Op::NotLike => "not like ?",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::schema::{ColumnSpec, Schema, TableId, TableSpec, UniqueKey, ValueType};
    use crate::version::StateVersion;
    use crate::zql::compile::{IdentityKeys, compile};

    #[test]
    fn a_plan_reads_like_its_query() {
        let column = |name: &str| ColumnSpec {
            name: name.into(),
            value_type: ValueType::String,
            nullable: false,
            upstream_type: "text".into(),
        };
        let table = TableSpec {
            id: TableId(0),
            name: "issue".into(),
            columns: vec![column("id"), column("parent")],
            primary_key: vec![0],
            replica_key: vec![0],
            unique_keys: vec![UniqueKey { columns: vec![0], not_null: true }],
            min_row_version: StateVersion::zero(),
            indexes: vec![],
        };
        let tables = [(table.name.clone(), Arc::new(table))].into_iter().collect();
        let schema = Schema { tables, ..Schema::default() };
        let edge = |subquery: serde_json::Value| {
            serde_json::json!({"correlation":{"parentField":["id"],"childField":["parent"]},
                "subquery":subquery})
        };
        let equal = serde_json::json!({"type":"simple","op":"=","left":{"type":"column",
            "name":"parent"},"right":{"type":"literal","value":"x"}});
        let ast = serde_json::json!({"table":"issue","limit":20,"orderBy":[["parent","desc"]],
            "where":{"type":"and","conditions":[equal,{"type":"correlatedSubquery",
                "op":"NOT EXISTS","related":edge(serde_json::json!({"table":"issue"}))}]},
            "related":[edge(serde_json::json!({"table":"issue","alias":"children"}))]});
        let ast = serde_json::from_value(ast).unwrap();
        let (plan, _) = compile(&ast, &schema, &IdentityKeys::default()).unwrap();
        assert_eq!(
            describe(&plan),
            "issue where (parent = ? and not exists (issue)) order by parent desc, id asc \
             limit 20 { issue }"
        );
    }
}
