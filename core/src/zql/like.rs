//! LIKE and ILIKE, precompiled (spec: zql-ivm §2.5).
//!
//! `%` is any run of characters, `_` one code point (decision 8), `\x` a literal `x`; newlines are
//! ordinary, and the whole text must match. ILIKE lower-cases both sides with the full Unicode
//! mapping: lower-casing, not case folding, so `straße` is not ILIKE `STRASSE`. Only the two small
//! sigmas are one where there are wildcards.
//!
//! SQL uses this very matcher (the `zr_like` function of the replica's reader), so hydration and
//! maintenance cannot disagree.

use std::hash::{Hash, Hasher};

use memchr::memmem;

/// A pattern that can never be matched against.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LikeError {
    /// A lone backslash at the end.
    #[error("LIKE pattern must not end with escape character")]
    TrailingEscape,
}

/// A compiled pattern.
#[derive(Debug, Clone)]
pub struct LikePattern {
    /// The pattern text as written, for SQL.
    pattern: String,
    /// ILIKE.
    ignore_case: bool,
    matcher: Matcher,
}

impl PartialEq for LikePattern {
    fn eq(&self, o: &Self) -> bool {
        self.ignore_case == o.ignore_case && self.pattern == o.pattern
    }
}
impl Eq for LikePattern {}
impl Hash for LikePattern {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.pattern.hash(h);
        self.ignore_case.hash(h);
    }
}

/// What a pattern comes down to, cheapest first.
#[derive(Debug, Clone)]
enum Matcher {
    /// No wildcard.
    Equal(String),
    /// `abc%`
    Prefix(String),
    /// `%abc`
    Suffix(String),
    /// `%abc%`
    Contains(Box<memmem::Finder<'static>>),
    /// Anything else.
    General(Vec<Token>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    /// These characters.
    Text(String),
    /// `_`, this many.
    Any(usize),
    /// `%`
    Run,
}

impl LikePattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// [`LikeError::TrailingEscape`].
    pub fn new(pattern: impl Into<String>, ignore_case: bool) -> Result<LikePattern, LikeError> {
        let pattern = pattern.into();
        let mut matcher = Matcher::of(tokenize(&pattern)?);
        if ignore_case {
            let folds = !matches!(matcher, Matcher::Equal(_));
            matcher = Matcher::of(tokenize(&lower(&pattern, folds))?);
        }
        Ok(LikePattern { pattern, ignore_case, matcher })
    }

    /// The pattern as written.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// True for ILIKE.
    pub fn ignore_case(&self) -> bool {
        self.ignore_case
    }

    /// The text that every match begins with, when case matters and there is such a text: lets
    /// an index narrow the search.
    pub fn prefix(&self) -> Option<&str> {
        if self.ignore_case {
            return None;
        }
        match &self.matcher {
            Matcher::Equal(s) | Matcher::Prefix(s) => Some(s.as_str()),
            Matcher::General(tokens) => match tokens.first() {
                Some(Token::Text(s)) => Some(s.as_str()),
                _ => None,
            },
            Matcher::Suffix(_) | Matcher::Contains(_) => None,
        }
        .filter(|s| !s.is_empty())
    }

    /// Whether the whole `text` matches.
    pub fn matches(&self, text: &str) -> bool {
        if self.ignore_case && text.bytes().any(|b| b.is_ascii_uppercase() || !b.is_ascii()) {
            let folds = !matches!(self.matcher, Matcher::Equal(_));
            self.matcher.matches(&lower(text, folds))
        } else {
            self.matcher.matches(text)
        }
    }
}

/// Lower-cases. The lower case of `Σ` depends on whether a word ends there, which says nothing
/// about a part of a word: with wildcards (`folds_sigma`) `ς` is `σ`, as in the client.
fn lower(text: &str, folds_sigma: bool) -> String {
    let lower = text.to_lowercase();
    if folds_sigma && lower.contains('ς') { lower.replace('ς', "σ") } else { lower }
}

fn tokenize(pattern: &str) -> Result<Vec<Token>, LikeError> {
    let mut tokens: Vec<Token> = Vec::new();
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        match (c, tokens.last_mut()) {
            ('%', Some(Token::Run)) => {}
            ('%', _) => tokens.push(Token::Run),
            ('_', Some(Token::Any(n))) => *n += 1,
            ('_', _) => tokens.push(Token::Any(1)),
            (c, last) => {
                let c = if c == '\\' { chars.next().ok_or(LikeError::TrailingEscape)? } else { c };
                match last {
                    Some(Token::Text(s)) => s.push(c),
                    _ => tokens.push(Token::Text(c.to_string())),
                }
            }
        }
    }
    Ok(tokens)
}

impl Matcher {
    fn of(mut tokens: Vec<Token>) -> Matcher {
        match &mut tokens[..] {
            [] => Matcher::Equal(String::new()),
            [Token::Text(s)] => Matcher::Equal(std::mem::take(s)),
            [Token::Run] => Matcher::Prefix(String::new()),
            [Token::Text(s), Token::Run] => Matcher::Prefix(std::mem::take(s)),
            [Token::Run, Token::Text(s)] => Matcher::Suffix(std::mem::take(s)),
            [Token::Run, Token::Text(s), Token::Run] => {
                Matcher::Contains(Box::new(memmem::Finder::new(s.as_bytes()).into_owned()))
            }
            _ => Matcher::General(tokens),
        }
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Matcher::Equal(s) => text == s,
            Matcher::Prefix(s) => text.starts_with(s.as_str()),
            Matcher::Suffix(s) => text.ends_with(s.as_str()),
            Matcher::Contains(f) => f.find(text.as_bytes()).is_some(),
            Matcher::General(tokens) => general(tokens, text),
        }
    }
}

/// Greedy with one point of return: after a later `%` an earlier one need never be retried, so
/// the work is at most |tokens| · |text|.
fn general(tokens: &[Token], text: &str) -> bool {
    let (mut token, mut at) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    loop {
        let step = match tokens.get(token) {
            Some(Token::Run) => {
                retry = Some((token, at));
                token += 1;
                continue;
            }
            Some(Token::Text(s)) if text[at..].starts_with(s.as_str()) => Some(s.len()),
            Some(Token::Any(n)) => skip_chars(&text[at..], *n),
            None if at == text.len() => return true,
            Some(Token::Text(_)) | None => None,
        };
        match (step, retry) {
            (Some(bytes), _) => {
                at += bytes;
                token += 1;
            }
            (None, None) => return false,
            (None, Some((run, from))) => {
                let Some(width) = skip_chars(&text[from..], 1) else { return false };
                retry = Some((run, from + width));
                token = run + 1;
                at = from + width;
            }
        }
    }
}

/// Bytes of the first `n` characters; `None` if there are fewer.
fn skip_chars(text: &str, n: usize) -> Option<usize> {
    let mut chars = text.char_indices();
    for _ in 0..n {
        chars.next()?;
    }
    Some(chars.next().map_or(text.len(), |(i, _)| i))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn like(pattern: &str, text: &str) -> bool {
        LikePattern::new(pattern, false).unwrap().matches(text)
    }

    fn ilike(pattern: &str, text: &str) -> bool {
        LikePattern::new(pattern, true).unwrap().matches(text)
    }

    /// The definition, as a recursion over characters.
    fn naive(pattern: &[char], text: &[char]) -> bool {
        match pattern {
            [] => text.is_empty(),
            ['%', rest @ ..] => (0..=text.len()).any(|i| naive(rest, &text[i..])),
            ['_', rest @ ..] => !text.is_empty() && naive(rest, &text[1..]),
            ['\\', c, rest @ ..] | [c, rest @ ..] => {
                text.first() == Some(c) && naive(rest, &text[1..])
            }
        }
    }

    #[test]
    fn every_short_pattern_agrees_with_the_definition() {
        let alphabet = ['a', 'é', '%', '_', '\\', '\n'];
        let words = |letters: &[char], max: usize| {
            let mut all: Vec<Vec<char>> = vec![vec![]];
            let mut from = 0;
            for _ in 0..max {
                let upto = all.len();
                for i in from..upto {
                    for &c in letters {
                        let mut w = all[i].clone();
                        w.push(c);
                        all.push(w);
                    }
                }
                from = upto;
            }
            all
        };
        let texts = words(&['a', 'é', '%', '\n'], 4);
        let mut checked = 0;
        for p in words(&alphabet, 4) {
            let Ok(compiled) = LikePattern::new(p.iter().collect::<String>(), false) else {
                let slashes = p.iter().rev().take_while(|c| **c == '\\').count();
                assert_eq!(slashes % 2, 1, "{p:?}");
                continue;
            };
            for t in &texts {
                let text: String = t.iter().collect();
                assert_eq!(compiled.matches(&text), naive(&p, t), "{p:?} on {t:?}");
                checked += 1;
            }
        }
        assert!(checked > 300_000);
    }

    /// Patterns × inputs with what release 1.9.0's client answers. Astral characters are left out:
    /// there `_` is one UTF-16 unit (decision 8).
    #[test]
    fn the_table_of_the_original_holds() {
        let table: serde_json::Value =
            serde_json::from_str(include_str!("testdata/like.json")).unwrap();
        let inputs = table["inputs"].as_array().unwrap();
        let mut wrong = Vec::new();
        for case in table["cases"].as_array().unwrap() {
            let pattern = case[0].as_str().unwrap();
            let compiled = LikePattern::new(pattern, case[1] == "i").unwrap();
            for input in inputs {
                let want = case[2].as_array().unwrap().contains(input);
                if compiled.matches(input.as_str().unwrap()) != want {
                    wrong.push(format!("{} {pattern:?} on {input}: not {want}", case[1]));
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn wildcards_cover_newlines_and_whole_code_points() {
        assert!(like("a%z", "a\n\nz") && like("a_z", "a\nz"));
        assert!(like("_", "😀") && !like("__", "😀") && !like("_", ""));
        assert!(like("%", "") && like("", "") && !like("", "x"));
        assert!(!like("a", "ab") && !like("b", "ab"), "anchored on both sides");
    }

    #[test]
    fn regular_expression_characters_and_escapes_are_literal() {
        for s in ["a.b", "a*b", "(a)", "[ab]", "^a$", "a|b", "a+?", "{2}", "a/b"] {
            assert!(like(s, s));
            assert!(like(&format!("%{s}%_"), &format!("x{s}y")));
        }
        assert!(!like("a.b", "axb") && !like("a*b", "aab"));
        assert!(like("100\\%", "100%") && !like("100\\%", "100x"));
        assert!(like("a\\_b", "a_b") && !like("a\\_b", "axb"));
        assert!(like("a\\\\", "a\\") && like("\\a", "a"));
        assert_eq!(LikePattern::new("a\\", false), Err(LikeError::TrailingEscape));
        assert_eq!(LikePattern::new("a\\\\\\", true), Err(LikeError::TrailingEscape));
    }

    #[test]
    fn ilike_lower_cases_and_does_not_fold() {
        assert!(ilike("москва", "МОСКВА") && ilike("МОС%", "москва"));
        assert!(!ilike("STRASSE", "straße") && ilike("STRAßE", "straße"));
        assert!(ilike("%b_D%", "aBcDe") && !like("%b_D%", "aBcDe"));
        assert!(ilike("k", "\u{212A}") && ilike("%k%", "x\u{212A}"), "the Kelvin sign");
        assert!(ilike("a\\%B", "A%b"));
        assert!(ilike("%ΔΟΣ%", "ΟΔΟΣΑ") && ilike("ΟΔΟΣ", "οδος"), "final sigma");
    }

    #[test]
    fn a_prefix_is_reported_only_where_it_narrows() {
        let prefix = |p: &str| LikePattern::new(p, false).unwrap().prefix().map(str::to_owned);
        assert_eq!(prefix("ab%").as_deref(), Some("ab"));
        assert_eq!(prefix("a\\%_c%").as_deref(), Some("a%"));
        assert_eq!(prefix("%ab"), None);
        assert_eq!(prefix("%"), None);
        assert_eq!(LikePattern::new("ab%", true).unwrap().prefix(), None);
    }

    #[test]
    fn a_hostile_pattern_costs_no_more_than_pattern_times_text() {
        let pattern = "%a".repeat(500) + "b";
        let text = "a".repeat(5000);
        assert!(!like(&pattern, &text));
    }
}
