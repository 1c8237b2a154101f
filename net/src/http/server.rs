//! Reading a request from an accepted connection, answering it, or handing it over to another
//! executor.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use super::head::{HeadError, RequestHead, parse_head};
use super::response::Response;
use crate::rt::{Chunk, Instant, RawStream, Stream, now, timeout};

/// How long and how much is read from a client after its answer was sent: closing with unread
/// bytes would reset the connection and could destroy the answer on its way.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1 << 20;

/// Why no request came out of a connection.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The peer closed before it sent a request.
    #[error("the peer closed the connection before a request")]
    Closed,
    /// The request was not complete in time; it was answered with 408.
    #[error("the request was not complete in time")]
    Timeout,
    /// The request was refused; it was answered with 400 or 431.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// Reading failed.
    #[error("reading the request: {0}")]
    Io(#[from] io::Error),
}

/// Why a body was not read. [`BodyError::response`] is the answer.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// No `Content-Length`, or a chunked body.
    #[error("a body needs Content-Length; chunked bodies are not taken")]
    LengthRequired,
    /// The length is not a number, or given twice.
    #[error("malformed Content-Length")]
    BadLength,
    /// Larger than the endpoint takes.
    #[error("body of {length} bytes, at most {max} are taken")]
    TooLarge {
        /// What was announced.
        length: u64,
        /// The limit.
        max: usize,
    },
    /// It did not arrive in time.
    #[error("the body was not complete in time")]
    Timeout,
    /// The connection ended before the body did.
    #[error("reading the body: {0}")]
    Io(#[from] io::Error),
}

impl BodyError {
    /// The answer to a request with such a body.
    pub fn response(&self) -> Response {
        let status = match self {
            BodyError::LengthRequired => 411,
            BodyError::TooLarge { .. } => 413,
            BodyError::Timeout => 408,
            BodyError::BadLength | BodyError::Io(_) => 400,
        };
        Response::text(status, self.to_string())
    }
}

/// A request on the executor that reads it.
pub struct Incoming {
    /// The connection.
    pub stream: Stream,
    /// The request.
    pub head: RequestHead,
    /// Bytes after the head that were read already.
    pub rest: Vec<u8>,
}

/// A request on its way to another executor.
#[derive(Debug)]
pub struct RawIncoming {
    /// The connection.
    pub stream: RawStream,
    /// The request.
    pub head: RequestHead,
    /// Bytes after the head that were read already.
    pub rest: Vec<u8>,
}

impl Incoming {
    /// Reads a request's head; a request that is refused is answered here.
    ///
    /// # Errors
    /// There is no request; the connection is done.
    pub async fn read(stream: Stream, deadline: Instant) -> Result<Incoming, ReadError> {
        let mut bytes = Vec::new();
        let mut searched = 0;
        let read = async {
            loop {
                if let Some(parsed) = parse_head(&bytes, &mut searched)? {
                    return Ok(parsed);
                }
                if stream.read_append(&mut bytes).await? == 0 {
                    return Err(ReadError::Closed);
                }
            }
        };
        let result = timeout(deadline.saturating_duration_since(now()), read).await;
        match result.unwrap_or(Err(ReadError::Timeout)) {
            Ok((head, length)) => Ok(Incoming { stream, head, rest: bytes.split_off(length) }),
            Err(error) => {
                let answer = match &error {
                    ReadError::Head(e) => Some(Response::text(e.status(), e.to_string())),
                    // A connection that never said anything (a health check) gets no answer.
                    ReadError::Timeout if !bytes.is_empty() => {
                        Some(Response::text(408, error.to_string()))
                    }
                    _ => None,
                };
                if let Some(answer) = answer {
                    // The peer may be gone; the error that matters is `error`.
                    let _ = respond(&stream, &answer, false).await;
                }
                Err(error)
            }
        }
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.stream.peer_addr()
    }

    /// Reads the body that `Content-Length` announces (none = empty for GET and HEAD).
    ///
    /// # Errors
    /// There is no acceptable body; [`BodyError::response`] is the answer.
    pub async fn read_body(&mut self, max: usize, deadline: Instant) -> Result<Vec<u8>, BodyError> {
        if self.head.header("transfer-encoding").is_some() {
            return Err(BodyError::LengthRequired);
        }
        let mut lengths = self.head.all("content-length");
        let length = match (lengths.next(), lengths.next()) {
            (None, _) if matches!(self.head.method.as_str(), "GET" | "HEAD" | "DELETE") => 0,
            (None, _) => return Err(BodyError::LengthRequired),
            (Some(_), Some(_)) => return Err(BodyError::BadLength),
            // `parse` would also take a leading plus sign.
            (Some(text), None) if text.bytes().all(|b| b.is_ascii_digit()) => {
                text.parse::<u64>().map_err(|_| BodyError::BadLength)?
            }
            _ => return Err(BodyError::BadLength),
        };
        let want = match usize::try_from(length) {
            Ok(want) if want <= max => want,
            _ => return Err(BodyError::TooLarge { length, max }),
        };
        let mut body = std::mem::take(&mut self.rest);
        while body.len() < want {
            let left = deadline.saturating_duration_since(now());
            let read = timeout(left, self.stream.read_append(&mut body)).await;
            if read.map_err(|_| BodyError::Timeout)?? == 0 {
                return Err(BodyError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        body.truncate(want);
        Ok(body)
    }

    /// Answers and closes.
    ///
    /// # Errors
    /// The peer is gone.
    pub async fn respond(self, response: Response) -> io::Result<()> {
        respond(&self.stream, &response, self.head.method == "HEAD").await
    }

    /// Gives the connection away, to be taken over on another executor.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn into_raw(self) -> io::Result<RawIncoming> {
        Ok(RawIncoming { stream: self.stream.into_raw()?, head: self.head, rest: self.rest })
    }
}

impl RawIncoming {
    /// Takes the connection over on this executor.
    ///
    /// # Errors
    /// The thread runs no executor, or registration failed.
    pub fn into_local(self) -> io::Result<Incoming> {
        let stream = Stream::from_raw(self.stream)?;
        Ok(Incoming { stream, head: self.head, rest: self.rest })
    }
}

async fn respond(stream: &Stream, response: &Response, head_only: bool) -> io::Result<()> {
    let send = async {
        stream.write_all(vec![Chunk::Owned(response.encode(head_only))]).await?;
        stream.shutdown(Shutdown::Write)?;
        let mut drained = 0;
        while drained < LINGER_BYTES {
            match stream.read_with(|bytes| bytes.len()).await? {
                0 => break,
                n => drained += n,
            }
        }
        Ok(())
    };
    match timeout(LINGER, send).await {
        Ok(result) => result,
        // Sent, or the peer does not read: closing is right in both cases.
        Err(_) => {
            stream.abort();
            Ok(())
        }
    }
}
