//! The binary as scripts and orchestrators see it: output, streams and exit codes
//! (spec: operations §1.1, §5.8, checklist 2, 6, 8, 14, 52).

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn zeroring(args: &[&str], env: &[(&str, &str)]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_zeroring"));
    for (key, _) in std::env::vars().filter(|(key, _)| key.starts_with("ZERO_")) {
        command.env_remove(key);
    }
    command.env_remove("NODE_ENV").current_dir(directory.path());
    command.args(args).envs(env.iter().copied()).output().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

const DB: (&str, &str) = ("ZERO_UPSTREAM_DB", "postgres://u:hunter2@127.0.0.1:1/d");
const PASSWORD: (&str, &str) = ("ZERO_ADMIN_PASSWORD", "hunter3");
const CVR: (&str, &str) = ("ZERO_CVR_DB", "embedded");

#[test]
fn help_is_on_standard_output_and_succeeds() {
    for args in [&["--help"][..], &["-h"], &["run", "--help"], &["--port", "1", "--help"]] {
        let output = zeroring(args, &[]);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        let text = out(&output);
        assert!(text.contains("Usage: zeroring [command] [options]"), "{text}");
        assert!(text.contains("\n --upstream-db string "), "{text}");
        assert_eq!(err(&output), "");
    }
}

#[test]
fn unknown_words_print_the_usage_and_still_succeed() {
    let output = zeroring(&["--nope", "3"], &[DB]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(err(&output), "Invalid arguments: [\"--nope\", \"3\"]\n");
    assert!(out(&output).contains("--upstream-db string"));
}

#[test]
fn bad_options_print_the_error_then_the_usage_and_fail() {
    let missing = zeroring(&[], &[]);
    assert_eq!(missing.status.code(), Some(255));
    assert_eq!(
        err(&missing),
        "TypeError: Missing required option ZERO_UPSTREAM_DB at upstream.db. Got undefined\n"
    );
    let bad = zeroring(&["--port=abc"], &[DB]);
    assert_eq!(bad.status.code(), Some(255));
    assert_eq!(err(&bad), "TypeError: Invalid input for ZERO_PORT: \"abc\"\n");
    assert!(out(&bad).contains("--upstream-db string"));
}

#[test]
fn rules_between_options_fail_before_anything_starts() {
    let output = zeroring(&[], &[DB]);
    assert_eq!(output.status.code(), Some(255));
    let text = err(&output);
    assert!(text.contains("missing --admin-password: required in production mode"), "{text}");
    let fleet =
        zeroring(&["--num-sync-workers", "0"], &[DB, PASSWORD, ("ZERO_LOG_FORMAT", "json")]);
    assert_eq!(fleet.status.code(), Some(255));
    let line: serde_json::Value = serde_json::from_str(err(&fleet).trim()).unwrap();
    assert_eq!(line["level"], "ERROR");
    assert!(line["message"].as_str().unwrap().contains("ZERO_NUM_SYNC_WORKERS=0"), "{line}");
}

#[test]
fn an_unreachable_postgres_is_a_configuration_error_and_no_secret_is_logged() {
    let env = [DB, PASSWORD, CVR, ("ZERO_PUSH_API_KEY", "hunter4"), ("ZERO_LOG_LEVEL", "debug")];
    let output = zeroring(&["--shadow-sync-enabled"], &env);
    assert_eq!(output.status.code(), Some(14), "{}", err(&output));
    let (out, err) = (out(&output), err(&output));
    assert!(err.contains("exiting with configuration error"), "{err}");
    assert!(err.contains("Unable to connect to Postgres."), "{err}");
    assert_eq!(err.matches("ZERO_PUSH_API_KEY is deprecated").count(), 1, "{err}");
    assert_eq!(err.matches("ZERO_SHADOW_SYNC_ENABLED is accepted").count(), 1, "{err}");
    assert!(out.contains("starting server@") && out.contains("exiting with code 14"), "{out}");
    assert!(!out.contains("hunter") && !err.contains("hunter"), "{out}{err}");
}

#[test]
fn dotenv_of_the_current_directory_is_read_and_loses_to_the_environment() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join(".env"), "ZERO_UPSTREAM_DB=postgres://x\nZERO_PORT=bad\n")
        .unwrap();
    let run = |port: Option<&str>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zeroring"));
        command.current_dir(directory.path()).env_clear();
        if let Some(port) = port {
            command.env("ZERO_PORT", port);
        }
        err(&command.output().unwrap())
    };
    assert_eq!(run(None), "TypeError: Invalid input for ZERO_PORT: \"bad\"\n");
    assert!(run(Some("5000")).contains("missing --admin-password"));
}

#[test]
fn a_subcommand_that_is_not_there_yet_says_so() {
    let output = zeroring(&["doctor"], &[]);
    assert_eq!(output.status.code(), Some(255));
    assert_eq!(err(&output), "`doctor` is not in this version of zeroring yet.\n");
    assert!(out(&zeroring(&["--version"], &[])).starts_with("zeroring "));
}

#[test]
fn capacity_names_the_node_that_does_not_answer() {
    // Nothing listens on the discard port.
    let output = zeroring(&["capacity", "--url", "http://127.0.0.1:9", "--seconds", "1"], &[]);
    assert_eq!(output.status.code(), Some(255));
    assert!(err(&output).contains("127.0.0.1:9"), "{}", err(&output));
}

#[test]
fn loadtest_without_the_load_generator_says_how_to_get_it() {
    // A copy of the program with nothing beside it, and an empty PATH.
    let directory = tempfile::tempdir().unwrap();
    let alone = directory.path().join("zeroring");
    std::fs::copy(env!("CARGO_BIN_EXE_zeroring"), &alone).unwrap();
    let output = Command::new(&alone).arg("loadtest").env("PATH", "").output().unwrap();
    assert_eq!(output.status.code(), Some(255));
    assert!(err(&output).contains("cargo build --release -p zeroring-loadtest"));
}
