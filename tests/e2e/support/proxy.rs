//! A TCP proxy that misbehaves as told: its target moves, its bytes take time, its connections are
//! cut or fall silent.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The proxy. Its threads end with their connections, the accepting one with the process.
pub struct Proxy {
    pub port: u16,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    target: AtomicUsize,
    delay_ms: AtomicU64,
    patient: AtomicBool,
    open: Mutex<Vec<Connection>>,
}

struct Connection {
    ends: [TcpStream; 2],
    /// Nothing passes any more, and nobody is told.
    silent: Arc<AtomicBool>,
}

impl Proxy {
    /// Listens on a port of its own for connections to `target` on this machine.
    pub fn start(target: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared::default());
        let proxy = Proxy { port, shared: shared.clone() };
        proxy.route(target);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                shared.connect(client);
            }
        });
        proxy
    }

    /// Connections from now on go to this port.
    pub fn route(&self, target: u16) {
        self.shared.target.store(usize::from(target), Ordering::SeqCst);
    }

    /// Connections that the target refuses wait until it is up; otherwise their clients see them end.
    pub fn wait_for_target(&self) {
        self.shared.patient.store(true, Ordering::SeqCst);
    }

    /// Bytes take so long in each direction.
    pub fn delay(&self, delay: Duration) {
        self.shared.delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Ends all connections.
    pub fn cut(&self) {
        for connection in self.shared.open.lock().unwrap().drain(..) {
            for end in connection.ends {
                let _ = end.shutdown(Shutdown::Both);
            }
        }
    }

    /// Connections that are open now stay open and pass nothing any more.
    pub fn freeze(&self) {
        for connection in &*self.shared.open.lock().unwrap() {
            connection.silent.store(true, Ordering::SeqCst);
        }
    }
}

impl Shared {
    fn connect(self: &Arc<Shared>, client: TcpStream) {
        let target = || ("127.0.0.1", self.target.load(Ordering::SeqCst) as u16);
        match TcpStream::connect(target()) {
            Ok(server) => self.join(client, server),
            Err(_) if self.patient.load(Ordering::SeqCst) => {
                let shared = self.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(5));
                    shared.connect(client);
                });
            }
            Err(_) => {}
        }
    }

    fn join(self: &Arc<Shared>, client: TcpStream, server: TcpStream) {
        let silent = Arc::new(AtomicBool::new(false));
        for end in [&client, &server] {
            end.set_nodelay(true).unwrap();
        }
        let copy = |end: &TcpStream| end.try_clone().unwrap();
        self.forward(copy(&client), copy(&server), silent.clone());
        self.forward(copy(&server), copy(&client), silent.clone());
        let mut open = self.open.lock().unwrap();
        // Those that ended are of no interest.
        open.retain(|c| c.ends[0].peer_addr().is_ok());
        open.push(Connection { ends: [client, server], silent });
    }

    /// Two threads: one reads, one writes when the time has come.
    fn forward(self: &Arc<Shared>, mut from: TcpStream, to: TcpStream, silent: Arc<AtomicBool>) {
        let (send, due) = channel::<(Instant, Vec<u8>)>();
        let shared = self.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(n) = from.read(&mut buffer)
                && n > 0
            {
                let delay = Duration::from_millis(shared.delay_ms.load(Ordering::SeqCst));
                if send.send((Instant::now() + delay, buffer[..n].to_vec())).is_err() {
                    return;
                }
            }
        });
        std::thread::spawn(move || deliver(to, &due, &silent));
    }
}

fn deliver(mut to: TcpStream, due: &Receiver<(Instant, Vec<u8>)>, silent: &AtomicBool) {
    while let Ok((at, bytes)) = due.recv() {
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        if silent.load(Ordering::SeqCst) {
            continue;
        }
        if to.write_all(&bytes).is_err() {
            return;
        }
    }
    // A connection that was silenced does not even say that it ended.
    if !silent.load(Ordering::SeqCst) {
        let _ = to.shutdown(Shutdown::Write);
    }
}
