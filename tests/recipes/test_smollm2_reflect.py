"""Reflections of the recipe: which alarms are taken, who writes what, and how a verdict is counted."""

# ruff: noqa: F811

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scripted_guard import FLAGS, tokenizer  # noqa: F401

from redflag.backends.scripted import ScriptedBackend
from redflag.data.rows import Row
from redflag.flags import Flag, FlagSpec
from redflag.prompt import template_hash
from redflag.trace import Step
from redflag.watching.policy import Reflect

SCRIPT = Path(__file__).parents[2] / "recipes" / "smollm2" / "reflect.py"
THOUGHT = " It is about cats.\n"


@pytest.fixture(scope="module")
def reflect():
    spec = importlib.util.spec_from_file_location("smollm2_reflect", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "smollm2_reflect", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def flags(tokenizer) -> FlagSpec:
    flag = Flag("harm", FLAGS[0], id=tokenizer.convert_tokens_to_ids(FLAGS[0]))
    return FlagSpec((flag,), run_id="run-1", template_hash=template_hash(tokenizer))


def row(name: str, harmful: bool = False, natural: bool = True) -> Row:
    turns = [{"role": "user", "content": "cats?"}, {"role": "assistant", "content": "the cat sat on the mat"}]
    source = ("natural" if natural else None) if harmful else None
    return Row(turns, "harm" if harmful else None, 0 if harmful else None, name, id=name, onset_source=source)


def scored(name: str, probs: list[float], onset: int | None = None) -> dict:
    line = {"id": name, "flag_probs": [[p] for p in probs], "peak": [max(probs)], "onset": onset}
    return line | {"token_ids": list(range(len(probs))), "prompt_truncated": False}


def test_so_many_harmless_answers_reach_the_threshold_and_true_alarms_come_behind_the_onset(reflect):
    harmless = [(row(f"ok-{i}"), scored(f"ok-{i}", [0.0, i / 10])) for i in range(8)]
    harmful = [
        (row("late", True), scored("late", [0.1, 0.2, 0.9], 1)),
        (row("early", True), scored("early", [0.9, 0.9, 0.9], 1)),
        (row("missed", True), scored("missed", [0.1, 0.1, 0.1], 1)),
        (row("unread", True, natural=False), scored("unread", [0.1, 0.9, 0.9], 1)),
        (row("at", True), scored("at", [0.1, 0.6, 0.9], 1)),
    ]
    rows, lines = zip(*harmless, *harmful, strict=True)
    threshold, alarms = reflect.choose(rows, lines, 2, seed=0)
    assert threshold == 0.6
    assert {alarm.row.id for alarm in alarms[::2]} == {"ok-6", "ok-7"}
    assert {alarm.row.id for alarm in alarms[1::2]} == {"late", "at"}
    with pytest.raises(SystemExit, match="at most 2, the true alarms"):
        reflect.choose(rows, lines, 3, seed=0)


def engine_of(tokenizer, harm: float, behind: float, thought: str):
    """Thinks, says so much harm by the words, and measures so much flag behind the thought."""
    ids = tokenizer(thought, add_special_tokens=False)["input_ids"]

    def steps(token_ids, sampling):
        return [Step(i, (behind,)) for i in (ids if sampling.max_new_tokens > 1 else ids[:1])]

    def watched(token_ids, sampling, watch):
        return [Step(20, (harm / 2, (1 - harm) / 2))]

    return ScriptedBackend(steps, {tokenizer.eos_token_id}, watched=watched)


@pytest.mark.parametrize(("harm", "whole"), [(0.2, True), (0.7, False)])
@pytest.mark.parametrize("thinks", [True, False])
def test_the_answer_is_the_rows_and_the_reflection_the_engines(reflect, tokenizer, flags, harm, whole, thinks):
    engine = engine_of(tokenizer, harm, 0.3, THOUGHT)
    ids = tokenizer("the cat sat on the mat", add_special_tokens=False)["input_ids"]
    probs = [0.1] * len(ids)
    probs[3] = 0.9
    how = Reflect(words=("yes", "no"), max_tokens=64 if thinks else 0)
    found = reflect.review(engine, tokenizer, flags, 0.5, reflect.Alarm(row("a"), ids, probs), how)
    assert (found.words, found.flag, found.whole, found.reviews) == (pytest.approx(harm), 0.3, whole, 1)
    assert found.text == (THOUGHT if thinks else "")
    # Every prompt of the engine's: the answer up to the alarm, the flag, the cue.
    cue = tokenizer(how.cue, add_special_tokens=False)["input_ids"]
    for prompt in engine.prompts:
        at = prompt.index(flags.ids[0])
        assert list(prompt[at - 3 : at]) == ids[:3] and list(prompt[at + 1 : at + 1 + len(cue)]) == cue
    # The flag is read before the verdict is asked for.
    assert len(engine.prompts[-1]) < max(map(len, engine.prompts))
    assert engine.open_streams == 0


def test_a_second_alarm_is_reviewed_again_and_counted(reflect, tokenizer, flags):
    engine = engine_of(tokenizer, 0.2, 0.3, THOUGHT)
    ids = tokenizer("the cat sat on the mat", add_special_tokens=False)["input_ids"]
    probs = [0.9 if i in (1, 4) else 0.1 for i in range(len(ids))]
    how = Reflect(words=("yes", "no"), max_tokens=0)
    found = reflect.review(engine, tokenizer, flags, 0.5, reflect.Alarm(row("a"), ids, probs), how)
    assert (found.reviews, found.whole) == (2, True)


def test_examples_stand_in_the_form_in_which_the_model_is_asked(reflect):
    for name, how in reflect.modes("<|flag|>").items():
        if how.system:
            assert name.startswith("in context")
            for word in how.words:
                assert f"{how.verdict_cue}{word}\n" in how.system
            assert how.system.count(f"<|flag|>{how.cue.rstrip()}") >= 4
        assert dataclasses.replace(how, system="") in reflect.modes("").values() or how.system


def test_the_half_that_chooses_a_threshold_does_not_count(reflect):
    labels = [False, True] * 20
    half = [i < 20 for i in range(40)]
    groups = [str(i) for i in range(40)]
    # Separable with another threshold than 0.5 where it is chosen, and turned round on the other half.
    harm = [0.1 + 0.1 * label if chooses else 0.2 - 0.1 * label for label, chooses in zip(labels, half, strict=True)]
    found = reflect.figures(harm, labels, groups, half)
    assert found["auroc_choosing_half"] == 1.0 and found["auroc_other_half"] == 0.0
    assert found["threshold"] == pytest.approx(0.2) and found["other_half"]["count"] == 0
    assert found["right"]["count"] == 20 and found["false_alarms_seen"]["count"] == 20
    assert found["true_alarms_confirmed"]["count"] == 0


def test_nothing_is_asked_twice_and_the_best_mode_is_chosen_on_one_half(
    reflect, tokenizer, flags, tmp_path, monkeypatch
):
    rows = [row(f"{kind}-{i}", kind == "bad") for i in range(8) for kind in ("ok", "bad")]
    lines = [scored(one.id, [0.1, 0.9, 0.1], 0 if one.harmful else None) for one in rows]
    harm = dict(zip((one.id for one in rows), [0.1 + 0.05 * i for i in range(16)], strict=True))
    asked = []

    def review(engine, tokenizer, spec, threshold, alarm, how):
        asked.append((alarm.row.id, how))
        words = harm[alarm.row.id] if how.words == (" yes", " no") else 0.5
        return reflect.Outcome(words + 0.3 * alarm.row.harmful, 0.5, "", not alarm.row.harmful, 1)

    monkeypatch.setattr(reflect, "review", review)
    monkeypatch.setattr(reflect, "open_backend", lambda *_, **__: (None, tokenizer, flags))
    monkeypatch.setattr(reflect, "load_rows", lambda _: type("Rows", (), {"rows": rows}))
    monkeypatch.setattr(reflect, "read_scored", lambda _: lines)
    arguments = argparse.Namespace(model="m", dtype="auto", upstream=None, rows="r", scored="s", count=8, pairs=None)
    arguments = argparse.Namespace(**vars(arguments), only=None, peaks=False, output=tmp_path, seed=1)
    first = reflect.measure(arguments)
    assert (
        len(asked)
        == 16 * len(reflect.modes("x"))
        == len(set((name, how.cue, how.system, how.max_tokens) for name, how in asked))
    )
    assert reflect.measure(arguments) == first and len(asked) == 16 * len(reflect.modes("x"))
    assert first["threshold"] == 0.9 and first["results"]["as shipped"]["whole"]["false alarms"]["count"] == 8
    printed = reflect.table(first)
    assert all(f"| {name} | words |" in printed for name in reflect.modes("x")) and "Best on the half" in printed

    # Examples in the system turn move the flag: alarms, and as many quiet answers as there are.
    rows += [row(f"quiet-{i}") for i in range(12)]
    lines += [scored(f"quiet-{i}", [0.1, 0.2]) for i in range(12)]
    prompts = []

    class Engine:
        def score(self, pairs):
            prompts.extend(pairs)
            return [np.array([[0.95 if flags.ids[0] in prompt else 0.0]]) for prompt, _ in pairs]

    monkeypatch.setattr(reflect, "open_backend", lambda *_, **__: (Engine(), tokenizer, flags))
    arguments.peaks = True
    found = reflect.measure(arguments)["alarms_in_context"]
    assert {kind: (one["count"], one["of"]) for kind, one in found.items()} == {
        "false alarms": (8, 8),
        "true alarms": (8, 8),
        "harmless answers without an alarm": (8, 8),
    }
    assert len(prompts) == 24 and all(prompt.count(flags.ids[0]) == 4 for prompt, _ in prompts)
