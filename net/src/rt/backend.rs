//! Which kernel interface drives an executor, and how it is chosen.

use std::cell::{Cell, OnceCell};
use std::future::Future;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use monoio::time::TimeDriver;
use monoio::{IoUringDriver, LegacyDriver, RuntimeBuilder};

use super::task::Yielder;

/// Submission queue entries of an executor's ring: enough for one operation on each of a few
/// thousand sockets between two submissions. The kernel clamps nothing: a ring of this size needs
/// about 0.6 MiB.
const URING_ENTRIES: u32 = 4096;

/// Capacity of the event list of one `epoll_wait`.
const EPOLL_ENTRIES: u32 = 4096;

/// What the operator asks for (`ZERO_IO_BACKEND`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackendChoice {
    /// io_uring where it works, else epoll; the log says which.
    #[default]
    Auto,
    /// io_uring or a start-up error.
    Uring,
    /// epoll.
    Epoll,
}

impl FromStr for BackendChoice {
    type Err = RtError;

    fn from_str(s: &str) -> Result<Self, RtError> {
        match s {
            "auto" => Ok(BackendChoice::Auto),
            "uring" | "io_uring" => Ok(BackendChoice::Uring),
            "epoll" => Ok(BackendChoice::Epoll),
            other => Err(RtError::BadBackend(other.to_owned())),
        }
    }
}

/// What an executor runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// io_uring: submissions of a tick go to the kernel in one system call.
    Uring,
    /// epoll: one system call per operation.
    Epoll,
}

impl Backend {
    /// `uring` or `epoll`, as in logs and `/statz`.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Uring => "uring",
            Backend::Epoll => "epoll",
        }
    }
}

/// Why executors could not be started.
#[derive(Debug, thiserror::Error)]
pub enum RtError {
    /// The configured backend does not exist.
    #[error("I/O backend {0:?} is unknown: use auto, uring or epoll (ZERO_IO_BACKEND)")]
    BadBackend(String),
    /// `uring` was demanded and the kernel refuses it.
    #[error(
        "io_uring is not available: {0}. Usual causes: a seccomp filter (the default of most \
         container runtimes) forbids io_uring_setup, the sysctl kernel.io_uring_disabled is not 0, \
         RLIMIT_MEMLOCK is too small (ENOMEM, kernels before 5.12), or the kernel is older than \
         5.11. Allow it, or set ZERO_IO_BACKEND=auto to fall back to epoll"
    )]
    UringUnavailable(io::Error),
    /// The epoll driver could not be made.
    #[error("epoll is not available: {0}. Usual cause: the limit of open files (ulimit -n)")]
    EpollUnavailable(io::Error),
    /// A thread could not be started or pinned.
    #[error("executor {index}: {cause}")]
    Thread {
        /// The executor.
        index: usize,
        /// What failed.
        cause: io::Error,
    },
    /// The configuration asks for the impossible.
    #[error("runtime configuration: {0}")]
    Config(String),
}

/// What the thread of an executor knows about itself.
pub(super) struct ThreadState {
    pub backend: Backend,
    pub yielder: OnceCell<Yielder>,
    pub read_buffer: Cell<Vec<u8>>,
    /// Buffers that kernel operations hold at the moment.
    pub writes_in_flight: Cell<usize>,
    /// How long tasks kept the thread.
    pub slices: Cell<Slices>,
}

/// A task that runs longer than this keeps the others of its executor waiting noticeably.
const LONG_SLICE: Duration = Duration::from_millis(2);

/// How long the tasks of an executor ran before they gave way, since its start. Wall time: on a
/// machine without a free CPU it includes what the thread waited for one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Slices {
    /// How many.
    pub count: u64,
    /// How many took longer than 2 ms.
    pub long: u64,
    /// The longest.
    pub longest: Duration,
}

impl Slices {
    /// With one more.
    pub(super) fn and(self, slice: Duration) -> Slices {
        Slices {
            count: self.count + 1,
            long: self.long + u64::from(slice > LONG_SLICE),
            longest: self.longest.max(slice),
        }
    }
}

/// How long the tasks of this thread's executor ran; all zero on any other thread.
pub fn slices() -> Slices {
    with_state(|s| s.slices.get()).unwrap_or_default()
}

thread_local! {
    static STATE: OnceCell<ThreadState> = const { OnceCell::new() };
}

/// Runs `f` with the state of this executor thread; `None` on any other thread.
pub(super) fn with_state<R>(f: impl FnOnce(&ThreadState) -> R) -> Option<R> {
    STATE.try_with(|s| s.get().map(f)).ok().flatten()
}

/// The backend of the executor that runs on this thread.
pub(super) fn current_backend() -> Option<Backend> {
    with_state(|s| s.backend)
}

/// A built runtime of either kind.
pub(super) enum Runtime {
    Uring(monoio::Runtime<TimeDriver<IoUringDriver>>),
    Epoll(monoio::Runtime<TimeDriver<LegacyDriver>>),
}

impl Runtime {
    pub fn build(choice: BackendChoice) -> Result<Runtime, RtError> {
        match choice {
            BackendChoice::Epoll => Self::build_epoll(),
            BackendChoice::Uring => Self::build_uring().map_err(RtError::UringUnavailable),
            BackendChoice::Auto => match Self::build_uring() {
                Ok(runtime) => Ok(runtime),
                Err(cause) => {
                    tracing::info!(%cause, "io_uring is not available, using epoll");
                    Self::build_epoll()
                }
            },
        }
    }

    fn build_uring() -> io::Result<Runtime> {
        let built = RuntimeBuilder::<IoUringDriver>::new()
            .with_entries(URING_ENTRIES)
            .enable_timer()
            .build()?;
        if !monoio::utils::detect_uring() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel lacks operations that are needed (or \
                 MONOIO_FORCE_LEGACY_DRIVER is set)",
            ));
        }
        Ok(Runtime::Uring(built))
    }

    fn build_epoll() -> Result<Runtime, RtError> {
        RuntimeBuilder::<LegacyDriver>::new()
            .with_entries(EPOLL_ENTRIES)
            .enable_timer()
            .build()
            .map(Runtime::Epoll)
            .map_err(RtError::EpollUnavailable)
    }

    pub fn backend(&self) -> Backend {
        match self {
            Runtime::Uring(_) => Backend::Uring,
            Runtime::Epoll(_) => Backend::Epoll,
        }
    }

    /// Runs `future` and the tasks it spawns until it is done. Once per thread.
    pub fn run<F: Future>(mut self, future: F) -> F::Output {
        let backend = self.backend();
        STATE.with(|s| {
            let state = ThreadState {
                backend,
                yielder: OnceCell::new(),
                read_buffer: Cell::new(Vec::new()),
                writes_in_flight: Cell::new(0),
                slices: Cell::default(),
            };
            // A thread keeps its first state; `run` is private and called once per thread.
            let _ = s.set(state);
        });
        let output = match &mut self {
            Runtime::Uring(r) => r.block_on(future),
            Runtime::Epoll(r) => r.block_on(future),
        };
        // The driver frees the buffers of unfinished operations without waiting for the kernel,
        // which may still read them. The process is about to end: keep them for ever instead.
        if with_state(|s| s.writes_in_flight.get()).unwrap_or(0) > 0 {
            std::mem::forget(self);
        }
        output
    }
}

/// Runs `future` on a runtime of its own, on a new thread, and waits for it: for tests and small
/// tools.
///
/// # Errors
/// The backend is not available, or the thread cannot be started.
pub fn block_on<T, F, Fut>(choice: BackendChoice, make: F) -> Result<T, RtError>
where
    T: Send + 'static,
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = T>,
{
    let thread = std::thread::Builder::new()
        .name("zr-block-on".to_owned())
        .spawn(move || Runtime::build(choice).map(|runtime| runtime.run(async { make().await })))
        .map_err(|cause| RtError::Thread { index: 0, cause })?;
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
