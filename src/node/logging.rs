//! The log: one line an event, as text or JSON (spec: operations §4.1).
//!
//! debug and info go to standard output, warn and error to standard error. Every line names
//! process, worker and worker index (taken from the thread), then the fields of the spans around
//! it, then its own. Keys that alert rules of the original use keep their names: `level`,
//! `message`, `pid`, `worker`, `workerIndex`, `component`, `clientGroupID`, `errorMsg`.
//!
//! The server itself logs at the configured level; libraries from `warn` on.

use std::fmt::{self, Write as _};
use std::io::{IsTerminal, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use zeroring_core::json::write;

use crate::options::config::{LogFormat, LogLevel};

/// Installs the log for the whole process. A second call keeps the first.
pub fn install(format: LogFormat, level: LogLevel) {
    let level = match level {
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
    };
    let ours = ["zeroring", "zeroring_core", "zeroring_net", "zeroring_storage"];
    let targets = Targets::new()
        .with_default(LevelFilter::WARN.min(level))
        .with_targets(ours.map(|name| (name, level)));
    let layer = LogLayer { format, pid: std::process::id(), sink: Sink::Streams };
    let _ = tracing_subscriber::registry().with(layer.with_filter(targets)).try_init();
}

/// Where lines go.
enum Sink {
    /// Standard output and standard error.
    Streams,
    /// A buffer, for tests.
    #[cfg(test)]
    Buffer(std::sync::Arc<std::sync::Mutex<Vec<u8>>>),
}

struct LogLayer {
    format: LogFormat,
    pid: u32,
    sink: Sink,
}

/// A field's value as both formats print it.
#[derive(Debug, Clone, PartialEq)]
enum Printed {
    /// Without quotes in JSON: numbers, booleans.
    Bare(String),
    /// A text.
    Text(String),
}

/// Fields by name; a later one of the same name replaces the earlier.
#[derive(Debug, Clone, Default)]
struct Fields {
    entries: Vec<(&'static str, Printed)>,
    message: Option<String>,
}

impl Fields {
    fn set(&mut self, field: &Field, value: Printed) {
        let name = key(field.name());
        if name == "message" {
            let (Printed::Bare(text) | Printed::Text(text)) = value;
            self.message = Some(text);
            return;
        }
        self.set_key(name, value);
    }

    fn set_key(&mut self, name: &'static str, value: Printed) {
        match self.entries.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.entries.push((name, value)),
        }
    }
}

/// Names of the original where ours follow Rust's habits.
fn key(name: &'static str) -> &'static str {
    match name {
        "client_group_id" | "group" => "clientGroupID",
        "client_id" => "clientID",
        "wsid" | "ws_id" => "wsID",
        "query_id" => "queryID",
        "task_id" => "taskID",
        "app_id" => "appID",
        "shard_num" => "shardNum",
        "transformation_hash" => "transformationHash",
        "error" | "err" => "errorMsg",
        _ => name.strip_prefix("r#").unwrap_or(name),
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field, Printed::Text(format!("{value:?}")));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, Printed::Text(value.to_owned()));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, Printed::Bare(value.to_string()));
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, Printed::Bare(value.to_string()));
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, Printed::Bare(value.to_string()));
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        let mut out = Vec::new();
        write::number(&mut out, value);
        self.set(field, Printed::Bare(String::from_utf8_lossy(&out).into_owned()));
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LogLayer {
    fn on_new_span(&self, attrs: &Attributes<'_>, id: &Id, ctx: Context<'_, S>) {
        let mut fields = Fields::default();
        attrs.record(&mut fields);
        if let Some(span) = ctx.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, ctx: Context<'_, S>) {
        if let Some(span) = ctx.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        let (worker, index) = worker();
        let mut fields = Fields::default();
        fields.set_key("pid", Printed::Bare(self.pid.to_string()));
        fields.set_key("worker", Printed::Text(worker.to_owned()));
        fields.set_key("workerIndex", Printed::Bare(index.to_string()));
        for span in ctx.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(of_span) = span.extensions().get::<Fields>() {
                for (name, value) in &of_span.entries {
                    fields.set_key(name, value.clone());
                }
            }
        }
        event.record(&mut fields);
        let level = *event.metadata().level();
        let line = match self.format {
            LogFormat::Json => json_line(level, &fields),
            LogFormat::Text => text_line(&fields, self.colour(level)),
        };
        self.emit(level, &line);
    }
}

impl LogLayer {
    fn colour(&self, level: Level) -> Option<&'static str> {
        let terminal = match self.sink {
            Sink::Streams if level <= Level::WARN => std::io::stderr().is_terminal(),
            Sink::Streams => std::io::stdout().is_terminal(),
            #[cfg(test)]
            Sink::Buffer(_) => false,
        };
        match level {
            _ if !terminal => None,
            Level::ERROR => Some("\x1b[31m"),
            Level::WARN => Some("\x1b[33m"),
            Level::INFO => None,
            _ => Some("\x1b[90m"),
        }
    }

    fn emit(&self, level: Level, line: &[u8]) {
        // A log that cannot be written must not stop the server: the errors are dropped. One
        // write call a line keeps lines of several threads whole.
        let _ = match &self.sink {
            Sink::Streams if level <= Level::WARN => std::io::stderr().lock().write_all(line),
            Sink::Streams => {
                let mut out = std::io::stdout().lock();
                out.write_all(line).and_then(|()| out.flush())
            }
            #[cfg(test)]
            Sink::Buffer(buffer) => buffer.lock().unwrap().write_all(line),
        };
    }
}

fn json_line(level: Level, fields: &Fields) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    out.extend_from_slice(br#"{"level":"#);
    write::string(&mut out, level.as_str());
    out.extend_from_slice(br#","time":"#);
    write::string(&mut out, &timestamp(SystemTime::now(), "Z"));
    for (name, value) in &fields.entries {
        out.push(b',');
        write::string(&mut out, name);
        out.push(b':');
        match value {
            Printed::Bare(text) => out.extend_from_slice(text.as_bytes()),
            Printed::Text(text) => write::string(&mut out, text),
        }
    }
    out.extend_from_slice(br#","message":"#);
    write::string(&mut out, fields.message.as_deref().unwrap_or(""));
    out.extend_from_slice(b"}\n");
    out
}

fn text_line(fields: &Fields, colour: Option<&str>) -> Vec<u8> {
    let mut out = String::with_capacity(192);
    out.push_str(colour.unwrap_or(""));
    out.push_str(&timestamp(SystemTime::now(), "+00:00"));
    for (name, value) in &fields.entries {
        let (Printed::Bare(text) | Printed::Text(text)) = value;
        // A writer to a string never fails.
        let _ = write!(out, " {name}={text}");
    }
    let message = fields.message.as_deref().unwrap_or("");
    // One event is one line: what would break it is shown as in JSON.
    for c in std::iter::once(' ').chain(message.chars()) {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            c => out.push(c),
        }
    }
    if colour.is_some() {
        out.push_str("\x1b[0m");
    }
    out.push('\n');
    out.into_bytes()
}

/// Worker name and index, as the original's processes call themselves, from the thread's name:
/// `zr-exec-2` is executor 2.
fn worker() -> (&'static str, usize) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("");
    let index = name.rsplit_once('-').and_then(|(_, n)| n.parse().ok());
    if name.starts_with("zr-exec-") {
        ("syncer", index.unwrap_or(0))
    } else if name.starts_with("replication") {
        ("change-streamer", 0)
    } else if name.starts_with("cvr") {
        ("cvr-store", 0)
    } else {
        ("dispatcher", 0)
    }
}

/// The time now in RFC 3339, UTC, milliseconds.
pub fn now_rfc3339() -> String {
    timestamp(SystemTime::now(), "Z")
}

/// `2026-01-05T10:11:12.345` and the zone's text. UTC.
fn timestamp(time: SystemTime, zone: &str) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let ms = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}{zone}")
}

/// Date of a day number since 1970-01-01 (proleptic Gregorian; eras of 400 years from 0000-03-01).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use super::*;

    fn logged(format: LogFormat, thread: &str, log: impl FnOnce() + Send + 'static) -> String {
        let buffer = Arc::new(Mutex::new(Vec::new()));
        let layer = LogLayer { format, pid: 7, sink: Sink::Buffer(Arc::clone(&buffer)) };
        let subscriber = tracing_subscriber::registry().with(layer);
        std::thread::Builder::new()
            .name(thread.to_owned())
            .spawn(move || tracing::subscriber::with_default(subscriber, log))
            .unwrap()
            .join()
            .unwrap();
        String::from_utf8(buffer.lock().unwrap().clone()).unwrap()
    }

    fn log_all() {
        let group =
            tracing::info_span!("group", client_group_id = "g\"1", extra = tracing::field::Empty);
        group.record("extra", 5u64);
        let _in = group.enter();
        tracing::info!("listening");
        tracing::warn!(error = %std::io::Error::other("broken\npipe"), ms = 1.5, ok = true, extra = -1, "it {}", 1);
        tracing::debug!(big = u64::MAX);
    }

    #[test]
    fn json_lines_have_the_keys_that_alerts_use() {
        let text = logged(LogFormat::Json, "zr-exec-3", log_all);
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 3);
        let first = &lines[0];
        assert_eq!(first["level"], "INFO");
        assert_eq!(
            (&first["pid"], &first["worker"], &first["workerIndex"]),
            (&7.into(), &"syncer".into(), &3.into())
        );
        assert_eq!(
            (&first["clientGroupID"], &first["message"]),
            (&"g\"1".into(), &"listening".into())
        );
        assert_eq!(first["extra"], 5);
        let warn = &lines[1];
        assert_eq!((&warn["level"], &warn["errorMsg"]), (&"WARN".into(), &"broken\npipe".into()));
        assert_eq!(
            (&warn["ms"], &warn["ok"], &warn["extra"]),
            (&1.5.into(), &true.into(), &(-1).into())
        );
        assert_eq!(warn["message"], "it 1");
        assert_eq!((&lines[2]["big"], &lines[2]["message"]), (&u64::MAX.into(), &"".into()));
    }

    #[test]
    fn text_lines_are_one_line_each() {
        let text = logged(LogFormat::Text, "main", || {
            tracing::info!(client_id = "c1", "hello\nworld");
        });
        let (time, rest) = text.split_once(' ').unwrap();
        assert_eq!(rest, "pid=7 worker=dispatcher workerIndex=0 clientID=c1 hello\\nworld\n");
        assert!(time.len() == 29 && time.ends_with("+00:00"), "{time}");
    }

    #[test]
    fn times_are_civil() {
        let at = |seconds| timestamp(UNIX_EPOCH + Duration::from_millis(seconds), "Z");
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_767_607_872_345), "2026-01-05T10:11:12.345Z");
        assert_eq!(at(4_107_542_399_999), "2100-02-28T23:59:59.999Z");
        assert_eq!(at(4_107_542_400_000), "2100-03-01T00:00:00.000Z");
    }
}
