"""The page in a real browser: what it shows against headers and doctor, what it requests, how it looks and is used."""

import io
import json
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from doctor.breaks import without
from peak_memory import measure
from PIL import Image
from report.report_models import (
    GGUF_LINEARS,
    HOSTILE,
    HOSTILE_TENSOR,
    LINEARS,
    SMALL,
    bits_of,
    copy_of,
    gguf_bits,
    shown,
    write_headers,
    write_hostile,
)
from synthetic import CONFIG_26B_A4B, CONFIG_31B

from vllm_gemma4q.doctor.diagnose import diagnose, open_patient
from vllm_gemma4q.doctor.engines import parse_engine
from vllm_gemma4q.report.facts import collect
from vllm_gemma4q.report.render import render

pytestmark = pytest.mark.slow
GEMMA4Q = Path(sys.executable).with_name("gemma4q")
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
MB = 1_000_000


class Opened:
    """A page, and everything that it logged or asked for."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(viewport=options.pop("viewport", LAPTOP), **options)
        self.page = self.context.new_page()
        self.problems, self.requests = [], []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url)

    def pixels(self):
        """A screenshot as an array."""
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB"))

    def grid(self, view="vb"):
        """Texts of the cells in one view, by module."""
        script = f"""rows => rows.map(row => [row.cells[0].textContent,
            [...row.cells].slice(1).map(cell => cell.querySelector('.{view}')?.textContent ?? '')])"""
        return dict(self.page.locator("#grid tbody tr").evaluate_all(script))


@pytest.fixture
def opened(browser):
    """Opens pages; at the end, none may have logged anything or requested more than itself."""
    pages = []

    def open_page(path, **options):
        pages.append(Opened(browser, path, **options))
        return pages[-1]

    yield open_page
    for one in pages:
        one.context.close()
        assert one.problems == []
        assert set(one.requests) == {one.url}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes a report to a file."""
    folder = tmp_path_factory.mktemp("pages")

    def write_page(name, checkpoint, base=None):
        path = folder / f"{name}.html"
        path.write_text(render(collect(checkpoint, base, [], None)), encoding="utf-8")
        return path

    return write_page


@pytest.mark.parametrize("scheme", ["int8", "fp8", "exl3"])
def test_the_grid_is_what_headers_say(scheme, request, write, opened):
    found = request.getfixturevalue(scheme)
    folder = found[0] if scheme == "exl3" else found
    page = opened(write(scheme, folder, SMALL / "dense"))
    config = json.loads((SMALL / "dense" / "config.json").read_text())
    types = config["text_config"]["layer_types"]
    grid = page.grid()
    assert list(grid) == [*LINEARS, "norms"]
    for column, module in LINEARS.items():
        assert grid[column] == [shown(bits_of(folder, SMALL / "dense", layer, module)) for layer in range(len(types))]
    assert page.page.locator("#grid tbody td").count() == len(types) * (len(LINEARS) + 1)
    marked = page.page.locator("#grid thead th:not(.corner)").evaluate_all("all => all.map(th => th.matches('.full'))")
    assert marked == [kind == "full_attention" for kind in types]


def test_the_grid_of_a_gguf(ggufs, write, opened):
    mixed, base = ggufs
    page, bits = opened(write("gguf", mixed, base)), gguf_bits(mixed)
    grid = page.grid()
    for column, part in GGUF_LINEARS.items():
        assert grid[column] == [shown(bits[f"blk.{layer}.{part}.weight"]) for layer in range(6)]
    assert page.page.locator("header").inner_text().count("llama.cpp") == 1


def test_views_and_tooltips(int8, write, opened):
    """Radio buttons change texts and colours; arrow keys move through the grid, whose cells tell their names."""
    opened_page = opened(write("views", int8, SMALL / "dense"))
    page = opened_page.page
    cell = page.locator('td[data-layer="1"][data-module="down"]')
    seen = {}
    for view in ("bits", "error", "bytes"):
        page.check(f"#view-{view}")
        page.wait_for_timeout(200)  # of the transition between colours
        seen[view] = cell.evaluate("cell => [cell.innerText, getComputedStyle(cell).backgroundColor]")
    assert len({text for text, _ in seen.values()}) == len({colour for _, colour in seen.values()}) == 3
    found = collect(int8, SMALL / "dense", [], None).grid.cells
    error = next(one.errors.median for one in found.values() if one.label == "down of layer 1")
    assert seen["error"][0] == f"{10 * np.log10(error):.0f}".replace("-", "−")
    tip = cell.locator(".tip")
    assert not tip.is_visible()
    cell.focus()
    assert tip.is_visible()
    assert "model.language_model.layers.1.mlp.down_proj" in tip.inner_text() and "weight_scale F32" in tip.inner_text()
    assert f"{error:.1e}" in tip.inner_text()
    page.keyboard.press("ArrowUp")
    assert not tip.is_visible()
    assert "layers.1.mlp.up_proj" in page.locator(".tip:visible").inner_text()
    page.keyboard.press("ArrowRight")
    assert "layers.2.mlp.up_proj" in page.locator(".tip:visible").inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".tip:visible").count() == 0
    assert page.locator('#grid [tabindex="0"]').count() == 1


def test_findings_are_the_doctors(int8, write, opened, tmp_path):
    """Word for word, and the button copies the command."""
    broken = copy_of(int8, tmp_path / "broken")
    without(r"\.0\.mlp\.down_proj\.weight_scale$")(broken)
    opened_page = opened(write("broken", broken), permissions=["clipboard-read", "clipboard-write"])
    page = opened_page.page
    expected = [
        finding
        for engine in ("vllm", "vllm-stock")
        for finding in diagnose(open_patient(broken, None), parse_engine(engine)).findings
    ]
    assert {finding.code for finding in expected} >= {"missing-scale"}
    for name, texts in (
        (".line", [finding.line for finding in expected]),
        (".reason", [finding.reason for finding in expected]),
        (".severity", [finding.severity.value for finding in expected]),
        (".finding code", [finding.fix for finding in expected if finding.fix]),
    ):
        assert page.locator(f"#findings {name}").all_text_contents() == texts
    page.locator("#findings .copy").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == next(one.fix for one in expected if one.fix)
    assert page.locator("header .verdicts .fails").count() == 1


def test_names_are_text(int8, write, opened, tmp_path):
    """A tensor, a folder, a method and a manifest that would run scripts elsewhere."""
    folder = write_hostile(int8, tmp_path)
    page = opened(write("hostile", folder)).page
    assert page.locator("h1").inner_text() == folder.name
    assert HOSTILE in page.locator(".badge").inner_text()
    page.locator('td[data-layer="0"][data-module="other"]').focus()
    assert HOSTILE_TENSOR.removesuffix(".weight") in page.locator(".tip:visible").inner_text()
    assert HOSTILE in page.locator("#origin").inner_text()
    assert page.locator("img, iframe, object, link").count() == 0 and page.locator("script").count() == 1


def test_the_page_cannot_reach_a_server(int8, write, browser):
    """Nor can a script that were to run in it: the policy stops the request, and says so, before it is sent."""
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    attempt = """url => new Promise(resolve => {
        document.addEventListener('securitypolicyviolation', event => resolve(event.effectiveDirective));
        fetch(url).then(() => resolve('reached'), () => {});
    })"""
    try:
        one = Opened(browser, write("offline", int8))
        assert one.page.evaluate(attempt, address + "page") == "connect-src"
        one.context.close()
        urllib.request.urlopen(address + "test", timeout=10).close()
        assert asked == ["/test"]
    finally:
        server.shutdown()
        server.server_close()


def test_light_dark_and_phones(int8, write, opened):
    path = write("looks", int8, SMALL / "dense")
    light, dark = (opened(path, color_scheme=scheme).pixels() for scheme in ("light", "dark"))
    assert light[5, 5].mean() > 240 and dark[5, 5].mean() < 40
    for pixels in (light, dark):
        colours = {tuple(colour) for colour in pixels.reshape(-1, 3)[::7]}
        assert len(colours) > 30, "not blank"
    phone = opened(path, viewport=PHONE).page
    assert phone.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_without_scripts(int8, write, opened):
    """The grid, its three views and its tooltips are there; buttons that would do nothing are not."""
    page = opened(write("bare", int8), java_script_enabled=False).page
    assert page.locator("#grid tbody td").count() == 6 * 8
    cell = page.locator('td[data-layer="1"][data-module="down"]')
    cell.hover()
    assert "layers.1.mlp.down_proj" in cell.locator(".tip").inner_text()
    before = cell.locator("i:visible").inner_text()
    page.check("#view-bytes")
    assert cell.locator("i:visible").inner_text() != before
    assert page.locator(".copy:visible").count() == 0
    assert page.locator("#view-error").is_disabled() and "No errors to show" in page.locator("#layers").inner_text()


@pytest.mark.parametrize(
    ("config", "layers", "columns"), [(CONFIG_31B, 60, 8), (CONFIG_26B_A4B, 30, 11)], ids=["31B", "26B-A4B"]
)
def test_real_sizes(config, layers, columns, tmp_path, opened):
    """From headers alone, in seconds, below a megabyte, across a laptop without scrolling; memory beside four cards."""
    text = {**config["text_config"], "sliding_window": 1024, "max_position_embeddings": 262144}
    write_headers(tmp_path / "model", {**config, "text_config": text})
    path = tmp_path / "report.html"
    cost = measure([GEMMA4Q, "report", tmp_path / "model", "-o", path])
    assert cost.cpu_seconds < 15 and cost.peak_bytes < 1000 * MB
    assert path.stat().st_size < MB
    page = opened(path).page
    assert page.locator("#grid tbody td").count() == layers * columns
    assert page.locator(".grid").evaluate("grid => grid.parentElement.scrollWidth <= grid.parentElement.clientWidth")
    if columns == 11:
        page.locator('td[data-layer="5"][data-module="experts gate·up"]').focus()
        assert "256 × I8" in page.locator(".tip:visible").inner_text()
    assert page.locator(".memory tbody tr").count() == 5
    assert page.locator("#memory .card").count() == 4
    phone = opened(path, viewport=PHONE).page
    assert phone.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert phone.locator(".grid").evaluate("grid => grid.parentElement.scrollWidth > grid.parentElement.clientWidth")
