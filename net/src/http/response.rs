//! Responses of the server side.

/// A response that closes its connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Response {
    /// Without a body.
    pub fn new(status: u16) -> Response {
        Response { status, headers: Vec::new(), body: Vec::new() }
    }

    /// Plain text.
    pub fn text(status: u16, body: impl Into<String>) -> Response {
        Response::new(status)
            .with_header("Content-Type", "text/plain; charset=utf-8")
            .with_body(body.into().into_bytes())
    }

    /// JSON text.
    pub fn json(status: u16, body: impl Into<String>) -> Response {
        Response::new(status)
            .with_header("Content-Type", "application/json; charset=utf-8")
            .with_body(body.into().into_bytes())
    }

    /// Adds a header. Line breaks in it are replaced by spaces: nobody can add a header by a value.
    #[must_use]
    pub fn with_header(mut self, name: &str, value: &str) -> Response {
        let clean = |s: &str| s.replace(['\r', '\n', '\0'], " ");
        self.headers.push((clean(name), clean(value)));
        self
    }

    /// Sets the body.
    #[must_use]
    pub fn with_body(mut self, body: Vec<u8>) -> Response {
        self.body = body;
        self
    }

    /// The status code.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The bytes to send; without the body for the answer to a HEAD request.
    pub fn encode(&self, head_only: bool) -> Vec<u8> {
        let mut out = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status)).into_bytes();
        for (name, value) in &self.headers {
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(b": ");
            super::header_bytes(value, &mut out);
            out.extend_from_slice(b"\r\n");
        }
        let end = format!("Content-Length: {}\r\nConnection: close\r\n\r\n", self.body.len());
        out.extend_from_slice(end.as_bytes());
        if !head_only {
            out.extend_from_slice(&self.body);
        }
        out
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        301 => "Moved Permanently",
        302 => "Found",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        411 => "Length Required",
        413 => "Content Too Large",
        426 => "Upgrade Required",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_add_a_header() {
        let response = Response::text(404, "no\r\n").with_header("X", "a\r\nSet-Cookie: b");
        let text = String::from_utf8(response.encode(false)).unwrap();
        assert_eq!(
            text,
            "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain; charset=utf-8\r\n\
             X: a  Set-Cookie: b\r\nContent-Length: 4\r\nConnection: close\r\n\r\nno\r\n"
        );
        assert!(response.encode(true).ends_with(b"\r\n\r\n"));
    }
}
