//! The one table of options: everything the original 1.9 and its successor know, and ours.
//!
//! Facts: spec operations §1.2. Names, types, defaults and visibility are the original's; the
//! words are ours. A test keeps `docs/options.md` equal to it.

use super::def::{
    OptionDef, Origin, flag, flag_or, list, list_or, number, number_or, one_of, required, text,
    text_or,
};

const NO_TELEMETRY: &str = "no telemetry is ever sent";
const NO_WORKER_POOLS: &str = "connections are not divided over workers";
const NO_LITESTREAM_VFS: &str = "backups are verified without the VFS extension";
const NO_SQLITE_CHANGE_LOG: &str = "the change log is kept as in 1.9";
const NO_SCRATCH_FILES: &str = "operator state is kept in memory, not in scratch files";

const USE_COOKIES_OR_TOKENS: &str =
    "Use cookie-based authentication or an auth token, checked by the endpoints, instead.";

const URL_DOC: &str = "\
URLs of the app's endpoint for this. The first one is the default target. All of them are
URLPatterns: a client may only name a target that one of them matches (search and hash are
wildcards). Comma-separated in the environment.";
const API_KEY_DOC: &str = "Secret that is sent to the endpoint as `X-Api-Key`.";
const COOKIES_DOC: &str = "Send the cookies of the client's upgrade request to the endpoint.";
const CLIENT_HEADERS_DOC: &str = "\
Names of custom headers, given by the client app, that may be sent to the endpoint.
Case does not matter. Not set: none.";
const REQUEST_HEADERS_DOC: &str = "\
Names of headers of the client's upgrade request that are sent to the endpoint.
Case does not matter. Not set: none.";

/// All options, in the order of `--help`.
pub static OPTIONS: &[OptionDef] = &[
    required(
        "upstream.db",
        "\
The Postgres database to replicate from, as URI. A direct connection, not through a
transaction pooler: replication needs one.",
    )
    .secret(),
    one_of("upstream.type", &["pg", "custom"], "pg", "Kind of upstream: Postgres or a custom change source.")
        .hidden()
        .not_yet(),
    number_or(
        "upstream.maxConns",
        20.0,
        "\
Most connections for CRUD mutations. A hard limit, on top of the replication stream's own.
The server does not start with fewer than one per sync worker while CRUD mutations are on.",
    )
    .not_yet(),
    number("upstream.maxConnsPerWorker", "Internal to the original.").hidden().no_effect(NO_WORKER_POOLS),
    flag(
        "upstream.pgReplicationSlotFailover",
        "\
Postgres 17 and later: create replication slots with `failover`, so that they survive a
switch to a standby.",
    ),
    number(
        "upstream.pgStreamInboundTimeoutMs",
        "\
Milliseconds without any message from the WAL sender after which the replication stream is
torn down and opened anew. Not set: twice the server's `wal_sender_timeout`.",
    ),
    list("push.url", URL_DOC).deprecated("Use ZERO_MUTATE_URL instead."),
    text("push.apiKey", API_KEY_DOC).secret().deprecated("Use ZERO_MUTATE_API_KEY instead."),
    flag_or("push.forwardCookies", false, COOKIES_DOC)
        .deprecated("Use ZERO_MUTATE_FORWARD_COOKIES instead."),
    list("push.allowedClientHeaders", CLIENT_HEADERS_DOC)
        .deprecated("Use ZERO_MUTATE_ALLOWED_CLIENT_HEADERS instead."),
    list("push.allowedRequestHeaders", REQUEST_HEADERS_DOC)
        .deprecated("Use ZERO_MUTATE_ALLOWED_REQUEST_HEADERS instead."),
    list("mutate.url", URL_DOC),
    text("mutate.apiKey", API_KEY_DOC).secret(),
    flag_or("mutate.forwardCookies", false, COOKIES_DOC),
    list("mutate.allowedClientHeaders", CLIENT_HEADERS_DOC),
    list("mutate.allowedRequestHeaders", REQUEST_HEADERS_DOC),
    list("getQueries.url", URL_DOC).deprecated("Use ZERO_QUERY_URL instead."),
    text("getQueries.apiKey", API_KEY_DOC).secret().deprecated("Use ZERO_QUERY_API_KEY instead."),
    flag_or("getQueries.forwardCookies", false, COOKIES_DOC)
        .deprecated("Use ZERO_QUERY_FORWARD_COOKIES instead."),
    list("getQueries.allowedClientHeaders", CLIENT_HEADERS_DOC)
        .deprecated("Use ZERO_QUERY_ALLOWED_CLIENT_HEADERS instead."),
    list("getQueries.allowedRequestHeaders", REQUEST_HEADERS_DOC)
        .deprecated("Use ZERO_QUERY_ALLOWED_REQUEST_HEADERS instead."),
    list("query.url", URL_DOC),
    text("query.apiKey", API_KEY_DOC).secret(),
    flag_or("query.forwardCookies", false, COOKIES_DOC),
    list("query.allowedClientHeaders", CLIENT_HEADERS_DOC),
    list("query.allowedRequestHeaders", REQUEST_HEADERS_DOC),
    flag_or(
        "enableCrudMutations",
        true,
        "\
Execute legacy CRUD mutations. When off, no connections for them are opened, and clients
that send one get an error.",
    )
    .not_yet(),
    text(
        "cvr.db",
        "\
Where the client view records live. A Postgres URI; or `embedded`, a local SQLite file next
to the replica; or `file:PATH`, a SQLite file of that name. Local files serve one node only.
Not set: the upstream database.",
    )
    .secret(),
    number_or("cvr.maxConns", 30.0, "Most connections to the CVR database. At least one per sync worker."),
    number("cvr.maxConnsPerWorker", "Internal to the original.").hidden().no_effect(NO_WORKER_POOLS),
    number_or(
        "cvr.garbageCollectionInactivityThresholdHours",
        48.0,
        "Hours without activity after which a client view record may be deleted.",
    ),
    number_or(
        "cvr.garbageCollectionInitialIntervalSeconds",
        60.0,
        "Seconds between deletions of inactive records. Doubles, up to 16 minutes, while there is nothing to do.",
    ),
    number_or(
        "cvr.garbageCollectionInitialBatchSize",
        25.0,
        "Inactive records deleted at a time. Grows while the backlog does. 0: nothing is ever deleted.",
    ),
    flag(
        "queryHydrationStats",
        "Log the rows that were read, per table and statement, when a hydration is slow.",
    )
    .not_yet(),
    flag_or(
        "sqliteCorruptionChecks",
        false,
        "Run SQLite's integrity checks on the replica once corruption is suspected.",
    )
    .hidden()
    .not_yet(),
    flag_or("enableQueryPlanner", true, "Choose the join order of hydrations by statistics.").not_yet(),
    flag_or("enableQueryCovering", true, "Detect queries that are covered by others (statistics only).")
        .no_effect("equal queries always share their work"),
    number_or(
        "yieldThresholdMs",
        10.0,
        "Longest slice of query work, milliseconds, before other work of the same core gets its turn.",
    )
    .not_yet(),
    text("change.db", "Postgres database of the change log, as URI. Not set: the upstream database.")
        .secret()
        .not_yet(),
    number_or("change.maxConns", 5.0, "Most connections to the change database.").not_yet(),
    number_or(
        "change.statementTimeoutMs",
        20_000.0,
        "Longest wait for the answer to a statement of the change log, milliseconds.",
    )
    .hidden()
    .not_yet(),
    number_or("change.logBatchSize", 2_000.0, "Rows of one INSERT into the change log; 1 disables batching.")
        .hidden()
        .not_yet(),
    text_or(
        "replica.file",
        "zero.db",
        "\
Path of the SQLite replica. It can be lost at any time: it is then copied anew. Use a fast
disk with room for twice the data.",
    ),
    number(
        "replica.vacuumIntervalHours",
        "VACUUM the replica at start-up if this many hours passed since the last time. Not set: never.",
    )
    .not_yet(),
    one_of("log.level", &["debug", "info", "warn", "error"], "info", ""),
    one_of("log.format", &["text", "json"], "text", "`text` for people, `json` for machines: one object a line."),
    number_or("log.slowRowThreshold", 2.0, "Milliseconds after which fetching a row counts as slow.").not_yet(),
    number_or("log.slowHydrateThreshold", 100.0, "Milliseconds after which a hydration counts as slow and is logged."),
    number_or("log.ivmSampling", 5_000.0, "One of this many row fetches is timed; 0 or less: none.").not_yet(),
    text_or(
        "app.id",
        "zero",
        "\
Name of the app: lower-case letters, digits and `_`. The Postgres schemas `<id>` and
`<id>_<shard>` belong to it. Apps on one database need different ones.",
    ),
    list_or(
        "app.publications",
        &[],
        "\
Publications that say which tables, rows and columns are replicated. Not set: all tables of
the schema `public`. A changed set makes the server copy everything anew.",
    ),
    text("shard.id", "Gone: use ZERO_APP_ID.").hidden(),
    number_or("shard.num", 0.0, "Number of the shard.").hidden(),
    text("auth.jwk", "Public key, as JSON Web Key, to verify JSON Web Tokens.")
        .deprecated(USE_COOKIES_OR_TOKENS)
        .not_yet(),
    text("auth.jwksUrl", "URL of a set of public keys to verify JSON Web Tokens.")
        .deprecated(USE_COOKIES_OR_TOKENS)
        .not_yet(),
    text("auth.secret", "Shared secret to verify JSON Web Tokens.")
        .secret()
        .deprecated(USE_COOKIES_OR_TOKENS)
        .not_yet(),
    text("auth.issuer", "`iss` that a token must have.").deprecated(USE_COOKIES_OR_TOKENS).not_yet(),
    text("auth.audience", "`aud` that a token must have.").deprecated(USE_COOKIES_OR_TOKENS).not_yet(),
    number_or(
        "auth.revalidateIntervalSeconds",
        300.0,
        "Seconds after which a connection's credentials are checked against the query endpoint again.",
    ),
    number_or(
        "auth.retransformIntervalSeconds",
        300.0,
        "Seconds after which the custom queries of a client group are asked for again.",
    ),
    number_or(
        "port",
        4848.0,
        "Port of clients and of the endpoints `/`, `/keepalive` and `/statz`, on all addresses.",
    ),
    text(
        "changeStreamer.uri",
        "\
Follow the change streamer at this address (ws, wss, http or https) instead of running one:
this node is a view syncer of a fleet.",
    )
    .not_yet(),
    one_of(
        "changeStreamer.mode",
        &["dedicated", "discover"],
        "dedicated",
        "`discover`: follow the change streamer whose address is registered in the change database.",
    )
    .not_yet(),
    number("changeStreamer.port", "Port of the change streamer. Not set (or 0): the port above it, `ZERO_PORT` + 1.")
        .not_yet(),
    text("changeStreamer.address", "Address under which this change streamer is registered.")
        .hidden()
        .deprecated("Set the ZERO_CHANGE_STREAMER_URI on view-syncers instead.")
        .not_yet(),
    one_of("changeStreamer.protocol", &["ws", "wss"], "ws", "Protocol of the registered address.")
        .hidden()
        .deprecated("Set the ZERO_CHANGE_STREAMER_URI on view-syncers instead.")
        .not_yet(),
    list_or(
        "changeStreamer.discoveryInterfacePreferences",
        &["eth", "en"],
        "Prefixes of network interface names, the preferred first, for the choice of this host's address.",
    )
    .hidden(),
    number_or(
        "changeStreamer.startupDelayMs",
        15_000.0,
        "\
Milliseconds to wait before taking the replication slot over from an older node; a view
syncer that connects ends the wait.",
    )
    .not_yet(),
    number_or(
        "changeStreamer.backPressureLimitHeapProportion",
        0.04,
        "Share of the memory budget that queued changes may take before reading from upstream pauses.",
    )
    .not_yet(),
    number_or(
        "changeStreamer.flowControlConsensusPaddingSeconds",
        1.0,
        "Seconds to wait for slow subscribers after the majority caught up; negative: wait for all.",
    )
    .origin(Origin::Only19)
    .not_yet(),
    number_or(
        "changeStreamer.flowControlConsensusTimeoutProportion",
        2.0,
        "The same wait, as a multiple of what the majority took; negative: wait for all.",
    )
    .origin(Origin::Newer)
    .not_yet(),
    number_or(
        "changeStreamer.flowControlSlowSubscriberGracePeriodSeconds",
        30.0,
        "Seconds of continuous lag after which a subscriber is disconnected; 0 or less: never.",
    )
    .origin(Origin::Newer)
    .not_yet(),
    one_of(
        "changeStreamer.sqliteChangeLogMode",
        &["off", "write", "compare", "serve"],
        "off",
        "Internal to newer versions of the original.",
    )
    .hidden()
    .origin(Origin::Newer)
    .no_effect(NO_SQLITE_CHANGE_LOG),
    change_log("changeStreamer.sqliteChangeLogReadPercent", 0.0),
    change_log("changeStreamer.sqliteChangeLogColdReadPercent", 0.0),
    change_log("changeStreamer.sqliteChangeLogComparePercent", 1.0),
    change_log("changeStreamer.sqliteChangeLogRetentionMs", 60_000.0),
    change_log("changeStreamer.sqliteChangeLogReadBatchRows", 1_000.0),
    change_log("changeStreamer.sqliteChangeLogPurgeBatchRows", 1_000.0),
    change_log("changeStreamer.sqliteChangeLogBarrierTimeoutMs", 300_000.0),
    text(
        "taskID",
        "Name of this node, unique in its fleet. Not set: the ECS task id, or a random one.",
    ),
    number("perUserMutationLimit.max", "Most CRUD mutations of a client group in a window. Not set: no limit.")
        .not_yet(),
    number_or("perUserMutationLimit.windowMs", 60_000.0, "Length of that window, milliseconds.").not_yet(),
    number(
        "numSyncWorkers",
        "\
Executors: threads, each with its own sockets, client groups and queries.
Not set: one less than the cores that this process may use, at least 1.
0: no clients are served; this node is a replication manager.",
    ),
    flag_or(
        "autoReset",
        true,
        "Copy everything anew when replication cannot go on (slot lost, publications changed, …).",
    ),
    number_or(
        "replicationLag.reportIntervalMs",
        30_000.0,
        "Milliseconds between measurements of the replication lag; 0 or less: none.",
    )
    .not_yet(),
    text(
        "adminPassword",
        "Password for `/statz` and the inspector. Required unless NODE_ENV is `development`.",
    )
    .secret(),
    flag_or("websocketCompression", false, "Compress messages to clients that offer permessage-deflate."),
    text(
        "websocketCompressionOptions",
        "JSON object with options of the compression: `threshold`, `serverNoContextTakeover`, ….",
    ),
    number_or(
        "websocketMaxPayloadBytes",
        10_485_760.0,
        "Largest message of a client, bytes; a larger one closes its socket with code 1009.",
    ),
    text("litestream.executable", "Path of the litestream 0.3 executable.").not_yet(),
    text("litestream.executableV5", "Path of the litestream 0.5 executable.").not_yet(),
    flag_or("litestream.restoreUsingV5", true, "Restore with litestream 0.5 if its executable is given.").not_yet(),
    flag_or("litestream.backupUsingV5", false, "Back up with litestream 0.5.").not_yet(),
    text_or(
        "litestream.configPath",
        "./src/services/litestream/config.yml",
        "Configuration file of litestream 0.3.",
    )
    .not_yet(),
    text_or(
        "litestream.configPathV5",
        "./src/services/litestream/config-v5.yml",
        "Configuration file of litestream 0.5.",
    )
    .origin(Origin::Newer)
    .not_yet(),
    text_or(
        "litestream.vfsExtensionPath",
        "/usr/local/lib/litestream-vfs.so",
        "SQLite extension that reads a backup.",
    )
    .origin(Origin::Only19)
    .no_effect(NO_LITESTREAM_VFS),
    number_or("litestream.vfsProbeIntervalMs", 30_000.0, "Milliseconds between looks at the backup.")
        .origin(Origin::Only19)
        .no_effect(NO_LITESTREAM_VFS),
    number_or("litestream.vfsProbeTimeoutMs", 30_000.0, "Longest look at the backup, milliseconds.")
        .origin(Origin::Only19)
        .no_effect(NO_LITESTREAM_VFS),
    text("litestream.vfsQueryExecutable", "Program that queries a backup.")
        .origin(Origin::Newer)
        .no_effect(NO_LITESTREAM_VFS),
    number_or("litestream.vfsPollIntervalMs", 15_000.0, "Milliseconds between queries of the backup.")
        .origin(Origin::Newer)
        .no_effect(NO_LITESTREAM_VFS),
    number_or("litestream.vfsPollTimeoutMs", 10_000.0, "Longest query of the backup, milliseconds.")
        .origin(Origin::Newer)
        .no_effect(NO_LITESTREAM_VFS),
    text("litestream.vfsLogFile", "Log file of the VFS extension. Not set: standard output.")
        .no_effect(NO_LITESTREAM_VFS),
    one_of("litestream.logLevel", &["debug", "info", "warn", "error"], "warn", "Level of litestream's log.").not_yet(),
    text(
        "litestream.backupURL",
        "Where the replica is backed up, usually `s3://bucket/path`. Only for the node that replicates.",
    )
    .not_yet(),
    text("litestream.endpoint", "Endpoint of an S3-compatible store. The same on all nodes.").not_yet(),
    text("litestream.region", "Region of the store. The same on all nodes.").not_yet(),
    number("litestream.port", "Port of litestream's own metrics. Not set (or 0): `ZERO_PORT` + 2.").not_yet(),
    number_or("litestream.checkpointThresholdMB", 40.0, "Size of the WAL, MB, at which it is checkpointed.").not_yet(),
    number("litestream.minCheckpointPageCount", "The same in pages. Not set: 250 pages a MB.").not_yet(),
    number(
        "litestream.maxCheckpointPageCount",
        "WAL pages at which readers must wait for a checkpoint; 0: never. Not set: ten times the former.",
    )
    .not_yet(),
    number_or("litestream.incrementalBackupIntervalMinutes", 15.0, "Minutes between incremental backups (0.3).")
        .not_yet(),
    number_or("litestream.incrementalBackupIntervalSeconds", 15.0, "Seconds between incremental backups (0.5).")
        .origin(Origin::Newer)
        .not_yet(),
    number_or(
        "litestream.snapshotBackupIntervalHours",
        12.0,
        "Hours between full backups. They are kept 6 hours longer than that.",
    )
    .not_yet(),
    number_or("litestream.restoreParallelism", 48.0, "Files downloaded at once by a restore.").not_yet(),
    number_or("litestream.multipartConcurrency", 48.0, "Parts of a file transferred at once.").not_yet(),
    number_or("litestream.multipartSize", 16_777_216.0, "Size of such a part, bytes.").not_yet(),
    text("storageDBTmpDir", "Directory of scratch files.").no_effect(NO_SCRATCH_FILES),
    number_or(
        "initialSync.tableCopyWorkers",
        5.0,
        "Connections that copy tables at once during an initial sync.",
    ),
    flag("initialSync.profileCopy", "Write a CPU profile of the copy.")
        .hidden()
        .no_effect("attach a profiler of the operating system"),
    flag_or("initialSync.textCopy", false, "Copy tables in Postgres' text format instead of the binary one."),
    flag_or("shadowSync.enabled", false, "Regularly copy a sample of the data into a throw-away file, as a test.")
        .not_yet(),
    number_or("shadowSync.intervalHours", 12.0, "Hours between such tests.").not_yet(),
    number_or("shadowSync.sampleRate", 0.1, "Share of the rows that is copied, above 0, at most 1.").not_yet(),
    number_or("shadowSync.maxRowsPerTable", 10_000.0, "Most rows copied of a table.").not_yet(),
    number_or("targetClientRowCount", 20_000.0, "Gone.")
        .deprecated("This option is no longer used and will be removed in a future version.")
        .no_effect("it has none in the original either"),
    flag_or(
        "lazyStartup",
        false,
        "Open the port at once, and start everything else when the first client connects.",
    )
    .not_yet(),
    text("serverVersion", "Version that is logged and told to the inspector. Not set: this build's."),
    flag_or("enableTelemetry", true, "Nothing is ever sent; accepted for compatibility.").no_effect(NO_TELEMETRY),
    text("cloudEvent.sinkEnv", "Name of the environment variable that holds the URI of a CloudEvents sink.").not_yet(),
    text(
        "cloudEvent.extensionOverridesEnv",
        "Name of the environment variable that holds extension attributes of those events, as JSON.",
    )
    .not_yet(),
    number("keepaliveTimeoutMs", "\
Once `/keepalive` was called and then is not for this long, milliseconds, the server drains
and ends. Not set: 20000 on ECS, otherwise off.",
    ),
    one_of(
        "ioBackend",
        &["auto", "io_uring", "epoll"],
        "auto",
        "\
How sockets are served. `auto`: io_uring where the kernel allows it, otherwise epoll. Naming
one makes the start fail where it does not work.",
    )
    .origin(Origin::Own),
    number(
        "drainTimeoutMs",
        "\
Milliseconds after a SIGTERM after which the client groups that are left are stopped
together. Not set: the orderly drain has no time limit.",
    )
    .origin(Origin::Own),
    number(
        "apiTimeoutMs",
        "Longest wait for an answer of the query or mutate endpoint, milliseconds, per attempt. Not set: 300000, as the original's HTTP stack.",
    )
    .origin(Origin::Own),
];

const fn change_log(path: &'static str, default: f64) -> OptionDef {
    number_or(path, default, "Internal to newer versions of the original.")
        .hidden()
        .origin(Origin::Newer)
        .no_effect(NO_SQLITE_CHANGE_LOG)
}

/// The definition of an option.
pub fn find(path: &str) -> Option<&'static OptionDef> {
    OPTIONS.iter().find(|def| def.path == path)
}
