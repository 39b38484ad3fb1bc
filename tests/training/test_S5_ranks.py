"""Rank matching: ranks and agreement equal to sorting, and what deep alignment does to them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from terms import only, world
from tiny import TEXT, WORDS

from redflag.errors import RedflagError
from redflag.training.answers import deep_alignment_rows
from redflag.training.ranks import harmful_ranks, rank_agreement, rank_matching, ranks_of
from redflag.training.trainer import RedFlagTrainer

TRIPLES = [(f"tell {WORDS[i]}", TEXT[7 * i : 7 * i + 40].strip(), "old dogs ran home") for i in range(4)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=12, unique=True), st.data())
def test_S5_2_ranks_and_agreement_equal_sorting(first, data):
    second = data.draw(st.permutations(first))
    order = [sorted(values, reverse=True) for values in (second, first)]
    ranks = [[o.index(v) + 1 for v in values] for o, values in zip(order, (second, first), strict=True)]
    tokens = torch.arange(len(first))
    assert ranks_of(torch.tensor([second] * len(first)), tokens).tolist() == ranks[0]
    weights = [1 / rank for rank in ranks[1]]
    means = [sum(w * r for w, r in zip(weights, side, strict=True)) / sum(weights) for side in ranks]
    products = [
        sum(w * (a - means[i]) * (b - means[j]) for w, a, b in zip(weights, ranks[i], ranks[j], strict=True))
        for i, j in ((0, 1), (0, 0), (1, 1))
    ]
    expected = products[0] / math.sqrt(products[1] * products[2])
    assert rank_agreement(torch.tensor(second), torch.tensor(first)) == pytest.approx(expected, abs=1e-6)


def test_S5_3_after_deep_alignment_harmful_tokens_rank_lower_and_the_ranking_agrees_with_no_prefill(
    tmp_path, tokenizer
):
    rows = deep_alignment_rows(TRIPLES, tokenizer, copies=4, share=0.8)
    model, spec, data = world(tokenizer, rows)
    base = copy.deepcopy(model)
    config = only(tmp_path, answer_coef=1.0, learning_rate=5e-3, max_steps=25, per_device_train_batch_size=16)
    RedFlagTrainer(model, config, spec, data, processing_class=tokenizer).train()
    pairs = [(prompt, harmful) for prompt, harmful, _ in TRIPLES]
    found = rank_matching(base, model, tokenizer, spec, iter(pairs), lengths=(0, 3, 99), top=5)
    before, after = found["before"][1], found["after"][1]
    assert before["length"] == 3 and before["answers"] == 4
    assert after["agreement"] > before["agreement"] + 0.2
    assert found["after"][0]["agreement"] == pytest.approx(1) and found["after"][2]["median_rank"] is None
    assert 0 <= after["in_top"] <= 1
    with pytest.raises(RedflagError, match="pairs must hold at least one prompt with a harmful answer"):
        harmful_ranks(model, tokenizer, spec, [])
