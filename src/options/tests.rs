//! Options against the rules of spec operations §1 and its conformance checklist (1–18).

use std::collections::{BTreeMap, BTreeSet};

use super::config::{IoBackend, LogFormat};
use super::def::{Kind, Origin};
use super::parse::{OptionValue, Settings, Source};
use super::table::OPTIONS;
use super::*;

fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let base = [("ZERO_UPSTREAM_DB", "postgres://u:hunter2@h/db"), ("ZERO_ADMIN_PASSWORD", "pw")];
    let pairs = base.iter().chain(pairs);
    pairs.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn run(args: &str, pairs: &[(&str, &str)]) -> Result<Parsed, OptionError> {
    let args: Vec<String> = args.split_whitespace().map(str::to_owned).collect();
    parse::parse(&args, &env(pairs))
}

fn settings(args: &str, pairs: &[(&str, &str)]) -> Settings {
    match run(args, pairs).unwrap() {
        Parsed::Settings(settings) => settings,
        other => panic!("{other:?}"),
    }
}

fn error(args: &str, pairs: &[(&str, &str)]) -> String {
    run(args, pairs).unwrap_err().to_string()
}

fn around() -> Surroundings {
    Surroundings { random_id: "random".into(), cores: 4, ..Surroundings::default() }
}

fn load(args: &str, pairs: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
    Options::load(&settings(args, pairs), &around())
}

fn options(args: &str, pairs: &[(&str, &str)]) -> Options {
    load(args, pairs).unwrap().options
}

#[test]
fn command_line_beats_environment_beats_dotenv_beats_default() {
    let mut merged = env(&[("ZERO_PORT", "5000")]);
    dotenv::merge("ZERO_PORT=5002\nZERO_APP_ID=from_file", &mut merged);
    let parse = |args: &[&str], env: &BTreeMap<String, String>| {
        let args: Vec<String> = args.iter().map(|&a| a.to_owned()).collect();
        match parse::parse(&args, env).unwrap() {
            Parsed::Settings(s) => s,
            other => panic!("{other:?}"),
        }
    };
    let number = |n| (Some(OptionValue::Number(n)), ());
    let get = |s: &Settings| (s.get("port").0.cloned(), ());
    assert_eq!(get(&parse(&["--port", "5001"], &merged)), number(5001.0));
    assert_eq!(get(&parse(&[], &merged)), number(5000.0));
    assert_eq!(
        parse(&[], &merged).get("app.id").0,
        Some(&OptionValue::Text("from_file".to_owned()))
    );
    // An empty variable counts as not set.
    let empty = env(&[("ZERO_PORT", "")]);
    assert_eq!(get(&parse(&[], &empty)), number(4848.0));
    assert_eq!(parse(&[], &empty).get("port").1, Source::Default);
}

#[test]
fn numbers_are_what_javascript_takes_for_one() {
    for (text, n) in [
        ("0x10", 16.0),
        ("1e3", 1000.0),
        ("-1", -1.0),
        ("2.5", 2.5),
        ("", 0.0),
        ("Infinity", f64::INFINITY),
        ("0b101", 5.0),
    ] {
        let got = settings(&format!("--keepalive-timeout-ms={text}"), &[]);
        assert_eq!(got.get("keepaliveTimeoutMs").0, Some(&OptionValue::Number(n)), "{text}");
    }
    let spaced = settings("", &[("ZERO_PORT", " 5000 ")]);
    assert_eq!(spaced.get("port").0, Some(&OptionValue::Number(5000.0)));
    let negative = settings("--keepalive-timeout-ms -5", &[]);
    assert_eq!(negative.get("keepaliveTimeoutMs").0, Some(&OptionValue::Number(-5.0)));
    for bad in ["abc", "1_000", "10s", "inf", "nan", "0x", "1e", "."] {
        let text = error(&format!("--port={bad}"), &[]);
        assert_eq!(text, format!("TypeError: Invalid input for ZERO_PORT: \"{bad}\""));
    }
}

#[test]
fn switches() {
    for on in ["--lazy-startup", "--lazy-startup=TRUE", "--lazy-startup 1", "--lazy-startup true"] {
        assert_eq!(settings(on, &[]).get("lazyStartup").0, Some(&OptionValue::Flag(true)), "{on}");
    }
    assert!(!options("--auto-reset=0", &[]).auto_reset);
    let yes = "TypeError: Invalid input for ZERO_LAZY_STARTUP: \"yes\"";
    assert_eq!(error("--lazy-startup yes", &[]), yes);
    assert_eq!(error("", &[("ZERO_LAZY_STARTUP", "yes")]), yes);
}

#[test]
fn lists_split_at_commas_only_in_the_environment() {
    let urls = |args: &str, pairs: &[(&str, &str)]| options(args, pairs).mutate.urls;
    assert_eq!(urls("", &[("ZERO_MUTATE_URL", "http://a,http://b")]), ["http://a", "http://b"]);
    assert_eq!(urls("", &[("ZERO_MUTATE_URL", "y, z")]), ["y", " z"]);
    assert_eq!(urls("--mutate-url http://a,http://b", &[]), ["http://a,http://b"]);
    assert_eq!(urls("--mutate-url a b", &[]), ["a", "b"]);
    assert_eq!(urls("--mutate-url a --port 1 --mutate-url=b", &[]), ["a", "b"]);
    assert_eq!(urls("--mutate-url a", &[("ZERO_MUTATE_URL", "x,y")]), ["a"]);
}

#[test]
fn error_texts_are_the_originals() {
    for (args, text) in [
        ("--port 1 --port 2", "ALREADY_SET: Singular option already set [port=1]"),
        (
            "--change-streamer-port 1 --change-streamer-port 2",
            "ALREADY_SET: Singular option already set [change-streamer-port=1]",
        ),
        (
            "--log-level verbose",
            "TypeError: Expected literal value \"debug\", \"info\", \"warn\" or \"error\" at log.level Got \"verbose\"",
        ),
        (
            "--change-streamer-mode x",
            "TypeError: Expected literal value \"dedicated\" or \"discover\" at changeStreamer.mode Got \"x\"",
        ),
        (
            "--change-log-batch-size 0",
            "TypeError: change.logBatchSize must be an integer >= 1 at change.logBatchSize. Got 0",
        ),
        ("--port", "TypeError: Expected number at port. Got true"),
        ("--admin-password", "TypeError: Expected string at adminPassword. Got true"),
        (
            "--app-id My-App",
            "TypeError: The App ID may only consist of lower-case letters, numbers, and the underscore character at app.id. Got \"My-App\"",
        ),
        (
            "--shard-id x",
            "TypeError: ZERO_SHARD_ID is no longer an option. Please use ZERO_APP_ID instead. at shard.id. Got \"x\"",
        ),
    ] {
        assert_eq!(error(args, &[]), text);
    }
    let missing = parse::parse(&[], &BTreeMap::new()).unwrap_err().to_string();
    assert_eq!(
        missing,
        "TypeError: Missing required option ZERO_UPSTREAM_DB at upstream.db. Got undefined"
    );
}

proptest::proptest! {
    #[test]
    fn no_words_variables_or_files_make_the_parser_panic(
        mut words in proptest::collection::vec(".{0,12}", 0..6),
        value in ".{0,12}",
        file in "([A-Z_]{0,3}=?[\"'`$ {}:#\\\\n\u{e9}a-]{0,12}\n?){0,6}",
        at in 0..OPTIONS.len(),
    ) {
        let def = &OPTIONS[at];
        words.push(format!("--{}", def.flag()));
        words.push(value.clone());
        let mut env = env(&[(&def.env(), &value)]);
        dotenv::merge(&file, &mut env);
        if let Ok(Parsed::Settings(settings)) = parse::parse(&words, &env) {
            let _ = Options::load(&settings, &around());
        }
    }
}

#[test]
fn unknown_words_and_help() {
    let unknown = |args: &str| match run(args, &[]).unwrap() {
        Parsed::Unknown(words) => words,
        other => panic!("{args}: {other:?}"),
    };
    assert_eq!(unknown("--nope 3"), ["--nope", "3"]);
    assert_eq!(unknown("--log_level=debug"), ["--log_level=debug"]);
    assert_eq!(unknown("--no-auto-reset"), ["--no-auto-reset"]);
    assert_eq!(unknown("--nope --help"), ["--nope", "--help"]);
    for help in ["--help", "-h", "--port 1 --help"] {
        assert!(matches!(run(help, &[]).unwrap(), Parsed::Help), "{help}");
    }
    // Unknown variables are nobody's business.
    settings("", &[("ZERO_NOT_AN_OPTION", "1")]);
}

#[test]
fn a_variable_may_begin_with_a_dash() {
    let options = options("", &[("ZERO_ADMIN_PASSWORD", "-secret")]);
    assert_eq!(options.admin_password, Some(Secret::new("-secret")));
}

#[test]
fn every_option_is_accepted_by_flag_and_by_variable() {
    for def in OPTIONS.iter().filter(|def| def.path != "shard.id") {
        let value = match def.kind {
            Kind::Text | Kind::List => "some_text",
            Kind::Number => "1",
            Kind::Flag => "true",
            Kind::OneOf(words) => words[0],
        };
        let by_flag = settings(&format!("--{} {value}", def.flag()), &[]);
        let by_env = settings("", &[(&def.env(), value)]);
        assert_eq!(by_flag.get(def.path).1, Source::CommandLine, "{}", def.path);
        assert_eq!(by_env.get(def.path).1, Source::Environment, "{}", def.path);
        assert_eq!(by_flag.get(def.path).0, by_env.get(def.path).0, "{}", def.path);
    }
}

#[test]
fn the_table_has_the_originals_options_once_each() {
    let count = |wanted: &[Origin]| OPTIONS.iter().filter(|d| wanted.contains(&d.origin)).count();
    assert_eq!(count(&[Origin::Both, Origin::Only19]), 117, "1.9");
    let flags: BTreeSet<String> = OPTIONS.iter().map(|def| def.flag()).collect();
    assert_eq!(flags.len(), OPTIONS.len());
    // Names and defaults of the visible options of 1.9.0, as its `--help` prints them.
    let golden = include_str!("testdata/options-1.9.0.txt");
    let ours: BTreeSet<String> = OPTIONS
        .iter()
        .filter(|def| def.visible() && matches!(def.origin, Origin::Both | Origin::Only19))
        .map(|def| {
            format!(
                "--{} {} | {} | {}",
                def.flag(),
                def.type_label(),
                def.env(),
                def.default_label()
            )
        })
        .collect();
    let theirs: BTreeSet<String> = golden.lines().map(str::to_owned).collect();
    assert_eq!(ours, theirs);
}

#[test]
fn derived_values() {
    let plain = options("", &[]);
    assert_eq!(plain.num_sync_workers, 3);
    assert_eq!(plain.task_id, "random");
    assert_eq!(plain.role, Role::SingleNode);
    assert_eq!(plain.keepalive_timeout, None);
    assert_eq!(plain.io_backend, IoBackend::Auto);
    assert_eq!(plain.log_format, LogFormat::Text);
    assert_eq!(plain.cvr, CvrLocation::Postgres(plain.upstream_db.clone()));
    assert_eq!(plain.max_payload_bytes, 10_485_760);

    let ecs = Surroundings { ecs: true, ecs_task_id: Some("abc".into()), ..around() };
    let ecs = Options::load(&settings("", &[]), &ecs).unwrap().options;
    assert_eq!(ecs.task_id, "abc");
    assert_eq!(ecs.keepalive_timeout.map(|t| t.as_millis()), Some(20_000));

    let one_core = Surroundings { cores: 1, ..around() };
    let one_core = Options::load(&settings("", &[]), &one_core).unwrap().options;
    assert_eq!(one_core.num_sync_workers, 1);

    let fraction = load("--num-sync-workers 2.5", &[]).unwrap();
    assert_eq!(fraction.options.num_sync_workers, 3);
    assert_eq!(fraction.notes, ["ZERO_NUM_SYNC_WORKERS=2.5 is taken as 3"]);

    let cvr = |value: &str| options("--replica-file /d/z.db", &[("ZERO_CVR_DB", value)]).cvr;
    assert_eq!(cvr("embedded"), CvrLocation::File("/d/z.db-cvr".into()));
    assert_eq!(cvr("file:/x/cvr.db"), CvrLocation::File("/x/cvr.db".into()));
    assert_eq!(cvr("postgres://c"), CvrLocation::Postgres(Secret::new("postgres://c")));
}

#[test]
fn roles_follow_from_values() {
    let role = |args: &str| options(args, &[]).role;
    assert_eq!(role("--num-sync-workers 0"), Role::ReplicationManager);
    assert_eq!(role("--change-streamer-uri ws://rm:4849"), Role::ViewSyncer);
    assert_eq!(role("--change-streamer-mode discover"), Role::ViewSyncer);
    let fleet = options("--num-sync-workers 0", &[]).check_supported().unwrap_err().to_string();
    assert!(fleet.contains("ZERO_NUM_SYNC_WORKERS"), "{fleet}");
    assert!(options("", &[]).check_supported().is_ok());
}

#[test]
fn endpoints_of_both_generations() {
    let both = options(
        "--push-url p --mutate-url m --push-api-key pk --push-forward-cookies --push-allowed-client-headers X-A",
        &[],
    );
    assert_eq!(both.mutate.urls, ["p"]);
    assert_eq!(both.mutate.api_key, Some(Secret::new("pk")));
    assert!(both.mutate.forward_cookies);
    assert_eq!(both.mutate.allowed_client_headers, ["x-a"]);
    let current = options("--mutate-url m --mutate-api-key mk --push-api-key pk", &[]);
    assert_eq!(current.mutate.urls, ["m"]);
    assert_eq!(current.mutate.api_key, Some(Secret::new("mk")));
    // Queries take one group as a whole.
    let query = options("--query-url q --get-queries-url g --get-queries-api-key gk", &[]);
    assert_eq!((query.query.urls, query.query.api_key), (vec!["q".to_owned()], None));
    let legacy = options("--get-queries-url g --query-api-key qk", &[]);
    assert_eq!((legacy.query.urls, legacy.query.api_key), (vec!["g".to_owned()], None));
}

#[test]
fn rules_between_options() {
    let rule = |args: &str, pairs: &[(&str, &str)]| load(args, pairs).unwrap_err().to_string();
    let no_password = [("ZERO_ADMIN_PASSWORD", "")];
    assert_eq!(rule("", &no_password), "missing --admin-password: required in production mode");
    let development = Surroundings { node_env: Some("development".into()), ..around() };
    assert!(Options::load(&settings("", &no_password), &development).unwrap().options.development);
    assert_eq!(
        rule("--upstream-max-conns 2 --num-sync-workers 4", &[]),
        "Insufficient upstream connections (2) for 4 syncers.Increase ZERO_UPSTREAM_MAX_CONNS or \
         decrease ZERO_NUM_SYNC_WORKERS (which defaults to available cores)."
    );
    options("--upstream-max-conns 2 --num-sync-workers 4 --enable-crud-mutations=false", &[]);
    assert!(rule("--cvr-max-conns 2 --num-sync-workers 4", &[]).starts_with("Insufficient cvr"));
    options("--cvr-max-conns 2 --num-sync-workers 4 --cvr-db embedded", &[]);
    assert_eq!(
        rule("--litestream-backup-using-v5 --litestream-restore-using-v5=false", &[]),
        "--litestream-backup-using-v5 requires --litestream-restore-using-v5"
    );
    let bad = rule("--websocket-compression --websocket-compression-options={", &[]);
    assert!(bad.starts_with("Failed to parse ZERO_WEBSOCKET_COMPRESSION_OPTIONS: "), "{bad}");
    assert!(bad.ends_with("Expected valid JSON."), "{bad}");
    assert_eq!(options("--websocket-compression-options={", &[]).compression, None);
    let range = [("ZERO_WEBSOCKET_COMPRESSION_OPTIONS", r#"{"serverMaxWindowBits":8}"#)];
    assert!(rule("--websocket-compression", &range).contains("from 9 to 15, not 8"));
    assert!(rule("--replica-file a.db --cvr-db file:a.db", &[]).contains("same file"));
}

#[test]
fn compression_takes_the_options_of_the_originals_library() {
    let json = r#"{"threshold":5,"serverMaxWindowBits":10,"clientMaxWindowBits":true,
        "zlibDeflateOptions":{"level":1},"concurrencyLimit":3,"serverNoContextTakeover":true}"#;
    let pairs = [("ZERO_WEBSOCKET_COMPRESSION", "1"), ("ZERO_WEBSOCKET_COMPRESSION_OPTIONS", json)];
    let websocket = options("--websocket-max-payload-bytes 100", &pairs).websocket();
    let deflate = websocket.deflate.unwrap();
    assert_eq!((deflate.threshold, deflate.server_max_window_bits, deflate.level), (5, 10, 1));
    assert_eq!((deflate.client_max_window_bits, websocket.max_payload_bytes), (None, 100));
    assert_eq!(options("", &[]).websocket().deflate, None);
}

#[test]
fn given_options_that_do_nothing_are_named_once() {
    let loaded = load(
        "--shadow-sync-enabled --storage-db-tmp-dir /t --target-client-row-count 1",
        &[("ZERO_PUSH_URL", "http://a")],
    )
    .unwrap();
    assert_eq!(loaded.notes.len(), 3, "{:?}", loaded.notes);
    assert!(loaded.notes[0].starts_with("ZERO_STORAGE_DB_TMP_DIR has no effect"));
    assert_eq!(
        loaded.notes[1],
        "ZERO_SHADOW_SYNC_ENABLED is accepted, but not active in this version yet"
    );
    let deprecated: Vec<&str> = loaded.deprecated.iter().map(|(env, _)| env.as_str()).collect();
    assert_eq!(deprecated, ["ZERO_PUSH_URL", "ZERO_TARGET_CLIENT_ROW_COUNT"]);
    assert!(load("", &[]).unwrap().notes.is_empty());
}

#[test]
fn secrets_are_never_printed() {
    let pairs = [("ZERO_ADMIN_PASSWORD", "hunter2"), ("ZERO_QUERY_API_KEY", "hunter2")];
    let settings = settings("--cvr-db postgres://u:hunter2@h/db", &pairs);
    let loaded = Options::load(&settings, &around()).unwrap();
    for text in [format!("{settings:?}"), format!("{loaded:?}")] {
        assert!(!text.contains("hunter2"), "{text}");
    }
    let twice = error("--admin-password hunter2 --admin-password x", &[]);
    assert!(!twice.contains("hunter2"), "{twice}");
}

#[test]
fn docs_are_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/options.md");
    let wanted = help::markdown();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &wanted).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        found == wanted,
        "docs/options.md is stale: UPDATE_DOCS=1 cargo test -p zeroring options"
    );
}

#[test]
fn usage_has_a_block_per_visible_option() {
    let usage = help::usage();
    let lines: Vec<&str> = usage.lines().map(str::trim_end).collect();
    for def in OPTIONS {
        let shown = lines.iter().any(|l| l.starts_with(&format!(" --{} ", def.flag())));
        assert_eq!(shown, def.visible(), "{}", def.path);
    }
    let port = lines.iter().position(|l| l.starts_with(" --port number ")).unwrap();
    assert!(lines[port].ends_with("default: 4848"), "{}", lines[port]);
    assert_eq!(lines[port + 1], "   ZERO_PORT env");
    assert!(lines[0].is_empty() && lines[1].ends_with("required"));
}
