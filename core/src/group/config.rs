//! Clients' messages: credentials first, then the configuration of the CVR
//! (spec: sync-protocol §5.3, view-syncer-cvr §5.4).

use std::collections::BTreeSet;
use std::sync::Arc;

use super::interface::{Effect, Event, Timer};
use super::machine::{Cx, Group, TTL_CLOCK_INTERVAL_MS, no_auth_state};
use super::op::{
    AfterConfig, AfterValidation, Asked, Failure, FlushingConfig, Mode, Recipients, Stage, Step,
    StepResult, Task, Trigger, client_ids,
};
use super::poke::Frame;
use super::shared::SharedQueries;
use super::{ConnId, ServerUser};
use crate::cvr::store::{CvrStoreError, RowPage};
use crate::cvr::{
    ClientId, ClientSchema, ConfigUpdater, Cvr, DEFAULT_TTL_MS, DesiredPut, FlushTimes, QueryBody,
    QueryHash, TtlTimer, VersionedPatch,
};
use crate::protocol::custom_query::TransformResponse;
use crate::protocol::down;
use crate::protocol::error::{ApiFailure, ErrorBody, ErrorKind};
use crate::protocol::mutate::CleanUp;
use crate::protocol::up::{InitConnection, QueryOp, QueryPut};
use crate::version::CvrVersion;

/// What a message wants of the configuration.
#[derive(Debug)]
pub(super) struct ConfigChange {
    conn: ConnId,
    ops: Vec<QueryOp>,
    /// From `initConnection`.
    joins: Option<Joins>,
    /// Clients to delete, as asked for.
    deletes: Vec<String>,
    mode: Mode,
    /// Once it was made for a CVR that another server had written to.
    made_again: bool,
}

#[derive(Debug)]
struct Joins {
    client_schema: Option<Arc<ClientSchema>>,
    active_clients: Option<Vec<String>>,
}

impl Group {
    /// Begins a task. A group that is not up asks for a place first.
    pub(super) fn begin(&mut self, trigger: Trigger, task: Task, cx: &mut Cx<'_>) -> StepResult {
        if self.is_overtaken(&task) {
            cx.info(format!("group {}: another server has had it meanwhile", self.id));
            self.forget_all(cx);
        }
        let comes_up = self.cvr.is_none() || matches!(task, Task::BringUp);
        if comes_up && !self.admitted && self.is_wanted(trigger) {
            cx.emit(Effect::Enter);
            return Ok(Step::Wait(Stage::Entering(task)));
        }
        self.begin_admitted(trigger, task, cx)
    }

    /// Nobody has to wait any more; the CVR is loaded first.
    fn begin_admitted(&mut self, trigger: Trigger, task: Task, cx: &mut Cx<'_>) -> StepResult {
        if self.cvr.is_none() && self.is_wanted(trigger) {
            cx.emit(Effect::Load { connect_ms: self.last_connect_ms });
            return Ok(Step::Wait(Stage::Loading(task)));
        }
        self.begin_loaded(trigger, task, cx)
    }

    /// Whoever asked for it is still there.
    fn is_wanted(&self, trigger: Trigger) -> bool {
        match trigger.conn() {
            Some(conn) => self.contexts.get(conn).is_some(),
            None => self.clients.values().any(|client| client.active),
        }
    }

    /// A client comes with a cookie that is ahead of the CVR in memory: it was at another server,
    /// and comes back before the group has ended here. What is stored decides about its cookie.
    fn is_overtaken(&self, task: &Task) -> bool {
        let Task::Init { conn, .. } = task else { return false };
        let base = self.clients.get(*conn).and_then(|client| client.base.as_ref());
        self.cvr.as_ref().is_some_and(|cvr| base.is_some_and(|base| *base > cvr.version))
    }

    /// The CVR is there.
    fn begin_loaded(&mut self, trigger: Trigger, task: Task, cx: &mut Cx<'_>) -> StepResult {
        if !self.is_wanted(trigger) {
            return Ok(Step::Done);
        }
        match task {
            Task::Init { conn, init } => self.begin_init(trigger, conn, init, cx),
            Task::Change { conn, ops } => {
                let change = ConfigChange {
                    conn,
                    ops,
                    joins: None,
                    deletes: Vec::new(),
                    mode: Mode::Missing,
                    made_again: false,
                };
                self.change_config(change, cx)
            }
            Task::Delete { conn, clients } => {
                let change = ConfigChange {
                    conn,
                    ops: Vec::new(),
                    joins: None,
                    deletes: clients,
                    mode: Mode::Missing,
                    made_again: false,
                };
                self.change_config(change, cx)
            }
            Task::ChangeAgain(change) => {
                if let Some(joins) = &change.joins {
                    self.check_joining(change.conn, joins.client_schema.is_some())?;
                }
                self.change_config(*change, cx)
            }
            Task::UpdateAuth { conn, token } => self.begin_update_auth(trigger, conn, &token, cx),
            Task::BringUp => self.begin_bring_up(cx),
            Task::Advance => self.begin_advance(cx),
            Task::Evict => self.begin_evict(cx),
            Task::Revalidate { conn } => self.validate(trigger, conn, AfterValidation::Nothing, cx),
            Task::Retransform => self.begin_sync(trigger, Mode::All, None, cx),
        }
    }

    /// Goes on with an answer.
    pub(super) fn resume(
        &mut self,
        trigger: Trigger,
        stage: Stage,
        answer: Event,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        match (stage, answer) {
            (Stage::Entering(task), Event::Admitted) => {
                self.admitted = true;
                self.begin_admitted(trigger, task, cx)
            }
            (Stage::Loading(task), Event::Loaded(loaded)) => {
                let mut loaded = loaded?;
                if let Some(owner) = &loaded.taken_over_from {
                    cx.info(format!("group {}: taken over from server {owner}", self.id));
                }
                self.clock = Some(TtlTimer::resume(loaded.cvr.ttl_clock, cx.now_ms));
                cx.world.shared().share_loaded(&mut loaded.cvr);
                self.cvr = Some(loaded.cvr);
                self.own_view = loaded.own;
                self.begin_loaded(trigger, task, cx)
            }
            (Stage::Validating { revision, then }, Event::Transformed(result)) => {
                let conn = trigger.conn().ok_or_else(|| bug("validation without connection"))?;
                self.check_answer(conn, revision, &result, &[], cx)?;
                self.validated(trigger, conn, then, cx)
            }
            (Stage::FlushingConfig(flushing), Event::Flushed(verdict)) => match verdict {
                Err(CvrStoreError::ConcurrentModification { .. })
                    if !flushing.change.made_again =>
                {
                    self.change_again(trigger, flushing.change, cx)
                }
                // What the client wants is not written: it has to say it again.
                Err(error) => Err(Failure { overtaken: false, ..error.into() }),
                Ok(_) => self.config_flushed(trigger, *flushing, cx),
            },
            (Stage::TransformingUnchanged { asked }, Event::Transformed(result)) => {
                self.unchanged_transformed(asked, result, cx)
            }
            (Stage::HydratingUnchanged { wanted }, Event::Hydrated(results)) => {
                self.unchanged_hydrated(wanted, results, cx)
            }
            (Stage::Transforming { sync, asked }, Event::Transformed(result)) => {
                self.sync_transformed(trigger, sync, asked, result, cx)
            }
            (Stage::ReadingRows(mut sync), Event::Rows(page)) => match page {
                Ok(RowPage { rows, next }) => {
                    sync.records.extend(rows);
                    match next {
                        Some(from) => self.read_rows(sync, Some(from), cx),
                        None => self.sync_catch_up(trigger, sync, cx),
                    }
                }
                Err(error) => Stage::ReadingRows(sync).failed(error, cx),
            },
            (Stage::CatchingUp(mut sync), Event::CaughtUp(page)) => match page {
                Ok(page) => {
                    sync.missed.take_page(page);
                    self.read_missed(trigger, sync, cx)
                }
                Err(error) => Stage::CatchingUp(sync).failed(error, cx),
            },
            (Stage::ReadingMissed(sync), Event::Continue) => self.read_missed(trigger, sync, cx),
            (Stage::Hydrating(sync), Event::Hydrated(results)) => {
                self.sync_hydrated(trigger, sync, results, cx)
            }
            (Stage::Taking { sync, instances, taking }, Event::Continue) => {
                self.take(trigger, sync, instances, *taking, cx)
            }
            (Stage::Computing(computing), Event::Continue) => self.compute(computing, cx),
            (Stage::Encoding(encoding), Event::Continue) => self.encode_slice(encoding, cx),
            (Stage::Flushing(flushing), Event::Flushed(verdict)) => match verdict {
                Ok(_) => self.results_flushed(*flushing, cx),
                Err(error) => Stage::Flushing(flushing).failed(error, cx),
            },
            (stage, answer) => {
                Err(bug(&format!("answer {answer:?} does not fit the wait for {stage:?}")))
            }
        }
    }

    // ---- initConnection, updateAuth -------------------------------------------------------------

    fn begin_init(
        &mut self,
        trigger: Trigger,
        conn: ConnId,
        init: Box<InitConnection>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        self.check_joining(conn, init.client_schema.is_some())?;
        self.validate(trigger, conn, AfterValidation::Init(init), cx)
    }

    /// Whether a client may join as it is.
    fn check_joining(&self, conn: ConnId, brings_schema: bool) -> Result<(), Failure> {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let client = self.clients.get(conn).ok_or_else(no_auth_state)?;
        check_cookie(cvr, client.base.as_ref())?;
        if cvr.client_schema.is_none() && !brings_schema {
            return Err(invalid_request(
                "The initConnection message for a new client group must include client schema.",
            ));
        }
        Ok(())
    }

    fn begin_update_auth(
        &mut self,
        trigger: Trigger,
        conn: ConnId,
        token: &str,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let context = self.contexts.get(conn).ok_or_else(no_auth_state)?;
        let old = context.connection.credentials.token.clone();
        let user = context.connection.credentials.user_id.clone();
        let new: Option<Arc<str>> = Some(token).filter(|t| !t.is_empty()).map(Arc::from);
        match (&old, &new) {
            (Some(_), None) => {
                return Err(unauthorized(
                    "No token provided. An unauthenticated client cannot connect to an \
                     authenticated client group.",
                ));
            }
            (_, Some(_)) if let Some(why) = &self.settings.refuses_tokens => {
                return Err(Box::new(ErrorBody::internal(&**why)).into());
            }
            (_, Some(_)) if user.is_none() => {
                return Err(unauthorized("Authenticated connections require a userID."));
            }
            (old, new) if old == new => return Ok(Step::Done),
            _ => {}
        }
        self.contexts.change_credentials(conn, |credentials| credentials.token = new);
        if !self.clients.get(conn).is_some_and(|c| c.active) {
            // Used from `initConnection` on.
            return Ok(Step::Done);
        }
        // Always asked, also when no custom query would be: otherwise the connection could stay
        // unvalidated (trap (a) of sync-protocol §6.4).
        self.validate(trigger, conn, AfterValidation::Sync, cx)
    }

    /// Asks the endpoint about a connection's credentials; without endpoint they are good.
    fn validate(
        &mut self,
        trigger: Trigger,
        conn: ConnId,
        then: AfterValidation,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let context = self.contexts.get(conn).ok_or_else(no_auth_state)?;
        let revision = context.revision;
        if self.settings.has_query_endpoint {
            let credentials = context.connection.credentials.clone();
            cx.emit(Effect::Transform { credentials, queries: Vec::new() });
            return Ok(Step::Wait(Stage::Validating { revision, then }));
        }
        let interval = self.settings.revalidate_ms;
        self.contexts.validate(conn, revision, &ServerUser::Unsaid, cx.now_ms, interval)?;
        self.validated(trigger, conn, then, cx)
    }

    fn validated(
        &mut self,
        trigger: Trigger,
        conn: ConnId,
        then: AfterValidation,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        if self.contexts.get(conn).is_none() {
            return Ok(Step::Done);
        }
        match then {
            AfterValidation::Nothing => Ok(Step::Done),
            AfterValidation::Sync if self.synced => self.begin_sync(trigger, Mode::All, None, cx),
            AfterValidation::Sync => Ok(Step::Done),
            AfterValidation::Init(init) => {
                let schemas = &mut cx.world.shared().schemas;
                let client_schema = init.client_schema.map(|schema| schemas.share(schema));
                let change = ConfigChange {
                    conn,
                    ops: init.desired_queries_patch,
                    joins: Some(Joins { client_schema, active_clients: init.active_clients }),
                    deletes: init.deleted.and_then(|d| d.client_ids).unwrap_or_default(),
                    mode: Mode::All,
                    made_again: false,
                };
                self.change_config(change, cx)
            }
        }
    }

    /// Turns a failed request into its error; a good one validates the connection.
    pub(super) fn check_answer(
        &mut self,
        conn: ConnId,
        revision: u32,
        result: &Result<TransformResponse, ApiFailure>,
        asked: &[QueryHash],
        cx: &mut Cx<'_>,
    ) -> Result<(), Failure> {
        let ids = || asked.iter().map(|q| q.as_str().to_owned()).collect::<Vec<_>>();
        match result {
            Ok(TransformResponse::Queries { user, .. }) => {
                let said = ServerUser::from(user.clone());
                let interval = self.settings.revalidate_ms;
                Ok(self.contexts.validate(conn, revision, &said, cx.now_ms, interval)?)
            }
            Ok(TransformResponse::Failed { failure, query_ids }) => {
                let query_ids = query_ids.clone();
                Err(Box::new(ErrorBody::TransformFailed { failure: failure.clone(), query_ids })
                    .into())
            }
            Err(failure) => {
                let (failure, query_ids) = (failure.clone(), ids());
                Err(Box::new(ErrorBody::TransformFailed { failure, query_ids }).into())
            }
        }
    }

    // ---- configuration --------------------------------------------------------------------------

    fn change_config(&mut self, change: ConfigChange, cx: &mut Cx<'_>) -> StepResult {
        let ConfigChange { conn, ops, joins, deletes, mode, .. } = &change;
        let (conn, mode) = (*conn, *mode);
        let now_ms = cx.now_ms;
        let times = self.flush_times(now_ms);
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let client = self.clients.get(conn).map(|c| c.id.clone()).ok_or_else(no_auth_state)?;
        let mut update = ConfigUpdater::new(cvr);
        let mut patches = Vec::new();
        update.ensure_client(&client, &self.settings.tables);
        if let Some(joins) = joins {
            if let Some(schema) = &joins.client_schema {
                update.set_client_schema(schema)?;
            }
            let profile = self.contexts.get(conn).and_then(|c| c.connection.profile_id.clone());
            let profile = profile.unwrap_or_else(|| format!("cg{}", self.id).into());
            if let Some(old) = update.set_profile_id(&profile) {
                cx.warn(format!("group {}: profile changed from {old} to {profile}", self.id));
            }
        }
        for op in ops {
            let queries = &mut cx.world.shared().queries;
            patches.extend(apply_op(&mut update, &client, op, &times, queries)?);
        }
        let mut deleted: BTreeSet<String> = BTreeSet::new();
        if let Some(active) = joins.as_ref().and_then(|j| j.active_clients.as_ref()) {
            let active: BTreeSet<ClientId> = client_ids(active).into_iter().collect();
            let gone = cvr.clients.keys().filter(|c| !active.contains(*c));
            deleted.extend(gone.map(ToString::to_string));
        }
        deleted.extend(deletes.iter().cloned());
        if deletes.iter().any(|d| d == client.as_str()) {
            return Err(Box::new(ErrorBody::internal("cannot delete self")).into());
        }
        for id in client_ids(&deleted.iter().cloned().collect::<Vec<_>>()) {
            patches.extend(update.delete_client(&id, times.ttl_clock));
        }
        let ack = (!deletes.is_empty()).then(|| deleted.into_iter().collect());
        if joins.is_some() {
            self.initialized = true;
        }
        let then = AfterConfig { mode, ack };
        let Some(prepared) = update.finish(times) else {
            self.activate(conn);
            return self.config_done(Trigger::Message(conn), then, cx);
        };
        let poke = self.encode(&patches, cx)?;
        cx.emit(Effect::Flush(Box::new(prepared.flush)));
        let flushing = FlushingConfig { cvr: prepared.cvr, poke, then, change };
        Ok(Step::Wait(Stage::FlushingConfig(Box::new(flushing))))
    }

    /// Another server had the group since the CVR was loaded here: nothing was written and nobody
    /// was told anything, so the change is made anew for the CVR as it is. To send the client away
    /// would be right as well, but it has just come, and real clients that hear of an error while
    /// they digest `connected` never come back.
    fn change_again(
        &mut self,
        trigger: Trigger,
        change: ConfigChange,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        cx.info(format!("group {}: another server has had it meanwhile", self.id));
        self.forget_all(cx);
        let change = ConfigChange { made_again: true, ..change };
        self.begin(trigger, Task::ChangeAgain(Box::new(change)), cx)
    }

    fn config_flushed(
        &mut self,
        trigger: Trigger,
        flushing: FlushingConfig,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let FlushingConfig { cvr, poke, then, .. } = flushing;
        let before = self.adopt(cvr, cx);
        if let Some(conn) = trigger.conn() {
            self.activate(conn);
        }
        let moved = self.cvr.as_ref().is_some_and(|cvr| cvr.version > before);
        if moved {
            self.poke(&poke, &before, Recipients::AtHead, cx);
        }
        self.config_done(trigger, then, cx)
    }

    fn config_done(&mut self, trigger: Trigger, then: AfterConfig, cx: &mut Cx<'_>) -> StepResult {
        // After a `deleteClients`, not after an `initConnection`, which names those of long ago.
        if let (Mode::Missing, Some(conn), Some(gone)) = (then.mode, trigger.conn(), &then.ack)
            && !gone.is_empty()
        {
            self.clean_up(conn, CleanUp::Bulk(gone.clone()), cx);
        }
        if self.synced {
            return self.begin_sync(trigger, then.mode, then.ack, cx);
        }
        // The bring-up that follows does the rest.
        self.acknowledge(then.ack, cx);
        Ok(Step::Done)
    }

    /// From now on the connection gets pokes.
    fn activate(&mut self, conn: ConnId) {
        if let Some(client) = self.clients.get_mut(conn) {
            client.active = true;
        }
    }

    /// Tells everybody which clients were deleted.
    pub(super) fn acknowledge(&mut self, ack: Option<Vec<String>>, cx: &mut Cx<'_>) {
        let Some(ids) = ack.filter(|ids| !ids.is_empty()) else { return };
        let frame = Frame::text(down::delete_clients(&ids));
        let told = self.clients.iter().filter(|(_, client)| client.active);
        let conns: Vec<ConnId> = told.map(|(conn, _)| conn).collect();
        for conn in conns {
            self.send(conn, vec![frame.clone()], cx);
        }
    }

    // ---- shared with results ----------------------------------------------------------------------

    /// Makes a durable snapshot the group's; returns the version before.
    pub(super) fn adopt(&mut self, cvr: Cvr, cx: &mut Cx<'_>) -> CvrVersion {
        let before = self.cvr.replace(cvr).map(|old| old.version).unwrap_or_default();
        cx.emit(Effect::SetTimer(Timer::TtlClock, Some(TTL_CLOCK_INTERVAL_MS)));
        before
    }

    pub(super) fn flush_times(&mut self, now_ms: f64) -> FlushTimes {
        let start = self.cvr.as_ref().map(|cvr| cvr.ttl_clock).unwrap_or_default();
        let clock = self.clock.get_or_insert_with(|| TtlTimer::resume(start, now_ms));
        FlushTimes { connect_ms: self.last_connect_ms, now_ms, ttl_clock: clock.read(now_ms) }
    }

    /// Starts a request to the endpoint.
    pub(super) fn ask(&self, conn: ConnId, queries: Vec<QueryHash>) -> Result<Asked, Failure> {
        let context = self.contexts.get(conn).ok_or_else(no_auth_state)?;
        let credentials = context.connection.credentials.clone();
        Ok(Asked { conn, revision: context.revision, credentials, queries })
    }
}

fn apply_op(
    update: &mut ConfigUpdater,
    client: &ClientId,
    op: &QueryOp,
    times: &FlushTimes,
    shared: &mut SharedQueries,
) -> Result<Vec<VersionedPatch>, Failure> {
    Ok(match op {
        QueryOp::Put(put) => {
            let query = QueryHash::from(put.hash.as_str());
            let body = match update.cvr().query(&query) {
                Some(known) => known.body.clone(),
                None => body_of(put, &query, shared)?,
            };
            let ttl_ms = put.ttl.unwrap_or(DEFAULT_TTL_MS);
            update.put_desired(client, &[DesiredPut { query, body, ttl_ms }])?
        }
        QueryOp::Del { hash } => {
            update.inactivate_desired(client, &[QueryHash::from(hash.as_str())], times.ttl_clock)
        }
        QueryOp::Clear => update.clear_desired(client),
    })
}

fn body_of(
    put: &QueryPut,
    id: &QueryHash,
    shared: &mut SharedQueries,
) -> Result<QueryBody, Failure> {
    let refuse = |text: &str| Err(Box::new(ErrorBody::internal(text)).into());
    match (&put.ast, &put.name, &put.args) {
        (Some(ast), None, None) => {
            let ast = ast.json().decode().map_err(|e| {
                let text = format!("TypeError: query {}: {e}", put.hash);
                Failure::from(Box::new(ErrorBody::invalid_message(text)))
            })?;
            Ok(QueryBody::Client { ast: shared.share(id, Arc::new(ast)) })
        }
        (Some(_), ..) => refuse("Cannot provide name or args with ast"),
        (None, Some(name), Some(args)) => {
            let args = serde_json::to_string(args).map_err(|e| bug(&e.to_string()))?;
            Ok(QueryBody::Custom { name: name.as_str().into(), args: args.into() })
        }
        (None, ..) => refuse("Must provide name and args"),
    }
}

/// A cookie must not name what the CVR does not know (spec: sync-protocol §5.3 step 4).
fn check_cookie(cvr: &Cvr, base: Option<&CvrVersion>) -> Result<(), Failure> {
    let Some(base) = base.filter(|base| **base > cvr.version) else { return Ok(()) };
    let error = if cvr.version == CvrVersion::empty() && *base > CvrVersion::empty() {
        ErrorBody::basic(ErrorKind::ClientNotFound, "Client not found")
    } else {
        ErrorBody::basic(
            ErrorKind::InvalidConnectionRequestBaseCookie,
            format!("CVR is at version {}", cvr.version.cookie()),
        )
    };
    Err(Box::new(error).into())
}

fn invalid_request(text: &str) -> Failure {
    Box::new(ErrorBody::basic(ErrorKind::InvalidConnectionRequest, text)).into()
}

fn unauthorized(text: &str) -> Failure {
    Box::new(ErrorBody::basic(ErrorKind::Unauthorized, text)).into()
}

/// Something that cannot happen did. The group starts anew rather than go on.
pub(super) fn bug(text: &str) -> Failure {
    Failure { distrust: true, ..Box::new(ErrorBody::internal(text)).into() }
}
