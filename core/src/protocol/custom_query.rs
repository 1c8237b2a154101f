//! Requests to and answers from the app's query endpoint (spec: sync-protocol §8.1).

use serde::{Deserialize, Serialize};

use super::error::{ApiFailure, ReportedFailure};
use super::up::WireAst;
use crate::json::RawJson;

/// A query to be transformed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TransformRequest {
    /// The query's hash.
    pub id: String,
    /// Name of the custom query.
    pub name: String,
    /// Its arguments.
    pub args: Vec<RawJson>,
}

/// The body of a request: `["transform",[…]]`. An empty list only validates the credentials.
///
/// # Errors
/// Never for well-formed arguments; the writer's message otherwise.
pub fn request_body(queries: &[TransformRequest]) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(&("transform", queries))
}

/// What the endpoint says about one query.
#[derive(Debug, Clone, PartialEq)]
pub enum TransformResult {
    /// The query, in server names.
    Query {
        /// The query's hash.
        id: String,
        /// Its name.
        name: String,
        /// What to run.
        ast: WireAst,
    },
    /// The app refused it.
    Error(ErroredQuery),
}

/// An application error of one query: an element of `transformError`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErroredQuery {
    /// `app` or `parse`.
    pub error: QueryErrorKind,
    /// The query's hash.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Text for the developer; required for `parse`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Whatever the app added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<RawJson>,
}

/// Class of an [`ErroredQuery`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueryErrorKind {
    /// The app's code failed or refused.
    App,
    /// The arguments have the wrong shape.
    Parse,
}

/// Whose data the endpoint answered for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ValidatedUser {
    /// The endpoint does not say: the connection's claim is trusted.
    Unsaid,
    /// This user; `None` is logged out.
    User(Option<String>),
}

/// A parsed answer.
#[derive(Debug, Clone, PartialEq)]
pub enum TransformResponse {
    /// The endpoint handled the request.
    Queries {
        /// Who the user is, if it says so.
        user: ValidatedUser,
        /// One result a query; some may be missing.
        queries: Vec<TransformResult>,
    },
    /// The request failed as a whole.
    Failed {
        /// Why.
        failure: ApiFailure,
        /// The queries concerned, as the endpoint lists them.
        query_ids: Vec<String>,
    },
}

/// Parses an answer: the current shape or the legacy tuples. Unknown keys pass.
///
/// # Errors
/// What is wrong, for a `TransformFailed` of reason `parse`.
pub fn parse_response(body: &[u8]) -> Result<TransformResponse, String> {
    let text = std::str::from_utf8(body).map_err(|e| format!("not UTF-8: {e}"))?;
    let first = text.trim_start().as_bytes().first();
    if first == Some(&b'[') {
        let (kind, body): (String, RawJson) = from(text)?;
        return match kind.as_str() {
            "transformed" => Ok(TransformResponse::Queries {
                user: ValidatedUser::Unsaid,
                queries: results(&body)?,
            }),
            "transformFailed" => failed(body.as_str()),
            other => Err(format!("unknown response type {other:?}")),
        };
    }
    #[derive(Deserialize)]
    struct Head {
        kind: String,
    }
    match from::<Head>(text)?.kind.as_str() {
        "QueryResponse" => {
            #[derive(Deserialize)]
            struct QueryResponse {
                #[serde(default, rename = "userID", deserialize_with = "said")]
                user_id: Option<Option<String>>,
                queries: RawJson,
            }
            let response: QueryResponse = from(text)?;
            let user = response.user_id.map_or(ValidatedUser::Unsaid, ValidatedUser::User);
            Ok(TransformResponse::Queries { user, queries: results(&response.queries)? })
        }
        "TransformFailed" => failed(text),
        other => Err(format!("unknown response kind {other:?}")),
    }
}

/// A field that may be absent (`None`), `null` (`Some(None)`) or a string.
pub(super) fn said<'de, D: serde::Deserializer<'de>>(
    d: D,
) -> Result<Option<Option<String>>, D::Error> {
    Option::<String>::deserialize(d).map(Some)
}

fn from<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

fn failed(text: &str) -> Result<TransformResponse, String> {
    let mut reported: ReportedFailure = from(text)?;
    let failure = reported.failure()?;
    let query_ids = reported.query_ids.take().ok_or("missing field `queryIDs`")?;
    Ok(TransformResponse::Failed { failure, query_ids })
}

fn results(list: &RawJson) -> Result<Vec<TransformResult>, String> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(default)]
        error: Option<RawJson>,
    }
    #[derive(Deserialize)]
    struct Transformed {
        id: String,
        name: String,
        ast: WireAst,
    }
    let one = |item: &RawJson| -> Result<TransformResult, String> {
        if item.decode::<Head>().map_err(|e| e.to_string())?.error.is_none() {
            let Transformed { id, name, ast } = from(item.as_str())?;
            return Ok(TransformResult::Query { id, name, ast });
        }
        let errored: ErroredQuery = from(item.as_str())?;
        if errored.error == QueryErrorKind::Parse && errored.message.is_none() {
            return Err("missing field `message` of a parse error".to_owned());
        }
        Ok(TransformResult::Error(errored))
    };
    from::<Vec<RawJson>>(list.as_str())?
        .iter()
        .enumerate()
        .map(|(i, item)| one(item).map_err(|e| format!("in entry {i} of the queries: {e}")))
        .collect()
}
