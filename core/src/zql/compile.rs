//! AST → [`Plan`]: names become positions, literals become parameters, and everything that SQL
//! and the predicate would answer differently is decided here, once.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ast::Ast;
use crate::ivm::plan::{Param, Plan};
use crate::schema::Schema;

/// Row-identity keys of a client schema (server names): table → primary key columns. Tables not
/// named use [`crate::schema::TableSpec::primary_key`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct IdentityKeys(pub BTreeMap<Arc<str>, Vec<Arc<str>>>);

/// Why a query has no plan. The query fails alone; the text goes to the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// The compiler does not know this construct yet.
    #[error("query of table \"{table}\" cannot be compiled: {cause}")]
    Unsupported {
        /// Root table.
        table: String,
        /// What.
        cause: String,
    },
}

/// Compiles a query.
///
/// # Errors
/// [`CompileError`], naming query table, column and cause.
pub fn compile(
    ast: &Ast,
    schema: &Schema,
    keys: &IdentityKeys,
) -> Result<(Plan, Vec<Param>), CompileError> {
    let _ = (schema, keys);
    Err(CompileError::Unsupported {
        table: ast.table.clone(),
        cause: "the compiler is not built yet".into(),
    })
}
