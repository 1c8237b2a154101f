//! The generator against its null server, as processes.

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn all_clients_connect_and_apply_every_poke() {
    let output = Command::new(env!("CARGO_BIN_EXE_zeroring-loadtest"))
        .args(["null", "--clients", "60", "--rate", "10", "--pokes", "3", "--seconds", "1"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("60 clients connected"), "{text}");
    assert!(text.contains("0 connections lost, 0 violations"), "{text}");
    assert!(!text.contains("\n0 deliveries"), "{text}");
}

#[test]
fn one_process_connects_more_clients_than_one_table_of_open_files_holds() {
    let output = Command::new("sh")
        .args(["-c", "ulimit -n 100; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_zeroring-loadtest")])
        .args(["null", "--clients", "120", "--workers", "2", "--rate", "5", "--seconds", "1"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("120 clients connected"), "{text}");
    assert!(text.contains("0 connections lost, 0 violations"), "{text}");
}

#[test]
fn wrong_arguments_are_explained() {
    for arguments in [&["run"][..], &["dance"][..], &["run", "x.toml", "--server", "other"][..]] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_zeroring-loadtest")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("help"), "{arguments:?}");
    }
}
