//! Read permissions of client-defined queries (deprecated in Zero, still deployed).
//!
//! A rules document comes in from the replica's `<app>.permissions` row ([`rules`]); a client's AST
//! goes in and comes out with the rules merged and its parameters bound ([`transform`]). Queries
//! of the query endpoint and internal queries never pass through here.
//!
//! Invariant: without a rule that says otherwise nothing is readable, at the root, in related
//! queries and in EXISTS bodies alike. The bodies inside rules are not extended by rules again.
//!
//! Spec: zql-ivm §1.7–1.8, operations §6.2–6.3.

pub mod rules;
pub mod transform;

pub use rules::{Permissions, PermissionsError};
pub use transform::{BindError, Transformed, bind, transform};
