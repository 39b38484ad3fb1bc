"""A context on a tiny random model, and rows that begin alike and then part."""

from __future__ import annotations

import pytest
from tiny import WORDS, make_rows

from redflag.data.rows import Row
from redflag.lab.baselines.shared import BaselineContext


@pytest.fixture
def context(origin, tmp_path):
    return BaselineContext(origin / "base", origin / "model", tmp_path / "hidden", seed=1, batch_size=8)


@pytest.fixture(scope="session")
def rows():
    return make_rows(48)


@pytest.fixture(scope="session")
def parting():
    """Pairs of rows with one prompt, whose responses are the same up to some word."""
    pairs = []
    for shared in (0, 1, 4, 9):
        ends = WORDS[1:7], WORDS[9:17]
        texts = [" ".join([*WORDS[:shared], *end]) for end in ends]
        messages = [[{"role": "user", "content": "tell"}, {"role": "assistant", "content": text}] for text in texts]
        pairs.append(tuple(Row(one, id=f"{shared}{side}") for side, one in enumerate(messages)))
    return pairs
