//! Local tasks: spawned on the executor that spawns them, and never moved.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::backend::with_state;
use super::doorbell::Doorbell;
use super::time::now;

/// The task panicked. The message is also in the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("task panicked: {0}")]
pub struct TaskPanicked(pub String);

/// Waits for a task. Dropping it lets the task go on alone.
pub struct JoinHandle<T>(monoio::task::JoinHandle<Result<T, TaskPanicked>>);

impl<T> JoinHandle<T> {
    /// Whether the task has ended.
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, TaskPanicked>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

/// Starts a task on this executor. It runs when the current task awaits or ends.
///
/// A panic of the task is caught, logged, and returned by the handle.
///
/// # Panics
/// Outside an executor.
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    JoinHandle(monoio::spawn(CatchPanic(Box::pin(future))))
}

/// A future whose panics become values.
pub(super) struct CatchPanic<F: ?Sized>(pub Pin<Box<F>>);

impl<F: Future + ?Sized> Future for CatchPanic<F> {
    type Output = Result<F::Output, TaskPanicked>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let begun = now();
        // The future is not polled again after a panic: its state need not be consistent.
        let polled = catch_unwind(AssertUnwindSafe(|| self.0.as_mut().poll(cx)));
        with_state(|s| s.slices.set(s.slices.get().and(begun.elapsed())));
        match polled {
            Ok(poll) => poll.map(Ok),
            Err(payload) => {
                let message = panic_message(payload.as_ref());
                tracing::error!(%message, "task panicked");
                Poll::Ready(Err(TaskPanicked(message)))
            }
        }
    }
}

pub(super) fn panic_message(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "(no message)".to_owned())
}

/// Lets everything else on this executor have its turn: other tasks, finished I/O, and timers.
///
/// The runtime's own re-queueing would starve timers as long as a task is runnable, so this goes
/// through the kernel once (a few microseconds): call it per millisecond of work, not per row.
pub async fn yield_now() {
    let yielder = with_state(|s| s.yielder.get_or_init(Yielder::start).clone());
    match yielder {
        Some(y) => y.wait().await,
        None => {
            let mut polled = false;
            poll_fn(|cx| {
                if std::mem::replace(&mut polled, true) {
                    return Poll::Ready(());
                }
                cx.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
        }
    }
}

/// Wakes yielded tasks after one pass of the driver, by ringing the executor's own doorbell.
#[derive(Clone)]
pub(super) struct Yielder(Rc<YielderInner>);

struct YielderInner {
    /// Tasks to wake at the next pass.
    waiting: RefCell<Vec<(Waker, Rc<Cell<bool>>)>>,
    /// `None` when no eventfd could be made: then yielding only re-queues.
    ringer: Option<super::doorbell::Ringer>,
}

impl Yielder {
    fn start() -> Yielder {
        let bell = Doorbell::new().and_then(|bell| {
            let ringer = bell.ringer();
            Ok((bell.into_local()?, ringer))
        });
        let (bell, ringer) = match bell {
            Ok((bell, ringer)) => (Some(bell), Some(ringer)),
            Err(error) => {
                tracing::warn!(%error, "no eventfd for yielding: timers may be late under load");
                (None, None)
            }
        };
        let inner = Rc::new(YielderInner { waiting: RefCell::default(), ringer });
        if let Some(bell) = bell {
            let inner = inner.clone();
            monoio::spawn(async move {
                // Ends only with the executor; an error of an eventfd's poll is not survivable,
                // and then waiting tasks are released by the fallback in `wait`.
                while bell.wait_until(|| !inner.waiting.borrow().is_empty()).await.is_ok() {
                    for (waker, done) in inner.waiting.take() {
                        done.set(true);
                        waker.wake();
                    }
                }
            });
        }
        Yielder(inner)
    }

    async fn wait(&self) {
        let done = Rc::new(Cell::new(false));
        poll_fn(|cx| {
            if done.get() {
                return Poll::Ready(());
            }
            let Some(ringer) = &self.0.ringer else {
                done.set(true);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            };
            let mut waiting = self.0.waiting.borrow_mut();
            match waiting.iter_mut().find(|(_, d)| Rc::ptr_eq(d, &done)) {
                Some((waker, _)) => waker.clone_from(cx.waker()),
                None => waiting.push((cx.waker().clone(), done.clone())),
            }
            ringer.ring();
            Poll::Pending
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::rt::{BackendChoice, block_on, now, slices, spawn};

    #[test]
    fn a_task_that_keeps_its_executor_is_seen() {
        let (before, after) = block_on(BackendChoice::Epoll, || async {
            let before = slices();
            let slow = spawn(async {
                let until = now() + Duration::from_millis(3);
                while now() < until {}
            });
            slow.await.unwrap();
            (before, slices())
        })
        .unwrap();
        assert!(after.count > before.count);
        assert!(after.long > before.long);
        assert!(after.longest >= Duration::from_millis(3));
    }
}
