"""p(marker) on the real model: what is counted from probabilities and sampled refusals."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from redflag.data.rows import Row

PAPERS = Path(__file__).parents[2] / "recipes" / "papers"
NAMES = ("marker", "prepare", "scored", "wordings")


@pytest.fixture
def marker(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPERS / "real"))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("marker")
    for name in NAMES:
        sys.modules.pop(name, None)


def asked(name: str, group: str) -> Row:
    return Row([{"role": "user", "content": name}], group=group, id=name)


def test_wordings_of_a_request_are_compared_with_each_other_alone(marker):
    rows = [asked(f"{kind}-{i}", f"g{i}") for kind in ("plain", "past_tense") for i in range(3)]
    rows += [asked(f"{kind}-{i}", f"{kind}{i}") for kind in ("near-miss", "harmless") for i in range(3)]
    probs = [0.5, 0.6, 0.7, 0.7, 0.8, 0.9, *[0.1, 0.2, 0.3], *[0.55, 0.65, 0.75]]
    found = marker.consistency(rows, probs)
    assert found["variance within a request, p"] == pytest.approx([0.02, 0.0])
    assert found["mean p"] == pytest.approx({"harmful": 0.7, "near-miss": 0.2, "harmless": 0.65})
    assert found["AUROC against near-miss"][0] == 1.0
    assert found["AUROC against harmless"][0] == pytest.approx(np.mean([0, 1, 2, 2, 3, 3]) / 3)


def test_a_bound_holds_within_the_error_of_twenty_samples(marker):
    rows = [asked("plain-0", "a"), asked("plain-1", "b"), asked("past_tense-0", "a")]
    rows += [asked("harmless-0", "c"), asked("near-miss-0", "d")]
    counts = {"plain-0": 4, "plain-1": 10, "harmless-0": 0, "near-miss-0": 0}
    found = marker.bound(rows, [0.3, 0.9, 0.2, 0.02, 0.1], counts)
    assert found["harmful"]["requests"] == found["harmless"]["requests"] == 2
    assert found["harmful"]["within error"] == 0.5  # 4 of 20 allow 0.40, 10 of 20 allow 0.70
    assert found["harmful"]["refusal rate"] == pytest.approx(0.35)
    assert found["harmful"]["gap"] == pytest.approx((-0.1 - 0.4) / 2)
    assert found["harmless"]["within error"] == 1.0
