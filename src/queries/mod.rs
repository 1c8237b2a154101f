//! Named queries: what they mean is asked of the app's query endpoint
//! (spec: sync-protocol §7.5, §8).
//!
//! Credentials of a connection and a list of queries go in; what the endpoint says about each comes
//! out, or why there is no answer. One call is a POST, tried again after network failures and
//! 5xx answers. Which URLs may be asked at all is an allow list of URLPatterns, checked when the
//! server starts. Results are cached by the client groups, per credentials, never here.

mod endpoint;

use std::time::Duration;

use zeroring_core::group::Credentials;
use zeroring_core::protocol::custom_query::{
    TransformRequest, TransformResponse, parse_response, request_body,
};
use zeroring_core::protocol::error::{ApiFailure, CallReason};
use zeroring_net::http::client::{ApiRequest, LocalApiClient};
use zeroring_net::rt::sleep;

pub use endpoint::{EndpointError, QueryEndpoint};

/// Calls at most for one request.
const MAX_ATTEMPTS: u32 = 4;
/// Longest wait for an answer, as the original's HTTP stack.
const CALL_TIMEOUT: Duration = Duration::from_secs(300);
/// Characters of a refusal that the client is shown.
const PREVIEW_CHARS: usize = 512;

/// Asks the endpoint. Without queries, only the credentials are validated.
///
/// # Errors
/// What the clients are told as `TransformFailed`.
pub async fn transform(
    endpoint: &QueryEndpoint,
    client: &LocalApiClient,
    credentials: &Credentials,
    queries: &[TransformRequest],
) -> Result<TransformResponse, ApiFailure> {
    let verb = if queries.is_empty() { "validate" } else { "transform" };
    let internal = |text: String| {
        ApiFailure::call(CallReason::Internal, format!("Failed to {verb} queries: {text}"))
    };
    let url = endpoint.target(credentials, verb)?;
    let headers = endpoint.headers(credentials);
    let body = request_body(queries).map_err(|e| internal(e.to_string()))?;
    let request = ApiRequest {
        method: "POST".to_owned(),
        url,
        headers,
        body: body.into(),
        deadline: CALL_TIMEOUT,
    };
    let mut attempt = 1;
    loop {
        let failure = match client.request(request.clone()).await {
            Ok(answer) if (200..300).contains(&answer.status) => {
                return parse_response(&answer.body).map_err(|why| {
                    let text = format!("Failed to parse response from API server: {why}");
                    ApiFailure::call(CallReason::Parse, text)
                });
            }
            Ok(answer) => {
                let text =
                    format!("Fetch from API server returned non-OK status {}", answer.status);
                let failure = ApiFailure::http(answer.status, preview(&answer.body), text);
                if answer.status < 500 {
                    return Err(failure);
                }
                failure
            }
            Err(error) => {
                let text = format!("Fetch from API server threw error: {error}");
                ApiFailure::call(CallReason::Internal, text)
            }
        };
        if attempt == MAX_ATTEMPTS {
            return Err(failure);
        }
        tracing::debug!(attempt, "query endpoint: {}", failure.message);
        sleep(backoff(attempt, rand::random_range(0..100))).await;
        attempt += 1;
    }
}

/// The wait after a failed attempt (1, 2, …).
fn backoff(attempt: u32, jitter_ms: u64) -> Duration {
    let base = 100u64.saturating_mul(1 << (attempt - 1).min(10));
    Duration::from_millis((base + jitter_ms).min(1000))
}

/// The beginning of a body.
fn preview(body: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(body);
    let mut preview: String = text.chars().take(PREVIEW_CHARS).collect();
    if preview.len() < text.len() {
        preview.push_str("...");
    }
    Some(preview)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_second() {
        let waits: Vec<u64> = (1..=5).map(|n| backoff(n, 50).as_millis() as u64).collect();
        assert_eq!(waits, [150, 250, 450, 850, 1000]);
    }

    #[test]
    fn previews_are_cut_between_characters() {
        assert_eq!(preview(b"short").as_deref(), Some("short"));
        let long = "é".repeat(600);
        let cut = preview(long.as_bytes()).unwrap();
        assert_eq!(cut.chars().count(), 515);
        assert!(cut.ends_with("é..."));
    }
}
