//! HTTP: a small server side for the upgrade and the operational endpoints, and the client that
//! calls the application's API.
//!
//! The server side reads one request per connection and answers with `Connection: close`; a proxy
//! that reuses connections can therefore smuggle nothing. Limits: [`MAX_HEAD_BYTES`],
//! [`MAX_HEADERS`], a body only with `Content-Length` and only up to what the endpoint takes.
//!
//! The client runs on one side thread with a runtime of its own ([`client`]); executors get their
//! answers over rings.

pub mod client;
mod head;
mod response;
mod server;

pub use head::{HeadError, MAX_HEAD_BYTES, MAX_HEADERS, RequestHead, parse_head};
pub use response::Response;
pub use server::{BodyError, Incoming, RawIncoming, ReadError};

/// A header value as bytes: one byte for each character up to U+00FF (the form in which values are
/// read), UTF-8 for others.
fn header_bytes(value: &str, out: &mut Vec<u8>) {
    for c in value.chars() {
        match u8::try_from(u32::from(c)) {
            Ok(byte) => out.push(byte),
            Err(_) => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}
