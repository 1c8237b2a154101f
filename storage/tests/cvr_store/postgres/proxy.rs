//! A TCP proxy before Postgres that misbehaves at a chosen moment, and counts what is asked.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// What happens to the connection that commits next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Fault {
    None = 0,
    /// The commit does not reach the server; the connection breaks.
    CutBefore = 1,
    /// The commit takes place, its answer does not arrive; the connection breaks.
    CutAfter = 2,
    /// The same, but the connection stays open and silent.
    Silence = 3,
}

/// The proxy; its threads end with the process.
pub struct Proxy {
    pub port: u16,
    fault: Arc<AtomicU8>,
    traffic: Arc<Traffic>,
}

/// What came from the clients.
#[derive(Default)]
struct Traffic {
    round_trips: AtomicUsize,
    statements: AtomicUsize,
    gate: Mutex<Gate>,
    moved: Condvar,
}

#[derive(Default)]
struct Gate {
    closed: bool,
    /// Connections that have something to say.
    waiting: usize,
}

/// Requests that cost time: each round trip is waited for, each statement is work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Asked {
    pub round_trips: usize,
    pub statements: usize,
}

/// The message that ends a pipeline, and the one that runs a statement: `Sync`, and `Execute` of
/// the unnamed portal without a limit.
const SYNC: &[u8] = b"S\0\0\0\x04";
const EXECUTE: &[u8] = b"E\0\0\0\x09\0\0\0\0\0";

/// A message that only a commit has: the statement, and its answer.
const ASKED: &[u8] = b"\0COMMIT\0";
const ANSWERED: &[u8] = b"COMMIT\0";

impl Proxy {
    pub fn start(server_port: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let fault = Arc::new(AtomicU8::new(0));
        let traffic = Arc::new(Traffic::default());
        let (shared, noted) = (fault.clone(), traffic.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().map(Result::unwrap) {
                let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)) else { continue };
                let (c, s) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let (up, down) = (shared.clone(), shared.clone());
                let noted = noted.clone();
                std::thread::spawn(move || {
                    forward(c, s, |chunk| {
                        noted.pass(chunk);
                        up_fault(&up, chunk)
                    });
                });
                std::thread::spawn(move || {
                    forward(server, client, |chunk| down_fault(&down, chunk))
                });
            }
        });
        Proxy { port, fault, traffic }
    }

    /// What was asked since the last time.
    pub fn asked(&self) -> Asked {
        Asked {
            round_trips: self.traffic.round_trips.swap(0, Ordering::SeqCst),
            statements: self.traffic.statements.swap(0, Ordering::SeqCst),
        }
    }

    /// Requests wait from now on.
    pub fn close_gate(&self) {
        self.traffic.gate.lock().unwrap().closed = true;
    }

    /// Returns when so many connections have a request that waits.
    pub fn until_waiting(&self, connections: usize) {
        let gate = self.traffic.gate.lock().unwrap();
        drop(self.traffic.moved.wait_while(gate, |g| g.waiting < connections).unwrap());
    }

    pub fn open_gate(&self) {
        self.traffic.gate.lock().unwrap().closed = false;
        self.traffic.moved.notify_all();
    }

    /// The next commit meets this.
    pub fn set(&self, fault: Fault) {
        self.fault.store(fault as u8, Ordering::SeqCst);
    }

    /// It has happened.
    pub fn is_over(&self) -> bool {
        self.fault.load(Ordering::SeqCst) == Fault::None as u8
    }
}

impl Traffic {
    fn pass(&self, chunk: &[u8]) {
        let count = |what: &[u8]| chunk.windows(what.len()).filter(|w| *w == what).count();
        self.round_trips.fetch_add(count(SYNC), Ordering::SeqCst);
        self.statements.fetch_add(count(EXECUTE), Ordering::SeqCst);
        let mut gate = self.gate.lock().unwrap();
        gate.waiting += 1;
        self.moved.notify_all();
        gate = self.moved.wait_while(gate, |g| g.closed).unwrap();
        gate.waiting -= 1;
    }
}

/// What to do with some bytes.
enum Forward {
    Pass,
    Cut,
    Swallow,
}

fn up_fault(fault: &AtomicU8, chunk: &[u8]) -> Forward {
    let commits = chunk.windows(ASKED.len()).any(|w| w == ASKED);
    if commits && take(fault, Fault::CutBefore) { Forward::Cut } else { Forward::Pass }
}

fn down_fault(fault: &AtomicU8, chunk: &[u8]) -> Forward {
    if !chunk.windows(ANSWERED.len()).any(|w| w == ANSWERED) {
        return Forward::Pass;
    }
    if take(fault, Fault::CutAfter) {
        return Forward::Cut;
    }
    if take(fault, Fault::Silence) { Forward::Swallow } else { Forward::Pass }
}

/// True if it was this fault's turn; once.
fn take(fault: &AtomicU8, which: Fault) -> bool {
    let none = Fault::None as u8;
    fault.compare_exchange(which as u8, none, Ordering::SeqCst, Ordering::SeqCst).is_ok()
}

fn forward(mut from: TcpStream, mut to: TcpStream, decide: impl Fn(&[u8]) -> Forward) {
    // A flush of a test fits in one read.
    let mut buffer = vec![0; 1 << 20];
    let mut silent = false;
    while let Ok(n) = from.read(&mut buffer)
        && n > 0
    {
        match decide(&buffer[..n]) {
            Forward::Pass if silent => {}
            Forward::Pass => {
                if to.write_all(&buffer[..n]).is_err() {
                    break;
                }
            }
            Forward::Swallow => silent = true,
            Forward::Cut => break,
        }
    }
    // The other direction may have closed them.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
