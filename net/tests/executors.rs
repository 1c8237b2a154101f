//! Executors on both backends: echo, hand-over of accepted sockets, timers, panics, stop.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::time::Duration;

use zeroring_net::rt::{
    self, Backend, BackendChoice, BoundListener, Chunk, ExecutorCtx, Executors, Mesh, RawStream,
    RtConfig, Stream, bind_group, spawn,
};

const LONG: Duration = Duration::from_secs(120);

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// A socket on its way to the executor named by its first byte.
struct HandOver {
    raw: RawStream,
    read_so_far: Vec<u8>,
}

/// Accepts anywhere; the first byte of a connection names the executor that serves it. Every
/// served chunk is echoed with the executor's number in front.
async fn hand_over_server(ctx: ExecutorCtx, input: (BoundListener, Mesh<HandOver>)) {
    let (listener, mesh) = input;
    let listener = listener.into_local().unwrap();
    let (sender, mut receiver) = mesh.into_local().unwrap();
    let sender = Rc::new(std::cell::RefCell::new(sender));
    let me = u8::try_from(ctx.index()).unwrap();
    spawn(async move {
        while let Some(HandOver { raw, read_so_far }) = receiver.recv().await {
            spawn(serve(Stream::from_raw(raw).unwrap(), me, read_so_far));
        }
    });
    let accepting = async {
        loop {
            let stream = listener.accept().await.unwrap();
            let sender = sender.clone();
            spawn(async move {
                let mut head = Vec::new();
                if stream.read_append(&mut head).await.unwrap() == 0 {
                    return;
                }
                let to = usize::from(head[0]);
                let raw = stream.into_raw().unwrap();
                let full = sender.borrow_mut().try_send(to, HandOver { raw, read_so_far: head });
                assert!(full.is_ok(), "mesh is full");
            });
        }
    };
    futures_util::future::select(Box::pin(accepting), Box::pin(ctx.stopped())).await;
}

async fn serve(stream: Stream, me: u8, first: Vec<u8>) {
    let mut bytes = first;
    while !bytes.is_empty() {
        let chunks = vec![Chunk::Owned(vec![me]), Chunk::Owned(std::mem::take(&mut bytes))];
        stream.write_all(chunks).await.unwrap();
        stream.read_append(&mut bytes).await.unwrap();
    }
}

#[test]
fn a_socket_accepted_anywhere_is_served_by_the_executor_that_owns_it() {
    for backend in common::backends() {
        let config = RtConfig { executors: NonZeroUsize::new(2), backend, ..RtConfig::default() };
        let listeners = bind_group(any_port(), 2).unwrap();
        let addr = listeners[0].local_addr();
        let inputs = listeners.into_iter().zip(Mesh::new(2, 64).unwrap()).collect();
        let executors = Executors::spawn_with(&config, inputs, hand_over_server).unwrap();
        let expected = match backend {
            BackendChoice::Uring => Backend::Uring,
            _ => Backend::Epoll,
        };
        assert_eq!(executors.backends(), [expected, expected]);
        for i in 0..20u8 {
            let owner = i % 2;
            let mut client = TcpStream::connect(addr).unwrap();
            client.set_read_timeout(Some(LONG)).unwrap();
            for round in 0..3u8 {
                client.write_all(&[owner, round, i]).unwrap();
                let mut answer = [0; 4];
                client.read_exact(&mut answer).unwrap();
                assert_eq!(answer, [owner, owner, round, i], "{backend:?}");
            }
        }
        executors.stop_handle().stop();
        let (failures, all) = executors.join(LONG);
        assert!(failures.is_empty() && all, "{failures:?}");
    }
}

#[test]
fn a_large_answer_arrives_whole_and_in_order() {
    for backend in common::backends() {
        let listeners = bind_group(any_port(), 1).unwrap();
        let addr = listeners[0].local_addr();
        let config = RtConfig { executors: NonZeroUsize::new(1), backend, ..RtConfig::default() };
        let executors = Executors::spawn_with(&config, listeners, |_ctx, listener| async move {
            let stream = listener.into_local().unwrap().accept().await.unwrap();
            // More pieces than one vectored write takes, more bytes than the socket buffers hold.
            let chunks = (0..3000u32)
                .map(|i| {
                    let len = if i % 7 == 0 { 0 } else { 5000 };
                    Chunk::Owned(vec![u8::try_from(i % 251).unwrap(); len])
                })
                .collect();
            stream.write_all(chunks).await.unwrap();
        })
        .unwrap();
        let mut client = TcpStream::connect(addr).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        for i in (0..3000u32).filter(|i| i % 7 != 0) {
            let mut piece = vec![0; 5000];
            client.read_exact(&mut piece).unwrap();
            assert!(piece.iter().all(|&b| u32::from(b) == i % 251), "piece {i}, {backend:?}");
        }
        let (failures, all) = executors.join(LONG);
        assert!(failures.is_empty() && all, "{failures:?}");
    }
}

#[test]
fn a_peer_that_stops_reading_does_not_delay_another() {
    for backend in common::backends() {
        let listeners = bind_group(any_port(), 1).unwrap();
        let addr = listeners[0].local_addr();
        let config = RtConfig { executors: NonZeroUsize::new(1), backend, ..RtConfig::default() };
        let executors = Executors::spawn_with(&config, listeners, |ctx, listener| async move {
            let listener = listener.into_local().unwrap();
            let stuck = Rc::new(listener.accept().await.unwrap());
            let writer = stuck.clone();
            let blocked =
                spawn(async move { writer.write_all(vec![Chunk::Owned(vec![7; 64 << 20])]).await });
            spawn(serve(listener.accept().await.unwrap(), 9, vec![b'>']));
            ctx.stopped().await;
            assert!(!blocked.is_finished(), "the stuck peer took 64 MiB");
            stuck.abort();
            assert!(blocked.await.unwrap().is_err());
        })
        .unwrap();
        let stuck = TcpStream::connect(addr).unwrap();
        let mut client = TcpStream::connect(addr).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        let mut answer = [0; 2];
        client.read_exact(&mut answer).unwrap();
        for round in 0..200u8 {
            client.write_all(&[round]).unwrap();
            client.read_exact(&mut answer).unwrap();
            assert_eq!(answer, [9, round], "{backend:?}");
        }
        executors.stop_handle().stop();
        let (failures, all) = executors.join(LONG);
        assert!(failures.is_empty() && all, "{failures:?}");
        drop(stuck);
    }
}

#[test]
fn a_peer_that_floods_does_not_own_the_executor() {
    for backend in common::backends() {
        // A full read buffer, and less than one: the two ways in which data is always there.
        for size in [64 * 1024, 100] {
            let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            rt::block_on(backend, move || async move {
                let stream = Stream::from_raw(RawStream::new(ours.into(), any_port())).unwrap();
                let turns = Rc::new(Cell::new(0));
                let more = vec![0; size];
                theirs.write_all(&more).unwrap();
                for round in 0..100 {
                    // The first read may have to wait.
                    if round == 1 {
                        let turns = turns.clone();
                        spawn(async move {
                            loop {
                                turns.set(turns.get() + 1);
                                rt::yield_now().await;
                            }
                        });
                    }
                    let n = stream.read_with(|bytes| {
                        theirs.write_all(&more).unwrap();
                        bytes.len()
                    });
                    assert_eq!(n.await.unwrap(), size);
                }
                assert!(turns.get() >= 3, "{} turns, {backend:?}, {size} bytes", turns.get());
            })
            .unwrap();
        }
    }
}

#[test]
fn timers_and_io_have_their_turn_while_a_task_is_always_runnable() {
    for backend in common::backends() {
        rt::block_on(backend, || async {
            let done = Rc::new(Cell::new(false));
            let busy = spawn({
                let done = done.clone();
                async move {
                    while !done.get() {
                        rt::yield_now().await;
                    }
                }
            });
            let other = spawn({
                let done = done.clone();
                async move {
                    while !done.get() {
                        rt::yield_now().await;
                    }
                }
            });
            rt::sleep(Duration::from_millis(5)).await;
            done.set(true);
            busy.await.unwrap();
            other.await.unwrap();
        })
        .unwrap();
    }
}

#[test]
fn a_dropped_read_loses_no_bytes() {
    for backend in common::backends() {
        let listeners = bind_group(any_port(), 1).unwrap();
        let addr = listeners[0].local_addr();
        let listener = listeners.into_iter().next().unwrap();
        let client = std::thread::spawn(move || {
            let mut client = TcpStream::connect(addr).unwrap();
            for i in 0..200u8 {
                client.write_all(&[i]).unwrap();
                let mut ack = [0];
                client.read_exact(&mut ack).unwrap();
            }
        });
        rt::block_on(backend, move || async move {
            let stream = listener.into_local().unwrap().accept().await.unwrap();
            let mut stream = Some(stream);
            for i in 0..200u8 {
                let mut bytes = Vec::new();
                while bytes.is_empty() {
                    let s = stream.as_ref().unwrap();
                    // A deadline of nothing cancels the read in most rounds.
                    let _ = rt::timeout(Duration::ZERO, s.read_append(&mut bytes)).await;
                    rt::yield_now().await;
                }
                assert_eq!(bytes, [i]);
                // Hand-over right after cancelled reads.
                let raw = stream.take().unwrap().into_raw().unwrap();
                let s = Stream::from_raw(raw).unwrap();
                s.write_all(vec![Chunk::Static(b"a")]).await.unwrap();
                stream = Some(s);
            }
        })
        .unwrap();
        client.join().unwrap();
    }
}

#[test]
fn a_task_that_panics_ends_alone_and_a_main_that_panics_is_reported() {
    for backend in common::backends() {
        rt::block_on(backend, || async {
            let failed = spawn(async { panic!("just this task") }).await;
            assert_eq!(failed, Err(rt::TaskPanicked("just this task".to_owned())));
            assert_eq!(spawn(async { 5 }).await, Ok(5));
        })
        .unwrap();
        let config = RtConfig { executors: NonZeroUsize::new(2), backend, ..RtConfig::default() };
        let mut executors = Executors::spawn(&config, |ctx| async move {
            assert!(ctx.index() == 0, "executor gives up");
            ctx.stopped().await;
        })
        .unwrap();
        let (index, result) = executors.next_exit(LONG).unwrap();
        assert_eq!(index, 1);
        assert!(result.unwrap_err().message.contains("executor gives up"));
        assert_eq!(executors.running(), 1);
        executors.stop_handle().stop();
        assert!(executors.join(LONG).1);
    }
}

#[test]
fn pinned_executors_run_on_their_own_cpus() {
    let cpus = rt::allowed_cpus();
    let config = RtConfig { pin: true, ..RtConfig::default() };
    assert_eq!(config.executor_count(), cpus.len());
    let (tx, rx) = std::sync::mpsc::channel();
    let executors = Executors::spawn(&config, move |ctx| {
        tx.send((ctx.index(), rt::allowed_cpus())).unwrap();
        async {}
    })
    .unwrap();
    assert!(executors.join(LONG).1);
    let mut seen: Vec<_> = rx.iter().collect();
    seen.sort();
    let expected: Vec<_> = cpus.iter().map(|&c| vec![c]).enumerate().collect();
    assert_eq!(seen, expected);
}
