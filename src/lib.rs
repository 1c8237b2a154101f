//! The server: roles, replication core, executors, endpoints. See `docs/architecture.md`.

pub mod replication;
