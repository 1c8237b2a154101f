//! Channels and notifications between tasks of one executor: `Rc` inside, no atomics.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The receiving end is gone, or was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the channel is closed")]
pub struct Closed;

/// Why a value was not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum TrySendError<T> {
    /// The channel holds as many values as it may.
    Full(T),
    /// The receiving end is gone.
    Closed(T),
}

/// Wakers of tasks that wait for the same thing, each of them once.
#[derive(Default)]
struct Waiters(RefCell<Vec<Waker>>);

impl Waiters {
    fn add(&self, cx: &Context<'_>) {
        let mut list = self.0.borrow_mut();
        if !list.iter().any(|w| w.will_wake(cx.waker())) {
            list.push(cx.waker().clone());
        }
    }

    /// All of them: those that find nothing wait again.
    fn wake_all(&self) {
        for waker in self.0.take() {
            waker.wake();
        }
    }
}

// ---- Notify ----------------------------------------------------------------------------------

/// "Something changed, look again": a stored permit that one waiter consumes, or a wake of all.
#[derive(Default)]
pub struct Notify {
    permit: Cell<bool>,
    epoch: Cell<u64>,
    waiters: Waiters,
}

impl Notify {
    /// Without a permit.
    pub fn new() -> Notify {
        Notify::default()
    }

    /// Stores one permit (never more) and wakes the waiters: one of them takes it.
    pub fn notify_one(&self) {
        self.permit.set(true);
        self.waiters.wake_all();
    }

    /// Releases every task that waits now; stores nothing.
    pub fn notify_all(&self) {
        self.epoch.set(self.epoch.get().wrapping_add(1));
        self.waiters.wake_all();
    }

    /// Completes on a permit (and consumes it) or on the next [`Notify::notify_all`] after this
    /// call. Cancel-safe.
    pub fn notified(&self) -> impl Future<Output = ()> + '_ {
        let start = self.epoch.get();
        poll_fn(move |cx| {
            if self.permit.take() || self.epoch.get() != start {
                return Poll::Ready(());
            }
            self.waiters.add(cx);
            Poll::Pending
        })
    }
}

// ---- oneshot ---------------------------------------------------------------------------------

struct OneshotState<T> {
    value: Option<T>,
    sender_gone: bool,
    receiver_gone: bool,
    waker: Option<Waker>,
}

/// Sends one value. Dropping it unsent closes the channel.
pub struct OneshotSender<T>(Rc<RefCell<OneshotState<T>>>);

/// Receives one value: a future of `Result<T, Closed>`.
pub struct OneshotReceiver<T>(Rc<RefCell<OneshotState<T>>>);

/// A channel for one value.
pub fn oneshot<T>() -> (OneshotSender<T>, OneshotReceiver<T>) {
    let state = Rc::new(RefCell::new(OneshotState {
        value: None,
        sender_gone: false,
        receiver_gone: false,
        waker: None,
    }));
    (OneshotSender(state.clone()), OneshotReceiver(state))
}

impl<T> OneshotSender<T> {
    /// Sends the value.
    ///
    /// # Errors
    /// The value itself, when nobody waits for it any more.
    pub fn send(self, value: T) -> Result<(), T> {
        let mut state = self.0.borrow_mut();
        if state.receiver_gone {
            return Err(value);
        }
        state.value = Some(value);
        Ok(())
    }

    /// Whether nobody waits for the value any more.
    pub fn is_closed(&self) -> bool {
        self.0.borrow().receiver_gone
    }
}

impl<T> Drop for OneshotSender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut state = self.0.borrow_mut();
            state.sender_gone = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for OneshotReceiver<T> {
    type Output = Result<T, Closed>;

    fn poll(self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.borrow_mut();
        if let Some(value) = state.value.take() {
            return Poll::Ready(Ok(value));
        }
        if state.sender_gone {
            return Poll::Ready(Err(Closed));
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl<T> Drop for OneshotReceiver<T> {
    fn drop(&mut self) {
        self.0.borrow_mut().receiver_gone = true;
    }
}

// ---- bounded mpsc ----------------------------------------------------------------------------

struct ChannelState<T> {
    queue: RefCell<VecDeque<T>>,
    capacity: usize,
    senders: Cell<usize>,
    closed: Cell<bool>,
    not_empty: Waiters,
    not_full: Waiters,
}

/// A sending end of a bounded local channel.
pub struct Sender<T>(Rc<ChannelState<T>>);

/// The receiving end of a bounded local channel.
pub struct Receiver<T>(Rc<ChannelState<T>>);

/// A channel for at most `capacity` (at least one) waiting values.
pub fn channel<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let state = Rc::new(ChannelState {
        queue: RefCell::default(),
        capacity: capacity.max(1),
        senders: Cell::new(1),
        closed: Cell::new(false),
        not_empty: Waiters::default(),
        not_full: Waiters::default(),
    });
    (Sender(state.clone()), Receiver(state))
}

impl<T> Sender<T> {
    /// Queues `value` if there is room.
    ///
    /// # Errors
    /// The value, and why.
    pub fn try_send(&self, value: T) -> Result<(), TrySendError<T>> {
        if self.0.closed.get() {
            return Err(TrySendError::Closed(value));
        }
        let mut queue = self.0.queue.borrow_mut();
        if queue.len() >= self.0.capacity {
            return Err(TrySendError::Full(value));
        }
        queue.push_back(value);
        drop(queue);
        self.0.not_empty.wake_all();
        Ok(())
    }

    /// Queues `value`, waiting for room.
    ///
    /// # Errors
    /// The value, when the receiving end is gone.
    pub async fn send(&self, value: T) -> Result<(), T> {
        let mut slot = Some(value);
        poll_fn(move |cx| {
            let Some(value) = slot.take() else { return Poll::Ready(Ok(())) };
            match self.try_send(value) {
                Ok(()) => Poll::Ready(Ok(())),
                Err(TrySendError::Closed(value)) => Poll::Ready(Err(value)),
                Err(TrySendError::Full(value)) => {
                    slot = Some(value);
                    self.0.not_full.add(cx);
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// How many values wait.
    pub fn len(&self) -> usize {
        self.0.queue.borrow().len()
    }

    /// Whether no value waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the receiving end is gone.
    pub fn is_closed(&self) -> bool {
        self.0.closed.get()
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.set(self.0.senders.get() + 1);
        Sender(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.senders.set(self.0.senders.get() - 1);
        if self.0.senders.get() == 0 {
            self.0.not_empty.wake_all();
        }
    }
}

impl<T> Receiver<T> {
    /// The next value, if one waits.
    pub fn try_recv(&mut self) -> Option<T> {
        let value = self.0.queue.borrow_mut().pop_front()?;
        self.0.not_full.wake_all();
        Some(value)
    }

    /// The next value; `None` when all senders are gone and nothing waits. Cancel-safe.
    pub async fn recv(&mut self) -> Option<T> {
        poll_fn(|cx| {
            if let Some(value) = self.try_recv() {
                return Poll::Ready(Some(value));
            }
            if self.0.senders.get() == 0 {
                return Poll::Ready(None);
            }
            self.0.not_empty.add(cx);
            Poll::Pending
        })
        .await
    }

    /// How many values wait.
    pub fn len(&self) -> usize {
        self.0.queue.borrow().len()
    }

    /// Whether no value waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0.closed.set(true);
        let dropped = self.0.queue.take();
        self.0.not_full.wake_all();
        drop(dropped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use futures_util::future::join_all;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    /// Counts wake-ups.
    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Polls once; says the result and how often the task was woken since.
    fn poll<F: Future>(future: std::pin::Pin<&mut F>, wakes: &Arc<Wakes>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(&Waker::from(wakes.clone())))
    }

    #[test]
    fn a_permit_is_stored_once_and_taken_once() {
        let notify = Notify::new();
        notify.notify_one();
        notify.notify_one();
        assert_eq!(notify.notified().now_or_never(), Some(()));
        assert_eq!(notify.notified().now_or_never(), None);
    }

    #[test]
    fn notify_all_releases_those_who_wait_and_nobody_later() {
        let notify = Notify::new();
        let wakes = Arc::<Wakes>::default();
        let mut waiting = pin!(join_all([notify.notified(), notify.notified()]));
        assert!(poll(waiting.as_mut(), &wakes).is_pending());
        // Created before the notification, first polled after it.
        let early = notify.notified();
        notify.notify_all();
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
        assert!(poll(waiting.as_mut(), &wakes).is_ready());
        assert_eq!(early.now_or_never(), Some(()));
        assert_eq!(notify.notified().now_or_never(), None);
    }

    #[test]
    fn a_oneshot_delivers_or_tells_that_it_never_will() {
        let wakes = Arc::<Wakes>::default();
        let (sender, receiver) = oneshot();
        let mut receiver = pin!(receiver);
        assert!(poll(receiver.as_mut(), &wakes).is_pending());
        assert_eq!(sender.send(5), Ok(()));
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
        assert_eq!(poll(receiver.as_mut(), &wakes), Poll::Ready(Ok(5)));
        let (sender, receiver) = oneshot::<u8>();
        drop(sender);
        assert_eq!(receiver.now_or_never(), Some(Err(Closed)));
        let (sender, receiver) = oneshot();
        drop(receiver);
        assert!(sender.is_closed());
        assert_eq!(sender.send(7), Err(7));
    }

    #[test]
    fn a_channel_is_bounded_ordered_and_wakes_both_sides() {
        let wakes = Arc::<Wakes>::default();
        let (sender, mut receiver) = channel(2);
        {
            let mut empty = pin!(receiver.recv());
            assert!(poll(empty.as_mut(), &wakes).is_pending());
            sender.try_send(1).unwrap();
            assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
            assert_eq!(poll(empty.as_mut(), &wakes), Poll::Ready(Some(1)));
        }
        sender.try_send(2).unwrap();
        sender.try_send(3).unwrap();
        assert_eq!(sender.try_send(4), Err(TrySendError::Full(4)));
        {
            let mut full = pin!(sender.send(4));
            assert!(poll(full.as_mut(), &wakes).is_pending());
            assert_eq!(receiver.try_recv(), Some(2));
            assert_eq!(wakes.0.load(Ordering::Relaxed), 2);
            assert_eq!(poll(full.as_mut(), &wakes), Poll::Ready(Ok(())));
        }
        let other = sender.clone();
        drop(sender);
        assert_eq!((receiver.try_recv(), receiver.try_recv()), (Some(3), Some(4)));
        assert_eq!(receiver.recv().now_or_never(), None);
        drop(other);
        assert_eq!(receiver.recv().now_or_never(), Some(None));
        let (sender, receiver) = channel(1);
        drop(receiver);
        assert!(sender.is_closed());
        assert_eq!(sender.try_send(1), Err(TrySendError::Closed(1)));
        assert_eq!(sender.send(1).now_or_never(), Some(Err(1)));
    }
}
