//! Merging rules into a query, and binding its parameters.

use std::collections::BTreeSet;

use serde_json::Value;

use super::rules::Permissions;
use crate::zql::ast::{Anchor, Ast, Condition, CorrelatedSubquery, FieldPath, Literal, Operand};
use crate::zql::hash;

/// A parameter whose value is no literal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "authData.{path} is {found}; only strings, numbers, booleans, null and lists of them can be \
     compared with. Correct the token's claims or the condition."
)]
pub struct BindError {
    /// The parameter's path.
    pub path: String,
    /// What it is.
    pub found: String,
}

/// A query as it may be executed.
#[derive(Debug, Clone, PartialEq)]
pub struct Transformed {
    /// Rules merged, parameters bound.
    pub ast: Ast,
    /// Its transformation hash, [`hash::stored`].
    pub hash: String,
    /// Tables that the query reads and no rule allows to: for the log, see [`no_rules_warning`].
    pub unreadable: BTreeSet<String>,
}

/// The warning about a table without rules.
pub fn no_rules_warning(table: &str) -> String {
    format!(
        "No permission rules found for table '{table}'. No rows will be returned. Deploy rules \
         that allow it to be read, or use queries of the query endpoint."
    )
}

/// Merges the rules into every query node of a client's query and binds its parameters.
/// `claims` are those of the token, `None` for an anonymous or opaque connection.
///
/// # Errors
/// [`BindError`]: the query fails.
pub fn transform(
    ast: &Ast,
    permissions: &Permissions,
    claims: Option<&Value>,
) -> Result<Transformed, BindError> {
    let mut unreadable = BTreeSet::new();
    let mut ast = merge(ast, permissions, &mut unreadable);
    bind(&mut ast, claims, None)?;
    Ok(Transformed { hash: hash::stored(&ast), ast, unreadable })
}

fn merge(ast: &Ast, permissions: &Permissions, unreadable: &mut BTreeSet<String>) -> Ast {
    let rules = match permissions.select(&ast.table) {
        Some(policy) => policy.condition(),
        None => {
            unreadable.insert(ast.table.clone());
            Condition::never()
        }
    };
    let own = ast.condition.as_ref().map(|c| merge_condition(c, permissions, unreadable));
    let all = own.into_iter().chain([rules]).collect();
    let related = ast
        .related
        .as_ref()
        .map(|edges| edges.iter().map(|r| merge_edge(r, permissions, unreadable)).collect());
    Ast { condition: Some(simplify(Condition::And { conditions: all })), related, ..ast.clone() }
}

fn merge_edge(
    r: &CorrelatedSubquery,
    permissions: &Permissions,
    unreadable: &mut BTreeSet<String>,
) -> CorrelatedSubquery {
    let subquery = Box::new(merge(&r.subquery, permissions, unreadable));
    CorrelatedSubquery { subquery, ..r.clone() }
}

/// EXISTS bodies are merged too: otherwise they would tell about rows that cannot be read.
fn merge_condition(
    c: &Condition,
    permissions: &Permissions,
    unreadable: &mut BTreeSet<String>,
) -> Condition {
    let mut each = |list: &[Condition]| {
        list.iter().map(|c| merge_condition(c, permissions, unreadable)).collect()
    };
    match c {
        Condition::Simple(_) => c.clone(),
        Condition::And { conditions } => Condition::And { conditions: each(conditions) },
        Condition::Or { conditions } => Condition::Or { conditions: each(conditions) },
        Condition::CorrelatedSubquery(e) => {
            let mut e = e.clone();
            e.related = merge_edge(&e.related, permissions, unreadable);
            Condition::CorrelatedSubquery(e)
        }
    }
}

/// Unwraps single operands, merges nested ones of the same type; an AND with FALSE is FALSE, an OR
/// with TRUE is TRUE. Keeps FALSE (`or []`).
pub fn simplify(c: Condition) -> Condition {
    let (and, mut conditions) = match c {
        Condition::And { conditions } => (true, conditions),
        Condition::Or { conditions } => (false, conditions),
        leaf => return leaf,
    };
    if conditions.len() == 1
        && let Some(only) = conditions.pop()
    {
        return simplify(only);
    }
    let mut kept = Vec::with_capacity(conditions.len());
    for c in conditions {
        match simplify(c) {
            Condition::And { conditions } if and => kept.extend(conditions),
            Condition::Or { conditions } if !and => kept.extend(conditions),
            other => kept.push(other),
        }
    }
    let decides = if and { Condition::never() } else { Condition::always() };
    if kept.contains(&decides) {
        return decides;
    }
    if and { Condition::And { conditions: kept } } else { Condition::Or { conditions: kept } }
}

/// Replaces every parameter of a query, its related queries and EXISTS bodies by its value;
/// whatever is missing is null.
///
/// # Errors
/// [`BindError`] for a value that is an object or a list with more than scalars in it.
pub fn bind(
    ast: &mut Ast,
    claims: Option<&Value>,
    pre_mutation_row: Option<&Value>,
) -> Result<(), BindError> {
    if let Some(c) = &mut ast.condition {
        bind_condition(c, claims, pre_mutation_row)?;
    }
    for r in ast.related.iter_mut().flatten() {
        bind(&mut r.subquery, claims, pre_mutation_row)?;
    }
    Ok(())
}

fn bind_condition(
    c: &mut Condition,
    claims: Option<&Value>,
    pre_mutation_row: Option<&Value>,
) -> Result<(), BindError> {
    match c {
        Condition::And { conditions } | Condition::Or { conditions } => {
            conditions.iter_mut().try_for_each(|c| bind_condition(c, claims, pre_mutation_row))
        }
        Condition::CorrelatedSubquery(e) => bind(&mut e.related.subquery, claims, pre_mutation_row),
        Condition::Simple(s) => {
            for operand in [&mut s.left, &mut s.right] {
                if let Operand::Static { anchor, field } = operand {
                    let from = match anchor {
                        Anchor::AuthData => claims,
                        Anchor::PreMutationRow => pre_mutation_row,
                    };
                    *operand = Operand::Literal { value: resolve(from, field)? };
                }
            }
            Ok(())
        }
    }
}

fn resolve(from: Option<&Value>, field: &FieldPath) -> Result<Literal, BindError> {
    let found = field.steps().iter().try_fold(from, |v, step| match v? {
        Value::Object(map) => Some(map.get(step)),
        Value::Array(items) => Some(step.parse::<usize>().ok().and_then(|i| items.get(i))),
        _ => None,
    });
    match found.flatten() {
        None => Ok(Literal::Null),
        Some(v) => Literal::from_json(v).map_err(|_| BindError {
            path: field.steps().join("."),
            found: if v.is_object() { "an object" } else { "a list with more than scalars" }.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ivm::plan::Condition as Planned;
    use crate::zql::compile::{IdentityKeys, compile};
    use crate::zql::gen_world::{self, Choices, Shape};
    use serde_json::json;

    fn permissions() -> Permissions {
        Permissions::parse(include_str!("testdata/permissions.json")).unwrap()
    }

    /// Queries with the transformed form and the hash that release 1.9.0 computes.
    #[test]
    fn transformed_queries_equal_the_originals() {
        let claims: Value = serde_json::from_str(include_str!("testdata/claims.json")).unwrap();
        let vectors: Vec<Value> =
            serde_json::from_str(include_str!("testdata/vectors.json")).unwrap();
        assert!(vectors.len() > 30);
        for v in vectors {
            let ast: Ast = serde_json::from_value(v["in"].clone()).unwrap();
            let claims = v.get("anonymous").is_none().then_some(&claims);
            let got = transform(&ast, &permissions(), claims).unwrap();
            let want: Ast = serde_json::from_value(v["out"].clone()).unwrap();
            assert_eq!(got.ast, want, "{}", v["in"]);
            assert_eq!(hash::received(&v["out"]), v["hash"], "{}", v["in"]);
        }
    }

    #[test]
    fn without_rules_nothing_is_readable_wherever_the_table_stands() {
        for seed in 0..500 {
            let mut c = Choices::new(seed);
            let shape = Shape::default();
            let schema = gen_world::schema(&mut c, &shape);
            let ast = gen_world::ast(&mut c, &schema, &shape);
            let t = transform(&ast, &Permissions::default(), None).unwrap();
            t.ast.for_each_node(&mut |n| {
                assert_eq!(n.condition, Some(Condition::never()), "seed {seed}");
                assert!(t.unreadable.contains(&n.table));
            });
            let (plan, _) = compile(&t.ast, &schema, &IdentityKeys::default()).unwrap();
            assert_eq!(plan.nodes[0].condition, Planned::Const(false));
        }
    }

    #[test]
    fn a_missing_claim_is_null_and_an_object_is_an_error() {
        let query = |field: Value| -> Ast {
            serde_json::from_value(json!({"table":"t","where":{"type":"simple","op":"=",
                "left":{"type":"column","name":"a"},
                "right":{"type":"static","anchor":"authData","field":field}}}))
            .unwrap()
        };
        let claims = json!({"sub":"u","o":{"x":[1,"a"]},"bad":[[1]]});
        let bound = |field: Value, claims: Option<&Value>| {
            let mut ast = query(field);
            bind(&mut ast, claims, None).map(|()| match ast.condition {
                Some(Condition::Simple(s)) => s.right,
                other => panic!("{other:?}"),
            })
        };
        let literal = |value| Ok(Operand::Literal { value });
        assert_eq!(bound(json!("sub"), Some(&claims)), literal(Literal::String("u".into())));
        assert_eq!(bound(json!("sub"), None), literal(Literal::Null));
        assert_eq!(bound(json!(["o", "y", "z"]), Some(&claims)), literal(Literal::Null));
        assert_eq!(bound(json!(["o", "x", "0"]), Some(&claims)), literal(Literal::Number(1.0)));
        assert!(matches!(
            bound(json!(["o", "x"]), Some(&claims)),
            Ok(Operand::Literal { value: Literal::Array(_) })
        ));
        assert!(bound(json!("o"), Some(&claims)).is_err());
        assert!(bound(json!("bad"), Some(&claims)).is_err());
    }
}
