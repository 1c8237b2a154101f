//! The client of the application's API (queries, mutations, JWKS).
//!
//! ```text
//!  executor: LocalApiClient ── bounded queue ──▶ side thread (tokio, hyper, rustls, one pool)
//!                 ▲                                   │
//!                 └──────── reply ring of the port ◀──┘
//! ```
//!
//! Every request gets exactly one reply, also when it is cancelled (by dropping its future) or
//! runs out of time; a port allows as many requests in flight as its reply ring holds, so the side
//! thread never meets a full ring. Redirects are not followed, compressed answers are not asked
//! for, and a status is an answer, not an error.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::header::{HeaderName, HeaderValue};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::sync::{mpsc, oneshot};

use crate::rt::local;
use crate::rt::ring::{self, Consumer, Producer};
use crate::rt::spawn;
use crate::tls::{self, TlsError};

/// Commands that may wait for the side thread.
const MAX_QUEUED_COMMANDS: usize = 8192;

/// How the client works.
#[derive(Debug, Clone)]
pub struct ApiClientConfig {
    /// For the TCP connection; the deadline of a request covers everything.
    pub connect_timeout: Duration,
    /// Requests in flight per port (executor).
    pub max_in_flight: usize,
    /// Largest body of an answer.
    pub max_body_bytes: usize,
    /// How long an unused connection is kept.
    pub idle_timeout: Duration,
    /// Trusted certificates besides the system's and the built-in ones (PEM).
    pub ca_file: Option<PathBuf>,
}

impl Default for ApiClientConfig {
    fn default() -> Self {
        ApiClientConfig {
            connect_timeout: Duration::from_secs(10),
            max_in_flight: 1024,
            max_body_bytes: 64 * 1024 * 1024,
            idle_timeout: Duration::from_secs(60),
            ca_file: None,
        }
    }
}

/// A request.
#[derive(Debug, Clone)]
pub struct ApiRequest {
    /// `POST`, `GET`, …
    pub method: String,
    /// Absolute, `http` or `https`.
    pub url: String,
    /// As given; `Host` and `Content-Length` are added. Characters up to U+00FF are sent as one
    /// byte (the form that [`super::RequestHead`] has), others as UTF-8.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Bytes,
    /// From the request to the last byte of the answer.
    pub deadline: Duration,
}

/// An answer, of any status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiResponse {
    /// The status code.
    pub status: u16,
    /// Names in lower case, values one `char` per byte.
    pub headers: Vec<(String, String)>,
    /// The whole body.
    pub body: Bytes,
}

impl ApiResponse {
    /// The first header of that (lower-case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The deadline passed.
    #[error("no answer from {url} within {deadline:?}")]
    Timeout {
        /// Whom was asked.
        url: String,
        /// How long it was waited for.
        deadline: Duration,
    },
    /// The server cannot be reached: name, TCP or TLS.
    #[error("cannot connect to {url}: {cause}")]
    Connect {
        /// Whom was asked.
        url: String,
        /// What failed.
        cause: String,
    },
    /// The connection failed after it was established.
    #[error("request to {url} failed: {cause}")]
    Transport {
        /// Whom was asked.
        url: String,
        /// What failed.
        cause: String,
    },
    /// The answer is larger than allowed.
    #[error("the answer from {url} exceeds {max} bytes")]
    BodyTooLarge {
        /// Whom was asked.
        url: String,
        /// The limit.
        max: usize,
    },
    /// The request itself is malformed (URL, method, header).
    #[error("request to {url:?} cannot be sent: {cause}")]
    BadRequest {
        /// Whom was asked.
        url: String,
        /// What is wrong.
        cause: String,
    },
    /// Too many requests are in flight or queued.
    #[error("too many API requests in flight")]
    Overloaded,
    /// The client has stopped.
    #[error("the API client has stopped")]
    Stopped,
    /// The future was dropped; nobody sees this.
    #[error("the request was cancelled")]
    Cancelled,
}

/// Why the client did not start.
#[derive(Debug, thiserror::Error)]
pub enum ApiStartError {
    /// The TLS configuration.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The side thread or its runtime.
    #[error("the API client's thread cannot start: {0}")]
    Thread(#[from] io::Error),
}

type Answer = Result<ApiResponse, ApiError>;
type Reply = (u64, Answer);
type Waiting = Rc<RefCell<HashMap<u64, local::OneshotSender<Answer>>>>;

enum Command {
    Attach { port: u64, replies: Producer<Reply> },
    Request { port: u64, id: u64, request: ApiRequest },
    Cancel { port: u64, id: u64 },
    Detach { port: u64 },
}

/// The client: start one per process, before executors are pinned. The side thread ends when this
/// and all ports are dropped.
#[derive(Clone)]
pub struct ApiClient {
    commands: mpsc::Sender<Command>,
    next_port: Arc<AtomicU64>,
    max_in_flight: usize,
}

impl ApiClient {
    /// Starts the side thread.
    ///
    /// # Errors
    /// The CA file is unusable, or the thread cannot start.
    pub fn start(config: ApiClientConfig) -> Result<ApiClient, ApiStartError> {
        let tls = rustls::ClientConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::from)?
            .with_root_certificates(tls::roots(config.ca_file.as_deref())?)
            .with_no_client_auth();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(8)
            .thread_name("zr-resolver")
            .build()?;
        let (commands, queue) = mpsc::channel(MAX_QUEUED_COMMANDS);
        let max_in_flight = config.max_in_flight.max(1);
        std::thread::Builder::new().name("zr-api-client".to_owned()).spawn(move || {
            let side = Rc::new(Side::new(&config, tls));
            tokio::task::LocalSet::new().block_on(&runtime, side.run(queue));
            // A resolver that hangs must not keep the thread.
            runtime.shutdown_background();
        })?;
        Ok(ApiClient { commands, next_port: Arc::default(), max_in_flight })
    }

    /// A port for one executor; to be bound there with [`ApiPort::into_local`].
    ///
    /// # Errors
    /// No file descriptor is left for its doorbell.
    pub fn port(&self) -> io::Result<ApiPort> {
        let (replies, consumer) = ring::channel(self.max_in_flight)?;
        Ok(ApiPort {
            port: self.next_port.fetch_add(1, Ordering::Relaxed),
            commands: self.commands.clone(),
            replies,
            consumer,
            max_in_flight: self.max_in_flight,
        })
    }
}

/// A port on its way to its executor.
pub struct ApiPort {
    port: u64,
    commands: mpsc::Sender<Command>,
    replies: Producer<Reply>,
    consumer: Consumer<Reply>,
    max_in_flight: usize,
}

impl ApiPort {
    /// Binds the port to the executor that runs on this thread.
    ///
    /// # Errors
    /// The thread runs no executor, or the client has stopped.
    pub fn into_local(self) -> io::Result<LocalApiClient> {
        let mut consumer = self.consumer.into_local()?;
        let attach = Command::Attach { port: self.port, replies: self.replies };
        self.commands
            .try_send(attach)
            .map_err(|_| io::Error::other("the API client has stopped or is overloaded"))?;
        let waiting = Waiting::default();
        let in_flight = Rc::new(Cell::new(0));
        let (map, count) = (waiting.clone(), in_flight.clone());
        spawn(async move {
            while let Some((id, result)) = consumer.recv().await {
                count.set(count.get() - 1);
                let waiter = map.borrow_mut().remove(&id);
                if let Some(waiter) = waiter {
                    // The asker may have dropped its future in this very tick.
                    let _ = waiter.send(result);
                }
            }
            // The side thread is gone: dropping the senders tells everybody who waits.
            let orphans = std::mem::take(&mut *map.borrow_mut());
            drop(orphans);
        });
        Ok(LocalApiClient(Rc::new(Port {
            port: self.port,
            commands: self.commands,
            waiting,
            in_flight,
            next_id: Cell::new(0),
            max_in_flight: self.max_in_flight,
        })))
    }
}

struct Port {
    port: u64,
    commands: mpsc::Sender<Command>,
    waiting: Waiting,
    in_flight: Rc<Cell<usize>>,
    next_id: Cell<u64>,
    max_in_flight: usize,
}

impl Drop for Port {
    fn drop(&mut self) {
        // If the queue is full the side thread keeps an idle ring until it ends.
        let _ = self.commands.try_send(Command::Detach { port: self.port });
    }
}

/// The client as an executor uses it; cheap to clone.
#[derive(Clone)]
pub struct LocalApiClient(Rc<Port>);

impl LocalApiClient {
    /// Sends a request and waits for its answer. Dropping the future cancels the request.
    ///
    /// # Errors
    /// There is no answer; see [`ApiError`].
    pub async fn request(&self, request: ApiRequest) -> Result<ApiResponse, ApiError> {
        let port = &*self.0;
        if port.in_flight.get() >= port.max_in_flight {
            return Err(ApiError::Overloaded);
        }
        let id = port.next_id.get();
        port.next_id.set(id + 1);
        let (sender, receiver) = local::oneshot();
        match port.commands.try_send(Command::Request { port: port.port, id, request }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Err(ApiError::Overloaded),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(ApiError::Stopped),
        }
        port.in_flight.set(port.in_flight.get() + 1);
        port.waiting.borrow_mut().insert(id, sender);
        let _guard = CancelOnDrop { port, id };
        receiver.await.unwrap_or(Err(ApiError::Stopped))
    }

    /// Requests without a reply so far, cancelled ones included.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight.get()
    }
}

struct CancelOnDrop<'a> {
    port: &'a Port,
    id: u64,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        let unanswered = self.port.waiting.borrow_mut().remove(&self.id).is_some();
        if unanswered {
            // If the queue is full the deadline ends the request.
            let _ =
                self.port.commands.try_send(Command::Cancel { port: self.port.port, id: self.id });
        }
    }
}

// ---- the side thread -------------------------------------------------------------------------

type Http = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

struct Side {
    http: Http,
    max_body: usize,
    ports: RefCell<HashMap<u64, Rc<RefCell<Producer<Reply>>>>>,
    cancels: RefCell<HashMap<(u64, u64), oneshot::Sender<()>>>,
}

impl Side {
    fn new(config: &ApiClientConfig, tls: rustls::ClientConfig) -> Side {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(config.connect_timeout));
        connector.set_nodelay(true);
        connector.enforce_http(false);
        // HTTP/1.1 as the original: nobody's API server has to meet something new.
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let http = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(config.idle_timeout)
            .pool_timer(TokioTimer::new())
            .build(connector);
        Side {
            http,
            max_body: config.max_body_bytes,
            ports: RefCell::default(),
            cancels: RefCell::default(),
        }
    }

    async fn run(self: Rc<Self>, mut queue: mpsc::Receiver<Command>) {
        while let Some(command) = queue.recv().await {
            match command {
                Command::Attach { port, replies } => {
                    self.ports.borrow_mut().insert(port, Rc::new(RefCell::new(replies)));
                }
                Command::Detach { port } => {
                    self.ports.borrow_mut().remove(&port);
                    self.cancels.borrow_mut().retain(|(p, _), _| *p != port);
                }
                Command::Cancel { port, id } => {
                    // Dropping the sender ends the request.
                    self.cancels.borrow_mut().remove(&(port, id));
                }
                Command::Request { port, id, request } => {
                    let Some(replies) = self.ports.borrow().get(&port).cloned() else { continue };
                    let (cancel, cancelled) = oneshot::channel();
                    self.cancels.borrow_mut().insert((port, id), cancel);
                    let side = self.clone();
                    tokio::task::spawn_local(async move {
                        let result = side.answer(request, cancelled).await;
                        side.cancels.borrow_mut().remove(&(port, id));
                        if replies.borrow_mut().try_push((id, result)).is_err() {
                            tracing::error!(port, id, "reply ring of an API port is full");
                        }
                    });
                }
            }
        }
    }

    async fn answer(
        &self,
        request: ApiRequest,
        cancelled: oneshot::Receiver<()>,
    ) -> Result<ApiResponse, ApiError> {
        let url = request.url.clone();
        let deadline = request.deadline;
        tokio::select! {
            result = tokio::time::timeout(deadline, self.perform(request)) => {
                result.unwrap_or(Err(ApiError::Timeout { url, deadline }))
            }
            _ = cancelled => Err(ApiError::Cancelled),
        }
    }

    async fn perform(&self, request: ApiRequest) -> Result<ApiResponse, ApiError> {
        let url = request.url.clone();
        let request = build(request)?;
        let response = self.http.request(request).await.map_err(|error| {
            let (url, cause) = (url.clone(), with_sources(&error));
            if error.is_connect() {
                ApiError::Connect { url, cause }
            } else {
                ApiError::Transport { url, cause }
            }
        })?;
        let status = response.status().as_u16();
        let headers = response
            .headers()
            .iter()
            .map(|(name, value)| {
                let value = value.as_bytes().iter().map(|&b| char::from(b)).collect();
                (name.as_str().to_owned(), value)
            })
            .collect();
        let body = Limited::new(response.into_body(), self.max_body).collect().await;
        let body = body.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => ApiError::BodyTooLarge { url: url.clone(), max: self.max_body },
            None => ApiError::Transport { url: url.clone(), cause: with_sources(error.as_ref()) },
        })?;
        Ok(ApiResponse { status, headers, body: body.to_bytes() })
    }
}

fn build(request: ApiRequest) -> Result<hyper::Request<Full<Bytes>>, ApiError> {
    let ApiRequest { method, url, headers, body, .. } = request;
    let bad = |cause: String| ApiError::BadRequest { url: url.clone(), cause };
    let mut builder = hyper::Request::builder().method(method.as_str()).uri(url.as_str());
    for (name, value) in headers {
        let mut bytes = Vec::with_capacity(value.len());
        super::header_bytes(&value, &mut bytes);
        let header = HeaderName::from_bytes(name.as_bytes())
            .map_err(|e| bad(format!("header name {name:?}: {e}")))?;
        let value = HeaderValue::from_bytes(&bytes)
            .map_err(|e| bad(format!("value of header {name:?}: {e}")))?;
        builder = builder.header(header, value);
    }
    let request = builder.body(Full::new(body)).map_err(|e| bad(e.to_string()))?;
    match (request.uri().scheme_str(), request.uri().host()) {
        (Some("http" | "https"), Some(host)) if !host.is_empty() => Ok(request),
        _ => Err(bad("it is not an absolute http or https URL".to_owned())),
    }
}

/// An error with what caused it, in one line.
fn with_sources(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
