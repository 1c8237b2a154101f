//! Queries come and go: bringing what runs in line with what the CVR wants
//! (spec: view-syncer-cvr §5.2, §5.6).
//!
//! transform → ask the endpoint → read row records → scan for late clients → hydrate → compute
//! the update ([`super::compute`]) → flush → poke.
//!
//! Row records are read only where the instances cannot say what the records say
//! ([`Group::knows_rows`], [`super::unread`]): when a group comes up and its queries have other
//! rows than before, or when a running query is executed anew. A query that is added or removed
//! reads nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::compute::SLICE_ROWS;
use super::config::bug;
use super::deliver::Missed;
use super::interface::{Effect, Hydrate, Transformed};
use super::machine::{Cx, Group, no_auth_state};
use super::op::{
    Asked, Failure, Flushing, Mode, Recipients, Stage, Step, StepResult, Sync, Trigger,
};
use super::poke::Poke;
use crate::cvr::store::{CatchupRange, RowCursor};
use crate::cvr::{Cvr, Query, QueryBody, QueryHash, is_expired};
use crate::ivm::engine::InstanceId;
use crate::json::RawJson;
use crate::protocol::custom_query::{
    ErroredQuery, QueryErrorKind, TransformRequest, TransformResponse, TransformResult,
};
use crate::protocol::error::ApiFailure;

pub(super) type HydrateResults = Vec<(QueryHash, Result<InstanceId, String>)>;

impl Group {
    pub(super) fn begin_evict(&mut self, cx: &mut Cx<'_>) -> StepResult {
        let clock = self.flush_times(cx.now_ms).ttl_clock;
        let expired =
            self.cvr.as_ref().is_some_and(|cvr| cvr.queries.values().any(|q| is_expired(q, clock)));
        if !expired {
            return Ok(Step::Done);
        }
        self.begin_sync(Trigger::Shared, Mode::Missing, None, cx)
    }

    /// Starts to bring the running queries in line.
    pub(super) fn begin_sync(
        &mut self,
        trigger: Trigger,
        mode: Mode,
        ack: Option<Vec<String>>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let sync = Sync { mode, ack, ..self.empty_sync() };
        self.sync_transform(trigger, Box::new(sync), cx)
    }

    pub(super) fn sync_transform(
        &mut self,
        trigger: Trigger,
        mut sync: Box<Sync>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        // Who asked may have left since its change was written: the others are still there.
        let conn = match trigger.conn().filter(|conn| self.contexts.get(*conn).is_some()) {
            Some(conn) => conn,
            None => self.contexts.background()?,
        };
        let credentials =
            self.contexts.get(conn).ok_or_else(no_auth_state)?.connection.credentials.clone();
        let clock = self.flush_times(cx.now_ms).ttl_clock;
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let mut ask = Vec::new();
        let mut cached = Vec::new();
        for query in cvr.queries.values() {
            let runs = self.pipelines.contains_key(&query.id);
            if runs && (sync.mode == Mode::Missing || query.is_internal()) {
                continue;
            }
            let transformed = match &query.body {
                QueryBody::Client { ast } => cx.world.transform(ast, false, Some(&credentials)),
                QueryBody::Internal { ast } => cx.world.transform(ast, true, None),
                QueryBody::Custom { .. } if is_expired(query, clock) => continue,
                QueryBody::Custom { .. } => {
                    let key: Arc<str> = query.id.as_str().into();
                    match self.cache.get(&key, &credentials, cx.now_ms) {
                        Some(known) => cached.push((query.id.clone(), known)),
                        None => ask.push(query.id.clone()),
                    }
                    continue;
                }
            };
            match transformed {
                Ok(transformed) => sync.transformed.push((query.id.clone(), transformed)),
                Err(why) if query.is_internal() => {
                    return Err(bug(&format!("query {}: {why}", query.id)));
                }
                Err(why) => sync.errored.push(failed_query(query, why)),
            }
        }
        let custom_wanted = !ask.is_empty();
        let asks = custom_wanted && self.settings.has_query_endpoint;
        if asks {
            let queries = requests(cvr, &ask)?;
            let asked = self.ask(conn, ask)?;
            // Freshly transformed ones go before cached ones.
            sync.transformed.extend(cached);
            cx.emit(Effect::Transform { credentials: asked.credentials.clone(), queries });
            return Ok(Step::Wait(Stage::Transforming { sync, asked }));
        }
        if custom_wanted {
            cx.warn(
                "Custom/named queries were requested but no ZERO_QUERY_URL is configured: they \
                 are never executed"
                    .to_owned(),
            );
        }
        sync.transformed.extend(cached);
        self.sync_plan(trigger, sync, cx)
    }

    pub(super) fn sync_transformed(
        &mut self,
        trigger: Trigger,
        mut sync: Box<Sync>,
        asked: Asked,
        result: Result<TransformResponse, ApiFailure>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let checked = self.check_answer(asked.conn, asked.revision, &result, &asked.queries, cx);
        if let Err(failure) = checked {
            // What failed on the way is told; the rest stays as it is.
            self.tell_errored(&sync.errored, cx);
            return Err(failure);
        }
        if let Ok(TransformResponse::Queries { queries, .. }) = result {
            for result in queries {
                match self.custom_result(&asked, result, cx) {
                    Ok(Some(transformed)) => sync.transformed.push(transformed),
                    Ok(None) => {}
                    Err(errored) => sync.errored.push(*errored),
                }
            }
        }
        self.cache.sweep(cx.now_ms);
        self.sync_plan(trigger, sync, cx)
    }

    /// What the endpoint says about one query; `None` for one that was not asked for.
    pub(super) fn custom_result(
        &mut self,
        asked: &Asked,
        result: TransformResult,
        cx: &mut Cx<'_>,
    ) -> Result<Option<(QueryHash, Transformed)>, Box<ErroredQuery>> {
        match result {
            TransformResult::Query { id, name, ast } => {
                let id = QueryHash::from(id);
                if !asked.queries.contains(&id) {
                    return Ok(None);
                }
                let transformed = cx.world.custom(ast.json()).map_err(|why| {
                    let id = id.to_string();
                    Box::new(ErroredQuery {
                        error: QueryErrorKind::Parse,
                        id,
                        name,
                        message: Some(why),
                        details: None,
                    })
                })?;
                let key: Arc<str> = id.as_str().into();
                let with = asked.credentials.clone();
                self.cache.put(key, with, cx.now_ms, transformed.clone());
                Ok(Some((id, transformed)))
            }
            TransformResult::Error(errored) => {
                let known = asked.queries.iter().any(|q| q.as_str() == errored.id);
                if known { Err(Box::new(errored)) } else { Ok(None) }
            }
        }
    }

    /// Decides what is added and removed.
    fn sync_plan(&mut self, trigger: Trigger, mut sync: Box<Sync>, cx: &mut Cx<'_>) -> StepResult {
        self.tell_errored(&sync.errored, cx);
        let clock = self.flush_times(cx.now_ms).ttl_clock;
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let errored: BTreeSet<&str> = sync.errored.iter().map(|e| e.id.as_str()).collect();
        sync.removals = cvr
            .queries
            .values()
            .filter(|q| is_expired(q, clock) || errored.contains(q.id.as_str()))
            .map(|q| q.id.clone())
            .collect();
        let removed: BTreeSet<&QueryHash> = sync.removals.iter().collect();
        let mut seen = BTreeSet::new();
        for (id, transformed) in std::mem::take(&mut sync.transformed) {
            let runs = self.pipelines.get(&id).is_some_and(|p| p.hash == transformed.hash);
            let wanted = cvr.queries.contains_key(&id) && !removed.contains(&id);
            if wanted && !runs && seen.insert(id.clone()) {
                sync.additions.push((id, transformed));
            }
        }
        let reads = self.needs_update(&sync) && !self.knows_rows(&sync, cx);
        if reads && !self.may_be_as_it_was(&sync, cx) {
            return self.sync_read(trigger, sync, cx);
        }
        self.sync_catch_up(trigger, sync, cx)
    }

    /// The instances know all that the row records could tell about this change: everything that
    /// was ever executed runs, and what is to be executed never was. A new group is up in this
    /// sense: it has no records.
    pub(super) fn knows_rows(&self, sync: &Sync, cx: &Cx<'_>) -> bool {
        let Some(cvr) = self.cvr.as_ref() else { return false };
        let executed = |q: &Query| q.transformation_hash.is_some();
        let runs = |id: &QueryHash| {
            self.pipelines.get(id).is_some_and(|p| cx.world.signature(p.instance).is_ok())
        };
        (self.synced || !cvr.may_have_rows())
            && !self.pending.has_failed()
            && cvr.queries.values().all(|q| !executed(q) || runs(&q.id))
            && sync.additions.iter().all(|(id, _)| cvr.query(id).is_some_and(|q| !executed(q)))
    }

    /// Reads the group's row records, unless it has none.
    pub(super) fn sync_read(
        &mut self,
        trigger: Trigger,
        mut sync: Box<Sync>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        sync.records_read = true;
        if self.cvr.as_ref().is_some_and(Cvr::may_have_rows) {
            return self.read_rows(sync, None, cx);
        }
        self.sync_catch_up(trigger, sync, cx)
    }

    /// Asks for a page of row records.
    pub(super) fn read_rows(
        &mut self,
        sync: Box<Sync>,
        from: Option<RowCursor>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let executed = cvr.queries.values().filter(|q| q.transformation_hash.is_some());
        let queries = executed.map(|q| q.id.clone()).collect();
        cx.emit(Effect::ReadRows { current: cvr.version.clone(), queries, from });
        Ok(Step::Wait(Stage::ReadingRows(sync)))
    }

    /// The CVR's results change, or have to: a late client must not get rows of a newer version
    /// under an older cookie, and whether a row that was not there is lost or has just gone is for
    /// an update with the deltas to say. (Otherwise pending deltas are left to an advance, which
    /// reads nothing.)
    pub(super) fn needs_update(&self, sync: &Sync) -> bool {
        let late = || self.cvr.as_ref().is_some_and(|cvr| self.late_clients(cvr).is_some());
        sync.recipients == Recipients::AtHead
            || !sync.additions.is_empty()
            || !sync.removals.is_empty()
            || (!self.pending.is_empty() && (sync.records_read || sync.missed.has_lost() || late()))
    }

    fn has_clients_at_head(&self) -> bool {
        let head = self.cvr.as_ref().map(|cvr| &cvr.version);
        self.clients.values().any(|c| c.active && c.base.as_ref() == head)
    }

    pub(super) fn late_clients(&self, cvr: &Cvr) -> Option<CatchupRange> {
        let lowest = self.clients.values().filter(|c| c.active).map(|c| c.base.clone()).min()?;
        let range = CatchupRange {
            group: self.id.clone(),
            after: lowest,
            up_to: cvr.version.clone(),
            current: cvr.version.clone(),
        };
        (!range.is_empty()).then_some(range)
    }

    pub(super) fn sync_catch_up(
        &mut self,
        trigger: Trigger,
        mut sync: Box<Sync>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        if let Some(range) = self.late_clients(cvr).filter(|_| cvr.stored) {
            let except: Vec<_> = sync.additions.iter().map(|(id, _)| id.clone()).collect();
            sync.missed = Missed::of(range.clone(), except.clone());
            cx.emit(Effect::CatchUp { range, except, from: None });
            return Ok(Step::Wait(Stage::CatchingUp(sync)));
        }
        self.sync_hydrate(trigger, sync, cx)
    }

    pub(super) fn sync_hydrate(
        &mut self,
        trigger: Trigger,
        mut sync: Box<Sync>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        if sync.additions.is_empty() {
            return self.sync_compute(trigger, sync, BTreeMap::new(), cx);
        }
        sync.early = !sync.records_read && self.has_clients_at_head() && self.knows_rows(&sync, cx);
        let requests = self.hydrations(&sync.additions, sync.early);
        cx.emit(Effect::Hydrate(requests));
        Ok(Step::Wait(Stage::Hydrating(sync)))
    }

    pub(super) fn hydrations(
        &self,
        queries: &[(QueryHash, Transformed)],
        early: bool,
    ) -> Vec<Hydrate> {
        let Some(cvr) = &self.cvr else { return Vec::new() };
        let is_internal = |id: &QueryHash| cvr.query(id).is_some_and(|q| q.is_internal());
        queries
            .iter()
            .map(|(query, transformed)| Hydrate {
                query: query.clone(),
                transformed: transformed.clone(),
                client_schema: cvr.client_schema.clone(),
                early: early && !is_internal(query),
            })
            .collect()
    }

    pub(super) fn sync_hydrated(
        &mut self,
        trigger: Trigger,
        mut sync: Box<Sync>,
        results: HydrateResults,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let mut instances = BTreeMap::new();
        let mut failed = Vec::new();
        let mut cannot_serve = None;
        for (id, result) in results {
            match result {
                Ok(instance) => {
                    instances.insert(id, instance);
                }
                Err(why) => match cvr.query(&id) {
                    Some(query) if query.is_internal() => {
                        cannot_serve = Some(bug(&format!("query {id}: {why}")));
                    }
                    Some(query) => failed.push(failed_query(query, why)),
                    None => {}
                },
            }
        }
        if cannot_serve.is_some() || !failed.is_empty() {
            self.cancel_open_poke(cx);
        }
        if let Some(failure) = cannot_serve {
            instances.into_values().for_each(|instance| cx.emit(Effect::Release(instance)));
            return Stage::Hydrating(sync).failed(failure, cx);
        }
        sync.additions.retain(|(id, _)| instances.contains_key(id));
        sync.removals.extend(failed.iter().map(|e| QueryHash::from(e.id.as_str())));
        self.tell_errored(&failed, cx);
        self.sync_compute(trigger, sync, instances, cx)
    }

    /// Nothing runs that did not: late clients get what they missed, new ones their first poke.
    pub(super) fn catch_up_only(&mut self, mut sync: Box<Sync>, cx: &mut Cx<'_>) -> StepResult {
        let (missed, lost) = std::mem::take(&mut sync.missed).into_patches();
        if let Some(lost) = lost.first() {
            self.lost_rows(lost, cx);
        }
        cx.leave(|waste| waste.rows(lost));
        if missed.iter().map(Vec::len).sum::<usize>() > SLICE_ROWS {
            return self.encode_missed(sync, missed, cx);
        }
        let mut poke = Poke::default();
        for slice in &missed {
            poke.extend(&self.encoder(cx), slice).map_err(|e| bug(&e.to_string()))?;
        }
        let Sync { ack, bring_up, recipients, .. } = *sync;
        let end = Poke::default();
        self.results_flushed(Flushing { cvr: None, poke, end, recipients, ack, bring_up }, cx)
    }

    /// Results are durable: poke.
    pub(super) fn results_flushed(&mut self, flushing: Flushing, cx: &mut Cx<'_>) -> StepResult {
        let Flushing { cvr, poke, end, recipients, ack, bring_up } = flushing;
        let before = match cvr {
            Some(cvr) => self.adopt(cvr, cx),
            None => self.cvr.as_ref().map(|cvr| cvr.version.clone()).unwrap_or_default(),
        };
        if bring_up {
            self.synced = true;
            self.compare_all = false;
            self.contexts.retransform_at_ms = Some(cx.now_ms + self.settings.retransform_ms);
        }
        self.end_open_poke(&end, cx);
        self.poke(&poke, &before, recipients, cx);
        cx.leave(|waste| {
            poke.discard(waste);
            end.discard(waste);
        });
        self.acknowledge(ack, cx);
        Ok(Step::Done)
    }
}

/// Requests for the endpoint.
pub(super) fn requests(cvr: &Cvr, queries: &[QueryHash]) -> Result<Vec<TransformRequest>, Failure> {
    let mut requests = Vec::with_capacity(queries.len());
    for id in queries {
        let Some(QueryBody::Custom { name, args }) = cvr.query(id).map(|q| &q.body) else {
            continue;
        };
        let args: Vec<RawJson> = serde_json::from_str(args)
            .map_err(|e| bug(&format!("stored arguments of query {id}: {e}")))?;
        requests.push(TransformRequest { id: id.to_string(), name: name.to_string(), args });
    }
    Ok(requests)
}

/// A query that cannot be executed, as its clients are told (decision 5).
pub(super) fn failed_query(query: &Query, why: String) -> ErroredQuery {
    let name = match &query.body {
        QueryBody::Custom { name, .. } => name.to_string(),
        QueryBody::Client { ast } | QueryBody::Internal { ast } => ast.table.clone(),
    };
    ErroredQuery {
        error: QueryErrorKind::App,
        id: query.id.to_string(),
        name,
        message: Some(why),
        details: None,
    }
}
