//! Start-up, life and end of the process: who starts whom.
//!
//! ```text
//!  main thread: cli ─▶ options ─▶ logging ─▶ replication core (1 thread) ─▶ executors (N threads)
//!                                     ▲                                          │
//!               signals, heartbeat ───┴── waits; drains in the reverse order ◀───┘
//! ```
//!
//! - [`cli`]: words to subcommands; usage; options errors.
//! - [`run`]: the start-up order, the waiting, the end.
//! - [`exit`]: exit codes, which orchestrators know.
//! - [`logging`]: the log.
//! - [`context`]: who this node is.
//! - `capacity`: `zeroring capacity`, which asks a running node.
//!
//! Invariants: the port opens only when clients can be served; nothing that is acknowledged is
//! lost by any way of ending; the exit code says who ended the process.

mod capacity;
pub mod cli;
pub mod context;
pub mod exit;
pub mod logging;
mod purge;
pub mod run;
mod serve;

pub use exit::Exit;
