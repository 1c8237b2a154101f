//! What several test files need.

use zeroring_net::rt::{BackendChoice, RtError, block_on};

/// The backends that exist on this machine. io_uring may be forbidden (containers): then asking
/// for it must fail with the error that says why.
pub fn backends() -> Vec<BackendChoice> {
    match block_on(BackendChoice::Uring, || async {}) {
        Ok(()) => vec![BackendChoice::Uring, BackendChoice::Epoll],
        Err(error @ RtError::UringUnavailable(_)) => {
            let text = error.to_string();
            for cause in ["seccomp", "kernel.io_uring_disabled", "RLIMIT_MEMLOCK"] {
                assert!(text.contains(cause), "{text}");
            }
            eprintln!("note: {text}");
            vec![BackendChoice::Epoll]
        }
        Err(other) => panic!("{other}"),
    }
}
