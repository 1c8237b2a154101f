//! A bounded number of things at a time; who comes later waits in order.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use zeroring_net::rt::local::{self, OneshotSender};

/// Places to be taken.
pub(super) struct Slots(Rc<Shared>);

struct Shared {
    free: Cell<usize>,
    /// At most one per client group and kind of call.
    waiting: RefCell<VecDeque<OneshotSender<Slot>>>,
}

/// A place; free again when dropped.
pub(super) struct Slot(Option<Rc<Shared>>);

impl Slots {
    pub(super) fn new(count: usize) -> Slots {
        Slots(Rc::new(Shared { free: Cell::new(count), waiting: RefCell::default() }))
    }

    /// Waits for a place.
    pub(super) async fn take(&self) -> Slot {
        let shared = &self.0;
        if let Some(left) = shared.free.get().checked_sub(1) {
            shared.free.set(left);
            return Slot(Some(shared.clone()));
        }
        let (sender, receiver) = local::oneshot();
        shared.waiting.borrow_mut().push_back(sender);
        // Senders are only dropped with a slot in them, or with everything else.
        receiver.await.unwrap_or(Slot(None))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(shared) = self.0.take() else { return };
        loop {
            let Some(next) = shared.waiting.borrow_mut().pop_front() else { break };
            match next.send(Slot(Some(shared.clone()))) {
                Ok(()) => return,
                // It does not wait any more. The slot is still ours to give.
                Err(mut slot) => drop(slot.0.take()),
            }
        }
        shared.free.set(shared.free.get() + 1);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn slots_go_to_those_who_wait_in_order_and_are_never_lost() {
        let slots = Slots::new(1);
        let Poll::Ready(first) = poll(pin!(slots.take())) else { panic!("a free slot") };
        let mut second = Box::pin(slots.take());
        let mut third = Box::pin(slots.take());
        let mut fourth = Box::pin(slots.take());
        assert!(poll(second.as_mut()).is_pending());
        assert!(poll(third.as_mut()).is_pending());
        assert!(poll(fourth.as_mut()).is_pending());
        drop(second);
        drop(first);
        let Poll::Ready(slot) = poll(third.as_mut()) else { panic!("handed over") };
        assert!(poll(fourth.as_mut()).is_pending());
        drop(slot);
        // Given, but its future is dropped before it looks.
        drop(fourth);
        assert!(poll(pin!(slots.take())).is_ready());
    }
}
