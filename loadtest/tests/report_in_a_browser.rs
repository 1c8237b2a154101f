//! The report in Chromium, light and dark: nothing sticks out of its place, everything that is
//! drawn is to be seen, all text stands out from what it is on. Says so and does nothing where
//! there is no Chromium.

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Contrast that WCAG asks of normal text.
const MIN_CONTRAST: &str = "4.5";

/// Measures the page and leaves what it finds in its title.
const PROBE: &str = r##"<script>
const found = [];
if (document.documentElement.scrollWidth > innerWidth) found.push("wider than the window");
const lines = [...document.querySelectorAll("svg polyline")];
if (lines.length === 0) found.push("no chart");
for (const line of lines) {
  const box = line.getBoundingClientRect(), svg = line.ownerSVGElement.getBoundingClientRect();
  // A search that ended with its first rate is a single marker.
  const marked = line.parentNode.querySelector("circle");
  if (box.width < 1 && !marked) found.push("a line without width");
  if (box.left < svg.left - 1 || box.right > svg.right + 1 || box.top < svg.top - 1 ||
      box.bottom > svg.bottom + 1) found.push("a line outside of its chart");
  const stroke = getComputedStyle(line).stroke;
  if (stroke === "none") found.push("a line without colour");
}
const rgb = text => text.match(/[\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const part = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
};
const ground = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = rgb(getComputedStyle(e).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
for (const element of document.querySelectorAll("h1,h2,h3,p,td,th,dt,dd,li,figcaption,svg text,b")) {
  const style = getComputedStyle(element);
  const ink = light(rgb(element instanceof SVGElement ? style.fill : style.color));
  const paper = light(ground(element));
  const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  if (contrast < MIN_CONTRAST) found.push(`${element.tagName} contrast ${contrast.toFixed(1)}`);
}
const dark = light(ground(document.body)) < 0.2 ? "dark" : "light";
document.title = `RESULT ${dark}: ${[...new Set(found)].join("; ") || "fine"}`;
</script>"##;

fn chromium() -> Option<&'static str> {
    ["chromium", "chromium-browser", "google-chrome"].into_iter().find(|name| {
        let version = Command::new(name).arg("--version").stdout(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    })
}

fn page(dir: &Path) -> PathBuf {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks/results.json");
    let file = dir.join("report.html");
    let status = Command::new(env!("CARGO_BIN_EXE_zeroring-loadtest"))
        .arg("report")
        .arg(results)
        .arg("--html")
        .arg(&file)
        .stdout(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    let text = std::fs::read_to_string(&file).unwrap();
    let probe = PROBE.replace("MIN_CONTRAST", MIN_CONTRAST);
    std::fs::write(&file, text.replace("</main>", &format!("</main>{probe}"))).unwrap();
    file
}

#[test]
fn light_and_dark_and_narrow_pages_are_readable() {
    let Some(chromium) = chromium() else {
        eprintln!("there is no Chromium: nothing was looked at");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let page = page(dir.path());
    for (scheme, setting, size) in
        [("dark", 0, "1400,1000"), ("light", 1, "1400,1000"), ("light", 1, "500,1000")]
    {
        let output = Command::new(chromium)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
            .arg(format!("--user-data-dir={}", dir.path().join(size).display()))
            .arg(format!("--blink-settings=preferredColorScheme={setting}"))
            .arg(format!("--window-size={size}"))
            .arg(format!("file://{}", page.display()))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let title = text.split("<title>").nth(1).and_then(|t| t.split("</title>").next());
        assert_eq!(title, Some(format!("RESULT {scheme}: fine").as_str()), "{scheme} {size}");
    }
}
