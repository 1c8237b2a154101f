//! Protocol-level clients, thousands a thread.
//!
//! ```text
//!  driver (plain thread) ── Command ring ──▶ worker i (an executor of net::rt)
//!                                              └─ one task a client: socket ▶ wire ▶ model
//!  driver ◀── Interval (mutex, taken every tick), gauges ── worker i
//! ```
//!
//! Invariants: a client's state is its worker's alone; the wire is the browser's (masked frames,
//! `initConnection` in the header); every poke is applied and every chain of cookies checked.

pub(crate) mod connection;
pub(crate) mod fleet;
pub(crate) mod model;
pub(crate) mod stats;
pub(crate) mod wire;
