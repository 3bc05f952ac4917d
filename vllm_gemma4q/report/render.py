"""Facts as one HTML page: everything inline, nothing loaded, every text of the checkpoint escaped.

`page.html` is a Jinja template with autoescape; `page.css` and `page.js` are put into it as they are, and the page's
Content-Security-Policy names their hashes and forbids all else, so that no name in a checkpoint can become a script and
nothing can be fetched. Without JavaScript the page shows the same; scripts add copying, arrow keys and nearer tooltips.
"""

import base64
import hashlib
from functools import cache
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from vllm_gemma4q.checkpoint.convert import VERSION
from vllm_gemma4q.report import words
from vllm_gemma4q.report.facts import Facts
from vllm_gemma4q.report.grid_view import GridView
from vllm_gemma4q.report.sections import memory_view, origin_view, quality_view, verdicts, worst

_FILTERS = {
    "size": words.size, "count": words.count, "bits": words.bits, "error": words.error, "share": words.share,
    "tokens": words.tokens,
}  # fmt: skip


def render(facts: Facts) -> str:
    """The page."""
    css, script = _file("page.css"), _file("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= _FILTERS
    page: str = environment.from_string(_file("page.html")).render(
        css=Markup(css),
        script=Markup(script),
        policy=_policy(css, script),
        facts=facts,
        total=facts.total,
        largest_role=max((row.bytes_before for row in facts.roles[:-1]), default=0) or 1,
        grid=GridView(facts.grid, facts.errors is not None),
        worst=worst(facts.grid),
        verdicts=verdicts(facts.diagnoses),
        memory=memory_view(facts.memory),
        quality=quality_view(facts.results),
        origin=origin_view(facts.manifest),
        version=VERSION,
    )
    return page


@cache
def _file(name: str) -> str:
    return resources.files("vllm_gemma4q.report").joinpath(name).read_text(encoding="utf-8")


def _policy(css: str, script: str) -> str:
    """Only this page's own style and script, by their hashes; no connection to anywhere."""
    return (
        f"default-src 'none'; style-src '{_hash(css)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
