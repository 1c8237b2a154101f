//! ZQL: the query AST, its exact semantics, and its compilation to plans.

pub mod like;
