//! Who is connected, with which credentials, and whose credentials may be used for what
//! (spec: sync-protocol §6.3, view-syncer-cvr §6.1).
//!
//! A connection is *provisional* until the query endpoint (or, without one, the URL) has said who
//! the user is for exactly the credentials that it has now; each change of credentials raises its
//! revision, and an answer for an older revision is dropped. The first validated user pins the
//! group. Work that no connection asked for runs with the *background* connection.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ConnId;
use super::by_conn::ByConn;
use crate::protocol::custom_query::ValidatedUser;
use crate::protocol::error::{ErrorBody, ErrorKind};

/// What a client asks for in place of a configured endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Target {
    /// Another URL; `None` is the configured one.
    pub url: Option<Arc<str>>,
    /// Custom headers, unfiltered, sorted by name.
    pub headers: BTreeMap<String, String>,
}

/// What a request to the app's endpoints carries on behalf of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Credentials {
    /// The user of the connection's URL; `None` is logged out.
    pub user_id: Option<Arc<str>>,
    /// Raw auth token, never empty.
    pub token: Option<Arc<str>>,
    /// `userQueryURL`, `userQueryHeaders`.
    pub query: Target,
    /// `userPushURL`, `userPushHeaders`.
    pub mutate: Target,
    /// Headers of the upgrade request by lower-cased name (`cookie` and `origin` among them).
    pub request_headers: Arc<BTreeMap<String, String>>,
}

/// A connection as its handshake described it.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Number of the socket, never used twice on an executor.
    pub conn: ConnId,
    /// The client (tab).
    pub client_id: Arc<str>,
    /// The client's name for this socket.
    pub ws_id: Arc<str>,
    /// Sync protocol version.
    pub protocol: u32,
    /// `profileID` of the URL.
    pub profile_id: Option<Arc<str>>,
    /// `baseCookie` of the URL, unparsed; `None` when absent or empty.
    pub base_cookie: Option<Arc<str>>,
    /// What its requests carry.
    pub credentials: Arc<Credentials>,
}

/// A registered connection.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) connection: Connection,
    pub(super) revision: u32,
    pub(super) validated: bool,
    pub(super) revalidate_at_ms: Option<f64>,
}

/// Whether two optional user ids are the same user; absent and empty are both "logged out".
fn same_user(a: Option<&str>, b: Option<&str>) -> bool {
    let norm = |u: Option<&str>| u.filter(|s| !s.is_empty()).map(str::to_owned);
    norm(a) == norm(b)
}

/// What a successful request to an endpoint said about the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerUser {
    /// No `userID` in the answer, or no endpoint: the URL's user is trusted.
    Unsaid,
    /// The user by the app's own reckoning; `None` is logged out.
    Is(Option<Arc<str>>),
}

impl From<ValidatedUser> for ServerUser {
    fn from(user: ValidatedUser) -> ServerUser {
        match user {
            ValidatedUser::Unsaid => ServerUser::Unsaid,
            ValidatedUser::User(user) => ServerUser::Is(user.map(Arc::from)),
        }
    }
}

/// The connections of one group. At most one per client.
#[derive(Debug, Default)]
pub(super) struct Contexts {
    /// In order of registration.
    by_conn: ByConn<Context>,
    pinned: Option<Option<Arc<str>>>,
    background: Option<ConnId>,
    pub(super) not_before_ms: f64,
    pub(super) retransform_at_ms: Option<f64>,
}

impl Contexts {
    /// Whether a connection of this user may join (before anything of it is registered).
    pub(super) fn admit(&self, user: Option<&str>) -> Result<(), Box<ErrorBody>> {
        match &self.pinned {
            Some(pinned) if !same_user(pinned.as_deref(), user) => Err(pin_error()),
            _ => Ok(()),
        }
    }

    /// Registers a connection; returns the one of the same client that it replaces.
    pub(super) fn register(&mut self, connection: Connection) -> Option<ConnId> {
        let old = self.of_client(&connection.client_id);
        if let Some(old) = old {
            self.remove(old);
        }
        let conn = connection.conn;
        let context = Context { connection, revision: 0, validated: false, revalidate_at_ms: None };
        self.by_conn.insert(conn, context);
        old
    }

    pub(super) fn remove(&mut self, conn: ConnId) -> bool {
        if self.background == Some(conn) {
            self.background = None;
        }
        self.by_conn.remove(conn)
    }

    pub(super) fn get(&self, conn: ConnId) -> Option<&Context> {
        self.by_conn.get(conn)
    }

    pub(super) fn len(&self) -> usize {
        self.by_conn.len()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = ConnId> + '_ {
        self.by_conn.conns()
    }

    /// The connection of a client.
    pub(super) fn of_client(&self, client_id: &str) -> Option<ConnId> {
        self.by_conn
            .iter()
            .find(|(_, c)| &*c.connection.client_id == client_id)
            .map(|(conn, _)| conn)
    }

    /// New credentials: the revision rises and the connection has to be validated again.
    pub(super) fn change_credentials(
        &mut self,
        conn: ConnId,
        change: impl FnOnce(&mut Credentials),
    ) {
        if let Some(context) = self.by_conn.get_mut(conn) {
            change(Arc::make_mut(&mut context.connection.credentials));
            context.revision += 1;
            context.validated = false;
            context.revalidate_at_ms = None;
        }
        if self.background == Some(conn) {
            self.background = None;
        }
    }

    /// A request with the credentials of `revision` succeeded. A stale revision or a connection
    /// that is gone is no error and validates nothing.
    pub(super) fn validate(
        &mut self,
        conn: ConnId,
        revision: u32,
        said: &ServerUser,
        now_ms: f64,
        interval_ms: f64,
    ) -> Result<(), Box<ErrorBody>> {
        let Some(context) = self.by_conn.get_mut(conn).filter(|c| c.revision == revision) else {
            return Ok(());
        };
        let user = context.connection.credentials.user_id.clone();
        if let ServerUser::Is(server) = said
            && !same_user(server.as_deref(), user.as_deref())
        {
            return Err(Box::new(ErrorBody::basic(
                ErrorKind::Unauthorized,
                "Connection userID does not match validated server userID.",
            )));
        }
        match &self.pinned {
            Some(pinned) if !same_user(pinned.as_deref(), user.as_deref()) => {
                return Err(pin_error());
            }
            Some(_) => {}
            None => self.pinned = Some(user),
        }
        context.validated = true;
        context.revalidate_at_ms = Some(now_ms + interval_ms);
        Ok(())
    }

    /// The connection whose credentials are used for shared work: sticky while validated, else
    /// the validated one that registered last.
    pub(super) fn background(&mut self) -> Result<ConnId, Box<ErrorBody>> {
        let validated = |c: &ConnId| self.by_conn.get(*c).is_some_and(|c| c.validated);
        if let Some(conn) = self.background.filter(validated) {
            return Ok(conn);
        }
        self.background =
            self.by_conn.iter().rev().find(|(_, c)| c.validated).map(|(conn, _)| conn);
        self.background.ok_or_else(|| {
            Box::new(ErrorBody::basic(
                ErrorKind::InvalidConnectionRequest,
                "No validated connection is available for shared query work.",
            ))
        })
    }

    /// The first connection, in order of registration, that is due for revalidation.
    pub(super) fn due(&self, now_ms: f64) -> Option<ConnId> {
        if now_ms < self.not_before_ms {
            return None;
        }
        self.by_conn
            .iter()
            .find(|(_, c)| c.validated && c.revalidate_at_ms.is_some_and(|at| at <= now_ms))
            .map(|(conn, _)| conn)
    }

    /// When the next maintenance is due; `retransform` tells whether the group's periodic
    /// re-transform is possible now.
    pub(super) fn next_due_ms(&self, retransform: bool) -> Option<f64> {
        let revalidate = self
            .by_conn
            .values()
            .filter(|c| c.validated)
            .filter_map(|c| c.revalidate_at_ms)
            .min_by(f64::total_cmp);
        let retransform = self.retransform_at_ms.filter(|_| retransform);
        let next = match (revalidate, retransform) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        next.map(|at| at.max(self.not_before_ms))
    }
}

fn pin_error() -> Box<ErrorBody> {
    Box::new(ErrorBody::basic(
        ErrorKind::Unauthorized,
        "Client groups are pinned to a single userID. Connection userID does not match existing \
         client group userID.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(conn: u64, client: &str, user: Option<&str>) -> Connection {
        Connection {
            conn: ConnId(conn),
            client_id: client.into(),
            ws_id: "w".into(),
            protocol: 51,
            profile_id: None,
            base_cookie: None,
            credentials: Arc::new(Credentials {
                user_id: user.map(Into::into),
                ..Credentials::default()
            }),
        }
    }

    #[test]
    fn the_first_validated_user_pins_the_group_for_good() {
        let mut c = Contexts::default();
        c.register(connection(1, "a", Some("u1")));
        assert!(c.admit(Some("u2")).is_ok(), "nothing is pinned by a mere connection");
        c.validate(ConnId(1), 0, &ServerUser::Unsaid, 0.0, 1.0).unwrap();
        assert!(c.admit(Some("u2")).is_err());
        assert!(c.admit(None).is_err());
        c.remove(ConnId(1));
        assert!(c.admit(Some("u1")).is_ok());
        assert!(c.admit(Some("u2")).is_err(), "the pin outlives its connection");
    }

    #[test]
    fn an_answer_for_old_credentials_validates_nothing() {
        let mut c = Contexts::default();
        c.register(connection(1, "a", None));
        c.change_credentials(ConnId(1), |c| c.token = Some("new".into()));
        c.validate(ConnId(1), 0, &ServerUser::Unsaid, 0.0, 1.0).unwrap();
        assert!(c.background().is_err());
        c.validate(ConnId(1), 1, &ServerUser::Unsaid, 0.0, 1.0).unwrap();
        assert_eq!(c.background().unwrap(), ConnId(1));
    }

    #[test]
    fn the_endpoint_overrules_the_url_about_the_user() {
        let mut c = Contexts::default();
        c.register(connection(1, "a", Some("u1")));
        let other = ServerUser::Is(Some("u2".into()));
        assert!(c.validate(ConnId(1), 0, &other, 0.0, 1.0).is_err());
        assert!(c.validate(ConnId(1), 0, &ServerUser::Is(None), 0.0, 1.0).is_err());
        assert!(c.validate(ConnId(1), 0, &ServerUser::Is(Some("u1".into())), 0.0, 1.0).is_ok());
    }

    #[test]
    fn the_background_connection_is_sticky_and_replaced_by_the_newest() {
        let mut c = Contexts::default();
        for conn in 1..=3 {
            c.register(connection(conn, &format!("c{conn}"), None));
        }
        c.validate(ConnId(1), 0, &ServerUser::Unsaid, 0.0, 1.0).unwrap();
        assert_eq!(c.background().unwrap(), ConnId(1));
        c.validate(ConnId(2), 0, &ServerUser::Unsaid, 0.0, 1.0).unwrap();
        c.validate(ConnId(3), 0, &ServerUser::Unsaid, 0.0, 1.0).unwrap();
        assert_eq!(c.background().unwrap(), ConnId(1), "sticky");
        c.remove(ConnId(1));
        assert_eq!(c.background().unwrap(), ConnId(3), "newest");
    }

    #[test]
    fn a_client_has_one_connection() {
        let mut c = Contexts::default();
        assert_eq!(c.register(connection(1, "a", None)), None);
        assert_eq!(c.register(connection(2, "a", None)), Some(ConnId(1)));
        assert_eq!(c.len(), 1);
    }

    #[test]
    fn maintenance_waits_for_the_deferral() {
        let mut c = Contexts::default();
        c.register(connection(1, "a", None));
        c.validate(ConnId(1), 0, &ServerUser::Unsaid, 0.0, 300.0).unwrap();
        assert_eq!(c.next_due_ms(true), Some(300.0));
        assert_eq!(c.due(299.0), None);
        assert_eq!(c.due(300.0), Some(ConnId(1)));
        c.not_before_ms = 600.0;
        assert_eq!(c.next_due_ms(true), Some(600.0));
        assert_eq!(c.due(300.0), None);
    }
}
