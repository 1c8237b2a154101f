//! Termination signals as values: a handler sets a bit and writes an eventfd, a plain thread
//! waits for it.

use std::io;
use std::os::fd::{AsFd, IntoRawFd};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::BorrowedFd;

use super::time::now;

/// A signal that asks the process to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Signal {
    /// SIGTERM: drain, then end.
    Term,
    /// SIGINT (Ctrl-C): drain, then end.
    Int,
    /// SIGQUIT: end without draining.
    Quit,
}

impl Signal {
    const ALL: [Signal; 3] = [Signal::Term, Signal::Int, Signal::Quit];

    fn number(self) -> i32 {
        match self {
            Signal::Term => libc::SIGTERM,
            Signal::Int => libc::SIGINT,
            Signal::Quit => libc::SIGQUIT,
        }
    }

    /// `SIGTERM`, …
    pub fn name(self) -> &'static str {
        match self {
            Signal::Term => "SIGTERM",
            Signal::Int => "SIGINT",
            Signal::Quit => "SIGQUIT",
        }
    }
}

/// Signals that arrived and were not yet taken, one bit per number.
static PENDING: AtomicU32 = AtomicU32::new(0);
/// The eventfd that the handler writes; -1 = not installed. It stays open for ever.
static WAKE_FD: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_signal(number: libc::c_int) {
    // Only async-signal-safe things: atomics and write(2); errno is restored.
    PENDING.fetch_or(1 << number, Ordering::AcqRel);
    let fd = WAKE_FD.load(Ordering::Acquire);
    let one = 1u64.to_ne_bytes();
    // SAFETY: `__errno_location` points to this thread's errno; `one` has eight bytes.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        libc::write(fd, one.as_ptr().cast(), one.len());
        *errno = saved;
    }
}

/// Receives termination signals instead of dying by them. Once per process.
#[derive(Debug)]
pub struct Signals {
    fd: BorrowedFd<'static>,
}

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// They are already installed, or the kernel refuses.
    pub fn install() -> io::Result<Signals> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?.into_raw_fd();
        if WAKE_FD.compare_exchange(-1, fd, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: `fd` was made above and nobody else has it.
            unsafe { libc::close(fd) };
            return Err(io::Error::other("signal handlers are already installed"));
        }
        for signal in Signal::ALL {
            // SAFETY: a zeroed sigaction is valid, and the handler is async-signal-safe.
            let result = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
                action.sa_flags = libc::SA_RESTART;
                libc::sigemptyset(&raw mut action.sa_mask);
                libc::sigaction(signal.number(), &raw const action, std::ptr::null_mut())
            };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: the descriptor is never closed.
        Ok(Signals { fd: unsafe { BorrowedFd::borrow_raw(fd) } })
    }

    /// Blocks until a signal arrives, at most for `timeout`; `None` = none did.
    pub fn wait(&self, timeout: Option<Duration>) -> Option<Signal> {
        let deadline = timeout.map(|t| now() + t);
        loop {
            if let Some(signal) = take_pending() {
                return Some(signal);
            }
            let left = deadline.map(|d| d.saturating_duration_since(now()));
            if left == Some(Duration::ZERO) {
                return None;
            }
            let timeout = left.map(|d| rustix::event::Timespec {
                tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(d.subsec_nanos()),
            });
            let mut fds = [PollFd::from_borrowed_fd(self.fd, PollFlags::IN)];
            // Interrupted or failed: the pending bits decide.
            let _ = poll(&mut fds, timeout.as_ref());
            let _ = rustix::io::read(self.fd.as_fd(), &mut [0u8; 8]);
        }
    }
}

fn take_pending() -> Option<Signal> {
    Signal::ALL.into_iter().find(|signal| {
        let bit = 1 << signal.number();
        PENDING.fetch_and(!bit, Ordering::AcqRel) & bit != 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_become_values_and_do_not_kill() {
        let signals = Signals::install().unwrap();
        assert!(Signals::install().is_err());
        assert_eq!(signals.wait(Some(Duration::ZERO)), None);
        for signal in Signal::ALL {
            // SAFETY: raises a signal whose handler was just installed.
            unsafe { libc::raise(signal.number()) };
            assert_eq!(signals.wait(None), Some(signal));
        }
        assert_eq!(signals.wait(Some(Duration::ZERO)), None);
    }
}
