"""Deep alignment on the real model: the rows that every variant is trained on."""

# ruff: noqa: F811

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from scripted_guard import tokenizer  # noqa: F401

from redflag.data.rows import Row
from redflag.lab.baselines.refusing import REFUSALS
from redflag.watching.monitor import MonitorConfig

PAPERS = Path(__file__).parents[2] / "recipes" / "papers"


@pytest.fixture
def presto(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPERS / "real"))
    for name in ("attacks", "judge", "presto", "rap", "run", "scored", "strikes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("presto")
    for name in ("attacks", "judge", "presto", "rap", "run", "scored", "strikes"):
        sys.modules.pop(name, None)


def row(name: str, harmful: bool, group: str) -> Row:
    answer = "the cat sat on the mat and the dog"
    turns = [{"role": "user", "content": f"ask {group}"}, {"role": "assistant", "content": answer}]
    return Row(turns, "harm" if harmful else None, 4 if harmful else None, group, id=name)


def test_one_refusal_to_a_request_and_as_many_rows_of_each_class(presto, tokenizer):
    train = [row(f"h{i}", True, f"g{i // 2}") for i in range(12)] + [row(f"b{i}", False, f"b{i}") for i in range(12)]
    made = presto.training_rows(train, tokenizer, 5)
    refusals, harmful, harmless = made[:5], made[5:10], made[10:]
    assert [one.messages[0]["content"] for one in refusals] == [f"ask g{i}" for i in range(5)]
    assert all(one.response.endswith(REFUSALS) and one.category is None for one in refusals)
    assert all(one.response[one.prefill :] in REFUSALS for one in refusals)
    assert [one.id for one in harmful] == [f"h{i}" for i in range(5)]
    assert [one.id for one in harmless] == [f"b{i}" for i in range(5)]


def test_refusals_that_were_taught_are_told_from_answers(presto):
    assert all(presto.refuses(f" {text}") for text in REFUSALS)
    assert not presto.refuses("Here is how.")


def test_a_peak_is_of_the_scores_that_a_threshold_is_compared_with(presto):
    line = {"peak": [0.9], "flag_probs": [[0.1], [0.9], [0.2]]}
    assert presto.peak(line, MonitorConfig()) == 0.9
    assert presto.peak(line, MonitorConfig("ema", decay=0.5, prior=0.1)) == pytest.approx(0.5)
