//! Accepts connections on an executor: requests are answered here, upgrades are passed on.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use zeroring_net::http::{Incoming, ReadError, RequestHead, Response};
use zeroring_net::rt::{Instant, Listener, Stream, now, spawn};

use super::endpoints::{OpsRequest, OpsState, respond};

/// How long a client may take to send its request, as the original's HTTP server.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections of one executor whose request is not read yet. More are closed at once: somebody
/// opens sockets and says nothing.
pub const MAX_PENDING: usize = 16_384;

/// Accepts until the listener breaks, which is returned; dropping the future stops accepting.
/// WebSocket upgrades, whatever their path, go to `upgrade`, as a task of their own.
pub async fn accept<U, F>(listener: Listener, ops: Arc<OpsState>, upgrade: U) -> io::Error
where
    U: Fn(Incoming) -> F + Clone + 'static,
    F: Future<Output = ()> + 'static,
{
    let pending = Rc::new(Cell::new(0usize));
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        if pending.get() >= MAX_PENDING {
            tracing::warn!(peer = %stream.peer_addr(), "too many connections without a request");
            continue;
        }
        pending.set(pending.get() + 1);
        let (pending, ops, upgrade) = (Rc::clone(&pending), Arc::clone(&ops), upgrade.clone());
        spawn(async move {
            let request = read(stream, pending).await;
            match request {
                Some(incoming) if incoming.head.is_upgrade() => upgrade(incoming).await,
                Some(incoming) => {
                    let response = handle(&incoming.head, now(), &ops);
                    if let Err(error) = incoming.respond(response).await {
                        tracing::debug!(%error, "a response could not be sent");
                    }
                }
                None => {}
            }
        });
    }
}

async fn read(stream: Stream, pending: Rc<Cell<usize>>) -> Option<Incoming> {
    let peer = stream.peer_addr();
    let read = Incoming::read(stream, now() + HEAD_TIMEOUT).await;
    pending.set(pending.get().saturating_sub(1));
    match read {
        Ok(incoming) => Some(incoming),
        // TCP health checks connect and close.
        Err(ReadError::Closed) => None,
        Err(error) => {
            tracing::debug!(%peer, %error, "no request");
            None
        }
    }
}

/// The answer to a request that is no upgrade.
pub fn handle(head: &RequestHead, arrived: Instant, ops: &OpsState) -> Response {
    let request = OpsRequest {
        method: &head.method,
        target: &head.target,
        authorization: head.header("authorization"),
        arrived,
    };
    let answer = respond(&request, ops);
    let response = Response::new(answer.status).with_header("Content-Type", answer.content_type);
    let response = match answer.authenticate {
        Some(scheme) => response.with_header("WWW-Authenticate", scheme),
        None => response,
    };
    response.with_body(answer.body)
}
