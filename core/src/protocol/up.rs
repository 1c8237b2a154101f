//! Messages from clients (spec: sync-protocol §3.2, §3.4).

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use serde_json::value::RawValue;

use super::error::{ErrorBody, MutationId};
use crate::client_schema::ClientSchema;
use crate::json::RawJson;
use crate::zql::ast::Ast;

/// Most operations in one query patch. A client has tens of queries; this many is an attack.
pub const MAX_QUERY_PATCH_OPS: usize = 10_000;
/// Most mutations in one push. Real clients send one; a merged re-push may have thousands.
pub const MAX_PUSH_MUTATIONS: usize = 10_000;
/// Most client ids in one list (`activeClients`, `deleteClients`).
pub const MAX_CLIENT_IDS: usize = 10_000;
/// Longest id or hash, bytes: it becomes part of an index key in Postgres (limit about 2,700).
pub const MAX_ID_BYTES: usize = 1_024;
/// Most custom headers that a client may ask for.
pub const MAX_USER_HEADERS: usize = 100;

/// Deepest nesting of a message. Arguments are only passed on, but to parsers that recurse.
pub const MAX_DEPTH: usize = 128;

/// A parsed message from a client.
#[derive(Debug, Clone, PartialEq)]
pub enum Upstream {
    /// `initConnection`
    InitConnection(Box<InitConnection>),
    /// `changeDesiredQueries`
    ChangeDesiredQueries(ChangeDesiredQueries),
    /// `push`
    Push(Push),
    /// `ackMutationResponses`: results up to this mutation were seen.
    AckMutationResponses(MutationId),
    /// `deleteClients`
    DeleteClients(DeleteClients),
    /// `updateAuth`: the new token; empty for none.
    UpdateAuth(String),
    /// `ping`
    Ping,
    /// `pull`: never sent by 1.x clients, never answered.
    Pull,
    /// `closeConnection`: ignored.
    CloseConnection,
    /// `inspect`
    Inspect(Inspect),
}

impl Upstream {
    /// The message's type, for logs.
    pub fn name(&self) -> &'static str {
        match self {
            Upstream::InitConnection(_) => "initConnection",
            Upstream::ChangeDesiredQueries(_) => "changeDesiredQueries",
            Upstream::Push(_) => "push",
            Upstream::AckMutationResponses(_) => "ackMutationResponses",
            Upstream::DeleteClients(_) => "deleteClients",
            Upstream::UpdateAuth(_) => "updateAuth",
            Upstream::Ping => "ping",
            Upstream::Pull => "pull",
            Upstream::CloseConnection => "closeConnection",
            Upstream::Inspect(_) => "inspect",
        }
    }
}

/// Body of `initConnection`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InitConnection {
    /// Difference between what the client wants and what its cookie says it wants.
    pub desired_queries_patch: Vec<QueryOp>,
    /// Sent if the client has no cookie.
    #[serde(default, deserialize_with = "super::client_schema::present")]
    pub client_schema: Option<Arc<ClientSchema>>,
    /// Clients that were collected locally.
    #[serde(default, deserialize_with = "present")]
    pub deleted: Option<DeleteClients>,
    /// Replaces the mutate URL for this connection.
    #[serde(default, rename = "userPushURL", deserialize_with = "present")]
    pub user_push_url: Option<String>,
    /// Headers for the mutate endpoint, before the allow list.
    #[serde(default, deserialize_with = "present")]
    pub user_push_headers: Option<BTreeMap<String, String>>,
    /// Replaces the query URL for this connection.
    #[serde(default, rename = "userQueryURL", deserialize_with = "present")]
    pub user_query_url: Option<String>,
    /// Headers for the query endpoint, before the allow list.
    #[serde(default, deserialize_with = "present")]
    pub user_query_headers: Option<BTreeMap<String, String>>,
    /// Clients of the group that are alive. `None` is "unknown", not "none".
    #[serde(default, deserialize_with = "present")]
    pub active_clients: Option<Vec<String>>,
    /// W3C trace context.
    #[serde(default, deserialize_with = "present")]
    pub traceparent: Option<String>,
}

/// Body of `changeDesiredQueries`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChangeDesiredQueries {
    /// Operations, applied in order.
    pub desired_queries_patch: Vec<QueryOp>,
    /// W3C trace context.
    #[serde(default, deserialize_with = "present")]
    pub traceparent: Option<String>,
}

/// One operation of a query patch.
#[derive(Debug, Clone, PartialEq)]
pub enum QueryOp {
    /// The client wants the query.
    Put(Box<QueryPut>),
    /// The client no longer wants the query of this hash.
    Del {
        /// The query.
        hash: String,
    },
    /// The client wants no query at all.
    Clear,
}

/// A `put` of a query patch. That `ast` excludes `name` and `args` is checked only when the group
/// has no record of the hash yet.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct QueryPut {
    /// Id of the query, chosen by the client; opaque.
    pub hash: String,
    /// How long the query outlives the client's interest, milliseconds; negative is for ever.
    #[serde(default, deserialize_with = "present")]
    pub ttl: Option<f64>,
    /// A legacy query, in server names.
    #[serde(default, deserialize_with = "present")]
    pub ast: Option<WireAst>,
    /// Name of a custom query.
    #[serde(default, deserialize_with = "present")]
    pub name: Option<String>,
    /// Arguments of a custom query.
    #[serde(default, deserialize_with = "present")]
    pub args: Option<Vec<RawJson>>,
}

/// An AST as its sender wrote it, and as parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct WireAst {
    json: RawJson,
    ast: Arc<Ast>,
}

impl WireAst {
    /// The AST's text as its sender wrote it.
    pub fn json(&self) -> &RawJson {
        &self.json
    }

    /// The AST.
    pub fn ast(&self) -> &Arc<Ast> {
        &self.ast
    }
}

impl<'de> Deserialize<'de> for WireAst {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<WireAst, D::Error> {
        let json = RawJson::deserialize(d)?;
        let ast = json.decode().map_err(|e| D::Error::custom(format!("in an ast: {e}")))?;
        Ok(WireAst { json, ast: Arc::new(ast) })
    }
}

/// Body of `deleteClients`, and `deleted` of `initConnection`. `clientGroupIDs` is ignored.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct DeleteClients {
    /// Clients to forget.
    #[serde(default, rename = "clientIDs", deserialize_with = "present")]
    pub client_ids: Option<Vec<String>>,
    /// Accepted, ignored.
    #[serde(default, rename = "clientGroupIDs", deserialize_with = "present")]
    pub client_group_ids: Option<Vec<String>>,
}

/// Body of `push`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Push {
    /// Must be the connection's.
    #[serde(rename = "clientGroupID")]
    pub client_group_id: String,
    /// The mutations, in order.
    pub mutations: Vec<Mutation>,
    /// 1.
    pub push_version: f64,
    /// Legacy.
    #[serde(default, deserialize_with = "present")]
    pub schema_version: Option<f64>,
    /// Client time, milliseconds since the Unix epoch.
    pub timestamp: f64,
    /// Id for logs.
    #[serde(rename = "requestID")]
    pub request_id: String,
    /// Deprecated; forwarded, otherwise ignored.
    #[serde(default, deserialize_with = "present")]
    pub auth: Option<String>,
    /// W3C trace context.
    #[serde(default, deserialize_with = "present")]
    pub traceparent: Option<String>,
}

/// A mutation of a push.
#[derive(Debug, Clone, PartialEq)]
pub struct Mutation {
    /// Its id. The client may be another one of the same group.
    pub id: MutationId,
    /// Mutator name; `_zero_crud` for CRUD.
    pub name: String,
    /// Client time, milliseconds since the Unix epoch.
    pub timestamp: f64,
    /// What it does.
    pub kind: MutationKind,
    /// The whole mutation as the client wrote it: what the mutate endpoint gets.
    pub json: RawJson,
}

/// What a mutation does.
#[derive(Debug, Clone, PartialEq)]
pub enum MutationKind {
    /// Legacy: operations that this server executes.
    Crud(Vec<CrudOp>),
    /// A mutator of the app. Its arguments are only passed on.
    Custom,
}

/// A legacy operation. Names are server names.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CrudOp {
    /// What to do.
    pub op: CrudKind,
    /// Table, or `schema.table`.
    pub table_name: String,
    /// Key columns, at least one.
    pub primary_key: Vec<String>,
    /// Values by column; of a delete the key's only.
    pub value: BTreeMap<String, RawJson>,
}

/// Kind of a [`CrudOp`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum CrudKind {
    Insert,
    Upsert,
    Update,
    Delete,
}

/// Body of `inspect`.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspect {
    /// Repeated in the answer.
    pub id: String,
    /// What is asked.
    pub op: InspectOp,
}

/// What an inspector asks.
#[derive(Debug, Clone, PartialEq)]
pub enum InspectOp {
    /// The admin password.
    Authenticate(String),
    /// The server's version.
    Version,
    /// Aggregate metrics of the group.
    Metrics,
    /// Queries of the group or of one client.
    Queries {
        /// Only this client's.
        client_id: Option<String>,
    },
    /// Run a query and report.
    AnalyzeQuery(Box<AnalyzeQuery>),
}

/// An `analyze-query` request.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct AnalyzeQuery {
    /// The query; clients before v36 call it `value`.
    #[serde(default, alias = "value", deserialize_with = "present")]
    pub ast: Option<WireAst>,
    /// Name of a custom query.
    #[serde(default, deserialize_with = "present")]
    pub name: Option<String>,
    /// Arguments of a custom query.
    #[serde(default, deserialize_with = "present")]
    pub args: Option<Vec<RawJson>>,
    /// What to report.
    #[serde(default)]
    pub options: AnalyzeOptions,
}

/// What an `analyze-query` reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AnalyzeOptions {
    /// Rows that SQLite produced (default false).
    #[serde(default, deserialize_with = "present")]
    pub vended_rows: Option<bool>,
    /// Rows that would be synced (default true).
    #[serde(default, deserialize_with = "present")]
    pub synced_rows: Option<bool>,
    /// Steps of the planner (default false).
    #[serde(default, deserialize_with = "present")]
    pub join_plans: Option<bool>,
}

/// Parses a message of a client. `text` is one WebSocket message (text or binary), not empty.
///
/// # Errors
/// `InvalidMessage` with a text that says what is wrong and where.
pub fn parse(text: &str) -> Result<Upstream, ErrorBody> {
    if is_deeper_than(text, MAX_DEPTH) {
        let why = format!("SyntaxError: nested more than {MAX_DEPTH} levels deep");
        return Err(ErrorBody::invalid_message(why));
    }
    let (kind, body): (String, &RawValue) = serde_json::from_str(text).map_err(|e| {
        // The texts of the original begin with the class of the exception.
        let class = if e.is_data() { "TypeError" } else { "SyntaxError" };
        ErrorBody::invalid_message(format!("{class}: not a message `[type, body]`: {e}"))
    })?;
    parse_body(&kind, body.get())
        .and_then(|message| check_bounds(&message).map(|()| message))
        .map_err(|why| ErrorBody::invalid_message(format!("TypeError: {why}")))
}

fn parse_body(kind: &str, body: &str) -> Result<Upstream, String> {
    fn shape<'a, T: Deserialize<'a>>(kind: &str, body: &'a str) -> Result<T, String> {
        serde_json::from_str(body).map_err(|e| format!("message `{kind}`: {e}"))
    }
    #[derive(Deserialize)]
    struct UpdateAuth {
        auth: String,
    }
    #[derive(Deserialize)]
    #[allow(dead_code)]
    struct Pull {
        #[serde(rename = "clientGroupID")]
        client_group_id: String,
        #[serde(rename = "requestID")]
        request_id: String,
    }
    Ok(match kind {
        "ping" => {
            shape::<BTreeMap<String, &RawValue>>(kind, body)?;
            Upstream::Ping
        }
        "push" => Upstream::Push(shape(kind, body)?),
        "initConnection" => Upstream::InitConnection(shape(kind, body)?),
        "changeDesiredQueries" => Upstream::ChangeDesiredQueries(shape(kind, body)?),
        "ackMutationResponses" => Upstream::AckMutationResponses(shape(kind, body)?),
        "deleteClients" => Upstream::DeleteClients(shape(kind, body)?),
        "updateAuth" => Upstream::UpdateAuth(shape::<UpdateAuth>(kind, body)?.auth),
        "inspect" => Upstream::Inspect(parse_inspect(body).map_err(|e| format!("`inspect`: {e}"))?),
        "pull" => {
            shape::<Pull>(kind, body)?;
            Upstream::Pull
        }
        "closeConnection" => {
            shape::<Vec<&RawValue>>(kind, body)?;
            Upstream::CloseConnection
        }
        _ => {
            let shown: String = kind.chars().take(64).collect();
            return Err(format!("Invalid union value: unknown message type {shown:?}"));
        }
    })
}

fn parse_inspect(body: &str) -> Result<Inspect, serde_json::Error> {
    #[derive(Deserialize)]
    struct Head {
        id: String,
        op: String,
    }
    #[derive(Deserialize)]
    struct Authenticate {
        value: String,
    }
    #[derive(Deserialize)]
    struct Queries {
        #[serde(default, rename = "clientID", deserialize_with = "present")]
        client_id: Option<String>,
    }
    let Head { id, op } = serde_json::from_str(body)?;
    let op = match op.as_str() {
        "authenticate" => {
            InspectOp::Authenticate(serde_json::from_str::<Authenticate>(body)?.value)
        }
        "version" => InspectOp::Version,
        "metrics" => InspectOp::Metrics,
        "queries" => {
            InspectOp::Queries { client_id: serde_json::from_str::<Queries>(body)?.client_id }
        }
        "analyze-query" => InspectOp::AnalyzeQuery(serde_json::from_str(body)?),
        other => return Err(serde_json::Error::custom(format!("unknown op {other:?}"))),
    };
    Ok(Inspect { id, op })
}

fn check_bounds(message: &Upstream) -> Result<(), String> {
    match message {
        Upstream::InitConnection(init) => {
            check_patch(&init.desired_queries_patch)?;
            check_ids("activeClients", init.active_clients.as_deref())?;
            for headers in [&init.user_push_headers, &init.user_query_headers] {
                let count = headers.as_ref().map_or(0, BTreeMap::len);
                check_count("user headers", count, MAX_USER_HEADERS)?;
            }
            let deleted = init.deleted.as_ref().and_then(|d| d.client_ids.as_deref());
            check_ids("deleted.clientIDs", deleted)
        }
        Upstream::ChangeDesiredQueries(change) => check_patch(&change.desired_queries_patch),
        Upstream::Push(push) => {
            check_id("clientGroupID", &push.client_group_id)?;
            check_count("mutations", push.mutations.len(), MAX_PUSH_MUTATIONS)?;
            push.mutations.iter().try_for_each(|m| check_id("mutation.clientID", &m.id.client_id))
        }
        Upstream::AckMutationResponses(id) => check_id("clientID", &id.client_id),
        Upstream::DeleteClients(deleted) => check_ids("clientIDs", deleted.client_ids.as_deref()),
        Upstream::Inspect(inspect) => check_id("inspect.id", &inspect.id),
        Upstream::UpdateAuth(_) | Upstream::Ping | Upstream::Pull | Upstream::CloseConnection => {
            Ok(())
        }
    }
}

fn check_patch(ops: &[QueryOp]) -> Result<(), String> {
    check_count("desiredQueriesPatch", ops.len(), MAX_QUERY_PATCH_OPS)?;
    ops.iter().try_for_each(|op| match op {
        QueryOp::Put(put) => check_id("hash", &put.hash),
        QueryOp::Del { hash } => check_id("hash", hash),
        QueryOp::Clear => Ok(()),
    })
}

fn check_ids(what: &str, ids: Option<&[String]>) -> Result<(), String> {
    let ids = ids.unwrap_or_default();
    check_count(what, ids.len(), MAX_CLIENT_IDS)?;
    ids.iter().try_for_each(|id| check_id(what, id))
}

fn check_id(what: &str, id: &str) -> Result<(), String> {
    if id.len() > MAX_ID_BYTES {
        return Err(format!("{what} is {} bytes long; the limit is {MAX_ID_BYTES}", id.len()));
    }
    // Postgres cannot store it, and no client makes such an id.
    if id.contains('\0') {
        return Err(format!("{what} contains a NUL character"));
    }
    Ok(())
}

/// Whether brackets outside of strings nest deeper than `limit`.
fn is_deeper_than(text: &str, limit: usize) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                if depth > limit {
                    return true;
                }
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

fn check_count(what: &str, count: usize, limit: usize) -> Result<(), String> {
    if count > limit {
        return Err(format!("{what} has {count} entries; the limit is {limit}"));
    }
    Ok(())
}

/// An optional field: absent is `None`, but `null` is a wrong type, as in the original.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Option<T>, D::Error> {
    T::deserialize(d).map(Some)
}

/// A JSON number that is an integer: `4`, `4.0` and `4e0` alike.
pub(super) fn integer<'de, D: Deserializer<'de>>(d: D) -> Result<i64, D::Error> {
    let n = f64::deserialize(d)?;
    if n.trunc() == n && n.abs() <= crate::value::Value::MAX_SAFE_INTEGER as f64 {
        Ok(n as i64)
    } else {
        Err(D::Error::custom(format!("{n} is not an integer within ±(2^53−1)")))
    }
}

impl<'de> Deserialize<'de> for QueryOp {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<QueryOp, D::Error> {
        #[derive(Deserialize)]
        struct Head {
            op: String,
        }
        #[derive(Deserialize)]
        struct Del {
            hash: String,
        }
        let text = <&RawValue>::deserialize(d)?.get();
        let inner = |e: serde_json::Error| D::Error::custom(format!("in a query patch: {e}"));
        match serde_json::from_str::<Head>(text).map_err(inner)?.op.as_str() {
            "put" => serde_json::from_str(text).map(QueryOp::Put),
            "del" => serde_json::from_str::<Del>(text).map(|del| QueryOp::Del { hash: del.hash }),
            "clear" => Ok(QueryOp::Clear),
            other => return Err(D::Error::custom(format!("unknown query patch op {other:?}"))),
        }
        .map_err(inner)
    }
}

impl<'de> Deserialize<'de> for Mutation {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Mutation, D::Error> {
        #[derive(Deserialize)]
        struct Head<'a> {
            #[serde(rename = "type")]
            kind: String,
            #[serde(deserialize_with = "integer")]
            id: i64,
            #[serde(rename = "clientID")]
            client_id: String,
            name: String,
            #[serde(borrow)]
            args: Vec<&'a RawValue>,
            timestamp: f64,
        }
        #[derive(Deserialize)]
        struct CrudArg {
            ops: Vec<CrudOp>,
        }
        let text = <&RawValue>::deserialize(d)?.get();
        let inner = |e: serde_json::Error| D::Error::custom(format!("in a mutation: {e}"));
        let head: Head = serde_json::from_str(text).map_err(inner)?;
        let kind = match (head.kind.as_str(), head.args.as_slice()) {
            ("custom", _) => MutationKind::Custom,
            ("crud", [arg]) if head.name == "_zero_crud" => {
                let ops = serde_json::from_str::<CrudArg>(arg.get()).map_err(inner)?.ops;
                if let Some(op) = ops.iter().find(|op| op.primary_key.is_empty()) {
                    let table = &op.table_name;
                    return Err(D::Error::custom(format!("empty primaryKey for table {table}")));
                }
                MutationKind::Crud(ops)
            }
            ("crud", _) => {
                return Err(D::Error::custom("a crud mutation is `_zero_crud` with one argument"));
            }
            (other, _) => return Err(D::Error::custom(format!("unknown mutation type {other:?}"))),
        };
        let id = MutationId { id: head.id, client_id: head.client_id };
        let (name, timestamp) = (head.name, head.timestamp);
        Ok(Mutation { id, name, timestamp, kind, json: RawJson::from_trusted(text) })
    }
}
