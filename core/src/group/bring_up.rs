//! A group comes up: the CVR against the replica, and queries that run as they did before
//! (spec: view-syncer-cvr §5.2, §5.6 hydrateUnchanged).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ConnId;
use super::config::bug;
use super::context::Credentials;
use super::interface::{Effect, Note, Transformed};
use super::machine::{Cx, Group, Pipeline};
use super::op::{Asked, Failure, Mode, Stage, Step, StepResult, Trigger};
use super::pending::Pending;
use super::sync::{HydrateResults, requests};
use crate::client_schema::{ClientSchema, SchemaMismatch};
use crate::cvr::{Cvr, Query, QueryBody, QueryHash};
use crate::protocol::custom_query::TransformResponse;
use crate::protocol::error::{ApiFailure, ErrorBody, ErrorKind};

impl Group {
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
        if *cx.world.version() == cvr.version.state && !self.compare_all {
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
        if self.check_answer(asked.conn, asked.revision, &result, &asked.queries, cx).is_ok()
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
        let requests = self.hydrations(&wanted, false);
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
                cx.out.push(Effect::Note(Note::Warn(format!(
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
            SchemaMismatch::NothingSynced => ErrorKind::Internal,
            SchemaMismatch::Unsupported(_) => ErrorKind::SchemaVersionNotSupported,
        };
        Box::new(ErrorBody::basic(kind, mismatch.to_string())).into()
    })
}
