//! The client's side of a WebSocket: masked frames out, unmasked frames in. No extensions.

/// Larger messages than this are a mistake of the server.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

const OP_CONTINUATION: u8 = 0x0;
pub(crate) const OP_TEXT: u8 = 0x1;
const OP_BINARY: u8 = 0x2;
pub(crate) const OP_CLOSE: u8 = 0x8;
const OP_PING: u8 = 0x9;
pub(crate) const OP_PONG: u8 = 0xA;

/// A frame in one piece, masked with `key`.
pub(crate) fn masked_frame(opcode: u8, payload: &[u8], key: [u8; 4]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(payload.len() + 14);
    frame.push(0x80 | opcode);
    match payload.len() {
        n @ 0..=125 => frame.push(0x80 | n as u8),
        n @ 126..=0xFFFF => {
            frame.push(0x80 | 126);
            frame.extend_from_slice(&(n as u16).to_be_bytes());
        }
        n => {
            frame.push(0x80 | 127);
            frame.extend_from_slice(&(n as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(&key);
    frame.extend(payload.iter().zip(key.iter().cycle()).map(|(byte, k)| byte ^ k));
    frame
}

/// What the server broke.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("the server sent a masked frame")]
    Masked,
    #[error("the server set reserved bits, but no extension was agreed on")]
    Reserved,
    #[error("the server sent a frame of the unknown type {0}")]
    Opcode(u8),
    #[error("the server sent a message of more than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    #[error("the server mixed up fragments of messages")]
    Fragments,
}

/// A complete message or control frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Inbound<'a> {
    Message(&'a [u8]),
    /// A binary message.
    Binary(&'a [u8]),
    Ping(&'a [u8]),
    /// Code (1005 = none) and reason.
    Close(u16, String),
}

struct Head {
    fin: bool,
    opcode: u8,
    start: usize,
    end: usize,
}

fn head(bytes: &[u8]) -> Result<Option<Head>, WireError> {
    let [first, second, rest @ ..] = bytes else { return Ok(None) };
    if first & 0x70 != 0 {
        return Err(WireError::Reserved);
    }
    if second & 0x80 != 0 {
        return Err(WireError::Masked);
    }
    let (start, length) = match second & 0x7F {
        126 => match rest.first_chunk::<2>() {
            Some(n) => (4, u64::from(u16::from_be_bytes(*n))),
            None => return Ok(None),
        },
        127 => match rest.first_chunk::<8>() {
            Some(n) => (10, u64::from_be_bytes(*n)),
            None => return Ok(None),
        },
        n => (2, u64::from(n)),
    };
    if length > MAX_MESSAGE_BYTES as u64 {
        return Err(WireError::TooLong);
    }
    let end = start + length as usize;
    Ok((bytes.len() >= end).then_some(Head {
        fin: first & 0x80 != 0,
        opcode: first & 0x0F,
        start,
        end,
    }))
}

/// Cuts a byte stream into messages. Holds bytes only of an incomplete frame or message.
#[derive(Default)]
pub(crate) struct FrameReader {
    pending: Vec<u8>,
    /// Of what type the message is, and what of it is there.
    fragments: Option<(u8, Vec<u8>)>,
}

fn inbound(opcode: u8, payload: &[u8]) -> Inbound<'_> {
    if opcode == OP_BINARY { Inbound::Binary(payload) } else { Inbound::Message(payload) }
}

impl FrameReader {
    /// Calls `each` for every message that `bytes` completes, in order.
    pub(crate) fn feed<E: From<WireError>>(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(Inbound<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.pending.is_empty() {
            let used = self.cut(bytes, &mut each)?;
            self.pending.extend_from_slice(&bytes[used..]);
            return Ok(());
        }
        let mut pending = std::mem::take(&mut self.pending);
        pending.extend_from_slice(bytes);
        let used = self.cut(&pending, &mut each)?;
        pending.drain(..used);
        if pending.is_empty() {
            pending = Vec::new();
        }
        self.pending = pending;
        Ok(())
    }

    fn cut<E: From<WireError>>(
        &mut self,
        bytes: &[u8],
        each: &mut impl FnMut(Inbound<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let mut used = 0;
        while let Some(Head { fin, opcode, start, end }) = head(&bytes[used..])? {
            let payload = &bytes[used + start..used + end];
            used += end;
            match (opcode, &mut self.fragments) {
                (OP_TEXT | OP_BINARY, None) if fin => each(inbound(opcode, payload))?,
                (OP_TEXT | OP_BINARY, slot @ None) => *slot = Some((opcode, payload.to_vec())),
                (OP_CONTINUATION, Some((_, message))) => {
                    if message.len() + payload.len() > MAX_MESSAGE_BYTES {
                        return Err(WireError::TooLong.into());
                    }
                    message.extend_from_slice(payload);
                    if fin {
                        let (opcode, message) = self.fragments.take().unwrap_or_default();
                        each(inbound(opcode, &message))?;
                    }
                }
                (OP_TEXT | OP_BINARY | OP_CONTINUATION, _) => {
                    return Err(WireError::Fragments.into());
                }
                (OP_PING, _) => each(Inbound::Ping(payload))?,
                (OP_PONG, _) => {}
                (OP_CLOSE, _) => {
                    let (code, reason) = match payload.split_first_chunk::<2>() {
                        Some((code, reason)) => (u16::from_be_bytes(*code), reason),
                        None => (1005, &[][..]),
                    };
                    each(Inbound::Close(code, String::from_utf8_lossy(reason).into_owned()))?;
                }
                (other, _) => return Err(WireError::Opcode(other).into()),
            }
        }
        Ok(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server_frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![first];
        match payload.len() {
            n @ 0..=125 => frame.push(n as u8),
            n @ 126..=0xFFFF => {
                frame.push(126);
                frame.extend_from_slice(&(n as u16).to_be_bytes());
            }
            n => {
                frame.push(127);
                frame.extend_from_slice(&(n as u64).to_be_bytes());
            }
        }
        frame.extend_from_slice(payload);
        frame
    }

    fn read_in_steps(bytes: &[u8], step: usize) -> Result<Vec<String>, WireError> {
        let mut reader = FrameReader::default();
        let mut found = Vec::new();
        for part in bytes.chunks(step) {
            reader.feed::<WireError>(part, |inbound| {
                found.push(match inbound {
                    Inbound::Message(m) => format!("m{}", String::from_utf8_lossy(m)),
                    Inbound::Binary(m) => format!("b{}", String::from_utf8_lossy(m)),
                    Inbound::Ping(p) => format!("p{}", String::from_utf8_lossy(p)),
                    Inbound::Close(code, reason) => format!("c{code}{reason}"),
                });
                Ok(())
            })?;
        }
        assert!(reader.pending.is_empty());
        Ok(found)
    }

    #[test]
    fn messages_survive_any_segmentation() {
        let long = "x".repeat(70_000);
        let mut bytes = server_frame(0x81, b"one");
        bytes.extend(server_frame(0x01, b"two"));
        bytes.extend(server_frame(0x89, b"ping"));
        bytes.extend(server_frame(0x80, &[b'a'; 300]));
        bytes.extend(server_frame(0x81, long.as_bytes()));
        bytes.extend(server_frame(0x82, b"three"));
        bytes.extend(server_frame(0x02, b"fo"));
        bytes.extend(server_frame(0x80, b"ur"));
        bytes.extend(server_frame(0x88, &[&3000_u16.to_be_bytes()[..], b"bye"].concat()));
        let want = vec![
            "mone".to_owned(),
            "pping".to_owned(),
            format!("mtwo{}", "a".repeat(300)),
            format!("m{long}"),
            "bthree".to_owned(),
            "bfour".to_owned(),
            "c3000bye".to_owned(),
        ];
        for step in [1, 2, 3, 7, 1000, bytes.len()] {
            assert_eq!(read_in_steps(&bytes, step).unwrap(), want, "step {step}");
        }
    }

    #[test]
    fn what_servers_must_not_send_is_refused() {
        assert_eq!(read_in_steps(&[0x81, 0x80, 0, 0, 0, 0], 6), Err(WireError::Masked));
        assert_eq!(read_in_steps(&[0xC1, 0], 2), Err(WireError::Reserved));
        assert_eq!(read_in_steps(&[0x80, 0], 2), Err(WireError::Fragments));
        assert_eq!(read_in_steps(&[0x83, 0], 2), Err(WireError::Opcode(3)));
        let huge = [&[0x82, 127][..], &u64::MAX.to_be_bytes()].concat();
        assert_eq!(read_in_steps(&huge, 10), Err(WireError::TooLong));
    }

    #[test]
    fn masking_is_undone_by_the_key() {
        for size in [0, 5, 125, 126, 65_535, 65_536] {
            let payload: Vec<u8> = (0..size).map(|i| i as u8).collect();
            let key = [1, 2, 3, 250];
            let frame = masked_frame(OP_TEXT, &payload, key);
            let body = &frame[frame.len() - size..];
            assert_eq!(frame[frame.len() - size - 4..frame.len() - size], key);
            let plain: Vec<u8> = body.iter().enumerate().map(|(i, b)| b ^ key[i % 4]).collect();
            assert_eq!(plain, payload);
        }
    }
}
