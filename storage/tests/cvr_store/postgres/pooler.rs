//! A pooler between the store and Postgres that gives each transaction another session: statements
//! that one session has prepared are unknown to the next, or somebody else's are there.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use zeroring_storage::cvr_store::PurgeLimits;

use super::lab::{PostgresLab, server};
use crate::lab::*;
use crate::suite::{execute, group};

/// The code of a request for TLS, which comes before the startup message.
const SSL_REQUEST: [u8; 4] = 80_877_103_u32.to_be_bytes();

/// A message with its type; the first message of a connection has none.
fn message(from: &mut TcpStream, typed: bool) -> std::io::Result<(u8, Vec<u8>)> {
    let mut head = vec![0; if typed { 5 } else { 4 }];
    from.read_exact(&mut head)?;
    let tag = if typed { head[0] } else { 0 };
    let length = u32::from_be_bytes(head[head.len() - 4..].try_into().unwrap()) as usize;
    let mut body = vec![0; length - 4];
    from.read_exact(&mut body)?;
    head.extend(body);
    Ok((tag, head))
}

/// Passes messages on until the sender waits: a client for the answer, a server for the question.
fn pass(from: &mut TcpStream, to: &mut TcpStream, last: &[u8]) -> std::io::Result<Vec<u8>> {
    loop {
        let (tag, bytes) = message(from, true)?;
        to.write_all(&bytes)?;
        if last.contains(&tag) {
            return Ok(bytes);
        }
    }
}

/// Sessions that no transaction has, the one that was longest without first.
#[derive(Default)]
struct Pool {
    sessions: Mutex<VecDeque<TcpStream>>,
    back: Condvar,
    transactions: AtomicUsize,
}

impl Pool {
    fn take(&self) -> TcpStream {
        let sessions = self.sessions.lock().unwrap();
        let mut sessions = self.back.wait_while(sessions, |s| s.is_empty()).unwrap();
        sessions.pop_front().unwrap()
    }

    fn give(&self, session: TcpStream) {
        self.sessions.lock().unwrap().push_back(session);
        self.back.notify_one();
    }

    fn serve(&self, mut client: TcpStream, port: u16) -> std::io::Result<()> {
        let (_, mut startup) = message(&mut client, false)?;
        if startup[4..] == SSL_REQUEST {
            client.write_all(b"N")?;
            startup = message(&mut client, false)?.1;
        }
        let mut session = TcpStream::connect(("127.0.0.1", port))?;
        session.set_nodelay(true)?;
        session.write_all(&startup)?;
        pass(&mut session, &mut client, b"Z")?;
        self.give(session);
        loop {
            let mut asked = Vec::new();
            // All up to Sync, or a simple query, or the end.
            let tag = loop {
                let (tag, bytes) = message(&mut client, true)?;
                asked.extend(bytes);
                if b"SQX".contains(&tag) {
                    break tag;
                }
            };
            if tag == b'X' {
                return Ok(());
            }
            let mut session = self.take();
            session.write_all(&asked)?;
            // A transaction may take several of these.
            while pass(&mut session, &mut client, b"Z")?.last() != Some(&b'I') {
                pass(&mut client, &mut session, b"SQ")?;
            }
            self.transactions.fetch_add(1, Ordering::Relaxed);
            self.give(session);
        }
    }
}

/// Starts the pooler.
fn start(server_port: u16) -> (u16, Arc<Pool>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let pool = Arc::new(Pool::default());
    let shared = pool.clone();
    std::thread::spawn(move || {
        for client in listener.incoming().map(Result::unwrap) {
            let pool = shared.clone();
            // A connection that breaks breaks both ways: its sockets are dropped.
            std::thread::spawn(move || drop(pool.serve(client, server_port)));
        }
    });
    (port, pool)
}

/// Every kind of request several times over: what one session has prepared is not there in the
/// next, and whoever finds that out goes on without.
#[test]
fn a_pooler_that_moves_transactions_between_sessions_is_lived_with() {
    let postgres = server();
    let mut lab = PostgresLab::new(&postgres, "pooled");
    let (port, pool) = start(postgres.port());
    lab.config.connection.port = port;
    lab.config.max_connections = 8;
    let store = lab.open("a");
    let other = lab.open("b");
    let cvrs: Vec<_> = (0..8)
        .map(|n| {
            let mut cvr = group(&store, &format!("g{n}"), &["q"]);
            for at in 5..9 {
                let refs = [("q", at as i64)];
                let rows: Vec<_> = (0..150).map(|id| (id, &refs[..])).collect();
                cvr = execute(&store, &cvr, at, &rows);
                assert_eq!(store.rows(&cvr, &["q"], &[row_id("issue", 1)]).unwrap().len(), 150);
            }
            cvr
        })
        .collect();
    for cvr in &cvrs {
        assert_eq!(store.await_rows(cvr.id.as_str()), Ok(()));
        assert_eq!(&other.try_load(cvr.id.as_str(), 2e15).unwrap().cvr, cvr);
        let scan = zeroring_storage::cvr_store::CatchupScan {
            range: range(cvr, None),
            without: vec![],
            from: None,
            limit: 2_000,
        };
        assert_eq!(other.page(scan).unwrap().rows.len(), 150);
    }
    let limits = PurgeLimits { now_ms: 1e9, inactive_ms: 1.0, batch: 3 };
    assert_eq!(other.purge(limits).groups, 3);
    assert_eq!(other.purge(limits).groups, 3);
    assert!(pool.transactions.load(Ordering::Relaxed) > 100);
}
