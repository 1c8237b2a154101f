//! WebSocket, server side: RFC 6455 and RFC 7692 (without context takeover).
//!
//! ```text
//!  RequestHead ─▶ handshake ─▶ 101 ─▶ WsConnection ─▶ WsReader  (messages in)
//!                                        │
//!                      Frame (shared) ─▶ WsWriter ─▶ one vectored write per socket and tick
//! ```
//!
//! The codec ([`Decoder`], [`Frame`]) is pure: bytes in, events out. A frame is encoded once and
//! sent by reference to any number of sockets.
//!
//! Invariants worth naming:
//! - Nothing here waits for a peer that does not read: sending only queues, a queue is bounded in
//!   bytes and frames, and its overflow is told to the owner, who closes the connection.
//! - At most one write per socket is under way; everything queued meanwhile goes into the next.
//! - Of the pings that a peer sends without reading, a few and the latest are answered: a flood of
//!   pings queues nothing.
//! - A message is bounded before and after inflating.

mod connection;
mod decode;
mod deflate;
mod frame;
mod handshake;

pub use connection::{
    Closed, Incoming, SendError, WsConfig, WsReader, WsWriter, accept, upgrade_and_close,
};
pub use decode::{CloseFrame, Decoder, Event, Message, ProtocolError};
pub use deflate::{DeflateConfig, DeflateParams};
pub use frame::{Frame, MAX_CLOSE_REASON_BYTES, truncate_reason};
pub use handshake::{Handshake, check};
