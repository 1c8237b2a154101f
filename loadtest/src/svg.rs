//! Line charts as inline SVG. Colours come from the page's style sheet, so that light and dark
//! need no second drawing.

use std::fmt::Write as _;

const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 230.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 40.0;

/// How values become places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    Linear,
    Log,
    /// A share q at −log₁₀(1 − q): each further nine gets the same room.
    Nines,
}

/// A line: style class, name for its tool tip, points, and whether each is a full marker.
pub(crate) struct Series {
    pub(crate) class: &'static str,
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
    /// Markers: none, or for each point whether it is filled.
    pub(crate) markers: Option<Vec<bool>>,
}

/// A chart.
pub(crate) struct Chart<'a> {
    pub(crate) title: &'a str,
    pub(crate) x_label: &'a str,
    pub(crate) y_label: &'a str,
    pub(crate) x: Scale,
    pub(crate) y: Scale,
    pub(crate) series: Vec<Series>,
}

struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
}

/// Text as it may stand in HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 1e6 => format!("{}M", trim(value / 1e6)),
        v if v >= 1e3 => format!("{}k", trim(value / 1e3)),
        _ => trim(value),
    }
}

fn trim(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Axis {
    fn new(scale: Scale, values: impl Iterator<Item = f64> + Clone) -> Option<Axis> {
        let low = values.clone().reduce(f64::min)?;
        let high = values.reduce(f64::max)?;
        Some(match scale {
            Scale::Linear => Axis::linear(high),
            Scale::Log => Axis::log(low, high),
            Scale::Nines => Axis::nines(high),
        })
    }

    /// From nought.
    fn linear(high: f64) -> Axis {
        let high = if high > 0.0 { high } else { 1.0 };
        let rough = high / 4.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0]
            .map(|m| m * power)
            .into_iter()
            .find(|s| *s >= rough)
            .unwrap_or(rough);
        let count = (high / step).ceil() as usize;
        let ticks = (0..=count).map(|i| i as f64 * step).map(|v| (v, short(v))).collect();
        Axis { scale: Scale::Linear, low: 0.0, high: count as f64 * step, ticks }
    }

    /// Whole powers of ten, and steps between them if there are few.
    fn log(low: f64, high: f64) -> Axis {
        let low = low.max(0.001);
        let (first, last) = (low.log10().floor() as i32, high.max(low).log10().ceil() as i32);
        let last = last.max(first + 1);
        let between: &[f64] = if last - first <= 2 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let mut ticks = Vec::new();
        for power in first..=last {
            for factor in between {
                let value = factor * 10f64.powi(power);
                if value <= 10f64.powi(last) {
                    ticks.push((value, short(value)));
                }
            }
        }
        Axis { scale: Scale::Log, low: 10f64.powi(first), high: 10f64.powi(last), ticks }
    }

    fn nines(high: f64) -> Axis {
        let named = [(0.0, "min"), (0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (0.999, "p99.9")];
        let ticks = named.iter().map(|(q, name)| (*q, (*name).to_owned())).collect();
        Axis { scale: Scale::Nines, low: 0.0, high: high.clamp(0.999, 0.9999), ticks }
    }

    /// 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let part = |v: f64| match self.scale {
            Scale::Linear => v,
            Scale::Log => v.max(self.low).log10(),
            Scale::Nines => -(1.0 - v.min(self.high)).log10(),
        };
        let (low, high) = (part(self.low), part(self.high));
        ((part(value) - low) / (high - low)).clamp(0.0, 1.0)
    }
}

impl Chart<'_> {
    /// The figure; nothing without data.
    pub(crate) fn html(&self) -> Option<String> {
        let points = || self.series.iter().flat_map(|s| s.points.iter());
        let x = Axis::new(self.x, points().map(|p| p.0))?;
        let y = Axis::new(self.y, points().map(|p| p.1))?;
        let (plot_w, plot_h) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
        let at_x = |v: f64| LEFT + x.place(v) * plot_w;
        let at_y = |v: f64| TOP + (1.0 - y.place(v)) * plot_h;
        let mut out = format!(
            "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
             aria-label=\"{}\">",
            escape(self.title),
            escape(self.title)
        );
        for (value, label) in &y.ticks {
            let py = at_y(*value);
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{py:.1}\" y2=\"{py:.1}\"/>\
                 <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                WIDTH - RIGHT,
                LEFT - 7.0,
                py + 3.5
            );
        }
        for (value, label) in &x.ticks {
            let px = at_x(*value);
            let _ = write!(
                out,
                "<line class=\"mark\" x1=\"{px:.1}\" x2=\"{px:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\
                 <text class=\"tick\" x=\"{px:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                TOP + plot_h,
                TOP + plot_h + 4.0,
                TOP + plot_h + 16.0
            );
        }
        let _ = write!(
            out,
            "<text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text class=\"axis\" x=\"12\" y=\"{:.1}\" text-anchor=\"middle\" \
             transform=\"rotate(-90 12 {:.1})\">{}</text>",
            LEFT + plot_w / 2.0,
            HEIGHT - 6.0,
            escape(self.x_label),
            TOP + plot_h / 2.0,
            TOP + plot_h / 2.0,
            escape(self.y_label)
        );
        for series in &self.series {
            draw(&mut out, series, &at_x, &at_y);
        }
        out.push_str("</svg></figure>");
        Some(out)
    }
}

fn draw(out: &mut String, series: &Series, at_x: &impl Fn(f64) -> f64, at_y: &impl Fn(f64) -> f64) {
    let places: Vec<(f64, f64)> =
        series.points.iter().map(|(px, py)| (at_x(*px), at_y(*py))).collect();
    let line: Vec<String> = places.iter().map(|(px, py)| format!("{px:.1},{py:.1}")).collect();
    let _ = write!(
        out,
        "<g class=\"{}\"><polyline points=\"{}\"><title>{}</title></polyline>",
        series.class,
        line.join(" "),
        escape(&series.name)
    );
    for (index, filled) in series.markers.iter().flatten().enumerate() {
        let (Some((px, py)), Some((vx, vy))) = (places.get(index), series.points.get(index)) else {
            continue;
        };
        let class = if *filled { "full" } else { "hollow" };
        let _ = write!(
            out,
            "<circle class=\"{class}\" cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"4\">\
             <title>{}: {}, {}</title></circle>",
            escape(&series.name),
            short(*vx),
            short(*vy)
        );
    }
    out.push_str("</g>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_hold_their_values_and_label_round_numbers() {
        let linear = Axis::linear(437.0);
        assert_eq!(linear.ticks.last().unwrap(), &(600.0, "600".to_owned()));
        let log = Axis::log(3.0, 4200.0);
        assert_eq!((log.low, log.high), (1.0, 10_000.0));
        assert!((log.place(100.0) - 0.5).abs() < 1e-9);
        let nines = Axis::nines(1.0);
        assert!(nines.place(0.99) - nines.place(0.9) > 0.2);
        for axis in [linear, log] {
            assert!(axis.ticks.iter().all(|(v, _)| (0.0..=1.0).contains(&axis.place(*v))));
        }
    }

    #[test]
    fn a_chart_without_points_is_none() {
        let chart = |points| Chart {
            title: "a < b",
            x_label: "",
            y_label: "",
            x: Scale::Linear,
            y: Scale::Log,
            series: vec![Series { class: "a", name: "n".to_owned(), points, markers: None }],
        };
        assert!(chart(vec![]).html().is_none());
        assert!(chart(vec![(0.0, 1.0), (1.0, 2.0)]).html().unwrap().contains("a &lt; b"));
    }
}
