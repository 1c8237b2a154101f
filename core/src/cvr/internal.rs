//! The server's own two queries of every group (spec: view-syncer-cvr §1.3): the group's last
//! mutation ids, and the results of its mutations.

use std::sync::Arc;

use super::{ClientGroupId, Query, QueryBody, QueryHash};
use crate::zql::ast::{Ast, Condition, Direction, Literal, Op, Operand, Simple};
use crate::zql::hash;

/// Id of the query for last mutation ids.
pub const LMIDS: &str = "lmids";
/// Id of the query for mutation results.
pub const MUTATION_RESULTS: &str = "mutationResults";

/// Names of the shard's tables in the replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardTables {
    /// `{app}_{shard}.clients`.
    pub clients: Arc<str>,
    /// `{app}_{shard}.mutations`.
    pub mutations: Arc<str>,
}

impl ShardTables {
    /// The tables of shard `shard` of `app`.
    pub fn new(app: &str, shard: u32) -> ShardTables {
        ShardTables {
            clients: format!("{app}_{shard}.clients").into(),
            mutations: format!("{app}_{shard}.mutations").into(),
        }
    }
}

/// True for an id that clients may not use.
pub fn is_internal_id(id: &QueryHash) -> bool {
    matches!(id.as_str(), LMIDS | MUTATION_RESULTS)
}

/// The query for last mutation ids.
pub fn lmids(group: &ClientGroupId, shard: &ShardTables) -> Query {
    let ast = Arc::new(lmids_ast(group, shard));
    Query::new(LMIDS.into(), QueryBody::Internal { ast })
}

/// The query for mutation results.
pub fn mutation_results(group: &ClientGroupId, shard: &ShardTables) -> Query {
    let ast = Arc::new(mutation_results_ast(group, shard));
    Query::new(MUTATION_RESULTS.into(), QueryBody::Internal { ast })
}

fn lmids_ast(group: &ClientGroupId, shard: &ShardTables) -> Ast {
    ast(&shard.clients, of_group(group), &["clientGroupID", "clientID"])
}

fn mutation_results_ast(group: &ClientGroupId, shard: &ShardTables) -> Ast {
    let condition = Condition::And { conditions: vec![of_group(group)] };
    ast(&shard.mutations, condition, &["clientGroupID", "clientID", "mutationID"])
}

/// Transformation hashes of internal queries: those of two groups are hashes of the same text but
/// for the group's id, and a server makes two for every group that comes up.
#[derive(Debug)]
pub struct InternalHashes([Template; 2]);

/// An internal query of any group.
#[derive(Debug)]
struct Template {
    /// Of a group with the id [`SOME_GROUP`].
    ast: Ast,
    /// What is hashed, before and after the group's id.
    before: String,
    after: String,
}

/// An id that stands for all: nothing else in the texts contains it.
const SOME_GROUP: &str = "\u{1}group\u{1}";

impl InternalHashes {
    /// For the queries of a shard.
    pub fn new(shard: &ShardTables) -> InternalHashes {
        let group = ClientGroupId::from(SOME_GROUP);
        let asts = [lmids_ast(&group, shard), mutation_results_ast(&group, shard)];
        InternalHashes(asts.map(|ast| {
            let text = hash::stored_text(&ast);
            let (before, after) = text.split_once(&json_text(SOME_GROUP)).unwrap_or((&text, ""));
            Template { before: before.to_owned(), after: after.to_owned(), ast }
        }))
    }

    /// The hash of an internal query, [`hash::stored`].
    pub fn of(&self, ast: &Ast) -> String {
        let known = self.0.iter().find(|template| template.ast.table == ast.table);
        let (Some(template), Some(group)) = (known, group_of(ast)) else {
            return hash::stored(ast);
        };
        if !template.is_of(ast, group) {
            return hash::stored(ast);
        }
        let text = [&*template.before, &json_text(group), &*template.after].concat();
        hash::base36(hash::h64(text.as_bytes()))
    }
}

impl Template {
    /// Whether a query is this one for the group.
    fn is_of(&self, ast: &Ast, group: &str) -> bool {
        let mut same = self.ast.clone();
        if let Some(literal) = same.condition.as_mut().and_then(literal_mut) {
            *literal = Literal::String(group.to_owned());
        }
        same == *ast
    }
}

fn json_text(group: &str) -> String {
    crate::zql::js::stringify(&serde_json::Value::from(group))
}

/// The group that an internal query is about.
fn group_of(ast: &Ast) -> Option<&str> {
    let simple = match ast.condition.as_ref()? {
        Condition::And { conditions } => conditions.first()?,
        simple => simple,
    };
    match simple {
        Condition::Simple(Simple {
            right: Operand::Literal { value: Literal::String(group) },
            ..
        }) => Some(group),
        _ => None,
    }
}

fn literal_mut(condition: &mut Condition) -> Option<&mut Literal> {
    match condition {
        Condition::And { conditions } => literal_mut(conditions.first_mut()?),
        Condition::Simple(Simple { right: Operand::Literal { value }, .. }) => Some(value),
        _ => None,
    }
}

fn of_group(group: &ClientGroupId) -> Condition {
    Condition::Simple(Simple {
        op: Op::Eq,
        left: Operand::Column { name: "clientGroupID".into() },
        right: Operand::Literal { value: Literal::String(group.to_string()) },
    })
}

fn ast(table: &str, condition: Condition, order: &[&str]) -> Ast {
    Ast {
        schema: Some(String::new()),
        table: table.to_owned(),
        condition: Some(condition),
        order_by: Some(order.iter().map(|c| ((*c).to_owned(), Direction::Asc)).collect()),
        ..Ast::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn asts_of_the_spec() {
        let shard = ShardTables::new("zero", 0);
        let text = |q: Query| match q.body {
            QueryBody::Internal { ast } => serde_json::to_value(&*ast).unwrap(),
            other => panic!("{other:?}"),
        };
        let of_group = json!({"type": "simple", "left": {"type": "column", "name": "clientGroupID"},
            "op": "=", "right": {"type": "literal", "value": "cg1"}});
        assert_eq!(
            text(lmids(&"cg1".into(), &shard)),
            json!({"schema": "", "table": "zero_0.clients", "where": of_group,
                "orderBy": [["clientGroupID", "asc"], ["clientID", "asc"]]})
        );
        assert_eq!(
            text(mutation_results(&"cg1".into(), &shard)),
            json!({"schema": "", "table": "zero_0.mutations",
                "where": {"type": "and", "conditions": [of_group]},
                "orderBy": [["clientGroupID", "asc"], ["clientID", "asc"], ["mutationID", "asc"]]})
        );
    }

    #[test]
    fn hashes_by_template_are_those_of_the_whole_query() {
        let shard = ShardTables::new("zero", 3);
        let hashes = InternalHashes::new(&shard);
        for group in
            ["cg1", "", "\"\\\n\u{7f}", "\u{1f600}\u{2028}", SOME_GROUP, "a\u{1}group\u{1}"]
        {
            for query in [lmids(&group.into(), &shard), mutation_results(&group.into(), &shard)] {
                let QueryBody::Internal { ast } = query.body else { panic!("{:?}", query.id) };
                assert_eq!(hashes.of(&ast), hash::stored(&ast), "{group:?}");
                // One that merely resembles it.
                let other = Ast { limit: Some(1.0), ..(*ast).clone() };
                assert_eq!(hashes.of(&other), hash::stored(&other));
                let other = Ast { condition: None, ..(*ast).clone() };
                assert_eq!(hashes.of(&other), hash::stored(&other));
            }
        }
    }

    #[test]
    fn their_hashes_are_those_of_a_reloaded_original() {
        let shard = ShardTables::new("zero", 0);
        for (query, hash) in [
            (lmids(&"cg1".into(), &shard), "26xwqx0nntqrk"),
            (mutation_results(&"cg1".into(), &shard), "28zncz4ps1kwt"),
        ] {
            let QueryBody::Internal { ast } = query.body else { panic!("{:?}", query.id) };
            assert_eq!(crate::zql::hash::stored(&ast), hash);
            let text = serde_json::to_string(&*ast).unwrap();
            let reloaded = serde_json::from_str(&text).unwrap();
            assert_eq!(crate::zql::hash::stored(&reloaded), hash);
        }
    }
}
