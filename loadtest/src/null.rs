//! What the load generator itself can do: against a server that does nothing but send.
//!
//! The null server answers every upgrade, hydrates one row, and then sends the same pokes to
//! everybody at a rate, several in one write as a busy server does. It is a process of its own, so
//! that its CPU time is not the generator's.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::client::connection::{Ask, ClientSetup, PROTOCOL_VERSION};
use crate::client::fleet::Fleet;
use crate::client::stats::Interval;
use crate::error::LoadError;
use crate::process;
use crate::table::number;

/// Clients that connect at once, so that the backlog of the listener is enough.
const CONNECTS_PER_SECOND: f64 = 4000.0;

/// How long all clients together may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// Threads that answer upgrades: one that waits for a slow request must not hold up the others.
const WELCOMERS: usize = 32;

/// The only query that the null server knows.
const HASH: &str = "null";

/// How long the null server lives: it must not stay behind.
const LIFE: Duration = Duration::from_secs(180);

/// What is asked of the generator.
#[derive(Debug, Clone)]
pub(crate) struct NullLoad {
    pub(crate) clients: usize,
    /// Writes to every client in a second.
    pub(crate) rate: f64,
    /// Pokes in each write.
    pub(crate) pokes: usize,
    pub(crate) seconds: f64,
    pub(crate) workers: NonZeroUsize,
}

fn frame(out: &mut Vec<u8>, text: &str) {
    out.push(0x81);
    match text.len() {
        n @ 0..=125 => out.push(n as u8),
        n => {
            out.push(126);
            // Messages of this server are far below 64 KiB.
            out.extend_from_slice(&(n as u16).to_be_bytes());
        }
    }
    out.extend_from_slice(text.as_bytes());
}

/// The poke from `from` to the next version.
fn poke(out: &mut Vec<u8>, from: Option<u64>, to: u64, sent_us: u64) {
    let base = from.map_or("null".to_owned(), |v| format!("\"{v:016}\""));
    let got = if from.is_none() {
        format!("\"gotQueriesPatch\":[{{\"op\":\"put\",\"hash\":\"{HASH}\"}}],")
    } else {
        String::new()
    };
    frame(out, &format!("[\"pokeStart\",{{\"pokeID\":\"{to:016}\",\"baseCookie\":{base}}}]"));
    frame(
        out,
        &format!(
            "[\"pokePart\",{{\"pokeID\":\"{to:016}\",{got}\"rowsPatch\":[{{\"op\":\"put\",\
             \"tableName\":\"item\",\"value\":{{\"id\":\"p0-i1\",\"project_id\":\"p0\",\
             \"owner\":\"u1\",\"status\":\"open\",\"rank\":{to},\"title\":\"Changed {to}\",\
             \"body\":\"{}\",\"sent_us\":{sent_us}}}}}]}}]",
            "x".repeat(100)
        ),
    );
    frame(out, &format!("[\"pokeEnd\",{{\"pokeID\":\"{to:016}\",\"cookie\":\"{to:016}\"}}]"));
}

fn epoch_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}

struct Peers {
    version: u64,
    sockets: Vec<TcpStream>,
}

/// The process of the null server: prints its port, serves, and ends by itself.
pub(crate) fn serve(rate: f64, pokes: usize) -> Result<(), LoadError> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(LoadError::io("listening"))?;
    let address = listener.local_addr().map_err(LoadError::io("listening"))?;
    println!("{}", address.port());
    io::stdout().flush().map_err(LoadError::io("telling the port"))?;
    let peers = Arc::new(Mutex::new(Peers { version: 1, sockets: Vec::new() }));
    let listener = Arc::new(listener);
    for _ in 0..WELCOMERS {
        let (listener, peers) = (listener.clone(), peers.clone());
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                // A client that fails here shows as not connected.
                let _ = welcome(socket, &peers);
            }
        });
    }
    let begin = Instant::now();
    let mut writes = 0_u32;
    while begin.elapsed() < LIFE {
        writes += 1;
        let due = begin + Duration::from_secs_f64(f64::from(writes) / rate);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let mut peers = peers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = Vec::new();
        let now = epoch_us();
        for _ in 0..pokes {
            poke(&mut bytes, Some(peers.version), peers.version + 1, now);
            peers.version += 1;
        }
        // Who does not take everything at once would see torn messages: it is dropped.
        peers.sockets.retain_mut(|s| s.write(&bytes).is_ok_and(|n| n == bytes.len()));
    }
    Ok(())
}

fn welcome(mut socket: TcpStream, peers: &Mutex<Peers>) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut head = Vec::new();
    let mut part = [0; 4096];
    while !head.ends_with(b"\r\n\r\n") {
        let n = socket.read(&mut part)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(&part[..n]);
    }
    let mut answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\
                       Connection: Upgrade\r\n\r\n"
        .to_vec();
    frame(&mut answer, "[\"connected\",{\"wsid\":\"null\",\"timestamp\":1}]");
    let mut peers = peers.lock().unwrap_or_else(PoisonError::into_inner);
    poke(&mut answer, None, peers.version, 0);
    socket.write_all(&answer)?;
    socket.set_nonblocking(true)?;
    peers.sockets.push(socket);
    Ok(())
}

struct ChildServer(Child);

impl Drop for ChildServer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_server(load: &NullLoad) -> Result<(ChildServer, SocketAddr), LoadError> {
    let me = std::env::current_exe().map_err(LoadError::io("finding this program"))?;
    let child = Command::new(me)
        .args(["null-server", &load.rate.to_string(), &load.pokes.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(LoadError::io("starting the null server"))?;
    let mut server = ChildServer(child);
    let mut line = String::new();
    if let Some(stdout) = server.0.stdout.take() {
        io::BufRead::read_line(&mut io::BufReader::new(stdout), &mut line)
            .map_err(LoadError::io("reading the null server's port"))?;
    }
    let port = line.trim().parse::<u16>().map_err(|e| LoadError::Server {
        server: "null server".to_owned(),
        cause: format!("it told {line:?} as its port: {e}"),
    })?;
    Ok((server, SocketAddr::from(([127, 0, 0, 1], port))))
}

/// Measures the generator; false if it did not keep up.
pub(crate) fn measure(load: &NullLoad) -> Result<bool, LoadError> {
    let mut servers = Vec::new();
    let mut addresses = Vec::new();
    for _ in 0..load.workers.get() {
        // One for each worker: a server, too, has a limit of open files.
        let (server, address) = start_server(load)?;
        servers.push(server);
        addresses.push(address);
    }
    let mut fleet = Fleet::start_at(load.workers, &addresses, load.workers.get() > 1)?;
    let schema: Arc<str> = r#"{"tables":{}}"#.into();
    let begin = Instant::now();
    for index in 0..load.clients {
        let setup = ClientSetup {
            index,
            client_id: format!("c{index}"),
            group_id: format!("g{index}"),
            queries: vec![Ask { hash: HASH.to_owned(), ast: serde_json::json!({"table": "item"}) }],
            client_schema: schema.clone(),
            counts_new: false,
            protocol: PROTOCOL_VERSION,
        };
        let at = begin + Duration::from_secs_f64(index as f64 / CONNECTS_PER_SECOND);
        fleet.open(setup, at).map_err(LoadError::io("opening a client"))?;
    }
    while fleet.complete() < load.clients && begin.elapsed() < CONNECT_TIMEOUT {
        std::thread::sleep(Duration::from_millis(20));
    }
    let connected = fleet.complete();
    let connect_seconds = begin.elapsed().as_secs_f64();
    drop(fleet.take_interval());
    let cpu = || {
        (
            process::own_cpu_seconds(),
            servers.iter().map(|s| process::cpu_seconds(s.0.id())).sum::<f64>(),
        )
    };
    let (own_before, server_before) = cpu();
    let begin = Instant::now();
    let mut total = Interval::default();
    while begin.elapsed().as_secs_f64() < load.seconds {
        std::thread::sleep(Duration::from_millis(100));
        total.merge(fleet.take_interval());
    }
    let seconds = begin.elapsed().as_secs_f64();
    let (own, theirs) = cpu();
    let alive = servers.iter_mut().all(|s| matches!(s.0.try_wait(), Ok(None)));
    let still_connected = fleet.connected();
    let ms = |q| total.write.quantile_ms(q).map_or("–".to_owned(), number);
    let (own_cpu, server_cpu) =
        ((own - own_before) / seconds * 100.0, (theirs - server_before) / seconds * 100.0);
    println!(
        "{connected} clients connected within {connect_seconds:.1} s on {} thread(s)\n\
         {:.0} deliveries/s of {:.0} offered, {:.1} MB/s, for {seconds:.1} s\n\
         from the server's write until applied: p50 {} ms, p99 {} ms\n\
         CPU: generator {own_cpu:.0} %, null server {server_cpu:.0} %; memory of the generator \
         {:.0} MB\n\
         {} connections lost, {} violations{}",
        load.workers,
        total.row_ops as f64 / seconds,
        load.clients as f64 * load.rate * load.pokes as f64,
        total.bytes as f64 / 1e6 / seconds,
        ms(0.5),
        ms(0.99),
        process::own_pss_bytes() as f64 / 1e6,
        load.clients - still_connected.min(load.clients),
        total.violations,
        total.complaints.first().map(|c| format!(", first: {c}")).unwrap_or_default(),
    );
    Ok(alive
        && connected == load.clients
        && still_connected == load.clients
        && total.violations == 0)
}
