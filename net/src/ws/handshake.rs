//! The opening handshake (RFC 6455 §4.2; spec: sync-protocol §1.3–1.5).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

use super::deflate::{self, DeflateConfig, DeflateParams};
use crate::http::{RequestHead, Response};

/// RFC 6455 §1.3.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// An acceptable request: what to answer, and what was agreed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    /// The first sub-protocol offered, which the answer echoes verbatim.
    pub protocol: Option<String>,
    /// Compression, if configured and offered.
    pub deflate: Option<DeflateParams>,
    /// The 101 response.
    pub response: Vec<u8>,
}

/// Judges an upgrade request.
///
/// # Errors
/// The response that refuses it (400 or 405).
pub fn check(
    head: &RequestHead,
    deflate: Option<&DeflateConfig>,
) -> Result<Handshake, Box<Response>> {
    let bad = |message: &str| Box::new(Response::text(400, message));
    if head.method != "GET" {
        return Err(Box::new(
            Response::text(405, "Invalid HTTP method").with_header("Allow", "GET"),
        ));
    }
    if !head.header("upgrade").is_some_and(|v| v.eq_ignore_ascii_case("websocket")) {
        return Err(bad("Invalid Upgrade header"));
    }
    let key = match head.header("sec-websocket-key") {
        Some(key) if is_key(key) => key,
        _ => return Err(bad("Missing or invalid Sec-WebSocket-Key header")),
    };
    if !matches!(head.header("sec-websocket-version"), Some("13" | "8")) {
        let response = Response::text(400, "Missing or invalid Sec-WebSocket-Version header")
            .with_header("Sec-WebSocket-Version", "13, 8");
        return Err(Box::new(response));
    }
    let protocol = match head.joined("sec-websocket-protocol") {
        None => None,
        Some(offers) => match first_protocol(&offers) {
            Some(first) => Some(first.to_owned()),
            None => return Err(bad("Invalid Sec-WebSocket-Protocol header")),
        },
    };
    let deflate = match (deflate, head.joined("sec-websocket-extensions")) {
        (Some(config), Some(offers)) => deflate::negotiate(&offers, config)
            .map_err(|()| bad("Invalid or unacceptable Sec-WebSocket-Extensions header"))?,
        _ => None,
    };
    let mut response = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {}\r\n",
        accept_key(key)
    );
    // Neither can hold a line break: one is a token, the other is ours.
    if let Some(protocol) = &protocol {
        response.push_str(&format!("Sec-WebSocket-Protocol: {protocol}\r\n"));
    }
    if let Some((_, extensions)) = &deflate {
        response.push_str(&format!("Sec-WebSocket-Extensions: {extensions}\r\n"));
    }
    response.push_str("\r\n");
    Ok(Handshake { protocol, deflate: deflate.map(|(p, _)| p), response: response.into_bytes() })
}

/// 16 bytes in base64.
fn is_key(key: &str) -> bool {
    key.len() == 24
        && key.ends_with("==")
        && key[..22].bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/'))
}

fn accept_key(key: &str) -> String {
    let mut sha = Sha1::new();
    sha.update(key.as_bytes());
    sha.update(GUID);
    STANDARD.encode(sha.finalize())
}

/// The first of a list of distinct tokens; `None` if the list is malformed.
fn first_protocol(offers: &str) -> Option<&str> {
    let mut seen: Vec<&str> = Vec::new();
    for offer in offers.split(',') {
        let offer = offer.trim_matches([' ', '\t']);
        if offer.is_empty() || !offer.bytes().all(is_token_byte) || seen.contains(&offer) {
            return None;
        }
        seen.push(offer);
    }
    seen.first().copied()
}

/// RFC 7230 §3.2.6.
pub(super) fn is_token_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(extra: &[(&str, &str)]) -> RequestHead {
        let mut headers = vec![
            ("upgrade", "WebSocket"),
            ("connection", "Upgrade"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-version", "13"),
        ];
        for &(name, value) in extra {
            headers.retain(|(n, _)| *n != name);
            headers.push((name, value));
        }
        RequestHead {
            method: "GET".to_owned(),
            target: "/".to_owned(),
            minor_version: 1,
            headers: headers
                .into_iter()
                .filter(|(_, v)| !v.is_empty())
                .map(|(n, v)| (n.to_owned(), v.to_owned()))
                .collect(),
        }
    }

    #[test]
    fn the_example_of_the_rfc() {
        let text = String::from_utf8(check(&request(&[]), None).unwrap().response).unwrap();
        assert!(text.starts_with("HTTP/1.1 101 "), "{text}");
        assert!(text.contains("\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
        assert!(text.ends_with("\r\n\r\n") && !text.contains("Extensions"));
    }

    #[test]
    fn the_first_sub_protocol_is_echoed_verbatim() {
        let long = "e30%3D".repeat(2000);
        for (offer, echo) in [("e30%3D", "e30%3D"), ("b, a,c", "b"), (&long, &long)] {
            let agreed = check(&request(&[("sec-websocket-protocol", offer)]), None).unwrap();
            assert_eq!(agreed.protocol.as_deref(), Some(echo));
            let text = String::from_utf8(agreed.response).unwrap();
            assert!(text.contains(&format!("\r\nSec-WebSocket-Protocol: {echo}\r\n")));
        }
    }

    #[test]
    fn requests_that_cannot_be_upgraded_are_refused() {
        let status = |head: &RequestHead| check(head, None).unwrap_err().status();
        for (name, value) in [
            ("upgrade", "h2c"),
            ("upgrade", ""),
            ("sec-websocket-key", ""),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ="),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZ!=="),
            ("sec-websocket-version", "12"),
            ("sec-websocket-version", ""),
            ("sec-websocket-protocol", "a,a"),
            ("sec-websocket-protocol", "a,,b"),
            ("sec-websocket-protocol", "a=b"),
            ("sec-websocket-protocol", "é"),
        ] {
            assert_eq!(status(&request(&[(name, value)])), 400, "{name}: {value}");
        }
        assert!(check(&request(&[("sec-websocket-version", "8")]), None).is_ok());
        let post = RequestHead { method: "POST".to_owned(), ..request(&[]) };
        assert_eq!(status(&post), 405);
        let offer = request(&[("sec-websocket-extensions", "permessage-deflate")]);
        assert_eq!(check(&offer, None).unwrap().deflate, None);
        let config = DeflateConfig::default();
        assert!(check(&offer, Some(&config)).unwrap().deflate.is_some());
        let bad = request(&[("sec-websocket-extensions", "permessage-deflate; x")]);
        assert_eq!(check(&bad, Some(&config)).unwrap_err().status(), 400);
        assert!(check(&bad, None).is_ok());
    }
}
