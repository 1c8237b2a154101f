//! The upgrade request of a client (spec: sync-protocol §1).
//!
//! A bad request is not answered with an HTTP status (browsers hide it): the upgrade is
//! completed, then the socket is closed with code 1002 and [`close_reason`] of the error.

use super::{MIN_PROTOCOL_VERSION, PROTOCOL_VERSION};
use crate::json::RawJson;
use crate::protocol::error::{ErrorBody, ErrorKind};

/// Longest reason that a close frame may carry, bytes.
pub const MAX_CLOSE_REASON_BYTES: usize = 123;

/// What is wrong with an upgrade request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// No known path.
    #[error("Invalid URL: {0}")]
    Url(String),
    /// The path's version is no number.
    #[error("Invalid version: {0}")]
    Version(String),
    /// A required parameter is absent or empty.
    #[error("invalid querystring - missing {0}")]
    Missing(&'static str),
    /// A parameter is no number.
    #[error("invalid querystring parameter {name}, got: {got}, url: {url}")]
    NotANumber {
        /// The parameter.
        name: &'static str,
        /// Its text.
        got: String,
        /// The whole URL.
        url: String,
    },
    /// A parameter is longer than ids may be.
    #[error("invalid querystring parameter {name}: {len} bytes, the limit is {limit}")]
    TooLong {
        /// The parameter.
        name: &'static str,
        /// Its length.
        len: usize,
        /// Longest allowed.
        limit: usize,
    },
    /// No `Sec-WebSocket-Protocol` header.
    #[error("Unexpected undefined value")]
    NoSubProtocol,
    /// The header is badly percent-encoded.
    #[error("URI malformed")]
    PercentEncoding,
    /// The header is no base64.
    #[error("Invalid character")]
    Base64,
    /// The header holds no JSON, or `null`.
    #[error("Sec-WebSocket-Protocol does not hold valid JSON: {0}")]
    Json(String),
}

/// The reason of the close frame for an error: `Error: ` and its text, cut to what fits.
pub fn close_reason(error: &ConnectError) -> String {
    elide(&format!("Error: {error}"), MAX_CLOSE_REASON_BYTES)
}

/// Cuts a text to `max_bytes` on a character boundary, ending with `...` if it was longer.
pub fn elide(text: &str, max_bytes: usize) -> String {
    if text.len() <= max_bytes {
        return text.to_owned();
    }
    let mut end = max_bytes.saturating_sub(3);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}...", &text[..end])
}

/// A path `[/base]/worker/vN/action`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ConnectPath<'a> {
    /// `sync`, `replication` or `mutate`; anything else is the caller's to refuse.
    pub worker: &'a str,
    /// The text after `v`.
    pub version: &'a str,
    /// The last segment. Not checked for `sync`.
    pub action: &'a str,
}

/// Splits a request target's path; `None` if it does not match.
pub fn parse_path(target: &str) -> Option<ConnectPath<'_>> {
    let path = split_target(target).0;
    let mut segments = path.strip_prefix('/')?.split('/').rev();
    let (action, version, worker) = (segments.next()?, segments.next()?, segments.next()?);
    let base = segments.next();
    let version = version.strip_prefix('v')?;
    let well_formed =
        [Some(action), Some(version), Some(worker), base].into_iter().flatten().all(|segment| {
            !segment.is_empty()
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_~ %".contains(&b))
        });
    (well_formed && segments.next().is_none()).then_some(ConnectPath { worker, version, action })
}

/// Path and query of a request target, without scheme, authority and fragment.
fn split_target(target: &str) -> (&str, &str) {
    let target = target.split_once('#').map_or(target, |(before, _)| before);
    let target = match target.split_once("://") {
        Some((scheme, rest)) if scheme.bytes().all(|b| b.is_ascii_alphabetic()) => {
            rest.find('/').map_or("/", |at| &rest[at..])
        }
        _ => target,
    };
    target.split_once('?').unwrap_or((target, ""))
}

/// What a client says when it connects.
#[derive(Debug, Clone, PartialEq)]
pub struct ConnectRequest {
    /// The protocol version of the path; check with [`check_version`].
    pub protocol_version: f64,
    /// One per `Zero` instance, stable over reconnects.
    pub client_id: String,
    /// Shared by the tabs of a browser profile.
    pub client_group_id: String,
    /// Browser profile (since protocol 44).
    pub profile_id: Option<String>,
    /// Cookie of the client's snapshot.
    pub base_cookie: Option<String>,
    /// Id of this socket, echoed in `connected`.
    pub wsid: String,
    /// Who the client says it is; absent is logged out.
    pub user_id: Option<String>,
    /// `["initConnection", body]` from the sub-protocol, to be handled as the first message.
    pub init_connection: Option<RawJson>,
    /// Token from the sub-protocol; never empty.
    pub auth_token: Option<String>,
}

/// Longest client, group, profile, socket or user id, bytes.
pub const MAX_PARAM_BYTES: usize = super::up::MAX_ID_BYTES;

impl ConnectRequest {
    /// Parses a `sync` request: its target and its `Sec-WebSocket-Protocol` header.
    ///
    /// # Errors
    /// [`ConnectError`], in the order in which the original finds them.
    pub fn parse(target: &str, sub_protocol: Option<&str>) -> Result<ConnectRequest, ConnectError> {
        let path = parse_path(target).ok_or_else(|| ConnectError::Url(target.to_owned()))?;
        let protocol_version = js_number(path.version);
        if protocol_version.is_nan() {
            return Err(ConnectError::Version(target.to_owned()));
        }
        let params = Params { target, query: split_target(target).1 };
        let client_id = params.required("clientID")?;
        let client_group_id = params.required("clientGroupID")?;
        let profile_id = params.optional("profileID")?;
        let base_cookie = params.optional("baseCookie")?;
        params.integer("ts")?;
        params.integer("lmid")?;
        let wsid = params.optional("wsid")?.unwrap_or_default();
        let user_id = params.optional("userID")?;
        let SubProtocol { init_connection, auth_token } =
            SubProtocol::decode(sub_protocol.ok_or(ConnectError::NoSubProtocol)?)?;
        Ok(ConnectRequest {
            protocol_version,
            client_id,
            client_group_id,
            profile_id,
            base_cookie,
            wsid,
            user_id,
            init_connection,
            auth_token,
        })
    }
}

/// The client's version if this server speaks it.
///
/// # Errors
/// `VersionNotSupported`, saying which side must be updated.
pub fn check_version(version: f64) -> Result<u32, ErrorBody> {
    if version >= f64::from(MIN_PROTOCOL_VERSION) && version <= f64::from(PROTOCOL_VERSION) {
        // Fractions cannot be written without a dot, which no path segment may contain, but for
        // negative exponents: they count as the version below.
        return Ok(version as u32);
    }
    let side = if version > f64::from(PROTOCOL_VERSION) { "server" } else { "client" };
    Err(ErrorBody::basic(
        ErrorKind::VersionNotSupported,
        format!(
            "server is at sync protocol v{PROTOCOL_VERSION} and does not support v{version}. \
             The {side} must be updated to a newer release."
        ),
    ))
}

struct Params<'a> {
    target: &'a str,
    query: &'a str,
}

impl Params<'_> {
    /// The first value of a parameter; empty counts as absent.
    fn get(&self, name: &str) -> Option<String> {
        let pairs = self.query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let value = pairs.into_iter().find(|(key, _)| form_decode(key) == name)?.1;
        Some(form_decode(value)).filter(|value| !value.is_empty())
    }

    fn optional(&self, name: &'static str) -> Result<Option<String>, ConnectError> {
        let value = self.get(name);
        match &value {
            Some(text) if text.len() > MAX_PARAM_BYTES => {
                let (len, limit) = (text.len(), MAX_PARAM_BYTES);
                Err(ConnectError::TooLong { name, len, limit })
            }
            _ => Ok(value),
        }
    }

    fn required(&self, name: &'static str) -> Result<String, ConnectError> {
        self.optional(name)?.ok_or(ConnectError::Missing(name))
    }

    fn integer(&self, name: &'static str) -> Result<f64, ConnectError> {
        let text = self.required(name)?;
        js_parse_int(&text).ok_or_else(|| ConnectError::NotANumber {
            name,
            got: text,
            url: format!("http://unused{}", self.target),
        })
    }
}

/// `application/x-www-form-urlencoded` decoding: `+` is a blank, bad escapes stay, bad UTF-8 is
/// replaced.
fn form_decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes().iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'+' => out.push(b' '),
            b'%' => match escaped(bytes.as_slice()) {
                Some(decoded) => {
                    out.push(decoded);
                    bytes.nth(1);
                }
                None => out.push(b'%'),
            },
            _ => out.push(byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The byte of the two hex digits at the start.
fn escaped(rest: &[u8]) -> Option<u8> {
    let digit = |i: usize| char::from(*rest.get(i)?).to_digit(16);
    Some((digit(0)? * 16 + digit(1)?) as u8)
}

/// JavaScript's `parseInt(text)`: a leading integer, decimal or `0x`.
fn js_parse_int(text: &str) -> Option<f64> {
    let text = text.trim_start();
    let (sign, text) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (if text.starts_with('-') { -1.0 } else { 1.0 }, rest),
        None => (1.0, text),
    };
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let (radix, digits) = hex.map_or((10, text), |rest| (16, rest));
    let mut value = None;
    for digit in digits.chars().map_while(|c| c.to_digit(radix)) {
        value = Some(value.unwrap_or(0.0) * f64::from(radix) + f64::from(digit));
    }
    value.map(|value| sign * value)
}

/// JavaScript's `Number(text)`; NaN if it is none. An empty or blank text is 0.
pub fn js_number(text: &str) -> f64 {
    let text = text.trim();
    let radix = |prefix: [&str; 2]| prefix.iter().find_map(|p| text.strip_prefix(p));
    for (prefix, base) in [(["0x", "0X"], 16), (["0o", "0O"], 8), (["0b", "0B"], 2)] {
        if let Some(digits) = radix(prefix) {
            let digits: Option<Vec<u32>> = digits.chars().map(|c| c.to_digit(base)).collect();
            return match digits {
                Some(digits) if !digits.is_empty() => {
                    digits.iter().fold(0.0, |n, &d| n * f64::from(base) + f64::from(d))
                }
                _ => f64::NAN,
            };
        }
    }
    match text {
        "" => 0.0,
        "Infinity" | "+Infinity" => f64::INFINITY,
        "-Infinity" => f64::NEG_INFINITY,
        // Rust also reads `inf`, `nan` and the like.
        _ if text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b)) => {
            text.parse().unwrap_or(f64::NAN)
        }
        _ => f64::NAN,
    }
}

/// The content of `Sec-WebSocket-Protocol`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SubProtocol {
    /// `["initConnection", body]`, not yet checked.
    pub init_connection: Option<RawJson>,
    /// The token; never empty.
    pub auth_token: Option<String>,
}

impl SubProtocol {
    /// Decodes the header: percent, base64 (padding optional, blanks ignored), UTF-8 (bad
    /// sequences replaced), JSON. What is no object counts as an empty one.
    ///
    /// # Errors
    /// [`ConnectError`] naming the layer that failed.
    pub fn decode(header: &str) -> Result<SubProtocol, ConnectError> {
        #[derive(serde::Deserialize)]
        struct Content {
            #[serde(default, rename = "initConnectionMessage")]
            init_connection: Option<RawJson>,
            #[serde(default, rename = "authToken")]
            auth_token: Option<String>,
        }
        let bytes = decode_base64(&decode_uri_component(header)?)?;
        let text = String::from_utf8_lossy(&bytes);
        // A decoder of UTF-8 in a browser or Node drops a leading byte order mark.
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let raw = RawJson::parse(text).map_err(|e| ConnectError::Json(e.to_string()))?;
        match raw.as_str().bytes().find(|b| !b.is_ascii_whitespace()) {
            Some(b'{') => {}
            Some(b'n') => return Err(ConnectError::Json("null".to_owned())),
            _ => return Ok(SubProtocol::default()),
        }
        let content: Content = raw.decode().map_err(|e| ConnectError::Json(e.to_string()))?;
        Ok(SubProtocol {
            init_connection: content.init_connection.filter(|raw| raw.as_str() != "null"),
            auth_token: content.auth_token.filter(|token| !token.is_empty()),
        })
    }
}

/// JavaScript's `decodeURIComponent`.
fn decode_uri_component(text: &str) -> Result<String, ConnectError> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    // In runs: nearly all of a header of some kilobytes is not escaped.
    while let Some(at) = memchr::memchr(b'%', rest) {
        out.extend_from_slice(&rest[..at]);
        out.push(escaped(&rest[at + 1..]).ok_or(ConnectError::PercentEncoding)?);
        rest = &rest[at + 3..];
    }
    out.extend_from_slice(rest);
    String::from_utf8(out).map_err(|_| ConnectError::PercentEncoding)
}

/// JavaScript's `atob`: blanks ignored, padding optional, left-over bits ignored.
fn decode_base64(text: &str) -> Result<Vec<u8>, ConnectError> {
    let mut symbols: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    if symbols.len().is_multiple_of(4) {
        for _ in 0..2 {
            if symbols.last() == Some(&b'=') {
                symbols.pop();
            }
        }
    }
    if symbols.len() % 4 == 1 {
        return Err(ConnectError::Base64);
    }
    let mut out = Vec::with_capacity(symbols.len() * 3 / 4);
    for group in symbols.chunks(4) {
        let mut bits = 0u32;
        for &symbol in group {
            bits = bits << 6 | sextet(symbol).ok_or(ConnectError::Base64)?;
        }
        bits <<= 6 * (4 - group.len());
        out.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Ok(out)
}

fn sextet(symbol: u8) -> Option<u32> {
    let value = SEXTETS[symbol as usize];
    (value < 64).then_some(u32::from(value))
}

/// The value of each symbol of base64; 64 for what is none.
const SEXTETS: [u8; 256] = {
    let symbols = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut table = [64; 256];
    let mut value = 0;
    while value < symbols.len() {
        table[symbols[value] as usize] = value as u8;
        value += 1;
    }
    table
};
