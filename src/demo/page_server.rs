//! Serves the demo's page: four files from memory, to this machine only.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

const HTML: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/style.css");
const APP: &str = include_str!("page/app.js");

/// Longest request line that is read.
const REQUEST_LINE_BYTES: u64 = 4096;
/// A browser that sends nothing for this long is dropped.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Starts serving on a free port of 127.0.0.1; ends with the process. `server_url` is where the
/// page finds the sync server. Returns the page's address.
///
/// # Errors
/// If no port can be had.
pub fn start(server_url: &str) -> io::Result<String> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = format!("http://127.0.0.1:{}/", listener.local_addr()?.port());
    let config = format!("export const serverURL = {};\n", serde_json::Value::from(server_url));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Browsers open connections that they do not use at once: none may hold up another.
            let config = config.clone();
            std::thread::spawn(move || {
                if let Err(error) = answer(stream, &config) {
                    tracing::debug!(%error, "a request for the demo's page failed");
                }
            });
        }
    });
    Ok(address)
}

fn answer(mut stream: TcpStream, config: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    let mut line = String::new();
    let mut head = BufReader::new(io::Read::take(&stream, REQUEST_LINE_BYTES));
    head.read_line(&mut line)?;
    let mut rest = String::new();
    while head.read_line(&mut rest)? > 2 {
        rest.clear();
    }
    let path = line.split(' ').nth(1).unwrap_or_default();
    let (status, kind, body) = match path {
        "/" => ("200 OK", "text/html", HTML),
        "/style.css" => ("200 OK", "text/css", STYLE),
        "/app.js" => ("200 OK", "text/javascript", APP),
        "/config.js" => ("200 OK", "text/javascript", config),
        _ => ("404 Not Found", "text/plain", "not found\n"),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
