"""docs/systems.md: every part of the published systems is there, its paths and commands exist, and it has a test."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from redflag import cli

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "systems.md"
IDS = [f"S{system}.{part}" for system, parts in enumerate((12, 8, 6, 5, 4, 4)) for part in range(1, parts + 1)]
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", TEXT, re.S | re.M) for line in block.splitlines()]


def entries():
    """Id -> the text under its heading."""
    found = {}
    for heading, body in re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", TEXT, re.S | re.M):
        for name in re.findall(r"S\d\.\d+", heading):
            found[name] = body
    return found


def test_every_part_has_its_entry_and_no_other():
    found = entries()
    assert sorted(found) == sorted(IDS)
    for name, body in found.items():
        assert "Code: `" in body, name  # where it is
        assert "```" in body or "Always on" in body, name  # how it is used
        assert all(len(block.splitlines()) <= 5 for block in re.findall(r"^```\n(.*?)^```", body, re.S | re.M)), name
    assert "@" not in re.sub(r"`[^`]*`", "", TEXT)
    assert len(TEXT.splitlines()) <= 420


def test_what_the_page_names_is_there():
    named = re.findall(r"`((?:redflag|recipes|scripts|tests|docs)/[^`\s]*)`", TEXT)
    assert len(named) > 40
    assert [path for path in named if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT)
    assert links and [link for link in links if not (PAGE.parent / link).exists()] == []
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", TEXT, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= anchors


@pytest.mark.parametrize("command", [line for line in COMMANDS if re.search(r"(^| )redflag ", line)])
def test_the_commands_of_the_page_can_be_given(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    _, verb, *rest = words[next(i for i, word in enumerate(words) if "=" not in word) :]
    cli.parse(importlib.import_module(cli.VERBS[verb][0]), rest, f"redflag {verb}")


@pytest.mark.parametrize("command", [line for line in COMMANDS if not re.search(r"(^| )redflag ", line)])
def test_the_scripts_of_the_page_take_their_options(command):
    program, script, *rest = shlex.split(command)
    if program == "curl":
        from redflag.server.access import OPERATOR_HEADER, OVERRIDE_HEADER

        assert OPERATOR_HEADER in command and OVERRIDE_HEADER in command
        return
    assert program == "python"
    source = (ROOT / script).read_text(encoding="utf-8")
    assert [word for word in rest if word.startswith("--") and f'"{word}"' not in source] == []


def test_options_in_the_text_are_options():
    known = set()
    for module, _ in cli.VERBS.values():
        given = importlib.import_module(module).ARGUMENTS
        for kind in given if isinstance(given, tuple) else (given,):
            known |= {f"--{field.name}".replace("_", "-") for field in dataclasses.fields(kind)}
    prose = re.sub(r"^```\n.*?^```", "", TEXT, flags=re.S | re.M)
    assert sorted(set(re.findall(r"`(--[a-z_-]+)", prose)) - known) == []


def test_every_part_has_a_test_that_its_id_finds():
    names = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    tests = [name for name in names if name.startswith("test_")]
    wanted = {name: re.compile(name.replace(".", "_") + r"(?!\d)") for name in IDS}
    assert [name for name, pattern in wanted.items() if not any(map(pattern.search, tests))] == []
