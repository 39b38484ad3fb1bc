"""Learning answers: plain and constrained cross-entropy equal to a loop over tokens; rows for deep alignment."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from terms import check_loss, moved_trainer, only, row, split_log_probs, world
from tiny import TEXT, WORDS, make_rows

from redflag.data.rows import load_rows, write_rows
from redflag.errors import RedflagError
from redflag.training.answers import constraint_weights, deep_alignment_rows
from redflag.training.encode import IGNORE, PlacementConfig, place
from redflag.training.trainer import RedFlagTrainer

TRIPLES = [(f"tell {WORDS[i]}", TEXT[7 * i : 7 * i + 40].strip(), "old dogs ran home") for i in range(6)]


def loop_weight(log_p, log_ref, place_in_answer, beta):
    factor = 5 if place_in_answer == 1 else 20 if place_in_answer <= 5 else 1
    return max(1e-3, 2 * (1 - 1 / (1 + math.exp(-beta * factor * (log_p - log_ref)))))


@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["S5_3_plain", "S5_4_constrained"])
@pytest.mark.parametrize("answers", ["marked", "harmless", "all"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_S5_4_loss_and_gradients_equal_a_loop_over_tokens(tmp_path, tokenizer, beta, answers, full):
    rows = [row("tell cat", TEXT[:30], prefill=13), row("tell fish", TEXT[:24], prefill=0), *make_rows(6)]
    model, spec, data = world(tokenizer, rows)
    config = only(
        tmp_path, answer_coef=0.7, answers=answers, constraint_beta=beta, in_context=0.5, keep_coef=2.0
    )  # fmt: skip
    trainer, reference = moved_trainer(tokenizer, model, spec, data, config, full)
    examples = list(data)

    def expected(net):
        learnt, kept, tokens = [], [], 0
        for example in examples:
            placed = place(example, config.placement_config(), spec, config.seed, 0)
            plain = [token for token, inserted in zip(placed.input_ids, placed.inserted, strict=True) if not inserted]
            z = net(input_ids=torch.tensor([placed.input_ids])).logits[0]
            with torch.no_grad():
                z_ref = reference(input_ids=torch.tensor([plain])).logits[0]
            marked, harmless = example["prefill"] >= 0, example["flag_class"] == 0
            wanted = {"marked": marked, "harmless": marked or harmless, "all": True}[answers]
            tokens += max(0, example["prefill"])
            number = 0
            for j in range(example["response_start"], len(placed.input_ids)):
                if placed.labels[j] == IGNORE:
                    assert j < example["response_start"] + example["prefill"]
                    continue
                before = j - 1 - sum(placed.inserted[:j])
                q, p = split_log_probs(z[j - 1], spec)[1], split_log_probs(z_ref[before], spec)[1]
                if wanted and not placed.inserted[j]:
                    number += 1
                    tokens += 1
                    log_q, log_p = q[placed.labels[j]], p[placed.labels[j]]
                    weight = loop_weight(log_q.item(), log_p.item(), number, beta) if beta else 1.0
                    learnt.append(-weight * log_q)
                else:
                    there = p > -torch.inf
                    kept.append((p[there].exp() * (p[there] - q[there])).sum())
        keep = 2.0 * sum(kept) / len(kept) if kept else 0.0
        return 0.7 * sum(learnt) / tokens + keep

    check_loss(trainer, examples, expected)


@settings(max_examples=60, deadline=None)
@given(gaps=st.lists(st.floats(-60, 60), min_size=1, max_size=9), beta=st.sampled_from([0.1, 1.0]))
def test_S5_4_weights_equal_the_formula_token_by_token(gaps, beta):
    places = torch.arange(1, len(gaps) + 1)
    got = constraint_weights(torch.tensor(gaps), torch.zeros(len(gaps)), places, beta)
    expected = []
    for number, gap in enumerate(gaps, 1):
        factor = 5 if number == 1 else 20 if number <= 5 else 1
        expected.append(max(1e-3, 2 * (1 - torch.sigmoid(torch.tensor(beta * factor * gap)).item())))
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-3, atol=1e-6)


def test_S5_3_rows_are_prefix_and_refusal_drawn_by_seed_and_read_back(tmp_path, tokenizer):
    rows = deep_alignment_rows(TRIPLES, tokenizer, seed=3, copies=40, most=4)
    assert rows == deep_alignment_rows(TRIPLES, tokenizer, seed=3, copies=40, most=4)
    assert rows != deep_alignment_rows(TRIPLES, tokenizer, seed=4, copies=40, most=4)
    assert rows[:40] == deep_alignment_rows(TRIPLES[:1], tokenizer, seed=3, copies=40, most=4)
    lengths = []
    for number, found in enumerate(rows):
        prompt, harmful, refusal = TRIPLES[number // 40]
        before = found.response[: found.prefill]
        assert found.messages[0]["content"] == prompt and found.response[found.prefill :] == refusal
        assert harmful.startswith(before.removesuffix(" ")) and found.category is None
        lengths.append(len(tokenizer(before.strip(), add_special_tokens=False)["input_ids"]) if before else 0)
    assert 0.4 < sum(length > 0 for length in lengths) / len(lengths) < 0.6
    assert set(lengths) == {0, 1, 2, 3, 4}
    write_rows(tmp_path / "rows.jsonl", rows)
    assert load_rows(tmp_path / "rows.jsonl").rows == rows


def test_S5_3_a_prefill_is_neither_learnt_nor_kept_nor_judged(tokenizer):
    _, spec, data = world(tokenizer, deep_alignment_rows(TRIPLES, tokenizer, copies=4))
    placed_before = 0
    for example in data:
        start, given = example["response_start"], example["prefill"]
        for placement in ("first", "dense", "insert", "until"):
            placed = place(example, PlacementConfig(placement, in_context=0.0 if placement == "until" else 0.9), spec)
            if given:
                placed_before += 1
                assert placed.input_ids == example["input_ids"]
                assert set(placed.labels[: start + given]) == set(placed.flag_labels[: start + given]) == {IGNORE}
            assert IGNORE not in placed.labels[start + given :]
    assert placed_before


@pytest.mark.parametrize(
    ("change", "words"),
    [({"share": 1.5}, "share must be between 0 and 1"), ({"most": 0}, "most 0"), ({"copies": 0}, "copies 0")],
    ids=str,
)
def test_S5_3_numbers_without_meaning_are_refused(tokenizer, change, words):
    with pytest.raises(RedflagError, match=words):
        deep_alignment_rows(TRIPLES, tokenizer, **change)
    with pytest.raises(RedflagError, match="triple 0"):
        deep_alignment_rows([("a", " ", "b")], tokenizer)


@pytest.mark.parametrize("prefill", [-1, 3, "2", True])
def test_S5_3_a_prefill_that_leaves_no_answer_is_refused(prefill):
    with pytest.raises(RedflagError, match="prefill must be"):
        load_rows([{"prompt": "a", "response": "abc", "category": None, "prefill": prefill}])


def test_S5_3_a_category_on_a_prefilled_refusal_is_refused(tokenizer):
    with pytest.raises(RedflagError, match="Leave the category out"):
        world(tokenizer, [row("a", "cat sat on", "harm", prefill=4)])


def test_S5_3_rows_without_marks_are_refused(tmp_path, tokenizer):
    model, spec, data = world(tokenizer, make_rows(4))
    with pytest.raises(RedflagError, match="answers must be harmless or all if no row has the key prefill"):
        RedFlagTrainer(model, only(tmp_path, answer_coef=1.0), spec, data, processing_class=tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"answer_coef": -1.0},
        {"answers": "some"},
        {"constraint_beta": -0.1},
        {"consistency": "l1"},
        {"consistency_at": "last"},
        {"presto_queries": "none"},
        {"adversarial_steps": 0},
        {"adversarial_radius": -1.0},
        {"plain_share": 1.1},
    ],
    ids=str,
)
def test_settings_of_terms_without_meaning_are_refused(tmp_path, change):
    with pytest.raises(RedflagError, match=next(iter(change))):
        only(tmp_path, **change)
