//! TCP: listeners, streams, and sockets on their way from one executor to another.

use std::cell::{Cell, UnsafeCell};
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::poll;
use monoio::io::AsyncWriteRent;
use monoio::net::TcpStream;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags};

use super::backend::{Backend, current_backend, with_state};
use super::task::yield_now;

/// Backlog of listening sockets: a storm of reconnecting clients must not wait a second for
/// repeated SYNs.
pub const LISTEN_BACKLOG: i32 = 4096;

/// Size of the one read buffer of an executor.
const READ_BUFFER_BYTES: usize = 64 * 1024;

/// The kernel takes at most this many pieces in one vectored write (`UIO_MAXIOV`).
const MAX_IOV: usize = 1024;

/// So many reads in a row that found data waiting give the other tasks of the executor a turn: a
/// peer that sends as fast as it can must not own the executor.
const MAX_READ_STREAK: u8 = 16;

/// Pause of an accept loop when file descriptors or memory ran out.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

fn no_executor() -> io::Error {
    io::Error::other("this thread runs no executor")
}

// ---- readiness -------------------------------------------------------------------------------

/// A file descriptor (socket or eventfd) that an executor can wait for.
pub(super) struct Readiness {
    io: TcpStream,
}

impl Readiness {
    /// Any pollable descriptor works: the runtime type is used for its readiness only.
    pub fn new(fd: OwnedFd) -> io::Result<Readiness> {
        if current_backend().is_none() {
            return Err(no_executor());
        }
        Ok(Readiness { io: TcpStream::from_std(std::net::TcpStream::from(fd))? })
    }

    /// Completes when reading would not block. Cancel-safe.
    pub async fn readable(&self) -> io::Result<()> {
        self.io.readable(false).await
    }

    fn fd(&self) -> BorrowedFd<'_> {
        borrow_fd(&self.io)
    }
}

fn borrow_fd(io: &TcpStream) -> BorrowedFd<'_> {
    // SAFETY: the stream owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(io.as_raw_fd()) }
}

// ---- listener --------------------------------------------------------------------------------

/// A bound, listening socket, still movable to an executor.
#[derive(Debug)]
pub struct BoundListener {
    socket: OwnedFd,
    addr: SocketAddr,
}

/// Listening sockets for `count` executors on one address; the kernel spreads connections over
/// them (`SO_REUSEPORT`). Port 0 picks one port for all. An IPv6 wildcard also takes IPv4.
///
/// # Errors
/// The address cannot be bound; the error names it.
pub fn bind_group(addr: SocketAddr, count: usize) -> io::Result<Vec<BoundListener>> {
    let mut listeners = Vec::with_capacity(count);
    let mut addr = addr;
    for _ in 0..count {
        let listener = bind_one(addr)
            .map_err(|e| io::Error::new(e.kind(), format!("cannot listen on {addr}: {e}")))?;
        addr = listener.addr;
        listeners.push(listener);
    }
    Ok(listeners)
}

fn bind_one(addr: SocketAddr) -> io::Result<BoundListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(!addr.ip().is_unspecified())?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    let addr = socket
        .local_addr()?
        .as_socket()
        .ok_or_else(|| io::Error::other("the bound address is not an IP address"))?;
    Ok(BoundListener { socket: socket.into(), addr })
}

impl BoundListener {
    /// The address with its real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Starts accepting on the executor that runs on this thread.
    ///
    /// # Errors
    /// The thread runs no executor, or registration failed.
    pub fn into_local(self) -> io::Result<Listener> {
        let backend = current_backend().ok_or_else(no_executor)?;
        Ok(Listener { readiness: Readiness::new(self.socket)?, addr: self.addr, backend })
    }
}

/// A listening socket of an executor. Dropping it stops listening.
pub struct Listener {
    readiness: Readiness,
    addr: SocketAddr,
    backend: Backend,
}

impl Listener {
    /// The address with its real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The next connection, with `TCP_NODELAY` set. Cancel-safe: no accepted socket is lost.
    ///
    /// Connections that died in the queue are skipped; when descriptors or memory run out it logs
    /// and tries again later.
    ///
    /// # Errors
    /// The listening socket itself is broken.
    pub async fn accept(&self) -> io::Result<Stream> {
        // A ring operation on a non-blocking socket fails instead of waiting; epoll needs one.
        let flags = match self.backend {
            Backend::Uring => SocketFlags::CLOEXEC,
            Backend::Epoll => SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        };
        loop {
            match rustix::net::acceptfrom_with(self.readiness.fd(), flags) {
                Ok((fd, addr)) => {
                    let Some(peer) = addr.and_then(|a| SocketAddr::try_from(a).ok()) else {
                        continue;
                    };
                    match Stream::wrap(fd, peer) {
                        Ok(stream) => {
                            // Fails only if the peer is already gone; reading will say so.
                            let _ = stream.set_nodelay(true);
                            return Ok(stream);
                        }
                        Err(error) => tracing::warn!(%peer, %error, "accepted socket dropped"),
                    }
                }
                Err(Errno::AGAIN) => self.readiness.readable().await?,
                Err(
                    Errno::INTR
                    | Errno::CONNABORTED
                    | Errno::PROTO
                    | Errno::PERM
                    | Errno::NETDOWN
                    | Errno::NETUNREACH
                    | Errno::HOSTDOWN
                    | Errno::HOSTUNREACH
                    | Errno::NOPROTOOPT,
                ) => {}
                Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    tracing::warn!(%error, "cannot accept connections now (raise ulimit -n?)");
                    super::time::sleep(ACCEPT_BACKOFF).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

// ---- stream ----------------------------------------------------------------------------------

/// A connected TCP socket that belongs to no executor at the moment.
#[derive(Debug)]
pub struct RawStream {
    fd: OwnedFd,
    peer: SocketAddr,
}

impl RawStream {
    /// From a connected socket.
    pub fn new(fd: OwnedFd, peer: SocketAddr) -> RawStream {
        RawStream { fd, peer }
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    /// The socket.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

/// Bytes to send, immutable and owned (or shared) until the kernel has them.
#[derive(Debug, Clone)]
pub enum Chunk {
    /// Shared on this executor: one encoded frame for many sockets.
    Shared(Rc<[u8]>),
    /// Shared between threads.
    Bytes(Bytes),
    /// For this socket alone.
    Owned(Vec<u8>),
    /// Constant.
    Static(&'static [u8]),
}

impl Chunk {
    /// The bytes. Their address does not change when the chunk moves.
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Chunk::Shared(b) => b,
            Chunk::Bytes(b) => b,
            Chunk::Owned(b) => b,
            Chunk::Static(b) => b,
        }
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A connected TCP socket of an executor. Reading and writing may go on at the same time.
pub struct Stream {
    /// The runtime's write operation asks for `&mut`, although it only clones the descriptor into
    /// the operation; see [`Stream::submit`].
    io: UnsafeCell<TcpStream>,
    peer: SocketAddr,
    /// The last read took all there was: ask for readiness before the next system call.
    drained: Cell<bool>,
    /// Reads since this stream last had to wait.
    streak: Cell<u8>,
}

impl Stream {
    fn new(io: TcpStream, peer: SocketAddr) -> Stream {
        let io = UnsafeCell::new(io);
        Stream { io, peer, drained: Cell::new(true), streak: Cell::new(0) }
    }

    fn wrap(fd: OwnedFd, peer: SocketAddr) -> io::Result<Stream> {
        let io = TcpStream::from_std(std::net::TcpStream::from(fd))?;
        Ok(Stream::new(io, peer))
    }

    /// Takes over a socket on this executor.
    ///
    /// # Errors
    /// The thread runs no executor, or registration failed; the socket is closed then.
    pub fn from_raw(raw: RawStream) -> io::Result<Stream> {
        let backend = current_backend().ok_or_else(no_executor)?;
        rustix::io::ioctl_fionbio(&raw.fd, backend == Backend::Epoll)?;
        Stream::wrap(raw.fd, raw.peer)
    }

    /// Gives the socket away, to be taken over on another executor with [`Stream::from_raw`].
    /// No write may be under way; bytes read so far travel beside it.
    ///
    /// # Errors
    /// No file descriptor is left; the connection is closed then.
    pub fn into_raw(self) -> io::Result<RawStream> {
        // A duplicate, because a cancelled readiness operation may still hold the descriptor.
        let fd = self.as_fd().try_clone_to_owned()?;
        Ok(RawStream { fd, peer: self.peer })
    }

    /// Connects to `addr`.
    ///
    /// # Errors
    /// As of `connect(2)`.
    pub async fn connect(addr: SocketAddr) -> io::Result<Stream> {
        if current_backend().is_none() {
            return Err(no_executor());
        }
        let io = TcpStream::connect_addr(addr).await?;
        io.set_nodelay(true)?;
        Ok(Stream::new(io, addr))
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    /// Sets `TCP_NODELAY`.
    ///
    /// # Errors
    /// As of `setsockopt(2)`.
    pub fn set_nodelay(&self, on: bool) -> io::Result<()> {
        self.io_ref().set_nodelay(on)
    }

    /// Completes when there is something to read, or the end, or an error. Cancel-safe.
    ///
    /// # Errors
    /// Waiting failed in the kernel.
    pub async fn readable(&self) -> io::Result<()> {
        self.io_ref().readable(false).await
    }

    /// Waits for bytes and lets `f` see them in the executor's shared buffer, at most 64 KiB; an
    /// empty slice is the end of the stream. Cancel-safe.
    ///
    /// # Errors
    /// As of `recv(2)`.
    pub async fn read_with<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> io::Result<R> {
        let mut f = Some(f);
        loop {
            self.wait_for_data().await?;
            if let Some(result) = self.try_read_with(&mut f)? {
                return Ok(result);
            }
        }
    }

    /// Waits unless the last read left data behind, and gives way now and then.
    async fn wait_for_data(&self) -> io::Result<()> {
        let mut waited = false;
        if self.drained.get() {
            let mut readable = pin!(self.readable());
            match poll!(readable.as_mut()) {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    waited = true;
                    readable.await?;
                }
            }
        }
        self.streak.set(if waited { 0 } else { self.streak.get() + 1 });
        if self.streak.get() >= MAX_READ_STREAK {
            self.streak.set(0);
            yield_now().await;
        }
        Ok(())
    }

    fn try_read_with<R, F: FnOnce(&mut [u8]) -> R>(
        &self,
        f: &mut Option<F>,
    ) -> io::Result<Option<R>> {
        // Taken for the time of one system call and one callback; nothing awaits meanwhile.
        let mut buffer = with_state(|s| s.read_buffer.take()).unwrap_or_default();
        buffer.resize(READ_BUFFER_BYTES, 0);
        let result = loop {
            match rustix::net::recv(self.as_fd(), &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((_, n)) => {
                    let n = n.min(READ_BUFFER_BYTES);
                    self.drained.set(n < READ_BUFFER_BYTES);
                    break Ok(f.take().map(|f| f(&mut buffer[..n])));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.drained.set(true);
                    break Ok(None);
                }
                Err(error) => break Err(error.into()),
            }
        };
        with_state(|s| s.read_buffer.set(buffer));
        result
    }

    /// Appends what is there (at least one byte, at most 64 KiB) to `into`; 0 = end of the stream.
    /// Cancel-safe.
    ///
    /// # Errors
    /// As of `recv(2)`.
    pub async fn read_append(&self, into: &mut Vec<u8>) -> io::Result<usize> {
        self.read_with(|bytes| {
            into.extend_from_slice(bytes);
            bytes.len()
        })
        .await
    }

    /// Sends all of `chunks`, in as few operations as the kernel allows. One caller at a time.
    ///
    /// The chunks stay alive until the kernel has them, even if this future is dropped; what was
    /// sent by then is unknown, so the connection is of no more use.
    ///
    /// # Errors
    /// As of `writev(2)`; the connection is of no more use.
    pub async fn write_all(&self, chunks: Vec<Chunk>) -> io::Result<()> {
        let mut out = Outgoing::new(chunks);
        while out.prepare() {
            let (result, returned) = self.submit(out).await;
            out = returned;
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => out.advance(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Starts one vectored write.
    fn submit(&self, out: Outgoing) -> impl Future<Output = (io::Result<usize>, Outgoing)> {
        // SAFETY: `writev` of the pinned runtime version clones the shared descriptor into the
        // operation before it returns; the future it returns does not use the `&mut`, whose
        // lifetime only appears in its signature. No other reference exists during the call
        // (single thread, and the call does not re-enter this type).
        unsafe { (*self.io.get()).writev(out) }
    }

    /// Shuts down one or both directions; a waiting read or write ends.
    ///
    /// # Errors
    /// As of `shutdown(2)`; an already disconnected socket is no error.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let how = match how {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        match rustix::net::shutdown(self.as_fd(), how) {
            Ok(()) | Err(Errno::NOTCONN) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Ends the connection at once: what the peer has not taken yet is thrown away (RST).
    pub fn abort(&self) {
        let linger = Some(Duration::ZERO);
        // Both only fail on a socket that is gone already.
        let _ = rustix::net::sockopt::set_socket_linger(self.as_fd(), linger);
        let _ = self.shutdown(Shutdown::Both);
    }

    fn io_ref(&self) -> &TcpStream {
        // SAFETY: the only `&mut` is the momentary one of `submit`, during which nothing else
        // runs on this thread; `Stream` is not `Sync`.
        unsafe { &*self.io.get() }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow_fd(self.io_ref())
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.io_ref().as_raw_fd()
    }
}

// ---- a vectored write under way --------------------------------------------------------------

/// Chunks and the kernel's list of them; lives in the operation until it completes.
struct Outgoing {
    chunks: Vec<Chunk>,
    /// The first chunk not sent entirely, and how much of it was sent.
    next: usize,
    offset: usize,
    iov: Vec<libc::iovec>,
    _counted: InFlight,
}

impl Outgoing {
    fn new(chunks: Vec<Chunk>) -> Outgoing {
        let iov = Vec::with_capacity(chunks.len().min(MAX_IOV));
        Outgoing { chunks, next: 0, offset: 0, iov, _counted: InFlight::new() }
    }

    /// Fills the kernel's list with what is left; `false` when nothing is.
    fn prepare(&mut self) -> bool {
        self.iov.clear();
        let mut offset = self.offset;
        for chunk in self.chunks.iter().skip(self.next) {
            if self.iov.len() == MAX_IOV {
                break;
            }
            let rest = &chunk.as_slice()[offset..];
            offset = 0;
            if !rest.is_empty() {
                let base = rest.as_ptr().cast_mut().cast();
                self.iov.push(libc::iovec { iov_base: base, iov_len: rest.len() });
            }
        }
        !self.iov.is_empty()
    }

    fn advance(&mut self, mut sent: usize) {
        while let Some(chunk) = self.chunks.get(self.next) {
            let rest = chunk.len() - self.offset;
            if sent < rest {
                self.offset += sent;
                return;
            }
            sent -= rest;
            self.offset = 0;
            self.next += 1;
        }
    }
}

// SAFETY: the iovecs point into the heap (or static) bytes of `chunks`, which nobody mutates and
// which this value keeps alive; moving the value moves neither them nor the list's heap buffer.
unsafe impl monoio::buf::IoVecBuf for Outgoing {
    fn read_iovec_ptr(&self) -> *const libc::iovec {
        self.iov.as_ptr()
    }

    fn read_iovec_len(&self) -> usize {
        self.iov.len()
    }
}

/// Counts the write buffers of this executor that are not yet freed.
struct InFlight(());

impl InFlight {
    fn new() -> InFlight {
        with_state(|s| s.writes_in_flight.set(s.writes_in_flight.get() + 1));
        InFlight(())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        with_state(|s| s.writes_in_flight.set(s.writes_in_flight.get().saturating_sub(1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_write_continues_where_it_stopped() {
        let chunks = vec![
            Chunk::Static(b"abc"),
            Chunk::Static(b""),
            Chunk::Owned(b"defg".to_vec()),
            Chunk::Shared(Rc::from(&b"hi"[..])),
        ];
        for step in 1..=9 {
            let mut out = Outgoing::new(chunks.clone());
            let mut seen = Vec::new();
            while out.prepare() {
                let mut left = step;
                for io in &out.iov {
                    // SAFETY: `prepare` just made it from a live chunk.
                    let bytes =
                        unsafe { std::slice::from_raw_parts(io.iov_base.cast::<u8>(), io.iov_len) };
                    let n = left.min(bytes.len());
                    seen.extend_from_slice(&bytes[..n]);
                    left -= n;
                }
                out.advance(step - left);
            }
            assert_eq!(seen, b"abcdefghi", "step {step}");
        }
    }
}
