//! The options as the server uses them: typed, with derived values, and checked against each
//! other (spec: operations §1.4, §1.5).

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use zeroring_net::ws::{DeflateConfig, WsConfig};

use super::parse::{OptionValue, Settings, Source};

/// Most executors: far above any machine, below what rings and masks are made for.
pub const MAX_EXECUTORS: usize = 256;

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(String);

impl Secret {
    /// A secret.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text. Must not reach a log.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// Why options that parse do not go together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The original's text: `missing --admin-password: …` and the like.
    #[error("{0}")]
    Rule(String),
    /// Something that this build cannot do yet.
    #[error("{what} is not supported by this version of zeroring yet. {instead}")]
    NotYet {
        /// The options.
        what: String,
        /// What to do.
        instead: String,
    },
}

/// An endpoint of the app.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Endpoint {
    /// URLPatterns; the first is the default target. Empty: there is no endpoint.
    pub urls: Vec<String>,
    /// Sent as `X-Api-Key`.
    pub api_key: Option<Secret>,
    /// Send the cookies of the upgrade request.
    pub forward_cookies: bool,
    /// Names of the client app's custom headers that pass, lower case.
    pub allowed_client_headers: Vec<String>,
    /// Names of upgrade-request headers that pass, lower case.
    pub allowed_request_headers: Vec<String>,
}

/// The purger's settings (spec: view-syncer-cvr §2.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PurgeOptions {
    /// Groups that were inactive for so long may be purged.
    pub inactive: Duration,
    /// Pause between rounds while there is something to do.
    pub interval: Duration,
    /// Groups per round at first; 0 purges nothing.
    pub batch: usize,
}

/// Where client view records live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CvrLocation {
    /// A Postgres database.
    Postgres(Secret),
    /// A local SQLite file.
    File(PathBuf),
}

/// What this node does (spec: operations §1.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Replicates and serves clients.
    SingleNode,
    /// Replicates, and serves view syncers.
    ReplicationManager,
    /// Serves clients, following a replication manager.
    ViewSyncer,
}

/// How sockets are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoBackend {
    /// io_uring where it works, otherwise epoll.
    Auto,
    /// io_uring or no start.
    IoUring,
    /// epoll.
    Epoll,
}

/// Level of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LogLevel {
    Debug,
    Info,
    Warn,
    Error,
}

/// Format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// All options that this build acts upon.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// `NODE_ENV=development`: no admin password needed.
    pub development: bool,
    /// Upstream database, a Postgres URI.
    pub upstream_db: Secret,
    /// Most connections for CRUD mutations.
    pub upstream_max_conns: usize,
    /// Make slots that survive a failover.
    pub slot_failover: bool,
    /// Silence of the replication stream after which it is torn down.
    pub stream_inbound_timeout: Option<Duration>,
    /// `ZERO_PG_SOCKET_INACTIVITY_TIMEOUT`: silence of a session that owes an answer; none: no limit.
    pub socket_inactivity: Option<Duration>,
    /// The mutate endpoint.
    pub mutate: Endpoint,
    /// The query endpoint.
    pub query: Endpoint,
    /// Execute legacy CRUD mutations.
    pub enable_crud_mutations: bool,
    /// Where client view records live.
    pub cvr: CvrLocation,
    /// Most connections to the CVR database.
    pub cvr_max_conns: usize,
    /// When inactive client view records are purged.
    pub purge: PurgeOptions,
    /// The replica.
    pub replica_file: PathBuf,
    /// Level of the log.
    pub log_level: LogLevel,
    /// Format of the log.
    pub log_format: LogFormat,
    /// Hydrations longer than this are logged.
    pub slow_hydrate: Duration,
    /// Name of the app.
    pub app_id: String,
    /// Publications; empty: everything in schema `public`.
    pub publications: Vec<String>,
    /// Number of the shard.
    pub shard_num: u32,
    /// Auth tokens are JWTs to be verified: `ZERO_AUTH_JWK`, `_SECRET` or `_JWKS_URL` is set.
    pub jwt: bool,
    /// Interval of credential checks.
    pub auth_revalidate: Duration,
    /// Interval of query transformations.
    pub auth_retransform: Duration,
    /// Port of clients and endpoints; 0: any free one.
    pub port: u16,
    /// Name of this node.
    pub task_id: String,
    /// What this node does.
    pub role: Role,
    /// Executors; 0 on a replication manager.
    pub num_sync_workers: usize,
    /// Copy everything anew when replication cannot go on.
    pub auto_reset: bool,
    /// Password of `/statz` and the inspector.
    pub admin_password: Option<Secret>,
    /// Compression of messages to clients.
    pub compression: Option<DeflateConfig>,
    /// Largest message of a client, bytes.
    pub max_payload_bytes: usize,
    /// Connections of the initial copy.
    pub copy_workers: usize,
    /// Initial copy in text format.
    pub text_copy: bool,
    /// Version that is logged and told to inspectors.
    pub server_version: String,
    /// Drain when `/keepalive` stops for this long.
    pub keepalive_timeout: Option<Duration>,
    /// How sockets are served.
    pub io_backend: IoBackend,
    /// Longest wait for an answer of the app's endpoints; none: the default.
    pub api_timeout: Option<Duration>,
    /// Limit of the orderly drain.
    pub drain_timeout: Option<Duration>,
}

/// What the environment says beside the options.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// `NODE_ENV`.
    pub node_env: Option<String>,
    /// `ZERO_PG_SOCKET_INACTIVITY_TIMEOUT`, milliseconds.
    pub socket_inactivity_ms: Option<String>,
    /// Task id from the ECS metadata, if this is ECS.
    pub ecs_task_id: Option<String>,
    /// Whether this is ECS.
    pub ecs: bool,
    /// A random id for the node, used if nothing else names it.
    pub random_id: String,
    /// Cores that this process may use: affinity and cgroup quota considered.
    pub cores: usize,
}

/// Options, and what should be logged about them (without secrets).
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The options.
    pub options: Options,
    /// Deprecated options that were given: (variable, what to use instead).
    pub deprecated: Vec<(String, &'static str)>,
    /// Lines for the log: options that are not active yet, values that were adjusted.
    pub notes: Vec<String>,
}

/// Reads settings by path; a wrong type cannot happen for a setting that was parsed.
struct Reader<'a>(&'a Settings);

impl Reader<'_> {
    fn text(&self, path: &str) -> Option<String> {
        match self.0.get(path).0 {
            Some(OptionValue::Text(text)) => Some(text.clone()),
            _ => None,
        }
    }

    fn secret(&self, path: &str) -> Option<Secret> {
        self.text(path).map(Secret)
    }

    fn number(&self, path: &str) -> Option<f64> {
        match self.0.get(path).0 {
            Some(OptionValue::Number(n)) => Some(*n),
            _ => None,
        }
    }

    fn flag(&self, path: &str) -> bool {
        matches!(self.0.get(path).0, Some(OptionValue::Flag(true)))
    }

    fn list(&self, path: &str) -> Option<Vec<String>> {
        match self.0.get(path).0 {
            Some(OptionValue::List(words)) => Some(words.clone()),
            _ => None,
        }
    }

    fn given(&self, path: &str) -> bool {
        self.0.get(path).1 != Source::Default
    }

    /// A number of whole things: rounded up, at least 0.
    fn count(&self, path: &str) -> Option<usize> {
        // Casts saturate: more than that is no count of anything.
        self.number(path).map(|n| n.ceil().max(0.0) as usize)
    }

    /// A time; none for 0, less, and infinity.
    fn time(&self, path: &str, unit: Duration) -> Option<Duration> {
        self.number(path).and_then(|n| time(n, unit))
    }

    fn headers(&self, path: &str) -> Option<Vec<String>> {
        self.list(path).map(|names| names.iter().map(|n| n.to_ascii_lowercase()).collect())
    }
}

/// Longest time that is meant as one; beyond it, it is "never".
const LONGEST_TIME: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

fn time(n: f64, unit: Duration) -> Option<Duration> {
    let seconds = n * unit.as_secs_f64();
    (seconds > 0.0 && seconds < LONGEST_TIME.as_secs_f64())
        .then(|| Duration::from_secs_f64(seconds))
}

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// Keep-alive time-out on ECS, where the load balancer calls `/keepalive` every 5 s.
const ECS_KEEPALIVE: Duration = Duration::from_secs(20);
/// `ZERO_PG_SOCKET_INACTIVITY_TIMEOUT` if not given, milliseconds.
const SOCKET_INACTIVITY_MS: f64 = 120_000.0;

impl Options {
    /// Derives and checks.
    ///
    /// # Errors
    /// [`ConfigError`], with the original's text where it has one.
    pub fn load(settings: &Settings, around: &Surroundings) -> Result<Loaded, ConfigError> {
        let read = Reader(settings);
        let mut notes = notes(settings);
        let role = role(&read)?;
        let num_sync_workers = workers(&read, around, &mut notes);
        let compression = compression(&read)?;
        let upstream_db = read.secret("upstream.db").unwrap_or_default();
        let replica_file = PathBuf::from(read.text("replica.file").unwrap_or_default());
        let options = Options {
            development: around.node_env.as_deref() == Some("development"),
            cvr: cvr(&read, &upstream_db, &replica_file),
            upstream_db,
            upstream_max_conns: read.count("upstream.maxConns").unwrap_or(0),
            slot_failover: read.flag("upstream.pgReplicationSlotFailover"),
            stream_inbound_timeout: read.time("upstream.pgStreamInboundTimeoutMs", MS),
            socket_inactivity: socket_inactivity(around),
            mutate: mutate(&read),
            query: endpoint(&read, if read.given("query.url") { "query" } else { "getQueries" }),
            enable_crud_mutations: read.flag("enableCrudMutations"),
            cvr_max_conns: read.count("cvr.maxConns").unwrap_or(0),
            purge: purge(&read),
            replica_file,
            log_level: match read.text("log.level").as_deref() {
                Some("debug") => LogLevel::Debug,
                Some("warn") => LogLevel::Warn,
                Some("error") => LogLevel::Error,
                _ => LogLevel::Info,
            },
            log_format: match read.text("log.format").as_deref() {
                Some("json") => LogFormat::Json,
                _ => LogFormat::Text,
            },
            slow_hydrate: read.time("log.slowHydrateThreshold", MS).unwrap_or_default(),
            app_id: read.text("app.id").unwrap_or_default(),
            publications: read.list("app.publications").unwrap_or_default(),
            shard_num: read.count("shard.num").unwrap_or(0).min(u32::MAX as usize) as u32,
            jwt: ["auth.jwk", "auth.secret", "auth.jwksUrl"].iter().any(|path| read.given(path)),
            auth_revalidate: read
                .time("auth.revalidateIntervalSeconds", SECOND)
                .unwrap_or(LONGEST_TIME),
            auth_retransform: read
                .time("auth.retransformIntervalSeconds", SECOND)
                .unwrap_or(LONGEST_TIME),
            port: read.number("port").unwrap_or(0.0) as u16,
            task_id: read
                .text("taskID")
                .or_else(|| around.ecs_task_id.clone())
                .unwrap_or_else(|| around.random_id.clone()),
            role,
            num_sync_workers,
            auto_reset: read.flag("autoReset"),
            admin_password: read.secret("adminPassword"),
            compression,
            max_payload_bytes: read.count("websocketMaxPayloadBytes").unwrap_or(0),
            copy_workers: read.count("initialSync.tableCopyWorkers").unwrap_or(1).max(1),
            text_copy: read.flag("initialSync.textCopy"),
            server_version: read
                .text("serverVersion")
                .unwrap_or_else(|| env!("CARGO_PKG_VERSION").to_owned()),
            keepalive_timeout: match read.number("keepaliveTimeoutMs") {
                Some(n) => time(n, MS),
                None => around.ecs.then_some(ECS_KEEPALIVE),
            },
            io_backend: match read.text("ioBackend").as_deref() {
                Some("io_uring") => IoBackend::IoUring,
                Some("epoll") => IoBackend::Epoll,
                _ => IoBackend::Auto,
            },
            api_timeout: read.time("apiTimeoutMs", MS),
            drain_timeout: read.time("drainTimeoutMs", MS),
        };
        options.check()?;
        let deprecated = settings.given().filter_map(|def| Some((def.env(), def.deprecated?)));
        Ok(Loaded { options, deprecated: deprecated.collect(), notes })
    }

    /// The rules between options.
    fn check(&self) -> Result<(), ConfigError> {
        let rule = |text: String| Err(ConfigError::Rule(text));
        if self.admin_password.as_ref().is_none_or(|p| p.expose().is_empty()) && !self.development {
            return rule("missing --admin-password: required in production mode".to_owned());
        }
        let workers = self.num_sync_workers;
        if self.enable_crud_mutations && self.upstream_max_conns < workers {
            return rule(insufficient("upstream", self.upstream_max_conns, workers));
        }
        match &self.cvr {
            CvrLocation::Postgres(_) if self.cvr_max_conns < workers => {
                rule(insufficient("cvr", self.cvr_max_conns, workers))
            }
            CvrLocation::File(path) if same_file(path, &self.replica_file) => rule(format!(
                "ZERO_CVR_DB and ZERO_REPLICA_FILE are the same file, {}: give them two",
                path.display()
            )),
            _ => Ok(()),
        }
    }

    /// How client sockets are served.
    pub fn websocket(&self) -> WsConfig {
        WsConfig {
            max_payload_bytes: self.max_payload_bytes,
            deflate: self.compression.clone(),
            ..WsConfig::default()
        }
    }

    /// What cannot be served by this build, beyond what [`Options::load`] checks.
    ///
    /// # Errors
    /// [`ConfigError::NotYet`] for fleet roles.
    pub fn check_supported(&self) -> Result<(), ConfigError> {
        let not_yet = |what: &str, instead: &str| {
            Err(ConfigError::NotYet { what: what.to_owned(), instead: instead.to_owned() })
        };
        match self.role {
            Role::SingleNode => Ok(()),
            Role::ReplicationManager => not_yet(
                "The replication manager (ZERO_NUM_SYNC_WORKERS=0)",
                "Run a single node: ZERO_NUM_SYNC_WORKERS of 1 or more.",
            ),
            Role::ViewSyncer => not_yet(
                "The view syncer (ZERO_CHANGE_STREAMER_URI, ZERO_CHANGE_STREAMER_MODE=discover)",
                "Run a single node: leave both unset.",
            ),
        }
    }
}

fn insufficient(what: &str, conns: usize, workers: usize) -> String {
    let upper = what.to_ascii_uppercase();
    format!(
        "Insufficient {what} connections ({conns}) for {workers} syncers.Increase \
         ZERO_{upper}_MAX_CONNS or decrease ZERO_NUM_SYNC_WORKERS (which defaults to available \
         cores)."
    )
}

fn same_file(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn notes(settings: &Settings) -> Vec<String> {
    use super::def::Status;
    let given = settings.given().filter_map(|def| match def.status {
        Status::Active => None,
        Status::NotYet => {
            Some(format!("{} is accepted, but not active in this version yet", def.env()))
        }
        Status::NoEffect(why) => Some(format!("{} has no effect: {why}", def.env())),
    });
    let mut notes: Vec<String> = given.collect();
    for def in settings.given() {
        if let Some(OptionValue::List(words)) = settings.get(def.path).0
            && words.iter().any(|word| word.trim() != word || word.is_empty())
        {
            notes.push(format!(
                "{} has entries with blanks around them, or empty ones; they are taken as they are",
                def.env()
            ));
        }
    }
    notes
}

fn role(read: &Reader<'_>) -> Result<Role, ConfigError> {
    if read.flag("litestream.backupUsingV5") && !read.flag("litestream.restoreUsingV5") {
        return Err(ConfigError::Rule(
            "--litestream-backup-using-v5 requires --litestream-restore-using-v5".to_owned(),
        ));
    }
    let follows = read.text("changeStreamer.uri").is_some()
        || read.text("changeStreamer.mode").as_deref() == Some("discover");
    Ok(match read.number("numSyncWorkers") {
        Some(n) if n <= 0.0 => Role::ReplicationManager,
        _ if follows => Role::ViewSyncer,
        _ => Role::SingleNode,
    })
}

fn workers(read: &Reader<'_>, around: &Surroundings, notes: &mut Vec<String>) -> usize {
    let Some(given) = read.number("numSyncWorkers") else {
        return around.cores.saturating_sub(1).clamp(1, MAX_EXECUTORS);
    };
    let workers = read.count("numSyncWorkers").unwrap_or(1).min(MAX_EXECUTORS);
    if workers as f64 != given {
        notes.push(format!("ZERO_NUM_SYNC_WORKERS={given} is taken as {workers}"));
    }
    workers
}

fn purge(read: &Reader<'_>) -> PurgeOptions {
    const HOUR: f64 = 3600.0;
    let number = |name: &str| read.number(&format!("cvr.garbageCollection{name}")).unwrap_or(0.0);
    let seconds = |s: f64| Duration::try_from_secs_f64(s.max(0.0)).unwrap_or(Duration::MAX);
    PurgeOptions {
        inactive: seconds(number("InactivityThresholdHours") * HOUR),
        interval: seconds(number("InitialIntervalSeconds")),
        batch: number("InitialBatchSize").max(0.0) as usize,
    }
}

fn cvr(read: &Reader<'_>, upstream: &Secret, replica: &Path) -> CvrLocation {
    match read.text("cvr.db").as_deref() {
        None => CvrLocation::Postgres(upstream.clone()),
        Some("embedded") => {
            // Beside the replica, but not one of the sibling names that the original uses.
            let mut name = replica.as_os_str().to_owned();
            name.push("-cvr");
            CvrLocation::File(PathBuf::from(name))
        }
        Some(uri) => match uri.strip_prefix("file:") {
            Some(path) => CvrLocation::File(PathBuf::from(path)),
            None => CvrLocation::Postgres(Secret::new(uri)),
        },
    }
}

fn endpoint(read: &Reader<'_>, group: &str) -> Endpoint {
    let path = |field: &str| format!("{group}.{field}");
    Endpoint {
        urls: read.list(&path("url")).unwrap_or_default(),
        api_key: read.secret(&path("apiKey")),
        forward_cookies: read.flag(&path("forwardCookies")),
        allowed_client_headers: read.headers(&path("allowedClientHeaders")).unwrap_or_default(),
        allowed_request_headers: read.headers(&path("allowedRequestHeaders")).unwrap_or_default(),
    }
}

/// Mutations merge two groups by field: the current one wins, but for the URL; cookies are sent
/// if the group that gave the URL says so.
fn mutate(read: &Reader<'_>) -> Endpoint {
    let (current, legacy) = (endpoint(read, "mutate"), endpoint(read, "push"));
    let from_legacy = read.given("push.url");
    Endpoint {
        forward_cookies: if from_legacy {
            current.forward_cookies || legacy.forward_cookies
        } else {
            current.forward_cookies
        },
        urls: if from_legacy { legacy.urls } else { current.urls },
        api_key: current.api_key.or(legacy.api_key),
        allowed_client_headers: if read.given("mutate.allowedClientHeaders") {
            current.allowed_client_headers
        } else {
            legacy.allowed_client_headers
        },
        allowed_request_headers: if read.given("mutate.allowedRequestHeaders") {
            current.allowed_request_headers
        } else {
            legacy.allowed_request_headers
        },
    }
}

/// permessage-deflate with the options of the original's WebSocket library, as far as they can
/// be observed. Contexts are never taken over between messages here, so the switches for that,
/// and limits of its thread pool, change nothing.
fn compression(read: &Reader<'_>) -> Result<Option<DeflateConfig>, ConfigError> {
    const NAME: &str = "ZERO_WEBSOCKET_COMPRESSION_OPTIONS";
    if !read.flag("websocketCompression") {
        return Ok(None);
    }
    let mut config = DeflateConfig::default();
    let Some(text) = read.text("websocketCompressionOptions") else {
        return Ok(Some(config));
    };
    let options: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&text).map_err(|e| {
            ConfigError::Rule(format!("Failed to parse {NAME}: {e}. Expected valid JSON."))
        })?;
    let number = |value: Option<&serde_json::Value>, name: &str, from: u64, to: u64| {
        let Some(value) = value.filter(|v| !v.is_boolean()) else { return Ok(None) };
        match value.as_u64().filter(|n| (from..=to).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => Err(ConfigError::Rule(format!(
                "{NAME}: {name} must be an integer from {from} to {to}, not {value}"
            ))),
        }
    };
    if let Some(n) = number(options.get("threshold"), "threshold", 0, u64::from(u32::MAX))? {
        config.threshold = n as usize;
    }
    if let Some(n) = number(options.get("serverMaxWindowBits"), "serverMaxWindowBits", 9, 15)? {
        config.server_max_window_bits = n as u8;
    }
    if let Some(n) = number(options.get("clientMaxWindowBits"), "clientMaxWindowBits", 9, 15)? {
        config.client_max_window_bits = Some(n as u8);
    }
    let level = options.get("zlibDeflateOptions").and_then(|zlib| zlib.get("level"));
    if let Some(n) = number(level, "zlibDeflateOptions.level", 0, 9)? {
        config.level = n as u32;
    }
    Ok(Some(config))
}

fn socket_inactivity(around: &Surroundings) -> Option<Duration> {
    let given = around.socket_inactivity_ms.as_deref().filter(|text| !text.is_empty());
    let ms = given.map_or(SOCKET_INACTIVITY_MS, zeroring_core::protocol::connect::js_number);
    time(if ms.is_nan() { SOCKET_INACTIVITY_MS } else { ms }, MS)
}
