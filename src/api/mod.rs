//! Calls to the app's endpoints: named queries and mutations (spec: sync-protocol §7.5).
//!
//! Credentials of a connection and a body go in; the body of a good answer comes out, or why there
//! is none. A call is a POST, tried again after network failures and 5xx answers; redirects are
//! followed. Which URLs may be called at all is an allow list of URLPatterns, checked when the
//! server starts. All executors share one HTTP client on a thread of its own; how many calls an
//! executor has under way per endpoint is bounded, and who comes later waits its turn.

mod endpoint;
mod slots;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use url::Url;
use zeroring_core::group::Credentials;
use zeroring_core::protocol::error::{ApiFailure, CallReason};
use zeroring_net::http::client::{ApiError, ApiRequest, ApiResponse, LocalApiClient};
use zeroring_net::rt::sleep;

pub use endpoint::{AppEndpoint, EndpointError, EndpointKind};
use slots::Slots;

/// Attempts at most for one call.
const MAX_ATTEMPTS: u32 = 4;
/// Redirects at most for one attempt, as the fetch standard.
const MAX_REDIRECTS: usize = 20;
/// Longest wait for an answer if `ZERO_API_TIMEOUT_MS` is not set, as the original's HTTP stack.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);
/// Calls under way per endpoint and executor. Two endpoints together stay below what the client
/// takes (1,024), so that it never refuses one.
const MAX_CALLS: usize = 500;
/// Characters of a refusal that the client is shown.
const PREVIEW_CHARS: usize = 512;

/// Calls one endpoint, from one executor.
pub struct Caller {
    endpoint: Arc<AppEndpoint>,
    client: LocalApiClient,
    timeout: Duration,
    slots: Slots,
}

impl Caller {
    /// A caller of this endpoint. `timeout` is for each attempt.
    pub fn new(endpoint: Arc<AppEndpoint>, client: LocalApiClient, timeout: Duration) -> Caller {
        Caller { endpoint, client, timeout, slots: Slots::new(MAX_CALLS) }
    }

    /// Sends a body and waits for the answer. `doing` completes "Failed to …".
    ///
    /// # Errors
    /// What the clients are told.
    pub async fn call(
        &self,
        credentials: &Credentials,
        body: Vec<u8>,
        doing: &str,
    ) -> Result<Bytes, ApiFailure> {
        let url = self.endpoint.target(credentials, doing)?;
        let headers = self.endpoint.headers(credentials);
        let (method, body) = ("POST".to_owned(), Bytes::from(body));
        let request = ApiRequest { method, url, headers, body, deadline: self.timeout };
        let _slot = self.slots.take().await;
        let mut attempt = 1;
        loop {
            let (failure, may_pass) = match self.follow(request.clone()).await {
                Ok(answer) if (200..300).contains(&answer.status) => return Ok(answer.body),
                Ok(answer) => {
                    let text =
                        format!("Fetch from API server returned non-OK status {}", answer.status);
                    let failure = ApiFailure::http(answer.status, preview(&answer.body), text);
                    (failure, (500..600).contains(&answer.status))
                }
                Err(error) => {
                    let text = format!("Fetch from API server threw error: {error}");
                    (ApiFailure::call(CallReason::Internal, text), may_pass(&error))
                }
            };
            if attempt == MAX_ATTEMPTS || !may_pass {
                return Err(failure);
            }
            tracing::debug!(attempt, url = request.url, "{}", failure.message);
            sleep(backoff(attempt, rand::random_range(0..100))).await;
            attempt += 1;
        }
    }

    /// An attempt, with its redirects.
    async fn follow(&self, mut request: ApiRequest) -> Result<ApiResponse, ApiError> {
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.client.request(request.clone()).await?;
            match redirected(&request, &answer)? {
                Some(next) => request = next,
                None => return Ok(answer),
            }
        }
        Err(ApiError::Transport { url: request.url, cause: "redirect count exceeded".to_owned() })
    }
}

/// The answer cannot be understood.
pub fn parse_failure(why: &str) -> ApiFailure {
    let text = format!("Failed to parse response from API server: {why}");
    ApiFailure::call(CallReason::Parse, text)
}

/// Another attempt may go better.
fn may_pass(error: &ApiError) -> bool {
    match error {
        ApiError::Timeout { .. }
        | ApiError::Connect { .. }
        | ApiError::Transport { .. }
        | ApiError::Overloaded => true,
        ApiError::BodyTooLarge { .. }
        | ApiError::BadRequest { .. }
        | ApiError::Stopped
        | ApiError::Cancelled => false,
    }
}

/// Where an answer sends us, by the rules of the fetch standard.
fn redirected(request: &ApiRequest, answer: &ApiResponse) -> Result<Option<ApiRequest>, ApiError> {
    let Some(location) =
        answer.header("location").filter(|_| matches!(answer.status, 301 | 302 | 303 | 307 | 308))
    else {
        return Ok(None);
    };
    let bad = || ApiError::Transport {
        url: request.url.clone(),
        cause: format!("redirected to {location:?}, which is no URL"),
    };
    let from = Url::parse(&request.url).map_err(|_| bad())?;
    let to = from.join(location).map_err(|_| bad())?;
    let mut next = request.clone();
    let mut drop_headers = |names: &[&str]| {
        next.headers.retain(|(name, _)| !names.iter().any(|n| name.eq_ignore_ascii_case(n)));
    };
    if from.origin() != to.origin() {
        drop_headers(&["authorization", "proxy-authorization", "cookie"]);
    }
    if !matches!(answer.status, 307 | 308) && next.method == "POST" {
        drop_headers(&["content-type"]);
        next.method = "GET".to_owned();
        next.body = Bytes::new();
    }
    next.url = to.into();
    Ok(Some(next))
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

    fn redirect(status: u16, location: &str) -> Result<Option<ApiRequest>, ApiError> {
        let headers = ["Content-Type", "Authorization", "Cookie", "X-Api-Key"];
        let request = ApiRequest {
            method: "POST".into(),
            url: "https://app.example/push?a=1".into(),
            headers: headers.map(|name| (name.to_owned(), "v".to_owned())).into(),
            body: Bytes::from_static(b"{}"),
            deadline: DEFAULT_TIMEOUT,
        };
        let headers = vec![("location".to_owned(), location.to_owned())];
        redirected(&request, &ApiResponse { status, headers, body: Bytes::new() })
    }

    #[test]
    fn redirects_keep_what_the_fetch_standard_keeps() {
        let names = |r: &ApiRequest| r.headers.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
        let same = redirect(308, "/push/?a=1").unwrap().unwrap();
        assert_eq!(
            (same.url.as_str(), same.method.as_str()),
            ("https://app.example/push/?a=1", "POST")
        );
        assert_eq!((same.body.as_ref(), same.headers.len()), (&b"{}"[..], 4));
        let elsewhere = redirect(307, "https://other.example/").unwrap().unwrap();
        assert_eq!(names(&elsewhere), ["Content-Type", "X-Api-Key"]);
        let get = redirect(302, "push2").unwrap().unwrap();
        assert_eq!((get.url.as_str(), get.method.as_str()), ("https://app.example/push2", "GET"));
        assert!(get.body.is_empty() && !names(&get).contains(&"Content-Type".to_owned()));
        assert!(redirect(304, "/x").unwrap().is_none(), "no redirect");
        assert!(redirect(302, "http://[").is_err());
    }
}
