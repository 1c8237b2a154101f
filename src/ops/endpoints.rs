//! Requests that are no WebSocket upgrades (spec: operations §3.1–3.3).

use std::sync::Arc;
use std::time::Instant;

use super::admin::AdminRule;
use super::heartbeat::Heartbeat;
use super::statz::{self, StatzSources};

/// What the endpoints need to know; one for the process.
#[derive(Debug, Default)]
pub struct OpsState {
    /// Who may see `/statz`.
    pub admin: AdminRule,
    /// Fed by `/keepalive`.
    pub heartbeat: Arc<Heartbeat>,
    /// What `/statz` shows.
    pub statz: StatzSources,
}

/// The parts of a request that the endpoints look at.
#[derive(Debug, Clone, Copy)]
pub struct OpsRequest<'a> {
    /// `GET`, `HEAD`, …
    pub method: &'a str,
    /// Path and query as received.
    pub target: &'a str,
    /// The `Authorization` header.
    pub authorization: Option<&'a str>,
    /// When the request was read from the socket.
    pub arrived: Instant,
}

/// A response. For HEAD the server sends the head alone, with the length of `body`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpsResponse {
    /// Status code.
    pub status: u16,
    /// `Content-Type`.
    pub content_type: &'static str,
    /// `WWW-Authenticate`, if any.
    pub authenticate: Option<&'static str>,
    /// Body.
    pub body: Vec<u8>,
}

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json; charset=utf-8";

/// Answers a request.
pub fn respond(request: &OpsRequest<'_>, state: &OpsState) -> OpsResponse {
    let (path, query) = request.target.split_once('?').unwrap_or((request.target, ""));
    match (request.method, path) {
        ("GET" | "HEAD", "/") => plain(200, "OK"),
        ("GET" | "HEAD", "/keepalive") => {
            if state.heartbeat.beat(request.arrived) {
                tracing::info!("first /keepalive");
            }
            plain(200, "OK")
        }
        ("GET" | "HEAD", "/statz") if !state.admin.allows_basic(request.authorization) => {
            OpsResponse {
                authenticate: Some("Basic realm=\"Statz Protected Area\""),
                ..plain(401, "Unauthorized")
            }
        }
        ("GET" | "HEAD", "/statz") => {
            let asked = statz::Asked::parse(query);
            let body = statz::render(&state.statz, &asked).into_bytes();
            let content_type = if asked.json { JSON } else { TEXT };
            OpsResponse { status: 200, content_type, authenticate: None, body }
        }
        _ => not_found(request),
    }
}

fn plain(status: u16, text: &str) -> OpsResponse {
    OpsResponse { status, content_type: TEXT, authenticate: None, body: text.as_bytes().to_vec() }
}

fn not_found(request: &OpsRequest<'_>) -> OpsResponse {
    #[derive(serde::Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Body {
        message: String,
        error: &'static str,
        status_code: u16,
    }
    let message = format!("Route {}:{} not found", request.method, request.target);
    let body = Body { message, error: "Not Found", status_code: 404 };
    let body = serde_json::to_vec(&body).unwrap_or_default();
    OpsResponse { status: 404, content_type: JSON, authenticate: None, body }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Registry;

    fn request<'a>(method: &'a str, target: &'a str) -> OpsRequest<'a> {
        OpsRequest { method, target, authorization: None, arrived: Instant::now() }
    }

    #[test]
    fn health_is_two_letters_of_text() {
        let state = OpsState::default();
        for (method, target) in
            [("GET", "/"), ("HEAD", "/"), ("GET", "/keepalive"), ("GET", "/?x=1")]
        {
            let response = respond(&request(method, target), &state);
            assert_eq!(response, plain(200, "OK"), "{method} {target}");
        }
        assert!(state.heartbeat.silence(Instant::now()).is_some());
    }

    #[test]
    fn anything_else_is_the_originals_404() {
        let state = OpsState::default();
        for (method, target) in [
            ("GET", "/nope?a=\"b\""),
            ("GET", "/keepalive/"),
            ("GET", "/Keepalive"),
            ("OPTIONS", "/"),
            ("POST", "/keepalive"),
            ("GET", "/heapz"),
        ] {
            let response = respond(&request(method, target), &state);
            assert_eq!((response.status, response.content_type), (404, JSON), "{method} {target}");
            let body = String::from_utf8(response.body).unwrap();
            let escaped = target.replace('"', "\\\"");
            assert_eq!(
                body,
                format!(
                    "{{\"message\":\"Route {method}:{escaped} not found\",\"error\":\"Not Found\",\"statusCode\":404}}"
                )
            );
        }
        assert!(state.heartbeat.silence(Instant::now()).is_none());
    }

    #[test]
    fn statz_needs_the_password() {
        let mut state = OpsState::default();
        let refused = respond(&request("GET", "/statz"), &state);
        assert_eq!((refused.status, refused.body.as_slice()), (401, b"Unauthorized".as_slice()));
        assert_eq!(refused.authenticate, Some("Basic realm=\"Statz Protected Area\""));

        let options = crate::options::Surroundings {
            node_env: Some("development".into()),
            cores: 2,
            ..Default::default()
        };
        let env = [("ZERO_UPSTREAM_DB".to_owned(), "postgres://h/d".to_owned())].into();
        let Ok(crate::options::Parsed::Settings(settings)) =
            crate::options::parse::parse(&[], &env)
        else {
            panic!()
        };
        let loaded = crate::options::Options::load(&settings, &options).unwrap();
        state.admin = AdminRule::new(&loaded.options);
        state.statz.registry = Registry::new(1);
        let allowed = respond(&request("GET", "/statz?group=sync,bogus&format=json"), &state);
        assert_eq!((allowed.status, allowed.content_type), (200, JSON));
        let json: serde_json::Value = serde_json::from_slice(&allowed.body).unwrap();
        assert_eq!(json.as_object().unwrap().keys().collect::<Vec<_>>(), ["sync"]);
        let text = respond(&request("GET", "/statz"), &state);
        assert_eq!(text.content_type, TEXT);
        assert!(text.body.starts_with(b"\n=== server ===\n\nversion: \""));
    }
}
