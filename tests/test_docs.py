"""The front page and the documentation: links lead somewhere, every page is reached, every command parses."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from redflag.cli import VERBS, parse

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_leads_to_every_page_and_the_front_page_to_the_index():
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in LINK.findall((DOCS / "index.md").read_text())}
    assert {page for page in PAGES if page.name != "index.md"} <= linked
    assert "docs/index.md" in LINK.findall((ROOT / "README.md").read_text())


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def commands() -> list[str]:
    """Lines of both pages that call `redflag`, in blocks and in tables, without comments."""
    text = "".join(page.read_text() for page in (ROOT / "README.md", DOCS / "index.md"))
    lines = re.findall(r"^redflag .*$", text, re.M) + re.findall(r"`(redflag [a-z-]+(?: [^`]*)?)`", text)
    lines = [re.split(r"\s+#", line)[0].strip() for line in lines]
    return sorted({line for line in lines if line.split()[1] in VERBS and "--help" not in line})


@pytest.mark.parametrize("line", commands())
def test_commands_parse_as_shown(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, verb, *words = shlex.split(line)
    if words:  # else it is the verb's name alone
        parse(importlib.import_module(VERBS[verb][0]), words, f"redflag {verb}")


def test_there_are_commands():
    assert len(commands()) >= 15
