//! Rings and doorbells: no lost wake-up, no lost value, no blocked producer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use zeroring_net::rt::ring::{self, Disconnected, RecvError};
use zeroring_net::rt::{self, BackendChoice, Executors, Mesh, RtConfig, spawn, yield_now};

/// Messages per run; `STRESS=300` makes it 300 times as many.
fn messages() -> u64 {
    let factor = std::env::var("STRESS").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    50_000 * factor
}

fn seed() -> u64 {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("SEED={seed}");
    seed
}

/// Sends 0.. in bursts with random gaps, so that the consumer falls asleep at random moments.
fn produce(mut producer: ring::Producer<u64>, count: u64, mut rng: SmallRng) {
    let mut next = 0;
    while next < count {
        for _ in 0..rng.random_range(1..40) {
            if next < count && producer.try_push(next).is_ok() {
                next += 1;
            }
        }
        match rng.random_range(0..100) {
            0 => std::thread::yield_now(),
            1..60 => (0..rng.random_range(0..300)).for_each(|_| std::hint::spin_loop()),
            _ => {}
        }
    }
}

#[test]
fn no_wake_up_is_lost_on_an_executor() {
    let seed = seed();
    for backend in common::backends() {
        let (producer, consumer) = ring::channel(64).unwrap();
        let rng = SmallRng::seed_from_u64(seed);
        let thread = std::thread::spawn(move || produce(producer, messages(), rng));
        let received = rt::block_on(backend, move || async move {
            let mut consumer = consumer.into_local().unwrap();
            let mut expected = 0;
            loop {
                consumer.ready().await;
                for value in consumer.drain() {
                    assert_eq!(value, expected);
                    expected += 1;
                }
                if consumer.is_finished() {
                    return expected;
                }
            }
        })
        .unwrap();
        assert_eq!(received, messages(), "{backend:?}");
        thread.join().unwrap();
    }
}

#[test]
fn no_wake_up_is_lost_on_a_plain_thread() {
    let (producer, mut consumer) = ring::channel(64).unwrap();
    let rng = SmallRng::seed_from_u64(seed());
    let thread = std::thread::spawn(move || produce(producer, messages(), rng));
    for expected in 0..messages() {
        assert_eq!(consumer.recv(None).unwrap(), expected);
    }
    assert!(matches!(consumer.recv(None), Err(RecvError::Disconnected(Disconnected))));
    thread.join().unwrap();
}

#[test]
fn one_message_at_a_time_always_wakes_the_sleeper() {
    for backend in common::backends() {
        let (mut to, consumer) = ring::channel(1).unwrap();
        let (mut back, mut answers) = ring::channel(1).unwrap();
        let thread = std::thread::spawn(move || {
            for i in 0..5_000u32 {
                to.try_push(i).unwrap();
                assert_eq!(answers.recv(None).unwrap(), i);
            }
        });
        rt::block_on(backend, move || async move {
            let mut consumer = consumer.into_local().unwrap();
            while let Some(value) = consumer.recv().await {
                back.try_push(value).unwrap();
            }
        })
        .unwrap();
        thread.join().unwrap();
    }
}

#[test]
fn a_full_ring_returns_the_value_at_once() {
    let (mut producer, mut consumer) = ring::channel(2).unwrap();
    assert_eq!(producer.try_push('a'), Ok(()));
    assert_eq!(producer.try_push('b'), Ok(()));
    assert_eq!(producer.free(), 0);
    assert_eq!(producer.try_push('c'), Err('c'));
    assert_eq!(consumer.try_recv(), Some('a'));
    assert_eq!(producer.try_push('c'), Ok(()));
    assert_eq!(consumer.drain().collect::<String>(), "bc");
    assert!(matches!(consumer.recv(Some(Duration::from_millis(2))), Err(RecvError::Timeout)));
    drop(consumer);
    assert!(producer.is_disconnected());
}

#[test]
fn a_dropped_producer_wakes_the_consumer_after_its_last_value() {
    for backend in common::backends() {
        for _ in 0..50 {
            let (mut producer, consumer) = ring::channel(4).unwrap();
            let (started, start) = std::sync::mpsc::channel();
            let thread = std::thread::spawn(move || {
                start.recv().unwrap();
                producer.try_push(1).unwrap();
            });
            let all = rt::block_on(backend, move || async move {
                let mut consumer = consumer.into_local().unwrap();
                started.send(()).unwrap();
                let mut all = Vec::new();
                while let Some(value) = consumer.recv().await {
                    all.push(value);
                }
                all
            })
            .unwrap();
            assert_eq!(all, [1]);
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_mesh_delivers_everything_between_all_executors() {
    const EACH: u64 = 1_000;
    let seed = seed();
    for backend in common::backends() {
        let count = 3;
        let config = RtConfig {
            executors: std::num::NonZeroUsize::new(count),
            backend,
            ..RtConfig::default()
        };
        let corners = Mesh::<(usize, u64)>::new(count, 16).unwrap();
        let executors = Executors::spawn_with(&config, corners, move |ctx, corner| async move {
            let (mut sender, mut receiver) = corner.into_local().unwrap();
            let me = ctx.index();
            let mut rng = SmallRng::seed_from_u64(seed ^ me as u64);
            let sending = spawn(async move {
                let mut next = vec![0; count];
                while next.iter().any(|&n| n < EACH) {
                    let to = rng.random_range(0..count);
                    if next[to] < EACH && sender.try_send(to, (me, next[to])).is_ok() {
                        next[to] += 1;
                    } else {
                        yield_now().await;
                    }
                }
                sender
            });
            let mut expected = vec![0; count];
            while expected.iter().any(|&n| n < EACH) {
                let (from, value) = receiver.recv().await.unwrap();
                assert_eq!(value, expected[from]);
                expected[from] += 1;
            }
            sending.await.unwrap();
        })
        .unwrap();
        let (failures, all) = executors.join(Duration::from_secs(120));
        assert!(failures.is_empty() && all, "{failures:?}");
    }
}

#[test]
fn a_doorbell_needs_an_executor_to_become_local() {
    let (_producer, consumer) = ring::channel::<u8>(1).unwrap();
    assert!(consumer.into_local().is_err());
    let (_producer, consumer) = ring::channel::<u8>(1).unwrap();
    rt::block_on(BackendChoice::Epoll, move || async move {
        assert!(consumer.into_local().is_ok());
    })
    .unwrap();
}
