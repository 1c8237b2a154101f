//! The replication stream of a walsender: CopyData in both directions.

use std::os::fd::BorrowedFd;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::BufMut;

use super::client::{Client, Interrupter};
use super::error::PgError;
use super::frame::{Reader, server_error};
use super::wire::Waited;

/// Microseconds from the Unix epoch to Postgres' (2000-01-01).
pub const PG_EPOCH_US: i64 = 946_684_800_000_000;

/// Before the plugin's message: kind, two LSNs, time.
const DATA_HEADER_BYTES: usize = 1 + 3 * 8;

/// How far [`ReplicationStream::commit_is_ahead`] looks: some hundred small rows.
const LOOK_AHEAD_BYTES: usize = 16 << 10;

/// What the stream delivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamEvent<'a> {
    /// A piece of the log.
    Data {
        /// Its LSN; 0 for messages that have none (relations, types).
        start: u64,
        /// End of the log on the server.
        wal_end: u64,
        /// Message of the output plugin.
        payload: &'a [u8],
    },
    /// A sign of life.
    KeepAlive {
        /// Everything before this has been sent.
        wal_end: u64,
        /// The server wants a status update now.
        reply_requested: bool,
    },
    /// Nothing arrived until the deadline.
    Idle,
    /// The doorbell was rung.
    Woken,
}

/// A running stream.
#[derive(Debug)]
pub struct ReplicationStream {
    client: Client,
    ended: bool,
}

impl ReplicationStream {
    pub(crate) fn new(client: Client) -> Self {
        ReplicationStream { client, ended: false }
    }

    /// The next event. Buffered messages come before the deadline and the doorbell are looked at.
    ///
    /// # Errors
    /// The server's error (57P01: another server took the slot over), [`PgError::Closed`], I/O.
    pub fn next(
        &mut self,
        deadline: Option<Instant>,
        doorbell: Option<BorrowedFd<'_>>,
    ) -> Result<StreamEvent<'_>, PgError> {
        if self.ended {
            return Err(PgError::Closed);
        }
        loop {
            match self.client.wire.wait_frame(deadline, doorbell)? {
                Waited::Ready => {}
                Waited::TimedOut => return Ok(StreamEvent::Idle),
                Waited::Woken => return Ok(StreamEvent::Woken),
            }
            let Some(frame) = self.client.wire.take()? else { continue };
            match frame.tag {
                b'd' if matches!(frame.body.first(), Some(b'w' | b'k')) => break,
                b'E' => {
                    self.ended = true;
                    return Err(PgError::Server(Box::new(server_error(frame.body))));
                }
                b'c' => {
                    self.ended = true;
                    return Err(PgError::Closed);
                }
                // Notices, parameters, and kinds of CopyData that are not defined yet.
                _ => {}
            }
        }
        let frame = self.client.wire.again().ok_or(PgError::Closed)?;
        parse_event(frame.body)
    }

    /// Another message is already here: [`ReplicationStream::next`] will not wait.
    ///
    /// # Errors
    /// A framing error.
    pub fn has_buffered(&mut self) -> Result<bool, PgError> {
        Ok(self.client.wire.wait_frame(Some(Instant::now()), None)? == Waited::Ready)
    }

    /// The rest of the transaction that comes next, with its commit, is already here and short:
    /// taking it in takes about as long as writing one commit to a disk.
    pub fn commit_is_ahead(&self) -> bool {
        self.client.wire.any_ahead(LOOK_AHEAD_BYTES, |frame| {
            frame.tag == b'd'
                && frame.body.first() == Some(&b'w')
                && frame.body.get(DATA_HEADER_BYTES) == Some(&b'C')
        })
    }

    /// Reports that everything up to `lsn` is durable here. 0 reports nothing and keeps the
    /// connection alive.
    ///
    /// # Errors
    /// I/O.
    pub fn send_status(&mut self, lsn: u64) -> Result<(), PgError> {
        let out = &mut self.client.wire.out;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        out.put_u8(b'd');
        out.put_u32(4 + 34);
        out.put_u8(b'r');
        for _ in 0..3 {
            out.put_u64(lsn);
        }
        out.put_i64(i64::try_from(now.as_micros()).unwrap_or(i64::MAX) - PG_EPOCH_US);
        out.put_u8(0);
        self.client.send()
    }

    /// Bytes received so far on this session.
    pub fn received_bytes(&self) -> u64 {
        self.client.wire.received_bytes()
    }

    /// For breaking the stream off from another thread.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn interrupter(&self) -> Result<Interrupter, PgError> {
        self.client.interrupter()
    }
}

fn parse_event(body: &[u8]) -> Result<StreamEvent<'_>, PgError> {
    let mut reader = Reader::new(body);
    if reader.u8("kind")? == b'k' {
        let wal_end = reader.u64("keepalive's LSN")?;
        reader.i64("keepalive's time")?;
        let reply_requested = reader.u8("keepalive's request")? != 0;
        return Ok(StreamEvent::KeepAlive { wal_end, reply_requested });
    }
    let start = reader.u64("start LSN")?;
    let wal_end = reader.u64("end LSN")?;
    reader.i64("time")?;
    Ok(StreamEvent::Data { start, wal_end, payload: reader.rest })
}

/// An LSN as Postgres prints it, `16/B374D848`.
pub fn parse_lsn(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    let part = |s: &str| {
        (!s.is_empty() && s.len() <= 8 && s.bytes().all(|b| b.is_ascii_hexdigit()))
            .then(|| u64::from_str_radix(s, 16).ok())
            .flatten()
    };
    Some(part(high)? << 32 | part(low)?)
}

/// The text of an LSN, upper-case without padding.
pub fn format_lsn(lsn: u64) -> String {
    format!("{:X}/{:X}", lsn >> 32, lsn & 0xffff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsns() {
        assert_eq!(parse_lsn("16/B374D848"), Some(0x16_B374_D848));
        assert_eq!(format_lsn(0x16_B374_D848), "16/B374D848");
        assert_eq!(format_lsn(0x1_0000_000A), "1/A");
        for bad in ["", "1", "/1", "1/", "+1/1", "1/123456789", "x/1"] {
            assert_eq!(parse_lsn(bad), None, "{bad}");
        }
    }

    #[test]
    fn events_are_cut_exactly() {
        let mut data = vec![b'w'];
        data.extend([0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 9]);
        data.extend([0; 8]);
        data.extend(b"Bpayload");
        assert_eq!(
            parse_event(&data).unwrap(),
            StreamEvent::Data { start: 7, wal_end: 9, payload: b"Bpayload" }
        );
        for cut in 1..25 {
            assert!(parse_event(&data[..cut]).is_err());
        }
        let mut alive = vec![b'k'];
        alive.extend([0, 0, 0, 0, 0, 0, 0, 5]);
        alive.extend([0; 8]);
        assert!(parse_event(&alive).is_err());
        alive.push(1);
        assert_eq!(
            parse_event(&alive).unwrap(),
            StreamEvent::KeepAlive { wal_end: 5, reply_requested: true }
        );
    }
}
