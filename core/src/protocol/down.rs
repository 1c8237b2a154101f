//! Messages to clients, pokes aside (spec: sync-protocol §3.3). Each function returns or appends
//! the text of one WebSocket message.

use serde::Serialize;

use super::custom_query::ErroredQuery;
use super::error::ErrorBody;
use crate::json::{RawJson, write};

/// The answer to `ping`, and the sign of life of a quiet server.
pub const PONG: &[u8] = br#"["pong",{}]"#;

/// `connected`: the first message. `timestamp_ms` is the server's time since the Unix epoch.
pub fn connected(wsid: &str, timestamp_ms: f64) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + wsid.len());
    out.extend_from_slice(br#"["connected",{"wsid":"#);
    write::string(&mut out, wsid);
    out.extend_from_slice(br#","timestamp":"#);
    write::number(&mut out, timestamp_ms);
    out.extend_from_slice(b"}]");
    out
}

/// `error`.
pub fn error(body: &ErrorBody) -> Vec<u8> {
    message("error", body)
}

/// `transformError`: queries that failed alone.
pub fn transform_error(errors: &[ErroredQuery]) -> Vec<u8> {
    message("transformError", errors)
}

/// `deleteClients`: these clients are forgotten. Without any, the body is empty.
pub fn delete_clients(client_ids: &[String]) -> Vec<u8> {
    #[derive(Serialize)]
    struct Body<'a> {
        #[serde(rename = "clientIDs", skip_serializing_if = "<[String]>::is_empty")]
        client_ids: &'a [String],
    }
    message("deleteClients", &Body { client_ids })
}

/// `inspect`: the answer to a request of an inspector.
pub fn inspect(op: &str, id: &str, value: &RawJson) -> Vec<u8> {
    #[derive(Serialize)]
    struct Body<'a> {
        op: &'a str,
        id: &'a str,
        value: &'a RawJson,
    }
    message("inspect", &Body { op, id, value })
}

/// `[kind, body]`.
fn message<T: Serialize + ?Sized>(kind: &str, body: &T) -> Vec<u8> {
    // Only maps with keys that are no strings fail, and no body has one.
    serde_json::to_vec(&(kind, body)).unwrap_or_else(|e| {
        debug_assert!(false, "{kind}: {e}");
        Vec::new()
    })
}
