//! Options: one table, from which flags, environment variables, `--help`, `docs/options.md` and
//! the typed [`Options`] are made.
//!
//! - `def`, `table`: what options there are.
//! - `dotenv`, `parse`: words, environment and `.env` → [`parse::Settings`].
//! - `config`: settings → [`Options`], with derived values and the rules between options.
//! - `help`: the table as text.
//!
//! Invariants: names, types, defaults and error texts are the original's; a value is parsed once,
//! here; secrets are never printed. Data comes in from the command line, the environment and
//! `.env` at start-up, and goes out as one immutable [`Options`].

pub mod config;
pub mod def;
pub mod dotenv;
pub mod help;
pub mod parse;
pub mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use config::{ConfigError, CvrLocation, Endpoint, Loaded, Options, Role, Secret, Surroundings};
pub use parse::{OptionError, Parsed};

/// The environment of the process with the `.env` file of the current directory under it.
/// Variables that are not UTF-8 are left out: no option has such a value.
pub fn environment() -> BTreeMap<String, String> {
    let vars = std::env::vars_os();
    let mut env: BTreeMap<String, String> = vars
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let small = std::fs::metadata(".env").is_ok_and(|m| m.len() <= dotenv::MAX_FILE_BYTES);
    if small && let Ok(text) = std::fs::read_to_string(".env") {
        dotenv::merge(&text, &mut env);
    }
    env
}
