//! The runtime façade: the only module of the project that names the async runtime (monoio).
//!
//! ```text
//!   main thread ── Executors::spawn ──▶ executor 0 … N-1   (pinned threads, one ring/epoll each)
//!   any thread  ── ring::Producer ────▶ ring::LocalConsumer on an executor (eventfd doorbell)
//!   executor i  ── MeshSender ────────▶ MeshReceiver of executor j (accepted sockets, hand-over)
//!   kernel      ── signals ───────────▶ plain thread, as values
//! ```
//!
//! Invariants worth naming:
//! - An executor's state never leaves its thread: everything here but ring ends, [`Mesh`] nodes,
//!   bound listeners and raw sockets is `!Send`.
//! - Threads talk through bounded SPSC rings only; a full ring hands the value back, it never
//!   blocks. No cross-thread waker of the runtime is used.
//! - Waiting for data means waiting for *readiness*: an idle connection holds no read buffer, and
//!   dropping a read loses no bytes. Data is then read into one buffer shared by the executor.
//! - Buffers being written belong to the kernel operation until it completes, also when the future
//!   that started it is dropped.
//! - A task that panics ends alone: its [`JoinHandle`] says so, the executor goes on.
//!
//! io_uring where the kernel allows it, epoll elsewhere; see [`BackendChoice`].

mod backend;
mod doorbell;
mod executor;
mod files;
pub mod local;
mod mesh;
pub mod ring;
pub mod signal;
mod stream;
mod task;
mod time;

pub use backend::{Backend, BackendChoice, RtError, Slices, block_on, slices};
pub use doorbell::{Doorbell, LocalDoorbell, Ringer};
pub use executor::{ExecutorCtx, ExecutorFailure, Executors, RtConfig, StopHandle, allowed_cpus};
pub use files::reserve_files;
pub use mesh::{Mesh, MeshReceiver, MeshSender};
pub use stream::{BoundListener, Chunk, LISTEN_BACKLOG, Listener, RawStream, Stream, bind_group};
pub use task::{JoinHandle, TaskPanicked, spawn, yield_now};
pub use time::{Elapsed, Instant, now, sleep, sleep_until, timeout};
