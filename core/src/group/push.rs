//! Mutations: what a client sends on its way to the app's mutate endpoint, and what the endpoint
//! says on its way to the clients that it concerns (spec: sync-protocol §7.1, §7.6).
//!
//! A group only judges and routes. The queue of its pushes is the executor's: it outlives the
//! group, since a push that was taken is sent also when everybody has left. What became of a
//! mutation reaches the clients by replication; only failed requests are answered directly.

use std::sync::Arc;

use super::context::Credentials;
use super::interface::Effect;
use super::machine::{Cx, Group, no_auth_state};
use super::{ConnId, ServerUser};
use crate::protocol::custom_query::ValidatedUser;
use crate::protocol::error::{ApiFailure, ErrorBody, ErrorKind, MutationId};
use crate::protocol::mutate::{CleanUp, MutateResponse, errors};
use crate::protocol::up::{MutationKind, Push};

/// Status that a client is told whose user is another one for the endpoint.
const UNAUTHORIZED: u16 = 401;

/// A push on its way to the mutate endpoint.
#[derive(Debug, Clone)]
pub struct OutgoingPush {
    /// Who sent it.
    pub conn: ConnId,
    /// Revision of the credentials.
    pub revision: u32,
    /// The sender's credentials when it was received.
    pub credentials: Arc<Credentials>,
    /// What is sent.
    pub push: Push,
}

/// What became of a request to the mutate endpoint.
#[derive(Debug)]
pub struct Pushed {
    /// Whose request it was.
    pub conn: ConnId,
    /// Revision of its credentials then.
    pub revision: u32,
    /// The mutations of the request.
    pub mutation_ids: Vec<MutationId>,
    /// The answer, or why there is none.
    pub answer: Result<MutateResponse, ApiFailure>,
}

impl Group {
    /// Takes or refuses a push.
    pub(super) fn push(&mut self, conn: ConnId, push: Push, cx: &mut Cx<'_>) {
        let refusal = match push.mutations.first().map(|m| &m.kind) {
            _ if push.client_group_id != self.id.as_str() => format!(
                "clientGroupID in mutation \"{}\" does not match clientGroupID of connection \"{}",
                push.client_group_id, self.id
            ),
            None => return cx.emit(Effect::MessageDone(conn)),
            Some(MutationKind::Custom) if !self.settings.has_mutate_endpoint => {
                "A ZERO_MUTATE_URL must be set in order to process custom mutations.".to_owned()
            }
            Some(MutationKind::Custom) => {
                let Some(context) = self.contexts.get(conn) else {
                    return self.fail_connection(conn, no_auth_state(), cx);
                };
                let credentials = context.connection.credentials.clone();
                let revision = context.revision;
                let push = OutgoingPush { conn, revision, credentials, push };
                return cx.emit(Effect::Push(Box::new(push)));
            }
            Some(MutationKind::Crud(_)) if !self.settings.crud_mutations => {
                "Support for legacy CRUD mutations is disabled".to_owned()
            }
            Some(MutationKind::Crud(_)) => {
                "This version of zeroring does not execute legacy CRUD mutations. Use custom \
                 mutators, with ZERO_MUTATE_URL."
                    .to_owned()
            }
        };
        self.fail_connection(conn, Box::new(ErrorBody::basic(ErrorKind::InvalidPush, refusal)), cx);
    }

    /// Asks the endpoint to forget results, with the credentials of this connection.
    pub(super) fn clean_up(&mut self, conn: ConnId, clean_up: CleanUp, cx: &mut Cx<'_>) {
        if let Some(context) = self.contexts.get(conn)
            && self.settings.has_mutate_endpoint
        {
            let credentials = context.connection.credentials.clone();
            cx.emit(Effect::CleanUp { credentials, clean_up });
        }
    }

    /// Routes what came of a request: errors go to the clients whose mutations they are, on
    /// whatever socket they have now.
    pub(super) fn pushed(&mut self, pushed: Pushed, cx: &mut Cx<'_>) {
        let Pushed { conn, revision, mutation_ids, answer } = pushed;
        let (told, failure) = match answer {
            Ok(MutateResponse::Done { user, errors: told }) => {
                match self.user_of_push(conn, revision, user, cx) {
                    Ok(()) => (told, None),
                    Err(failure) => (errors(&failure, &mutation_ids, false), Some(failure)),
                }
            }
            Ok(MutateResponse::Failed { failure, mutation_ids, legacy }) => {
                (errors(&failure, &mutation_ids, legacy), Some(failure))
            }
            Err(failure) => (errors(&failure, &mutation_ids, false), Some(failure)),
        };
        for (client, error) in told {
            cx.warn(format!("group {}: a push of client {client} failed: {error}", self.id));
            let conn = self.contexts.of_client(&client).filter(|c| self.clients.contains(*c));
            if let Some(conn) = conn {
                self.fail_connection(conn, Box::new(error), cx);
            }
        }
        // Credentials that were refused are of no use for anything else.
        if let Some(failure) = failure.filter(|f| f.auth_status().is_some())
            && self.contexts.get(conn).is_some_and(|c| c.revision == revision)
        {
            let error = ErrorBody::PushFailed { failure, mutation_ids: Vec::new() };
            self.fail_connection(conn, Box::new(error), cx);
        }
        self.plan_timers(cx);
    }

    /// A request that succeeded validates the credentials that it was made with.
    fn user_of_push(
        &mut self,
        conn: ConnId,
        revision: u32,
        user: ValidatedUser,
        cx: &mut Cx<'_>,
    ) -> Result<(), ApiFailure> {
        let said = ServerUser::from(user);
        let interval = self.settings.revalidate_ms;
        self.contexts
            .validate(conn, revision, &said, cx.now_ms, interval)
            .map_err(|error| ApiFailure::http(UNAUTHORIZED, None, error.message()))
    }
}
