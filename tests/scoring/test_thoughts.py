"""Thoughts in scored rows and recordings, apart from the answers behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from templates import turn
from test_real_tokenizers import world
from thinking import ASK, limits
from tiny import build

from redflag.backends import Sampling
from redflag.backends.hf import HFBackend
from redflag.backends.scripted import ScriptedBackend
from redflag.data.rows import Row
from redflag.guard.guard import Guard
from redflag.scoring.recording import Recording
from redflag.scoring.score import as_json, score
from redflag.trace import Step, write_traces


def row(thought="One two three", answer="Yes bad", category=None, onset=None):
    return Row([*ASK, turn("assistant", answer) | ({"reasoning_content": thought} if thought else {})], category, onset)


@pytest.fixture(scope="module")
def scorer():
    tokenizer, spec = world("qwen3")
    torch.manual_seed(0)
    return HFBackend(build("qwen3", len(tokenizer)), tokenizer, spec)


def test_a_scored_row_counts_its_thought_and_peaks_apart(scorer):
    tokenizer, spec = world("qwen3")
    rows = [row(), row("One", category="harm"), row("One", category="harm", onset=4), row(None)]
    scored = [as_json(item, tokenizer) for item in score(scorer, tokenizer, spec, rows)]
    assert [item.get("thought_tokens") for item in scored] == [5, 3, 3, None]
    assert [item["onset"] for item in scored] == [None, 3, 5, None]
    for item in scored:
        thought = item.get("thought_tokens", 0)
        assert np.allclose(item["peak"], np.max(item["flag_probs"][thought:], axis=0))
        if thought:
            assert np.allclose(item["thought_peak"], np.max(item["flag_probs"][:thought], axis=0))
    assert "thought_peak" not in scored[-1]


def test_what_is_scored_is_what_a_guard_measures_in_each_part(scorer):
    tokenizer, spec = world("qwen3")
    (item,) = score(scorer, tokenizer, spec, [row()])
    ids = [*item.token_ids, tokenizer.eos_token_id]
    at = iter(range(len(ids)))

    def forced(token_ids, sampling):
        """The row's tokens, each with what the model itself measures before it."""
        for _ in ids:
            done = next(at)
            (step,) = scorer.stream([*token_ids, *ids[:done]], one)
            yield Step(ids[done], step.flag_probs)

    one = Sampling(max_new_tokens=1, temperature=0.0)
    guard = Guard(ScriptedBackend(forced, {tokenizer.eos_token_id}), tokenizer, spec, limits(spec, 1.0))
    trace = guard.generate(ASK, thinking=True).trace
    assert trace.thought_tokens == item.thought == 5
    assert np.allclose(np.array(trace.flag_probs), item.judged, atol=1e-6)


PARTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans()), min_size=1, max_size=6)


def recording(parts):
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": str(i),
            "flag_probs": rng.random((thought + answer, 2)).astype(np.float32),
            "tail_probs": rng.random((1, 2)).astype(np.float32),
            "token_ids": list(range(100 * i, 100 * i + thought + answer)),
            "thought_tokens": thought or None,
            "category": "a" if harmful else None,
            "onset": thought + answer - 1 if harmful else None,
        }
        for i, (thought, answer, harmful) in enumerate(parts)
    ]
    return rows, Recording.of(["a", "b"], rows, {"seed": 3})


@given(PARTS)
def test_the_parts_of_a_recording_are_its_steps_tokens_and_onsets(tmp_path_factory, parts):
    rows, whole = recording(parts)
    path = tmp_path_factory.mktemp("recording") / "r.parquet"
    for one in (whole, Recording.load(whole.save(path))):
        assert one.thoughts.tolist() == [thought for thought, _, _ in parts]
        answers, thoughts = one.part("answer"), one.part("thought")
        having = [i for i, (thought, _, _) in enumerate(parts) if thought]
        assert len(answers) == len(parts) and thoughts.columns["id"] == [str(i) for i in having]
        for i, (thought, answer, harmful) in enumerate(parts):
            assert np.array_equal(answers.steps(i), [*rows[i]["flag_probs"][thought:], *rows[i]["tail_probs"]])
            assert answers.columns["onset"][i] == (answer - 1 if harmful else None)
            assert answers.lengths[i] == answer
        for k, i in enumerate(having):
            assert np.array_equal(thoughts.steps(k), rows[i]["flag_probs"][: parts[i][0]])
        assert not answers.thoughts.any() and set(thoughts.columns["onset"]) <= {None}
        assert answers.token_ids.tolist() == [
            token for row, part in zip(rows, parts, strict=True) for token in row["token_ids"][part[0] :]
        ]
        assert thoughts.token_ids.tolist() == [
            token for row, part in zip(rows, parts, strict=True) for token in row["token_ids"][: part[0]]
        ]


def test_recorded_traces_know_their_thoughts(tmp_path):
    tokenizer, spec = world("qwen3")
    (item,) = score(Silent(), tokenizer, spec, [row()])
    ids = [*item.token_ids, tokenizer.eos_token_id]
    backend = ScriptedBackend([Step(i, (0.1, 0.2)) for i in ids], {tokenizer.eos_token_id})
    guard = Guard(backend, tokenizer, spec, limits(spec))
    traces = [guard.generate(ASK, thinking=thinking).trace for thinking in (True, False)]
    write_traces(tmp_path / "t.jsonl", traces)
    assert Recording.load(tmp_path / "t.jsonl").thoughts.tolist() == [5, 0]


class Silent:
    context_length = None

    def score(self, pairs, *, batch_size):
        return [np.zeros((len(response), 2), np.float32) for _, response in pairs]
