//! Bounded single-producer single-consumer rings between two threads, with a doorbell.
//!
//! A full ring hands the value back at once; whoever produces decides what that means (mark the
//! consumer as lagging, refuse the request, keep it for later). Nobody is ever blocked by a slow
//! consumer.

use std::io;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use super::doorbell::{Doorbell, LocalDoorbell, Ringer};
use super::time::now;

/// The other end is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the other end of the ring is gone")]
pub struct Disconnected;

/// Why a blocking receive returned nothing.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// The time is over.
    #[error("nothing arrived in time")]
    Timeout,
    /// The producer is gone and the ring is empty.
    #[error(transparent)]
    Disconnected(#[from] Disconnected),
    /// Waiting failed in the kernel.
    #[error("waiting for a ring: {0}")]
    Io(#[from] io::Error),
}

/// The sending end. For one thread at a time; may move.
pub struct Producer<T> {
    /// `None` only while dropping.
    ring: Option<rtrb::Producer<T>>,
    ringer: Ringer,
}

/// The receiving end for a plain thread; [`Consumer::into_local`] binds it to an executor.
pub struct Consumer<T> {
    ring: rtrb::Consumer<T>,
    bell: Doorbell,
}

/// The receiving end on an executor.
pub struct LocalConsumer<T> {
    ring: rtrb::Consumer<T>,
    bell: LocalDoorbell,
}

/// A ring for `capacity` values, with a doorbell of its own.
///
/// # Errors
/// No file descriptor is left for the doorbell.
pub fn channel<T: Send>(capacity: usize) -> io::Result<(Producer<T>, Consumer<T>)> {
    let bell = Doorbell::new()?;
    let (producer, ring) = channel_on(capacity, bell.ringer());
    Ok((producer, Consumer { ring, bell }))
}

/// A ring whose producer rings somebody else's doorbell (many rings, one waiting end).
pub(super) fn channel_on<T: Send>(
    capacity: usize,
    ringer: Ringer,
) -> (Producer<T>, rtrb::Consumer<T>) {
    let (ring, consumer) = rtrb::RingBuffer::new(capacity);
    (Producer { ring: Some(ring), ringer }, consumer)
}

impl<T> Producer<T> {
    /// Hands `value` to the consumer and wakes it if it sleeps.
    ///
    /// # Errors
    /// The value itself, when the ring is full.
    pub fn try_push(&mut self, value: T) -> Result<(), T> {
        self.push_silent(value)?;
        self.ringer.ring();
        Ok(())
    }

    /// Like [`Producer::try_push`] without waking; a [`Producer::ring`] must follow. For batches.
    ///
    /// # Errors
    /// The value itself, when the ring is full.
    pub fn push_silent(&mut self, value: T) -> Result<(), T> {
        match &mut self.ring {
            Some(ring) => ring.push(value).map_err(|rtrb::PushError::Full(returned)| returned),
            None => Err(value),
        }
    }

    /// Wakes the consumer if it sleeps.
    pub fn ring(&self) {
        self.ringer.ring();
    }

    /// How many values fit now; more may fit a moment later.
    pub fn free(&self) -> usize {
        self.ring.as_ref().map_or(0, rtrb::Producer::slots)
    }

    /// Whether the consumer is gone: then what is pushed is lost.
    pub fn is_disconnected(&self) -> bool {
        self.ring.as_ref().is_none_or(rtrb::Producer::is_abandoned)
    }
}

impl<T> Drop for Producer<T> {
    fn drop(&mut self) {
        // First gone, then heard: the consumer that wakes up sees that nobody is left.
        self.ring = None;
        self.ringer.ring();
    }
}

impl<T> Consumer<T> {
    /// The next value, if there is one.
    pub fn try_recv(&mut self) -> Option<T> {
        self.ring.pop().ok()
    }

    /// Blocks the thread until a value arrives, at most for `timeout` if one is given.
    ///
    /// # Errors
    /// Time is over, or the producer is gone and everything was received.
    pub fn recv(&mut self, timeout: Option<Duration>) -> Result<T, RecvError> {
        let deadline = timeout.map(|t| now() + t);
        let ring = &self.ring;
        let ready = self.bell.wait_until(|| has_news(ring), deadline)?;
        match self.ring.pop() {
            Ok(value) => Ok(value),
            Err(_) if ready => Err(Disconnected.into()),
            Err(_) => Err(RecvError::Timeout),
        }
    }

    /// Everything that is there now.
    pub fn drain(&mut self) -> Drain<'_, T> {
        Drain { ring: &mut self.ring }
    }

    /// How many values wait.
    pub fn len(&self) -> usize {
        self.ring.slots()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }

    /// Binds this end to the executor that runs on this thread.
    ///
    /// # Errors
    /// No file descriptor is left, or the thread runs no executor.
    pub fn into_local(self) -> io::Result<LocalConsumer<T>> {
        Ok(LocalConsumer { ring: self.ring, bell: self.bell.into_local()? })
    }
}

impl<T> LocalConsumer<T> {
    /// The next value, if there is one.
    pub fn try_recv(&mut self) -> Option<T> {
        self.ring.pop().ok()
    }

    /// The next value; `None` when the producer is gone and everything was received (or waiting
    /// failed in the kernel, which is logged). Cancel-safe.
    pub async fn recv(&mut self) -> Option<T> {
        self.ready().await;
        self.ring.pop().ok()
    }

    /// Completes when a value waits or the producer is gone. Cancel-safe. To take everything at
    /// once: `ready().await`, then [`LocalConsumer::drain`].
    pub async fn ready(&self) {
        let ring = &self.ring;
        if let Err(error) = self.bell.wait_until(|| has_news(ring)).await {
            tracing::error!(%error, "waiting for a ring failed");
        }
    }

    /// Everything that is there now.
    pub fn drain(&mut self) -> Drain<'_, T> {
        Drain { ring: &mut self.ring }
    }

    /// Whether the producer is gone and everything was received.
    pub fn is_finished(&self) -> bool {
        is_abandoned(&self.ring) && self.ring.is_empty()
    }

    /// How many values wait.
    pub fn len(&self) -> usize {
        self.ring.slots()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }
}

/// Whether the producer is gone; what it pushed before is visible to this thread then.
pub(super) fn is_abandoned<T>(ring: &rtrb::Consumer<T>) -> bool {
    let gone = ring.is_abandoned();
    // The ring reads its reference count relaxed; the producer released it.
    fence(Ordering::Acquire);
    gone
}

/// Whether a look at the ring brings something new: a value, or the end.
pub(super) fn has_news<T>(ring: &rtrb::Consumer<T>) -> bool {
    !ring.is_empty() || is_abandoned(ring)
}

/// Takes values out of a ring until it is empty.
pub struct Drain<'a, T> {
    pub(super) ring: &'a mut rtrb::Consumer<T>,
}

impl<T> Iterator for Drain<'_, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.ring.pop().ok()
    }
}
