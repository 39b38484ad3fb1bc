"""A tiny flagged model and its rows."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from tiny import WORDS, build, make_rows

from redflag.flags import FlagSpec, attach
from redflag.models.pretrain import train_tokenizer
from redflag.prompt import template_hash
from redflag.training.encode import encode


@pytest.fixture(scope="session")
def words():
    return train_tokenizer([" ".join(WORDS)] * 5, 320)


@pytest.fixture
def tokenizer(words):
    return copy.deepcopy(words)


@pytest.fixture
def flagged(tokenizer):
    """(model, tokenizer, spec, examples) of a tiny tied Llama with one flag."""
    model = build("llama", len(tokenizer))
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    spec = dataclasses.replace(spec, template_hash=template_hash(tokenizer))
    return model, tokenizer, spec, [encode(row, tokenizer, spec, 64, i) for i, row in enumerate(make_rows())]
