//! A session: simple queries, pipelined extended queries, COPY out, replication.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;
use tracing::debug;

use super::config::PgConfig;
use super::copy::CopyOut;
use super::error::PgError;
use super::frame::{Frame, Reader, server_error};
use super::replication::ReplicationStream;
use super::row::{Column, Format, Param, Row, parse_columns};
use super::wire::Wire;

/// Rows that one statement may return through [`Client::query`] and the like; larger results
/// want COPY or a cursor.
pub const MAX_RESULT_ROWS: usize = 4_000_000;

/// Statements that a session keeps for [`Pipeline::cached`]: more than any user of it has.
pub const MAX_CACHED: usize = 128;

/// The rows and the command tag of one statement.
#[derive(Debug, Clone)]
pub struct QueryResult {
    /// Rows, empty for a statement without.
    pub rows: Vec<Row>,
    /// E.g. `INSERT 0 5`.
    pub tag: String,
}

impl QueryResult {
    /// Rows inserted, updated, deleted or selected, from the tag.
    pub fn affected(&self) -> u64 {
        self.tag.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0)
    }
}

/// A prepared statement. Lives as long as its session.
#[derive(Debug, Clone)]
pub struct Statement {
    name: String,
    columns: Arc<[Column]>,
    result_format: Format,
}

/// Where the session stands between transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransactionStatus {
    /// In none.
    Idle,
    /// In one.
    Open,
    /// In one that failed: only ROLLBACK is accepted.
    Failed,
}

/// A logged-in session. Dropping it ends the session; nothing of an interrupted result leaks
/// into the next one (the session becomes [`PgError::Broken`]).
pub struct Client {
    pub(crate) wire: Wire,
    config: PgConfig,
    parameters: BTreeMap<String, String>,
    process_id: i32,
    secret_key: i32,
    transaction: TransactionStatus,
    prepared: u32,
    /// Names of statements that [`Pipeline::cached`] has prepared, by text.
    cached: HashMap<String, String>,
    /// Set while the answers in flight are not in step with what was asked.
    pub(crate) broken: bool,
    notices: fn(&super::ServerError),
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({:?}, pid {})", self.config, self.process_id)
    }
}

/// Cancels what a session is doing, from any thread.
#[derive(Debug, Clone)]
pub struct CancelToken {
    config: PgConfig,
    process_id: i32,
    secret_key: i32,
}

impl CancelToken {
    /// Asks the server to cancel the session's statement. Success only means that the request
    /// was delivered.
    ///
    /// # Errors
    /// Connecting failed.
    pub fn cancel(&self) -> Result<(), PgError> {
        Wire::cancel(&self.config, self.process_id, self.secret_key)
    }
}

/// Breaks a session off at once, from any thread: whoever waits for it gets an error.
#[derive(Debug)]
pub struct Interrupter(std::net::TcpStream);

impl Interrupter {
    /// Closes the session's socket.
    pub fn interrupt(&self) {
        // It may be closed already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Client {
    /// Connects and logs in.
    ///
    /// # Errors
    /// Any of the connecting kinds of [`PgError`].
    pub fn connect(config: &PgConfig) -> Result<Client, PgError> {
        Client::open(config, false)
    }

    /// Connects in logical-replication mode (`replication=database`): simple queries, slot
    /// commands and [`Client::start_replication`].
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_replication(config: &PgConfig) -> Result<Client, PgError> {
        Client::open(config, true)
    }

    fn open(config: &PgConfig, replication: bool) -> Result<Client, PgError> {
        let (wire, info) = Wire::connect(config, replication)?;
        Ok(Client {
            wire,
            config: config.clone(),
            parameters: info.parameters,
            process_id: info.process_id,
            secret_key: info.secret_key,
            transaction: TransactionStatus::Idle,
            prepared: 0,
            cached: HashMap::new(),
            broken: false,
            notices: |notice| debug!(code = %notice.code, "Postgres: {}", notice.message),
        })
    }

    /// A parameter that the server reported, e.g. `server_version`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// Process id of the session's backend.
    pub fn process_id(&self) -> i32 {
        self.process_id
    }

    /// Where the session stood after its last statement.
    pub fn transaction_status(&self) -> TransactionStatus {
        self.transaction
    }

    /// The session cannot be used any more.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The longest silence while an answer is awaited; `None` waits for ever.
    pub fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.config.read_timeout = timeout;
    }

    /// What to do with notices instead of logging them at debug level.
    pub fn on_notice(&mut self, handler: fn(&super::ServerError)) {
        self.notices = handler;
    }

    /// For cancelling what this session does from another thread.
    pub fn cancel_token(&self) -> CancelToken {
        CancelToken {
            config: self.config.clone(),
            process_id: self.process_id,
            secret_key: self.secret_key,
        }
    }

    /// For breaking this session off from another thread.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn interrupter(&self) -> Result<Interrupter, PgError> {
        Ok(Interrupter(self.wire.try_clone_socket()?))
    }

    /// Runs statements with the simple protocol; values come as text.
    ///
    /// # Errors
    /// The first statement that failed; the statements before it are undone unless they
    /// committed themselves.
    pub fn simple_query(&mut self, sql: &str) -> Result<Vec<QueryResult>, PgError> {
        self.begin_exchange()?;
        frontend::query(sql, &mut self.wire.out).map_err(|e| PgError::protocol(e.to_string()))?;
        self.send()?;
        let mut results = vec![];
        let failed = self.read_results(None, &mut results, None)?;
        failed.map_or(Ok(results), |e| Err(PgError::Server(e)))
    }

    /// Runs statements whose results do not matter.
    ///
    /// # Errors
    /// As [`Client::simple_query`].
    pub fn batch_execute(&mut self, sql: &str) -> Result<(), PgError> {
        self.simple_query(sql).map(drop)
    }

    /// Runs one statement with parameters.
    ///
    /// # Errors
    /// The server's error, or a broken connection.
    pub fn query(&mut self, sql: &str, params: &[Param]) -> Result<Vec<Row>, PgError> {
        let mut pipeline = self.pipeline()?;
        pipeline.query(sql, params, Format::Text)?;
        Ok(pipeline.run_one()?.pop().map(|r| r.rows).unwrap_or_default())
    }

    /// Runs one statement that returns at most one row.
    ///
    /// # Errors
    /// As [`Client::query`]; [`PgError::Decode`] if there are more rows.
    pub fn query_opt(&mut self, sql: &str, params: &[Param]) -> Result<Option<Row>, PgError> {
        let mut rows = self.query(sql, params)?;
        match rows.len() {
            0 | 1 => Ok(rows.pop()),
            n => Err(PgError::Decode {
                column: "0".into(),
                cause: format!("{n} rows where at most one was expected"),
            }),
        }
    }

    /// Runs one statement that returns one row.
    ///
    /// # Errors
    /// As [`Client::query_opt`]; [`PgError::Decode`] if there is no row.
    pub fn query_one(&mut self, sql: &str, params: &[Param]) -> Result<Row, PgError> {
        self.query_opt(sql, params)?.ok_or_else(|| PgError::Decode {
            column: "0".into(),
            cause: "no row where one was expected".into(),
        })
    }

    /// Runs one statement and says how many rows it affected.
    ///
    /// # Errors
    /// As [`Client::query`].
    pub fn execute(&mut self, sql: &str, params: &[Param]) -> Result<u64, PgError> {
        let mut pipeline = self.pipeline()?;
        pipeline.query(sql, params, Format::Text)?;
        Ok(pipeline.run_one()?.pop().map(|r| r.affected()).unwrap_or_default())
    }

    /// Prepares a statement for repeated use.
    ///
    /// # Errors
    /// The server's error, or a broken connection.
    pub fn prepare(&mut self, sql: &str, result_format: Format) -> Result<Statement, PgError> {
        self.begin_exchange()?;
        self.prepared += 1;
        let name = format!("s{}", self.prepared);
        let out = &mut self.wire.out;
        frontend::parse(&name, sql, std::iter::empty(), out)
            .and_then(|()| frontend::describe(b'S', &name, out))
            .map_err(|e| PgError::protocol(e.to_string()))?;
        frontend::sync(out);
        self.send()?;
        let mut columns: Arc<[Column]> = [].into();
        if let Some(e) = self.read_results(Some(&mut columns), &mut vec![], None)? {
            return Err(PgError::Server(e));
        }
        let with_format = columns.iter().cloned().map(|c| Column { format: result_format, ..c });
        Ok(Statement { name, columns: with_format.collect(), result_format })
    }

    /// Statements to be sent together.
    ///
    /// # Errors
    /// [`PgError::Broken`].
    pub fn pipeline(&mut self) -> Result<Pipeline<'_>, PgError> {
        self.begin_exchange()?;
        Ok(Pipeline { client: self, segments: vec![vec![]], fresh: vec![], sent: false })
    }

    /// Starts `COPY … TO STDOUT`.
    ///
    /// # Errors
    /// The server's error, or a broken connection.
    pub fn copy_out(&mut self, sql: &str) -> Result<CopyOut<'_>, PgError> {
        self.begin_exchange()?;
        frontend::query(sql, &mut self.wire.out).map_err(|e| PgError::protocol(e.to_string()))?;
        self.send()?;
        let mut failed = None;
        loop {
            let frame = self.next_frame()?;
            match frame.tag {
                b'H' => {
                    let binary = Reader::new(frame.body).u8("COPY format")? == 1;
                    return Ok(CopyOut::new(self, binary));
                }
                b'E' => failed = Some(Box::new(server_error(frame.body))),
                b'Z' => {
                    self.ready_from(None)?;
                    return Err(failed.map_or_else(
                        || PgError::protocol("the statement is no COPY TO STDOUT"),
                        PgError::Server,
                    ));
                }
                b'G' => {
                    self.broken = true;
                    return Err(PgError::protocol("the statement is no COPY TO STDOUT"));
                }
                _ => {}
            }
        }
    }

    /// Runs `START_REPLICATION …` (as given) and turns the session into a stream. Only on a
    /// session of [`Client::connect_replication`].
    ///
    /// # Errors
    /// The server's error (e.g. 55006: the slot is in use). The session is used up either way.
    pub fn start_replication(mut self, command: &str) -> Result<ReplicationStream, PgError> {
        self.begin_exchange()?;
        frontend::query(command, &mut self.wire.out)
            .map_err(|e| PgError::protocol(e.to_string()))?;
        self.send()?;
        loop {
            let frame = self.next_frame()?;
            match frame.tag {
                b'W' => return Ok(ReplicationStream::new(self)),
                b'E' => return Err(PgError::Server(Box::new(server_error(frame.body)))),
                b'Z' | b'C' | b'H' | b'G' => {
                    return Err(PgError::protocol(
                        "the command did not start a replication stream",
                    ));
                }
                _ => {}
            }
        }
    }

    pub(crate) fn begin_exchange(&mut self) -> Result<(), PgError> {
        if self.broken {
            return Err(PgError::Broken);
        }
        // Cleared when the server is ready again.
        self.broken = true;
        self.wire.out.clear();
        Ok(())
    }

    fn deadline(&self) -> Option<Instant> {
        self.config.read_timeout.map(|t| Instant::now() + t)
    }

    pub(crate) fn send(&mut self) -> Result<(), PgError> {
        let deadline = self.deadline();
        let timeout = self.config.read_timeout.unwrap_or_default();
        self.wire.flush(deadline).map_err(|e| match e {
            PgError::Timeout(_) => PgError::Timeout(timeout),
            e => e,
        })
    }

    /// The next message that is not a notice or the like.
    pub(crate) fn next_frame(&mut self) -> Result<Frame<'_>, PgError> {
        loop {
            let deadline = self.deadline();
            let timeout = self.config.read_timeout.unwrap_or_default();
            let Some(frame) = self.wire.next(deadline)? else {
                return Err(PgError::Timeout(timeout));
            };
            match frame.tag {
                b'N' => (self.notices)(&server_error(frame.body)),
                b'S' => {
                    let mut reader = Reader::new(frame.body);
                    let name = String::from_utf8_lossy(reader.cstr("name")?).into_owned();
                    let value = String::from_utf8_lossy(reader.cstr("value")?).into_owned();
                    // Only the parameters of the log-in can change: no growth.
                    if let Some(known) = self.parameters.get_mut(&name) {
                        *known = value;
                    }
                }
                b'A' => {}
                // A FATAL error is the server's last word; what follows is the end of the stream.
                _ => break,
            }
        }
        // Taken anew to satisfy the borrow checker: the frame is still the head of the buffer.
        self.wire.again().ok_or_else(|| PgError::protocol("a message vanished"))
    }

    /// Reads answers until the server is ready. Returns the server's error, if any.
    /// `described` receives the columns of a `Describe`; `prepared` gives those of statements
    /// that are executed without one.
    fn read_results(
        &mut self,
        mut described: Option<&mut Arc<[Column]>>,
        results: &mut Vec<QueryResult>,
        prepared: Option<&[Option<Arc<[Column]>>]>,
    ) -> Result<Option<Box<super::ServerError>>, PgError> {
        let mut failed = None;
        let known = |n: usize| prepared.and_then(|p| p.get(n)?.clone());
        let mut columns: Arc<[Column]> = known(0).unwrap_or_default();
        let mut rows = vec![];
        loop {
            let frame = self.next_frame()?;
            match frame.tag {
                b'T' => {
                    columns = parse_columns(frame.body)?;
                    if let Some(described) = described.as_deref_mut() {
                        *described = columns.clone();
                    }
                }
                b'D' => {
                    if rows.len() == MAX_RESULT_ROWS {
                        return Err(PgError::protocol(format!(
                            "a result of more than {MAX_RESULT_ROWS} rows"
                        )));
                    }
                    rows.push(Row::parse(&columns, frame.body)?);
                }
                b'C' | b'I' | b's' => {
                    let tag = Reader::new(frame.body).cstr("command tag").unwrap_or_default();
                    let tag = String::from_utf8_lossy(tag).into_owned();
                    results.push(QueryResult { rows: std::mem::take(&mut rows), tag });
                    columns = known(results.len()).unwrap_or_default();
                }
                b'E' => failed = Some(Box::new(server_error(frame.body))),
                b'Z' => {
                    let status = frame.body.first().copied();
                    self.ready_from(status)?;
                    return Ok(failed);
                }
                // A COPY that nobody asked for would never end.
                b'G' | b'H' | b'W' => {
                    return Err(PgError::protocol("the statement starts a COPY; use copy_out"));
                }
                _ => {}
            }
            if let Some(error) = &failed
                && error.severity != "ERROR"
            {
                // FATAL: no ReadyForQuery will follow, the session is over.
                return Err(PgError::Server(error.clone()));
            }
        }
    }

    /// The server is ready for the next exchange.
    pub(crate) fn ready_from(&mut self, status: Option<u8>) -> Result<(), PgError> {
        self.transaction = match status {
            Some(b'T') => TransactionStatus::Open,
            Some(b'E') => TransactionStatus::Failed,
            _ => TransactionStatus::Idle,
        };
        self.broken = false;
        Ok(())
    }
}

/// What is expected of one statement in a pipeline: its columns if it is prepared.
type Expected = Option<Arc<[Column]>>;

/// Statements that are sent together. Those between two [`Pipeline::sync`]s are one implicit
/// transaction (unless they begin one themselves): if one fails, the rest up to the sync is
/// skipped.
#[derive(Debug)]
pub struct Pipeline<'c> {
    client: &'c mut Client,
    segments: Vec<Vec<Expected>>,
    /// Texts and names of statements that it prepares.
    fresh: Vec<(String, String)>,
    sent: bool,
}

impl Pipeline<'_> {
    /// Adds a statement.
    ///
    /// # Errors
    /// It cannot be encoded (a NUL, or more than 65,535 parameters).
    pub fn query(
        &mut self,
        sql: &str,
        params: &[Param],
        result_format: Format,
    ) -> Result<&mut Self, PgError> {
        let out = &mut self.client.wire.out;
        frontend::parse("", sql, params.iter().map(|p| p.type_oid), out)
            .map_err(|e| PgError::protocol(e.to_string()))?;
        self.bind("", params, result_format)?;
        let out = &mut self.client.wire.out;
        frontend::describe(b'P', "", out)
            .and_then(|()| frontend::execute("", 0, out))
            .map_err(|e| PgError::protocol(e.to_string()))?;
        self.expect(None);
        Ok(self)
    }

    /// Adds a statement that is parsed once per session and then known by its text: for the same
    /// few statements over and over. Beyond [`MAX_CACHED`] of them it is [`Pipeline::query`].
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn cached(
        &mut self,
        sql: &str,
        params: &[Param],
        result_format: Format,
    ) -> Result<&mut Self, PgError> {
        let fresh = self.fresh.iter().find(|(text, _)| text == sql).map(|(_, name)| name);
        let name = match self.client.cached.get(sql).or(fresh) {
            Some(name) => name.clone(),
            None if self.client.cached.len() + self.fresh.len() >= MAX_CACHED => {
                return self.query(sql, params, result_format);
            }
            None => {
                self.client.prepared += 1;
                // Behind a pooler the name may be found in a session where somebody else gave it:
                // then at least to the same text.
                let mut hasher = DefaultHasher::new();
                sql.hash(&mut hasher);
                let name = format!("c{}_{:016x}", self.client.prepared, hasher.finish());
                let types = params.iter().map(|p| p.type_oid);
                frontend::parse(&name, sql, types, &mut self.client.wire.out)
                    .map_err(|e| PgError::protocol(e.to_string()))?;
                self.fresh.push((sql.to_owned(), name.clone()));
                name
            }
        };
        self.bind(&name, params, result_format)?;
        let out = &mut self.client.wire.out;
        frontend::describe(b'P', "", out)
            .and_then(|()| frontend::execute("", 0, out))
            .map_err(|e| PgError::protocol(e.to_string()))?;
        self.expect(None);
        Ok(self)
    }

    /// Adds an execution of a prepared statement.
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn execute(
        &mut self,
        statement: &Statement,
        params: &[Param],
    ) -> Result<&mut Self, PgError> {
        self.bind(&statement.name, params, statement.result_format)?;
        frontend::execute("", 0, &mut self.client.wire.out)
            .map_err(|e| PgError::protocol(e.to_string()))?;
        self.expect(Some(statement.columns.clone()));
        Ok(self)
    }

    /// Ends a segment: what follows succeeds or fails on its own.
    pub fn sync(&mut self) -> &mut Self {
        frontend::sync(&mut self.client.wire.out);
        self.segments.push(vec![]);
        self
    }

    /// Sends everything and reads all answers: one entry per segment.
    ///
    /// # Errors
    /// Only if the session broke; a failed segment is an entry.
    pub fn run(mut self) -> Result<Vec<Result<Vec<QueryResult>, PgError>>, PgError> {
        if self.segments.last().is_some_and(Vec::is_empty) && self.segments.len() > 1 {
            self.segments.pop();
        } else {
            frontend::sync(&mut self.client.wire.out);
        }
        self.sent = true;
        self.client.send()?;
        let mut out = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            let mut results = Vec::with_capacity(segment.len());
            let failed = self.client.read_results(None, &mut results, Some(segment))?;
            out.push(failed.map_or(Ok(results), |e| Err(PgError::Server(e))));
            self.client.broken = out.len() < self.segments.len();
        }
        // After a failure the server has skipped some of them; a name is never used twice.
        if out.iter().all(Result::is_ok) {
            self.client.cached.extend(self.fresh.drain(..));
        }
        Ok(out)
    }

    /// Sends everything as one segment.
    ///
    /// # Errors
    /// The first failure.
    pub fn run_one(self) -> Result<Vec<QueryResult>, PgError> {
        let mut all = vec![];
        for segment in self.run()? {
            all.extend(segment?);
        }
        Ok(all)
    }

    fn expect(&mut self, expected: Expected) {
        if let Some(segment) = self.segments.last_mut() {
            segment.push(expected);
        }
    }

    fn bind(&mut self, name: &str, params: &[Param], result: Format) -> Result<(), PgError> {
        let code = |f: Format| i16::from(f == Format::Binary);
        frontend::bind(
            "",
            name,
            params.iter().map(|p| code(p.format)),
            params,
            |param: &Param, out| {
                Ok(match &param.value {
                    None => IsNull::Yes,
                    Some(bytes) => {
                        out.extend_from_slice(bytes);
                        IsNull::No
                    }
                })
            },
            Some(code(result)),
            &mut self.client.wire.out,
        )
        .map_err(|e| match e {
            frontend::BindError::Conversion(e) => PgError::protocol(e.to_string()),
            frontend::BindError::Serialization(e) => PgError::protocol(e.to_string()),
        })
    }
}

impl Drop for Pipeline<'_> {
    fn drop(&mut self) {
        // Given up before it was sent: nothing is in flight, the session stays usable.
        if !self.sent {
            self.client.wire.out.clear();
            self.client.broken = false;
        }
    }
}
