//! The usage text and `docs/options.md`, from the table.

use std::fmt::Write as _;

use super::def::{OptionDef, Origin, Status};
use super::table::OPTIONS;

/// Least width of the usage's left column.
const LEFT_WIDTH: usize = 35;
/// Least width of the usage's right column.
const RIGHT_WIDTH: usize = 70;

/// The usage of the server as the original lays it out: one block per visible option, two
/// columns.
pub fn usage() -> String {
    let blocks: Vec<(Vec<String>, Vec<String>)> =
        OPTIONS.iter().filter(|def| def.visible()).map(block).collect();
    let width = |column: fn(&(Vec<String>, Vec<String>)) -> &Vec<String>, least: usize| {
        let widths = blocks.iter().flat_map(|b| column(b).iter().map(|line| line.chars().count()));
        widths.max().unwrap_or(0).max(least)
    };
    let (left, right) = (width(|b| &b.0, LEFT_WIDTH), width(|b| &b.1, RIGHT_WIDTH));
    let mut out = String::from("\n");
    for (names, text) in &blocks {
        for row in 0..names.len().max(text.len()) {
            let cell = |column: &[String]| column.get(row).cloned().unwrap_or_default();
            let _ = writeln!(out, " {:left$} {:right$} ", cell(names), cell(text));
        }
    }
    out
}

/// Lines of the left and of the right column.
fn block(def: &OptionDef) -> (Vec<String>, Vec<String>) {
    let names = vec![
        format!("--{} {}", def.flag(), def.type_label()),
        format!("  {} env", def.env()),
        String::new(),
    ];
    let mut text = vec![def.default_label(), String::new()];
    text.extend(def.doc.lines().map(str::to_owned));
    text.extend(status_line(def));
    text.push(String::new());
    (names, text)
}

fn status_line(def: &OptionDef) -> Option<String> {
    match def.status {
        Status::Active => None,
        Status::NotYet => Some("(Not active yet in this version.)".to_owned()),
        Status::NoEffect(why) => Some(format!("(No effect: {why}.)")),
    }
}

/// `docs/options.md`.
pub fn markdown() -> String {
    let mut out = String::from(
        "# Options\n\n\
         Made from the table in `src/options/table.rs`; a test keeps it current \
         (`UPDATE_DOCS=1 cargo test -p zeroring options` rewrites it).\n\n\
         Each option is a flag and an environment variable. The command line wins over the \
         environment, the environment over the file `.env` of the current directory. An empty \
         variable counts as not set. Lists are split at commas in the environment, and are \
         several words on the command line.\n\n\
         *Not yet*: parsed and checked, the feature is still to come; the log says so once. \
         *No effect*: accepted so that existing deployments start unchanged.\n",
    );
    let mut groups: Vec<&str> = Vec::new();
    for def in OPTIONS {
        if !groups.contains(&def.group()) {
            groups.push(def.group());
        }
    }
    for group in groups {
        let title = if group.is_empty() { "Server" } else { group };
        let _ = write!(
            out,
            "\n## {title}\n\n| Option | Type | Default | What it does |\n|---|---|---|---|\n"
        );
        for def in OPTIONS.iter().filter(|def| def.group() == group) {
            let _ = writeln!(
                out,
                "| `{}`<br>`--{}` | {} | {} | {} |",
                def.env(),
                def.flag(),
                cell(&def.type_label()),
                cell(def.default_label().trim_start_matches("default: ")),
                cell(&description(def)),
            );
        }
    }
    out
}

fn description(def: &OptionDef) -> String {
    let mut parts = vec![def.doc.replace('\n', " ")];
    if let Some(instead) = def.deprecated {
        parts.push(format!("*Deprecated*: {instead}"));
    }
    match def.origin {
        Origin::Both => {}
        Origin::Only19 => parts.push("*Original 1.9 only.*".to_owned()),
        Origin::Newer => parts.push("*Newer versions of the original.*".to_owned()),
        Origin::Own => parts.push("*Ours.*".to_owned()),
    }
    match def.status {
        Status::Active => {}
        Status::NotYet => parts.push("*Not yet.*".to_owned()),
        Status::NoEffect(why) => parts.push(format!("*No effect*: {why}.")),
    }
    parts.retain(|part| !part.is_empty());
    parts.join(" ")
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}
