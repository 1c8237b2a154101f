//! ZQL: the query AST, its exact semantics, and its compilation to plans.
//!
//! An AST comes in from a client, the CVR or the query endpoint ([`ast`]), is made safe by
//! [`crate::auth`] (client queries only), named by [`hash`], and compiled by [`compile`] into a
//! plan and its parameters. [`predicate`], [`order`] and [`like`] are the one definition of what a
//! plan means in memory; `zeroring-storage` compiles the same plan to SQL, and tests hold the two
//! together.

pub mod ast;
pub mod compile;
#[cfg(any(test, feature = "testing"))]
pub mod gen_world;
pub mod hash;
pub mod js;
pub mod like;
pub mod normalize;
pub mod order;
#[cfg(any(test, feature = "testing"))]
pub mod pg_oracle;
pub mod predicate;
