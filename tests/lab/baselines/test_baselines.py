"""Every baseline: judged before each token from those before it, in the rows' order, the same for the same seed."""

import dataclasses

import numpy as np
import pytest
from stand_in_guard import InWords, Streaming

from redflag.backends.load import load_flagged
from redflag.errors import RedflagError
from redflag.lab.baselines import probes, refusing, trained
from redflag.lab.baselines.hidden import hidden_states
from redflag.lab.baselines.probe_data import balance_of, onset_of
from redflag.lab.baselines.stream_guard import StreamGuard
from redflag.lab.baselines.tfidf import TfidfBaseline
from redflag.lab.baselines.token_classifier import TokenClassifier
from redflag.lab.baselines.tuning import Tuning
from redflag.scoring.recording import Recording
from redflag.scoring.score import as_recorded, score

FITTING = probes.Fitting(passes=2, rows=8, learning_rate=0.05)
SOLVED = probes.Fitting(lbfgs=200, passes=0, l2=1e-2)
TUNING = Tuning(passes=2, rows=8, learning_rate=3e-3)
SETTINGS = {"learning_rate": 1e-2, "num_train_epochs": 2}
AT_FIRST = ("fixed position", "refusal tokens")


class WholeWords(InWords):
    """A guard with another tokenizer than the responses'."""


def make(name, context, folder):
    if name == "fixed position":
        return trained.fixed_position(context, folder, settings=SETTINGS)
    if name == "refusal tokens":
        return refusing.refusal_tokens(context, folder, settings=SETTINGS)
    if name in ("deep alignment", "refusal at every position"):
        builder = refusing.deep_alignment if name == "deep alignment" else refusing.refusal_everywhere
        return builder(context, folder, tuning=TUNING)
    if name == "stream guard":
        return StreamGuard(context, Streaming(), context.tokenizer, "a stand-in")
    if name == "stream guard, other tokenizer":
        from transformers import AutoTokenizer

        other = AutoTokenizer.from_pretrained(context.base)
        other.add_tokens(["on the"])
        return StreamGuard(context, WholeWords(), other, "a stand-in")
    builders = {
        "token classifier": lambda: TokenClassifier(context, tuning=TUNING),
        "tfidf": lambda: TfidfBaseline(context, min_df=1),
        "last-layer probe": lambda: probes.last_layer_probe(context, fitting=SOLVED),
        "all-layer probe": lambda: probes.all_layer_probe(context, window=4, fitting=FITTING),
        "token head": lambda: probes.token_head(context, fitting=dataclasses.replace(FITTING, lbfgs=4)),
        "mlp probe": lambda: probes.mlp_probe(context, width=16, fitting=FITTING),
    }
    return builders[name]()


ALL = (
    "tfidf",
    "last-layer probe",
    "all-layer probe",
    "token head",
    "token classifier",
    "mlp probe",
    "fixed position",
    "refusal tokens",
    "deep alignment",
    "refusal at every position",
    "stream guard",
    "stream guard, other tokenizer",
)


@pytest.mark.parametrize("name", ALL)
def test_no_score_depends_on_its_own_token_or_a_later_one(name, context, rows, parting, tmp_path):
    baseline = make(name, context, tmp_path / "model")
    baseline.fit(rows)
    moved = 0
    for pair in parting:
        recording = baseline.score(list(pair))
        one, other = (recording.steps(i)[:, 0] for i in (0, 1))
        ids = np.split(recording.token_ids, [recording.lengths[0]])
        length = min(map(len, ids))
        differs = next(i for i in range(length) if ids[0][i] != ids[1][i])
        assert one[: differs + 1] == pytest.approx(other[: differs + 1], abs=1e-6), (name, differs)
        moved += not np.allclose(one[differs + 1 : length], other[differs + 1 : length], atol=1e-6)
    # They can see what parts the two, or the test would show nothing.
    assert bool(moved) != (name in AT_FIRST)


@pytest.mark.parametrize("name", ALL)
def test_the_recording_is_over_the_rows_and_steps_of_the_flags(name, context, rows, origin, tmp_path):
    baseline = make(name, context, tmp_path / "model")
    baseline.fit(rows)
    some = [rows[i] for i in (7, 3, 30, 4, 12)]
    recording = baseline.score(some)
    scorer, tokenizer, spec = load_flagged(origin / "model", None)
    flags = Recording.of(spec.categories, map(as_recorded, score(scorer, tokenizer, spec, some)))
    assert recording.categories == ("harm",)
    assert recording.columns == flags.columns
    for ours, theirs in ((recording.starts, flags.starts), (recording.lengths, flags.lengths)):
        assert ours.tolist() == theirs.tolist()
    assert recording.token_ids.tolist() == flags.token_ids.tolist()
    assert ((recording.probs >= 0) & (recording.probs <= 1)).all()
    if name in AT_FIRST:  # What is decided there holds for the whole response.
        assert all(len(set(recording.steps(i)[:, 0].tolist())) == 1 for i in range(5))
    # One at a time: no row's score depends on the rows beside it.
    alone = np.concatenate([baseline.score([row]).probs for row in some])
    assert alone == pytest.approx(recording.probs, abs=1e-6)
    assert baseline.what.endswith(".") and len(baseline.what) > 40
    cost = baseline.cost()
    assert cost.microseconds_per_token > 0 and cost.flops_per_token >= 0 and cost.note


@pytest.mark.parametrize("name", ("tfidf", "all-layer probe", "token head", "mlp probe", "refusal at every position"))
def test_the_same_rows_and_seed_give_the_same_scores(name, context, rows, tmp_path):
    recordings = []
    for run in (1, 2):
        baseline = make(name, context, tmp_path / f"model{run}")
        baseline.fit(rows)
        recordings.append(baseline.score(rows))
    assert np.array_equal(recordings[0].probs, recordings[1].probs)


@pytest.mark.parametrize("settings", [{"learning_rate": -1.0}, {"learn_rate": 1e-2}, {"placement": "nowhere"}])
def test_settings_that_no_training_takes_are_named(settings, context, rows, tmp_path):
    (name,) = settings
    with pytest.raises(RedflagError, match=f"options of `redflag train` .*{name}"):
        trained.fixed_position(context, tmp_path / "model", settings=settings).fit(rows)


@pytest.mark.parametrize("name", ("last-layer probe", "tfidf"))
def test_rows_of_one_class_are_refused(name, context, rows, tmp_path):
    with pytest.raises(RedflagError, match=name):
        make(name, context, tmp_path).fit([row for row in rows if row.harmful])


def test_the_linear_probe_is_the_logistic_regression_of_scikit_learn(context, rows, monkeypatch):
    from sklearn.linear_model import LogisticRegression

    probe = probes.last_layer_probe(context, fitting=SOLVED)
    probe.fit(rows)
    reads = context.read(rows)
    hidden = hidden_states(context, reads)
    mean, scale = (value.numpy() for value in probe._scale)
    inputs = (hidden.of(range(len(reads)), probe.layers) - mean) * scale
    onsets = [onset_of(read, "onset") for read in reads]
    labels = [i >= onset for read, onset in zip(reads, onsets, strict=True) for i in range(len(read.judged_ids))]
    weights = np.where(labels, *balance_of(reads, "onset", hidden)[::-1])
    model = LogisticRegression(C=1 / (2 * SOLVED.l2 * len(labels)), tol=1e-8, max_iter=2000)
    model.fit(inputs, labels, sample_weight=weights)
    weight, bias = (value.detach().numpy() for value in probe.net.parameters())
    assert weight == pytest.approx(model.coef_, abs=3e-3)
    assert bias == pytest.approx(model.intercept_, abs=3e-3)
    # The same where the rows do not stay in memory.
    monkeypatch.setattr(probes, "_IN_MEMORY", 0)
    again = probes.last_layer_probe(context, fitting=SOLVED)
    again.fit(rows)
    assert np.array_equal(again.net.weight.detach(), weight)
