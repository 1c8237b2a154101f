//! Error bodies (spec: sync-protocol §3.3 `error`).
//!
//! Every body carries `origin`; without it clients take any error for an internal one. Beware of
//! [`ErrorKind::Internal`]: it is terminal for clients. Whatever may pass by itself is a plain
//! close or a [`BackoffKind`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::json::RawJson;

/// Id of a mutation: the client that made it, and its number there (1, 2, 3, …).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MutationId {
    /// Number of the mutation.
    #[serde(deserialize_with = "super::up::integer")]
    pub id: i64,
    /// The client.
    #[serde(rename = "clientID")]
    pub client_id: String,
}

/// Who is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Origin {
    /// The app's endpoint.
    Server,
    /// This server.
    ZeroCache,
}

/// Kinds without further fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are the wire's; the table of sync-protocol §3.3 explains them
pub enum ErrorKind {
    AuthInvalidated,
    ClientNotFound,
    InvalidConnectionRequest,
    InvalidConnectionRequestBaseCookie,
    InvalidConnectionRequestLastMutationID,
    InvalidConnectionRequestClientDeleted,
    InvalidMessage,
    InvalidPush,
    MutationFailed,
    MutationRateLimited,
    Unauthorized,
    VersionNotSupported,
    SchemaVersionNotSupported,
    Internal,
}

impl ErrorKind {
    /// True if the server closes the socket after sending it.
    pub fn closes_socket(self) -> bool {
        !matches!(self, ErrorKind::MutationFailed | ErrorKind::MutationRateLimited)
    }
}

/// Kinds after which a client reconnects by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum BackoffKind {
    Rebalance,
    Rehome,
    ServerOverloaded,
}

/// `reason` of a failure that the app's endpoint reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs)]
pub enum ServerReason {
    Database,
    Parse,
    OooMutation,
    UnsupportedPushVersion,
    Internal,
}

/// `reason` of a failure on our side of a call to the app's endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs)]
pub enum CallReason {
    Timeout,
    Parse,
    Internal,
}

/// Why a call to the app's endpoint failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FailureCause {
    /// The endpoint said so.
    Server(ServerReason),
    /// The endpoint answered with a status other than 2xx.
    Http {
        /// HTTP status.
        status: u16,
        /// The start of the body (512 characters, then `...`).
        body_preview: Option<String>,
    },
    /// The call did not work out.
    Call(CallReason),
}

/// A failed call to the app's endpoint: what `PushFailed` and `TransformFailed` share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiFailure {
    /// Why.
    pub cause: FailureCause,
    /// Text for the developer.
    pub message: String,
    /// Whatever the endpoint added.
    pub details: Option<RawJson>,
}

impl ApiFailure {
    /// A failure of the call itself.
    pub fn call(reason: CallReason, message: impl Into<String>) -> ApiFailure {
        ApiFailure { cause: FailureCause::Call(reason), message: message.into(), details: None }
    }

    /// An HTTP status other than 2xx.
    pub fn http(status: u16, body_preview: Option<String>, message: impl Into<String>) -> Self {
        let cause = FailureCause::Http { status, body_preview };
        ApiFailure { cause, message: message.into(), details: None }
    }

    /// The status if the endpoint refused the credentials (401, 403).
    pub fn auth_status(&self) -> Option<u16> {
        match self.cause {
            FailureCause::Http { status: status @ (401 | 403), .. } => Some(status),
            _ => None,
        }
    }
}

/// The body of an `error` message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ErrorBody {
    /// A kind and a text.
    Basic {
        /// Kind.
        kind: ErrorKind,
        /// Text for the developer.
        message: String,
        /// Who is to blame.
        origin: Origin,
    },
    /// Come back later, or somewhere else.
    Backoff {
        /// Kind.
        kind: BackoffKind,
        /// Text for the developer.
        message: String,
        /// Least wait before reconnecting, milliseconds.
        min_backoff_ms: Option<u64>,
        /// Longest wait before reconnecting, milliseconds; 0 is at once.
        max_backoff_ms: Option<u64>,
        /// Parameters that the client adds to the URL of its next attempt.
        reconnect_params: BTreeMap<String, String>,
    },
    /// A call to the mutate endpoint failed.
    PushFailed {
        /// Why.
        failure: ApiFailure,
        /// The mutations that were not processed.
        mutation_ids: Vec<MutationId>,
    },
    /// A call to the query endpoint failed.
    TransformFailed {
        /// Why.
        failure: ApiFailure,
        /// The queries of the call.
        query_ids: Vec<String>,
    },
}

impl ErrorBody {
    /// An error of ours of a basic kind.
    pub fn basic(kind: ErrorKind, message: impl Into<String>) -> ErrorBody {
        ErrorBody::Basic { kind, message: message.into(), origin: Origin::ZeroCache }
    }

    /// `Internal`. Terminal for the client: only for what cannot pass by itself.
    pub fn internal(message: impl Into<String>) -> ErrorBody {
        ErrorBody::basic(ErrorKind::Internal, message)
    }

    /// `InvalidMessage`.
    pub fn invalid_message(message: impl Into<String>) -> ErrorBody {
        ErrorBody::basic(ErrorKind::InvalidMessage, message)
    }

    /// `Rehome` without hints: the client reconnects after its usual wait.
    pub fn rehome(message: impl Into<String>) -> ErrorBody {
        ErrorBody::backoff(BackoffKind::Rehome, message, None)
    }

    /// `Rehome`, reconnecting at once.
    pub fn rehome_now(message: impl Into<String>) -> ErrorBody {
        ErrorBody::backoff(BackoffKind::Rehome, message, Some(0))
    }

    /// A back-off error.
    pub fn backoff(
        kind: BackoffKind,
        message: impl Into<String>,
        max_backoff_ms: Option<u64>,
    ) -> ErrorBody {
        ErrorBody::Backoff {
            kind,
            message: message.into(),
            min_backoff_ms: None,
            max_backoff_ms,
            reconnect_params: BTreeMap::new(),
        }
    }

    /// The text.
    pub fn message(&self) -> &str {
        match self {
            ErrorBody::Basic { message, .. } | ErrorBody::Backoff { message, .. } => message,
            ErrorBody::PushFailed { failure, .. } | ErrorBody::TransformFailed { failure, .. } => {
                &failure.message
            }
        }
    }

    /// The kind as on the wire.
    pub fn kind_name(&self) -> &'static str {
        match self {
            ErrorBody::Basic { kind, .. } => kind_name(*kind),
            ErrorBody::Backoff { kind: BackoffKind::Rebalance, .. } => "Rebalance",
            ErrorBody::Backoff { kind: BackoffKind::Rehome, .. } => "Rehome",
            ErrorBody::Backoff { kind: BackoffKind::ServerOverloaded, .. } => "ServerOverloaded",
            ErrorBody::PushFailed { .. } => "PushFailed",
            ErrorBody::TransformFailed { .. } => "TransformFailed",
        }
    }

    /// True if the server closes the socket after sending it.
    pub fn closes_socket(&self) -> bool {
        match self {
            ErrorBody::Basic { kind, .. } => kind.closes_socket(),
            _ => true,
        }
    }
}

fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::AuthInvalidated => "AuthInvalidated",
        ErrorKind::ClientNotFound => "ClientNotFound",
        ErrorKind::InvalidConnectionRequest => "InvalidConnectionRequest",
        ErrorKind::InvalidConnectionRequestBaseCookie => "InvalidConnectionRequestBaseCookie",
        ErrorKind::InvalidConnectionRequestLastMutationID => {
            "InvalidConnectionRequestLastMutationID"
        }
        ErrorKind::InvalidConnectionRequestClientDeleted => "InvalidConnectionRequestClientDeleted",
        ErrorKind::InvalidMessage => "InvalidMessage",
        ErrorKind::InvalidPush => "InvalidPush",
        ErrorKind::MutationFailed => "MutationFailed",
        ErrorKind::MutationRateLimited => "MutationRateLimited",
        ErrorKind::Unauthorized => "Unauthorized",
        ErrorKind::VersionNotSupported => "VersionNotSupported",
        ErrorKind::SchemaVersionNotSupported => "SchemaVersionNotSupported",
        ErrorKind::Internal => "Internal",
    }
}

impl std::fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.kind_name(), self.message())
    }
}

impl std::error::Error for ErrorBody {}

/// All fields that any family has, in the order they are written.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Wire<'a> {
    kind: &'static str,
    message: &'a str,
    origin: Origin,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body_preview: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<&'a RawJson>,
    #[serde(skip_serializing_if = "Option::is_none", rename = "mutationIDs")]
    mutation_ids: Option<&'a [MutationId]>,
    #[serde(skip_serializing_if = "Option::is_none", rename = "queryIDs")]
    query_ids: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_backoff_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_backoff_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reconnect_params: Option<&'a BTreeMap<String, String>>,
}

impl Serialize for ErrorBody {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut wire = Wire {
            kind: self.kind_name(),
            message: self.message(),
            origin: Origin::ZeroCache,
            reason: None,
            status: None,
            body_preview: None,
            details: None,
            mutation_ids: None,
            query_ids: None,
            min_backoff_ms: None,
            max_backoff_ms: None,
            reconnect_params: None,
        };
        match self {
            ErrorBody::Basic { origin, .. } => wire.origin = *origin,
            ErrorBody::Backoff { min_backoff_ms, max_backoff_ms, reconnect_params, .. } => {
                wire.min_backoff_ms = *min_backoff_ms;
                wire.max_backoff_ms = *max_backoff_ms;
                wire.reconnect_params = (!reconnect_params.is_empty()).then_some(reconnect_params);
            }
            ErrorBody::PushFailed { failure, mutation_ids } => {
                wire.mutation_ids = Some(mutation_ids);
                wire.add_failure(failure);
            }
            ErrorBody::TransformFailed { failure, query_ids } => {
                wire.query_ids = Some(query_ids);
                wire.add_failure(failure);
            }
        }
        wire.serialize(serializer)
    }
}

impl<'a> Wire<'a> {
    fn add_failure(&mut self, failure: &'a ApiFailure) {
        self.details = failure.details.as_ref();
        match &failure.cause {
            FailureCause::Server(reason) => {
                self.origin = Origin::Server;
                self.reason = Some(match reason {
                    ServerReason::Database => "database",
                    ServerReason::Parse => "parse",
                    ServerReason::OooMutation => "oooMutation",
                    ServerReason::UnsupportedPushVersion => "unsupportedPushVersion",
                    ServerReason::Internal => "internal",
                });
            }
            FailureCause::Http { status, body_preview } => {
                self.reason = Some("http");
                self.status = Some(*status);
                self.body_preview = body_preview.as_deref();
            }
            FailureCause::Call(reason) => {
                self.reason = Some(match reason {
                    CallReason::Timeout => "timeout",
                    CallReason::Parse => "parse",
                    CallReason::Internal => "internal",
                });
            }
        }
    }
}

/// The fields of a failure that the app's endpoint may report, with any origin.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ReportedFailure {
    message: String,
    origin: Origin,
    reason: String,
    status: Option<u16>,
    body_preview: Option<String>,
    details: Option<RawJson>,
    #[serde(default, rename = "queryIDs")]
    pub(super) query_ids: Option<Vec<String>>,
    #[serde(default, rename = "mutationIDs")]
    pub(super) mutation_ids: Option<Vec<MutationId>>,
}

impl ReportedFailure {
    /// The failure, or the name of what is wrong with the report.
    pub(super) fn failure(&self) -> Result<ApiFailure, String> {
        let unknown = || format!("unknown reason {:?} of a failure", self.reason);
        let cause = match (self.origin, self.reason.as_str()) {
            (Origin::Server, "database") => FailureCause::Server(ServerReason::Database),
            (Origin::Server, "parse") => FailureCause::Server(ServerReason::Parse),
            (Origin::Server, "oooMutation") => FailureCause::Server(ServerReason::OooMutation),
            (Origin::Server, "unsupportedPushVersion") => {
                FailureCause::Server(ServerReason::UnsupportedPushVersion)
            }
            (Origin::Server, "internal") => FailureCause::Server(ServerReason::Internal),
            (Origin::ZeroCache, "http") => FailureCause::Http {
                status: self.status.ok_or("missing field `status` of an http failure")?,
                body_preview: self.body_preview.clone(),
            },
            (Origin::ZeroCache, "timeout") => FailureCause::Call(CallReason::Timeout),
            (Origin::ZeroCache, "parse") => FailureCause::Call(CallReason::Parse),
            (Origin::ZeroCache, "internal") => FailureCause::Call(CallReason::Internal),
            _ => return Err(unknown()),
        };
        Ok(ApiFailure { cause, message: self.message.clone(), details: self.details.clone() })
    }
}
