//! The blocking driver: a non-blocking socket, `poll(2)`, and optionally TLS.
//!
//! While it writes it also reads, so that a long pipeline cannot deadlock with a server that
//! waits for its answers to be read. Every wait has a deadline, and can be ended by a second
//! descriptor (a doorbell).

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use postgres_protocol::message::frontend;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::ClientConnection;

use super::config::PgConfig;
use super::error::PgError;
use super::frame::{Frame, FrameBuffer, MAX_FRAME_BYTES};
use super::login::{Login, SessionInfo, tls_server_end_point};
use crate::tls;

/// Plain text is handed to TLS in pieces of this size, so that the ciphertext waiting for the
/// socket stays small.
const TLS_WRITE_BYTES: usize = 64 << 10;

/// Why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// A message is there.
    Ready,
    /// The time is up.
    TimedOut,
    /// The doorbell was rung.
    Woken,
}

/// A connection: socket, TLS and both buffers.
#[derive(Debug)]
pub struct Wire {
    socket: TcpStream,
    tls: Option<Box<ClientConnection>>,
    inbound: FrameBuffer,
    /// Messages to send; filled by whoever drives the session.
    pub out: BytesMut,
    /// End of the frame last handed out; consumed at the next call.
    handed_out: Option<usize>,
    received: u64,
    eof: bool,
}

impl Wire {
    /// Connects and logs in.
    ///
    /// # Errors
    /// Any of the connecting kinds of [`PgError`].
    pub fn connect(config: &PgConfig, replication: bool) -> Result<(Wire, SessionInfo), PgError> {
        let deadline = Instant::now() + config.connect_timeout;
        let socket = connect_tcp(config, deadline)?;
        let mut wire = Wire {
            socket,
            tls: None,
            inbound: FrameBuffer::default(),
            out: BytesMut::new(),
            handed_out: None,
            received: 0,
            eof: false,
        };
        let late = |e| match e {
            PgError::Timeout(_) => PgError::Timeout(config.connect_timeout),
            e => e,
        };
        let binding = wire.start_tls(config, deadline).map_err(late)?;
        let info = wire.log_in(config, replication, binding, deadline).map_err(late)?;
        wire.inbound.set_max_frame(MAX_FRAME_BYTES);
        Ok((wire, info))
    }

    /// A connection that only sends a cancel request for another session.
    pub(crate) fn cancel(config: &PgConfig, process: i32, secret: i32) -> Result<(), PgError> {
        let deadline = Instant::now() + config.connect_timeout;
        let socket = connect_tcp(config, deadline)?;
        let mut wire = Wire {
            socket,
            tls: None,
            inbound: FrameBuffer::default(),
            out: BytesMut::new(),
            handed_out: None,
            received: 0,
            eof: false,
        };
        wire.start_tls(config, deadline)?;
        frontend::cancel_request(process, secret, &mut wire.out);
        wire.flush(Some(deadline))
    }

    fn start_tls(
        &mut self,
        config: &PgConfig,
        deadline: Instant,
    ) -> Result<Option<Vec<u8>>, PgError> {
        let failed = |cause: String| PgError::Tls { address: config.address(), cause };
        let root = config.ssl_root_cert.as_deref().map(Path::new);
        let Some(tls_config) = tls::client_config(config.ssl, root, &[b"postgresql"])
            .map_err(|e| failed(e.to_string()))?
        else {
            return Ok(None);
        };
        // Written without reading: the answer's one byte is no message.
        frontend::ssl_request(&mut self.out);
        while !self.out.is_empty() {
            if !self.write_some()? && self.wait(Some(deadline), None)? == Waited::TimedOut {
                return Err(PgError::Timeout(Duration::ZERO));
            }
        }
        match self.read_one_byte(deadline)? {
            b'S' => {}
            b'N' if config.ssl.allows_plain() => return Ok(None),
            b'N' => {
                return Err(failed(
                    "the server has TLS switched off; switch it on, or use sslmode=disable".into(),
                ));
            }
            other => {
                return Err(PgError::Protocol(format!("answer {other:#x} to the TLS request")));
            }
        }
        let name = tls::server_name(&config.host).map_err(|e| failed(e.to_string()))?;
        let session = ClientConnection::new(tls_config, name).map_err(|e| failed(e.to_string()))?;
        self.tls = Some(Box::new(session));
        while self.tls.as_ref().is_some_and(|t| t.is_handshaking()) {
            let progressed = self.turn().map_err(|e| match e {
                PgError::Io(e) => failed(e.to_string()),
                e => e,
            })?;
            if self.eof {
                return Err(failed("the server closed the connection".into()));
            }
            if !progressed && self.wait(Some(deadline), None)? == Waited::TimedOut {
                return Err(PgError::Timeout(config.connect_timeout));
            }
        }
        let certificate = self.tls.as_ref().and_then(|t| t.peer_certificates()?.first());
        Ok(certificate.and_then(|c| tls_server_end_point(c)))
    }

    /// The answer to the TLS request. Exactly one byte is read: what follows belongs to TLS, and
    /// plain bytes smuggled in before the handshake must not be taken for the server's.
    fn read_one_byte(&mut self, deadline: Instant) -> Result<u8, PgError> {
        let mut byte = [0];
        loop {
            match self.socket.read(&mut byte) {
                Ok(0) => return Err(PgError::Closed),
                Ok(_) => return Ok(byte[0]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if self.wait(Some(deadline), None)? == Waited::TimedOut {
                        return Err(PgError::Timeout(Duration::ZERO));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn log_in(
        &mut self,
        config: &PgConfig,
        replication: bool,
        binding: Option<Vec<u8>>,
        deadline: Instant,
    ) -> Result<SessionInfo, PgError> {
        let mut out = std::mem::take(&mut self.out);
        let mut login = Login::start(config, replication, binding, &mut out)?;
        self.out = out;
        loop {
            self.flush(Some(deadline))?;
            let mut answer = BytesMut::new();
            let Some(frame) = self.next(Some(deadline))? else {
                return Err(PgError::Timeout(config.connect_timeout));
            };
            let info = login.on_frame(frame, &mut answer)?;
            self.out.unsplit(answer);
            if let Some(info) = info {
                return Ok(info);
            }
        }
    }

    /// Bytes received so far.
    pub fn received_bytes(&self) -> u64 {
        self.received
    }

    /// Another handle of the socket, e.g. to shut it down from another thread.
    ///
    /// # Errors
    /// [`PgError::Io`] if the process is out of descriptors.
    pub fn try_clone_socket(&self) -> Result<TcpStream, PgError> {
        Ok(self.socket.try_clone()?)
    }

    /// Sends everything in [`Wire::out`]; what arrives meanwhile is kept.
    ///
    /// # Errors
    /// [`PgError::Timeout`] at the deadline; I/O errors.
    pub fn flush(&mut self, deadline: Option<Instant>) -> Result<(), PgError> {
        loop {
            let progressed = self.turn()?;
            if !self.wants_write() {
                return Ok(());
            }
            if self.eof {
                return Err(PgError::Closed);
            }
            if !progressed && self.wait(deadline, None)? == Waited::TimedOut {
                return Err(PgError::Timeout(Duration::ZERO));
            }
        }
    }

    /// The next message; `None` at the deadline.
    ///
    /// # Errors
    /// [`PgError::Closed`] when the server closed the connection; I/O and framing errors.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Frame<'_>>, PgError> {
        match self.wait_frame(deadline, None)? {
            Waited::Ready => self.take(),
            _ => Ok(None),
        }
    }

    /// Waits until a message is there, the deadline or the doorbell.
    ///
    /// # Errors
    /// As [`Wire::next`].
    pub fn wait_frame(
        &mut self,
        deadline: Option<Instant>,
        doorbell: Option<BorrowedFd<'_>>,
    ) -> Result<Waited, PgError> {
        loop {
            if self.has_frame()? {
                return Ok(Waited::Ready);
            }
            let progressed = self.turn()?;
            if self.has_frame()? {
                return Ok(Waited::Ready);
            }
            if self.eof {
                return Err(PgError::Closed);
            }
            if progressed {
                continue;
            }
            match self.wait(deadline, doorbell)? {
                Waited::Ready => {}
                other => return Ok(other),
            }
        }
    }

    fn has_frame(&mut self) -> Result<bool, PgError> {
        if let Some(end) = self.handed_out.take() {
            self.inbound.consume(end);
        }
        Ok(self.inbound.peek()?.is_some())
    }

    /// The message that is already here, if any.
    ///
    /// # Errors
    /// [`PgError::Protocol`] on a framing error.
    pub fn take(&mut self) -> Result<Option<Frame<'_>>, PgError> {
        if let Some(end) = self.handed_out.take() {
            self.inbound.consume(end);
        }
        let Some((tag, range)) = self.inbound.peek()? else { return Ok(None) };
        self.handed_out = Some(range.end);
        Ok(Some(Frame { tag, body: self.inbound.slice(range) }))
    }

    /// Whether one of the whole messages among the next `within` bytes that are here is such.
    pub fn any_ahead(&self, within: usize, is_such: impl FnMut(Frame<'_>) -> bool) -> bool {
        self.inbound.any(self.handed_out, within, is_such)
    }

    /// The message last handed out, again.
    pub fn again(&self) -> Option<Frame<'_>> {
        self.handed_out?;
        let (tag, range) = self.inbound.peek().ok()??;
        Some(Frame { tag, body: self.inbound.slice(range) })
    }

    fn wants_write(&self) -> bool {
        !self.out.is_empty() || self.tls.as_ref().is_some_and(|t| t.wants_write())
    }

    /// One round of writing and reading without waiting; true if anything moved.
    fn turn(&mut self) -> Result<bool, PgError> {
        let wrote = self.write_some()?;
        let read = !self.eof && self.read_some()?;
        Ok(wrote || read)
    }

    fn write_some(&mut self) -> Result<bool, PgError> {
        let mut moved = false;
        loop {
            let result = match &mut self.tls {
                None if self.out.is_empty() => return Ok(moved),
                None => self.socket.write(&self.out),
                Some(tls) => {
                    if !tls.wants_write() && !self.out.is_empty() && !tls.is_handshaking() {
                        let piece = self.out.len().min(TLS_WRITE_BYTES);
                        let n = tls.writer().write(&self.out[..piece])?;
                        self.out.advance(n);
                    }
                    if !tls.wants_write() {
                        return Ok(moved);
                    }
                    tls.write_tls(&mut self.socket)
                }
            };
            match result {
                Ok(0) => return Err(PgError::Closed),
                Ok(n) => {
                    if self.tls.is_none() {
                        self.out.advance(n);
                    }
                    moved = true;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(moved),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The server may have told why before it closed: read that first.
                Err(e) if is_gone(&e) && self.read_some().unwrap_or(false) => {
                    self.out.clear();
                    return Ok(true);
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn read_some(&mut self) -> Result<bool, PgError> {
        // A frame that is handed out is never moved: it was consumed before any read.
        if let Some(end) = self.handed_out.take() {
            self.inbound.consume(end);
        }
        let result = match &mut self.tls {
            None => self.socket.read(self.inbound.spare()?),
            Some(tls) => match tls.read_tls(&mut self.socket) {
                Ok(n) => {
                    let state = tls
                        .process_new_packets()
                        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                    let mut left = state.plaintext_bytes_to_read();
                    self.received += left as u64;
                    while left > 0 {
                        let spare = self.inbound.spare()?;
                        let read = tls.reader().read(spare)?;
                        self.inbound.filled(read);
                        left -= read.min(left);
                    }
                    self.eof |= n == 0 || state.peer_has_closed();
                    return Ok(true);
                }
                Err(e) => Err(e),
            },
        };
        match result {
            Ok(n) => {
                self.inbound.filled(n);
                self.received += n as u64;
                self.eof = n == 0;
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(e) if is_gone(&e) => {
                self.eof = true;
                Ok(true)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn wait(
        &mut self,
        deadline: Option<Instant>,
        doorbell: Option<BorrowedFd<'_>>,
    ) -> Result<Waited, PgError> {
        let mut interest = PollFlags::IN;
        if self.wants_write() {
            interest |= PollFlags::OUT;
        }
        loop {
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            let timeout = left.map(|left| Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            let socket = PollFd::from_borrowed_fd(self.socket.as_fd(), interest);
            let bell = doorbell.unwrap_or(self.socket.as_fd());
            let bell_interest = if doorbell.is_some() { PollFlags::IN } else { PollFlags::empty() };
            let mut fds = [socket, PollFd::from_borrowed_fd(bell, bell_interest)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Ok(Waited::TimedOut),
                Ok(_) if !fds[0].revents().is_empty() => return Ok(Waited::Ready),
                Ok(_) => return Ok(Waited::Woken),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // Good manners only: the server ends the session anyway when the socket closes.
        self.out.clear();
        frontend::terminate(&mut self.out);
        let _ = self.write_some();
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = tls.write_tls(&mut self.socket);
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::UnexpectedEof
    )
}

fn connect_tcp(config: &PgConfig, deadline: Instant) -> Result<TcpStream, PgError> {
    let failed = |cause| PgError::Connect { address: config.address(), cause };
    let addresses: Vec<_> =
        (config.host.as_str(), config.port).to_socket_addrs().map_err(failed)?.collect();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for (i, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (addresses.len() - i) as u32;
        if share.is_zero() {
            last = io::ErrorKind::TimedOut.into();
            break;
        }
        match TcpStream::connect_timeout(address, share) {
            Ok(socket) => {
                socket.set_nodelay(true).map_err(failed)?;
                socket.set_nonblocking(true).map_err(failed)?;
                let _ = rustix::net::sockopt::set_socket_keepalive(&socket, true);
                return Ok(socket);
            }
            Err(e) => last = e,
        }
    }
    Err(failed(last))
}
