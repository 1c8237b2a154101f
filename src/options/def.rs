//! What an option is: name, type, default, and what this build does with it.

/// Type of an option's value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Any text.
    Text,
    /// What JavaScript's `Number()` accepts.
    Number,
    /// `true`, `1`, `false`, `0`, in any case; a bare flag is true.
    Flag,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// Texts: comma-separated in the environment, words on the command line.
    List,
}

/// Value of an option that is not given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Default {
    /// It must be given.
    Required,
    /// Nothing, or something that is derived from other options.
    Unset,
    /// This text (also for [`Kind::OneOf`]).
    Text(&'static str),
    /// This number.
    Number(f64),
    /// On or off.
    Flag(bool),
    /// These texts.
    List(&'static [&'static str]),
}

/// What this build does with an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It works.
    Active,
    /// Parsed and checked, but its feature is not built yet; logged once if it is given.
    NotYet,
    /// Accepted for compatibility; it never has an effect, for the reason given.
    NoEffect(&'static str),
}

/// Where an option exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// In the original 1.9 and later.
    Both,
    /// Only in the original 1.9.
    Only19,
    /// Only in later versions of the original.
    Newer,
    /// Ours.
    Own,
}

/// An option.
#[derive(Debug, Clone, Copy)]
pub struct OptionDef {
    /// `option` or `group.option`, camelCase. Flag and environment variable follow from it.
    pub path: &'static str,
    /// Type.
    pub kind: Kind,
    /// Value if not given.
    pub default: Default,
    /// Left out of `--help`.
    pub hidden: bool,
    /// What to use instead; such an option still works and is left out of `--help`.
    pub deprecated: Option<&'static str>,
    /// Never printed: passwords, keys, connection strings.
    pub secret: bool,
    /// What this build does with it.
    pub status: Status,
    /// Where it exists.
    pub origin: Origin,
    /// Description for `--help` and `docs/options.md`: lines.
    pub doc: &'static str,
}

impl OptionDef {
    const fn new(path: &'static str, kind: Kind, default: Default, doc: &'static str) -> OptionDef {
        OptionDef {
            path,
            kind,
            default,
            hidden: false,
            deprecated: None,
            secret: false,
            status: Status::Active,
            origin: Origin::Both,
            doc,
        }
    }

    /// The group, `""` for a top-level option.
    pub fn group(&self) -> &'static str {
        self.path.split_once('.').map_or("", |(group, _)| group)
    }

    /// The flag without its dashes: `change-streamer-port`.
    pub fn flag(&self) -> String {
        kebab(&self.path.replace('.', "-"))
    }

    /// The environment variable: `ZERO_CHANGE_STREAMER_PORT`.
    pub fn env(&self) -> String {
        format!("ZERO_{}", self.flag().replace('-', "_").to_ascii_uppercase())
    }

    /// True if `--help` shows it.
    pub fn visible(&self) -> bool {
        !self.hidden && self.deprecated.is_none()
    }

    /// The type as `--help` prints it.
    pub fn type_label(&self) -> String {
        match self.kind {
            Kind::Text => "string".to_owned(),
            Kind::Number => "number".to_owned(),
            Kind::Flag => "boolean".to_owned(),
            Kind::OneOf(words) => words.join(","),
            Kind::List => "string[]".to_owned(),
        }
    }

    /// `required`, `default: <JSON>` or `optional`.
    pub fn default_label(&self) -> String {
        match self.default {
            Default::Required => "required".to_owned(),
            Default::Unset => "optional".to_owned(),
            Default::Text(text) => format!("default: {text:?}"),
            Default::Number(n) => format!("default: {n}"),
            Default::Flag(on) => format!("default: {on}"),
            Default::List(words) => {
                let words: Vec<String> = words.iter().map(|w| format!("{w:?}")).collect();
                format!("default: [{}]", words.join(","))
            }
        }
    }

    pub(super) const fn hidden(mut self) -> OptionDef {
        self.hidden = true;
        self
    }

    pub(super) const fn secret(mut self) -> OptionDef {
        self.secret = true;
        self
    }

    pub(super) const fn deprecated(mut self, instead: &'static str) -> OptionDef {
        self.deprecated = Some(instead);
        self
    }

    pub(super) const fn not_yet(mut self) -> OptionDef {
        self.status = Status::NotYet;
        self
    }

    pub(super) const fn no_effect(mut self, why: &'static str) -> OptionDef {
        self.status = Status::NoEffect(why);
        self
    }

    pub(super) const fn origin(mut self, origin: Origin) -> OptionDef {
        self.origin = origin;
        self
    }
}

/// A text that must be given.
pub(super) const fn required(path: &'static str, doc: &'static str) -> OptionDef {
    OptionDef::new(path, Kind::Text, Default::Required, doc)
}

/// A text without default.
pub(super) const fn text(path: &'static str, doc: &'static str) -> OptionDef {
    OptionDef::new(path, Kind::Text, Default::Unset, doc)
}

/// A text with a default.
pub(super) const fn text_or(
    path: &'static str,
    default: &'static str,
    doc: &'static str,
) -> OptionDef {
    OptionDef::new(path, Kind::Text, Default::Text(default), doc)
}

/// A number without default.
pub(super) const fn number(path: &'static str, doc: &'static str) -> OptionDef {
    OptionDef::new(path, Kind::Number, Default::Unset, doc)
}

/// A number with a default.
pub(super) const fn number_or(path: &'static str, default: f64, doc: &'static str) -> OptionDef {
    OptionDef::new(path, Kind::Number, Default::Number(default), doc)
}

/// A switch without default: absent is off.
pub(super) const fn flag(path: &'static str, doc: &'static str) -> OptionDef {
    OptionDef::new(path, Kind::Flag, Default::Unset, doc)
}

/// A switch with a default.
pub(super) const fn flag_or(path: &'static str, default: bool, doc: &'static str) -> OptionDef {
    OptionDef::new(path, Kind::Flag, Default::Flag(default), doc)
}

/// One of some words.
pub(super) const fn one_of(
    path: &'static str,
    words: &'static [&'static str],
    default: &'static str,
    doc: &'static str,
) -> OptionDef {
    OptionDef::new(path, Kind::OneOf(words), Default::Text(default), doc)
}

/// A list without default.
pub(super) const fn list(path: &'static str, doc: &'static str) -> OptionDef {
    OptionDef::new(path, Kind::List, Default::Unset, doc)
}

/// A list with a default.
pub(super) const fn list_or(
    path: &'static str,
    default: &'static [&'static str],
    doc: &'static str,
) -> OptionDef {
    OptionDef::new(path, Kind::List, Default::List(default), doc)
}

/// `storageDBTmpDir` → `storage-db-tmp-dir`: a word begins at an upper-case letter after a
/// lower-case one or a digit, and at the last of several upper-case letters if a lower-case one
/// follows.
fn kebab(camel: &str) -> String {
    let chars: Vec<char> = camel.chars().collect();
    let mut out = String::with_capacity(camel.len() + 8);
    for (i, &c) in chars.iter().enumerate() {
        if c.is_ascii_uppercase() {
            let before = i.checked_sub(1).map(|i| chars[i]);
            let ends_word = before.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            let begins_word = before.is_some_and(|b| b.is_ascii_uppercase())
                && chars.get(i + 1).is_some_and(char::is_ascii_lowercase);
            if ends_word || begins_word {
                out.push('-');
            }
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_split_as_in_the_original() {
        for (path, flag) in [
            ("taskID", "task-id"),
            ("litestream.backupURL", "litestream-backup-url"),
            ("litestream.checkpointThresholdMB", "litestream-checkpoint-threshold-mb"),
            ("storageDBTmpDir", "storage-db-tmp-dir"),
            ("litestream.executableV5", "litestream-executable-v5"),
            ("litestream.restoreUsingV5", "litestream-restore-using-v5"),
            ("auth.jwksUrl", "auth-jwks-url"),
            ("litestream.configPathV5", "litestream-config-path-v5"),
            ("changeStreamer.startupDelayMs", "change-streamer-startup-delay-ms"),
        ] {
            let def = OptionDef::new(path, Kind::Text, Default::Unset, "");
            assert_eq!(def.flag(), flag);
        }
        let def = OptionDef::new("litestream.executableV5", Kind::Text, Default::Unset, "");
        assert_eq!(def.env(), "ZERO_LITESTREAM_EXECUTABLE_V5");
    }
}
