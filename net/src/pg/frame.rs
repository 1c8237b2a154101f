//! Message framing without I/O: bytes of the server go in, whole messages come out.

use std::ops::Range;

use super::error::{PgError, ServerError, SqlState};

/// Longest message accepted: Postgres' values end at 1 GiB, a row or tuple of them cannot be
/// much longer.
pub const MAX_FRAME_BYTES: usize = (1 << 30) + (1 << 24);

/// Longest message before the server has proved who it is.
pub const MAX_LOGIN_FRAME_BYTES: usize = 64 << 10;

/// The buffer's normal size. Large enough that a busy stream costs few system calls.
const BUFFER_BYTES: usize = 256 << 10;

/// A buffer that grew above this for one large message is given back afterwards.
const KEEP_BYTES: usize = 4 << 20;

/// One message of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Type byte.
    pub tag: u8,
    /// Payload without tag and length.
    pub body: &'a [u8],
}

/// Bytes received and not yet consumed.
#[derive(Debug)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    head: usize,
    tail: usize,
    max_frame: usize,
}

impl Default for FrameBuffer {
    fn default() -> Self {
        FrameBuffer { bytes: Vec::new(), head: 0, tail: 0, max_frame: MAX_LOGIN_FRAME_BYTES }
    }
}

impl FrameBuffer {
    /// Accepts messages up to this many bytes.
    pub fn set_max_frame(&mut self, bytes: usize) {
        self.max_frame = bytes;
    }

    /// Bytes not yet consumed.
    pub fn len(&self) -> usize {
        self.tail - self.head
    }

    /// Nothing is buffered.
    pub fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// Room to read into; tell with [`FrameBuffer::filled`] how much of it was used.
    ///
    /// # Errors
    /// [`PgError::Protocol`] if the message at the head has an impossible length.
    pub fn spare(&mut self) -> Result<&mut [u8], PgError> {
        if self.is_empty() {
            self.head = 0;
            self.tail = 0;
            if self.bytes.len() > KEEP_BYTES {
                self.bytes = Vec::new();
            }
        }
        let wanted = self.wanted()?.max(BUFFER_BYTES);
        if self.bytes.len() - self.head < wanted || self.tail == self.bytes.len() {
            self.bytes.copy_within(self.head..self.tail, 0);
            self.tail -= self.head;
            self.head = 0;
        }
        if self.bytes.len() < wanted {
            // Grow in steps: a length is only a claim until the bytes have come.
            let step = wanted.min((self.tail * 2).max(BUFFER_BYTES));
            self.bytes.resize(step.max(self.bytes.len()), 0);
        }
        if self.tail == self.bytes.len() {
            self.bytes.resize(self.tail * 2, 0);
        }
        Ok(&mut self.bytes[self.tail..])
    }

    /// `n` bytes were read into [`FrameBuffer::spare`].
    pub fn filled(&mut self, n: usize) {
        self.tail = (self.tail + n).min(self.bytes.len());
    }

    /// Length of the message at the head with tag and length word, if its header is here.
    fn wanted(&self) -> Result<usize, PgError> {
        let Some(&[b0, b1, b2, b3]) = self.bytes[self.head..self.tail].get(1..5) else {
            return Ok(5);
        };
        let length = u32::from_be_bytes([b0, b1, b2, b3]) as usize;
        if !(4..=self.max_frame).contains(&length) {
            return Err(PgError::Protocol(format!(
                "a message of type {:?} claims {length} bytes (limit {}); is this a Postgres server?",
                char::from(self.bytes[self.head]),
                self.max_frame
            )));
        }
        Ok(length + 1)
    }

    /// Where the next whole message is: (tag, range of its body). Consume it with
    /// [`FrameBuffer::consume`].
    ///
    /// # Errors
    /// [`PgError::Protocol`] if its length is impossible.
    pub fn peek(&self) -> Result<Option<(u8, Range<usize>)>, PgError> {
        let wanted = self.wanted()?;
        if wanted > self.len() || self.len() < 5 {
            return Ok(None);
        }
        Ok(Some((self.bytes[self.head], self.head + 5..self.head + wanted)))
    }

    /// Whether one of the whole messages among the `within` bytes from `start` on (a message's
    /// beginning, or the head) is such. Looks, and takes nothing.
    pub fn any(
        &self,
        start: Option<usize>,
        within: usize,
        mut is_such: impl FnMut(Frame<'_>) -> bool,
    ) -> bool {
        let mut at = start.unwrap_or(self.head).max(self.head);
        let end = self.tail.min(at.saturating_add(within));
        while let Some(&[tag, b0, b1, b2, b3]) = self.bytes[..end].get(at..at + 5) {
            let next = at + 1 + u32::from_be_bytes([b0, b1, b2, b3]) as usize;
            // A message that is not whole, or nonsense: taking it will tell.
            let Some(body) = self.bytes[..end].get(at + 5..next) else { return false };
            if is_such(Frame { tag, body }) {
                return true;
            }
            at = next;
        }
        false
    }

    /// The bytes of a range of [`FrameBuffer::peek`].
    pub fn slice(&self, range: Range<usize>) -> &[u8] {
        self.bytes.get(range).unwrap_or_default()
    }

    /// Everything before `end` has been used.
    pub fn consume(&mut self, end: usize) {
        self.head = end.min(self.tail);
    }
}

/// Reads big-endian fields off the front of a message body. Every read fails, and says where,
/// when the body is too short.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    /// What is left.
    pub rest: &'a [u8],
}

/// A body ended before its field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the message ends within its {0}")]
pub struct Truncated(pub &'static str);

impl From<Truncated> for PgError {
    fn from(error: Truncated) -> PgError {
        PgError::Protocol(error.to_string())
    }
}

impl<'a> Reader<'a> {
    /// A reader of `body`.
    pub fn new(body: &'a [u8]) -> Self {
        Reader { rest: body }
    }

    /// `n` bytes.
    ///
    /// # Errors
    /// [`Truncated`] naming the field.
    pub fn bytes(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], Truncated> {
        let (front, rest) = self.rest.split_at_checked(n).ok_or(Truncated(what))?;
        self.rest = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Truncated> {
        let (front, rest) = self.rest.split_first_chunk::<N>().ok_or(Truncated(what))?;
        self.rest = rest;
        Ok(*front)
    }

    /// One byte.
    ///
    /// # Errors
    /// [`Truncated`] naming the field.
    pub fn u8(&mut self, what: &'static str) -> Result<u8, Truncated> {
        Ok(self.array::<1>(what)?[0])
    }

    /// Two bytes.
    ///
    /// # Errors
    /// [`Truncated`] naming the field.
    pub fn i16(&mut self, what: &'static str) -> Result<i16, Truncated> {
        Ok(i16::from_be_bytes(self.array(what)?))
    }

    /// Four bytes.
    ///
    /// # Errors
    /// [`Truncated`] naming the field.
    pub fn i32(&mut self, what: &'static str) -> Result<i32, Truncated> {
        Ok(i32::from_be_bytes(self.array(what)?))
    }

    /// Four bytes, unsigned.
    ///
    /// # Errors
    /// [`Truncated`] naming the field.
    pub fn u32(&mut self, what: &'static str) -> Result<u32, Truncated> {
        Ok(u32::from_be_bytes(self.array(what)?))
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// [`Truncated`] naming the field.
    pub fn i64(&mut self, what: &'static str) -> Result<i64, Truncated> {
        Ok(i64::from_be_bytes(self.array(what)?))
    }

    /// Eight bytes, unsigned.
    ///
    /// # Errors
    /// [`Truncated`] naming the field.
    pub fn u64(&mut self, what: &'static str) -> Result<u64, Truncated> {
        Ok(u64::from_be_bytes(self.array(what)?))
    }

    /// Bytes up to a NUL, which is skipped.
    ///
    /// # Errors
    /// [`Truncated`] naming the field.
    pub fn cstr(&mut self, what: &'static str) -> Result<&'a [u8], Truncated> {
        let end = memchr::memchr(0, self.rest).ok_or(Truncated(what))?;
        let text = &self.rest[..end];
        self.rest = &self.rest[end + 1..];
        Ok(text)
    }
}

/// Decodes an `ErrorResponse` or `NoticeResponse`.
pub fn server_error(body: &[u8]) -> ServerError {
    let mut error = ServerError {
        severity: "ERROR".into(),
        code: SqlState::new(""),
        message: "(no message)".into(),
        detail: None,
        hint: None,
        context: None,
    };
    let mut reader = Reader::new(body);
    while let Ok(field @ 1..) = reader.u8("field type") {
        let Ok(text) = reader.cstr("field") else { break };
        let text = String::from_utf8_lossy(text).into_owned();
        match field {
            b'S' => error.severity = text,
            b'C' => error.code = SqlState::new(&text),
            b'M' => error.message = text,
            b'D' => error.detail = Some(text),
            b'H' => error.hint = Some(text),
            b'W' => error.context = Some(text),
            _ => {}
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend((body.len() as u32 + 4).to_be_bytes());
        out.extend(body);
        out
    }

    /// Feeds `bytes` in pieces of the given sizes and returns the frames.
    fn run(bytes: &[u8], pieces: &[usize], max: usize) -> Result<Vec<(u8, Vec<u8>)>, PgError> {
        let mut buffer = FrameBuffer::default();
        buffer.set_max_frame(max);
        let (mut at, mut turn, mut frames) = (0, 0, vec![]);
        while at < bytes.len() {
            let piece = pieces[turn % pieces.len()].max(1);
            turn += 1;
            let spare = buffer.spare()?;
            let n = piece.min(spare.len()).min(bytes.len() - at);
            spare[..n].copy_from_slice(&bytes[at..at + n]);
            buffer.filled(n);
            at += n;
            while let Some((tag, range)) = buffer.peek()? {
                let end = range.end;
                frames.push((tag, buffer.slice(range).to_vec()));
                buffer.consume(end);
            }
        }
        Ok(frames)
    }

    proptest! {
        #[test]
        fn frames_do_not_depend_on_how_the_bytes_arrive(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 1..30),
            pieces in prop::collection::vec(1usize..4000, 1..10),
        ) {
            let bytes: Vec<u8> = bodies.iter().flat_map(|b| frame(b'd', b)).collect();
            let frames = run(&bytes, &pieces, MAX_FRAME_BYTES).unwrap();
            prop_assert_eq!(frames.into_iter().map(|f| f.1).collect::<Vec<_>>(), bodies);
        }
    }

    #[test]
    fn large_frames_grow_the_buffer_and_give_it_back() {
        let big = vec![7u8; 9 << 20];
        let mut bytes = frame(b'd', &big);
        bytes.extend(frame(b'Z', b"I"));
        let frames = run(&bytes, &[usize::MAX >> 1], MAX_FRAME_BYTES).unwrap();
        assert_eq!(frames[0].1.len(), big.len());
        assert_eq!(frames[1], (b'Z', b"I".to_vec()));
    }

    #[test]
    fn impossible_lengths_are_errors_not_allocations() {
        for length in [0u32, 3, 65 << 10, u32::MAX] {
            let mut bytes = vec![b'R'];
            bytes.extend(length.to_be_bytes());
            let error = run(&bytes, &[100], MAX_LOGIN_FRAME_BYTES).unwrap_err();
            assert!(matches!(error, PgError::Protocol(_)), "{error}");
        }
    }

    #[test]
    fn looking_ahead_sees_whole_messages_within_its_range_only() {
        let mut bytes = frame(b'd', b"one");
        bytes.extend(frame(b'd', b"two"));
        bytes.extend(&frame(b'd', b"three")[..9]);
        let mut buffer = FrameBuffer::default();
        assert!(!buffer.any(None, 100, |_| true));
        buffer.spare().unwrap()[..bytes.len()].copy_from_slice(&bytes);
        buffer.filled(bytes.len());
        let is = |text: &'static [u8]| move |f: Frame<'_>| f.tag == b'd' && f.body == text;
        assert!(buffer.any(None, 100, is(b"one")) && buffer.any(None, 100, is(b"two")));
        assert!(!buffer.any(None, 100, is(b"three")), "it is not whole");
        assert!(!buffer.any(None, 15, is(b"two")), "it ends beyond the range");
        assert!(buffer.any(None, 16, is(b"two")));
        assert!(!buffer.any(Some(8), 100, is(b"one")) && buffer.any(Some(8), 8, is(b"two")));
        for length in [0u32, 3, u32::MAX] {
            let mut buffer = FrameBuffer::default();
            let spare = buffer.spare().unwrap();
            spare[0] = b'd';
            spare[1..5].copy_from_slice(&length.to_be_bytes());
            buffer.filled(20);
            assert!(!buffer.any(None, usize::MAX, |f| !f.body.is_empty()));
        }
    }

    #[test]
    fn server_errors_survive_truncation() {
        let e = server_error(b"SERROR\0C42P01\0Mno table\0Hcreate it\0\0");
        assert_eq!((e.code, e.hint.as_deref()), (SqlState::UNDEFINED_TABLE, Some("create it")));
        assert_eq!(server_error(b"SFATAL\0C57").severity, "FATAL");
    }
}
