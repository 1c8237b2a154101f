//! Named queries: what they mean is asked of the app's query endpoint (spec: sync-protocol §8).
//!
//! Results are cached by the client groups, per credentials, never here.

use zeroring_core::group::Credentials;
use zeroring_core::protocol::custom_query::{
    TransformRequest, TransformResponse, parse_response, request_body,
};
use zeroring_core::protocol::error::{ApiFailure, CallReason};

use crate::api::{Caller, parse_failure};

/// Asks the endpoint. Without queries, only the credentials are validated.
///
/// # Errors
/// What the clients are told as `TransformFailed`.
pub async fn transform(
    endpoint: &Caller,
    credentials: &Credentials,
    queries: &[TransformRequest],
) -> Result<TransformResponse, ApiFailure> {
    let doing = if queries.is_empty() { "validate queries" } else { "transform queries" };
    let body = request_body(queries).map_err(|error| {
        ApiFailure::call(CallReason::Internal, format!("Failed to {doing}: {error}"))
    })?;
    let answer = endpoint.call(credentials, body, doing).await?;
    parse_response(&answer).map_err(|why| parse_failure(&why))
}
