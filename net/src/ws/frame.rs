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
    /// A text message in one frame. The payload is UTF-8.
    pub fn text(payload: &(impl AsRef<[u8]> + ?Sized)) -> Frame {
        debug_assert!(simdutf8::basic::from_utf8(payload.as_ref()).is_ok());
        Frame::copy(OP_TEXT, payload.as_ref())
    }

    /// A binary message in one frame.
    pub fn binary(payload: &[u8]) -> Frame {
        Frame::copy(OP_BINARY, payload)
    }

    /// One exact allocation, one copy: a frame may be a megabyte.
    fn copy(opcode: u8, payload: &[u8]) -> Frame {
        let mut header = [0; MAX_HEADER];
        let header = encode_header(&mut header, FIN | opcode, payload.len());
        let mut plain = Rc::<[u8]>::new_uninit_slice(header.len() + payload.len());
        if let Some(place) = Rc::get_mut(&mut plain) {
            let (first, rest) = place.split_at_mut(header.len());
            first.write_copy_of_slice(header);
            rest.write_copy_of_slice(payload);
        }
        // SAFETY: nobody else has it yet, so both of its parts have just been written.
        let plain = unsafe { plain.assume_init() };
        Frame { plain, header: header.len(), opcode, deflated: None }
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
                (body.len() < payload.len()).then(|| Frame::copy(self.opcode | RSV1, &body).plain)
            })
            .clone()
        });
        Chunk::Shared(compressed.unwrap_or_else(|| self.plain.clone()))
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
