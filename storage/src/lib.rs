//! Durable state: the SQLite replica and its change log, and the CVR stores.
//!
//! Data enters as `core::change::message`s (the replica's writer) and CVR flushes; it leaves as
//! `Commit`s, as rows of a snapshot (an `ivm::source::Source`), and as loaded CVRs.

// Unit tests share the worlds of the integration tests.
#[cfg(test)]
extern crate self as zeroring_storage;

pub mod changelog;
pub mod cvr_store;
pub mod replica;
