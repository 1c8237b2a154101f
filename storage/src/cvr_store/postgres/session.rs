//! A worker's connection: made when it is needed, renewed when it is old or broke, closed when it
//! is idle (spec: view-syncer-cvr §2.3).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};
use zeroring_net::pg::{Backoff, Client, Format, Param, PgConfig, PgError, Pipeline, SqlState};

use super::sql::Sql;

/// When connections are closed that nothing is wrong with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLife {
    /// Nobody used it for so long: 60 s.
    pub idle: Duration,
    /// It is so old, at least: 5 min. Load moves to new servers behind a balancer.
    pub shortest: Duration,
    /// And this is added for some, so that not all end at once: 5 min.
    pub spread: Duration,
}

impl Default for ConnectionLife {
    fn default() -> ConnectionLife {
        let minutes = |n: u64| Duration::from_secs(60 * n);
        ConnectionLife { idle: minutes(1), shortest: minutes(5), spread: minutes(5) }
    }
}

/// How long requests wait for a database that cannot be reached before they fail.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same while the store shuts down.
const PATIENCE_AT_END: Duration = Duration::from_secs(5);
/// Delays between attempts to connect.
const FIRST_DELAY: Duration = Duration::from_millis(25);
const MAX_DELAY: Duration = Duration::from_secs(1);

/// What all workers of a store share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) connection: PgConfig,
    pub(super) sql: Sql,
    pub(super) task_id: Arc<str>,
    /// `idle_in_transaction_session_timeout`, ms, as text.
    pub(super) idle_in_transaction: String,
    pub(super) life: ConnectionLife,
    /// The store shuts down: answers are given soon, whatever they are.
    pub(super) closing: AtomicBool,
    /// Statements cannot be prepared: a pooler gives each transaction another connection.
    pub(super) pooled: AtomicBool,
}

impl Shared {
    /// Adds a statement to a pipeline.
    pub(super) fn add(
        &self,
        pipeline: &mut Pipeline<'_>,
        sql: &str,
        params: &[Param],
    ) -> Result<(), PgError> {
        // BEGIN and COMMIT have no plan that could be kept.
        if params.is_empty() || self.pooled.load(Ordering::Relaxed) {
            pipeline.query(sql, params, Format::Text)?;
        } else {
            pipeline.cached(sql, params, Format::Text)?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Open {
    client: Client,
    /// When it is to be replaced.
    until: Instant,
    used: Instant,
}

/// A connection that comes back.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) shared: Arc<Shared>,
    open: Option<Open>,
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>) -> Session {
        Session { shared, open: None }
    }

    /// Uses the first connection of a store, which proved that the database can be used.
    pub(super) fn adopt(&mut self, client: Client) {
        self.open = Some(Open::new(client, &self.shared.life));
    }

    /// Nobody needs it now.
    pub(super) fn close(&mut self) {
        self.open = None;
    }

    fn client(&mut self) -> Result<&mut Client, PgError> {
        let (now, life) = (Instant::now(), &self.shared.life);
        let usable = |o: &Open| !o.client.is_broken() && now < o.until && now < o.used + life.idle;
        let open = match self.open.take().filter(usable) {
            Some(open) => open,
            None => Open::new(Client::connect(&self.shared.connection)?, life),
        };
        let open = self.open.insert(open);
        open.used = now;
        Ok(&mut open.client)
    }

    /// Runs an exchange; if the connection is lost or cannot be made, runs it again on a new one,
    /// for [`PATIENCE`]. The flag tells `body` that an earlier run may have had its effect.
    pub(super) fn run<T>(
        &mut self,
        mut body: impl FnMut(&mut Client, bool) -> Result<T, PgError>,
    ) -> Result<T, PgError> {
        let mut backoff = Backoff::new(FIRST_DELAY, MAX_DELAY);
        let began = Instant::now();
        let mut again = false;
        loop {
            let done = self.client().and_then(|client| {
                let done = body(client, again);
                // Whatever of it was sent may have been executed.
                again |= done.is_err();
                done
            });
            let error = match done {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if is_unknown_statement(&error) && !self.shared.pooled.swap(true, Ordering::Relaxed) {
                info!("the CVR database is behind a pooler: statements are not prepared");
                self.close();
                continue;
            }
            if !is_lost(&error) {
                return Err(error);
            }
            self.close();
            let closing = self.shared.closing.load(Ordering::Relaxed);
            let patience = if closing { PATIENCE_AT_END } else { PATIENCE };
            let delay = backoff.delay();
            if began.elapsed() + delay > patience {
                return Err(error);
            }
            if delay > FIRST_DELAY {
                warn!(%error, "the CVR database cannot be reached; trying again");
            } else {
                debug!(%error, "the connection to the CVR database is lost; trying again");
            }
            std::thread::sleep(delay);
        }
    }
}

impl Open {
    fn new(client: Client, life: &ConnectionLife) -> Open {
        let now = Instant::now();
        // Spread by the backend's process id: no two connections of a moment have the same.
        let part = client.process_id().unsigned_abs() * 7 % 100;
        Open { client, until: now + life.shortest + life.spread * part / 100, used: now }
    }
}

/// The connection, not the statement, is at fault: the server may be restarting.
fn is_lost(error: &PgError) -> bool {
    match error {
        PgError::Connect { .. }
        | PgError::Io(_)
        | PgError::Closed
        | PgError::Timeout(_)
        | PgError::Protocol(_)
        | PgError::Broken => true,
        PgError::Server(e) => {
            let class = &e.code.as_str()[..2];
            let too_many = e.code == SqlState::new("53300");
            class == "08" || too_many || is_shutdown(e.code)
        }
        PgError::Config(_)
        | PgError::Tls { .. }
        | PgError::Auth { .. }
        | PgError::Decode { .. } => false,
    }
}

/// A prepared statement is not there, or one of its name is: `26000`, `42P05`. Or somebody has
/// changed a table under it: `0A000`.
fn is_unknown_statement(error: &PgError) -> bool {
    let code = error.code();
    code.is_some_and(|code| ["26000", "42P05", "0A000"].contains(&code.as_str()))
}

/// `57P01` … `57P05`: shutting down, crashed, starting up, idle session.
fn is_shutdown(code: SqlState) -> bool {
    code.as_str().starts_with("57P")
}
