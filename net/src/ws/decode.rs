//! The incremental decoder of client frames.

use super::deflate::{self, InflateError};
use super::frame::{FIN, OP_BINARY, OP_CLOSE, OP_CONTINUATION, OP_PING, OP_PONG, OP_TEXT, RSV1};

/// Memory taken for a frame on the word of its header alone; more only as bytes arrive.
const RESERVE_BYTES: usize = 64 * 1024;

/// A complete message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// UTF-8, checked.
    Text(String),
    /// Any bytes.
    Binary(Vec<u8>),
}

impl Message {
    /// The bytes of either kind.
    pub fn into_bytes(self) -> Vec<u8> {
        match self {
            Message::Text(text) => text.into_bytes(),
            Message::Binary(bytes) => bytes,
        }
    }

    /// Number of payload bytes.
    pub fn len(&self) -> usize {
        match self {
            Message::Text(text) => text.len(),
            Message::Binary(bytes) => bytes.len(),
        }
    }

    /// Whether there is no payload.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A peer's close frame with a code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloseFrame {
    /// The status code; valid to be sent.
    pub code: u16,
    /// The reason, often empty.
    pub reason: String,
}

/// What the peer's bytes mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A complete message.
    Message(Message),
    /// To be answered by a pong with the same payload.
    Ping(Vec<u8>),
    /// Nobody waits for it.
    Pong(Vec<u8>),
    /// The last event: what follows is ignored.
    Close(Option<CloseFrame>),
}

/// The peer broke the protocol (or a limit): close with [`ProtocolError::code`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A reserved bit is set that no extension defines.
    #[error("reserved bit set")]
    ReservedBits,
    /// An opcode that RFC 6455 reserves.
    #[error("invalid opcode {0}")]
    BadOpcode(u8),
    /// A client must mask its frames.
    #[error("unmasked frame from a client")]
    Unmasked,
    /// A control frame in fragments.
    #[error("fragmented control frame")]
    FragmentedControl,
    /// A control frame with more than 125 bytes.
    #[error("control frame with more than 125 bytes")]
    LongControl,
    /// A continuation without a beginning.
    #[error("continuation frame without a message")]
    NothingToContinue,
    /// A new message within a fragmented one.
    #[error("new message before the last one is complete")]
    Interleaved,
    /// A close frame with one byte of payload.
    #[error("close frame with one byte of payload")]
    ShortClose,
    /// A close code that must not be sent.
    #[error("invalid close code {0}")]
    BadCloseCode(u16),
    /// Text (or a close reason) that is not UTF-8.
    #[error("invalid UTF-8")]
    BadUtf8,
    /// The message exceeds the limit.
    #[error("message exceeds {0} bytes")]
    TooLarge(usize),
    /// A compressed message that does not inflate.
    #[error("compressed message is corrupt")]
    BadDeflate,
}

impl ProtocolError {
    /// The close code that tells the peer.
    pub fn code(&self) -> u16 {
        match self {
            ProtocolError::BadUtf8 | ProtocolError::BadDeflate => 1007,
            ProtocolError::TooLarge(_) => 1009,
            _ => 1002,
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum State {
    Header,
    Payload,
    /// A close frame or an error: the rest is ignored.
    Done,
}

#[derive(Debug, Clone, Copy, Default)]
struct FrameHeader {
    fin: bool,
    opcode: u8,
    mask: [u8; 4],
    /// Payload bytes still to come.
    remaining: usize,
    /// Where the mask continues.
    mask_at: usize,
}

/// The message that is being put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Open {
    text: bool,
    compressed: bool,
}

/// Turns bytes of a client into events, however they are split.
#[derive(Debug)]
pub struct Decoder {
    max_payload: usize,
    deflate: bool,
    state: State,
    header: [u8; 14],
    header_len: usize,
    frame: FrameHeader,
    open: Option<Open>,
    message: Vec<u8>,
    /// How much of `message` is known to be UTF-8.
    checked: usize,
    control: Vec<u8>,
}

impl Decoder {
    /// A decoder for messages of at most `max_payload` bytes (also after inflating); `deflate` =
    /// permessage-deflate was negotiated, without client context takeover.
    pub fn new(max_payload: usize, deflate: bool) -> Decoder {
        Decoder {
            max_payload,
            deflate,
            state: State::Header,
            header: [0; 14],
            header_len: 0,
            frame: FrameHeader::default(),
            open: None,
            message: Vec::new(),
            checked: 0,
            control: Vec::new(),
        }
    }

    /// Takes bytes from the front of `input` until an event is complete (then more may be in
    /// there) or all are taken.
    ///
    /// # Errors
    /// The peer broke the protocol; the decoder ignores everything from then on.
    pub fn decode(&mut self, input: &mut &[u8]) -> Result<Option<Event>, ProtocolError> {
        let result = self.advance(input);
        if matches!(result, Err(_) | Ok(Some(Event::Close(_)))) {
            self.state = State::Done;
            self.message = Vec::new();
        }
        result
    }

    fn advance(&mut self, input: &mut &[u8]) -> Result<Option<Event>, ProtocolError> {
        loop {
            match self.state {
                State::Done => {
                    *input = &[];
                    return Ok(None);
                }
                State::Header => {
                    if !self.take_header(input)? {
                        return Ok(None);
                    }
                    self.state = State::Payload;
                }
                State::Payload => {
                    self.take_payload(input)?;
                    if self.frame.remaining > 0 {
                        return Ok(None);
                    }
                    self.state = State::Header;
                    if let Some(event) = self.end_frame()? {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }

    /// Collects the header; `true` when it is complete. The first two bytes are judged as soon as
    /// they are there.
    fn take_header(&mut self, input: &mut &[u8]) -> Result<bool, ProtocolError> {
        loop {
            let need = match self.header_len {
                0 | 1 => 2,
                _ => 2 + extended_len(self.header[1]) + 4,
            };
            if self.header_len == need && need > 2 {
                break;
            }
            if input.is_empty() {
                return Ok(false);
            }
            let n = (need - self.header_len).min(input.len());
            self.header[self.header_len..self.header_len + n].copy_from_slice(&input[..n]);
            self.header_len += n;
            *input = &input[n..];
            if self.header_len == 2 {
                self.check_start(self.header[0], self.header[1])?;
            }
        }
        let len_end = 2 + extended_len(self.header[1]);
        let len = match &self.header[2..len_end] {
            [] => u64::from(self.header[1] & 0x7f),
            bytes => bytes.iter().fold(0, |len, &b| len << 8 | u64::from(b)),
        };
        self.header_len = 0;
        let opcode = self.header[0] & 0x0f;
        let mask = &self.header[len_end..len_end + 4];
        let limit = self.max_payload;
        let remaining = usize::try_from(len).map_err(|_| ProtocolError::TooLarge(limit))?;
        if opcode < OP_CLOSE {
            if remaining > limit.saturating_sub(self.message.len()) {
                return Err(ProtocolError::TooLarge(limit));
            }
            self.message.reserve(remaining.min(RESERVE_BYTES));
        }
        self.frame = FrameHeader {
            fin: self.header[0] & FIN != 0,
            opcode,
            mask: [mask[0], mask[1], mask[2], mask[3]],
            remaining,
            mask_at: 0,
        };
        Ok(true)
    }

    /// Judges the first two bytes of a frame, and opens a message.
    fn check_start(&mut self, first: u8, second: u8) -> Result<(), ProtocolError> {
        let opcode = first & 0x0f;
        let data_start = matches!(opcode, OP_TEXT | OP_BINARY);
        let compressed = first & RSV1 != 0;
        if first & 0x30 != 0 || (compressed && !(self.deflate && data_start)) {
            return Err(ProtocolError::ReservedBits);
        }
        match opcode {
            OP_CONTINUATION if self.open.is_none() => return Err(ProtocolError::NothingToContinue),
            OP_TEXT | OP_BINARY if self.open.is_some() => return Err(ProtocolError::Interleaved),
            OP_CONTINUATION | OP_TEXT | OP_BINARY => {}
            OP_CLOSE | OP_PING | OP_PONG => {
                if first & FIN == 0 {
                    return Err(ProtocolError::FragmentedControl);
                }
                if second & 0x7f > 125 {
                    return Err(ProtocolError::LongControl);
                }
            }
            other => return Err(ProtocolError::BadOpcode(other)),
        }
        if second & 0x80 == 0 {
            return Err(ProtocolError::Unmasked);
        }
        if data_start {
            self.open = Some(Open { text: opcode == OP_TEXT, compressed });
        }
        Ok(())
    }

    fn take_payload(&mut self, input: &mut &[u8]) -> Result<(), ProtocolError> {
        let n = self.frame.remaining.min(input.len());
        let (bytes, rest) = input.split_at(n);
        *input = rest;
        let control = self.frame.opcode >= OP_CLOSE;
        let target = if control { &mut self.control } else { &mut self.message };
        let start = target.len();
        target.extend_from_slice(bytes);
        unmask(&mut target[start..], self.frame.mask, self.frame.mask_at);
        self.frame.mask_at = (self.frame.mask_at + n) % 4;
        self.frame.remaining -= n;
        // As early as the bytes tell, not at the end of a message of megabytes.
        if !control && self.open == Some(Open { text: true, compressed: false }) {
            self.checked += valid_utf8(&self.message[self.checked..])?;
        }
        Ok(())
    }

    fn end_frame(&mut self) -> Result<Option<Event>, ProtocolError> {
        match self.frame.opcode {
            OP_PING => Ok(Some(Event::Ping(std::mem::take(&mut self.control)))),
            OP_PONG => Ok(Some(Event::Pong(std::mem::take(&mut self.control)))),
            OP_CLOSE => {
                parse_close(&std::mem::take(&mut self.control)).map(|c| Some(Event::Close(c)))
            }
            _ if !self.frame.fin => Ok(None),
            _ => {
                // `check_start` opened it.
                let Some(open) = self.open.take() else { return Ok(None) };
                let mut bytes = std::mem::take(&mut self.message);
                let mut checked = std::mem::take(&mut self.checked);
                if open.compressed {
                    bytes = deflate::inflate(bytes, self.max_payload).map_err(|e| match e {
                        InflateError::TooLarge => ProtocolError::TooLarge(self.max_payload),
                        InflateError::Corrupt => ProtocolError::BadDeflate,
                    })?;
                    if open.text {
                        checked = valid_utf8(&bytes)?;
                    }
                }
                if !open.text {
                    return Ok(Some(Event::Message(Message::Binary(bytes))));
                }
                if checked != bytes.len() {
                    return Err(ProtocolError::BadUtf8);
                }
                // SAFETY: `checked` bytes were found to be UTF-8, piece by piece at boundaries of
                // characters, and these are all.
                let text = unsafe { String::from_utf8_unchecked(bytes) };
                Ok(Some(Event::Message(Message::Text(text))))
            }
        }
    }
}

/// Bytes of the extended length that follows a second header byte.
fn extended_len(second: u8) -> usize {
    match second & 0x7f {
        126 => 2,
        127 => 8,
        _ => 0,
    }
}

/// XORs the mask over `bytes`, of which the first is at position `at` of the mask. Plain words:
/// the compiler vectorises it.
fn unmask(bytes: &mut [u8], mask: [u8; 4], at: usize) {
    let mut turned = [0u8; 4];
    for (i, b) in turned.iter_mut().enumerate() {
        *b = mask[(at + i) % 4];
    }
    let word = u64::from(u32::from_ne_bytes(turned));
    let word = word | word << 32;
    let (words, tail) = bytes.as_chunks_mut::<8>();
    for chunk in words {
        *chunk = (u64::from_ne_bytes(*chunk) ^ word).to_ne_bytes();
    }
    for (i, b) in tail.iter_mut().enumerate() {
        *b ^= turned[i % 4];
    }
}

/// How many bytes at the start are complete UTF-8 characters; an error if what follows cannot
/// become one.
fn valid_utf8(bytes: &[u8]) -> Result<usize, ProtocolError> {
    match simdutf8::compat::from_utf8(bytes) {
        Ok(_) => Ok(bytes.len()),
        Err(e) if e.error_len().is_none() => Ok(e.valid_up_to()),
        Err(_) => Err(ProtocolError::BadUtf8),
    }
}

fn parse_close(payload: &[u8]) -> Result<Option<CloseFrame>, ProtocolError> {
    match payload {
        [] => Ok(None),
        [_] => Err(ProtocolError::ShortClose),
        [high, low, reason @ ..] => {
            let code = u16::from_be_bytes([*high, *low]);
            if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
                return Err(ProtocolError::BadCloseCode(code));
            }
            let reason = std::str::from_utf8(reason).map_err(|_| ProtocolError::BadUtf8)?;
            Ok(Some(CloseFrame { code, reason: reason.to_owned() }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmasking_in_pieces_equals_unmasking_at_once() {
        let mask = [1, 2, 3, 200];
        let plain: Vec<u8> = (0..100u8).collect();
        let expected: Vec<u8> = plain.iter().enumerate().map(|(i, b)| b ^ mask[i % 4]).collect();
        for cut in 0..plain.len() {
            let mut bytes = plain.clone();
            let (a, b) = bytes.split_at_mut(cut);
            unmask(a, mask, 0);
            unmask(b, mask, cut % 4);
            assert_eq!(bytes, expected, "cut at {cut}");
        }
    }
}
