//! Results as one self-contained HTML page: tables, charts as inline SVG, no scripts, nothing
//! loaded from anywhere; light and dark as the reader's system wants.

use std::fmt::Write as _;

use crate::result::{Distribution, Results, RunResult, Sample, StepResult};
use crate::svg::{Chart, Scale, Series, escape};
use crate::table::{FIGURES, Figure, Sides, Spread, beside_postgres, number, scenarios, spread};
use crate::upstream::Follower;

const STYLE: &str = include_str!("report.css");
/// A bar is full at a ratio of two to this power; its length is logarithmic.
const BAR_DOUBLINGS: f64 = 8.0;

/// Stages of `/statz`, in the order in which a change passes them.
const STAGES: [(&str, &str); 7] = [
    ("apply", "replication core: the stream into the replica"),
    ("publish", "replication core: a commit to the executors"),
    ("advance", "executors: the engine leads commits to queries"),
    ("fanout", "executors: an advance to the groups that it concerns"),
    ("events", "executors: messages, patches, encoding and sending"),
    ("hydrate", "executors: new queries"),
    ("flush", "client views: from handing over to durable"),
];

const SERVERS: [&str; 3] = ["original", "zeroring", "zeroring-file"];

/// The page.
pub(crate) fn html(results: &Results) -> String {
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>zeroring: benchmarks</title><style>{STYLE}</style><main>\
         <h1>Benchmarks</h1><p class=\"soft\">zeroring and the original zero-cache, side by side: \
         same machine, same Postgres settings, same clients. Only runs count in which the sampled \
         clients ended with exactly the rows of Postgres.</p>\
         <span class=\"key\"><i class=\"o\"></i>original</span>\
         <span class=\"key\"><i class=\"z\"></i>zeroring</span>\
         <span class=\"key\"><i class=\"f\"></i>zeroring, client views in a file</span>"
    );
    facts(&mut out, results);
    summary(&mut out, results);
    for first in scenarios(results) {
        scenario(&mut out, results, first);
    }
    out.push_str("</main></html>\n");
    out
}

fn facts(out: &mut String, results: &Results) {
    let Some(any) = results.runs.iter().find(|r| !r.hardware.is_empty()) else { return };
    out.push_str("<dl>");
    let mut fact = |name: &str, value: &str| {
        let _ = write!(out, "<dt>{name}</dt><dd>{}</dd>", escape(value));
    };
    fact("Hardware", &any.hardware);
    fact("Postgres", &any.postgres_version);
    for server in SERVERS {
        if let Some(run) = results.runs.iter().find(|r| r.server == server) {
            let settings = run.settings.join(", ");
            fact(server, &format!("{} ({settings})", run.server_version));
        }
    }
    fact("CPU pinning", &any.pinning);
    fact("Commit", &any.commit);
    fact("Begun", &any.started_at);
    if results.wall_seconds > 0.0 {
        fact("Took", &format!("{:.1} minutes", results.wall_seconds / 60.0));
    }
    out.push_str("</dl>");
    for what in &results.left_out {
        let _ = write!(out, "<p class=\"void\">Left out: {}</p>", escape(what));
    }
}

/// What the summary shows of a step.
fn headline(run: &RunResult, step: &StepResult) -> Option<&'static Figure> {
    let name = match (run.headline.as_deref(), step.kind.as_str()) {
        (Some("start"), _) => return None,
        (Some("memory"), _) => "server memory (PSS)",
        (_, "connect" | "reconnect") => "all complete after",
        (_, "write") => "write to client p99",
        (_, "search") => "sustained writes",
        (_, "churn") => "query change p99",
        _ => return None,
    };
    FIGURES.iter().find(|f| f.name == name)
}

fn cell(spread: Option<Spread>, unit: &str) -> String {
    let Some(Spread { low, mean, high }) = spread else { return "<td>–</td>".to_owned() };
    let range = if low == high {
        String::new()
    } else {
        format!("<small>{} … {}</small>", number(low), number(high))
    };
    format!("<td>{} {unit}{range}</td>", number(mean))
}

fn ratio(advantage: Option<f64>) -> String {
    advantage.map_or("<td></td>".to_owned(), |r| {
        let class = if r >= 1.0 { "win" } else { "lose" };
        let width = (r.log2().abs() / BAR_DOUBLINGS).min(1.0) * 100.0;
        format!(
            "<td class=\"{class}\">× {}<span class=\"bar\"><i style=\"width:{width:.0}%\"></i>\
             </span></td>",
            number(r)
        )
    })
}

fn row(out: &mut String, label: &str, sides: &Sides<Option<Spread>>, f: (&str, Option<bool>)) {
    if sides.is_empty() {
        return;
    }
    let (ours, file) = sides.advantages(f.1);
    let _ = write!(
        out,
        "<tr><td>{}</td>{}{}{}{}{}</tr>",
        escape(label),
        cell(sides.original, f.0),
        cell(sides.ours, f.0),
        ratio(ours),
        cell(sides.file, f.0),
        ratio(file)
    );
}

const HEAD: &str = "<div class=\"scroll\"><table><tr><th></th><th>original</th><th>zeroring</th>\
                    <th>zeroring is better by</th><th>zeroring, client views in a file</th>\
                    <th>better by</th></tr>";

fn start_row(out: &mut String, label: &str, sides: &Sides<Vec<&RunResult>>) {
    row(out, label, &sides.start(), ("s", Some(true)));
}

fn figure_row(
    out: &mut String,
    label: &str,
    sides: &Sides<Vec<&RunResult>>,
    (step, figure): (usize, &Figure),
) {
    let sides = sides.spread(|runs| spread(runs, step, figure));
    row(out, label, &sides, (figure.unit, figure.less_is_better));
}

fn summary(out: &mut String, results: &Results) {
    let _ = write!(out, "<section><h2>At a glance</h2>{HEAD}");
    for first in scenarios(results) {
        let sides = Sides::of(results, &first.scenario);
        if first.headline.as_deref() == Some("start") {
            start_row(out, &format!("{}: ready after", first.title), &sides);
        }
        let Some(longest) = sides.longest() else { continue };
        for (index, step) in longest.steps.iter().enumerate() {
            let Some(figure) = headline(longest, step) else { continue };
            let label = format!("{}: {}, {}", longest.title, step.label, figure.name);
            figure_row(out, &label, &sides, (index, figure));
        }
    }
    out.push_str("</table></div></section>");
}

fn scenario(out: &mut String, results: &Results, first: &RunResult) {
    let name = first.scenario.as_str();
    let sides = Sides::of(results, name);
    let _ = write!(
        out,
        "<section id=\"{0}\"><h2>{1}</h2><p class=\"soft\">{2}</p>",
        escape(name),
        escape(&first.title),
        escape(&first.about)
    );
    for run in results.runs.iter().filter(|r| r.scenario == name) {
        if let Some(why) = &run.void {
            let _ = write!(
                out,
                "<p class=\"void\">A run of {} is void: {}</p>",
                run.server,
                escape(why.lines().next().unwrap_or_default())
            );
        }
    }
    if let Some(longest) = sides.longest() {
        out.push_str(HEAD);
        start_row(out, "start until a first client has its rows", &sides);
        for (index, step) in longest.steps.iter().enumerate() {
            for figure in &FIGURES {
                let label = format!("{}: {}", step.label, figure.name);
                figure_row(out, &label, &sides, (index, figure));
            }
        }
        out.push_str("</table></div>");
        limits(out, results, name);
        stages(out, longest, &sides.ours);
        let runs: Vec<&RunResult> = sides.all().collect();
        for (index, step) in longest.steps.iter().enumerate() {
            charts(out, &runs, index, &step.label);
        }
    } else {
        limits(out, results, name);
    }
    out.push_str("</section>");
}

/// What kept each search from a higher rate, and what Postgres does alone.
fn limits(out: &mut String, results: &Results, scenario: &str) {
    let mut lines = String::new();
    for run in results.runs.iter().filter(|r| r.scenario == scenario && r.void.is_none()) {
        let follower = Follower::ALL.into_iter().find(|f| f.name() == run.server);
        let name = follower.map_or(run.server.as_str(), |f| f.title());
        for step in &run.steps {
            let (Some(limit), Some(rate)) = (&step.limit, step.sustained_rate) else { continue };
            let next = step.trials.iter().filter(|t| !t.sustained).map(|t| t.rate);
            let next = next.reduce(f64::min).map(|r| format!(", failed at {}/s", number(r)));
            let _ = write!(
                lines,
                "<li><b class=\"{}\">{}</b> {}/s{}: {}</li>",
                run.server,
                escape(name),
                number(rate),
                next.unwrap_or_default(),
                escape(limit)
            );
        }
    }
    if !lines.is_empty() {
        let _ = write!(out, "<h3>What was the limit</h3><ul>{lines}</ul>");
    }
    if let Some(text) = beside_postgres(results, scenario) {
        let _ = write!(out, "<p>{}.</p>", escape(&text));
    }
}

/// Where our server's time went, step by step; the mean of its runs.
fn stages(out: &mut String, longest: &RunResult, ours: &[&RunResult]) {
    let mut rows = String::new();
    for (index, step) in longest.steps.iter().enumerate() {
        let steps: Vec<&StepResult> = ours.iter().filter_map(|r| r.steps.get(index)).collect();
        let total: f64 = steps.iter().map(|s| s.server_cpu_seconds).sum();
        let cells: Vec<String> = STAGES
            .iter()
            .map(|(name, _)| {
                let seconds: f64 = steps
                    .iter()
                    .flat_map(|s| &s.stages)
                    .filter(|stage| stage.stage == *name)
                    .map(|stage| stage.seconds)
                    .sum();
                format!("<td>{}</td>", number(seconds * 1000.0 / steps.len().max(1) as f64))
            })
            .collect();
        if steps.iter().any(|s| !s.stages.is_empty()) {
            let _ = write!(
                rows,
                "<tr><td>{}</td>{}<td>{}</td></tr>",
                escape(&step.label),
                cells.concat(),
                number(total * 1000.0 / steps.len().max(1) as f64)
            );
        }
    }
    if rows.is_empty() {
        return;
    }
    let heads: Vec<String> = STAGES
        .iter()
        .map(|(name, what)| format!("<th title=\"{}\">{name}</th>", escape(what)))
        .collect();
    let _ = write!(
        out,
        "<h3>Where zeroring's time went, ms (all threads; flush is waiting, not CPU)</h3>\
         <div class=\"scroll\"><table><tr><th></th>{}<th>CPU</th></tr>{rows}</table></div>",
        heads.concat()
    );
}

/// One line for each run: (class, run's name, step).
fn series<'a>(
    runs: &[&'a RunResult],
    step: usize,
    points: impl Fn(&'a StepResult) -> Vec<(f64, f64)>,
) -> Vec<Series> {
    let mut all = Vec::new();
    for class in SERVERS {
        for (nth, run) in runs.iter().filter(|r| r.server == class).enumerate() {
            let Some(step) = run.steps.get(step) else { continue };
            let points = points(step);
            if !points.is_empty() {
                let name = format!("{class}, run {}", nth + 1);
                all.push(Series { class, name, points, markers: None });
            }
        }
    }
    all
}

/// A figure of a moment.
type OfSample = fn(&Sample) -> Option<f64>;

/// One of a step's distributions.
type Pick = fn(&StepResult) -> Option<&Distribution>;

fn charts(out: &mut String, runs: &[&RunResult], index: usize, label: &str) {
    let mut drawn = Vec::new();
    let distributions: [(&str, Pick); 4] = [
        ("Hydrate: share of clients that have their rows", |s| s.hydrate.as_ref()),
        ("Reconnect: share of clients that are up to date", |s| s.reconnect.as_ref()),
        ("Query change until the rows are there", |s| s.change.as_ref()),
        ("Write to client, from the intended time", |s| s.write.as_ref()),
    ];
    for (title, pick) in distributions {
        let points = |s: &StepResult| pick(s).map(|d| d.curve.clone()).unwrap_or_default();
        let series = series(runs, index, points);
        let chart = Chart {
            title,
            x_label: "quantile",
            y_label: "ms",
            x: Scale::Nines,
            y: Scale::Log,
            series,
        };
        drawn.extend(chart.html());
    }
    drawn.extend(trials(runs, index));
    let over_time: [(&str, &str, Scale, OfSample); 3] = [
        ("Lag over time (median of what arrives)", "ms", Scale::Log, |s| s.write_p50),
        ("CPU of the server over time", "% of a CPU", Scale::Linear, |s| {
            Some(s.server_cpu * 100.0)
        }),
        ("Memory of the server over time (PSS)", "MB", Scale::Linear, |s| {
            Some(s.pss_bytes as f64 / 1e6)
        }),
    ];
    for (title, y_label, y, of) in over_time {
        let points = |s: &StepResult| -> Vec<(f64, f64)> {
            let all: Vec<_> = s.timeline.iter().filter_map(|t| Some((t.at, of(t)?))).collect();
            if all.len() > 2 { all } else { Vec::new() }
        };
        let series = series(runs, index, points);
        let chart = Chart {
            title,
            x_label: "seconds since the step began",
            y_label,
            x: Scale::Linear,
            y,
            series,
        };
        drawn.extend(chart.html());
    }
    if !drawn.is_empty() {
        let _ =
            write!(out, "<h3>{}</h3><div class=\"charts\">{}</div>", escape(label), drawn.concat());
    }
}

/// Rates that were tried: hollow where the rate was not sustained.
fn trials(runs: &[&RunResult], index: usize) -> Option<String> {
    let mut lines = series(runs, index, |s| {
        let mut points: Vec<_> = s.trials.iter().map(|t| (t.rate, t.p99)).collect();
        points.retain(|p| p.1 > 0.0);
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    });
    for line in &mut lines {
        let sustained = |point: &(f64, f64)| {
            let all = runs.iter().filter_map(|r| r.steps.get(index)).flat_map(|s| &s.trials);
            let mut same = all.filter(|t| (t.rate, t.p99) == *point);
            same.all(|t| t.sustained)
        };
        line.markers = Some(line.points.iter().map(sustained).collect());
    }
    let chart = Chart {
        title: "p99 of write-to-client by rate (hollow: not sustained)",
        x_label: "writes/s",
        y_label: "ms",
        x: Scale::Log,
        y: Scale::Log,
        series: lines,
    };
    chart.html()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(server: &str, seconds: f64) -> RunResult {
        let curve = vec![(0.0, 1.0), (0.5, seconds), (0.99, seconds * 2.0)];
        let hydrate = Distribution { count: 9, p50: seconds, curve, ..Distribution::default() };
        let step = StepResult {
            label: "connect <9>".to_owned(),
            kind: "connect".to_owned(),
            seconds,
            hydrate: Some(hydrate),
            ..StepResult::default()
        };
        RunResult {
            scenario: "s".to_owned(),
            title: "T".to_owned(),
            server: server.to_owned(),
            hardware: "h".to_owned(),
            steps: vec![step],
            ..RunResult::default()
        }
    }

    #[test]
    fn the_page_compares_stands_alone_and_escapes() {
        let mut void = run("zeroring", 99.0);
        void.void = Some("diverged".to_owned());
        let file = run("zeroring-file", 1.0);
        let runs = vec![run("original", 8.0), run("zeroring", 2.0), file, void];
        let left_out = vec!["x by y: no time".to_owned()];
        let results = Results { runs, left_out, ..Results::default() };
        let page = html(&results);
        assert!(page.contains("× 4.00"), "the void run must not count");
        assert!(page.contains("× 8.00"), "the variant has its own ratio");
        assert!(page.contains("is void: diverged"));
        assert!(page.contains("<polyline"));
        assert!(page.contains("x by y: no time"));
        assert!(page.contains("connect &lt;9&gt;"));
        for outside in ["http://", "https://", "<script", "src="] {
            assert!(!page.contains(outside), "{outside}");
        }
    }
}
