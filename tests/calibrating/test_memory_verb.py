"""`redflag calibrate --memory` on conversations, and the folder that it leaves, from a model's own numbers."""

from __future__ import annotations

import shutil

import pytest
from tiny import WORDS

from redflag.backends import Sampling
from redflag.backends.load import load_flagged
from redflag.calibrating.calibrate import CalibrateArguments, calibrate_model
from redflag.data.rows import Row, load_rows, write_rows
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.guard.options import GuardOptions
from redflag.prompt import render_response
from redflag.scoring.earlier import score_earlier, with_histories
from redflag.watching.memory import Memory
from redflag.watching.policy import Policy


@pytest.fixture
def folder(origin, tmp_path):
    """A flagged model, and conversations of one to three answers."""
    shutil.copytree(origin / "model", tmp_path / "model")
    rows = []
    for i in range(40):
        turns = []
        for turn in range(1 + i % 3):
            turns.append({"role": "user", "content": f"tell {WORDS[(i + turn) % 9]}"})
            turns.append({"role": "assistant", "content": " ".join(WORDS[(i * 3 + turn + j) % 20] for j in range(4))})
        rows.append(Row(turns, category="harm" if i % 8 == 7 else None, id=str(i), group=str(i)))
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path


def calibrated(folder, **options):
    arguments = {
        "model": str(folder / "model"),
        "input": str(folder / "rows.jsonl"),
        "target_fpr": 0.2,
        "device": "cpu",
    }
    return calibrate_model(CalibrateArguments(**{**arguments, **options})).thresholds


def test_a_folder_calibrated_with_memory_is_used_with_it_and_with_no_other(folder):
    found = calibrated(folder, memory=0.5, memory_decay=0.25)
    assert found.memory == Memory(0.5, 0.25) and found.guarantee == "expected"
    guard = Guard.from_pretrained(folder / "model", Policy(observe=True), device="cpu")
    assert guard.thresholds.memory == found.memory
    turns = [*load_rows(folder / "rows.jsonl").rows[2].messages, {"role": "user", "content": "and then"}]
    result = guard.generate(turns, Sampling(max_new_tokens=4, temperature=0.0))
    assert result.verdict == "completed" and len(result.trace.meta["earlier"]) == 3
    options = GuardOptions(model=str(folder / "model"), memory=0.25, device="cpu")
    with pytest.raises(RedflagError, match="memory must be Memory"):
        options.open_guard(Policy(), None)
    calibrated(folder)
    with pytest.raises(RedflagError, match="memory must be off"):
        options.open_guard(Policy(), None)


def test_earlier_answers_are_measured_as_they_were_written(folder):
    backend, tokenizer, spec = load_flagged(folder / "model", "cpu")
    rows, histories = with_histories(tokenizer, spec, load_rows(folder / "rows.jsonl").rows, None)
    assert [len(spans) for _, spans in histories] == [i % 3 for i in range(40)]
    for row, found in zip(rows[:6], score_earlier(backend, histories[:6], 4), strict=True):
        for number, probs in enumerate(found):
            written = render_response(tokenizer, row.messages[: 2 * number + 2], spec)
            ids = written.response_ids + written.tail_ids
            [expected] = backend.score([(written.prompt_ids, ids)])
            assert probs.shape == expected.shape and probs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": 0.5, "aggregation": "cusum"}, "memory must be off for the monitor 'cusum'"),
        ({"memory": 0.5, "prompts": True}, "memory must be off with prompts"),
        ({"memory": -1.0}, "memory weight must be"),
        ({"memory_decay": 0.1}, "memory must come with memory_decay"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_model_runs(folder, options, said):
    shutil.rmtree(folder / "model")
    (folder / "model").mkdir()
    with pytest.raises(RedflagError, match=said):
        calibrated(folder, **options)


def test_weight_0_is_no_memory(folder):
    assert calibrated(folder, memory=0.0) == calibrated(folder)


def test_rows_that_do_not_fit_are_left_out_with_memory(folder, capsys):
    calibrated(folder, memory=0.5, max_length=30)
    assert "did not fit the context and are left out" in capsys.readouterr().err
