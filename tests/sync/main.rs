//! The sync service over real sockets, as the conformance checklist of the protocol asks for it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod fairness;
mod handshake;
mod held_store;
mod large;
mod lifecycle;
mod many;
mod pokes;
mod queries;
mod replica;
mod roaming;
mod support;
mod takeover;
