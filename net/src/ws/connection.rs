//! A WebSocket connection of an executor: a reader, and a writer with a bounded queue.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::rc::{Rc, Weak};
use std::time::Duration;

use super::decode::{Decoder, Event, Message, ProtocolError};
use super::deflate::{DeflateConfig, DeflateParams};
use super::frame::{self, Frame, OP_PONG};
use super::handshake::{self, Handshake};
use crate::http;
use crate::rt::local::Notify;
use crate::rt::{Chunk, Stream, sleep, spawn, timeout};

/// Pongs that may wait for a socket; of further pings only the latest is answered (RFC 6455 §5.5.3).
const MAX_QUEUED_PONGS: usize = 16;

/// Limits and options of connections.
#[derive(Debug, Clone)]
pub struct WsConfig {
    /// Larger inbound messages (also after inflating) close the connection with 1009.
    pub max_payload_bytes: usize,
    /// Bytes that may wait for a socket. One frame is always taken, whatever its size.
    pub max_queued_bytes: usize,
    /// Frames that may wait for a socket.
    pub max_queued_frames: usize,
    /// How long a closing connection may take to end.
    pub close_timeout: Duration,
    /// permessage-deflate, if it may be negotiated.
    pub deflate: Option<DeflateConfig>,
}

impl Default for WsConfig {
    fn default() -> Self {
        WsConfig {
            // `ZERO_WEBSOCKET_MAX_PAYLOAD_BYTES`
            max_payload_bytes: 10 * 1024 * 1024,
            // A client that has not read this much has been away for longer than a reconnect costs.
            max_queued_bytes: 16 * 1024 * 1024,
            max_queued_frames: 16 * 1024,
            // The original's WebSocket library waits as long.
            close_timeout: Duration::from_secs(30),
            deflate: None,
        }
    }
}

/// Why a frame was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The peer does not read: close the connection with a reason; it comes back with its cookie.
    #[error("{bytes} bytes in {frames} frames wait for a client that does not read")]
    Overflow {
        /// Bytes that wait.
        bytes: usize,
        /// Frames that wait.
        frames: usize,
    },
    /// The connection is closing or gone.
    #[error("the WebSocket is closed")]
    Closed,
}

/// What the reader brings.
#[derive(Debug)]
pub enum Incoming {
    /// A message; never an empty one (spec: sync-protocol §1.5).
    Message(Message),
    /// The end; nothing follows.
    Closed(Closed),
}

/// How a connection ended.
#[derive(Debug)]
pub enum Closed {
    /// The peer sent a close frame (which is being answered).
    ByPeer {
        /// Its code, if it gave one.
        code: Option<u16>,
        /// Its reason, often empty.
        reason: String,
    },
    /// This side closed.
    ByUs,
    /// The peer broke the protocol; it is being told.
    Violation(ProtocolError),
    /// The TCP connection ended or failed without a close frame.
    Lost(io::Error),
}

/// Where a connection is on its way to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// A close frame of ours is queued or sent; the peer's is awaited.
    Closing,
    /// Both close frames are under way: when ours is out, the socket ends.
    Closed,
    /// The socket is gone.
    Gone,
}

#[derive(Default)]
struct Queue {
    chunks: Vec<Chunk>,
    /// Of `chunks` and of the write under way.
    bytes: usize,
    frames: usize,
    /// How many of `chunks` are pongs.
    pongs: usize,
    /// The latest ping beyond [`MAX_QUEUED_PONGS`]; those between are not answered.
    pong: Option<Vec<u8>>,
    close: Option<Vec<u8>>,
    /// A task is writing, or about to.
    writing: bool,
}

struct Inner {
    stream: Stream,
    deflate: Option<DeflateParams>,
    max_bytes: usize,
    max_frames: usize,
    close_timeout: Duration,
    queue: RefCell<Queue>,
    phase: Cell<Phase>,
    /// Something was written, or the socket is gone.
    progress: Notify,
    bytes_sent: Cell<u64>,
    writes: Cell<u64>,
}

/// Receives messages. Dropping it does not close the connection.
pub struct WsReader {
    inner: Rc<Inner>,
    decoder: Decoder,
    ready: VecDeque<Result<Event, ProtocolError>>,
    finished: bool,
}

/// Sends frames; cheap to clone. When the reader and all writers are dropped, the socket closes.
#[derive(Clone)]
pub struct WsWriter {
    inner: Rc<Inner>,
}

/// Answers a checked handshake and starts the connection; `rest` = bytes already read after the
/// request's head. Does not wait for the peer.
pub fn accept(
    stream: Stream,
    rest: &[u8],
    handshake: Handshake,
    config: &WsConfig,
) -> (WsReader, WsWriter) {
    let Handshake { deflate, response, .. } = handshake;
    let decoder = Decoder::new(config.max_payload_bytes, deflate.is_some());
    let inner = Rc::new(Inner {
        stream,
        deflate,
        max_bytes: config.max_queued_bytes,
        max_frames: config.max_queued_frames,
        close_timeout: config.close_timeout,
        queue: RefCell::default(),
        phase: Cell::new(Phase::Open),
        progress: Notify::new(),
        bytes_sent: Cell::new(0),
        writes: Cell::new(0),
    });
    inner.push(Chunk::Owned(response));
    let mut reader =
        WsReader { inner: inner.clone(), decoder, ready: VecDeque::new(), finished: false };
    reader.decode(rest);
    (reader, WsWriter { inner })
}

/// Completes an upgrade only to close it with a code and reason: the way to tell a browser why
/// (spec: sync-protocol §1.6). A request that is no WebSocket handshake is answered by HTTP.
///
/// # Errors
/// The peer is gone.
pub async fn upgrade_and_close(
    request: http::Incoming,
    config: &WsConfig,
    code: u16,
    reason: &str,
) -> io::Result<()> {
    let agreed = match handshake::check(&request.head, config.deflate.as_ref()) {
        Ok(agreed) => agreed,
        Err(refusal) => return request.respond(*refusal).await,
    };
    let (mut reader, writer) = accept(request.stream, &request.rest, agreed, config);
    writer.close(Some((code, reason)));
    loop {
        if let Incoming::Closed(_) = reader.next().await {
            return Ok(());
        }
    }
}

impl WsReader {
    /// The next message, or the end. Pings are answered, pongs and empty messages dropped, and so
    /// is what arrives after this side closed. Cancel-safe. After the end it returns
    /// [`Closed::ByUs`].
    pub async fn next(&mut self) -> Incoming {
        loop {
            if self.finished {
                return Incoming::Closed(Closed::ByUs);
            }
            while let Some(event) = self.ready.pop_front() {
                if let Some(incoming) = self.take(event) {
                    return incoming;
                }
            }
            // Nothing of what came leaves its room behind on an idle connection.
            self.ready = VecDeque::new();
            let inner = self.inner.clone();
            // The callback runs once the bytes are there; a dropped wait takes none.
            let read = inner.stream.read_with(|bytes| {
                self.decode(bytes);
                bytes.len()
            });
            let end = match read.await {
                Ok(0) => io::ErrorKind::UnexpectedEof.into(),
                Ok(_) => continue,
                Err(error) => error,
            };
            self.finished = true;
            let by_us = self.inner.phase.get() != Phase::Open;
            self.inner.gone();
            return Incoming::Closed(if by_us { Closed::ByUs } else { Closed::Lost(end) });
        }
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.inner.stream.peer_addr()
    }

    /// After [`Closed::Violation`]: takes in and drops what the peer is still sending, for at most
    /// `limit`. A socket that is closed over unread bytes is reset, and the peer would never see
    /// the code of the close frame (1009 in the middle of a large message, say).
    pub async fn discard(self, limit: Duration) {
        let inner = self.inner.clone();
        spawn(async move {
            WsWriter { inner: inner.clone() }.flushed().await;
            // Fails only if the socket is disconnected already.
            let _ = inner.stream.shutdown(Shutdown::Write);
        });
        let read =
            async { while let Ok(1..) = self.inner.stream.read_with(|bytes| bytes.len()).await {} };
        // Whoever sends for longer is cut off.
        let _ = timeout(limit, read).await;
        self.inner.gone();
    }

    fn decode(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.decoder.decode(&mut bytes) {
                Ok(Some(event)) => self.ready.push_back(Ok(event)),
                Ok(None) => {}
                Err(error) => self.ready.push_back(Err(error)),
            }
        }
    }

    fn take(&mut self, event: Result<Event, ProtocolError>) -> Option<Incoming> {
        let open = self.inner.phase.get() == Phase::Open;
        match event {
            Ok(Event::Message(message)) if open && !message.is_empty() => {
                Some(Incoming::Message(message))
            }
            Ok(Event::Message(_) | Event::Pong(_)) => None,
            Ok(Event::Ping(payload)) => {
                self.inner.pong(payload);
                None
            }
            Ok(Event::Close(close)) => {
                self.finished = true;
                let status = close.as_ref().map(|c| (c.code, ""));
                self.inner.close(status, Phase::Closed);
                let (code, reason) =
                    close.map_or((None, String::new()), |c| (Some(c.code), c.reason));
                let by_peer = Closed::ByPeer { code, reason };
                Some(Incoming::Closed(if open { by_peer } else { Closed::ByUs }))
            }
            Err(error) => {
                self.finished = true;
                // The peer may still be sending: see `discard`.
                self.inner.close(Some((error.code(), &error.to_string())), Phase::Closing);
                Some(Incoming::Closed(if open { Closed::Violation(error) } else { Closed::ByUs }))
            }
        }
    }
}

impl WsWriter {
    /// Queues a frame; it leaves with everything else that is queued in this tick. Never waits.
    ///
    /// # Errors
    /// The queue is full, or the connection is closing. The frame was not queued.
    pub fn send(&self, frame: &Frame) -> Result<(), SendError> {
        if self.inner.phase.get() != Phase::Open {
            return Err(SendError::Closed);
        }
        let chunk = frame.wire(self.inner.deflate.as_ref());
        {
            let queue = self.inner.queue.borrow();
            let (bytes, frames) = (queue.bytes, queue.frames);
            let full =
                frames >= self.inner.max_frames || bytes + chunk.len() > self.inner.max_bytes;
            if frames > 0 && full {
                return Err(SendError::Overflow { bytes, frames });
            }
        }
        self.inner.push(chunk);
        Ok(())
    }

    /// Sends what is queued, then a close frame: with code and reason (cut to 123 bytes), or plain.
    /// The connection ends when the peer has answered, or after the close time-out. Further calls
    /// do nothing.
    pub fn close(&self, status: Option<(u16, &str)>) {
        self.inner.close(status, Phase::Closing);
    }

    /// Like [`WsWriter::close`], but what is queued and not yet being written is dropped.
    pub fn close_now(&self, status: Option<(u16, &str)>) {
        if self.inner.phase.get() == Phase::Open {
            let mut queue = self.inner.queue.borrow_mut();
            let dropped: usize = queue.chunks.iter().map(Chunk::len).sum();
            queue.bytes -= dropped;
            queue.frames -= queue.chunks.len();
            queue.chunks.clear();
            queue.pongs = 0;
        }
        self.close(status);
    }

    /// Ends the TCP connection at once (RST), without a close frame.
    pub fn abort(&self) {
        self.inner.stream.abort();
        self.inner.gone();
    }

    /// Whether frames can still be queued.
    pub fn is_open(&self) -> bool {
        self.inner.phase.get() == Phase::Open
    }

    /// Bytes that wait, including those of a write under way.
    pub fn queued_bytes(&self) -> usize {
        self.inner.queue.borrow().bytes
    }

    /// Bytes written so far.
    pub fn bytes_sent(&self) -> u64 {
        self.inner.bytes_sent.get()
    }

    /// Vectored writes so far.
    pub fn writes(&self) -> u64 {
        self.inner.writes.get()
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.inner.stream.peer_addr()
    }

    /// Completes when no more than `bytes` wait, or the connection is closing or gone.
    pub async fn drained(&self, bytes: usize) {
        loop {
            let progress = self.inner.progress.notified();
            if !self.is_open() || self.queued_bytes() <= bytes {
                return;
            }
            progress.await;
        }
    }

    /// Completes when everything queued was handed to the kernel, or the socket is gone.
    pub async fn flushed(&self) {
        loop {
            let progress = self.inner.progress.notified();
            if self.inner.phase.get() == Phase::Gone || !self.inner.queue.borrow().writing {
                return;
            }
            progress.await;
        }
    }
}

impl Inner {
    fn push(self: &Rc<Self>, chunk: Chunk) {
        {
            let mut queue = self.queue.borrow_mut();
            queue.bytes += chunk.len();
            queue.frames += 1;
            queue.chunks.push(chunk);
        }
        self.start_writing();
    }

    fn pong(self: &Rc<Self>, payload: Vec<u8>) {
        if self.phase.get() != Phase::Open {
            return;
        }
        let mut queue = self.queue.borrow_mut();
        if queue.pongs >= MAX_QUEUED_PONGS {
            queue.pong = Some(payload);
            return;
        }
        queue.pongs += 1;
        drop(queue);
        self.push(Chunk::Owned(frame::control(OP_PONG, &payload)));
    }

    /// Queues a close frame, once; `next` is the phase that follows.
    fn close(self: &Rc<Self>, status: Option<(u16, &str)>, next: Phase) {
        match self.phase.get() {
            Phase::Open => {
                self.phase.set(next);
                self.queue.borrow_mut().close = Some(frame::close(status));
                self.start_writing();
                self.end_after(self.close_timeout);
            }
            Phase::Closing if next == Phase::Closed => {
                // The peer answered ours: nothing else is coming.
                self.phase.set(Phase::Closed);
                if !self.queue.borrow().writing {
                    self.gone();
                }
            }
            _ => {}
        }
    }

    /// The peer may never answer, or never read.
    fn end_after(self: &Rc<Self>, timeout: Duration) {
        let weak: Weak<Inner> = Rc::downgrade(self);
        spawn(async move {
            sleep(timeout).await;
            if let Some(inner) = weak.upgrade() {
                inner.gone();
            }
        });
    }

    /// The socket ends, in both directions; what was not written is dropped.
    fn gone(&self) {
        if self.phase.replace(Phase::Gone) == Phase::Gone {
            return;
        }
        // Fails only if the socket is disconnected already.
        let _ = self.stream.shutdown(Shutdown::Both);
        let dropped = std::mem::take(&mut self.queue.borrow_mut().chunks);
        drop(dropped);
        self.progress.notify_all();
    }

    /// Starts the write task unless one runs. It begins after the current task has paused, so that
    /// everything queued by then leaves in one write.
    fn start_writing(self: &Rc<Self>) {
        if self.phase.get() == Phase::Gone || self.queue.borrow().writing {
            return;
        }
        self.queue.borrow_mut().writing = true;
        spawn(write_queued(self.clone()));
    }

    /// What leaves with the next write.
    fn take_batch(&self) -> Vec<Chunk> {
        let mut queue = self.queue.borrow_mut();
        queue.pongs = 0;
        let mut batch = std::mem::take(&mut queue.chunks);
        if let Some(payload) = queue.pong.take() {
            batch.push(Chunk::Owned(frame::control(OP_PONG, &payload)));
        }
        if let Some(close) = queue.close.take() {
            batch.push(Chunk::Owned(close));
        }
        batch
    }
}

/// Writes until nothing is queued.
async fn write_queued(inner: Rc<Inner>) {
    loop {
        let (frames, queued) = {
            let queue = inner.queue.borrow();
            (queue.chunks.len(), queue.chunks.iter().map(Chunk::len).sum::<usize>())
        };
        let batch = inner.take_batch();
        if batch.is_empty() || inner.phase.get() == Phase::Gone {
            break;
        }
        let bytes: usize = batch.iter().map(Chunk::len).sum();
        if let Err(error) = inner.stream.write_all(batch).await {
            tracing::debug!(peer = %inner.stream.peer_addr(), %error, "WebSocket write failed");
            inner.queue.borrow_mut().writing = false;
            inner.gone();
            return;
        }
        let mut queue = inner.queue.borrow_mut();
        queue.bytes = queue.bytes.saturating_sub(queued);
        queue.frames = queue.frames.saturating_sub(frames);
        drop(queue);
        inner.bytes_sent.set(inner.bytes_sent.get() + bytes as u64);
        inner.writes.set(inner.writes.get() + 1);
        inner.progress.notify_all();
    }
    inner.queue.borrow_mut().writing = false;
    if inner.phase.get() == Phase::Closed {
        inner.gone();
    }
    inner.progress.notify_all();
}
