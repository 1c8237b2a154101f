//! RFC 6455: the decoder against a table of ours, against itself under any split, and against
//! tungstenite on random frames.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{self, Cursor, Read, Write};

use flate2::{Compress, Compression, FlushCompress};
use proptest::prelude::*;
use tungstenite::protocol::{Role, WebSocketConfig};
use zeroring_net::ws::{CloseFrame, Decoder, Event, Message, ProtocolError};

const MAX: usize = 1000;

#[derive(Debug, Clone)]
struct TestFrame {
    /// FIN, RSV and opcode.
    first: u8,
    mask: Option<[u8; 4]>,
    payload: Vec<u8>,
}

fn frame(first: u8, payload: impl AsRef<[u8]>) -> TestFrame {
    TestFrame { first, mask: Some([0x11, 0xf2, 0x83, 0x74]), payload: payload.as_ref().to_vec() }
}

fn encode(frames: &[TestFrame]) -> Vec<u8> {
    let mut out = Vec::new();
    for f in frames {
        out.push(f.first);
        let masked = if f.mask.is_some() { 0x80 } else { 0 };
        match f.payload.len() {
            n @ 0..=125 => out.push(masked | u8::try_from(n).unwrap()),
            n @ 126..=65535 => {
                out.push(masked | 126);
                out.extend_from_slice(&u16::try_from(n).unwrap().to_be_bytes());
            }
            n => {
                out.push(masked | 127);
                out.extend_from_slice(&(n as u64).to_be_bytes());
            }
        }
        let mask = f.mask.unwrap_or_default();
        if f.mask.is_some() {
            out.extend_from_slice(&mask);
        }
        out.extend(f.payload.iter().enumerate().map(|(i, b)| b ^ mask[i % 4]));
    }
    out
}

type Outcome = (Vec<Event>, Option<ProtocolError>);

fn decode_in(mut decoder: Decoder, pieces: &[&[u8]]) -> Outcome {
    let mut events = Vec::new();
    for piece in pieces {
        let mut input = *piece;
        while !input.is_empty() {
            match decoder.decode(&mut input) {
                Ok(event) => events.extend(event),
                Err(error) => return (events, Some(error)),
            }
        }
    }
    (events, None)
}

fn decode(bytes: &[u8]) -> Outcome {
    decode_in(Decoder::new(MAX, false), &[bytes])
}

fn text(s: &str) -> Event {
    Event::Message(Message::Text(s.to_owned()))
}

fn binary(b: &[u8]) -> Event {
    Event::Message(Message::Binary(b.to_vec()))
}

fn closed(code: u16, reason: &str) -> Event {
    Event::Close(Some(CloseFrame { code, reason: reason.to_owned() }))
}

fn check(name: &str, frames: &[TestFrame], events: &[Event], error: Option<ProtocolError>) {
    let bytes = encode(frames);
    assert_eq!(decode(&bytes), (events.to_vec(), error), "{name}");
    // The same byte by byte.
    let pieces: Vec<_> = bytes.chunks(1).collect();
    let split = decode_in(Decoder::new(MAX, false), &pieces);
    assert_eq!(split, (events.to_vec(), error), "{name}, byte by byte");
}

#[test]
fn data_frames_and_their_fragmentation() {
    for len in [0, 1, 7, 8, 9, 125, 126, 127, 128, 999, 1000] {
        let payload = "x".repeat(len);
        check("text", &[frame(0x81, &payload)], &[text(&payload)], None);
        check("binary", &[frame(0x82, &payload)], &[binary(payload.as_bytes())], None);
    }
    check(
        "fragments",
        &[
            frame(0x01, "ab"),
            frame(0x00, ""),
            frame(0x00, "cd"),
            frame(0x80, "e"),
            frame(0x81, "f"),
        ],
        &[text("abcde"), text("f")],
        None,
    );
    check(
        "control frames between fragments",
        &[frame(0x02, "a"), frame(0x89, "p"), frame(0x00, "b"), frame(0x8A, ""), frame(0x80, "")],
        &[Event::Ping(b"p".to_vec()), Event::Pong(vec![]), binary(b"ab")],
        None,
    );
    check(
        "a character in three frames",
        &[frame(0x01, [0xe2]), frame(0x00, [0x82]), frame(0x80, [0xac])],
        &[text("€")],
        None,
    );
    let nothing = ProtocolError::NothingToContinue;
    check("continuation of nothing", &[frame(0x80, "a")], &[], Some(nothing));
    check("unfinished continuation of nothing", &[frame(0x00, "a")], &[], Some(nothing));
    let ended = [frame(0x81, "a"), frame(0x80, "b")];
    check("continuation after the end", &ended, &[text("a")], Some(nothing));
    for second in [0x81, 0x82, 0x01] {
        let frames = [frame(0x01, "a"), frame(second, "b")];
        check("interleaved", &frames, &[], Some(ProtocolError::Interleaved));
    }
}

#[test]
fn control_frames() {
    check("ping", &[frame(0x89, "")], &[Event::Ping(vec![])], None);
    let long = [0xff; 125];
    check("pong", &[frame(0x8A, long)], &[Event::Pong(long.to_vec())], None);
    for opcode in [0x8, 0x9, 0xA] {
        let too_long = [frame(0x80 | opcode, [b'a'; 126])];
        check("too long", &too_long, &[], Some(ProtocolError::LongControl));
        let fragment = [frame(opcode, "a")];
        check("fragmented", &fragment, &[], Some(ProtocolError::FragmentedControl));
    }
}

#[test]
fn reserved_bits_and_opcodes() {
    for bits in [0x10, 0x20, 0x40, 0x70] {
        for opcode in [0x1, 0x2, 0x8, 0x9] {
            let frames = [frame(0x81, "a"), frame(0x80 | bits | opcode, "")];
            check("reserved bits", &frames, &[text("a")], Some(ProtocolError::ReservedBits));
        }
    }
    for opcode in [3, 4, 5, 6, 7, 0xB, 0xC, 0xD, 0xE, 0xF] {
        let bad = Some(ProtocolError::BadOpcode(opcode));
        check("opcode", &[frame(0x80 | opcode, "")], &[], bad);
        check("opcode", &[frame(0x89, ""), frame(opcode, "")], &[Event::Ping(vec![])], bad);
    }
    for first in [0x81, 0x82, 0x89, 0x88] {
        let frames = [TestFrame { mask: None, ..frame(first, "ab") }];
        check("unmasked", &frames, &[], Some(ProtocolError::Unmasked));
    }
}

#[test]
fn close_frames() {
    check("empty", &[frame(0x88, "")], &[Event::Close(None)], None);
    check("after close", &[frame(0x88, ""), frame(0x81, "x")], &[Event::Close(None)], None);
    check("garbage after close", &[frame(0x88, ""), frame(0xff, "x")], &[Event::Close(None)], None);
    check("one byte", &[frame(0x88, [3])], &[], Some(ProtocolError::ShortClose));
    let valid = (1000..=1003).chain(1007..=1014).chain([3000, 3999, 4000, 4999]);
    for code in valid {
        let mut payload = u16::to_be_bytes(code).to_vec();
        check("code", &[frame(0x88, &payload)], &[closed(code, "")], None);
        payload.extend_from_slice("grün".as_bytes());
        check("reason", &[frame(0x88, &payload)], &[closed(code, "grün")], None);
    }
    for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535] {
        let payload = u16::to_be_bytes(code);
        check("code", &[frame(0x88, payload)], &[], Some(ProtocolError::BadCloseCode(code)));
    }
    let payload = [0x03, 0xe8, 0xce, 0xba, 0xe1];
    check("reason", &[frame(0x88, payload)], &[], Some(ProtocolError::BadUtf8));
}

#[test]
fn text_is_utf8_and_fails_early() {
    // From Autobahn 6.*: valid and invalid sequences, boundaries included.
    let valid: [&[u8]; 8] = [
        b"Hello-\xc2\xb5@\xc3\x9f\xc3\xb6\xc3\xa4\xc3\xbc\xc3\xa0\xc3\xa1-UTF-8!!",
        b"\xf4\x8f\xbf\xbf",
        b"\x00",
        b"\xc2\x80",
        b"\xe0\xa0\x80",
        b"\xf0\x90\x80\x80",
        b"\xed\x9f\xbf\xee\x80\x80",
        b"\xef\xbf\xbe\xef\xbf\xbf",
    ];
    for bytes in valid {
        let expected = text(std::str::from_utf8(bytes).unwrap());
        check("valid", &[frame(0x81, bytes)], std::slice::from_ref(&expected), None);
        for cut in 0..bytes.len() {
            let frames = [frame(0x01, &bytes[..cut]), frame(0x89, ""), frame(0x80, &bytes[cut..])];
            check("cut", &frames, &[Event::Ping(vec![]), expected.clone()], None);
        }
    }
    let invalid: [&[u8]; 12] = [
        b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
        b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xf4\x90\x80\x80edited",
        b"\xf8\x88\x80\x80\x80",
        b"\x80",
        b"\xc0\xaf",
        b"\xe0\x80\xaf",
        b"\xed\xbf\xbf",
        b"\xfe",
        b"abc\xffdef",
        b"\xf7\xbf\xbf\xbf",
        b"\xc3",
        b"\xf0\x90\x80",
    ];
    for bytes in invalid {
        check("invalid", &[frame(0x81, bytes)], &[], Some(ProtocolError::BadUtf8));
        check("as binary", &[frame(0x82, bytes)], &[binary(bytes)], None);
    }
    // Long before the end of the frame, and of the message.
    let mut bytes = encode(&[frame(0x01, [b"ok".to_vec(), vec![0xff], vec![b'a'; 500]].concat())]);
    bytes.truncate(20);
    assert_eq!(decode(&bytes), (vec![], Some(ProtocolError::BadUtf8)));
    let frames = [frame(0x01, b"\xf4"), frame(0x00, b"\x90")];
    check("early in fragments", &frames, &[], Some(ProtocolError::BadUtf8));
}

#[test]
fn oversized_messages_end_with_1009() {
    let too_large = Some(ProtocolError::TooLarge(MAX));
    check("one frame", &[frame(0x82, vec![0; MAX + 1])], &[], too_large);
    let half = vec![b'a'; MAX / 2];
    let whole = [half.clone(), half.clone()].concat();
    let fits = [frame(0x02, &half), frame(0x80, &half)];
    check("fragments that fit", &fits, &[binary(&whole)], None);
    let frames = [frame(0x02, &half), frame(0x00, &half), frame(0x80, "a")];
    check("fragments", &frames, &[], too_large);
    // The header alone decides, and takes no memory.
    for len in [MAX as u64 + 1, u64::from(u32::MAX), u64::MAX >> 1, u64::MAX] {
        let mut bytes = vec![0x82, 0xff];
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        assert_eq!(decode(&bytes), (vec![], too_large), "{len}");
    }
}

#[test]
fn errors_have_the_codes_that_the_protocol_names() {
    assert_eq!(ProtocolError::BadUtf8.code(), 1007);
    assert_eq!(ProtocolError::TooLarge(1).code(), 1009);
    for error in [
        ProtocolError::ReservedBits,
        ProtocolError::BadOpcode(3),
        ProtocolError::Unmasked,
        ProtocolError::FragmentedControl,
        ProtocolError::LongControl,
        ProtocolError::NothingToContinue,
        ProtocolError::Interleaved,
        ProtocolError::ShortClose,
        ProtocolError::BadCloseCode(5),
    ] {
        assert_eq!(error.code(), 1002, "{error}");
    }
}

fn deflated(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 100);
    let mut compress = Compress::new(Compression::fast(), false);
    compress.compress_vec(payload, &mut out, FlushCompress::Sync).unwrap();
    out.truncate(out.len() - 4);
    out
}

#[test]
fn compressed_messages() {
    let decode = |frames: &[TestFrame]| {
        let bytes = encode(frames);
        let whole = decode_in(Decoder::new(MAX, true), &[&bytes]);
        let pieces: Vec<_> = bytes.chunks(1).collect();
        assert_eq!(decode_in(Decoder::new(MAX, true), &pieces), whole);
        whole
    };
    let hello = deflated("grün grün grün".as_bytes());
    let expected = text("grün grün grün");
    assert_eq!(decode(&[frame(0xC1, &hello)]), (vec![expected.clone()], None));
    let (a, b) = hello.split_at(3);
    let frames = [frame(0x41, a), frame(0x89, ""), frame(0x80, b), frame(0x81, "plain")];
    let events = vec![Event::Ping(vec![]), expected, text("plain")];
    assert_eq!(decode(&frames), (events, None));
    assert_eq!(decode(&[frame(0xC2, deflated(&[7; MAX]))]), (vec![binary(&[7; MAX])], None));
    let bomb = deflated(&[7; MAX + 1]);
    assert!(bomb.len() < 100);
    assert_eq!(decode(&[frame(0xC2, bomb)]), (vec![], Some(ProtocolError::TooLarge(MAX))));
    let bad = deflated(b"\xff\xff");
    assert_eq!(decode(&[frame(0xC1, bad)]), (vec![], Some(ProtocolError::BadUtf8)));
    assert_eq!(decode(&[frame(0xC1, [0xff; 9])]), (vec![], Some(ProtocolError::BadDeflate)));
    // Only the first frame of a message may say that it is compressed.
    let frames = [frame(0x41, a), frame(0xC0, b)];
    assert_eq!(decode(&frames), (vec![], Some(ProtocolError::ReservedBits)));
    assert_eq!(decode(&[frame(0xC9, "")]), (vec![], Some(ProtocolError::ReservedBits)));
}

// ---- random frames ---------------------------------------------------------------------------

/// What tungstenite reads and writes.
struct Wire(Cursor<Vec<u8>>);

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How the reference ended.
#[derive(Debug, PartialEq)]
enum End {
    InputEnded,
    Error(String),
}

fn reference(bytes: &[u8]) -> (Vec<Event>, End) {
    use tungstenite::{Error, Message as M};
    let config = WebSocketConfig::default().max_message_size(Some(MAX)).max_frame_size(Some(MAX));
    let wire = Wire(Cursor::new(bytes.to_vec()));
    let mut ws = tungstenite::WebSocket::from_raw_socket(wire, Role::Server, Some(config));
    let mut events = Vec::new();
    loop {
        let event = match ws.read() {
            Ok(M::Text(t)) => text(t.as_str()),
            Ok(M::Binary(b)) => binary(&b),
            Ok(M::Ping(b)) => Event::Ping(b.to_vec()),
            Ok(M::Pong(b)) => Event::Pong(b.to_vec()),
            Ok(M::Close(None)) => Event::Close(None),
            // What it makes of a code that must not be sent.
            Ok(M::Close(Some(f))) if f.reason.as_str() == "Protocol violation" => {
                return (events, End::Error("close code".to_owned()));
            }
            Ok(M::Close(Some(f))) => closed(f.code.into(), f.reason.as_str()),
            Ok(M::Frame(_)) => unreachable!(),
            Err(Error::Io(_) | Error::ConnectionClosed | Error::AlreadyClosed) => {
                return (events, End::InputEnded);
            }
            Err(Error::Protocol(
                tungstenite::error::ProtocolError::ResetWithoutClosingHandshake,
            )) => return (events, End::InputEnded),
            Err(error) => return (events, End::Error(error.to_string())),
        };
        let last = matches!(event, Event::Close(_));
        events.push(event);
        if last {
            return (events, End::InputEnded);
        }
    }
}

fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => "[a-zäß€😀]{0,12}".prop_map(String::into_bytes),
        2 => prop::collection::vec(any::<u8>(), 0..9),
        1 => prop::collection::vec(Just(b'x'), 100..300),
        1 => prop::collection::vec(Just(b'y'), 900..1100),
        1 => prop::sample::select(vec![1000u16, 1001, 1003, 1007, 1011, 1005, 999, 3000, 4999, 5000])
            .prop_map(|c| c.to_be_bytes().to_vec()),
    ]
}

fn any_frame() -> impl Strategy<Value = TestFrame> {
    let first = prop_oneof![
        6 => prop::sample::select(vec![0x81u8, 0x82, 0x01, 0x02, 0x00, 0x80, 0x00, 0x80]),
        3 => prop::sample::select(vec![0x89u8, 0x8A, 0x88]),
        1 => any::<u8>(),
    ];
    let mask = prop_oneof![30 => any::<[u8; 4]>().prop_map(Some), 1 => Just(None)];
    (first, mask, any_payload()).prop_map(|(first, mask, payload)| TestFrame {
        first,
        mask,
        payload,
    })
}

/// Encoded frames; sometimes cut off, sometimes with a byte changed.
fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    let frames = prop::collection::vec(any_frame(), 0..8);
    (frames, any::<prop::sample::Index>(), any::<u8>(), 0..8u8).prop_map(
        |(frames, at, byte, what)| {
            let mut bytes = encode(&frames);
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                match what {
                    0 => bytes.truncate(at),
                    1 => bytes[at] = byte,
                    _ => {}
                }
            }
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn any_split_yields_the_same_events(
        bytes in any_bytes(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        deflate in any::<bool>(),
    ) {
        let whole = decode_in(Decoder::new(MAX, deflate), &[&bytes]);
        let mut cuts: Vec<_> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces: Vec<_> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
        prop_assert_eq!(decode_in(Decoder::new(MAX, deflate), &pieces), whole);
    }

    #[test]
    fn random_frames_mean_the_same_to_tungstenite(bytes in any_bytes()) {
        let (ours, error) = decode(&bytes);
        let (theirs, end) = reference(&bytes);
        prop_assert_eq!(&ours, &theirs, "{:?} {:?}", error, end);
        match (&error, &end) {
            (Some(_), End::Error(_)) | (None, End::InputEnded) => {}
            // We judge a frame before it is complete.
            (Some(_), End::InputEnded) => {}
            (None, End::Error(_)) => prop_assert!(false, "only tungstenite objects: {:?}", end),
        }
    }
}
