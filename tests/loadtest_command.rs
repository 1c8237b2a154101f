//! `zeroring loadtest` becomes the load generator beside it, or says where to get it.

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

/// `zeroring` in a directory of its own, with `program` as the load generator if there is one.
fn run(program: Option<&str>, arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let zeroring = dir.path().join("zeroring");
    fs::hard_link(env!("CARGO_BIN_EXE_zeroring"), &zeroring)
        .or_else(|_| fs::copy(env!("CARGO_BIN_EXE_zeroring"), &zeroring).map(drop))
        .unwrap();
    if let Some(text) = program {
        let file = dir.path().join("zeroring-loadtest");
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = "/usr/bin:/bin";
    Command::new(&zeroring).arg("loadtest").args(arguments).env("PATH", path).output().unwrap()
}

#[test]
fn the_program_beside_gets_the_arguments_and_its_exit_code_counts() {
    let output = run(Some("#!/bin/sh\necho \"got $*\"\nexit 7\n"), &["run", "x.toml"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "got run x.toml\n");
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn without_it_the_way_to_get_it_is_told() {
    let output = run(None, &["help"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("cargo build --release -p zeroring-loadtest"), "{text}");
    assert!(!output.status.success());
}
