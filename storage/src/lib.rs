//! Durable state: the SQLite replica and its change log, and the CVR stores.
//!
//! Data enters as `core::change::message`s (the replica's writer) and CVR flushes; it leaves as
//! `Commit`s, as rows of a snapshot (an `ivm::source::Source`), and as loaded CVRs.

pub mod changelog;
pub mod cvr_store;
pub mod replica;
