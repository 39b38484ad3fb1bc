"""Scoring: what is measured for which token, what is written, and what survives an interruption."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redflag.backends.load import load_flagged
from redflag.data.rows import Row, write_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.scoring.score import ScoreArguments, as_json, read_scored, renderable, run, score

RESPONSE = "The sea is wide and blue, and the harm begins here."


def test_scored_rows_hold_every_documented_key_in_the_order_of_the_input(
    tokenizer: Any, spec: FlagSpec, stub_scorer: Any, conversation: Any
) -> None:
    rows = [
        conversation(RESPONSE, id="long", group="g", source="s"),
        conversation("Blue.", "harm", id="short"),
        conversation("The sea is wide.", id="middle"),
    ]
    found = [as_json(item, tokenizer) for item in score(stub_scorer(), tokenizer, spec, rows, batch_size=1)]
    assert [row["id"] for row in found] == ["long", "short", "middle"]
    first = found[0]
    assert list(first) == [
        *(
            "id",
            "token_ids",
            "tokens",
            "flag_probs",
            "tail_probs",
            "peak",
            "onset",
            "category",
            "group",
            "source",
            "lang",
            "onset_source",
            "turns",
            "truncated",
            "prompt_truncated",
        )
    ]
    assert "".join(first["tokens"]) == RESPONSE and tokenizer.decode(first["token_ids"]) == RESPONSE
    assert len(first["flag_probs"]) == len(first["token_ids"]) and first["peak"] == [
        max(p for (p,) in first["flag_probs"])
    ]
    assert (first["group"], first["source"], first["category"], first["onset"]) == ("g", "s", None, None)
    assert found[1]["category"] == "harm" and found[1]["onset"] == 0


def test_onset_is_the_token_that_holds_the_onset_character(
    tokenizer: Any, spec: FlagSpec, stub_scorer: Any, conversation: Any
) -> None:
    start = RESPONSE.index("harm")
    for character in range(len(RESPONSE)):
        (item,) = score(stub_scorer(), tokenizer, spec, [conversation(RESPONSE, "harm", onset=character)])
        assert item.onset is not None
        before = tokenizer.decode(item.token_ids[: item.onset])
        upto = tokenizer.decode(item.token_ids[: item.onset + 1])
        assert len(before) <= character < len(upto)
        if character == start:
            assert RESPONSE[: len(before)].rstrip() == RESPONSE[:start].rstrip()


def test_a_prompt_too_long_loses_its_front_and_the_response_stays_whole(
    tokenizer: Any, spec: FlagSpec, stub_scorer: Any, conversation: Any
) -> None:
    scorer = stub_scorer()
    row = conversation("The sea is wide.", prompt="Tell me about the sea. " * 50)
    (whole,) = score(scorer, tokenizer, spec, [row])
    (cut,) = score(scorer, tokenizer, spec, [row], max_length=40)
    assert cut.token_ids == whole.token_ids and not cut.truncated and cut.prompt_truncated
    assert not whole.prompt_truncated
    prompt, response = scorer.calls[1][0]
    assert 30 < len(prompt) + len(response) <= 40
    full = scorer.calls[0][0][0]
    assert prompt[0] == full[0] and full[1 - len(prompt) :] == prompt[1:], "the turn's own beginning stays"


def test_a_response_too_long_loses_its_end_and_says_so(
    tokenizer: Any, spec: FlagSpec, stub_scorer: Any, conversation: Any
) -> None:
    row = conversation(RESPONSE, "harm", onset=RESPONSE.index("here"))
    (item,) = score(stub_scorer(), tokenizer, spec, [row], max_length=6)
    assert item.truncated and len(item.token_ids) == 5
    assert item.onset is not None and item.onset >= 5, "a row cut before its onset must not look harmful"


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.5, math.inf])
def test_what_is_no_probability_is_refused_by_row_and_token(
    tokenizer: Any, spec: FlagSpec, bad: float, stub_scorer: Any, conversation: Any
) -> None:
    class Broken(stub_scorer):
        def score(self, pairs: Any, *, batch_size: int) -> list[Any]:
            result = super().score(pairs, batch_size=batch_size)
            result[1][2, 0] = bad
            return result

    with pytest.raises(RedflagError, match=r"row 'second': the model gave .* at response token 2"):
        list(score(Broken(), tokenizer, spec, [conversation(RESPONSE), conversation(RESPONSE, id="second")]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, r"batch_size must be .*\(got 0"),
        ({"max_length": 1}, r"max_length must be .*\(got 1"),
        ({"max_length": 9999}, "at most 512"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    verb: Verb, change: dict[str, int], message: str, stub_scorer: Any
) -> None:
    with pytest.raises(RedflagError, match=message):
        verb(stub_scorer(), **change)


class Verb:
    """Runs the verb with a stub in the model's place."""

    def __init__(self, monkeypatch: Any, folder: Path, tokenizer: Any, spec: FlagSpec, conversation: Any) -> None:
        self.monkeypatch, self.tokenizer, self.spec = monkeypatch, tokenizer, spec
        self.rows = folder / "rows.jsonl"
        self.output = folder / "out" / "scored.jsonl"
        self.parts = folder / "out" / "scored.jsonl.parts"
        self.write([conversation("The sea is wide. " * (i % 4 + 1), id=str(i)) for i in range(30)])

    def there(self) -> int:
        """Rows that an interrupted run has left."""
        return sum(path.read_bytes().count(b"\n") for path in self.parts.glob("?????-*"))

    def write(self, rows: list[Row]) -> None:
        write_rows(self.rows, rows)

    def __call__(self, scorer: Any, **change: Any) -> None:
        self.monkeypatch.setattr("redflag.backends.load.load_flagged", lambda *_: (scorer, self.tokenizer, self.spec))
        run(
            ScoreArguments(
                **{"model": "m", "input": str(self.rows), "output": str(self.output), "batch_size": 1} | change
            )
        )


@pytest.fixture
def verb(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any, spec: FlagSpec, conversation: Callable[..., Row]
) -> Verb:
    return Verb(monkeypatch, tmp_path, tokenizer, spec, conversation)


@pytest.mark.parametrize("half_line", [False, True])
def test_an_interrupted_run_is_continued_and_gives_the_same_file(
    verb: Verb, half_line: bool, capsys: pytest.CaptureFixture[str], stub_scorer: Any
) -> None:
    verb(stub_scorer())
    uninterrupted = verb.output.read_bytes()
    verb.output.unlink()

    with pytest.raises(KeyboardInterrupt):
        verb(stub_scorer(fail_at=2))
    assert not verb.output.exists() and verb.there() == 16
    if half_line:
        (verb.parts / ".00002-x.1.2.tmp").write_bytes(b'{"id": "16", "tok')
    second = stub_scorer()
    verb(second)
    assert verb.output.read_bytes() == uninterrupted
    assert sum(len(call) for call in second.calls) == 14, "what was there was scored again"
    assert "16 of 30 rows are there" in capsys.readouterr().err
    assert [path.name for path in verb.output.parent.iterdir()] == ["scored.jsonl"], "something was left behind"
    assert [row["id"] for row in read_scored(verb.output)] == [str(i) for i in range(30)]


@pytest.mark.parametrize("change", ["rows", "run", "max_length"])
def test_what_another_run_has_left_is_not_continued(
    verb: Verb, change: str, capsys: pytest.CaptureFixture[str], stub_scorer: Any, conversation: Any
) -> None:
    with pytest.raises(KeyboardInterrupt):
        verb(stub_scorer(fail_at=1))
    more = {}
    if change == "rows":
        verb.write([conversation("Blue and wide.", id=str(i)) for i in range(30)])
    elif change == "run":
        verb.spec = FlagSpec(flags=verb.spec.flags, run_id="run-2")
    else:
        more["max_length"] = 30
    scorer = stub_scorer()
    verb(scorer, **more)
    assert sum(len(call) for call in scorer.calls) == 30
    assert "starting over" in capsys.readouterr().err
    assert len(read_scored(verb.output)) == 30


def test_a_full_disk_is_one_sentence_and_loses_nothing_that_was_written(
    verb: Verb, monkeypatch: pytest.MonkeyPatch, stub_scorer: Any
) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        if verb.there():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RedflagError, match=r"scored\.jsonl\.parts/00001.*No space left on device.*repeat"):
            verb(stub_scorer())
    assert not verb.output.exists()
    scorer = stub_scorer()
    verb(scorer)
    assert sum(len(call) for call in scorer.calls) == 22 and len(read_scored(verb.output)) == 30


def test_an_older_result_stays_until_the_new_one_is_whole(verb: Verb, stub_scorer: Any, conversation: Any) -> None:
    verb(stub_scorer())
    before = verb.output.read_bytes()
    verb.write([conversation("Blue and wide.", id=str(i)) for i in range(30)])
    with pytest.raises(KeyboardInterrupt):
        verb(stub_scorer(fail_at=1))
    assert verb.output.read_bytes() == before


def test_skipped_rows_are_named_on_stderr(verb: Verb, capsys: pytest.CaptureFixture[str], stub_scorer: Any) -> None:
    with verb.rows.open("a") as file:
        file.write("not json\n")
    with pytest.raises(RedflagError, match=r"rows\.jsonl:31"):
        verb(stub_scorer())
    verb(stub_scorer(), on_bad_row="skip")
    assert "rows.jsonl:31" in capsys.readouterr().err and len(read_scored(verb.output)) == 30


@pytest.mark.parametrize("content", ["{}", "not json", "[1]", '{"id": "x", "flag_probs": []}'])
def test_reading_a_file_that_was_not_scored_names_the_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scored.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(RedflagError, match=r"scored\.jsonl:1 must be a scored row"):
        read_scored(path)
    with pytest.raises(RedflagError, match="redflag score"):
        read_scored(tmp_path / "missing.jsonl")


def test_probabilities_survive_the_file_bit_by_bit(verb: Verb, stub_scorer: Any) -> None:
    verb(stub_scorer())
    row = read_scored(verb.output)[0]
    direct = stub_scorer().score([([1], row["token_ids"])], batch_size=1)[0]
    assert np.array_equal(np.array(row["flag_probs"]), direct.astype(np.float64))
    assert json.dumps(row)


def test_the_steps_that_end_the_turn_are_measured_and_stand_apart(
    tokenizer: Any, spec: FlagSpec, stub_scorer: Any, conversation: Any
) -> None:
    (item,) = score(stub_scorer(), tokenizer, spec, [conversation("The sea is wide.")])
    end = tokenizer.eos_token_id
    assert tokenizer.decode(item.token_ids) == "The sea is wide." and len(item.tail_probs) == 1
    assert item.tail_probs[0, 0] == np.float32((end * 7) % 100 / 100)
    assert np.array_equal(item.judged, [*item.flag_probs, *item.tail_probs])
    # No room for the end: the response is whole all the same.
    (tight,) = score(stub_scorer(), tokenizer, spec, [item.row], max_length=len(item.token_ids) + 1)
    assert not tight.truncated and tight.token_ids == item.token_ids and len(tight.tail_probs) == 0


def test_rows_that_cannot_be_rendered_are_named_or_left_out(
    tokenizer: Any, spec: FlagSpec, stub_scorer: Any, conversation: Any
) -> None:
    rows = [conversation("The sea is wide."), conversation("", id="empty")]
    with pytest.raises(RedflagError, match="row 'empty': the response must not be empty"):
        list(score(stub_scorer(), tokenizer, spec, rows))
    sound, bad = renderable(tokenizer, spec, rows)
    assert sound == rows[:1] and "row 'empty'" in bad[0]


def test_the_verb_gives_the_probabilities_of_a_plain_forward_pass(
    model_folder: Path, tmp_path: Path, conversation: Any
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from redflag.prompt import render_response

    rows = [conversation("The sea is wide. " * (1 + i % 3), "harm" if i % 2 else None, id=str(i)) for i in range(7)]
    write_rows(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "scored.jsonl"
    run(ScoreArguments(model=str(model_folder), input=str(tmp_path / "rows.jsonl"), output=str(output), batch_size=3))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    spec = FlagSpec.load(model_folder)
    for row, scored in zip(rows, read_scored(output), strict=True):
        rendered = render_response(tokenizer, row.messages, spec)
        ids = [*rendered.prompt_ids, *rendered.response_ids, *rendered.tail_ids]
        with torch.no_grad():
            probs = model(torch.tensor([ids])).logits[0].softmax(-1)[:, list(spec.ids)].numpy()
        first = len(rendered.prompt_ids) - 1
        assert scored["token_ids"] == rendered.response_ids and scored["id"] == row.id
        assert np.allclose([*scored["flag_probs"], *scored["tail_probs"]], probs[first:-1], rtol=1e-4, atol=1e-8)
        assert scored["onset"] == (0 if row.harmful else None)


def test_a_model_whose_template_was_changed_is_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(RedflagError, match="prompt template"):
        load_flagged(str(folder))
    with pytest.raises(RedflagError, match="redflag train"):
        load_flagged(str(tmp_path))
    (folder / "config.json").unlink()
    with pytest.raises(RedflagError, match="redflag train"):
        load_flagged(str(folder))
