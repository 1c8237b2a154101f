//! The server's own two queries of every group (spec: view-syncer-cvr §1.3): the group's last
//! mutation ids, and the results of its mutations.

use std::sync::Arc;

use super::{ClientGroupId, Query, QueryBody, QueryHash};
use crate::zql::ast::{Ast, Condition, Direction, Literal, Op, Operand, Simple};

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
    let ast = ast(&shard.clients, of_group(group), &["clientGroupID", "clientID"]);
    Query::new(LMIDS.into(), QueryBody::Internal { ast: Arc::new(ast) })
}

/// The query for mutation results.
pub fn mutation_results(group: &ClientGroupId, shard: &ShardTables) -> Query {
    let condition = Condition::And { conditions: vec![of_group(group)] };
    let ast = ast(&shard.mutations, condition, &["clientGroupID", "clientID", "mutationID"]);
    Query::new(MUTATION_RESULTS.into(), QueryBody::Internal { ast: Arc::new(ast) })
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
