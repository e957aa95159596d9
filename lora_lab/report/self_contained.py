"""A page that needs nothing beside itself: one HTML file, made of a template, our style and script, and plotly's.

Everything is computed and written as text beforehand; the page's own script only sorts, draws and shows. Untrusted text
(names, reasons, what a model wrote) goes through the template's escaping or into JSON blocks, from which the script
sets it as text. A content security policy lets nothing but the two scripts run, which are known by hash, and nothing
be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lora_lab import __version__

_STATIC = Path(__file__).parent / "static"


def rendered(template: str, page: Mapping[str, Any], blocks: Mapping[str, Any]) -> str:
    """The HTML of a template of `static/`. page: what it shows. blocks: JSON values by the id of their element, such as
    `figures-ID` for the figures of its section ID."""
    plotly, script = _plotly(), _static("page.js")
    text: str = _template(template).render(
        page=page,
        version=__version__,
        css=_trusted(_static("page.css")),
        script_hashes=" ".join([_hash(plotly), _hash(script)]),
        plotly=_trusted(plotly),
        script=_trusted(script),
        blocks=[{"id": name, "text": _trusted(_json(value))} for name, value in blocks.items()],
    )
    return text


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _trusted(text: str) -> Markup:
    """Text of our own, or already made safe, which the template is not to escape."""
    return Markup(text)


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _static(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """Plotly's own script, as its package carries it (4.8 MB)."""
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_STATIC),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name)
