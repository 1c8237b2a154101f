//! An eventfd with a sleep flag: how one thread wakes another without a system call while the
//! other is awake.
//!
//! The protocol (the only place that has it):
//!
//! ```text
//! consumer                              producer (any number)
//!   look: nothing                         put the value where the consumer looks
//!   asleep := true                        ── full fence ──
//!   ── full fence ──                      if asleep.swap(false): write the eventfd
//!   look again: nothing
//!   wait for the eventfd, clear it
//! ```
//!
//! Either the consumer's second look sees the value, or the producer sees `asleep`: the two fences
//! forbid that both miss. x86 would hide a missing fence in most runs, ARM would not.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::stream::Readiness;
use super::time::{Instant, now};

#[derive(Debug)]
struct Shared {
    asleep: AtomicBool,
    eventfd: OwnedFd,
}

/// The waiting end, for a plain thread; [`Doorbell::into_local`] makes it one for an executor.
#[derive(Debug)]
pub struct Doorbell {
    shared: Arc<Shared>,
}

/// The ringing end: for any thread, cheap to clone.
#[derive(Debug, Clone)]
pub struct Ringer {
    shared: Arc<Shared>,
}

/// The waiting end on an executor.
pub struct LocalDoorbell {
    shared: Arc<Shared>,
    readiness: Readiness,
}

impl Doorbell {
    /// A new doorbell.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Doorbell> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Doorbell { shared: Arc::new(Shared { asleep: AtomicBool::new(false), eventfd }) })
    }

    /// A ringing end.
    pub fn ringer(&self) -> Ringer {
        Ringer { shared: self.shared.clone() }
    }

    /// Binds the waiting end to the executor that runs on this thread.
    ///
    /// # Errors
    /// No file descriptor is left, or the thread runs no executor.
    pub fn into_local(self) -> io::Result<LocalDoorbell> {
        let readiness = Readiness::new(self.shared.eventfd.try_clone()?)?;
        Ok(LocalDoorbell { shared: self.shared, readiness })
    }

    /// Blocks the thread until `ready` is true or `deadline` has passed; says which (`true` =
    /// ready). `ready` must become true before the ringer rings.
    ///
    /// # Errors
    /// Waiting failed in the kernel.
    pub fn wait_until(
        &self,
        mut ready: impl FnMut() -> bool,
        deadline: Option<Instant>,
    ) -> io::Result<bool> {
        loop {
            if ready() {
                return Ok(true);
            }
            self.shared.fall_asleep();
            if ready() {
                self.shared.stay_awake();
                return Ok(true);
            }
            let left = deadline.map(|d| d.saturating_duration_since(now()));
            if left == Some(Duration::ZERO) {
                self.shared.stay_awake();
                return Ok(false);
            }
            let timeout = left.map(|d| rustix::event::Timespec {
                tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(d.subsec_nanos()),
            });
            let mut fds = [PollFd::new(&self.shared.eventfd, PollFlags::IN)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => self.shared.clear()?,
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl LocalDoorbell {
    /// Completes when `ready` is true; looks at once, and then after each ring. Cancel-safe.
    ///
    /// # Errors
    /// Waiting failed in the kernel.
    pub async fn wait_until(&self, mut ready: impl FnMut() -> bool) -> io::Result<()> {
        loop {
            if ready() {
                return Ok(());
            }
            self.shared.fall_asleep();
            if ready() {
                self.shared.stay_awake();
                return Ok(());
            }
            self.readiness.readable().await?;
            self.shared.clear()?;
        }
    }

    /// A ringing end.
    pub fn ringer(&self) -> Ringer {
        Ringer { shared: self.shared.clone() }
    }
}

impl Ringer {
    /// Wakes the waiting end if it sleeps (about 2 µs); nothing but a fence otherwise. To be
    /// called after the value was put where the waiting end looks.
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        // The plain load keeps the cache line shared while the consumer is awake.
        if self.shared.asleep.load(Ordering::Relaxed)
            && self.shared.asleep.swap(false, Ordering::AcqRel)
        {
            // The only error of a non-blocking eventfd is EAGAIN at 2^64 - 1 rings: then it is
            // readable anyway.
            let _ = rustix::io::write(&self.shared.eventfd, &1u64.to_ne_bytes());
        }
    }
}

impl Shared {
    fn fall_asleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// A ringer may have written the eventfd meanwhile: that costs one look for nothing later.
    fn stay_awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    fn clear(&self) -> io::Result<()> {
        self.stay_awake();
        let mut count = [0u8; 8];
        match rustix::io::read(self.eventfd.as_fd(), &mut count) {
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}
