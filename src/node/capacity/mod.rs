//! `zeroring capacity`: how much more a running node holds, and what runs out first.
//!
//! Looks at `/statz` twice, some seconds apart, and draws straight lines through what it sees
//! ([`model`]); every number is printed with how it was reckoned.

mod model;

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::Value;
use url::Url;

use model::Sample;

const HELP: &str = "\
Usage: zeroring capacity [--url URL] [--password PASSWORD] [--seconds N]

Says how many more groups, queries and writes a running node holds, and what runs out first.
Look while the node works as it usually does: an idle node shows little.

  --url URL            of the node (http://localhost:4848)
  --password PASSWORD  its admin password (or ZERO_ADMIN_PASSWORD)
  --seconds N          how long to watch (5)
";

/// How long a node may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Longer watching shows no more.
const MAX_SECONDS: f64 = 3600.0;

/// A longer answer is not a node's.
const MAX_ANSWER_BYTES: u64 = 4 << 20;

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum CapacityError {
    /// Wrong arguments.
    #[error("{0}\n\n{HELP}")]
    Usage(String),
    /// The node cannot be asked.
    #[error("asking {url}: {cause}")]
    Ask {
        /// Which node.
        url: String,
        /// What happened.
        cause: String,
    },
    /// It answers, but is no zeroring of this version.
    #[error(
        "{url} does not tell {missing:?} in its /statz: it is another server, or another version of zeroring"
    )]
    Unknown {
        /// Which node.
        url: String,
        /// JSON pointer of what is missing.
        missing: String,
    },
}

#[derive(Debug, PartialEq)]
struct Arguments {
    url: Url,
    password: String,
    seconds: f64,
}

/// Runs the command; the text to print.
///
/// # Errors
/// [`CapacityError`]
pub fn run(words: &[String], admin_password: Option<&str>) -> Result<String, CapacityError> {
    if words.iter().any(|w| w == "--help" || w == "-h") {
        return Ok(HELP.to_owned());
    }
    let arguments = parse(words, admin_password)?;
    let begin = Instant::now();
    let before = look(&arguments)?;
    std::thread::sleep(Duration::from_secs_f64(arguments.seconds));
    let after = look(&arguments)?;
    let seconds = begin.elapsed().as_secs_f64();
    let estimate = model::estimate(&before, &after, seconds);
    Ok(model::text(&estimate, &after.version, seconds))
}

fn parse(words: &[String], admin_password: Option<&str>) -> Result<Arguments, CapacityError> {
    let wrong = |text: String| CapacityError::Usage(text);
    let url = |text: &str| {
        let url = Url::parse(text).map_err(|e| wrong(format!("--url {text}: {e}")))?;
        if url.scheme() != "http" || url.host_str().is_none() {
            return Err(wrong(format!("--url {text}: begins with http:// and names a host")));
        }
        Ok(url)
    };
    let mut parsed = Arguments {
        url: url("http://localhost:4848")?,
        password: admin_password.unwrap_or_default().to_owned(),
        seconds: 5.0,
    };
    for pair in words.chunks(2) {
        let [name, value] = pair else {
            return Err(wrong(format!("{} needs a value", pair[0])));
        };
        match name.as_str() {
            "--url" => parsed.url = url(value)?,
            "--password" => parsed.password = value.clone(),
            "--seconds" => {
                let seconds = value.parse().ok().filter(|s| (0.1..=MAX_SECONDS).contains(s));
                let wrong = || wrong(format!("--seconds {value}: from 0.1 to {MAX_SECONDS}"));
                parsed.seconds = seconds.ok_or_else(wrong)?;
            }
            other => return Err(wrong(format!("unknown option {other}"))),
        }
    }
    Ok(parsed)
}

fn look(arguments: &Arguments) -> Result<Sample, CapacityError> {
    let url = arguments.url.to_string();
    let ask = |cause: String| CapacityError::Ask { url: url.clone(), cause };
    let body = get(arguments).map_err(ask)?;
    let statz: Value = serde_json::from_str(&body).map_err(|e| ask(e.to_string()))?;
    Sample::of(&statz).map_err(|missing| CapacityError::Unknown { url, missing })
}

fn get(arguments: &Arguments) -> Result<String, String> {
    let host = arguments.url.host_str().unwrap_or_default();
    let port = arguments.url.port_or_known_default().unwrap_or(80);
    let text = |e: std::io::Error| e.to_string();
    let address = (host.trim_matches(['[', ']']), port).to_socket_addrs().map_err(text)?;
    let mut last = "the name has no address".to_owned();
    for address in address {
        match TcpStream::connect_timeout(&address, ANSWER_TIMEOUT) {
            Ok(socket) => return exchange(socket, host, arguments).map_err(|e| e.to_string()),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

fn exchange(
    mut socket: TcpStream,
    host: &str,
    arguments: &Arguments,
) -> Result<String, std::io::Error> {
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    let credentials = format!("zeroring:{}", arguments.password);
    let credentials = base64::engine::general_purpose::STANDARD.encode(credentials);
    let path = arguments.url.path().trim_end_matches('/');
    let request = format!(
        "GET {path}/statz?format=json HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\
         Authorization: Basic {credentials}\r\n\r\n"
    );
    socket.write_all(request.as_bytes())?;
    let mut answer = String::new();
    socket.take(MAX_ANSWER_BYTES).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.lines().next().unwrap_or_default();
    match status.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        Some("401") => {
            Err(std::io::Error::other("it wants another admin password: give --password"))
        }
        _ => Err(std::io::Error::other(format!("it answered {status:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::registry::Registry;
    use crate::ops::statz::{Asked, StatzSources, render};

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn arguments_have_defaults_and_mistakes_are_named() {
        let parsed = parse(&[], Some("pw")).unwrap();
        assert_eq!(
            (parsed.url.as_str(), parsed.password.as_str()),
            ("http://localhost:4848/", "pw")
        );
        let parsed = parse(&words("--url http://h:1/base --password x --seconds 2"), None).unwrap();
        assert_eq!((parsed.url.path(), parsed.seconds), ("/base", 2.0));
        for (wrong, named) in [
            ("--url", "needs a value"),
            ("--url ftp://h", "http://"),
            ("--seconds 0", "--seconds 0"),
            ("--dance 1", "--dance"),
        ] {
            let error = parse(&words(wrong), None).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("Usage"), "{error}");
        }
    }

    #[test]
    fn what_statz_tells_is_what_a_sample_needs() {
        let sources = StatzSources { registry: Registry::new(1), ..StatzSources::default() };
        let text = render(&sources, &Asked::parse("format=json"));
        let mut statz: Value = serde_json::from_str(&text).unwrap();
        // Threads of a server, which a test does not have.
        statz["threads"]["zr-exec-0"] = 1.5.into();
        statz["threads"]["replication"] = 0.5.into();
        let sample = Sample::of(&statz).unwrap();
        assert!(sample.total_memory > 0.0 && sample.open_files > 0.0 && sample.cpus >= 1.0);
        assert_eq!(sample.flush.len(), 1);
        assert_eq!(Sample::of(&Value::Null).unwrap_err(), "/threads");
    }

    #[test]
    fn a_node_is_asked_with_the_password_and_a_refusal_is_explained() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            for status in ["200 OK", "401 Unauthorized"] {
                let (mut socket, _) = listener.accept().unwrap();
                let mut head = vec![0; 4096];
                let n = socket.read(&mut head).unwrap();
                let head = String::from_utf8_lossy(&head[..n]).into_owned();
                assert!(head.contains("Basic emVyb3Jpbmc6c2VjcmV0"), "{head}");
                write!(socket, "HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{{}}").unwrap();
            }
        });
        let url = format!("http://{address}");
        let error = run(&words(&format!("--url {url} --password secret")), None).unwrap_err();
        assert!(matches!(error, CapacityError::Unknown { .. }), "{error}");
        let error = run(&words(&format!("--url {url}")), Some("secret")).unwrap_err();
        assert!(error.to_string().contains("--password"), "{error}");
        server.join().unwrap();
    }
}
