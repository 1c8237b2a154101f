//! permessage-deflate (RFC 7692), always without context takeover in both directions: a broadcast
//! is compressed once for all sockets, and an idle connection holds no compression state.

use std::cell::RefCell;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// What the operator allows (`ZERO_WEBSOCKET_COMPRESSION_OPTIONS`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeflateConfig {
    /// Messages below this many bytes are sent as they are.
    pub threshold: usize,
    /// The window the server compresses with, 9 to 15 bits.
    pub server_max_window_bits: u8,
    /// The window that clients are asked to use, if they let the server choose.
    pub client_max_window_bits: Option<u8>,
    /// zlib's level, 0 to 9.
    pub level: u32,
}

impl Default for DeflateConfig {
    fn default() -> Self {
        DeflateConfig {
            threshold: 1024,
            server_max_window_bits: 15,
            client_max_window_bits: None,
            level: 6,
        }
    }
}

/// What was negotiated for a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeflateParams {
    /// Messages below this many bytes are sent as they are.
    pub threshold: usize,
    /// The window the server compresses with.
    pub server_max_window_bits: u8,
    /// zlib's level.
    pub level: u32,
}

/// What the peer sent does not inflate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InflateError {
    TooLarge,
    Corrupt,
}

/// The tail that the sender leaves out of each message.
const TAIL: [u8; 4] = [0, 0, 0xff, 0xff];

/// Inflated output grows by this much.
const STEP: usize = 16 * 1024;

thread_local! {
    // One each per executor: without context takeover they carry nothing between messages.
    static COMPRESS: RefCell<Option<(u8, u32, Compress)>> = const { RefCell::new(None) };
    static DECOMPRESS: RefCell<Option<Decompress>> = const { RefCell::new(None) };
}

/// The compressed message; `None` if the compressor fails (then it is sent uncompressed).
pub(super) fn compress(payload: &[u8], params: &DeflateParams) -> Option<Vec<u8>> {
    COMPRESS.with_borrow_mut(|slot| {
        // Outside this range the library panics.
        let bits = params.server_max_window_bits.clamp(9, 15);
        let (_, _, compress) = match slot {
            Some(c) if c.0 == bits && c.1 == params.level => {
                c.2.reset();
                c
            }
            _ => {
                let level = Compression::new(params.level);
                slot.insert((
                    bits,
                    params.level,
                    Compress::new_with_window_bits(level, false, bits),
                ))
            }
        };
        let mut out = Vec::with_capacity(payload.len() / 2 + 64);
        loop {
            let consumed = usize::try_from(compress.total_in()).ok()?;
            match compress.compress_vec(&payload[consumed..], &mut out, FlushCompress::Sync).ok()? {
                // Room left over = everything was flushed.
                Status::Ok | Status::BufError if out.len() < out.capacity() => break,
                Status::Ok | Status::BufError => out.reserve(payload.len() / 2 + 64),
                Status::StreamEnd => return None,
            }
        }
        out.ends_with(&TAIL).then(|| {
            out.truncate(out.len() - TAIL.len());
            out
        })
    })
}

/// The message that `payload` compresses; at most `max` bytes.
pub(super) fn inflate(mut payload: Vec<u8>, max: usize) -> Result<Vec<u8>, InflateError> {
    payload.extend_from_slice(&TAIL);
    DECOMPRESS.with_borrow_mut(|slot| {
        let inflater = match slot {
            Some(d) => {
                d.reset(false);
                d
            }
            None => slot.insert(Decompress::new_with_window_bits(false, 15)),
        };
        let mut out = Vec::new();
        loop {
            if out.len() == out.capacity() {
                out.reserve(STEP);
            }
            let before = (inflater.total_in(), inflater.total_out());
            let consumed = usize::try_from(before.0).map_err(|_| InflateError::TooLarge)?;
            let status = inflater
                .decompress_vec(&payload[consumed..], &mut out, FlushDecompress::Sync)
                .map_err(|_| InflateError::Corrupt)?;
            if out.len() > max {
                return Err(InflateError::TooLarge);
            }
            let after = (inflater.total_in(), inflater.total_out());
            let all_in = after.0 == payload.len() as u64;
            match status {
                // A final block: RFC 7692 §7.2.3.4 allows it; the message ends with it.
                Status::StreamEnd => return Ok(out),
                _ if all_in && out.len() < out.capacity() => return Ok(out),
                _ if before == after && out.len() < out.capacity() => {
                    return Err(InflateError::Corrupt);
                }
                _ => {}
            }
        }
    })
}

/// Chooses among the offers of `Sec-WebSocket-Extensions`: the parameters and the value of the
/// response header, or `None` = no offer is acceptable.
///
/// # Errors
/// The header is malformed.
pub(super) fn negotiate(
    header: &str,
    config: &DeflateConfig,
) -> Result<Option<(DeflateParams, String)>, ()> {
    for offer in header.split(',') {
        let mut parts = offer.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        if name.is_empty() || !name.bytes().all(super::handshake::is_token_byte) {
            return Err(());
        }
        if name != "permessage-deflate" {
            continue;
        }
        if let Some(accepted) = accept_offer(parts, config)? {
            return Ok(Some(accepted));
        }
    }
    Ok(None)
}

fn accept_offer<'a>(
    params: impl Iterator<Item = &'a str>,
    config: &DeflateConfig,
) -> Result<Option<(DeflateParams, String)>, ()> {
    let mut server_bits = None;
    let mut client_bits_offered = None;
    let mut seen = Vec::new();
    for param in params {
        let (name, value) = match param.split_once('=') {
            Some((name, value)) => (name.trim(), Some(value.trim().trim_matches('"'))),
            None => (param, None),
        };
        if seen.contains(&name) {
            return Err(());
        }
        seen.push(name);
        let bits = || match value.map(str::parse::<u8>) {
            Some(Ok(bits @ 8..=15)) => Ok(bits),
            _ => Err(()),
        };
        match name {
            "server_no_context_takeover" | "client_no_context_takeover" if value.is_none() => {}
            "server_max_window_bits" => server_bits = Some(bits()?),
            "client_max_window_bits" if value.is_none() => client_bits_offered = Some(15),
            "client_max_window_bits" => client_bits_offered = Some(bits()?),
            _ => return Err(()),
        }
    }
    // One compressed form serves all sockets, so a smaller window than ours declines the offer.
    if server_bits.is_some_and(|bits| bits < config.server_max_window_bits) {
        return Ok(None);
    }
    let mut answer =
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover".to_owned();
    if config.server_max_window_bits < 15 || server_bits.is_some() {
        answer.push_str(&format!("; server_max_window_bits={}", config.server_max_window_bits));
    }
    match (config.client_max_window_bits, client_bits_offered) {
        (Some(wanted), Some(offered)) => {
            answer.push_str(&format!("; client_max_window_bits={}", wanted.min(offered)));
        }
        // The operator demands a limit that this client cannot promise.
        (Some(wanted), None) if wanted < 15 => return Ok(None),
        _ => {}
    }
    let params = DeflateParams {
        threshold: config.threshold,
        server_max_window_bits: config.server_max_window_bits,
        level: config.level,
    };
    Ok(Some((params, answer)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(bits: u8) -> DeflateParams {
        DeflateParams { threshold: 0, server_max_window_bits: bits, level: 6 }
    }

    #[test]
    fn what_is_compressed_inflates_to_the_same() {
        for bits in [9, 12, 15] {
            for len in [0usize, 1, 5, 1000, 70_000, 300_000] {
                let text: Vec<u8> =
                    (0..len).map(|i| b'a' + u8::try_from((i * i / 7) % 26).unwrap()).collect();
                let small = compress(&text, &params(bits)).unwrap();
                assert_eq!(inflate(small, len).unwrap(), text, "{bits} bits, {len} bytes");
            }
        }
    }

    #[test]
    fn the_example_of_the_rfc() {
        // RFC 7692 §7.2.3.1 and §7.2.3.3 (uncompressed block), §7.2.3.4 (final block).
        let hello = vec![0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00];
        assert_eq!(inflate(hello, 100).unwrap(), b"Hello");
        let stored = vec![0x00, 0x05, 0x00, 0xfa, 0xff, 0x48, 0x65, 0x6c, 0x6c, 0x6f, 0x00];
        assert_eq!(inflate(stored, 100).unwrap(), b"Hello");
        let last = vec![0xf3, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00, 0x00];
        assert_eq!(inflate(last, 100).unwrap(), b"Hello");
    }

    #[test]
    fn bombs_and_garbage_are_errors() {
        let bomb = compress(&vec![0; 1 << 20], &params(15)).unwrap();
        assert!(bomb.len() < 5000);
        assert_eq!(inflate(bomb, 100_000), Err(InflateError::TooLarge));
        assert_eq!(inflate(vec![0xff; 20], 100_000), Err(InflateError::Corrupt));
        // The context of a failed message does not leak into the next.
        assert_eq!(inflate(compress(b"fine", &params(15)).unwrap(), 10).unwrap(), b"fine");
    }

    #[test]
    fn offers_are_answered_as_the_rfc_says() {
        let config = DeflateConfig::default();
        let base = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
        let answer = |header| negotiate(header, &config).map(|a| a.map(|(_, text)| text));
        assert_eq!(answer("permessage-deflate"), Ok(Some(base.to_owned())));
        assert_eq!(
            answer("foo; x=1, permessage-deflate; client_max_window_bits"),
            Ok(Some(base.to_owned()))
        );
        assert_eq!(
            answer("permessage-deflate; server_max_window_bits=10, permessage-deflate"),
            Ok(Some(base.to_owned()))
        );
        assert_eq!(answer("permessage-deflate; server_max_window_bits=10"), Ok(None));
        assert_eq!(
            answer("permessage-deflate; server_max_window_bits=15"),
            Ok(Some(format!("{base}; server_max_window_bits=15")))
        );
        assert_eq!(answer("foo"), Ok(None));
        for bad in [
            "permessage-deflate; nonsense",
            "permessage-deflate; server_max_window_bits",
            "permessage-deflate; server_max_window_bits=7",
            "permessage-deflate; server_no_context_takeover=1",
            "permessage-deflate; client_max_window_bits; client_max_window_bits",
            "",
            "a b",
        ] {
            assert_eq!(answer(bad), Err(()), "{bad:?}");
        }
    }
}
