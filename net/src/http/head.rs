//! The head of an HTTP/1 request: request line and headers.

use memchr::memmem;

/// Most bytes of request line and headers. The original allows 16 KiB; clients put whole queries
/// into `Sec-WebSocket-Protocol`, so there is room.
pub const MAX_HEAD_BYTES: usize = 64 * 1024;

/// Most header lines.
pub const MAX_HEADERS: usize = 64;

/// Why a request head is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// More than [`MAX_HEAD_BYTES`].
    #[error("request line and headers exceed {MAX_HEAD_BYTES} bytes")]
    TooLarge,
    /// More than [`MAX_HEADERS`].
    #[error("more than {MAX_HEADERS} header lines")]
    TooManyHeaders,
    /// Not HTTP/1.
    #[error("malformed HTTP request: {0}")]
    Malformed(String),
}

impl HeadError {
    /// The status of the answer.
    pub fn status(&self) -> u16 {
        match self {
            HeadError::TooLarge | HeadError::TooManyHeaders => 431,
            HeadError::Malformed(_) => 400,
        }
    }
}

/// A request's method, target and headers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RequestHead {
    /// `GET`, …
    pub method: String,
    /// The request target as sent: path and query.
    pub target: String,
    /// 0 for HTTP/1.0, 1 for HTTP/1.1.
    pub minor_version: u8,
    /// Names in lower case; values with one `char` per byte (Latin-1, as Node reads them), without
    /// surrounding white space; in the order sent.
    pub headers: Vec<(String, String)>,
}

impl RequestHead {
    /// The first header of that (lower-case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// All headers of that (lower-case) name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.headers.iter().filter(move |(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// All headers of that (lower-case) name, joined by `", "`; `None` without any.
    pub fn joined(&self, name: &str) -> Option<String> {
        let values: Vec<_> = self.all(name).collect();
        (!values.is_empty()).then(|| values.join(", "))
    }

    /// Whether a comma-separated header has `token` (lower case), in any case.
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.all(name).any(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case(token)))
    }

    /// The path: the target up to `?`.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// What follows `?`, or nothing.
    pub fn query(&self) -> &str {
        self.target.split_once('?').map_or("", |(_, q)| q)
    }

    /// Whether the client asks to upgrade to WebSocket.
    pub fn is_upgrade(&self) -> bool {
        self.has_token("connection", "upgrade") && self.header("upgrade").is_some()
    }
}

/// Parses a request head at the start of `bytes`: the head and its length, or `None` if it is not
/// complete yet. `searched` remembers how much was looked at in vain, so that a head that arrives
/// byte by byte is parsed once.
///
/// # Errors
/// It is too large or malformed.
pub fn parse_head(
    bytes: &[u8],
    searched: &mut usize,
) -> Result<Option<(RequestHead, usize)>, HeadError> {
    // Empty lines before the request are allowed, and no end of it.
    let start = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n')).unwrap_or(bytes.len());
    let from = start.max(searched.saturating_sub(3));
    let window = &bytes[from.min(bytes.len())..];
    let complete =
        memmem::find(window, b"\n\r\n").is_some() || memmem::find(window, b"\n\n").is_some();
    *searched = bytes.len();
    if !complete {
        return if bytes.len() >= MAX_HEAD_BYTES { Err(HeadError::TooLarge) } else { Ok(None) };
    }
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD_BYTES => return Ok(None),
        Ok(httparse::Status::Partial) => return Err(HeadError::TooLarge),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyHeaders),
        Err(error) => return Err(HeadError::Malformed(error.to_string())),
    };
    if length > MAX_HEAD_BYTES {
        return Err(HeadError::TooLarge);
    }
    let headers = request
        .headers
        .iter()
        .map(|h| (h.name.to_ascii_lowercase(), h.value.iter().map(|&b| char::from(b)).collect()))
        .collect();
    let head = RequestHead {
        method: request.method.unwrap_or_default().to_owned(),
        target: request.path.unwrap_or_default().to_owned(),
        minor_version: request.version.unwrap_or(1),
        headers,
    };
    Ok(Some((head, length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Option<(RequestHead, usize)>, HeadError> {
        parse_head(bytes, &mut 0)
    }

    #[test]
    fn any_split_parses_to_the_same_head() {
        let text = b"\r\nGET /sync/v51/connect?clientID=a HTTP/1.1\r\nHost: x\r\nCookie: \xc3\xa9=1 \r\n\
                     X: a\r\nx: b\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\nrest";
        let (whole, length) = parse(text).unwrap().unwrap();
        assert_eq!(&text[length..], b"rest");
        assert_eq!(whole.path(), "/sync/v51/connect");
        assert_eq!(whole.query(), "clientID=a");
        assert_eq!(whole.header("cookie"), Some("Ã©=1"));
        assert_eq!(whole.joined("x").as_deref(), Some("a, b"));
        assert!(whole.is_upgrade());
        for step in 1..text.len() {
            let mut searched = 0;
            let mut end = 0;
            let parsed = loop {
                end = (end + step).min(text.len());
                if let Some(done) = parse_head(&text[..end], &mut searched).unwrap() {
                    break done;
                }
                assert!(end < length, "step {step}: complete but not seen");
            };
            assert_eq!(parsed, (whole.clone(), length), "step {step}");
        }
    }

    #[test]
    fn oversized_and_malformed_heads_are_refused() {
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MAX_HEAD_BYTES));
        assert_eq!(parse(long.as_bytes()), Err(HeadError::TooLarge));
        let endless = vec![b'a'; MAX_HEAD_BYTES];
        assert_eq!(parse(&endless), Err(HeadError::TooLarge));
        let empty_lines = vec![b'\n'; MAX_HEAD_BYTES];
        assert_eq!(parse(&empty_lines), Err(HeadError::TooLarge));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(parse(many.as_bytes()), Err(HeadError::TooManyHeaders));
        let enough = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS));
        assert_eq!(parse(enough.as_bytes()).unwrap().unwrap().0.headers.len(), MAX_HEADERS);
        for bad in [
            &b"GET / HTTP/2.0\r\n\r\n"[..],
            b"\x16\x03\x01\x02\x00\x01\x00\n\r\n",
            b"GET  HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET / HTTP/1.1\r\nna me: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nname : x\r\n\r\n",
            b"GET / HTTP/1.1\r\na: \x00\r\n\r\n",
        ] {
            let error = parse(bad).unwrap_err();
            assert_eq!(error.status(), 400, "{bad:?}");
        }
    }
}
