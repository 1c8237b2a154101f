//! The server: roles, replication core, executors, endpoints. See `docs/architecture.md`.

pub mod api;
pub mod demo;
pub mod mutations;
pub mod node;
pub mod ops;
pub mod options;
pub mod queries;
pub mod replication;
pub mod stages;
pub mod sync;
