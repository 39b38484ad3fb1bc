"""The report as one self-contained HTML file: scripts, styles and data are inside, nothing is fetched.

Response text is untrusted. It is embedded as escaped JSON and only ever set as text; a content security policy with the
hashes of the page's own scripts keeps anything else from running, and the page from reaching a network.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from redflag.errors import RedflagError
from redflag.lab.report.parts import Section

SCRIPTS = ("page.js", "charts.js", "replay.js", "list.js", "trace.js", "viewer.js")


def render(
    title: str,
    warnings: Sequence[str],
    verdict: Sequence[str],
    figures: Sequence[tuple[str, str, str]],
    sections: Sequence[Section],
    traces: Mapping[str, Any] | None,
) -> str:
    """The whole page as text.

    Args:
        figures: Headline numbers: value, what it is, small print.
        traces: Packed responses, for the viewer.

    Raises:
        RedflagError: The packages that draw it are not installed.
    """
    require()
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    charts = [chart for section in sections for chart in section.charts]
    scripts = [vega(), *map(_file, SCRIPTS)] if charts else list(map(_file, SCRIPTS))
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    specs = {chart.name: {"data": chart.data, "views": [vars(view) for view in chart.views]} for chart in charts}
    return environment.from_string(_file("report.html.jinja")).render(
        title=title,
        warnings=warnings,
        verdict=verdict,
        figures=figures,
        sections=sections,
        policy=policy,
        style=_file("report.css"),
        scripts=scripts,
        charts=_inert(specs),
        traces=None if traces is None else _inert(traces),
    )


def require() -> None:
    """Checks for the packages before anything is measured.

    Raises:
        RedflagError: The packages that draw a page are not installed.
    """
    for package, module in (("jinja2", "jinja2"), ("vl-convert-python", "vl_convert")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise RedflagError(
                f"{package} is not installed, so the report cannot be drawn: pip install 'redflag-llm[report]'"
            ) from error


@functools.cache
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; `vl-convert-python` carries them."""
    import vl_convert

    # Only the entry is needed; a script may not hold what would end it.
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def _inert(value: Any) -> str:
    """JSON that cannot be read as markup anywhere in a page."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate has no UTF-8.
    return text.encode("utf-8", "backslashreplace").decode("utf-8") if not text.isascii() else text


def _file(name: str) -> str:
    return resources.files("redflag.lab.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
