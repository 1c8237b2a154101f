//! The usage text and `docs/options.md`, from the table.

use std::fmt::Write as _;

use super::def::{OptionDef, Origin, Status};
use super::table::OPTIONS;

/// Least width of the usage's left column.
const LEFT_WIDTH: usize = 35;
/// Least width of the usage's right column.
const RIGHT_WIDTH: usize = 70;

/// The lines of an option: names to the left, text to the right.
struct Block {
    left: Vec<String>,
    right: Vec<String>,
}

/// The usage of the server as the original lays it out: one block per visible option, two
/// columns.
pub fn usage() -> String {
    let blocks: Vec<Block> = OPTIONS.iter().filter(|def| def.visible()).map(block).collect();
    let widest = |lines: fn(&Block) -> &[String], least: usize| {
        let widths = blocks.iter().flat_map(|b| lines(b).iter().map(|line| line.chars().count()));
        widths.max().unwrap_or(0).max(least)
    };
    let (left, right) = (widest(|b| &b.left, LEFT_WIDTH), widest(|b| &b.right, RIGHT_WIDTH));
    let mut out = String::from("\n");
    for block in &blocks {
        for row in 0..block.left.len().max(block.right.len()) {
            let cell = |column: &[String]| column.get(row).cloned().unwrap_or_default();
            let (names, text) = (cell(&block.left), cell(&block.right));
            let _ = writeln!(out, " {names:left$} {text:right$} ");
        }
    }
    out
}

fn block(def: &OptionDef) -> Block {
    let left = vec![
        format!("--{} {}", def.flag(), def.type_label()),
        format!("  {} env", def.env()),
        String::new(),
    ];
    let mut right = vec![def.default_label(), String::new()];
    right.extend(def.doc.lines().map(str::to_owned));
    right.extend(status_line(def));
    right.push(String::new());
    Block { left, right }
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
