//! Encoding of server frames (never masked).

use std::cell::OnceCell;
use std::rc::Rc;

use super::deflate;
use crate::rt::Chunk;

/// A close frame's payload is at most 125 bytes, two of them are the code.
pub const MAX_CLOSE_REASON_BYTES: usize = 123;

pub(super) const OP_CONTINUATION: u8 = 0x0;
pub(super) const OP_TEXT: u8 = 0x1;
pub(super) const OP_BINARY: u8 = 0x2;
pub(super) const OP_CLOSE: u8 = 0x8;
pub(super) const OP_PING: u8 = 0x9;
pub(super) const OP_PONG: u8 = 0xA;
pub(super) const FIN: u8 = 0x80;
pub(super) const RSV1: u8 = 0x40;

/// The longest header of an unmasked frame.
const MAX_HEADER: usize = 10;

type Deflated = OnceCell<Option<Rc<[u8]>>>;

/// An encoded data frame: immutable, and cheap to send to many sockets of one executor.
#[derive(Debug, Clone)]
pub struct Frame {
    plain: Rc<[u8]>,
    header: usize,
    opcode: u8,
    /// The compressed form, made when the first socket that negotiated compression needs it;
    /// `None` inside = compression does not pay.
    deflated: Option<Rc<Deflated>>,
}

impl Frame {
    /// A text message in one frame.
    pub fn text(payload: &str) -> Frame {
        Frame::copy(OP_TEXT, payload.as_bytes())
    }

    /// A binary message in one frame.
    pub fn binary(payload: &[u8]) -> Frame {
        Frame::copy(OP_BINARY, payload)
    }

    fn copy(opcode: u8, payload: &[u8]) -> Frame {
        let mut builder = FrameBuilder::new();
        builder.payload().extend_from_slice(payload);
        builder.finish(opcode)
    }

    /// Lets sockets that negotiated compression send this frame compressed (once for all of them).
    #[must_use]
    pub fn compressible(mut self) -> Frame {
        self.deflated = Some(Rc::default());
        self
    }

    /// The message.
    pub fn payload(&self) -> &[u8] {
        &self.plain[self.header..]
    }

    /// Bytes on the wire, uncompressed.
    pub fn len(&self) -> usize {
        self.plain.len()
    }

    /// Never: a frame has a header.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// What to send to a socket with these parameters.
    pub(super) fn wire(&self, params: Option<&deflate::DeflateParams>) -> Chunk {
        let compressed = params.zip(self.deflated.as_ref()).and_then(|(params, cell)| {
            cell.get_or_init(|| {
                let payload = self.payload();
                if payload.len() < params.threshold {
                    return None;
                }
                let body = deflate::compress(payload, params)?;
                (body.len() < payload.len()).then(|| {
                    let mut builder = FrameBuilder::new();
                    builder.payload().extend_from_slice(&body);
                    builder.finish(self.opcode | RSV1).plain
                })
            })
            .clone()
        });
        Chunk::Shared(compressed.unwrap_or_else(|| self.plain.clone()))
    }
}

/// Builds frames in a scratch buffer that is reused: one exact allocation and one copy per frame.
#[derive(Debug)]
pub struct FrameBuilder {
    /// Room for a header, then the payload.
    buffer: Vec<u8>,
}

impl Default for FrameBuilder {
    fn default() -> Self {
        FrameBuilder::new()
    }
}

impl FrameBuilder {
    /// An empty one.
    pub fn new() -> FrameBuilder {
        FrameBuilder { buffer: vec![0; MAX_HEADER] }
    }

    /// The payload's place: append to it, never truncate it below what it had.
    pub fn payload(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    /// Number of payload bytes so far.
    pub fn len(&self) -> usize {
        self.buffer.len().saturating_sub(MAX_HEADER)
    }

    /// Whether no payload was written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The text frame of what was appended; the builder is empty afterwards. The payload must be
    /// UTF-8: JSON writers produce nothing else.
    pub fn finish_text(&mut self) -> Frame {
        debug_assert!(simdutf8::basic::from_utf8(&self.buffer[MAX_HEADER..]).is_ok());
        self.finish(OP_TEXT)
    }

    /// The binary frame of what was appended; the builder is empty afterwards.
    pub fn finish_binary(&mut self) -> Frame {
        self.finish(OP_BINARY)
    }

    fn finish(&mut self, first: u8) -> Frame {
        let mut header = [0; MAX_HEADER];
        let header = encode_header(&mut header, FIN | first, self.len());
        let start = MAX_HEADER - header.len();
        self.buffer[start..MAX_HEADER].copy_from_slice(header);
        let plain = Rc::from(&self.buffer[start..]);
        self.buffer.truncate(MAX_HEADER);
        Frame { plain, header: MAX_HEADER - start, opcode: first, deflated: None }
    }
}

fn encode_header(out: &mut [u8; MAX_HEADER], first: u8, len: usize) -> &[u8] {
    out[0] = first;
    if let Ok(len @ 0..=125) = u8::try_from(len) {
        out[1] = len;
        &out[..2]
    } else if let Ok(len) = u16::try_from(len) {
        out[1] = 126;
        out[2..4].copy_from_slice(&len.to_be_bytes());
        &out[..4]
    } else {
        out[1] = 127;
        out[2..10].copy_from_slice(&(len as u64).to_be_bytes());
        &out[..10]
    }
}

/// A control frame; what exceeds 125 bytes is cut.
pub(super) fn control(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let payload = &payload[..payload.len().min(125)];
    let mut out = Vec::with_capacity(2 + payload.len());
    out.push(FIN | opcode);
    out.push(u8::try_from(payload.len()).unwrap_or(125));
    out.extend_from_slice(payload);
    out
}

/// A close frame: with code and reason (cut to fit), or empty.
pub(super) fn close(status: Option<(u16, &str)>) -> Vec<u8> {
    let Some((code, reason)) = status else { return control(OP_CLOSE, &[]) };
    let mut payload = code.to_be_bytes().to_vec();
    payload.extend_from_slice(truncate_reason(reason).as_bytes());
    control(OP_CLOSE, &payload)
}

/// `reason`, or as much of it as fits into a close frame with `...` at its end (spec:
/// sync-protocol §1.6). Cuts between characters.
pub fn truncate_reason(reason: &str) -> std::borrow::Cow<'_, str> {
    if reason.len() <= MAX_CLOSE_REASON_BYTES {
        return reason.into();
    }
    let mut end = MAX_CLOSE_REASON_BYTES - 3;
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}...", &reason[..end]).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_the_shortest_length_form() {
        for (len, header) in [
            (0usize, vec![0x81, 0]),
            (125, vec![0x81, 125]),
            (126, vec![0x81, 126, 0, 126]),
            (65535, vec![0x81, 126, 0xff, 0xff]),
            (65536, vec![0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            let text = "x".repeat(len);
            let frame = Frame::text(&text);
            assert_eq!(frame.plain[..header.len()], header, "{len}");
            assert_eq!(frame.payload(), text.as_bytes());
            assert_eq!(frame.len(), header.len() + len);
        }
        assert_eq!(Frame::binary(b"ab").plain[..], [0x82, 2, b'a', b'b']);
    }

    #[test]
    fn a_builder_is_empty_after_each_frame() {
        let mut builder = FrameBuilder::new();
        builder.payload().extend_from_slice(b"one");
        assert_eq!(builder.finish_text().payload(), b"one");
        assert!(builder.is_empty());
        builder.payload().extend_from_slice(b"two");
        assert_eq!(builder.finish_binary().payload(), b"two");
    }

    #[test]
    fn close_reasons_are_cut_between_characters() {
        assert_eq!(close(None), [0x88, 0]);
        assert_eq!(close(Some((1002, "x"))), [0x88, 3, 0x03, 0xea, b'x']);
        for reason in ["a".repeat(123), "é".repeat(61)] {
            assert_eq!(truncate_reason(&reason), reason);
        }
        for (reason, kept) in [("a".repeat(124), 120), ("é".repeat(62), 120), ("€".repeat(50), 120)]
        {
            let cut = truncate_reason(&reason);
            assert_eq!(cut.len(), kept + 3);
            assert!(cut.ends_with("...") && reason.starts_with(&cut[..kept]));
        }
        assert_eq!(truncate_reason(&format!("a{}", "é".repeat(70))).len(), 119 + 3);
        assert_eq!(close(Some((3000, &"r".repeat(500)))).len(), 127);
    }
}
