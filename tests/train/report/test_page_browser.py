"""The report page in headless Chromium: on a phone and a wide screen, in light and in darkness."""

from __future__ import annotations

import base64
import html
import http.server
import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fusewright.train.report import page

from ...load import stretched

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)")

MEASURE = """<!DOCTYPE html><link rel="icon" href="data:,"><body style="margin:0">
<iframe src="report.html" style="border:0;width:WIDTHpx;height:4000px"></iframe><pre id="out"></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, look = e => frame.contentWindow.getComputedStyle(e);
  page.querySelectorAll("details").forEach(d => d.open = true);
  const rgb = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = c => { const v = c.slice(0, 3).map(x => x / 255).map(
    x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(look(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  const wide = [], pale = [], small = [];
  let texts = 0;
  for (const e of page.querySelectorAll("body *")) {
    const box = e.getBoundingClientRect(), name = e.tagName + "." + e.getAttribute("class");
    const scrolls = e.closest(".wide, pre"), hidden = e.closest(".skip");
    if (box.right > WIDTH + 0.5 && !(scrolls && scrolls !== e) && !hidden) wide.push(name);
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || e.closest("svg") || hidden) continue;
    texts++;
    const a = light(rgb(look(e).color)), b = light(behind(e));
    if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5) pale.push(name);
    if (parseFloat(look(e).fontSize) < 11) small.push(name);
  }
  const images = [...page.images].map(
    i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt]);
  document.getElementById("out").textContent = JSON.stringify({images,
    scroll: page.documentElement.scrollWidth, wide, pale, small, texts,
    dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches});
};
</script>"""
"""Measures the page from a frame around it: the page itself allows no script."""


@dataclass
class Site:
    """A local web server, and what was asked of it."""

    port: int
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, format: str, *args: Any) -> None:
            found.asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Site(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def browse(url: str, tmp_path: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's content after loading, and the lines of its console."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--hide-scrollbars", "--disable-dev-shm-usage",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,4000",
            "--virtual-time-budget=10000", "--dump-dom", *flags, url,
        ],
        capture_output=True, text=True, timeout=stretched(180), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def hostile(run: dict[str, Any], port: int) -> dict[str, Any]:
    """The run with an answer that would fetch and run things, and with very long words."""
    image = f"http://127.0.0.1:{port}/stolen.png"
    answer = f"<img src='{image}'><script>fetch('{image}')</script>" + "x" * 400
    recipe = {**run["recipe"], "output_dir": "/a" * 120}
    encoded = io.BytesIO()
    Image.new("RGB", (320, 200), "red").save(encoded, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    return {
        **run, "recipe": recipe, "output_dir": "/a" * 120,
        "sample_image": {"name": "n" * 90, "thumbnail": url},
        "sample": {"question": "y" * 300, "before": answer, "after": answer},
        "problems": [{"part": "plot", "error": "z" * 300}],
    }  # fmt: skip


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [300, 390, 1280])
def test_everything_can_be_read(
    run: dict[str, Any], site: Site, tmp_path: Path, width: int, dark: bool
) -> None:
    page.write(hostile(run, site.port), tmp_path)
    (tmp_path / "frame.html").write_text(MEASURE.replace("WIDTH", str(width)), encoding="utf-8")
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    content, console = browse(f"http://127.0.0.1:{site.port}/frame.html", tmp_path, *flags)
    measured = re.search(r'<pre id="out">(\{.*\})</pre>', content)
    assert measured is not None, content[-500:]
    found = json.loads(html.unescape(measured[1]))
    assert found["dark"] is dark
    assert found["texts"] > 100
    assert found["wide"] == []
    assert found["scroll"] == width
    assert found["pale"] == []
    assert found["small"] == []
    ((natural, drawn, text),) = found["images"]
    assert natural == 320
    assert drawn == pytest.approx(min(322, width - 2 * (12 + 14 + 1)))  # with a border
    assert text.startswith("The image that the question is about, nnn")
    assert console == []
    assert sorted(set(site.asked)) == ["/frame.html", "/report.html"]


def test_a_phone_shows_curves(run: dict[str, Any], tmp_path: Path) -> None:
    """Ink of the curve's own colour is on the screen: the chart is not merely in the source."""
    from matplotlib.image import imread

    path, shot = page.write(run, tmp_path), tmp_path / "shot.png"
    browse_flags = [f"--screenshot={shot}", "--window-size=500,1400"]
    browse(path.as_uri(), tmp_path, *browse_flags)
    pixels = imread(shot)[..., :3]
    blue = (abs(pixels - [0x1F / 255, 0x5F / 255, 0xD0 / 255]) < 0.02).all(-1)
    assert pixels.shape[1] == 500
    assert blue.sum() > 300
