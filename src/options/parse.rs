//! From command line, environment and `.env` file to checked values (spec: operations §1.1).
//!
//! Precedence per option: command line, environment, `.env`, default. Errors carry the original's
//! texts, for scripts that match them.

use std::collections::BTreeMap;
use std::fmt;

use zeroring_core::protocol::connect::js_number;

use super::def::{Default, Kind, OptionDef};
use super::table::OPTIONS;

/// A value as parsed.
#[derive(Debug, Clone, PartialEq)]
pub enum OptionValue {
    /// A text, or a word of a [`Kind::OneOf`].
    Text(String),
    /// A number.
    Number(f64),
    /// On or off.
    Flag(bool),
    /// Texts.
    List(Vec<String>),
}

/// Where a value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Not given.
    Default,
    /// Environment or `.env` file.
    Environment,
    /// Command line.
    CommandLine,
}

/// Why the options cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OptionError {
    /// A text that the option's type does not accept.
    #[error("TypeError: Invalid input for {env}: \"{input}\"")]
    InvalidInput {
        /// Environment variable of the option, also when the flag was used.
        env: String,
        /// The text; `…` if it is secret.
        input: String,
    },
    /// A required option is missing.
    #[error("TypeError: Missing required option {env} at {path}. Got undefined")]
    Missing {
        /// Environment variable of the option.
        env: String,
        /// Path of the option.
        path: &'static str,
    },
    /// A flag without its value.
    #[error("TypeError: Expected {kind} at {path}. Got true")]
    NoValue {
        /// Type of the option.
        kind: String,
        /// Path of the option.
        path: &'static str,
    },
    /// Not one of the words.
    #[error("TypeError: Expected literal value {words} at {path} Got {got:?}")]
    NotOneOf {
        /// The words, quoted.
        words: String,
        /// Path of the option.
        path: &'static str,
        /// What was given.
        got: String,
    },
    /// A value that a rule of the option refuses.
    #[error("TypeError: {rule} at {path}. Got {got}")]
    Rule {
        /// The rule.
        rule: String,
        /// Path of the option.
        path: &'static str,
        /// What was given, as JSON.
        got: String,
    },
    /// A flag was given twice.
    #[error("ALREADY_SET: Singular option already set [{flag}={value}]")]
    AlreadySet {
        /// The flag.
        flag: String,
        /// Its first value; `…` if it is secret.
        value: String,
    },
}

/// Every option's value and where it came from.
#[derive(Clone)]
pub struct Settings {
    values: Vec<(Option<OptionValue>, Source)>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for (def, (value, _)) in OPTIONS.iter().zip(&self.values) {
            match value {
                Some(_) if def.secret => map.entry(&def.path, &"…"),
                Some(value) => map.entry(&def.path, value),
                None => continue,
            };
        }
        map.finish()
    }
}

/// What the command line asks for.
#[derive(Debug, Clone)]
pub enum Parsed {
    /// Run with these settings.
    Settings(Settings),
    /// Print the usage.
    Help,
    /// These words mean nothing: print them and the usage, and end with code 0.
    Unknown(Vec<String>),
}

impl Settings {
    /// Value and source of an option of the table.
    pub fn get(&self, path: &str) -> (Option<&OptionValue>, Source) {
        let at = OPTIONS.iter().position(|def| def.path == path);
        debug_assert!(at.is_some(), "no option {path}");
        at.map_or((None, Source::Default), |at| {
            let (value, source) = &self.values[at];
            (value.as_ref(), *source)
        })
    }

    /// The options that were given, in the table's order.
    pub fn given(&self) -> impl Iterator<Item = &'static OptionDef> + '_ {
        let given = OPTIONS.iter().zip(&self.values);
        given.filter(|(_, (_, source))| *source != Source::Default).map(|(def, _)| def)
    }
}

/// Values of one source, by index in the table. `None` is a flag without value.
type Given = BTreeMap<usize, Vec<Option<String>>>;

/// Parses. `args` are the words after the program's name, `env` the environment with the `.env`
/// file already merged in.
///
/// # Errors
/// [`OptionError`]: the first one, values before rules, command line before environment.
pub fn parse(args: &[String], env: &BTreeMap<String, String>) -> Result<Parsed, OptionError> {
    let (from_args, unknown) = read_args(args)?;
    let from_args = convert(&from_args)?;
    let from_env = convert(&read_env(env))?;
    match unknown.first().map(String::as_str) {
        None => {}
        Some("--help" | "-h") => return Ok(Parsed::Help),
        Some(_) => return Ok(Parsed::Unknown(unknown)),
    }
    let mut values = Vec::with_capacity(OPTIONS.len());
    for (at, def) in OPTIONS.iter().enumerate() {
        let given = from_args.get(&at).map(|value| (value, Source::CommandLine));
        let given = given.or_else(|| from_env.get(&at).map(|v| (v, Source::Environment)));
        values.push(match given {
            Some((value, source)) => (Some(check(def, value)?), source),
            None => (default(def)?, Source::Default),
        });
    }
    Ok(Parsed::Settings(Settings { values }))
}

/// Sorts words into options and unknown ones. A value is `--flag=value` or the next word, unless
/// that begins with a dash and is no number.
fn read_args(args: &[String]) -> Result<(Given, Vec<String>), OptionError> {
    let mut given = Given::new();
    let mut unknown = Vec::new();
    let mut words = args.iter().peekable();
    while let Some(word) = words.next() {
        let (flag, attached) = match word.split_once('=') {
            Some((flag, value)) => (flag, Some(value.to_owned())),
            None => (word.as_str(), None),
        };
        let known = flag.strip_prefix("--").and_then(|flag| find_flag(flag));
        let Some((at, def)) = known else {
            unknown.push(word.clone());
            continue;
        };
        let is_list = def.kind == Kind::List;
        if !is_list && let Some(first) = given.get(&at) {
            let value = match first.first() {
                Some(Some(_)) if def.secret => "…".to_owned(),
                Some(Some(value)) => value.clone(),
                _ => "true".to_owned(),
            };
            return Err(OptionError::AlreadySet { flag: def.flag(), value });
        }
        let values = given.entry(at).or_default();
        if attached.is_some() {
            values.push(attached);
            continue;
        }
        let most = if is_list { usize::MAX } else { 1 };
        let before = values.len();
        while values.len() - before < most
            && let Some(value) = words.next_if(|next| is_value(next))
        {
            values.push(Some(value.clone()));
        }
        if !is_list && values.len() == before {
            values.push(None);
        }
    }
    Ok((given, unknown))
}

fn is_value(word: &str) -> bool {
    !word.starts_with('-') || (word.len() > 1 && !js_number(word).is_nan())
}

fn find_flag(flag: &str) -> Option<(usize, &'static OptionDef)> {
    OPTIONS.iter().enumerate().find(|(_, def)| def.flag() == flag)
}

fn read_env(env: &BTreeMap<String, String>) -> Given {
    let mut given = Given::new();
    for (at, def) in OPTIONS.iter().enumerate() {
        let Some(text) = env.get(&def.env()).filter(|text| !text.is_empty()) else { continue };
        let values = match def.kind {
            // No trimming: ` z` is another publication than `z`.
            Kind::List => text.split(',').map(|word| Some(word.to_owned())).collect(),
            _ => vec![Some(text.clone())],
        };
        given.insert(at, values);
    }
    given
}

/// A value, or `None` for a bare flag of an option that needs one.
type Converted = BTreeMap<usize, Option<OptionValue>>;

fn convert(given: &Given) -> Result<Converted, OptionError> {
    let mut out = Converted::new();
    for (&at, texts) in given {
        let def = &OPTIONS[at];
        let invalid = |input: &str| OptionError::InvalidInput {
            env: def.env(),
            input: if def.secret { "…".to_owned() } else { input.to_owned() },
        };
        let text = texts.first().and_then(Option::as_deref);
        let value = match (def.kind, text) {
            (Kind::List, _) => Some(OptionValue::List(texts.iter().flatten().cloned().collect())),
            (Kind::Flag, None) => Some(OptionValue::Flag(true)),
            (_, None) => None,
            (Kind::Flag, Some(text)) => match text.to_ascii_lowercase().as_str() {
                "true" | "1" => Some(OptionValue::Flag(true)),
                "false" | "0" => Some(OptionValue::Flag(false)),
                _ => return Err(invalid(text)),
            },
            (Kind::Number, Some(text)) => match js_number(text) {
                n if n.is_nan() => return Err(invalid(text)),
                n => Some(OptionValue::Number(n)),
            },
            (Kind::Text | Kind::OneOf(_), Some(text)) => Some(OptionValue::Text(text.to_owned())),
        };
        out.insert(at, value);
    }
    Ok(out)
}

fn default(def: &OptionDef) -> Result<Option<OptionValue>, OptionError> {
    Ok(match def.default {
        Default::Required => {
            return Err(OptionError::Missing { env: def.env(), path: def.path });
        }
        Default::Unset => None,
        Default::Text(text) => Some(OptionValue::Text(text.to_owned())),
        Default::Number(n) => Some(OptionValue::Number(n)),
        Default::Flag(on) => Some(OptionValue::Flag(on)),
        Default::List(words) => {
            Some(OptionValue::List(words.iter().map(|&word| word.to_owned()).collect()))
        }
    })
}

/// The rules that concern one option alone.
fn check(def: &OptionDef, value: &Option<OptionValue>) -> Result<OptionValue, OptionError> {
    let path = def.path;
    let rule = |rule: &str, got: String| {
        let got = if def.secret { "…".to_owned() } else { got };
        Err(OptionError::Rule { rule: rule.to_owned(), path, got })
    };
    let Some(value) = value else {
        return Err(match def.kind {
            Kind::OneOf(words) => {
                OptionError::NotOneOf { words: quoted(words), path, got: "true".to_owned() }
            }
            _ => OptionError::NoValue { kind: def.type_label(), path },
        });
    };
    match (def.kind, value) {
        (Kind::OneOf(words), OptionValue::Text(got)) if !words.contains(&got.as_str()) => {
            return Err(OptionError::NotOneOf { words: quoted(words), path, got: got.clone() });
        }
        _ => {}
    }
    match (path, value) {
        ("app.id", OptionValue::Text(id)) if !is_app_id(id) => rule(
            "The App ID may only consist of lower-case letters, numbers, and the underscore character",
            format!("{id:?}"),
        ),
        ("shard.id", OptionValue::Text(id)) => rule(
            "ZERO_SHARD_ID is no longer an option. Please use ZERO_APP_ID instead.",
            format!("{id:?}"),
        ),
        ("change.logBatchSize", OptionValue::Number(n)) if n.fract() != 0.0 || *n < 1.0 => {
            rule("change.logBatchSize must be an integer >= 1", n.to_string())
        }
        ("port" | "changeStreamer.port" | "litestream.port", OptionValue::Number(n))
            if n.fract() != 0.0 || !(0.0..=65_535.0).contains(n) =>
        {
            rule("a port is an integer from 0 to 65535", n.to_string())
        }
        ("shadowSync.sampleRate", OptionValue::Number(n)) if *n <= 0.0 || *n > 1.0 => {
            rule("shadowSync.sampleRate must be above 0 and at most 1", n.to_string())
        }
        _ => Ok(value.clone()),
    }
}

fn is_app_id(id: &str) -> bool {
    !id.is_empty() && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// `"a", "b" or "c"`.
fn quoted(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => words.join(""),
    }
}
