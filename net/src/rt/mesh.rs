//! Rings from every executor to every executor (itself included), one doorbell per receiver.

use std::io;

use super::doorbell::{Doorbell, LocalDoorbell};
use super::ring::{Drain, Producer, channel_on, is_abandoned};

/// One executor's corner of the mesh, still movable to its thread.
pub struct Mesh<T> {
    index: usize,
    outgoing: Vec<Producer<T>>,
    incoming: Vec<rtrb::Consumer<T>>,
    bell: Doorbell,
}

/// Sends to any executor.
pub struct MeshSender<T> {
    index: usize,
    outgoing: Vec<Producer<T>>,
}

/// Receives from all executors, fairly: one value per sender and round.
pub struct MeshReceiver<T> {
    incoming: Vec<rtrb::Consumer<T>>,
    next: usize,
    bell: LocalDoorbell,
}

impl<T: Send> Mesh<T> {
    /// The corners of a mesh of `executors`, each ring for `capacity` values.
    ///
    /// # Errors
    /// No file descriptor is left for the doorbells.
    pub fn new(executors: usize, capacity: usize) -> io::Result<Vec<Mesh<T>>> {
        let mut corners = (0..executors)
            .map(|index| {
                let bell = Doorbell::new()?;
                Ok(Mesh { index, outgoing: Vec::new(), incoming: Vec::new(), bell })
            })
            .collect::<io::Result<Vec<_>>>()?;
        for from in 0..executors {
            for to in 0..executors {
                let (producer, consumer) = channel_on(capacity, corners[to].bell.ringer());
                corners[from].outgoing.push(producer);
                corners[to].incoming.push(consumer);
            }
        }
        Ok(corners)
    }

    /// Binds this corner to the executor that runs on this thread.
    ///
    /// # Errors
    /// No file descriptor is left, or the thread runs no executor.
    pub fn into_local(self) -> io::Result<(MeshSender<T>, MeshReceiver<T>)> {
        let sender = MeshSender { index: self.index, outgoing: self.outgoing };
        let receiver =
            MeshReceiver { incoming: self.incoming, next: 0, bell: self.bell.into_local()? };
        Ok((sender, receiver))
    }
}

impl<T> MeshSender<T> {
    /// Hands `value` to executor `to`.
    ///
    /// # Errors
    /// The value itself, when that executor's ring is full or there is no such executor.
    pub fn try_send(&mut self, to: usize, value: T) -> Result<(), T> {
        match self.outgoing.get_mut(to) {
            Some(producer) => producer.try_push(value),
            None => Err(value),
        }
    }

    /// The executor of this sender.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Whether executor `to` no longer receives.
    pub fn is_disconnected(&self, to: usize) -> bool {
        self.outgoing.get(to).is_none_or(Producer::is_disconnected)
    }
}

impl<T> MeshReceiver<T> {
    /// The next value, if there is one.
    pub fn try_recv(&mut self) -> Option<T> {
        for _ in 0..self.incoming.len() {
            let at = self.next;
            self.next = (at + 1) % self.incoming.len();
            if let Ok(value) = self.incoming[at].pop() {
                return Some(value);
            }
        }
        None
    }

    /// The next value; `None` when all senders are gone and everything was received. Cancel-safe.
    pub async fn recv(&mut self) -> Option<T> {
        self.ready().await;
        self.try_recv()
    }

    /// Completes when a value waits or all senders are gone. Cancel-safe.
    pub async fn ready(&self) {
        let rings = &self.incoming;
        let ready = || rings.iter().any(|r| !r.is_empty()) || rings.iter().all(is_abandoned);
        if let Err(error) = self.bell.wait_until(ready).await {
            tracing::error!(%error, "waiting for the mesh failed");
        }
    }

    /// Everything that is there now, sender by sender.
    pub fn drain(&mut self) -> impl Iterator<Item = T> + '_ {
        self.incoming.iter_mut().flat_map(|ring| Drain { ring })
    }
}
