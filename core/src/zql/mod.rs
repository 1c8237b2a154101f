//! ZQL: the query AST, its exact semantics, and its compilation to plans.
//!
//! An AST comes in from a client, the CVR or the query endpoint ([`ast`]), is made safe by
//! [`crate::auth`] (client queries only), named by [`hash`], and compiled by [`compile`] into a
//! plan and its parameters. [`predicate`], [`order`] and [`like`] are the one definition of what a
//! plan means in memory; `zeroring-storage` compiles the same plan to SQL, and tests hold the two
//! together.

pub mod ast;
pub mod compile;
pub mod like;
pub mod order;
pub mod predicate;
