//! Executors: pinned threads, each with a runtime of its own.

use std::cell::Cell;
use std::future::Future;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::backend::{Backend, BackendChoice, RtError, Runtime};
use super::doorbell::{Doorbell, Ringer};
use super::local::Notify;
use super::task::{CatchPanic, spawn};
use super::time::now;

/// How executors are started.
#[derive(Debug, Clone, Default)]
pub struct RtConfig {
    /// Number of executors; `None` = one per CPU that the process may use.
    pub executors: Option<NonZeroUsize>,
    /// The kernel interface.
    pub backend: BackendChoice,
    /// Pin executor i to the i-th CPU that the process may use. With more executors than CPUs
    /// nothing is pinned.
    pub pin: bool,
}

impl RtConfig {
    /// The number of executors that this configuration means on this machine.
    pub fn executor_count(&self) -> usize {
        self.executors.map_or_else(|| allowed_cpus().len().max(1), NonZeroUsize::get)
    }
}

/// The CPUs that this process may use.
pub fn allowed_cpus() -> Vec<usize> {
    match sched_getaffinity(None) {
        Ok(set) => (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect(),
        Err(_) => (0..thread::available_parallelism().map_or(1, NonZeroUsize::get)).collect(),
    }
}

/// An executor that ended otherwise than by returning.
#[derive(Debug, Clone, thiserror::Error)]
#[error("executor {index} failed: {message}")]
pub struct ExecutorFailure {
    /// Which one.
    pub index: usize,
    /// The panic's message.
    pub message: String,
}

/// What the main future of an executor is given.
#[derive(Clone)]
pub struct ExecutorCtx {
    index: usize,
    count: usize,
    backend: Backend,
    stop: Rc<StopLocal>,
}

struct StopLocal {
    stopping: Cell<bool>,
    notify: Notify,
}

impl ExecutorCtx {
    /// The number of this executor, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many executors there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The kernel interface in use.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Whether the process was asked to stop.
    pub fn is_stopping(&self) -> bool {
        self.stop.stopping.get()
    }

    /// Completes when the process is asked to stop (at once if it was already).
    pub async fn stopped(&self) {
        while !self.stop.stopping.get() {
            self.stop.notify.notified().await;
        }
    }
}

struct StopShared {
    stopping: AtomicBool,
    ringers: Vec<Ringer>,
}

/// Asks all executors to stop, from any thread.
#[derive(Clone)]
pub struct StopHandle(Arc<StopShared>);

impl StopHandle {
    /// Makes [`ExecutorCtx::stopped`] complete on every executor.
    pub fn stop(&self) {
        self.0.stopping.store(true, Ordering::Release);
        for ringer in &self.0.ringers {
            ringer.ring();
        }
    }

    /// Whether [`StopHandle::stop`] was called.
    pub fn is_stopping(&self) -> bool {
        self.0.stopping.load(Ordering::Acquire)
    }
}

/// The running executors.
pub struct Executors {
    threads: Vec<thread::JoinHandle<()>>,
    backends: Vec<Backend>,
    exits: mpsc::Receiver<(usize, Result<(), ExecutorFailure>)>,
    running: usize,
    stop: StopHandle,
}

impl Executors {
    /// Starts the executors and runs `main` on each; returns when all have started.
    ///
    /// # Errors
    /// No executor is left running: the backend is not available, or a thread cannot start.
    pub fn spawn<F, Fut>(config: &RtConfig, main: F) -> Result<Executors, RtError>
    where
        F: Fn(ExecutorCtx) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let inputs = vec![(); config.executor_count()];
        Self::spawn_with(config, inputs, move |ctx, ()| main(ctx))
    }

    /// Like [`Executors::spawn`], with one value for each executor (ring ends, listeners …).
    ///
    /// # Errors
    /// As [`Executors::spawn`]; also when the number of inputs is not
    /// [`RtConfig::executor_count`].
    pub fn spawn_with<T, F, Fut>(
        config: &RtConfig,
        inputs: Vec<T>,
        main: F,
    ) -> Result<Executors, RtError>
    where
        T: Send + 'static,
        F: Fn(ExecutorCtx, T) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let count = config.executor_count();
        if inputs.len() != count {
            let found = inputs.len();
            return Err(RtError::Config(format!("{count} executors, but {found} inputs")));
        }
        let cpus = allowed_cpus();
        let pin = config.pin && count <= cpus.len();
        if config.pin && !pin {
            tracing::warn!(
                executors = count,
                cpus = cpus.len(),
                "more executors than CPUs: none is pinned"
            );
        }
        let bells = (0..count)
            .map(|index| Doorbell::new().map_err(|cause| RtError::Thread { index, cause }))
            .collect::<Result<Vec<_>, _>>()?;
        let stop = StopHandle(Arc::new(StopShared {
            stopping: AtomicBool::new(false),
            ringers: bells.iter().map(Doorbell::ringer).collect(),
        }));
        let (exit_tx, exits) = mpsc::channel();
        let (start_tx, starts) = mpsc::channel();
        let main = Arc::new(main);
        let mut executors = Executors {
            threads: Vec::new(),
            backends: vec![Backend::Epoll; count],
            exits,
            running: 0,
            stop: stop.clone(),
        };
        for (index, (input, bell)) in inputs.into_iter().zip(bells).enumerate() {
            let seat = Seat {
                index,
                count,
                choice: config.backend,
                cpu: pin.then(|| cpus[index]),
                bell,
                stop: stop.clone(),
            };
            let (main, start_tx, exit_tx) = (main.clone(), start_tx.clone(), exit_tx.clone());
            let spawned = thread::Builder::new()
                .name(format!("zr-exec-{index}"))
                .spawn(move || run_executor(seat, input, &*main, &start_tx, &exit_tx));
            match spawned {
                Ok(handle) => executors.threads.push(handle),
                Err(cause) => {
                    executors.abandon();
                    return Err(RtError::Thread { index, cause });
                }
            }
        }
        drop(start_tx);
        executors.await_start(&starts)?;
        Ok(executors)
    }

    fn await_start(
        &mut self,
        starts: &mpsc::Receiver<(usize, Result<Backend, RtError>)>,
    ) -> Result<(), RtError> {
        let mut failure = None;
        // Each thread says exactly once how its start went.
        for (index, started) in starts.iter().take(self.backends.len()) {
            match started {
                Ok(backend) => {
                    self.backends[index] = backend;
                    self.running += 1;
                }
                Err(error) => failure = Some(error),
            }
        }
        if let Some(error) = failure {
            self.abandon();
            return Err(error);
        }
        let names: Vec<_> = self.backends.iter().map(|b| b.name()).collect();
        tracing::info!(executors = names.len(), backends = ?names, "executors started");
        Ok(())
    }

    /// After a failed start: whoever runs is asked to stop; nobody waits for them.
    fn abandon(&mut self) {
        self.stop.stop();
    }

    /// The backend of each executor.
    pub fn backends(&self) -> &[Backend] {
        &self.backends
    }

    /// Asks the executors to stop, from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Waits up to `timeout` for the next executor to end; `None` = none did. An executor that
    /// ends before the process was asked to stop is a failure of the process.
    pub fn next_exit(&mut self, timeout: Duration) -> Option<(usize, Result<(), ExecutorFailure>)> {
        let exit = self.exits.recv_timeout(timeout).ok()?;
        self.running = self.running.saturating_sub(1);
        Some(exit)
    }

    /// How many executors run.
    pub fn running(&self) -> usize {
        self.running
    }

    /// Waits up to `timeout` for all executors to end. Returns the failures so far, and whether
    /// all have ended.
    pub fn join(mut self, timeout: Duration) -> (Vec<ExecutorFailure>, bool) {
        let deadline = now() + timeout;
        let mut failures = Vec::new();
        while self.running > 0 {
            match self.next_exit(deadline.saturating_duration_since(now())) {
                Some((_, Err(failure))) => failures.push(failure),
                Some((_, Ok(()))) => {}
                None => return (failures, false),
            }
        }
        for thread in self.threads {
            // A panic was already reported as a failure.
            let _ = thread.join();
        }
        (failures, true)
    }
}

/// What an executor's thread needs besides its work.
struct Seat {
    index: usize,
    count: usize,
    choice: BackendChoice,
    cpu: Option<usize>,
    bell: Doorbell,
    stop: StopHandle,
}

fn run_executor<T, F, Fut>(
    seat: Seat,
    input: T,
    main: &F,
    started: &mpsc::Sender<(usize, Result<Backend, RtError>)>,
    exited: &mpsc::Sender<(usize, Result<(), ExecutorFailure>)>,
) where
    F: Fn(ExecutorCtx, T) -> Fut,
    Fut: Future<Output = ()> + 'static,
{
    let index = seat.index;
    if let Some(cpu) = seat.cpu {
        let mut set = CpuSet::new();
        set.set(cpu);
        if let Err(error) = sched_setaffinity(None, &set) {
            tracing::warn!(index, cpu, %error, "executor is not pinned");
        }
    }
    let runtime = match Runtime::build(seat.choice) {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send((index, Err(error)));
            return;
        }
    };
    let backend = runtime.backend();
    let started = started.clone();
    let result = runtime.run(async move {
        let Seat { index, count, bell, stop, .. } = seat;
        let local = Rc::new(StopLocal { stopping: Cell::new(false), notify: Notify::new() });
        let bell = match bell.into_local() {
            Ok(bell) => bell,
            Err(cause) => {
                let _ = started.send((index, Err(RtError::Thread { index, cause })));
                return Ok(());
            }
        };
        let _ = started.send((index, Ok(backend)));
        drop(started);
        let watched = local.clone();
        spawn(async move {
            if let Err(error) = bell.wait_until(|| stop.is_stopping()).await {
                tracing::error!(index, %error, "waiting for the stop request failed; stopping");
            }
            watched.stopping.set(true);
            watched.notify.notify_all();
        });
        let ctx = ExecutorCtx { index, count, backend, stop: local };
        let main: Box<dyn Future<Output = ()>> = Box::new(main(ctx, input));
        CatchPanic(Box::into_pin(main)).await
    });
    let result = result.map_err(|panic| ExecutorFailure { index, message: panic.0 });
    let _ = exited.send((index, result));
}
