//! Where the kernel forbids io_uring (the default of most container runtimes), `auto` serves by
//! epoll and `uring` is a start-up error that names the causes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::time::Duration;

use zeroring_net::rt::{
    Backend, BackendChoice, BoundListener, Chunk, ExecutorCtx, Executors, RtConfig, RtError,
    bind_group,
};

/// Answers `io_uring_setup`, `io_uring_enter` and `io_uring_register` by EPERM on this thread and
/// those it starts, as a container's seccomp profile does.
fn forbid_io_uring() {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_IF_GE: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const JUMP_IF_GT: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let first = u32::try_from(libc::SYS_io_uring_setup).unwrap();
    let last = u32::try_from(libc::SYS_io_uring_register).unwrap();
    let eperm = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).unwrap();
    let mut filter = [
        // The system call's number is the first word of the data.
        step(LOAD, 0, 0, 0),
        step(JUMP_IF_GE, 0, 2, first),
        step(JUMP_IF_GT, 1, 0, last),
        step(RETURN, 0, 0, eperm),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 5, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter live through the call, which copies them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
    }
}

#[test]
fn auto_falls_back_to_epoll_and_uring_is_an_error_that_says_why() {
    let filtered = std::thread::spawn(|| {
        forbid_io_uring();
        let config =
            |backend| RtConfig { executors: NonZeroUsize::new(2), backend, ..RtConfig::default() };
        let refused = Executors::spawn(&config(BackendChoice::Uring), |_| async {});
        let Err(error @ RtError::UringUnavailable(_)) = refused.map(|_| ()) else {
            panic!("io_uring was not refused");
        };
        for cause in ["seccomp", "kernel.io_uring_disabled", "RLIMIT_MEMLOCK", "ZERO_IO_BACKEND"] {
            assert!(error.to_string().contains(cause), "{error}");
        }
        let listeners = bind_group("127.0.0.1:0".parse().unwrap(), 2).unwrap();
        let addr = listeners[0].local_addr();
        let serve = |ctx: ExecutorCtx, listener: BoundListener| async move {
            let listener = listener.into_local().unwrap();
            let accepting = async {
                loop {
                    let stream = listener.accept().await.unwrap();
                    stream.write_all(vec![Chunk::Static(b"served")]).await.unwrap();
                }
            };
            futures_util::future::select(Box::pin(accepting), Box::pin(ctx.stopped())).await;
        };
        let executors =
            Executors::spawn_with(&config(BackendChoice::Auto), listeners, serve).unwrap();
        assert_eq!(executors.backends(), [Backend::Epoll, Backend::Epoll]);
        for _ in 0..10 {
            let mut text = String::new();
            let mut client = std::net::TcpStream::connect(addr).unwrap();
            client.write_all(b"x").unwrap();
            client.read_to_string(&mut text).unwrap_or_default();
            assert_eq!(text, "served");
        }
        executors.stop_handle().stop();
        assert!(executors.join(Duration::from_secs(120)).1);
    });
    filtered.join().unwrap();
}
