//! Queries come and go: bringing what runs in line with what the CVR wants
//! (spec: view-syncer-cvr §5.2, §5.6).
//!
//! transform → ask the endpoint → read row records → scan for late clients → hydrate → compute
//! the update in one go → flush → poke.
//!
//! Row records are read only where the instances cannot say what the records say
//! ([`Group::knows_rows`]): when a group comes up with queries that ran before, or when a running
//! query is executed anew. A query that is added or removed reads nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::SharedDelta;
use super::config::bug;
use super::interface::{Effect, Hydrate, Transformed};
use super::machine::{Cx, Group, Pipeline, no_auth_state};
use super::op::{
    Asked, Failure, Flushing, Mode, Recipients, Stage, Step, StepResult, Sync, Trigger,
};
use super::pending::Pending;
use super::poke::Poke;
use crate::cvr::advance::{AdvancedRow, CountChange};
use crate::cvr::store::CatchupRange;
use crate::cvr::{
    Cvr, Executed, Query, QueryBody, QueryHash, QueryUpdater, ReceivedRow, RefCounts, RowIdentity,
    is_expired,
};
use crate::ivm::engine::InstanceId;
use crate::json::RawJson;
use crate::protocol::custom_query::{
    ErroredQuery, QueryErrorKind, TransformRequest, TransformResponse, TransformResult,
};
use crate::protocol::error::ApiFailure;
use crate::row::Row;
use crate::version::CvrVersion;

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
        let conn = match trigger.conn() {
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
        if self.needs_update(&sync) && !self.knows_rows(&sync, cx) {
            return self.sync_read(trigger, sync, cx);
        }
        self.sync_catch_up(trigger, sync, cx)
    }

    /// The instances know all that the row records could tell about this change: everything that
    /// was ever executed runs, and what is to be executed never was.
    fn knows_rows(&self, sync: &Sync, cx: &Cx<'_>) -> bool {
        let Some(cvr) = self.cvr.as_ref() else { return false };
        let executed = |q: &Query| q.transformation_hash.is_some();
        let runs = |id: &QueryHash| {
            self.pipelines.get(id).is_some_and(|p| cx.world.signature(p.instance).is_ok())
        };
        self.synced
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
        if let Some(cvr) = self.cvr.as_ref().filter(|cvr| cvr.may_have_rows()) {
            let executed = cvr.queries.values().filter(|q| q.transformation_hash.is_some());
            let queries = executed.map(|q| q.id.clone()).collect();
            cx.emit(Effect::ReadRows { current: cvr.version.clone(), queries });
            return Ok(Step::Wait(Stage::ReadingRows(sync)));
        }
        self.sync_catch_up(trigger, sync, cx)
    }

    /// The CVR's results change, or have to: a late client must not get rows of a newer version
    /// under an older cookie. (Without late clients pending deltas are left to an advance, which
    /// reads nothing.)
    fn needs_update(&self, sync: &Sync) -> bool {
        let late = || self.cvr.as_ref().is_some_and(|cvr| self.late_clients(cvr).is_some());
        !sync.additions.is_empty()
            || !sync.removals.is_empty()
            || (!self.pending.is_empty() && (sync.records_read || late()))
    }

    fn late_clients(&self, cvr: &Cvr) -> Option<CatchupRange> {
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
        sync: Box<Sync>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        if let Some(range) = self.late_clients(cvr).filter(|_| cvr.stored) {
            let except = sync.additions.iter().map(|(id, _)| id.clone()).collect();
            cx.emit(Effect::CatchUp { range, except });
            return Ok(Step::Wait(Stage::CatchingUp(sync)));
        }
        self.sync_hydrate(trigger, sync, cx)
    }

    pub(super) fn sync_hydrate(
        &mut self,
        trigger: Trigger,
        sync: Box<Sync>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        if sync.additions.is_empty() {
            return self.sync_compute(trigger, sync, BTreeMap::new(), cx);
        }
        let requests = self.hydrations(&sync.additions);
        cx.emit(Effect::Hydrate(requests));
        Ok(Step::Wait(Stage::Hydrating(sync)))
    }

    pub(super) fn hydrations(&self, queries: &[(QueryHash, Transformed)]) -> Vec<Hydrate> {
        let client_schema = self.cvr.as_ref().and_then(|cvr| cvr.client_schema.clone());
        queries
            .iter()
            .map(|(query, transformed)| Hydrate {
                query: query.clone(),
                transformed: transformed.clone(),
                client_schema: client_schema.clone(),
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
        for (id, result) in results {
            match result {
                Ok(instance) => {
                    instances.insert(id, instance);
                }
                Err(why) => match cvr.query(&id) {
                    Some(query) if query.is_internal() => {
                        return Err(bug(&format!("query {id}: {why}")));
                    }
                    Some(query) => failed.push(failed_query(query, why)),
                    None => {}
                },
            }
        }
        sync.additions.retain(|(id, _)| instances.contains_key(id));
        sync.removals.extend(failed.iter().map(|e| QueryHash::from(e.id.as_str())));
        self.tell_errored(&failed, cx);
        self.sync_compute(trigger, sync, instances, cx)
    }

    /// Computes the update at the engine's version, all at once.
    fn sync_compute(
        &mut self,
        trigger: Trigger,
        mut sync: Box<Sync>,
        instances: BTreeMap<QueryHash, InstanceId>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        if !self.needs_update(&sync) {
            return self.catch_up_only(sync, cx);
        }
        if !sync.records_read && !self.knows_rows(&sync, cx) {
            // Deltas arrived while the store was scanned, or something failed: once more, with
            // the records.
            instances.into_values().for_each(|instance| cx.emit(Effect::Release(instance)));
            return self.sync_read(trigger, sync, cx);
        }
        let (batches, undeliverable) = self.hydrated_rows(&mut sync, &instances, cx)?;
        self.tell_errored(&undeliverable, cx);
        let times = self.flush_times(cx.now_ms);
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let mut update = QueryUpdater::new(cvr, cx.world.version(), cx.world.replica_version())?;
        if forced_bump(cvr, &sync, update.version()) {
            update.ensure_new_version();
        }
        let mut patches = Vec::new();
        if !sync.additions.is_empty() || !sync.removals.is_empty() {
            let executed: Vec<Executed> = sync
                .additions
                .iter()
                .map(|(id, t)| Executed { id: id.clone(), transformation_hash: t.hash.clone() })
                .collect();
            patches.extend(update.track_queries(&executed, &sync.removals)?);
        }
        if sync.records_read {
            let rows = self.received(&sync, batches);
            patches.extend(update.received(rows, &sync.records)?);
            patches.extend(update.delete_unreferenced_rows(&sync.records)?);
        } else {
            let rows = self.unread_rows(&sync, batches, cx)?;
            if !rows.is_empty() {
                update.ensure_new_version();
                patches.extend(update.advanced(rows, self.pending.since())?);
            }
        }

        self.install(&sync, &instances, cx);
        self.pending = Pending::at(cx.world.version().clone());
        let pipelines = &self.pipelines;
        let world = &*cx.world;
        let prepared = update
            .finish(times, |id| pipelines.get(id).and_then(|p| world.signature(p.instance).ok()));
        // What was missed is older than what happens now: it goes first.
        let mut poke = Poke::default();
        self.add_missed(&mut poke, std::mem::take(&mut sync.missed), &patches, cx)?;
        poke.extend(&self.encoder(cx), &patches).map_err(|e| bug(&e.to_string()))?;
        let Sync { ack, bring_up, .. } = *sync;
        let recipients = Recipients::All;
        let flushing = |cvr| Flushing { cvr, poke, recipients, ack, bring_up };
        match prepared {
            Some(prepared) => {
                cx.emit(Effect::Flush(Box::new(prepared.flush)));
                Ok(Step::Wait(Stage::Flushing(Box::new(flushing(Some(prepared.cvr))))))
            }
            None => self.results_flushed(flushing(None), cx),
        }
    }

    /// Rows of added queries. One with a row that cannot be delivered becomes a removed one.
    fn hydrated_rows(
        &mut self,
        sync: &mut Sync,
        instances: &BTreeMap<QueryHash, InstanceId>,
        cx: &mut Cx<'_>,
    ) -> Result<(Batches, Vec<ErroredQuery>), Failure> {
        let mut batches = Vec::with_capacity(instances.len());
        let mut undeliverable = Vec::new();
        for (id, instance) in instances {
            let mut batch = Vec::new();
            let tables = &self.settings.tables;
            let mut problem = None;
            let read = cx.world.rows(*instance, &mut |table, row, count| {
                if problem.is_none() {
                    problem = SharedDelta::check(tables, table, row).err();
                }
                let count = i64::try_from(count).unwrap_or(i64::MAX);
                batch.push((Arc::new(RowIdentity::of(table, row)), row.clone(), count));
            });
            let Some(why) = read.err().or(problem) else {
                batches.push((id.clone(), batch));
                continue;
            };
            match self.cvr.as_ref().and_then(|cvr| cvr.query(id)) {
                Some(query) if !query.is_internal() => {
                    undeliverable.push(failed_query(query, why));
                }
                _ => return Err(bug(&format!("query {id}: {why}"))),
            }
            sync.additions.retain(|(added, _)| added != id);
            sync.removals.push(id.clone());
            cx.emit(Effect::Release(*instance));
        }
        Ok((batches, undeliverable))
    }

    /// Rows of added queries, and what changed in the others since the last update; the records
    /// know the rest.
    fn received(&mut self, sync: &Sync, batches: Batches) -> Vec<ReceivedRow> {
        let mut rows = Received::default();
        for (query, batch) in batches {
            for (id, row, count) in batch {
                rows.add(&id, Some(&row), &query, count);
            }
        }
        let touched: BTreeSet<&QueryHash> =
            sync.additions.iter().map(|(id, _)| id).chain(&sync.removals).collect();
        for row in self.pending.take_rows() {
            for change in row.counts.iter().filter(|c| !touched.contains(&c.query)) {
                rows.add(&row.id, row.row.as_ref(), &change.query, change.after - change.before);
            }
        }
        rows.0
    }

    /// The same without records: what changed since the last update, rows of added and of removed
    /// queries, and whether other queries have them.
    fn unread_rows(
        &mut self,
        sync: &Sync,
        batches: Batches,
        cx: &mut Cx<'_>,
    ) -> Result<Vec<AdvancedRow>, Failure> {
        let mut rows = self.pending.take_deltas();
        for (query, batch) in batches {
            for (id, row, after) in batch {
                let change = CountChange { query: query.clone(), before: 0, after };
                rows.add_whole(&id, change, &row);
            }
        }
        for query in &sync.removals {
            let Some(pipeline) = self.pipelines.get(query) else { continue };
            let read = cx.world.rows(pipeline.instance, &mut |table, row, count| {
                let before = i64::try_from(count).unwrap_or(i64::MAX);
                let change = CountChange { query: query.clone(), before, after: 0 };
                rows.add_whole(&Arc::new(RowIdentity::of(table, row)), change, row);
            });
            read.map_err(|why| bug(&format!("query {query}: {why}")))?;
        }
        let mut rows = rows.into_rows();
        for row in rows.iter_mut().filter(|row| row.needs_others()) {
            row.others = self.referenced_elsewhere(row, cx)?;
        }
        Ok(rows)
    }

    /// Makes the added queries the running ones.
    fn install(
        &mut self,
        sync: &Sync,
        instances: &BTreeMap<QueryHash, InstanceId>,
        cx: &mut Cx<'_>,
    ) {
        for id in &sync.removals {
            if let Some(old) = self.pipelines.remove(id) {
                cx.emit(Effect::Release(old.instance));
            }
        }
        for (id, transformed) in &sync.additions {
            let Some(instance) = instances.get(id) else { continue };
            let pipeline = Pipeline { instance: *instance, hash: transformed.hash.clone() };
            if let Some(old) = self.pipelines.insert(id.clone(), pipeline) {
                cx.info(format!("group {}: transformation of query {id} changed", self.id));
                cx.emit(Effect::Release(old.instance));
            }
        }
    }

    /// Nothing runs that did not: late clients get what they missed, new ones their first poke.
    fn catch_up_only(&mut self, mut sync: Box<Sync>, cx: &mut Cx<'_>) -> StepResult {
        let mut poke = Poke::default();
        self.add_missed(&mut poke, std::mem::take(&mut sync.missed), &[], cx)?;
        let Sync { ack, bring_up, .. } = *sync;
        let recipients = Recipients::All;
        self.results_flushed(Flushing { cvr: None, poke, recipients, ack, bring_up }, cx)
    }

    /// Results are durable: poke.
    pub(super) fn results_flushed(&mut self, flushing: Flushing, cx: &mut Cx<'_>) -> StepResult {
        let Flushing { cvr, poke, recipients, ack, bring_up } = flushing;
        let before = match cvr {
            Some(cvr) => self.adopt(cvr, cx),
            None => self.cvr.as_ref().map(|cvr| cvr.version.clone()).unwrap_or_default(),
        };
        if bring_up {
            self.synced = true;
            self.compare_all = false;
            self.contexts.retransform_at_ms = Some(cx.now_ms + self.settings.retransform_ms);
        }
        self.poke(&poke, &before, recipients, cx);
        self.acknowledge(ack, cx);
        Ok(Step::Done)
    }
}

/// Rows of queries that were hydrated, with their counts.
type Batches = Vec<(QueryHash, Vec<(Arc<RowIdentity>, Arc<Row>, i64)>)>;

/// Rows of several queries, one entry per row.
#[derive(Default)]
struct Received(Vec<ReceivedRow>, FxHashMap<Arc<RowIdentity>, usize>);

impl Received {
    fn add(
        &mut self,
        id: &Arc<RowIdentity>,
        row: Option<&Arc<Row>>,
        query: &QueryHash,
        count: i64,
    ) {
        let at = *self.1.entry(id.clone()).or_insert_with(|| {
            self.0.push(ReceivedRow { id: id.clone(), row: None, counts: RefCounts::new() });
            self.0.len() - 1
        });
        let received = &mut self.0[at];
        if count != 0 {
            received.counts.add(query, count);
        }
        if let Some(row) = row
            && received.row.as_ref().is_none_or(|known| known.version <= row.version)
        {
            received.row = Some(row.clone());
        }
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

/// A got query is executed again with the same hash, and nothing else moves the version.
fn forced_bump(cvr: &Cvr, sync: &Sync, version: &CvrVersion) -> bool {
    let hash = |id: &QueryHash| cvr.query(id).and_then(|q| q.transformation_hash.clone());
    *version == cvr.version
        && sync.removals.is_empty()
        && !sync.additions.is_empty()
        && sync.additions.iter().all(|(id, t)| hash(id).as_ref() == Some(&t.hash))
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
