//! The `.env` file of the current directory.
//!
//! Lines `NAME=value`, with `export `, `#` comments, three kinds of quotes (also over several
//! lines) and `${NAME}`, `${NAME:-default}`. Not supported, and left as they are: `$(command)`
//! and encrypted values. A variable of the process always wins.

use std::collections::BTreeMap;

/// Largest `.env` file that is read, bytes.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// Parses the text of a `.env` file and merges it under `env`: what `env` has stays.
pub fn merge(text: &str, env: &mut BTreeMap<String, String>) {
    let process = env.clone();
    let mut rest = text.trim_start_matches('\u{feff}');
    while !rest.is_empty() {
        let line_end = rest.find('\n').map_or(rest.len(), |at| at + 1);
        let Some((name, value_at)) = assignment(&rest[..line_end]) else {
            rest = &rest[line_end..];
            continue;
        };
        let (value, used) = value(&rest[value_at..], env);
        if !process.contains_key(name) {
            env.insert(name.to_owned(), value);
        }
        rest = &rest[value_at + used..];
        rest = rest.find('\n').map_or("", |at| &rest[at + 1..]);
    }
}

/// Name and start of the value, if the line is an assignment.
fn assignment(line: &str) -> Option<(&str, usize)> {
    let (left, right) = line.split_once('=')?;
    let name = left.trim();
    let name = name.strip_prefix("export ").map_or(name, str::trim);
    let valid = !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.' || b == b'-');
    let blanks = right.len() - right.trim_start_matches([' ', '\t']).len();
    valid.then_some((name, left.len() + 1 + blanks))
}

/// The value at the start of `text`, and how many bytes it takes.
fn value(text: &str, env: &BTreeMap<String, String>) -> (String, usize) {
    let quote = text.chars().next().filter(|c| matches!(c, '"' | '\'' | '`'));
    if let Some(quote) = quote
        && let Some(end) = closing(&text[1..], quote)
    {
        let inner = &text[1..=end];
        let value = match quote {
            '"' => expand(&inner.replace("\\n", "\n").replace("\\r", "\r"), env),
            _ => inner.to_owned(),
        };
        return (value, end + 2);
    }
    let line = &text[..text.find('\n').unwrap_or(text.len())];
    let bare = line.find(" #").map_or(line, |at| &line[..at]);
    let bare = if bare.starts_with('#') { "" } else { bare };
    (expand(bare.trim(), env), line.len())
}

/// Index of the closing quote; in double quotes `\"` does not close.
fn closing(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if c == quote && !escaped {
            return Some(at);
        }
        escaped = quote == '"' && c == '\\' && !escaped;
    }
    None
}

/// Replaces `${NAME}` and `${NAME:-default}`; `\$` is a dollar sign.
fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        let (before, after) = (&rest[..at], &rest[at + 1..]);
        if let Some(before) = before.strip_suffix('\\') {
            out.push_str(before);
            out.push('$');
            rest = after;
            continue;
        }
        out.push_str(before);
        match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((inner, tail)) => {
                let (name, default) = inner.split_once(":-").unwrap_or((inner, ""));
                let known = env.get(name).filter(|value| !value.is_empty());
                out.push_str(known.map_or(default, String::as_str));
                rest = tail;
            }
            None => {
                out.push('$');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_wins_and_quotes_comments_and_references_work() {
        let mut env = BTreeMap::from([("A".to_owned(), "process".to_owned())]);
        let text = "\u{feff}# comment\nexport A=file\nB = plain # comment\nC=\"x\\ny ${B}\"\n\
                    D='${B} # kept'\nE=`multi\nline`\nF=${NONE:-fallback}/${A}\nnonsense\n\
                    G=#nothing\nH=pa\\$ss$word\nI=\"open\nJ=last";
        merge(text, &mut env);
        let expected = [
            ("A", "process"),
            ("B", "plain"),
            ("C", "x\ny plain"),
            ("D", "${B} # kept"),
            ("E", "multi\nline"),
            ("F", "fallback/process"),
            ("G", ""),
            ("H", "pa$ss$word"),
            ("I", "\"open"),
            ("J", "last"),
        ];
        let got: Vec<(&str, &str)> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(got, expected);
    }
}
