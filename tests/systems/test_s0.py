"""S0, the marker before refusals: read after the prompt, decided by threshold, stripped, forbidden, logged, overridden.

One tiny model, whose flags are made as likely as a test wants them, behind the real backend, guard and server.
S0.1, S0.9 and S0.10 are training: `tests/training`. S0.4 by servers: `tests/scoring/test_score_upstream.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from running import MODEL, body_of, running
from tiny import TEXT, build, make_rows

from redflag import cli
from redflag.backends import Sampling
from redflag.backends.hf import HFBackend
from redflag.backends.scripted import ScriptedBackend
from redflag.backends.turns import Turns
from redflag.calibrating import replay
from redflag.cli import parse
from redflag.data.rows import Row, write_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec, attach
from redflag.guard.guard import Guard
from redflag.lab.nano.rows import nano_rows
from redflag.models.pretrain import train_tokenizer
from redflag.prompt import render_prompt, template_hash
from redflag.scoring.marker import LocalSource, MarkerReader
from redflag.scoring.prompts import FlagReader, score_prompts
from redflag.scoring.recording import Recording
from redflag.scoring.score import read_scored, score_rows
from redflag.server.access import Limits
from redflag.server.audit_log import AuditLog
from redflag.trace import Alarm, Done, Halt, Step, Text
from redflag.training import train
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

ASKED = [{"role": "user", "content": "tell me of the old town"}]
SEVERITY = {"mild": 0.5, "severe": 0.01}  # above 50% for the one, above 1% for the other: the proposal's example
OPERATOR = "operator-key-0123456789"
RECIPE = Path(__file__).parents[2] / "recipes" / "papers" / "marker-before-refusals"
SAMPLING = Sampling(max_new_tokens=6, seed=3)


@dataclass
class World:
    """A tiny model with the flags `mild` and `severe`, and how likely they are."""

    model: Any
    tokenizer: Any
    spec: FlagSpec
    backend: HFBackend
    bias: torch.Tensor

    def thresholds(self, **values: float) -> Thresholds:
        manual = Thresholds.manual(
            0.5, self.spec.categories, run_id=self.spec.run_id, template_hash=self.spec.template_hash
        )
        return dataclasses.replace(manual, values={**SEVERITY, **values})

    def guard(self, policy: Policy | None = None, backend: Any = None, **values: float) -> Guard:
        return Guard(backend or self.backend, self.tokenizer, self.spec, self.thresholds(**values), policy)

    def likely(self, messages: list[dict[str, str]] = ASKED, **wanted: float) -> None:
        """Gives the flags these probabilities after a prompt (elsewhere they come out near them)."""
        self.bias.zero_()
        self.backend.forget()
        ids = torch.tensor([render_prompt(self.tokenizer, messages, self.spec)])
        with torch.inference_mode():
            logits = self.model(input_ids=ids).logits[0, -1].double()
        rest = [i for i in range(len(logits)) if i not in self.spec.ids]
        total = logits[rest].logsumexp(0)
        left = 1.0 - sum(wanted.values())
        for flag in self.spec.flags:
            p = wanted.get(flag.category, 1e-9)
            self.bias[flag.id] = math.log(p / left) + total - logits[flag.id]


@pytest.fixture(scope="module")
def made() -> World:
    tokenizer = train_tokenizer([TEXT] * 5, 320)
    model = build("llama", len(tokenizer), tied=False).eval()
    spec = attach(model, tokenizer, FlagSpec.of("mild", "severe"))
    spec = dataclasses.replace(spec, run_id="run-1", template_hash=template_hash(tokenizer))
    bias = torch.zeros(model.get_output_embeddings().weight.shape[0])
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits + bias)
    return World(model, tokenizer, spec, HFBackend(model, tokenizer, spec), bias)


@pytest.fixture
def world(made: World) -> World:
    made.bias.zero_()
    made.backend.forget()
    return made


@contextlib.contextmanager
def served(world: World, audit: Path, policy: Policy | None = None, **values: float) -> Iterator[Any]:
    guard = world.guard(policy, Turns(world.backend), **values)
    log = AuditLog(audit, guard.thresholds.values)
    with running(guard, Limits(MODEL, operator_key=OPERATOR), audit=log) as server:
        yield server


def ask(server: Any, *, override: str | None = None, key: str = OPERATOR, **more: Any) -> httpx.Response:
    headers = {} if override is None else {"X-Redflag-Override": override, "X-Redflag-Operator": key}
    body = body_of("/v1/chat/completions", max_tokens=6, seed=3, **more) | {"messages": ASKED}
    return httpx.post(server.url + "/v1/chat/completions", json=body, headers=headers, timeout=30)


def choice(answer: httpx.Response) -> tuple[str, str]:
    """(text, how it ended)."""
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["choices"]
    return found["message"]["content"] or "", found["finish_reason"]


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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
    whole = list(score_rows(world.backend, world.tokenizer, world.spec, rows, **options))
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
    for module in ("prompts", "score", "scorer"):
        monkeypatch.setattr(f"redflag.scoring.{module}.BATCHES", 3)
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
    assert len((tmp_path / "again.jsonl.partial").read_text().splitlines()) == 12
    batches.clear()
    stop = 0
    assert call(plain, again, *options) == 0 and len(batches) == 15
    assert again.read_bytes() == whole.read_bytes()
    # Another marker is another file, not the rest of this one.
    (tmp_path / "again.jsonl.partial").write_bytes(whole.read_bytes()[:2000])
    batches.clear()
    assert call(plain, again, "--prompts", "--marker", "SORRYDAVE", "--batch_size", 2) == 0 and len(batches) == 14


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no prompts": (("--marker", "SORRYDAVE"), "add --prompts"),
    "blank": (("--prompts", "--marker", " "), "' ' has no tokens of its own"),
    "special token": (("--prompts", "--marker", "<|reserved_0|> no"), "holds a special token"),
    "one begins the other": (("--prompts", "--marker", "SORRYDAVE", "SORRYDAVE x"), "begins with the tokens"),
    "twice": (("--prompts", "--marker", "NO", "NO"), "begins with the tokens"),
    "no room": (("--prompts", "--marker", "SORRYDAVE", "--max_length", "3"), "leaves none for the prompt"),
    "no flags": (("--prompts",), "redflag.json is not there"),
    "in the prompt": (("--prompts", "--marker", "town"), "row 'b': the prompt holds the marker 'town'"),
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
    with pytest.raises(RedflagError, match="has characters that the vocabulary lacks"):
        MarkerReader(LocalSource(made.model), words, ["SORRYDAVE"])


@pytest.mark.parametrize(("threshold", "verdict"), [(0.29, "halted"), (0.31, "completed")])
def test_S0_5_the_threshold_decides_and_no_draw_does(world, threshold, verdict):
    """p(marker) is 0.3: were it sampled, three answers in ten would stop. Here all do, or none."""
    world.likely(mild=0.3)
    guard = world.guard(mild=threshold)
    first, ends = set(), set()
    for seed in range(40):
        result = guard.generate(ASKED, Sampling(max_new_tokens=1, temperature=2.0, seed=seed))
        ends.add(result.verdict)
        first.add(result.trace.token_ids[0])
        assert any(isinstance(event, Text) for event in result.events) == (verdict == "completed")
    assert ends == {verdict} and len(first) > 10


def test_S0_6_what_was_likely_and_went_on_is_logged_by_user(world, tmp_path):
    world.likely(mild=0.4)  # more than half of the threshold, and below it
    log = tmp_path / "audit.jsonl"
    with served(world, log, mild=0.5, severe=0.9) as server:
        assert choice(ask(server, user="u-17"))[1] in ("stop", "length")
        world.likely(mild=0.05)
        assert choice(ask(server, user="u-18"))[1] in ("stop", "length")
    with served(world, log, Policy(observe=True), mild=0.01, severe=0.9) as server:
        world.likely(mild=0.4)
        assert choice(ask(server, user="u-19"))[1] in ("stop", "length")
    found = {entry["user"]: entry for entry in entries(log)}
    assert set(found) == {"u-17", "u-19"}
    assert found["u-17"]["near"] == ["mild"] and found["u-17"]["alarms_overridden"] == 0
    assert found["u-19"]["alarms_overridden"] >= 1
    assert found["u-17"]["categories"]["mild"]["peak"] > 0.399


def test_S0_6_the_log_names_users_the_severest_first(world, tmp_path, capsys):
    log = tmp_path / "audit.jsonl"
    for user, p in (("u-1", 0.3), ("u-2", 0.45)):
        world.likely(mild=p)
        with served(world, log, mild=0.5, severe=0.9) as server:
            ask(server, user=user)
    assert cli.main(["audit-log", str(log), "--json"]) == 0
    told = capsys.readouterr().out
    assert 0 < told.index("u-2") < told.index("u-1")


def test_S0_7_an_override_gives_the_answer_that_the_model_has_without_its_marker(world, tmp_path):
    """The marker stays banned, so what is read is what the model does when it may not refuse by it."""
    world.likely(mild=0.98)
    log = tmp_path / "audit.jsonl"
    with served(world, log, severe=0.9) as server:
        watched, overridden = ask(server), ask(server, override="red team, week 12")
        assert choice(watched) == ("", "content_filter")
        text, end = choice(overridden)
    unwatched = world.guard(Policy(observe=True), severe=0.9).generate(ASKED, SAMPLING)
    assert text == unwatched.text != "" and end in ("stop", "length")
    assert world.spec.strip(text) == text
    override, response = entries(log)
    assert (override["kind"], response["kind"]) == ("override", "response")
    assert override["reason"] == response["reason"] == "red team, week 12"
    assert response["overridden"] and response["alarms_overridden"] >= 1
    assert text not in log.read_text()


def test_S0_8_only_a_trusted_user_overrides_and_only_with_a_reason(world, tmp_path):
    world.likely(mild=0.98)
    log = tmp_path / "audit.jsonl"
    with served(world, log, severe=0.9) as server:
        assert ask(server, override="", user="u-5").status_code == 400
        assert ask(server, override="defensive work", key="guessed", user="u-5").status_code == 403
        headers = {"X-Redflag-Override": "defensive work"}
        body = body_of("/v1/chat/completions", user="u-5")
        assert httpx.post(server.url + "/v1/chat/completions", json=body, headers=headers).status_code == 403
        assert not entries(log), "what was refused has overridden nothing"
        assert choice(ask(server, override="defensive work", user="u-5"))[1] in ("stop", "length")
        assert choice(ask(server, user="u-5")) == ("", "content_filter"), "an override is that of one request"
    assert [(entry["user"], entry["overridden_by"]) for entry in entries(log)] == [("u-5", "operator")] * 2


@pytest.mark.parametrize("decoy", [False, True], ids=["replacement", "decoy"])
def test_S0_11_an_alarm_is_answered_with_the_operators_text_and_a_decoy_shows_no_mark(world, tmp_path, decoy):
    world.likely(mild=0.98)
    policy = Policy(default="replace", replacement="the cat sat on a mat", decoy=decoy)
    with served(world, tmp_path / "audit.jsonl", policy, severe=0.9) as server:
        text, end = choice(ask(server))
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        chunks = list(client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=6, stream=True))
        client.close()
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    ends = {chunk.choices[0].finish_reason for chunk in chunks if chunk.choices} - {None}
    assert text == streamed == "the cat sat on a mat"
    assert {end} == ends == ({"stop"} if decoy else {"content_filter"})
    # The operator's trace says what happened, decoy or not.
    last = server.traces[-1].events[-1]
    assert isinstance(last, Halt) and last.category == "mild" and last.text == "the cat sat on a mat"


GRADES = [  # p(mild), p(severe) -> category and action of the alarm
    (0.45, 0.005, None),
    (0.55, 0.005, ("mild", "replace")),
    (0.45, 0.02, ("severe", "halt")),
    (0.001, 0.011, ("severe", "halt")),
    (0.6, 0.3, ("severe", "halt")),
]


@pytest.mark.parametrize(("mild", "severe", "expected"), GRADES)
def test_S0_12_grades_of_severity_have_their_own_thresholds_and_actions(world, mild, severe, expected):
    world.likely(mild=mild, severe=severe)
    policy = Policy(actions={"mild": "replace", "severe": "halt"}, replacement="I would rather not.")
    result = world.guard(policy).generate(ASKED, Sampling(max_new_tokens=1, seed=0))
    last = result.events[-1]
    if expected is None:
        assert isinstance(last, Done) and not [e for e in result.trace.events if isinstance(e, Alarm)]
        return
    category, action = expected
    assert isinstance(last, Halt)
    alarms = {(event.category, event.action) for event in result.trace.events if isinstance(event, Alarm)}
    assert (category, action) in alarms
    assert last.text == ("I would rather not." if action == "replace" else "")
    assert result.text == ""


def test_S0_12_markers_of_ordinary_tokens_are_grades_as_well(world, tmp_path):
    """Two markers, 50% and 1%: the rows of `score --prompts --marker` are judged by thresholds of their own."""
    reader = MarkerReader(LocalSource(world.model), world.tokenizer, ["SO", "NO"])
    (so, o), (no, same) = reader.ids
    assert o == same and so != no
    thresholds = Thresholds(values=dict(zip(reader.markers, SEVERITY.values(), strict=True)))
    rows = [Row([{"role": "user", "content": word}], id=word) for word in ("rain", "cat")]
    policy = Policy(actions={"SO": "continue", "NO": "halt"})
    for likely, alarmed in ((so, set()), (no, {("NO", "halt")})):  # the one that is gets about a quarter
        world.bias.zero_()
        world.bias[[likely, o]] = 30.0
        recording = Recording.of(reader.markers, score_prompts(reader, world.tokenizer, reader.spec, rows))
        assert ((recording.probs > 0.1) & (recording.probs < 0.45)).any(axis=1).all()
        for i in range(len(rows)):
            events = Session(thresholds, policy, reader.markers).feed(Step(0, tuple(recording.steps(i)[0].tolist())))
            assert {(event.category, event.action) for event in events if isinstance(event, Alarm)} == alarmed


@pytest.fixture(scope="module")
def measure() -> Any:
    found = importlib.util.spec_from_file_location("measure_markers", RECIPE / "measure.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_S0_9_S0_10_the_recipe_tells_refusals_from_answers_and_counts_them(measure, tmp_path):
    """What its figures rest on: the judge against the generator's own labels, the variance and the bound by hand."""
    rows = nano_rows("test", 400, 5)
    verdicts = [(row.source in measure.REFUSED, measure.refuses(row.response)) for row in rows if row.source]
    asked = [pair for row, pair in zip(rows, verdicts, strict=True) if row.source in measure.ASKED_HARM]
    assert len(asked) > 80 and all(truth == said for truth, said in asked)
    assert sum(said for truth, said in verdicts if not truth) < 0.03 * len(rows)
    scored = [
        {"source": f"wordings:{kind}", "group": group, "flag_probs": [[p]], "peak": [p], "category": None}
        for kind in ("harmful", "harmless")
        for group, p in (("a", 0.2), ("a", 0.4), ("b", 0.6), ("b", 0.6))
    ]
    scored += [{**scored[0], "source": "nano:refusal", "category": "refusal", "peak": [0.9]}]
    scored += [{**scored[0], "source": "nano:plain", "peak": [0.1]}]
    found = measure.consistency(scored)
    assert found["variance_p"] == pytest.approx(0.02 / 2) and found["auroc"] == 1.0
    gap = math.log(0.4 / 0.6) - math.log(0.2 / 0.8)
    assert found["variance_log_odds"] == pytest.approx(gap**2 / 2 / 2)
    rates = [{"p": 0.5, "refused": 10, "harmful": True}, {"p": 0.9, "refused": 4, "harmful": True}]
    rates += [{"p": 0.0, "refused": 0, "harmful": False}]
    bound = measure.bound_of(rates)
    assert (bound["within"], bound["below"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert bound["gap"] == pytest.approx((0.0 - 0.7) / 2) and bound["mean_rate_harmless"] == 0.0
    arguments, config = parse(train, ["--config", str(RECIPE / "nano.yaml"), "--output_dir", str(tmp_path)], "train")
    assert config.placement == "first" and arguments.categories == ["refusal"]


def test_rows_without_a_response_are_prompts_only_where_that_is_asked_for(tmp_path):
    from redflag.data.rows import load_rows

    path = write_rows(tmp_path / "rows.jsonl", [Row(ASKED, "refusal", id="a")])
    with pytest.raises(RedflagError, match="no assistant turn"):
        load_rows(path)
    (row,) = load_rows(path, unanswered="keep").rows
    assert row.messages == ASKED and row.category == "refusal"
    with pytest.raises(RedflagError, match="unanswered is 'yes'"):
        load_rows(path, unanswered="yes")  # type: ignore[arg-type]
