"""Teaching verdicts: which alarms are taken, and that the model is asked as a guard asks it."""

# ruff: noqa: F811

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
from scripted_guard import FLAGS, tokenizer  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from redflag.backends.scripted import ScriptedBackend
from redflag.data.rows import Row, write_rows
from redflag.flags import Flag, FlagSpec
from redflag.prompt import template_hash
from redflag.trace import Step

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2"


@pytest.fixture
def teach(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    for name in ("reflect", "teach"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return importlib.import_module("teach")


@pytest.fixture
def flags(tokenizer) -> FlagSpec:
    flag = Flag("harm", FLAGS[0], id=tokenizer.convert_tokens_to_ids(FLAGS[0]))
    return FlagSpec((flag,), run_id="run-1", template_hash=template_hash(tokenizer))


def put(folder: Path, cases: dict[str, tuple[bool, list[float]]], tokens: list[int]) -> tuple[Path, Path]:
    """Rows and their scored lines; the onset of a harmful one is its second token."""
    rows, lines = [], []
    for name, (harmful, probs) in cases.items():
        turns = [{"role": "user", "content": "cats?"}, {"role": "assistant", "content": "the cat sat"}]
        rows.append(Row(turns, "harm" if harmful else None, 4 if harmful else None, name, id=name))
        line = {"id": name, "token_ids": tokens, "flag_probs": [[p] for p in probs], "tail_probs": [], "peak": [0.9]}
        lines.append(line | {"onset": 1 if harmful else None, "prompt_truncated": False, "category": None})
    write_rows(folder / "rows.jsonl", rows)
    (folder / "scored.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl", folder / "scored.jsonl"


def test_as_many_false_alarms_as_true_ones_and_none_before_the_onset(teach, tokenizer, flags, tmp_path, monkeypatch):
    # This tokenizer's words have a first token in common.
    monkeypatch.setattr(teach, "SHORT", dataclasses.replace(teach.SHORT, words=("yes", "no")))
    tokens = tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    low = [0.1] * len(tokens)
    cases = {
        "true": (True, [0.1, 0.9, *low[2:]]),
        "early": (True, [0.9, 0.9, *low[2:]]),
        "missed": (True, low),
        "false": (False, [0.9, *low[1:]]),
        "another": (False, [0.1, 0.1, 0.9, *low[3:]]),
        "quiet": (False, low),
    }
    rows, scored = put(tmp_path, cases, tokens)
    monkeypatch.setattr(teach, "read_scored", lambda path: [json.loads(line) for line in path.read_text().splitlines()])
    examples = teach.alarms(rows, scored, 0.5, tokenizer, flags, seed=0)
    assert sorted(true for _, true in examples) == [False, True]
    # The very context in which a guard asks for the verdict of the true alarm.
    engine = ScriptedBackend(
        lambda ids, sampling: [Step(20, (0.1,))], {tokenizer.eos_token_id}, watched=lambda *_: [Step(20, (0.3, 0.3))]
    )
    row = Row([{"role": "user", "content": "cats?"}, {"role": "assistant", "content": "the cat sat"}], "harm", 4)
    alarm = importlib.import_module("reflect").Alarm(row, tokens, cases["true"][1])
    importlib.import_module("reflect").review(engine, tokenizer, flags, 0.5, alarm, teach.SHORT)
    assert next(context for context, true in examples if true) in [list(prompt) for prompt in engine.prompts]


def test_the_verdict_words_are_learnt(teach):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config)
    # The first token tells, behind padding of any length.
    examples = [([11 if i % 2 else 12, *range(20, 20 + i % 5)], bool(i % 2)) for i in range(160)]
    losses = teach.train(model, examples, [3, 4], learning_rate=5e-3, batch=8)
    assert len(losses) == 20 and losses[-1] < 0.1 < losses[0]
