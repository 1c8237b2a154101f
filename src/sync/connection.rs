//! A client's socket, from its upgrade request to its end (spec: sync-protocol §1, §5.1, §5.5).
//!
//! The request is read anywhere and handed to the executor that owns its client group. There: the
//! handshake, `connected`, then messages strictly one after the other, but for pings, which are
//! answered at once.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use zeroring_core::cvr::ClientGroupId;
use zeroring_core::group::{ConnId, Connection, Credentials, Event};
use zeroring_core::json::RawJson;
use zeroring_core::protocol::connect::{
    ConnectError, ConnectRequest, check_version, close_reason, elide, parse_path,
};
use zeroring_core::protocol::down;
use zeroring_core::protocol::error::{ErrorBody, ErrorKind};
use zeroring_core::protocol::up::{self, Upstream};
use zeroring_core::zql::hash::h64;
use zeroring_net::http::{Incoming, RequestHead};
use zeroring_net::rt::{sleep, spawn};
use zeroring_net::ws::{self, MAX_CLOSE_REASON_BYTES, Message, WsReader, WsWriter};

use super::executor::Executor;
use super::fanout::wire;
use super::groups::wall_ms;

/// How often a connection with a full backlog looks whether it may read again.
const BACKLOG_POLL: std::time::Duration = std::time::Duration::from_millis(5);

/// How long a client that broke the protocol may go on sending before it is cut off.
const DISCARD_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// Code of the close frame of a server that ends.
const CLOSE_GOING_AWAY: u16 = 1001;
/// Code of the close frame after a request that cannot be served.
const CLOSE_PROTOCOL_ERROR: u16 = 1002;
/// Code of the close frame after credentials were refused.
const CLOSE_UNAUTHORIZED: u16 = 3000;

/// The executor that owns a client group. The task id spreads groups differently on each server.
fn owner(task_id: &str, group: &str, executors: usize) -> usize {
    let hash = h64(format!("{task_id}/{group}").as_bytes()) >> 32;
    hash as usize % executors.max(1)
}

fn parse(head: &RequestHead) -> Result<ConnectRequest, ConnectError> {
    let worker = parse_path(&head.target).map(|path| path.worker);
    if worker != Some("sync") {
        return Err(ConnectError::Url(head.target.clone()));
    }
    ConnectRequest::parse(&head.target, head.joined("sec-websocket-protocol").as_deref())
}

impl Executor {
    /// Serves an upgrade request, here or on the executor that owns its client group.
    pub(super) async fn upgrade(self: Rc<Self>, incoming: Incoming) {
        if self.ctx.is_stopping() {
            return self.refuse(incoming, CLOSE_GOING_AWAY, "the server is shutting down").await;
        }
        let request = match parse(&incoming.head) {
            Ok(request) => request,
            Err(error) => {
                tracing::debug!("bad upgrade request: {error}");
                return self.refuse(incoming, CLOSE_PROTOCOL_ERROR, &close_reason(&error)).await;
            }
        };
        let to = owner(&self.config.task_id, &request.client_group_id, self.ctx.count());
        if to == self.ctx.index() {
            return self.serve(incoming, request).await;
        }
        match incoming.into_raw() {
            Ok(raw) => {
                if self.mesh.borrow_mut().try_send(to, raw).is_err() {
                    tracing::warn!(to, "too many connections on their way to an executor");
                }
            }
            Err(error) => tracing::debug!(%error, "a connection could not be handed over"),
        }
    }

    /// Completes the upgrade only to say why not: browsers hide HTTP statuses.
    async fn refuse(&self, incoming: Incoming, code: u16, reason: &str) {
        let refused = ws::upgrade_and_close(incoming, &self.config.websocket, code, reason).await;
        if let Err(error) = refused {
            tracing::debug!(%error, "the client is gone");
        }
    }

    /// Serves a client whose group lives here.
    async fn serve(self: Rc<Self>, incoming: Incoming, request: ConnectRequest) {
        let deflate = self.config.websocket.deflate.as_ref();
        let handshake = match ws::check(&incoming.head, deflate) {
            Ok(handshake) => handshake,
            Err(refusal) => {
                if let Err(error) = incoming.respond(*refusal).await {
                    tracing::debug!(%error, "the client is gone");
                }
                return;
            }
        };
        let Incoming { stream, head, rest } = incoming;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY");
        }
        let (reader, writer) = ws::accept(stream, &rest, handshake, &self.config.websocket);
        let init = request.init_connection.clone();
        match self.open(request, &head, &writer) {
            // A task of its own: it lives for hours, and what the handshake needed should not.
            Ok(conn) => drop(spawn(self.read(conn, init, reader))),
            Err((error, code)) => {
                tracing::debug!("connection refused: {error}");
                let frame = wire(&down::error(&error), false, false);
                // A socket that cannot take this is gone.
                let _ = writer.send(&frame);
                let reason = elide(error.message(), MAX_CLOSE_REASON_BYTES);
                writer.close(code.map(|code| (code, reason.as_str())));
                drain(reader).await;
            }
        }
    }

    /// Checks who wants to join what; registers the connection and greets it.
    fn open(
        &self,
        request: ConnectRequest,
        head: &RequestHead,
        writer: &WsWriter,
    ) -> Result<ConnId, (Box<ErrorBody>, Option<u16>)> {
        let unauthorized = |text: &str| {
            let error = Box::new(ErrorBody::basic(ErrorKind::Unauthorized, text));
            (error, Some(CLOSE_UNAUTHORIZED))
        };
        if request.auth_token.is_some() {
            if let Some(why) = &self.config.refuses_tokens {
                return Err((Box::new(ErrorBody::internal(why)), None));
            }
            if request.user_id.is_none() {
                return Err(unauthorized("Authenticated connections require a userID."));
            }
        }
        let protocol =
            check_version(request.protocol_version).map_err(|error| (Box::new(error), None))?;
        let group = ClientGroupId::from(request.client_group_id.as_str());
        let state = &mut *self.state.borrow_mut();
        let key = state.group_of(&group);
        state
            .may_join(key, request.user_id.as_deref())
            .map_err(|error| (error, Some(CLOSE_UNAUTHORIZED)))?;
        let conn = state.connect(key, writer.clone());
        let connected = down::connected(&request.wsid, wall_ms().floor());
        // A socket that cannot take this is gone, and its reader will say so.
        let _ = writer.send(&wire(&connected, false, false));
        let credentials = Credentials {
            user_id: request.user_id.map(Arc::from),
            token: request.auth_token.map(Arc::from),
            request_headers: Arc::new(if self.config.has_endpoint() {
                headers(head)
            } else {
                BTreeMap::new()
            }),
            ..Credentials::default()
        };
        let connection = Connection {
            conn,
            client_id: request.client_id.into(),
            ws_id: request.wsid.into(),
            protocol,
            profile_id: request.profile_id.map(Arc::from),
            base_cookie: request.base_cookie.map(Arc::from),
            credentials: Arc::new(credentials),
        };
        // Before everything that waits: a group that was about to end, since nobody was there, must
        // hear of it while it lives. What comes for one that ended is lost, and so would the client
        // be: it is told nothing more, but for the answers to its pings.
        // Behind those that came before: of two sockets of a client the later one stays.
        let others = |(_, event): &&_| matches!(event, Event::Connected(_));
        let at = state.inbox.iter().take_while(others).count();
        state.inbox.insert(at, (key, Event::Connected(Box::new(connection))));
        self.work.notify_one();
        Ok(conn)
    }

    /// Reads until the end of the socket.
    pub(super) async fn read(
        self: Rc<Self>,
        conn: ConnId,
        init: Option<RawJson>,
        mut reader: WsReader,
    ) {
        if let Some(raw) = init {
            self.message(conn, raw.as_str());
        }
        loop {
            while self.state.borrow().is_backlogged(conn) {
                // Boxed, like the other that is rare: the task has room for what it may wait for.
                Box::pin(sleep(BACKLOG_POLL)).await;
            }
            match reader.next().await {
                ws::Incoming::Message(message) => {
                    let bytes = match message {
                        Message::Text(text) => text.into_bytes(),
                        Message::Binary(bytes) => bytes,
                    };
                    match std::str::from_utf8(&bytes) {
                        Ok(text) => self.message(conn, text),
                        Err(error) => {
                            let error = ErrorBody::invalid_message(format!("SyntaxError: {error}"));
                            self.state.borrow_mut().fail(conn, &error);
                            self.work.notify_one();
                        }
                    }
                }
                ws::Incoming::Closed(how) => {
                    tracing::debug!(conn = conn.0, "closed: {how:?}");
                    self.state.borrow_mut().disconnected(conn);
                    self.work.notify_one();
                    if let ws::Closed::Violation(_) = how {
                        Box::pin(reader.discard(DISCARD_TIMEOUT)).await;
                    }
                    return;
                }
            }
        }
    }

    fn message(&self, conn: ConnId, text: &str) {
        let mut state = self.state.borrow_mut();
        match up::parse(text) {
            Ok(Upstream::Ping) => state.pong(conn),
            Ok(message) => {
                state.message(conn, message, text.len());
                self.work.notify_one();
            }
            Err(error) => {
                state.fail(conn, &error);
                self.work.notify_one();
            }
        }
    }
}

/// Reads a closing socket to its end, so that the peer gets what was sent.
async fn drain(mut reader: WsReader) {
    while let ws::Incoming::Message(_) = reader.next().await {}
}

/// Headers by name; several of one name joined.
fn headers(head: &RequestHead) -> BTreeMap<String, String> {
    let mut all: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in &head.headers {
        all.entry(name.clone())
            .and_modify(|known| {
                known.push_str(", ");
                known.push_str(value);
            })
            .or_insert_with(|| value.clone());
    }
    all
}

/// Takes connections that other executors handed over.
pub(super) async fn receive(
    executor: Rc<Executor>,
    mut mesh: zeroring_net::rt::MeshReceiver<zeroring_net::http::RawIncoming>,
) {
    while let Some(raw) = mesh.recv().await {
        match raw.into_local() {
            Ok(incoming) => {
                let executor = executor.clone();
                spawn(async move { executor.upgrade(incoming).await });
            }
            Err(error) => tracing::debug!(%error, "a connection could not be taken over"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_owned_as_the_spec_routes_them() {
        // spec: view-syncer-cvr, checklist 6
        assert_eq!(owner("task-1", "cg1", usize::MAX), 2_387_214_790);
        assert!(owner("t", "g", 3) < 3);
        assert_eq!(owner("t", "g", 0), 0);
    }

    #[test]
    fn headers_of_one_name_are_joined() {
        let head = RequestHead {
            headers: vec![
                ("a".into(), "1".into()),
                ("b".into(), "x".into()),
                ("a".into(), "2".into()),
            ],
            ..RequestHead::default()
        };
        let all = headers(&head);
        assert_eq!(all["a"], "1, 2");
        assert_eq!(all["b"], "x");
    }

    #[test]
    fn only_the_sync_worker_is_served() {
        let head = |target: &str| RequestHead { target: target.into(), ..RequestHead::default() };
        for bad in ["/replication/v6/changes?x=1", "/a/b/sync/v51/connect", "/sync/v51/connect/"] {
            assert!(matches!(parse(&head(bad)), Err(ConnectError::Url(_))), "{bad}");
        }
    }
}
