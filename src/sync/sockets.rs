//! The sockets of an executor: messages that wait for their turn, frames that wait to be read.
//!
//! What waits for a socket is bounded, and nothing here waits for one. Ordinary pokes are encoded
//! once and queued; a client that has too much of them unread is closed with a reason, and comes
//! back with its cookie. A large poke is encoded as its socket takes it; what is sent after it
//! waits behind it. The group goes on meanwhile, and so do its other clients. It may be open: more
//! of it comes while its rows are read.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use zeroring_core::group::{ConnId, Event, Frame, Growth, LargePoke, NextFrames};
use zeroring_core::protocol::down;
use zeroring_core::protocol::error::ErrorBody;
use zeroring_core::protocol::up::Upstream;
use zeroring_core::waste::Waste;
use zeroring_net::rt::{Instant, now, yield_now};
use zeroring_net::ws::{SendError, WsWriter};

use super::executor::Executor;
use super::fanout;
use super::farewell::farewell;
use super::groups::{GroupKey, State};

/// Messages of one connection that wait for their turn. Real clients send a handful; beyond this
/// the connection is not read until some were handled.
pub(super) const MAX_BACKLOG: usize = 256;
/// And so many bytes of them: a client that re-pushes what it did offline while the app is slow.
const MAX_BACKLOG_BYTES: usize = 16 << 20;
/// Bytes that may wait for a socket when a poke is to be sent to it, beside the large one that is
/// on its way: who takes long to read its first rows must not lose them to the next small change,
/// again and again. A client that has not read this much has been away for longer than a reconnect
/// costs.
pub(super) const MAX_QUEUED_BYTES: usize = 16 << 20;
/// A large poke goes on when no more than this waits for the socket: enough that the kernel's
/// buffer does not run dry.
const LOW_BYTES: usize = 256 << 10;
/// Pokes that may wait behind a large one.
const MAX_BEHIND: usize = 4_096;
/// A client that reads nothing for so long while a large poke waits for it is gone.
pub(super) const STALLED: Duration = Duration::from_secs(120);
/// The client is told something at least this often.
const SIGN_OF_LIFE: Duration = Duration::from_secs(6);

/// Code of the close frame of a client that does not read.
const CLOSE_TRY_AGAIN: u16 = 1013;

/// A connection that has passed its handshake.
pub(super) struct Conn {
    pub(super) group: GroupKey,
    pub(super) writer: WsWriter,
    /// When it was told `connected`.
    since: Instant,
    last_sent: Instant,
    /// A message is being handled; the next ones wait here.
    busy: bool,
    backlog: VecDeque<(Box<Upstream>, usize)>,
    /// Length of their texts.
    backlog_bytes: usize,
    /// A large poke is on its way.
    behind: Option<Box<Behind>>,
}

/// A large poke, and what comes after it.
struct Behind {
    /// The first one is on its way.
    queue: VecDeque<Waiting>,
    /// Somebody brings it to the socket. Nobody while there is nothing of it.
    pumped: bool,
    /// Of those behind the first one.
    bytes: usize,
    /// What the socket had taken when it was last seen to take something, and when that was.
    taken: (u64, Instant),
}

enum Waiting {
    Large(Box<LargePoke>),
    Frames(Arc<[Frame]>),
}

impl Waiting {
    fn bytes(&self) -> usize {
        match self {
            Waiting::Large(poke) => poke.bytes(),
            Waiting::Frames(frames) => length(frames),
        }
    }
}

impl Behind {
    /// Adds what comes next; the reason why the client is too slow for it.
    fn push(&mut self, next: Waiting) -> Result<(), String> {
        let (pokes, bytes) = (self.queue.len(), self.bytes);
        if !self.queue.is_empty() {
            self.bytes += next.bytes();
        }
        self.queue.push_back(next);
        if bytes > MAX_QUEUED_BYTES || pokes > MAX_BEHIND {
            return Err(format!("{pokes} pokes, {bytes} bytes wait behind a large one"));
        }
        Ok(())
    }

    /// The poke that is open goes on.
    fn grow(&mut self, growth: &Growth, waste: &mut Waste) {
        let open = |waiting: &mut Waiting| match waiting {
            Waiting::Large(poke) if poke.is_open() => {
                poke.grow(growth, waste);
                true
            }
            _ => false,
        };
        if self.queue.iter_mut().position(open).is_some_and(|at| at > 0) {
            self.bytes += growth.bytes();
        }
    }

    /// Nobody is there to get it.
    fn discard(self, waste: &mut Waste) {
        for waiting in self.queue {
            if let Waiting::Large(poke) = waiting {
                poke.discard(waste);
            }
        }
    }

    /// The first one is out.
    fn pop(&mut self) {
        self.queue.pop_front();
        if let Some(next) = self.queue.front() {
            self.bytes -= next.bytes();
        }
    }
}

/// What becomes of a large poke.
enum Pumped {
    /// There is more, and room for it.
    More,
    /// There is more when this socket has taken what waits.
    Full(WsWriter),
    /// There is more when it is known.
    Waits,
    Done,
}

fn length(frames: &[Frame]) -> usize {
    frames.iter().map(|frame| frame.payload.len()).sum()
}

impl State {
    /// Registers a connection.
    pub(super) fn connect(&mut self, group: GroupKey, writer: WsWriter) -> ConnId {
        self.next_conn += 1;
        self.counters.connections_total += 1;
        let conn = ConnId(self.next_conn);
        let since = now();
        let backlog = VecDeque::new();
        let (busy, backlog_bytes, behind) = (false, 0, None);
        let last_sent = since;
        let entry = Conn { group, writer, since, last_sent, busy, backlog, backlog_bytes, behind };
        self.conns.insert(conn, entry);
        conn
    }

    /// Takes a connection out; what waited for it is left behind.
    pub(super) fn take_conn(&mut self, conn: ConnId) -> Option<Conn> {
        let mut entry = self.conns.remove(&conn)?;
        if let Some(behind) = entry.behind.take() {
            behind.discard(&mut self.waste);
        }
        Some(entry)
    }

    /// The socket is gone.
    pub(super) fn disconnected(&mut self, conn: ConnId) {
        if let Some(gone) = self.take_conn(conn) {
            self.inbox.push_back((gone.group, Event::Disconnected(conn)));
        }
    }

    /// A message of a connection, and the length of its text; false if the connection is gone.
    pub(super) fn message(&mut self, conn: ConnId, message: Upstream, bytes: usize) -> bool {
        let Some(entry) = self.conns.get_mut(&conn) else { return false };
        self.counters.messages += 1;
        let message = Box::new(message);
        if entry.busy {
            entry.backlog.push_back((message, bytes));
            entry.backlog_bytes += bytes;
        } else {
            entry.busy = true;
            self.inbox.push_back((entry.group, Event::Message(conn, message)));
        }
        true
    }

    /// The connection has so many messages waiting that it should not be read.
    pub(super) fn is_backlogged(&self, conn: ConnId) -> bool {
        self.conns
            .get(&conn)
            .is_some_and(|c| c.backlog.len() >= MAX_BACKLOG || c.backlog_bytes >= MAX_BACKLOG_BYTES)
    }

    /// Answers a ping, whatever is under way.
    pub(super) fn pong(&mut self, conn: ConnId) {
        self.deliver(conn, &fanout::wire(down::PONG, false, false));
    }

    /// Ends a connection with an error of its own making.
    pub(super) fn fail(&mut self, conn: ConnId, error: &ErrorBody) {
        if let Some(gone) = self.conns.get(&conn) {
            let group = gone.group;
            self.close_with(conn, error);
            self.inbox.push_back((group, Event::Disconnected(conn)));
        }
    }

    pub(super) fn close_with(&mut self, conn: ConnId, error: &ErrorBody) {
        let Some(entry) = self.take_conn(conn) else { return };
        tracing::debug!(conn = conn.0, "closing with error: {error}");
        farewell(entry.writer.clone(), error, entry.since);
        self.remember_closing(entry.writer);
    }

    pub(super) fn remember_closing(&mut self, writer: WsWriter) {
        self.closing.retain(WsWriter::is_open);
        self.closing.push(writer);
    }

    /// Sends a frame; a client that does not read is closed.
    fn deliver(&mut self, conn: ConnId, frame: &zeroring_net::ws::Frame) {
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        entry.last_sent = now();
        self.counters.frames += 1;
        match entry.writer.send(frame) {
            Ok(()) | Err(SendError::Closed) => {}
            Err(error @ SendError::Overflow { .. }) => self.too_slow(conn, &error.to_string()),
        }
    }

    /// Closes a client that does not read; it comes back with its cookie.
    fn too_slow(&mut self, conn: ConnId, why: &str) {
        let Some(entry) = self.conns.get(&conn) else { return };
        tracing::info!(conn = conn.0, "a client does not keep up: {why}");
        self.counters.slow_clients += 1;
        entry.writer.close_now(Some((CLOSE_TRY_AGAIN, "the client does not read fast enough")));
        self.disconnected(conn);
    }

    /// Tells quiet clients that we are alive, closes those that read nothing for so long, and
    /// forgets what was kept for sharing.
    pub(super) fn signs_of_life(&mut self, stalled: Duration) {
        self.frames.clear();
        self.world.shared.sweep();
        self.close_stalled(stalled);
        let quiet: Vec<ConnId> = self
            .conns
            .iter()
            .filter(|(_, c)| now().duration_since(c.last_sent) > SIGN_OF_LIFE)
            .map(|(conn, _)| *conn)
            .collect();
        for conn in quiet {
            self.pong(conn);
        }
    }

    /// A connection's message was handled: the next one may come.
    pub(super) fn message_done(&mut self, conn: ConnId) {
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        match entry.backlog.pop_front() {
            Some((next, bytes)) => {
                entry.backlog_bytes -= bytes;
                self.inbox.push_back((entry.group, Event::Message(conn, next)));
            }
            None => entry.busy = false,
        }
    }

    /// Sends frames that belong together, behind a large poke if one is on its way.
    pub(super) fn send(&mut self, conn: ConnId, list: &Arc<[Frame]>) {
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        match &mut entry.behind {
            Some(behind) => {
                if let Err(why) = behind.push(Waiting::Frames(list.clone())) {
                    self.too_slow(conn, &why);
                }
            }
            None => {
                let waiting = entry.writer.queued_bytes();
                if waiting > MAX_QUEUED_BYTES {
                    return self.too_slow(conn, &format!("{waiting} bytes wait for it"));
                }
                self.write(conn, list);
            }
        }
    }

    /// Sends a large poke as the socket takes it.
    pub(super) fn send_large(&mut self, conn: ConnId, poke: Box<LargePoke>) {
        let Some(entry) = self.conns.get_mut(&conn) else {
            return poke.discard(&mut self.waste);
        };
        self.counters.large_pokes += 1;
        let behind = entry.behind.get_or_insert_with(|| {
            self.pumping.push(conn);
            let taken = (entry.writer.bytes_sent(), now());
            Box::new(Behind { queue: VecDeque::new(), pumped: true, bytes: 0, taken })
        });
        if let Err(why) = behind.push(Waiting::Large(poke)) {
            self.too_slow(conn, &why);
        }
    }

    /// More of the large poke that is open is known.
    pub(super) fn grow_large(&mut self, conn: ConnId, growth: Growth) {
        let entry = self.conns.get_mut(&conn);
        let Some((writer, behind)) = entry.and_then(|c| Some((&c.writer, c.behind.as_mut()?)))
        else {
            return growth.discard(&mut self.waste);
        };
        behind.grow(&growth, &mut self.waste);
        if !std::mem::replace(&mut behind.pumped, true) {
            behind.taken = (writer.bytes_sent(), now());
            self.pumping.push(conn);
        }
    }

    /// Hands frames to the socket.
    fn write(&mut self, conn: ConnId, list: &Arc<[Frame]>) {
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        entry.last_sent = now();
        self.counters.frames += list.len() as u64;
        for frame in self.frames.of(list, self.compress).iter() {
            match entry.writer.send(frame) {
                Ok(()) | Err(SendError::Closed) => {}
                Err(error @ SendError::Overflow { .. }) => {
                    return self.too_slow(conn, &error.to_string());
                }
            }
        }
        let waiting = entry.writer.queued_bytes() as u64;
        self.counters.most_queued_bytes = self.counters.most_queued_bytes.max(waiting);
    }

    /// Lets a socket take a little more of a large poke.
    fn pump(&mut self, conn: ConnId) -> Pumped {
        let Some(entry) = self.conns.get_mut(&conn) else { return Pumped::Done };
        let Some(behind) = &mut entry.behind else { return Pumped::Done };
        if entry.writer.queued_bytes() > LOW_BYTES && entry.writer.is_open() {
            return Pumped::Full(entry.writer.clone());
        }
        let frames = match behind.queue.front_mut() {
            Some(Waiting::Large(poke)) if entry.writer.is_open() => poke.next_frames(),
            Some(Waiting::Frames(list)) if entry.writer.is_open() => {
                let list = list.clone();
                behind.pop();
                NextFrames::Some(list)
            }
            _ => {
                if let Some(behind) = entry.behind.take() {
                    behind.discard(&mut self.waste);
                }
                return Pumped::Done;
            }
        };
        match frames {
            NextFrames::Some(frames) => self.write(conn, &frames),
            NextFrames::Waits => {
                behind.pumped = false;
                return Pumped::Waits;
            }
            NextFrames::Done => behind.pop(),
        }
        Pumped::More
    }

    /// Closes clients that read nothing while a large poke waits for them.
    fn close_stalled(&mut self, limit: Duration) {
        let time = now();
        let mut stalled = Vec::new();
        for (conn, entry) in &mut self.conns {
            let Some(behind) = &mut entry.behind else { continue };
            let sent = entry.writer.bytes_sent();
            if sent != behind.taken.0 || !behind.pumped {
                behind.taken = (sent, time);
            } else if time.duration_since(behind.taken.1) > limit {
                stalled.push(*conn);
            }
        }
        for conn in stalled {
            self.too_slow(conn, "it reads nothing");
        }
    }
}

impl Executor {
    /// Brings large pokes to a socket, to their end or its own.
    pub(super) async fn pump(self: Rc<Self>, conn: ConnId) {
        loop {
            let pumped = self.state.borrow_mut().pump(conn);
            match pumped {
                Pumped::More => yield_now().await,
                Pumped::Full(writer) => writer.drained(LOW_BYTES).await,
                Pumped::Waits => return,
                Pumped::Done => {
                    // It may have been closed: its group is to know.
                    self.work.notify_one();
                    return;
                }
            }
        }
    }
}
