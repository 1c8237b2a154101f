//! AST → [`Plan`]: names become positions, literals become parameters, and everything that SQL
//! and the predicate would answer differently is decided here, once (spec: zql-ivm §2.10).
//!
//! Where a comparison cannot be true for any value of its types, the answer of the client's
//! predicate is folded in as a constant (`n = '1'` is false, `n != '1'` is "n is not null");
//! where the client would throw (`n < '1'`, LIKE on a number, json columns, joins of different
//! types), the query fails with an error that names table and column.
//!
//! Two passes: [`resolve`] turns the AST into a folded tree with positions, [`number`] lays the
//! tree out as a flat plan. Hints (`flip`, `scalar`) are dropped: they never change a result.

mod error;
mod number;
mod resolve;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use error::CompileError;

use super::ast::Ast;
use crate::ivm::plan::{Param, Plan};
use crate::schema::Schema;

/// Deepest nesting of query nodes (related and EXISTS). Real queries stay below ten; every level
/// costs stack in each recursion over a plan. SQLite adds up the heights of nested expressions,
/// and refuses a sum above 1,000: that fails the query, too.
pub const MAX_DEPTH: usize = 16;
/// Most query nodes of a query: bounds the size of its SQL, and of the state of one instance.
pub const MAX_NODES: usize = 256;
/// Deepest nesting of AND and OR inside one `where`: bounds recursion.
pub const MAX_CONDITION_DEPTH: usize = 32;
/// Most conditions and cursor columns of a query: bounds its parameters and its SQL text.
pub const MAX_CONDITIONS: usize = 2_000;
/// Most elements of one IN list, before duplicates are dropped.
pub const MAX_LIST: usize = 100_000;

/// Row-identity keys of a client schema (server names): table → primary key columns. Tables not
/// named use [`crate::schema::TableSpec::primary_key`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct IdentityKeys(pub BTreeMap<Arc<str>, Vec<Arc<str>>>);

/// Compiles a query that was transformed already: permissions merged, parameters bound.
///
/// # Errors
/// [`CompileError`], naming table, column and cause.
pub fn compile(
    ast: &Ast,
    schema: &Schema,
    keys: &IdentityKeys,
) -> Result<(Plan, Vec<Param>), CompileError> {
    let draft = resolve::Resolver::new(schema, keys).root(ast)?;
    Ok(number::number(draft))
}

#[cfg(test)]
mod tests;
