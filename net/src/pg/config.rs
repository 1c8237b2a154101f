//! Connection strings: `postgres://user:password@host:port/db?params` and `key=value` pairs.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use percent_encoding::percent_decode_str;

use super::error::PgError;
use crate::tls::TlsMode;

/// How long a TCP connection plus log-in may take.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Where and how to connect.
#[derive(Clone, PartialEq, Eq)]
pub struct PgConfig {
    /// Host name or address (IPv6 without brackets).
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Role.
    pub user: String,
    /// Password.
    pub password: Option<String>,
    /// Database.
    pub database: String,
    /// Protection.
    pub ssl: TlsMode,
    /// PEM file with the root certificates to trust instead of the system's.
    pub ssl_root_cert: Option<String>,
    /// `application_name`.
    pub application_name: String,
    /// Startup parameters (`options`, `search_path`, … and session settings such as `DateStyle`).
    pub parameters: BTreeMap<String, String>,
    /// Limit for connecting and logging in.
    pub connect_timeout: Duration,
    /// Longest silence while an answer is awaited; `None` waits for ever.
    pub read_timeout: Option<Duration>,
}

impl fmt::Debug for PgConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PgConfig({}@{}:{}/{}, {:?})",
            self.user, self.host, self.port, self.database, self.ssl
        )
    }
}

impl PgConfig {
    /// Parses a connection string.
    ///
    /// # Errors
    /// [`PgError::Config`] naming what is wrong, never the password.
    pub fn parse(text: &str) -> Result<PgConfig, PgError> {
        let text = text.trim();
        let rest = text.strip_prefix("postgres://").or_else(|| text.strip_prefix("postgresql://"));
        let mut settings = match rest {
            Some(rest) => parse_url(rest)?,
            None if text.contains("://") => {
                return Err(PgError::Config(
                    "its scheme is neither postgres:// nor postgresql://".into(),
                ));
            }
            None => parse_pairs(text)?,
        };
        from_settings(&mut settings)
    }

    /// The same server with another application name.
    pub fn with_application_name(&self, name: &str) -> PgConfig {
        PgConfig { application_name: name.to_owned(), ..self.clone() }
    }

    /// The same with one more startup parameter or session setting.
    pub fn with_parameter(mut self, name: &str, value: &str) -> PgConfig {
        self.parameters.insert(name.to_owned(), value.to_owned());
        self
    }

    /// `host:port`, for messages.
    pub fn address(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

fn decode(text: &str) -> Result<String, PgError> {
    percent_decode_str(text)
        .decode_utf8()
        .map(|s| s.into_owned())
        .map_err(|_| PgError::Config("a part of it is not UTF-8 when decoded".into()))
}

/// `user:password@host:port/db?key=value&…`, as settings.
fn parse_url(rest: &str) -> Result<BTreeMap<String, String>, PgError> {
    let mut settings = BTreeMap::new();
    let rest = rest.split('#').next().unwrap_or_default();
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (user_info, host_port) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (user, password) = match user_info.split_once(':') {
        Some((user, password)) => (user, Some(password)),
        None => (user_info, None),
    };
    if host_port.contains(',') {
        return Err(PgError::Config("it names several hosts; name one".into()));
    }
    let (host, port) = split_host_port(host_port)?;
    for (key, value) in [
        ("user", Some(user)),
        ("password", password),
        ("host", Some(host)),
        ("port", port),
        ("dbname", Some(path)),
    ] {
        if let Some(value) = value.filter(|v| !v.is_empty()) {
            settings.insert(key.to_owned(), decode(value)?);
        }
    }
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        settings.insert(decode(key)?, decode(&value.replace('+', " "))?);
    }
    Ok(settings)
}

fn split_host_port(text: &str) -> Result<(&str, Option<&str>), PgError> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, port) = rest
            .split_once(']')
            .ok_or_else(|| PgError::Config("an IPv6 address lacks its ']'".into()))?;
        return Ok((host, port.strip_prefix(':')));
    }
    Ok(match text.rsplit_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    })
}

/// `key=value key='va lue'`, as settings.
fn parse_pairs(text: &str) -> Result<BTreeMap<String, String>, PgError> {
    let bad = || PgError::Config("neither a URL nor `key=value` pairs".into());
    let mut settings = BTreeMap::new();
    let mut rest = text.trim_start();
    if rest.is_empty() {
        return Err(PgError::Config("it is empty".into()));
    }
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=').ok_or_else(bad)?;
        let mut chars = after.trim_start().char_indices().peekable();
        let quoted = chars.next_if(|(_, c)| *c == '\'').is_some();
        let mut value = String::new();
        let mut closed = !quoted;
        while let Some((_, c)) = chars.next() {
            match c {
                '\\' => value.push(chars.next().ok_or_else(bad)?.1),
                '\'' if quoted => {
                    closed = true;
                    break;
                }
                c if !quoted && c.is_whitespace() => break,
                c => value.push(c),
            }
        }
        if !closed || key.trim().is_empty() {
            return Err(bad());
        }
        settings.insert(key.trim().to_owned(), value);
        let at = chars.peek().map_or(after.trim_start().len(), |(i, _)| *i);
        rest = after.trim_start()[at..].trim_start();
    }
    Ok(settings)
}

fn from_settings(settings: &mut BTreeMap<String, String>) -> Result<PgConfig, PgError> {
    let mut take = |key: &str| settings.remove(key);
    let host = take("host").unwrap_or_else(|| "localhost".to_owned());
    if host.starts_with('/') {
        return Err(PgError::Config(
            "it names a Unix socket; use a host name or address (TCP)".into(),
        ));
    }
    let port = match take("port") {
        None => 5432,
        Some(p) => p.parse().map_err(|_| PgError::Config(format!("{p:?} is no port number")))?,
    };
    let user = take("user")
        .or_else(|| std::env::var("PGUSER").ok())
        .unwrap_or_else(|| "postgres".to_owned());
    let password = take("password").or_else(|| std::env::var("PGPASSWORD").ok());
    let database = take("dbname").or_else(|| take("database")).unwrap_or_else(|| user.clone());
    let ssl = take("ssl");
    let ssl_mode = take("sslmode");
    let ssl = TlsMode::from_url_value(ssl.or(ssl_mode).as_deref().unwrap_or("prefer"));
    let ssl_root_cert = take("sslrootcert").filter(|p| p != "system");
    let application_name = take("application_name").unwrap_or_else(|| "zeroring".to_owned());
    let connect_timeout = match take("connect_timeout") {
        None => DEFAULT_CONNECT_TIMEOUT,
        Some(s) => match s.parse::<u64>() {
            Ok(0) => DEFAULT_CONNECT_TIMEOUT,
            Ok(s) => Duration::from_secs(s),
            Err(_) => {
                return Err(PgError::Config(format!("connect_timeout {s:?} is no number")));
            }
        },
    };
    // Settings of other clients' libraries, which no server knows.
    for ignored in CLIENT_ONLY {
        take(ignored);
    }
    Ok(PgConfig {
        host,
        port,
        user,
        password,
        database,
        ssl,
        ssl_root_cert,
        application_name,
        parameters: std::mem::take(settings),
        connect_timeout,
        read_timeout: None,
    })
}

/// Parameters of libpq, node-postgres and postgres.js that are not for the server.
const CLIENT_ONLY: [&str; 17] = [
    "channel_binding",
    "fallback_application_name",
    "gssencmode",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
    "target_session_attrs",
    "sslcert",
    "sslkey",
    "sslsni",
    "sslcrl",
    "sslnegotiation",
    "pgbouncer",
    "max",
    "idle_timeout",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> PgConfig {
        PgConfig::parse(text).unwrap()
    }

    #[test]
    fn urls_with_all_parts() {
        let c = parse(
            "postgresql://us%40er:p%2Fw%3A@db.example:6432/my%20db?sslmode=verify-full&application_name=x+y&options=-c%20geqo%3Doff",
        );
        assert_eq!((c.user.as_str(), c.password.as_deref()), ("us@er", Some("p/w:")));
        assert_eq!((c.host.as_str(), c.port, c.database.as_str()), ("db.example", 6432, "my db"));
        assert_eq!((c.ssl, c.application_name.as_str()), (TlsMode::VerifyFull, "x y"));
        assert_eq!(c.parameters["options"], "-c geqo=off");
    }

    #[test]
    fn urls_with_few_parts() {
        let c = parse("postgres://u@[::1]");
        assert_eq!((c.host.as_str(), c.port, c.database.as_str()), ("::1", 5432, "u"));
        assert_eq!(c.address(), "[::1]:5432");
        assert_eq!(c.ssl, TlsMode::Prefer);
    }

    #[test]
    fn pairs_with_quotes() {
        let c = parse(r"host=h port = 1 user='a b' password='it\'s' dbname=d");
        assert_eq!((c.host.as_str(), c.port, c.user.as_str()), ("h", 1, "a b"));
        assert_eq!((c.password.as_deref(), c.database.as_str()), (Some("it's"), "d"));
    }

    #[test]
    fn the_ssl_parameter_wins_over_sslmode_and_unknown_modes_verify() {
        for (query, mode) in [
            ("ssl=false&sslmode=require", TlsMode::Disable),
            ("sslmode=disable", TlsMode::Disable),
            ("sslmode=require", TlsMode::Require),
            ("sslmode=allow", TlsMode::Require),
            ("ssl=no-verify", TlsMode::Require),
            ("ssl=true", TlsMode::VerifyFull),
            ("sslmode=verify-ca", TlsMode::VerifyCa),
            ("", TlsMode::Prefer),
        ] {
            assert_eq!(parse(&format!("postgres://u@h/d?{query}")).ssl, mode, "{query}");
        }
    }

    #[test]
    fn errors_name_the_cause_but_not_the_password() {
        for text in ["http://h/d", "postgres://u:secret@h:x/d", "secret", "", "password='secret"] {
            let error = PgConfig::parse(text).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(!format!("{:?}", parse("postgres://u:secret@h/d")).contains("secret"));
    }
}
