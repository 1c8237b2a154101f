//! Requests to and answers from the app's mutate endpoint (spec: sync-protocol §7.4, §7.6).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::custom_query::{ValidatedUser, said};
use super::error::{
    ApiFailure, ErrorBody, FailureCause, MutationId, ReportedFailure, ServerReason,
};
use super::up::Push;
use crate::json::{RawJson, write};

/// Name of the mutation that asks the app to delete stored results.
const CLEAN_UP: &str = "_zero_cleanupResults";

/// The body of a request: that of the push message, without its type.
pub fn request_body(push: &Push) -> Vec<u8> {
    let mutations: usize = push.mutations.iter().map(|m| m.json.as_str().len() + 1).sum();
    let mut out = Vec::with_capacity(256 + mutations);
    out.extend_from_slice(br#"{"clientGroupID":"#);
    write::string(&mut out, &push.client_group_id);
    out.extend_from_slice(br#","mutations":["#);
    for (i, mutation) in push.mutations.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        out.extend_from_slice(mutation.json.as_str().as_bytes());
    }
    out.extend_from_slice(br#"],"pushVersion":"#);
    write::number(&mut out, push.push_version);
    if let Some(version) = push.schema_version {
        out.extend_from_slice(br#","schemaVersion":"#);
        write::number(&mut out, version);
    }
    out.extend_from_slice(br#","timestamp":"#);
    write::number(&mut out, push.timestamp);
    out.extend_from_slice(br#","requestID":"#);
    write::string(&mut out, &push.request_id);
    for (name, value) in [("auth", &push.auth), ("traceparent", &push.traceparent)] {
        if let Some(value) = value {
            out.push(b',');
            write::string(&mut out, name);
            out.push(b':');
            write::string(&mut out, value);
        }
    }
    out.push(b'}');
    out
}

/// Stored results that nobody needs any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CleanUp {
    /// The client has seen its results up to this mutation.
    Single(MutationId),
    /// These clients are gone. Not empty.
    Bulk(Vec<String>),
}

impl CleanUp {
    /// The body of the request. `now_ms` is wall time, milliseconds since the Unix epoch.
    pub fn request_body(&self, group: &str, now_ms: f64) -> Vec<u8> {
        use serde_json::json;
        let now = now_ms.floor().max(0.0) as u64;
        let (client, request_id, arg) = match self {
            CleanUp::Single(MutationId { id, client_id }) => (
                client_id.as_str(),
                format!("cleanup-{group}-{client_id}-{id}"),
                json!({"type": "single", "clientGroupID": group, "clientID": client_id,
                    "upToMutationID": id}),
            ),
            CleanUp::Bulk(clients) => (
                clients.first().map_or("", String::as_str),
                format!("cleanup-bulk-{group}-{now}"),
                json!({"type": "bulk", "clientGroupID": group, "clientIDs": clients}),
            ),
        };
        let mutation = json!({"type": "custom", "id": 0, "clientID": client, "name": CLEAN_UP,
            "args": [arg], "timestamp": now});
        let body = json!({"clientGroupID": group, "mutations": [mutation], "pushVersion": 1,
            "timestamp": now, "requestID": request_id});
        body.to_string().into_bytes()
    }
}

/// A parsed answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MutateResponse {
    /// The endpoint handled the request. Results travel to the clients by replication.
    Done {
        /// Who the user is, if it says so.
        user: ValidatedUser,
        /// What cannot travel that way: errors for clients, by client.
        errors: Vec<(String, ErrorBody)>,
    },
    /// The request failed as a whole.
    Failed {
        /// Why.
        failure: ApiFailure,
        /// The mutations concerned, as the endpoint lists them.
        mutation_ids: Vec<MutationId>,
        /// An older shape of the answer: each client is told its own mutations only.
        legacy: bool,
    },
}

/// The error of a failed request for each client that it concerns.
pub fn errors(
    failure: &ApiFailure,
    mutation_ids: &[MutationId],
    own_only: bool,
) -> Vec<(String, ErrorBody)> {
    let mut clients: Vec<(&str, Vec<MutationId>)> = Vec::new();
    let mut index: BTreeMap<&str, usize> = BTreeMap::new();
    for id in mutation_ids {
        let at = *index.entry(&id.client_id).or_insert_with(|| {
            clients.push((&id.client_id, Vec::new()));
            clients.len() - 1
        });
        clients[at].1.push(id.clone());
    }
    let error = |mutation_ids| ErrorBody::PushFailed { failure: failure.clone(), mutation_ids };
    clients
        .into_iter()
        .map(|(client, own)| {
            let ids = if own_only { own } else { mutation_ids.to_vec() };
            (client.to_owned(), error(ids))
        })
        .collect()
}

/// All fields of all shapes.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    kind: Option<RawJson>,
    #[serde(default)]
    error: Option<RawJson>,
    #[serde(default)]
    mutations: Option<RawJson>,
    #[serde(default, rename = "userID", deserialize_with = "said")]
    user_id: Option<Option<String>>,
}

/// Parses an answer: the current shape or one of the older ones. Unknown keys pass.
///
/// # Errors
/// What is wrong, for a `PushFailed` of reason `parse`.
pub fn parse_response(body: &[u8]) -> Result<MutateResponse, String> {
    let text = std::str::from_utf8(body).map_err(|e| format!("not UTF-8: {e}"))?;
    let answer: Answer = from(text)?;
    let word = |json: &Option<RawJson>| json.as_ref().and_then(|j| j.decode::<String>().ok());
    match (word(&answer.kind).as_deref(), &answer.mutations) {
        (Some("PushFailed"), _) => {
            let mut reported: ReportedFailure = from(text)?;
            let failure = reported.failure()?;
            let mutation_ids = reported.mutation_ids.take().ok_or("missing field `mutationIDs`")?;
            Ok(MutateResponse::Failed { failure, mutation_ids, legacy: false })
        }
        (kind, Some(mutations)) => {
            let user = match answer.user_id {
                Some(user) if kind == Some("MutateResponse") => ValidatedUser::User(user),
                _ => ValidatedUser::Unsaid,
            };
            Ok(MutateResponse::Done { user, errors: out_of_order(mutations)? })
        }
        (_, None) => match word(&answer.error) {
            Some(error) => legacy_failure(&error, text),
            None => Err("neither `mutations` nor a known error".to_owned()),
        },
    }
}

fn from<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// Older endpoints report a gap in the mutation ids of a client in its result.
fn out_of_order(results: &RawJson) -> Result<Vec<(String, ErrorBody)>, String> {
    #[derive(Deserialize)]
    struct Entry {
        id: MutationId,
        result: BTreeMap<String, RawJson>,
    }
    let results: Vec<Entry> =
        from(results.as_str()).map_err(|e| format!("in the mutations: {e}"))?;
    let is_out_of_order = |entry: &&Entry| {
        entry.result.get("error").is_some_and(|e| e.as_str() == r#""oooMutation""#)
    };
    if !results.iter().any(|entry| is_out_of_order(&entry)) {
        return Ok(Vec::new());
    }
    let mut told: Vec<(String, ErrorBody)> = Vec::new();
    for entry in results.iter().filter(is_out_of_order) {
        let client = &entry.id.client_id;
        if told.iter().any(|(known, _)| known == client) {
            continue;
        }
        let own = results.iter().map(|e| &e.id).filter(|id| id.client_id == *client);
        let failure = ApiFailure {
            cause: FailureCause::Server(ServerReason::OooMutation),
            message: "mutation was out of order".to_owned(),
            details: entry.result.get("details").cloned(),
        };
        let error = ErrorBody::PushFailed { failure, mutation_ids: own.cloned().collect() };
        told.push((client.clone(), error));
    }
    Ok(told)
}

fn legacy_failure(error: &str, text: &str) -> Result<MutateResponse, String> {
    #[derive(Deserialize)]
    struct Legacy {
        status: Option<f64>,
        details: Option<String>,
        #[serde(default, rename = "mutationIDs")]
        mutation_ids: Vec<MutationId>,
    }
    let Legacy { status, details, mutation_ids } = from(text)?;
    let server = |reason, message: String| ApiFailure {
        cause: FailureCause::Server(reason),
        message,
        details: None,
    };
    let missing = |field| format!("missing field `{field}` of error `{error}`");
    let failure = match error {
        "unsupportedPushVersion" => {
            server(ServerReason::UnsupportedPushVersion, "Unsupported push version".to_owned())
        }
        "unsupportedSchemaVersion" => {
            server(ServerReason::Internal, "Unsupported schema version".to_owned())
        }
        "zeroPusher" => server(ServerReason::Internal, details.ok_or_else(|| missing("details"))?),
        "http" => {
            let status = status.ok_or_else(|| missing("status"))? as u16;
            let details = details.ok_or_else(|| missing("details"))?;
            let text = format!("Fetch from API server returned non-OK status {status}");
            ApiFailure::http(status, Some(details), text)
        }
        other => return Err(format!("unknown error {other:?}")),
    };
    Ok(MutateResponse::Failed { failure, mutation_ids, legacy: true })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::protocol::up::{Upstream, parse};

    fn id(client: &str, id: i64) -> MutationId {
        MutationId { id, client_id: client.to_owned() }
    }

    fn response(body: &Value) -> Result<MutateResponse, String> {
        parse_response(body.to_string().as_bytes())
    }

    #[test]
    fn a_request_says_what_the_push_said() {
        let mutation = json!({"type": "custom", "id": 1, "clientID": "c", "name": "m",
            "args": [{"x": 1.5}], "timestamp": 3, "unknown": [null]});
        let body = json!({"clientGroupID": "g\"", "mutations": [mutation, mutation],
            "pushVersion": 1, "timestamp": 1_765_000_000_123.5, "requestID": "r",
            "schemaVersion": 2, "auth": "old", "traceparent": "00-1"});
        let Ok(Upstream::Push(push)) = parse(&json!(["push", body]).to_string()) else { panic!() };
        let sent: Value = serde_json::from_slice(&request_body(&push)).unwrap();
        assert_eq!(sent, body);
        let text = String::from_utf8(request_body(&push)).unwrap();
        assert!(text.contains(r#""pushVersion":1,"schemaVersion":2,"#), "{text}");
    }

    #[test]
    fn clean_ups_are_mutations_of_the_spec() {
        let single = CleanUp::Single(id("c1", 2)).request_body("g1", 1_765_000_000_000.7);
        let now = 1_765_000_000_000u64;
        let want = json!({"clientGroupID": "g1", "mutations": [{"type": "custom", "id": 0,
            "clientID": "c1", "name": "_zero_cleanupResults", "timestamp": now, "args": [
                {"type": "single", "clientGroupID": "g1", "clientID": "c1", "upToMutationID": 2}
            ]}], "pushVersion": 1, "timestamp": now, "requestID": "cleanup-g1-c1-2"});
        assert_eq!(serde_json::from_slice::<Value>(&single).unwrap(), want);
        let bulk = CleanUp::Bulk(vec!["a".into(), "b".into()]).request_body("g1", 5.0);
        let bulk: Value = serde_json::from_slice(&bulk).unwrap();
        assert_eq!(bulk["requestID"], "cleanup-bulk-g1-5");
        assert_eq!(bulk["mutations"][0]["clientID"], "a");
        let arg = json!({"type": "bulk", "clientGroupID": "g1", "clientIDs": ["a", "b"]});
        assert_eq!(bulk["mutations"][0]["args"], json!([arg]));
    }

    #[test]
    fn success_in_both_shapes() {
        let ok = json!({"id": {"id": 1, "clientID": "c"}, "result": {}, "later": 1});
        let app = json!({"id": {"id": 2, "clientID": "c"}, "result":
            {"error": "app", "message": "no", "details": 1}});
        let done = |user| MutateResponse::Done { user, errors: Vec::new() };
        for (body, want) in [
            (json!({"mutations": [ok, app]}), ValidatedUser::Unsaid),
            (json!({"mutations": [], "userID": "u"}), ValidatedUser::Unsaid),
            (json!({"kind": "MutateResponse", "mutations": [ok]}), ValidatedUser::Unsaid),
            (
                json!({"kind": "MutateResponse", "mutations": [], "userID": null}),
                ValidatedUser::User(None),
            ),
            (
                json!({"kind": "MutateResponse", "mutations": [ok, app], "userID": "u", "x": 1}),
                ValidatedUser::User(Some("u".into())),
            ),
        ] {
            assert_eq!(response(&body), Ok(done(want)), "{body}");
        }
    }

    #[test]
    fn a_gap_concerns_all_of_the_clients_mutations_of_the_request() {
        let entry = |client: &str, n: i64, result: Value| json!({"id": {"id": n, "clientID": client}, "result": result});
        let ooo = json!({"error": "oooMutation", "details": "gap"});
        let body = json!({"mutations": [
            entry("a", 5, json!({})), entry("b", 1, json!({"error": "alreadyProcessed"})),
            entry("a", 7, ooo), entry("a", 8, json!({"error": "oooMutation"})),
        ]});
        let Ok(MutateResponse::Done { errors, .. }) = response(&body) else { panic!() };
        let [(client, error)] = &errors[..] else { panic!("{errors:?}") };
        assert_eq!(client, "a");
        let ids = [5, 7, 8].map(|n| json!({"id": n, "clientID": "a"}));
        assert_eq!(
            serde_json::to_value(error).unwrap(),
            json!({"kind": "PushFailed", "origin": "server", "reason": "oooMutation",
                "message": "mutation was out of order", "details": "gap",
                "mutationIDs": ids})
        );
    }

    #[test]
    fn failures_in_all_shapes() {
        let ids = json!([{"id": 1, "clientID": "a"}, {"id": 1, "clientID": "b"}]);
        let told = |body: Value| match response(&body) {
            Ok(MutateResponse::Failed { failure, mutation_ids, legacy }) => {
                errors(&failure, &mutation_ids, legacy)
                    .into_iter()
                    .map(|(client, error)| (client, serde_json::to_value(&error).unwrap()))
                    .collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        };
        let body = json!({"kind": "PushFailed", "origin": "server", "reason": "database",
            "message": "down", "details": {"code": 1}, "mutationIDs": ids});
        assert_eq!(told(body.clone()), [("a".to_owned(), body.clone()), ("b".to_owned(), body)]);
        let own = |client: &str| json!([{"id": 1, "clientID": client}]);
        for (error, extra, want) in [
            (
                "unsupportedPushVersion",
                json!({}),
                json!({"origin": "server", "reason": "unsupportedPushVersion",
                    "message": "Unsupported push version"}),
            ),
            (
                "unsupportedSchemaVersion",
                json!({}),
                json!({"origin": "server", "reason": "internal",
                    "message": "Unsupported schema version"}),
            ),
            (
                "zeroPusher",
                json!({"details": "why"}),
                json!({"origin": "server", "reason": "internal", "message": "why"}),
            ),
            (
                "http",
                json!({"status": 401, "details": "who?"}),
                json!({"origin": "zeroCache", "reason": "http", "status": 401,
                    "bodyPreview": "who?",
                    "message": "Fetch from API server returned non-OK status 401"}),
            ),
        ] {
            let mut body = json!({"error": error, "mutationIDs": ids});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            let full = |client: &str| {
                let mut full = want.clone();
                full["kind"] = json!("PushFailed");
                full["mutationIDs"] = own(client);
                (client.to_owned(), full)
            };
            assert_eq!(told(body), [full("a"), full("b")]);
            let mut silent = json!({"error": error});
            silent.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            assert_eq!(told(silent), [], "without ids nobody is told");
        }
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        for body in [
            "",
            "[]",
            "{}",
            "1",
            "{\"mutations\":1}",
            "{\"error\":\"zzz\"}",
            "{\"error\":\"http\"}",
            "{\"kind\":\"PushFailed\"}",
            "{\"mutations\":[{\"id\":1,\"result\":{}}]}",
            "{\"mutations\":[{\"id\":{\"id\":1,\"clientID\":\"c\"}}]}",
            "{\"kind\":\"PushFailed\",\"origin\":\"server\",\"reason\":\"x\",\"message\":\"m\",\"mutationIDs\":[]}",
            "{\"kind\":\"MutateResponse\",\"userID\":5,\"mutations\":[]}",
        ] {
            assert!(parse_response(body.as_bytes()).is_err(), "{body}");
        }
    }
}
