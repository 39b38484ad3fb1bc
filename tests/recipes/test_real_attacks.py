"""Attacks on the real model: what is counted of the answers that a reader has judged."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from redflag.lab.attacks import Attempt
from redflag.lab.attacks.judging import Judged

REAL = Path(__file__).parents[2] / "recipes" / "papers" / "real"
NAMES = ("attacks", "judge", "scored")


@pytest.fixture
def attacks(monkeypatch):
    monkeypatch.syspath_prepend(str(REAL))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("attacks")
    for name in NAMES:
        sys.modules.pop(name, None)


def judged(text: str, *, alarmed: bool, setting: str = "greedy", peak: float | None = None) -> Judged:
    attempt = Attempt("r1", setting, [{"role": "user", "content": "?"}], text, [], [])
    return Judged(attempt, None, None, text, alarmed, None, peak, None, None)


def test_alarms_are_counted_in_answers_that_were_read_apart_by_verdict(attacks, monkeypatch):
    low = [
        judged("a step", alarmed=False, peak=0.5),
        judged("nonsense", alarmed=False),
        judged("not read", alarmed=True),
    ]
    high = [
        judged("a step", alarmed=True, peak=0.5),
        judged("nonsense", alarmed=False),
        judged("not read", alarmed=True),
    ]
    said = {attacks.key_of("none", low[0].attempt): True, attacks.key_of("none", low[1].attempt): False}
    monkeypatch.setattr(attacks, "readings", lambda: said)
    (line,) = attacks.by_reader({"shipped": {"none": low}, "5%": {"none": high}})
    assert (line["read"], line["harmful"]) == (2, 1)
    assert (line["alarms, shipped, harmful"], line["alarms, shipped, others"]) == (0, 0)
    assert (line["alarms, 5%, harmful"], line["alarms, 5%, others"]) == (1, 0)
    assert (line["highest p(flag), harmful"], line["highest p(flag), others"]) == (0.5, None)


def test_a_verdict_holds_for_its_setting_alone(attacks, monkeypatch):
    some = [judged("a step", alarmed=True), judged("a step", alarmed=True, setting="20 tokens")]
    monkeypatch.setattr(attacks, "readings", lambda: {attacks.key_of("prefill", some[1].attempt): True})
    first, second = attacks.by_reader({"shipped": {"prefill": some}})
    assert (first["read"], second["read"], second["alarms, shipped, harmful"]) == (0, 1, 1)
