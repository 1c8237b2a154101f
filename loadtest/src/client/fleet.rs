//! All clients of a run, spread over workers, as the driver sees them.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use zeroring_net::rt::{self, Executors, RtConfig, ring};

use super::connection::{Ask, Client, ClientSetup, Pace};
use super::model::RowId;
use super::stats::{Interval, WorkerStats};

/// Commands that may wait for a worker. The driver waits when it is full.
const COMMAND_RING: usize = 4096;

/// Real clients ping when nothing was sent for this long (spec: sync-protocol §0).
const PING_EVERY: Duration = Duration::from_secs(5);

/// How long workers may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long clients may take to close their sockets at the end. Less than [`STOP_TIMEOUT`].
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The rows of one client: (table, id) and the row as JSON text.
pub(crate) type Rows = Vec<(RowId, Box<str>)>;

enum Command {
    /// A new client, to connect at the time.
    Open(Box<ClientSetup>, Instant),
    /// An existing client connects again, with its cookie.
    Reopen(usize, Instant),
    Close(usize),
    Pace(usize, Pace),
    Swap(usize, String, Box<Ask>),
    CaughtUp(usize),
    Mutate(usize, String, u64),
    Rows(usize, mpsc::Sender<Rows>),
}

/// The clients of a run.
pub(crate) struct Fleet {
    executors: Option<Executors>,
    commands: Vec<ring::Producer<Command>>,
    stats: Vec<Arc<WorkerStats>>,
}

impl Fleet {
    /// Starts `workers` threads for clients of one server; no client yet.
    pub(crate) fn start(workers: NonZeroUsize, server: SocketAddr) -> Result<Fleet, rt::RtError> {
        Fleet::start_at(workers, &[server], false)
    }

    /// Starts `workers` threads: the n-th one's clients connect to the n-th of `servers`, in turn.
    /// With `own_files` each thread has a table of open files of its own: the limit of open files
    /// is one of a table, not of the process.
    pub(crate) fn start_at(
        workers: NonZeroUsize,
        servers: &[SocketAddr],
        own_files: bool,
    ) -> Result<Fleet, rt::RtError> {
        let config = RtConfig { executors: Some(workers), ..RtConfig::default() };
        let mut commands = Vec::new();
        let mut stats = Vec::new();
        let mut inputs = Vec::new();
        for index in 0..workers.get() {
            let (producer, consumer) = ring::channel(COMMAND_RING)
                .map_err(|cause| rt::RtError::Thread { index, cause })?;
            let shared = Arc::new(WorkerStats::default());
            commands.push(producer);
            stats.push(shared.clone());
            let Some(server) = servers.get(index % servers.len().max(1)) else {
                return Err(rt::RtError::Config("no server to connect to".to_owned()));
            };
            inputs.push((consumer, shared, *server));
        }
        let executors =
            Executors::spawn_with(&config, inputs, move |_, (commands, stats, server)| {
                worker(commands, stats, server, own_files)
            })?;
        Ok(Fleet { executors: Some(executors), commands, stats })
    }

    fn send(&mut self, index: usize, mut command: Command) -> io::Result<()> {
        let worker = index % self.commands.len();
        loop {
            match self.commands[worker].try_push(command) {
                Ok(()) => return Ok(()),
                Err(_) if self.commands[worker].is_disconnected() => {
                    return Err(io::Error::other("a worker of the load generator ended"));
                }
                Err(back) => command = back,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn open(&mut self, setup: ClientSetup, at: Instant) -> io::Result<()> {
        self.send(setup.index, Command::Open(Box::new(setup), at))
    }

    pub(crate) fn reopen(&mut self, index: usize, at: Instant) -> io::Result<()> {
        self.send(index, Command::Reopen(index, at))
    }

    pub(crate) fn close(&mut self, index: usize) -> io::Result<()> {
        self.send(index, Command::Close(index))
    }

    pub(crate) fn set_pace(&mut self, index: usize, pace: Pace) -> io::Result<()> {
        self.send(index, Command::Pace(index, pace))
    }

    /// Client `index` gives up the query `gone` for `new`.
    pub(crate) fn swap(&mut self, index: usize, gone: String, new: Ask) -> io::Result<()> {
        self.send(index, Command::Swap(index, gone, Box::new(new)))
    }

    /// Client `index` changes `item` by a mutation that was meant for `meant_us`.
    pub(crate) fn mutate(&mut self, index: usize, item: String, meant_us: u64) -> io::Result<()> {
        self.send(index, Command::Mutate(index, item, meant_us))
    }

    /// Reconnected clients have nothing more to catch up with: their times are taken.
    pub(crate) fn caught_up(&mut self, clients: usize) -> io::Result<()> {
        for index in 0..clients {
            self.send(index, Command::CaughtUp(index))?;
        }
        // Answers come in order: then every worker has seen its commands.
        for worker in 0..self.commands.len() {
            self.rows(worker)?;
        }
        Ok(())
    }

    /// The rows that a client holds.
    pub(crate) fn rows(&mut self, index: usize) -> io::Result<Rows> {
        let (send, receive) = mpsc::channel();
        self.send(index, Command::Rows(index, send))?;
        receive.recv_timeout(Duration::from_secs(30)).map_err(io::Error::other)
    }

    /// Clients with an open connection.
    pub(crate) fn connected(&self) -> usize {
        self.stats.iter().map(|s| s.connected.load(Ordering::Relaxed)).sum()
    }

    /// Clients that have everything that they asked for.
    pub(crate) fn complete(&self) -> usize {
        self.stats.iter().map(|s| s.complete.load(Ordering::Relaxed)).sum()
    }

    /// When a client last came to have everything.
    pub(crate) fn completed_at(&self) -> Option<Instant> {
        self.stats.iter().filter_map(|s| s.completed_at()).max()
    }

    /// What happened since the last call.
    pub(crate) fn take_interval(&self) -> Interval {
        let mut all = Interval::default();
        for stats in &self.stats {
            all.merge(stats.take());
        }
        all
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.commands.clear();
        if let Some(executors) = self.executors.take() {
            executors.stop_handle().stop();
            let (failures, all_ended) = executors.join(STOP_TIMEOUT);
            for failure in failures {
                eprintln!("load generator: {failure}");
            }
            if !all_ended {
                eprintln!("load generator: a worker did not end within {STOP_TIMEOUT:?}");
            }
        }
    }
}

type Clients = Rc<RefCell<FxHashMap<usize, Rc<Client>>>>;

/// Gives this thread a table of open files of its own, with all that are open now.
fn separate_files() -> io::Result<()> {
    // SAFETY: descriptors that this thread opens from now on are used by this thread alone, and
    // those of the copied table stay valid in both tables.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) }?;
    Ok(())
}

async fn worker(
    commands: ring::Consumer<Command>,
    stats: Arc<WorkerStats>,
    server: SocketAddr,
    own_files: bool,
) {
    if own_files && let Err(error) = separate_files() {
        stats.now().complain(format!("a worker has no table of open files of its own: {error}"));
    }
    let mut commands = match commands.into_local() {
        Ok(commands) => commands,
        Err(error) => {
            stats.now().complain(format!("a worker cannot start: {error}"));
            return;
        }
    };
    let clients = Clients::default();
    rt::spawn(keep_pinging(clients.clone()));
    while let Some(command) = commands.recv().await {
        obey(command, &clients, &stats, server);
    }
    let mut open: Vec<Rc<Client>> =
        clients.borrow_mut().drain().map(|(_, client)| client).collect();
    open.iter().for_each(|client| client.close());
    // The runtime forgets tasks that have not ended, and what they hold: the sockets would stay.
    let deadline = Instant::now() + CLOSE_TIMEOUT;
    while !open.is_empty() && Instant::now() < deadline {
        rt::sleep(Duration::from_millis(1)).await;
        open.retain(|client| Rc::strong_count(client) > 1);
    }
}

async fn keep_pinging(clients: Clients) {
    loop {
        rt::sleep(PING_EVERY).await;
        let now: Vec<Rc<Client>> = clients.borrow().values().cloned().collect();
        for client in now {
            client.ping();
        }
    }
}

fn obey(command: Command, clients: &Clients, stats: &Arc<WorkerStats>, server: SocketAddr) {
    let client = |index: usize| clients.borrow().get(&index).cloned();
    match command {
        Command::Open(setup, at) => {
            let index = setup.index;
            let client = Rc::new(Client::new(*setup, server, stats.clone()));
            client.open(at);
            clients.borrow_mut().insert(index, client);
        }
        Command::Reopen(index, at) => {
            if let Some(client) = client(index) {
                client.open(at);
            }
        }
        Command::Close(index) => {
            if let Some(client) = client(index) {
                client.close();
            }
        }
        Command::Pace(index, pace) => {
            if let Some(client) = client(index) {
                client.set_pace(pace);
            }
        }
        Command::Swap(index, gone, new) => {
            if let Some(client) = client(index) {
                client.swap_query(&gone, *new);
            }
        }
        Command::CaughtUp(index) => {
            if let Some(client) = client(index) {
                client.caught_up();
            }
        }
        Command::Mutate(index, item, meant_us) => {
            if let Some(client) = client(index) {
                client.mutate(&item, meant_us);
            }
        }
        Command::Rows(index, to) => {
            let rows = client(index).map(|c| c.model.borrow().rows()).unwrap_or_default();
            // The driver may have given up.
            let _ = to.send(rows);
        }
    }
}

#[cfg(test)]
mod tests {
    // A failed unwrap is a failed test.
    #![allow(clippy::unwrap_used)]

    use std::net::TcpListener;

    use super::*;

    fn sockets() -> usize {
        let files = std::fs::read_dir("/proc/self/fd").unwrap();
        let is_socket = |to: std::path::PathBuf| to.to_string_lossy().starts_with("socket:");
        files
            .filter(|f| std::fs::read_link(f.as_ref().unwrap().path()).is_ok_and(is_socket))
            .count()
    }

    /// A long comparison has tens of thousands of clients one after the other, and a process may
    /// have 20,000 files.
    #[test]
    fn a_fleet_that_is_gone_leaves_no_socket_open() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let before = sockets();
        let mut fleet = Fleet::start(NonZeroUsize::MIN, listener.local_addr().unwrap()).unwrap();
        for index in 0..20 {
            let setup = ClientSetup {
                index,
                client_id: format!("c{index}"),
                group_id: format!("g{index}"),
                queries: Vec::new(),
                client_schema: "{}".into(),
                counts_new: false,
                protocol: 51,
            };
            fleet.open(setup, Instant::now()).unwrap();
        }
        // None is answered: they wait for the answer to their upgrade.
        let accepted: Vec<_> = (0..20).map(|_| listener.accept().unwrap()).collect();
        assert!(sockets() >= before + 2 * accepted.len());
        drop(fleet);
        drop(accepted);
        assert_eq!(sockets(), before);
    }
}
