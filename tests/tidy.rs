//! The repository checks itself: floors, bans, sizes. A rule that must be broken is changed here,
//! with its reason.

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// Files longer than this are asking to be two.
const MAX_FILE_LINES: usize = 800;

/// Crates by floor: a crate may only import from lower floors (design: imports point down).
const FLOORS: [(&str, &[&str]); 4] = [
    ("core/src", &["zeroring_net", "zeroring_storage", "zeroring::"]),
    ("net/src", &["zeroring_core", "zeroring_storage", "zeroring::"]),
    ("storage/src", &["zeroring::"]),
    ("src", &["zeroring_bench", "zeroring_loadtest"]),
];

/// (where, text, what to do instead)
const BANS: [(&str, &str, &str); 8] = [
    ("core/src", "std::time::Instant", "take the time as an argument: core is pure"),
    ("core/src", "SystemTime", "take the time as an argument: core is pure"),
    ("core/src", "std::thread", "core is pure"),
    ("core/src", "std::fs", "core is pure"),
    ("core/src", "std::net", "core is pure"),
    ("storage/src", "monoio", "only net::rt names the runtime"),
    ("src", "monoio", "only net::rt names the runtime"),
    ("", concat!("to", "do!("), "return a typed error"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files_below(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() {
            if !matches!(name.to_str(), Some("target" | "node_modules" | ".git")) {
                files_below(&path, extension, found);
            }
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
}

fn files(dir: &str, extension: &str) -> Vec<(String, String)> {
    let mut paths = Vec::new();
    files_below(&root().join(dir), extension, &mut paths);
    assert!(!paths.is_empty(), "no .{extension} file below `{dir}`");
    paths
        .into_iter()
        .map(|p| {
            let name = p.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
            let text = fs::read_to_string(&p).unwrap();
            (name, text)
        })
        .collect()
}

/// Test modules may do what they like; by custom they are last in a file.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap_or(text)
}

fn assert_none(rule: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

#[test]
fn imports_point_down() {
    let mut found = Vec::new();
    for (dir, banned) in FLOORS {
        for (name, text) in files(dir, "rs") {
            for b in banned {
                found.extend(without_tests(&text).contains(b).then(|| format!("{name}: {b}")));
            }
        }
    }
    assert_none("a floor imports from a higher one", found);
}

#[test]
fn banned_calls_do_not_occur() {
    let mut found = Vec::new();
    for (dir, banned, instead) in BANS {
        for (name, text) in files(dir, "rs") {
            if without_tests(&text).contains(banned) {
                found.push(format!("{name}: `{banned}`: {instead}"));
            }
        }
    }
    assert_none("banned", found);
}

#[test]
fn only_the_runtime_facade_names_the_runtime() {
    let found = files("net/src", "rs")
        .into_iter()
        .filter(|(name, text)| {
            !name.starts_with("net/src/rt") && without_tests(text).contains("monoio::")
        })
        .map(|(name, _)| name)
        .collect();
    assert_none("monoio outside net::rt", found);
}

#[test]
fn files_stay_short() {
    let found = files("", "rs")
        .into_iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, lines)| *lines > MAX_FILE_LINES)
        .map(|(name, lines)| format!("{name}: {lines} lines"))
        .collect();
    assert_none("split these", found);
}

#[test]
fn every_module_says_what_it_is() {
    let found = files("", "rs")
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//!"))
        .map(|(name, _)| name)
        .collect();
    assert_none("no module documentation on the first line", found);
}

#[test]
fn documents_have_one_title() {
    let found = files("docs", "md")
        .into_iter()
        .filter(|(_, text)| !text.starts_with("# "))
        .map(|(name, _)| name)
        .collect();
    assert_none("no title on the first line", found);
}

#[test]
fn nothing_names_a_machine() {
    let mut found = Vec::new();
    for extension in ["rs", "md", "toml", "sh", "mjs", "json"] {
        let mut paths = Vec::new();
        files_below(root(), extension, &mut paths);
        for path in paths {
            let text = fs::read_to_string(&path).unwrap_or_default();
            for leak in [
                concat!("/wo", "rk/"),
                concat!("registry.", "npmjs"),
                concat!("static.", "crates.io"),
            ] {
                found.extend(text.contains(leak).then(|| format!("{}: {leak}", path.display())));
            }
        }
    }
    assert_none("machine paths or registry hosts", found);
}

/// `docs/conformance.md` names a test for every item of the checklists: `file::function`.
#[test]
fn tests_that_the_conformance_page_names_exist() {
    let sources = files("", "rs");
    let page = fs::read_to_string(root().join("docs/conformance.md")).unwrap();
    let names: Vec<&str> = page.split('`').filter(|word| word.contains("::")).collect();
    assert!(names.len() > 150, "{} names", names.len());
    let exists = |name: &str| {
        let (module, function) = name.rsplit_once("::").unwrap();
        let definition = format!("fn {function}(");
        let mut of_module = sources.iter().filter(|(file, _)| {
            let file = file.trim_end_matches(".rs").trim_end_matches("/mod");
            file.rsplit('/').next() == Some(module)
        });
        of_module.any(|(_, text)| text.contains(&definition))
    };
    let missing = names.into_iter().filter(|name| *name != "file::test" && *name != "module::test");
    let missing = missing.filter(|name| !exists(name)).map(str::to_owned).collect();
    assert_none("docs/conformance.md names tests that do not exist", missing);
}

/// The numbers in the first column of a table: `7`, `T7`, `7, 9`, `7–9`.
fn numbers(table: &str) -> Vec<u32> {
    let mut listed = Vec::new();
    for line in table.lines().filter(|line| line.starts_with("| ")) {
        for item in line.split('|').nth(1).unwrap().split(',') {
            let number = |end: &str| end.trim().trim_start_matches('T').parse().ok();
            let ends: Vec<u32> = item.split('–').filter_map(number).collect();
            if let (Some(first), Some(last)) = (ends.first(), ends.last()) {
                listed.extend(*first..=*last);
            }
        }
    }
    listed
}

/// Every item of the three checklists has its line, and every trap.
#[test]
fn the_conformance_page_has_every_item() {
    let page = fs::read_to_string(root().join("docs/conformance.md")).unwrap();
    for (part, items, traps) in
        [("## Sync protocol\n", 58, 25), ("## View syncer and", 63, 33), ("## Queries\n", 46, 35)]
    {
        let part_of_page = page.split(part).nth(1).unwrap().split("\n## ").next().unwrap();
        let (table, of_traps) = part_of_page.split_once("\nIts traps").unwrap();
        for (what, table, count) in [("item", table, items), ("trap", of_traps, traps)] {
            let listed = numbers(table);
            let missing = (1..=count).filter(|n| !listed.contains(n));
            assert_none(part, missing.map(|n| format!("{what} {n} is missing")).collect());
        }
    }
}
