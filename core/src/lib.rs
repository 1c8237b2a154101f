//! Everything of zeroring that is pure: values and rows, the protocol, ZQL, the incremental
//! engine, the CVR model and the client-group state machine.
//!
//! No I/O, no clock, no threads, no randomness: time and ids are arguments. That is what lets a
//! seeded simulator drive groups and engines millions of steps a minute. Data enters as
//! [`change::Commit`]s and protocol messages, and leaves as patches and effects.

pub mod auth;
pub mod change;
pub mod client_schema;
pub mod cvr;
pub mod group;
pub mod ivm;
pub mod json;
mod owners;
pub mod protocol;
pub mod row;
pub mod schema;
pub mod text;
pub mod value;
pub mod version;
pub mod waste;
pub mod zql;
