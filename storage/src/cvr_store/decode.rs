//! What both stores make of what they have read.

use std::fmt::Display;
use std::sync::Arc;

use zeroring_core::cvr::load::StoredDesire;
use zeroring_core::cvr::store::{CvrStoreError, InspectedQuery};
use zeroring_core::cvr::{
    ClientGroupId, ClientId, ClientSchema, DEFAULT_TTL_MS, Query, QueryBody, QueryHash, RefCounts,
    RowIdentity, RowRecord, TtlClock,
};
use zeroring_core::version::{CvrVersion, StateVersion};

use super::Answer;

/// Why a read has no answer; `E` is the database's error.
#[derive(Debug)]
pub(super) enum Failure<E> {
    /// The database.
    Database(E),
    /// Something that is stored is not understood.
    Damaged(String),
    Refused(CvrStoreError),
}

impl<E> From<CvrStoreError> for Failure<E> {
    fn from(e: CvrStoreError) -> Failure<E> {
        Failure::Refused(e)
    }
}

impl<E> Failure<E> {
    /// As an answer about a group.
    pub(super) fn of(
        self,
        group: &ClientGroupId,
        failed: impl FnOnce(E) -> CvrStoreError,
    ) -> CvrStoreError {
        match self {
            Failure::Database(e) => failed(e),
            Failure::Damaged(what) => CvrStoreError::Damaged { group: group.clone(), what },
            Failure::Refused(e) => e,
        }
    }
}

pub(super) fn damaged<E>(what: impl Display, why: impl Display) -> Failure<E> {
    Failure::Damaged(format!("{what}: {why}"))
}

pub(super) fn version<E>(text: &str) -> Result<CvrVersion, Failure<E>> {
    CvrVersion::parse(text).map_err(|e| damaged("version", e))
}

pub(super) fn state<E>(text: &str) -> Result<StateVersion, Failure<E>> {
    StateVersion::parse(text).map_err(|e| damaged("state version", e))
}

/// A row record of its stored parts.
pub(super) fn record<E>(
    id: Arc<RowIdentity>,
    row_version: &str,
    patch_version: &str,
    ref_counts: Option<RefCounts>,
) -> Result<RowRecord, Failure<E>> {
    let row_version =
        StateVersion::parse(row_version).map_err(|e| damaged(format!("row {id}"), e))?;
    Ok(RowRecord { id, row_version, patch_version: version(patch_version)?, ref_counts })
}

/// Whether a group is loaded from another server's hands (spec §2.5 step 3).
///
/// # Errors
/// The group is a tombstone, or its owner's connection is later than ours.
pub(super) fn takes_over(
    deleted: bool,
    owner: Option<&Arc<str>>,
    granted_ms: f64,
    connect_ms: f64,
    task_id: &str,
) -> Answer<bool> {
    if deleted {
        let why = "Client has been purged due to inactivity".to_owned();
        return Err(CvrStoreError::ClientNotFound(why));
    }
    let foreign = owner.is_none_or(|owner| **owner != *task_id);
    if foreign && granted_ms > connect_ms {
        let owner = owner.cloned().unwrap_or_default();
        return Err(CvrStoreError::Ownership { owner, granted_ms, connect_ms });
    }
    Ok(foreign)
}

/// The client schema of its stored text.
pub(super) fn client_schema(json: Option<&str>) -> Answer<Option<Arc<ClientSchema>>> {
    let parse = |json| match ClientSchema::parse(json) {
        Ok(schema) => Ok(Arc::new(schema)),
        Err(e) => Err(CvrStoreError::InvalidClientSchema(e.to_string())),
    };
    json.map(parse).transpose()
}

/// The inspector's list (spec §2.9). `stored` gives a query, removed ones too, and its rows.
pub(super) fn inspected<'a>(
    desires: Vec<StoredDesire>,
    client: Option<&ClientId>,
    clock: TtlClock,
    stored: impl Fn(&QueryHash) -> (Option<&'a Query>, u64),
) -> Vec<InspectedQuery> {
    let mut list = Vec::new();
    for desire in desires {
        let ttl_ms = desire.ttl_ms.unwrap_or(DEFAULT_TTL_MS);
        let over = desire.inactivated_at.is_some_and(|at| at.plus(ttl_ms) <= clock);
        if over || client.is_some_and(|c| *c != desire.client) {
            continue;
        }
        let (query, rows) = stored(&desire.query);
        let (ast, name, args) = match query.map(|q| &q.body) {
            None => (None, None, None),
            Some(QueryBody::Custom { name, args }) => {
                (None, Some(name.clone()), Some(args.clone()))
            }
            Some(QueryBody::Client { ast } | QueryBody::Internal { ast }) => {
                (Some(ast.clone()), None, None)
            }
        };
        list.push(InspectedQuery {
            rows,
            got: query.is_some_and(Query::is_got),
            client: desire.client,
            query: desire.query,
            ttl_ms,
            inactivated_at: desire.inactivated_at,
            ast,
            deleted: desire.deleted,
            name,
            args,
        });
    }
    list.sort_by(|a, b| (&a.client, &a.query).cmp(&(&b.client, &b.query)));
    list
}
