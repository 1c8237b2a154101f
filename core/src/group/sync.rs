//! Queries come and go: bringing what runs in line with what the CVR wants
//! (spec: view-syncer-cvr §5.2, §5.6).
//!
//! transform → ask the endpoint → read row records → scan for late clients → hydrate → compute
//! the update in one go → flush → poke.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::config::bug;
use super::context::Credentials;
use super::interface::{Effect, Hydrate, Missed, Transformed};
use super::machine::{Cx, Group, Pipeline, no_auth_state};
use super::op::{
    Asked, Failure, Flushing, Mode, Recipients, Stage, Step, StepResult, Sync, Trigger,
};
use super::pending::Pending;
use super::poke::{Encoder, Frame, Poke};
use super::{ConnId, SharedDelta};
use crate::cvr::store::CatchupRange;
use crate::cvr::{
    ClientSchema, Cvr, Executed, Patch, Query, QueryBody, QueryHash, QueryUpdater, ReceivedRow,
    RefCounts, RowIdentity, VersionedPatch, catchup, client_schema, is_expired,
};
use crate::ivm::engine::InstanceId;
use crate::json::RawJson;
use crate::protocol::custom_query::{
    ErroredQuery, QueryErrorKind, TransformRequest, TransformResponse, TransformResult,
};
use crate::protocol::down;
use crate::protocol::error::{ApiFailure, ErrorBody, ErrorKind};
use crate::version::CvrVersion;

type HydrateResults = Vec<(QueryHash, Result<InstanceId, String>)>;

impl Group {
    // ---- bring-up ---------------------------------------------------------------------------

    pub(super) fn begin_bring_up(&mut self, cx: &mut Cx<'_>) -> StepResult {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let ours = cx.world.replica_version();
        if let Some(theirs) = cvr.replica_version.as_ref().filter(|theirs| *theirs > ours)
            && cvr.version.state.as_str() != "00"
        {
            let text = format!("Cannot sync from older replica: CVR={theirs}, DB={ours}");
            return Err(Box::new(ErrorBody::basic(ErrorKind::ClientNotFound, text)).into());
        }
        let schema =
            cvr.client_schema.clone().ok_or_else(|| bug("the CVR has no client schema"))?;
        check_schema(&schema, self, cx)?;
        if *cx.world.version() < cvr.version.state {
            self.behind = true;
            return Ok(Step::Done);
        }
        let background = self.contexts.background()?;
        if *cx.world.version() == cvr.version.state {
            return self.begin_unchanged(background, cx);
        }
        self.begin_sync(Trigger::Shared, Mode::Missing, None, cx)
    }

    /// Queries that may run as they did when the CVR was written: same version, same
    /// transformation. They are attached without touching the CVR.
    fn begin_unchanged(&mut self, background: ConnId, cx: &mut Cx<'_>) -> StepResult {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let custom: Vec<QueryHash> = candidates(cvr)
            .filter(|q| matches!(q.body, QueryBody::Custom { .. }))
            .map(|q| q.id.clone())
            .collect();
        if custom.is_empty() || !self.settings.has_query_endpoint {
            let asked = self.ask(background, Vec::new())?;
            return self.hydrate_unchanged(&asked.credentials, &BTreeMap::new(), cx);
        }
        let asked = self.ask(background, custom)?;
        let queries = requests(cvr, &asked.queries)?;
        cx.emit(Effect::Transform { credentials: asked.credentials.clone(), queries });
        Ok(Step::Wait(Stage::TransformingUnchanged { asked }))
    }

    pub(super) fn unchanged_transformed(
        &mut self,
        asked: Asked,
        result: Result<TransformResponse, ApiFailure>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let mut made = BTreeMap::new();
        // A failure is ignored here: the sync that follows asks again, and reports it.
        if self
            .check_answer(asked.conn, asked.revision, &result, "transform", &asked.queries, cx)
            .is_ok()
            && let Ok(TransformResponse::Queries { queries, .. }) = result
        {
            for result in queries {
                if let Ok(Some((id, transformed))) = self.custom_result(&asked, result, cx) {
                    made.insert(id, transformed);
                }
            }
        }
        self.hydrate_unchanged(&asked.credentials, &made, cx)
    }

    fn hydrate_unchanged(
        &mut self,
        credentials: &Credentials,
        custom: &BTreeMap<QueryHash, Transformed>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let mut wanted = Vec::new();
        for query in candidates(cvr) {
            let transformed = match &query.body {
                QueryBody::Custom { .. } => custom.get(&query.id).cloned(),
                QueryBody::Client { ast } => cx.world.transform(ast, false, Some(credentials)).ok(),
                QueryBody::Internal { ast } => cx.world.transform(ast, true, None).ok(),
            };
            let Some(transformed) = transformed else { continue };
            if query.transformation_hash.as_ref() == Some(&transformed.hash) {
                wanted.push((query.id.clone(), transformed));
            }
        }
        if wanted.is_empty() {
            return self.begin_sync(Trigger::Shared, Mode::Missing, None, cx);
        }
        let requests = self.hydrations(&wanted);
        cx.emit(Effect::Hydrate(requests));
        Ok(Step::Wait(Stage::HydratingUnchanged { wanted }))
    }

    pub(super) fn unchanged_hydrated(
        &mut self,
        wanted: Vec<(QueryHash, Transformed)>,
        results: HydrateResults,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let still = *cx.world.version() == cvr.version.state;
        let hashes: BTreeMap<_, _> = wanted.into_iter().map(|(id, t)| (id, t.hash)).collect();
        let mut dropped = Vec::new();
        for (id, result) in results {
            let Ok(instance) = result else { continue };
            let stored = cvr.query(&id).and_then(|q| q.signature);
            let drift = match (stored, cx.world.signature(instance)) {
                (Some(stored), Ok(new)) if stored != new => Some((stored, new)),
                _ => None,
            };
            if let Some((prior, new)) = drift.filter(|_| still) {
                cx.out.push(Effect::Note(super::Note::Warn(format!(
                    "group {}: row-set signature of query {id} drifted: prior={prior:x} \
                     new={new:x}; it is executed again",
                    self.id
                ))));
            }
            match hashes.get(&id) {
                Some(hash) if still && drift.is_none() => {
                    let pipeline = Pipeline { instance, hash: hash.clone() };
                    self.pipelines.insert(id, pipeline);
                }
                _ => dropped.push(instance),
            }
        }
        self.pending = Pending::at(cx.world.version().clone());
        let result = self.begin_sync(Trigger::Shared, Mode::Missing, None, cx);
        // Only now: the sync may have subscribed to the same instances again.
        dropped.into_iter().for_each(|instance| cx.emit(Effect::Release(instance)));
        result
    }

    // ---- sync -------------------------------------------------------------------------------

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
        let checked =
            self.check_answer(asked.conn, asked.revision, &result, "transform", &asked.queries, cx);
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
    fn custom_result(
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
        if self.needs_update(&sync) {
            return self.sync_read(trigger, sync, cx);
        }
        self.sync_catch_up(trigger, sync, cx)
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

    fn hydrations(&self, queries: &[(QueryHash, Transformed)]) -> Vec<Hydrate> {
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
        if !sync.records_read {
            // Deltas arrived while the store was scanned: once more, with the records.
            return self.sync_read(trigger, sync, cx);
        }
        let (rows, undeliverable) = self.collect_rows(&mut sync, &instances, cx)?;
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
        patches.extend(update.received(rows, &sync.records)?);
        patches.extend(update.delete_unreferenced_rows(&sync.records)?);

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

    /// Rows of added queries, and what changed in the others since the last update.
    fn collect_rows(
        &mut self,
        sync: &mut Sync,
        instances: &BTreeMap<QueryHash, InstanceId>,
        cx: &mut Cx<'_>,
    ) -> Result<(Vec<ReceivedRow>, Vec<ErroredQuery>), Failure> {
        let mut undeliverable = Vec::new();
        let mut rows = Received::default();
        for (id, instance) in instances {
            let mut batch = Vec::new();
            let tables = &self.settings.tables;
            let mut problem = None;
            let read = cx.world.rows(*instance, &mut |table, row, count| {
                if problem.is_none() {
                    problem = SharedDelta::check(tables, table, row).err();
                }
                batch.push((Arc::new(RowIdentity::of(table, row)), row.clone(), count));
            });
            match read.err().or(problem) {
                None => {
                    for (row_id, row, count) in batch {
                        let count = i64::try_from(count).unwrap_or(i64::MAX);
                        rows.add(&row_id, Some(&row), id, count);
                    }
                }
                Some(why) => {
                    let query = self.cvr.as_ref().and_then(|cvr| cvr.query(id));
                    match query {
                        Some(query) if !query.is_internal() => {
                            undeliverable.push(failed_query(query, why));
                        }
                        _ => return Err(bug(&format!("query {id}: {why}"))),
                    }
                    sync.additions.retain(|(added, _)| added != id);
                    sync.removals.push(id.clone());
                    cx.emit(Effect::Release(*instance));
                }
            }
        }
        let touched: BTreeSet<&QueryHash> =
            sync.additions.iter().map(|(id, _)| id).chain(&sync.removals).collect();
        for row in self.pending.take_rows() {
            for change in row.counts.iter().filter(|c| !touched.contains(&c.query)) {
                rows.add(&row.id, row.row.as_ref(), &change.query, change.after - change.before);
            }
        }
        Ok((rows.0, undeliverable))
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

    /// Adds what late clients missed, with rows as they are now.
    fn add_missed(
        &mut self,
        poke: &mut Poke,
        missed: Missed,
        update: &[VersionedPatch],
        cx: &mut Cx<'_>,
    ) -> Result<(), Failure> {
        if missed.rows.is_empty() && missed.config.is_empty() {
            return Ok(());
        }
        // The scan saw the records before the update: what the update says of a row is newer.
        let rewritten: BTreeSet<&RowIdentity> = update
            .iter()
            .filter_map(|p| match &p.patch {
                Patch::RowPut(id, _) | Patch::RowDel(id) => Some(&**id),
                _ => None,
            })
            .collect();
        let mut patches = Vec::with_capacity(missed.rows.len());
        for record in missed.rows.iter().filter(|r| !rewritten.contains(&*r.id)) {
            let mut failed = None;
            let patch = catchup::row_patch(record, |id| {
                cx.world.read_row(id).unwrap_or_else(|why| {
                    failed = Some(why);
                    None
                })
            });
            match patch {
                Ok(patch) => patches.push(patch),
                Err(missing) => {
                    // The clients cannot have what the replica does not have.
                    let why = failed.unwrap_or_else(|| missing.to_string());
                    cx.warn(format!("group {}: {why}", self.id));
                    patches.push(VersionedPatch {
                        patch: Patch::RowDel(record.id.clone()),
                        to_version: record.patch_version.clone(),
                    });
                }
            }
        }
        patches.extend(catchup::config_patches(missed.config));
        poke.extend(&self.encoder(cx), &patches)
            .map_err(|e| Failure::from(Box::new(ErrorBody::internal(e.to_string()))))
    }

    fn encoder<'a>(&'a self, cx: &'a Cx<'_>) -> Encoder<'a> {
        Encoder {
            tables: &self.settings.tables,
            group: self.id.as_str(),
            schema: cx.world.schema(),
        }
    }

    pub(super) fn encode(&self, patches: &[VersionedPatch], cx: &Cx<'_>) -> Result<Poke, Failure> {
        let mut poke = Poke::default();
        poke.extend(&self.encoder(cx), patches).map_err(|e| bug(&e.to_string()))?;
        Ok(poke)
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
            self.contexts.retransform_at_ms = Some(cx.now_ms + self.settings.retransform_ms);
        }
        self.poke(&poke, &before, recipients, cx);
        self.acknowledge(ack, cx);
        Ok(Step::Done)
    }

    /// Sends a poke that ends at the CVR's version.
    pub(super) fn poke(
        &mut self,
        poke: &Poke,
        before: &CvrVersion,
        recipients: Recipients,
        cx: &mut Cx<'_>,
    ) {
        let Some(version) = self.cvr.as_ref().map(|cvr| cvr.version.clone()) else { return };
        let mut frames = poke.frames(&version);
        for (conn, client) in self.clients.iter_mut().filter(|(_, c)| c.active) {
            let base = client.base.as_ref();
            let (taken, forced) = match recipients {
                Recipients::All => (true, !client.ever_poked),
                // A new client counts as being at `00`.
                Recipients::AtHead => (base.unwrap_or(&CvrVersion::empty()) == before, false),
            };
            if !taken || base.is_some_and(|base| *base > version) {
                continue;
            }
            let frames = frames.of(base, client.binary, forced);
            if frames.is_empty() {
                continue;
            }
            client.base = Some(version.clone());
            client.ever_poked = true;
            cx.out.push(Effect::Send(*conn, frames));
        }
    }

    /// Tells the clients that have these queries why they failed.
    pub(super) fn tell_errored(&mut self, errored: &[ErroredQuery], cx: &mut Cx<'_>) {
        let Some(cvr) = self.cvr.as_ref().filter(|_| !errored.is_empty()) else { return };
        let mut sends = Vec::new();
        for (conn, client) in self.clients.iter().filter(|(_, c)| c.active) {
            let theirs: Vec<ErroredQuery> = errored
                .iter()
                .filter(|e| {
                    cvr.query(&QueryHash::from(e.id.as_str()))
                        .is_some_and(|q| q.client_state.contains_key(&client.id))
                })
                .cloned()
                .collect();
            if !theirs.is_empty() {
                sends.push((*conn, Frame::text(down::transform_error(&theirs))));
            }
        }
        for error in errored {
            let text = error.message.as_deref().unwrap_or("refused by the app");
            cx.warn(format!("group {}: query {} ({}): {text}", self.id, error.id, error.name));
        }
        for (conn, frame) in sends {
            self.send(conn, vec![frame], cx);
        }
    }
}

/// Rows of several queries, one entry per row.
#[derive(Default)]
struct Received(Vec<ReceivedRow>, FxHashMap<Arc<RowIdentity>, usize>);

impl Received {
    fn add(
        &mut self,
        id: &Arc<RowIdentity>,
        row: Option<&Arc<crate::row::Row>>,
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

/// Got queries that some client wants, and internal ones, executed before.
fn candidates(cvr: &Cvr) -> impl Iterator<Item = &Arc<Query>> {
    cvr.queries.values().filter(|q| {
        q.transformation_hash.is_some() && (q.is_internal() || (q.is_got() && q.is_active()))
    })
}

fn check_schema(schema: &ClientSchema, group: &Group, cx: &Cx<'_>) -> Result<(), Failure> {
    let settings = &group.settings;
    schema.check(cx.world.schema(), &settings.app_id, settings.shard_num).map_err(|mismatch| {
        let kind = match mismatch {
            client_schema::SchemaMismatch::NothingSynced => ErrorKind::Internal,
            client_schema::SchemaMismatch::Unsupported(_) => ErrorKind::SchemaVersionNotSupported,
        };
        Box::new(ErrorBody::basic(kind, mismatch.to_string())).into()
    })
}

/// Requests for the endpoint.
fn requests(cvr: &Cvr, queries: &[QueryHash]) -> Result<Vec<TransformRequest>, Failure> {
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
