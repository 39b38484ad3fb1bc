"""What was recorded is not recorded again: after a repeat, a kill, other rows, a damaged file."""

import json

import numpy as np
import pytest

from redflag.errors import RedflagError
from redflag.lab.baselines import Cost, hidden, probes
from redflag.lab.baselines.hidden import hidden_states
from redflag.lab.baselines.probes import Fitting
from redflag.lab.baselines.record_baselines import record_baselines
from redflag.lab.baselines.shared import BaselineContext

NAMES = ["tfidf", "last-layer probe", "mlp probe"]


class Stub:
    """Takes the place of a baseline: counts, and fails where it is told to."""

    calls: list[str]
    fail: str | None

    def __init__(self, name, context):
        self.name, self.context, self.what = name, context, f"{name}."

    def fit(self, train):
        Stub.calls.append(self.name)
        if Stub.fail == self.name:
            raise KeyboardInterrupt

    def score(self, rows):
        reads = self.context.read(rows)
        return self.context.record(reads, [np.full(len(r.judged_ids), 0.5, np.float32) for r in reads], self.name)

    def cost(self):
        return Cost(1.0, 2.0, "none")


@pytest.fixture
def stubs(monkeypatch):
    Stub.calls, Stub.fail = [], None
    monkeypatch.setattr(
        "redflag.lab.baselines.record_baselines._build", lambda name, context, options, folder: Stub(name, context)
    )
    return Stub


@pytest.fixture
def record(origin, rows, tmp_path):
    def call(names=NAMES, *, test=None, calibration=rows[30:40], **options):
        said: list[str] = []
        folders = origin / "base", origin / "model"
        test = rows[:10] if test is None else test
        found = record_baselines(names, *folders, rows, test, calibration, tmp_path / "out", log=said.append, **options)
        return found, said

    return call


def test_a_repeat_records_nothing(stubs, record):
    first, _ = record()
    again, said = record()
    assert Stub.calls == NAMES and all("there already" in line for line in said)
    for name in NAMES:
        assert np.array_equal(again[name].test.probs, first[name].test.probs)
        assert again[name].calibration.columns == first[name].calibration.columns
        assert again[name][2:] == first[name][2:]


def test_after_a_kill_only_what_was_not_finished_is_recorded(stubs, record):
    Stub.fail = "last-layer probe"
    with pytest.raises(KeyboardInterrupt):
        record()
    Stub.fail, Stub.calls = None, []
    found, _ = record()
    assert Stub.calls == NAMES[1:] and list(found) == NAMES


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"max_length": 64}, {"hidden_from": "flagged"}, {"options": {"tfidf": {"c": 1.0}}}, {"test": 5}],
)
def test_what_was_made_from_other_things_is_made_anew(stubs, record, rows, change):
    record(["tfidf"])
    if "test" in change:
        change = {"test": rows[:5]}
    record(["tfidf"], **change)
    assert Stub.calls == ["tfidf", "tfidf"]


@pytest.mark.parametrize("spoilt", ["test.parquet", "calibration.parquet", "baseline.json"])
def test_a_damaged_file_is_made_anew(stubs, record, tmp_path, spoilt):
    record(["tfidf"])
    path = tmp_path / "out" / "tfidf" / spoilt
    path.write_bytes(path.read_bytes()[:20])
    found, _ = record(["tfidf"])
    assert Stub.calls == ["tfidf", "tfidf"] and len(found["tfidf"].test) == 10


def test_probes_share_one_pass_over_each_file_of_rows_and_leave_no_states_behind(record, tmp_path, monkeypatch):
    passes = []
    real = hidden.passing
    for module in (hidden, probes):
        monkeypatch.setattr(module, "passing", lambda *args: (passes.append(1), real(*args))[1])
    fitting = {"fitting": Fitting(passes=1)}
    names = ["last-layer probe", "tfidf", "all-layer probe", "mlp probe"]
    found, _ = record(names, options={name: fitting for name in names if name != "tfidf"})
    # Training, test and calibration rows.
    assert len(passes) == 3 and list(found) == names
    assert not list((tmp_path / "out" / "hidden").iterdir())
    more = [*names[2:], "token head"]
    for seed, expected in ((0, 6), (1, 8)):  # Another seed is fitted on the same states.
        record(more, hidden_dir=tmp_path / "kept", seed=seed, options={name: fitting for name in more})
        assert len(passes) == expected and len(list((tmp_path / "kept").iterdir())) == 1


def test_hidden_states_are_those_of_the_whole_model(context, rows):
    """Each step's states are those at the position that predicts its token, of every layer."""
    import torch

    from redflag.backends.load import read_model

    reads = context.read(rows[:9])
    found = hidden_states(context, reads)
    model, _ = read_model(context.base, torch.float32)
    for i, read in enumerate(reads):
        ids = torch.tensor([read.prompt_ids + read.judged_ids])
        with torch.inference_mode():
            layers = torch.stack(model(ids, output_hidden_states=True).hidden_states, dim=2)[0]
        expected = layers[len(read.prompt_ids) - 1 : -1].numpy()
        states = found.states[found.starts[i] : found.starts[i + 1]]
        assert states.shape == expected.shape == (len(read.judged_ids), 3, 32)
        assert states == pytest.approx(expected, abs=2e-3)


def test_rows_are_read_alike_with_and_without_the_flagged_model(origin, rows, tmp_path):
    with_flags, without = (BaselineContext(origin / "base", model, tmp_path) for model in (origin / "model", None))
    assert with_flags.read(rows) == without.read(rows)


def test_a_token_head_may_be_tuned_with_its_model(record):
    options = {"token head": {"backbone": "tuned", "tuning": {"rows": 16}, "most_rows": 12}}
    found, _ = record(["token head"], options=options, calibration=[])
    assert "at most 12" in found["token head"].what and found["token head"].cost.flops_per_token > 1000


def test_a_guard_without_weights_is_left_out_and_that_is_said(record):
    found, said = record(["stream guard"])
    assert found == {} and "left out" in said[0]


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["perplexity"], {}, "baselines must be among .*got 'perplexity'"),
        (["tfidf"], {"probe": {}}, "baselines must be among .*got 'probe'"),
        (["tfidf"], {"tfidf": {"depth": 3}}, "invalid options of the baseline"),
        (["token head"], {"token head": {"backbone": "thawed"}}, "frozen or tuned"),
        (["mlp probe"], {"mlp probe": {"fitting": {"epochs": 3}}}, "invalid options of the baseline"),
        (["stream guard"], {"stream guard": {"path": "/nowhere"}}, "must be a local folder"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(record, names, options, words):
    with pytest.raises(RedflagError, match=words):
        record(names, options=options)


def test_what_is_kept_says_what_it_is(stubs, record, tmp_path):
    record(["tfidf"])
    kept = json.loads((tmp_path / "out" / "tfidf" / "baseline.json").read_text())
    assert kept["format"] == 1 and kept["what"] == "tfidf." and kept["cost"]["flops_per_token"] == 2.0
