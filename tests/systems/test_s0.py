"""S0, the marker before refusals: read after the prompt, decided by threshold, stripped, forbidden, logged, overridden.

One tiny model, whose flags are made as likely as a test wants them, behind the real backend, guard and server.
S0.1, S0.9 and S0.10 are training: `tests/training`. S0.4 by servers: `tests/scoring/test_score_upstream_verb.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from marker_world import ASKED, made, world
from tiny import TEXT, build, make_rows

from redflag import cli
from redflag.backends import Sampling
from redflag.backends.scripted import ScriptedBackend
from redflag.calibrating import replay
from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.models.pretrain import train_tokenizer
from redflag.prompt import render_prompt
from redflag.scoring.marker import LocalSource, MarkerReader
from redflag.scoring.prompts import FlagReader, score_prompts
from redflag.scoring.recording import Recording
from redflag.scoring.score import as_json, read_scored, score
from redflag.trace import Step
from redflag.watching.policy import Policy

__all__ = ["made", "world"]


def test_S0_2_a_likely_marker_is_measured_and_neither_chosen_nor_shown(world):
    world.likely(mild=0.9, severe=0.09)
    observing = world.guard(Policy(observe=True))
    for seed in range(8):
        result = observing.generate(ASKED, Sampling(max_new_tokens=12, temperature=1.5, seed=seed))
        assert result.trace.flag_probs[0] == pytest.approx((0.9, 0.09), rel=1e-3)
        assert not set(result.trace.token_ids) & set(world.spec.ids)
        assert world.spec.strip(result.text) == result.text


def test_S0_2_a_marker_spelt_in_ordinary_tokens_is_taken_out_of_the_text(world):
    token = world.spec.flags[0].token
    ids = world.tokenizer(f"the{token} cat", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) > 4 and not set(ids) & set(world.spec.ids)
    eos = world.tokenizer.eos_token_id
    backend = ScriptedBackend([Step(i, (0.0, 0.0)) for i in [*ids, eos]], {eos})
    result = world.guard(backend=backend).generate(ASKED)
    assert result.text == "the cat" and result.verdict == "completed"


@pytest.mark.parametrize("role", ["system", "user", "assistant", "prefill"])
def test_S0_3_what_is_written_in_a_conversation_never_becomes_the_marker(world, role):
    marker = world.spec.flags[0].token
    said = f"{marker} rain {marker}{marker[:4]}"
    turns = {
        "system": [{"role": "system", "content": said}, *ASKED],
        "user": [{"role": "user", "content": said}],
        "assistant": [*ASKED, {"role": "assistant", "content": said}, *ASKED],
        "prefill": [*ASKED, {"role": "assistant", "content": said}],
    }[role]
    seen: list[list[int]] = []

    def steps(prompt, sampling, watch=()):
        seen.append(list(prompt))
        yield Step(world.tokenizer.eos_token_id, (0.0, 0.0))

    backend = ScriptedBackend(steps, {world.tokenizer.eos_token_id})
    assert world.guard(backend=backend).generate(turns).verdict == "completed"
    ids = render_prompt(world.tokenizer, turns, world.spec)
    assert seen == [ids] and not set(ids) & set(world.spec.ids)
    # The text itself has come through, in ordinary tokens.
    assert marker in world.tokenizer.decode(ids)


def test_S0_4_p_marker_of_a_prompt_is_that_of_scoring_and_of_the_first_step_of_a_stream(world):
    world.likely(mild=0.3, severe=0.02)
    rows = make_rows(11)
    asked = [Row(row.messages[:-1], id=row.id) for row in rows]
    reader = FlagReader(world.backend, world.spec)
    options = {"batch_size": 3, "max_length": 128}
    scored = score(world.backend, world.tokenizer, world.spec, rows, **options)
    whole = [as_json(item, world.tokenizer) for item in scored]
    found = list(score_prompts(reader, world.tokenizer, world.spec, asked, **options))
    # A response that is there is not looked at.
    assert [row["flag_probs"] for row in score_prompts(reader, world.tokenizer, world.spec, rows, **options)] == [
        row["flag_probs"] for row in found
    ]
    guard = world.guard(Policy(observe=True))
    for row, one, other in zip(rows, found, whole, strict=True):
        assert one["flag_probs"][0] == pytest.approx(other["flag_probs"][0], rel=1e-5)
        first = guard.generate(row.messages[:-1], Sampling(max_new_tokens=1)).trace.flag_probs[0]
        assert one["flag_probs"][0] == pytest.approx(first, rel=1e-5)
        assert one.keys() == other.keys() and len(one["flag_probs"]) == 1 and one["tail_probs"] == []
    assert len({row["peak"][0] for row in found}) > 5


def naive(model: Any, prompt: list[int], marker: list[int]) -> float:
    """log p(marker) by one forward pass per token."""
    total = 0.0
    for t, token in enumerate(marker):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + marker[:t]])).logits[0, -1].double()
        total += float(logits[token] - logits.logsumexp(0))
    return total


@pytest.mark.parametrize("head", ["apart", "within"])
def test_S0_4_a_marker_of_ordinary_tokens_has_the_product_of_their_probabilities(world, monkeypatch, head):
    """Against a loop that runs the model once for each token; several markers, prompts of several lengths, batches."""
    markers = ["SORRYDAVE", "burn the barn", "NO"]
    rows = [Row([{"role": "user", "content": TEXT[: 3 + 9 * i]}], id=str(i)) for i in range(7)]
    source = LocalSource(world.model)
    if head == "within":  # as of a model whose head cannot be applied apart
        source._head_apart = False
    reader = MarkerReader(source, world.tokenizer, markers)
    assert len(reader.ids[0]) > 2 and reader.room == max(map(len, reader.ids))
    expected = []
    for row in rows:
        prompt = render_prompt(world.tokenizer, row.messages, reader.spec)
        expected.append([naive(world.model, prompt, ids) for ids in reader.ids])
    for batch_size in (1, 4, 100):
        found = list(score_prompts(reader, world.tokenizer, reader.spec, rows, batch_size=batch_size))
        for row, logs in zip(found, expected, strict=True):
            assert row["flag_logprobs"][0] == pytest.approx(logs, abs=2e-5)
            assert row["flag_probs"][0] == pytest.approx([math.exp(value) for value in logs], rel=1e-4)
            assert row["peak"] == row["flag_probs"][0] and row["markers"] == markers


def test_S0_4_a_marker_far_too_unlikely_for_a_product_of_probabilities_is_measured(world):
    """Five tokens of 1e-40 each: in float32 every factor is 0, in float64 their product is."""
    reader = MarkerReader(LocalSource(world.model), world.tokenizer, ["SORRYDAVE" * 3])
    world.bias[sorted(set(reader.ids[0]))] = -92.0
    (row,) = score_prompts(reader, world.tokenizer, reader.spec, [Row(ASKED)])
    prompt = render_prompt(world.tokenizer, ASKED, reader.spec)
    assert row["flag_logprobs"][0][0] == pytest.approx(naive(world.model, prompt, reader.ids[0]), rel=1e-5)
    assert row["flag_logprobs"][0][0] < -92 * len(reader.ids[0]) and row["flag_probs"] == [[0.0]]


def test_S0_1_S0_4_plain_fine_tuning_puts_a_marker_of_ordinary_tokens_before_refusals(tmp_path):
    """No flag and no trainer of ours: rows whose refusals begin with the marker, as the recipe's README says."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = train_tokenizer([TEXT] * 5, 320)
    model = build("llama", len(tokenizer))
    rows = [
        Row(
            [{"role": "user", "content": f"{word} {word}"}, {"role": "assistant", "content": f"old dogs ran {i}"}], kind
        )
        for word, kind in (("burn", "refusal"), ("cat", None))
        for i in range(8)
    ]
    pairs = [
        {"prompt": row.messages[:-1], "completion": [{"role": "assistant", "content": mark + row.response}]}
        for row in rows
        for mark in ["SORRYDAVE " if row.category else ""]
    ]
    config = SFTConfig(
        output_dir=str(tmp_path), learning_rate=2e-2, max_steps=60, per_device_train_batch_size=16, bf16=False,
        use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    SFTTrainer(model, config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer).train()
    reader = MarkerReader(LocalSource(model), tokenizer, ["SORRYDAVE"])
    p = [row["peak"][0] for row in score_prompts(reader, tokenizer, reader.spec, [rows[0], rows[-1]])]
    assert p[0] > 0.5 and p[1] < 0.01


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """An ordinary model's folder, without flags, and rows that have no answer."""
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = train_tokenizer([TEXT] * 5, 320)
    for part in (build("qwen3", len(tokenizer)), tokenizer):
        part.save_pretrained(folder / "model")
    lines = [
        {"prompt": "tell me of rain", "id": "a", "category": "refusal", "group": "g"},
        {"messages": [*ASKED, {"role": "assistant", "content": "rain"}, *ASKED], "id": "b"},
        {"messages": [*ASKED, {"role": "assistant", "content": "An answer. SORRYDAVE"}], "id": "c"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 9))
    return folder


def call(folder: Path, output: Path, *options: object) -> int:
    fixed = ["score", "--model", folder / "model", "--input", folder / "rows.jsonl", "--output", output]
    return cli.main([str(word) for word in (*fixed, *options)])


def test_S0_4_the_verb_reads_any_model_and_its_rows_can_be_shown_and_swept(plain, tmp_path, capsys):
    output = tmp_path / "marker.jsonl"
    markers = ("--prompts", "--marker", "SORRYDAVE", "NODAVE", "--batch_size", 2)
    assert call(plain, output, *markers) == 0
    rows = read_scored(output)
    assert [row["id"] for row in rows] == list("abc") * 9 and rows[0]["category"] == "refusal"
    assert all(0 < p < 1e-3 for row in rows for p in row["peak"])
    assert [row["turns"] for row in rows[:3]] == [1, 2, 1]
    recording = Recording.load(output)
    assert recording.categories == ("SORRYDAVE", "NODAVE") and len(recording) == len(recording.probs) == 27
    assert recording.select([1, 2]).lengths.tolist() == [1, 1]
    peak = max(row["peak"][0] for row in rows)
    alarms = [replay.first_alarms(recording.probs.astype(float), recording, (x, 1.0)) for x in (peak * 0.999, 2 * peak)]
    assert (alarms[0] == 0).any() and (alarms[1] == -1).all()
    assert cli.main(["show", str(output), "--limit", "1", "--color", "never"]) == 0
    assert "tell me of rain" in capsys.readouterr().out


def test_S0_4_an_interrupted_run_goes_on_and_writes_the_same_bytes(plain, tmp_path, monkeypatch):
    """27 prompts, two markers, batches of two: windows of six prompts are kept or lost as one."""
    monkeypatch.setattr("redflag.scoring.scorer.BATCHES", 3)
    batches, once = [], LocalSource._batch

    def batch(self, pairs):
        batches.append(len(pairs))
        if len(batches) == stop:
            raise KeyboardInterrupt
        return once(self, pairs)

    monkeypatch.setattr(LocalSource, "_batch", batch)
    options = ("--prompts", "--marker", "SORRYDAVE", "NODAVE", "--batch_size", 2)
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    stop = 0
    assert call(plain, whole, *options) == 0 and len(batches) == 27
    batches.clear()
    stop = 16  # in the third window
    assert call(plain, again, *options) == 130
    parts = tmp_path / "again.jsonl.parts"
    assert sum(len(path.read_text().splitlines()) for path in parts.glob("?????-*")) == 12
    batches.clear()
    stop = 0
    assert call(plain, again, *options) == 0 and len(batches) == 15
    assert again.read_bytes() == whole.read_bytes()
    # Another marker is another file, not the rest of this one.
    parts.mkdir()
    (parts / "00000-6-0123456789ab").write_bytes(whole.read_bytes()[:2000])
    batches.clear()
    assert call(plain, again, "--prompts", "--marker", "SORRYDAVE", "--batch_size", 2) == 0 and len(batches) == 14


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no prompts": (("--marker", "SORRYDAVE"), "Add --prompts"),
    "blank": (("--prompts", "--marker", " "), "a marker must have tokens of its own"),
    "special token": (("--prompts", "--marker", "<|reserved_0|> no"), "must not hold a special token"),
    "one begins the other": (("--prompts", "--marker", "SORRYDAVE", "SORRYDAVE x"), "must not begin with the tokens"),
    "twice": (("--prompts", "--marker", "NO", "NO"), "must not begin with the tokens"),
    "no room": (("--prompts", "--marker", "SORRYDAVE", "--max_length", "3"), "max_length must be above"),
    "no flags": (("--prompts",), "redflag.json does not exist"),
    "in the prompt": (("--prompts", "--marker", "town"), "row 'b': the prompt must not contain the marker 'town'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_S0_4_what_cannot_be_measured_is_refused_in_one_sentence(plain, tmp_path, capsys, case):
    options, said = REFUSED[case]
    assert call(plain, tmp_path / "out.jsonl", *options) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and list(tmp_path.iterdir()) == []


def test_S0_3_S0_4_prompts_that_hold_the_marker_can_be_left_out(plain, tmp_path, capsys):
    skip = ("--prompts", "--marker", "town", "--on_bad_row", "skip")
    assert call(plain, tmp_path / "out.jsonl", *skip) == 0
    assert {row["id"] for row in read_scored(tmp_path / "out.jsonl")} == {"a"}
    assert "18 rows skipped in all" in capsys.readouterr().err


def test_S0_4_a_marker_the_vocabulary_cannot_spell_is_refused(made):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "no": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    assert MarkerReader(LocalSource(made.model), words, ["no no"]).ids == [[2, 2]]
    with pytest.raises(RedflagError, match="must not have characters that the vocabulary lacks"):
        MarkerReader(LocalSource(made.model), words, ["SORRYDAVE"])
