"""What is kept of hidden states where not everything fits: little disk, the steps that matter, the same numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.lab.baselines import hidden, probes
from redflag.lab.baselines.hidden import View, drawn_steps, hidden_states, passing
from redflag.lab.baselines.probe_losses import swim
from redflag.lab.baselines.shared import BaselineContext
from redflag.stats.metrics import auroc


@pytest.fixture
def little(monkeypatch):
    """Room for about a third of what the rows' steps would take."""
    monkeypatch.setattr(hidden, "MOST_DISK", 30_000)


responses = st.lists(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.none() | st.integers(0, n - 1))), min_size=1
)


@given(responses, st.integers(1, 1500), st.integers(1, 20))
def test_drawn_steps_are_steps_and_no_more_than_there_is_room_for(responses, most, window):
    lengths, onsets = [length for length, _ in responses], [onset for _, onset in responses]
    steps = drawn_steps(lengths, onsets, most, window)
    assert sum(map(len, steps)) <= most
    candidates = [range(min(length, window) - 1, length) for length in lengths]
    for some, allowed in zip(steps, candidates, strict=True):
        assert set(some.tolist()) <= set(allowed) and (np.diff(some) > 0).all()
    if sum(map(len, candidates)) <= most:
        assert [some.tolist() for some in steps] == [list(allowed) for allowed in candidates]
    elif most >= len(lengths):  # Every response has some, and none has room that another lacks.
        counts = [len(some) for some in steps]
        assert min(counts) > 0
        cut = [count for count, allowed in zip(counts, candidates, strict=True) if count < len(allowed)]
        assert len(set(cut)) == 1 and max(counts) == cut[0]
    assert all(map(np.array_equal, steps, drawn_steps(lengths, onsets, most, window)))


def test_the_onset_is_kept_and_the_rest_is_spread():
    steps = drawn_steps([200] * 10, [120] * 10, 200)
    for some in steps:
        assert len(some) == 20
        near = [t for t in some.tolist() if 118 <= t < 128]
        assert near == list(range(118, 128))
        others = [t for t in some.tolist() if t not in near]
        assert others[0] < 40 and others[-1] > 180
        assert max(later - earlier for earlier, later in itertools.pairwise(others)) < 60


def test_means_behind_the_onset_lie_a_window_apart():
    for some in drawn_steps([200] * 10, [100] * 10, 60, window=16):
        assert len(some) == 6 and {115, 131, 147} <= set(some.tolist())
    (late,) = drawn_steps([30], [29], 4, window=16)
    assert len(late) == 4 and 29 in late


def test_what_is_kept_are_the_states_of_the_whole_at_those_steps_and_their_means(context, rows, monkeypatch):
    reads = context.read(rows)
    whole = hidden_states(context, reads)
    assert whole.view == View((0, 1, 2)) and len(whole.steps) == len(whole.states)
    monkeypatch.setattr(hidden, "MOST_DISK", 30_000)
    for view in (View((1, 2)), View((0, 1, 2), 4)):
        kept = hidden_states(context, reads, view)
        assert kept.view == view and 0 < len(kept.states) < len(whole.states)
        for i in range(len(reads)):
            of_row = whole.of([i], view.layers)
            steps = kept.steps[kept.starts[i] : kept.starts[i + 1]].tolist()
            expected = [of_row[max(0, t + 1 - view.window) : t + 1].mean(axis=0) for t in steps]
            assert kept.of([i], view.layers) == pytest.approx(np.array(expected), abs=2e-3)


def test_a_linear_probes_logit_of_means_is_the_mean_of_its_logits():
    states, net = torch.randn(1, 30, 8), torch.nn.Linear(8, 1)
    means = torch.stack([states[0, max(0, t - 3) : t + 1].mean(0) for t in range(30)])
    assert torch.allclose(net(means)[:, 0], swim(net(states)[..., 0], 4)[0], atol=1e-5)


def test_states_stay_within_the_room_and_those_of_other_rows_are_dropped(context, rows, little):
    views = [View((1, 2)), View((0, 1, 2), 4)]
    for some in (rows, rows[:40]):
        hidden.keep(context, context.read(some), views)
        files = list(context.folder.iterdir())
        assert len(files) == 2 and {path.suffix for path in files} == {".npy"}
        heads = 2 * 128  # of the file format
        assert 15_000 < sum(path.stat().st_size for path in files) - heads <= hidden.MOST_DISK


def test_views_of_the_same_rows_stay_as_long_as_there_is_room(context, rows, little):
    reads, names = context.read(rows), []
    for view in (View((1, 2)), View((0, 1, 2), 4), View((0, 1, 2), 8)):
        hidden.keep(context, reads, [view])
        names.append({path.name for path in context.folder.iterdir()})
    assert len(names[1]) == 2 and names[0] < names[1]
    assert len(names[2]) == 1 and not names[2] & names[1]


@pytest.mark.parametrize("make", [probes.last_layer_probe, probes.all_layer_probe, probes.mlp_probe, probes.token_head])
def test_a_probe_that_saw_some_steps_judges_every_step(context, rows, monkeypatch, make):
    monkeypatch.setattr(hidden, "MOST_DISK", 90_000)  # Less than every layer of every step takes.
    probe = make(context, fitting=probes.Fitting(passes=40, rows=8, learning_rate=0.03, validation=0.0))
    probe.fit(rows)
    kept = set(context.folder.iterdir())
    recording = probe.score(rows)
    assert "of 666 steps, drawn." in probe.what
    assert set(context.folder.iterdir()) == kept  # Rows that are scored leave nothing.
    assert recording.lengths.tolist() == [read.tokens for read in context.read(rows)]
    means = np.array([recording.steps(i)[:, 0].mean() for i in range(len(rows))])
    assert auroc(means, recording.harmful) > 0.75


def test_a_pass_gives_every_row_once_whatever_the_batches(origin, rows, tmp_path):
    found = []
    for size in (3, 8):
        context = BaselineContext(origin / "base", origin / "model", tmp_path, batch_size=size)
        reads = context.read(rows)
        states = dict(passing(context, reads, "reading"))
        assert sorted(states) == list(range(len(rows)))
        found.append(np.concatenate([states[i] for i in range(len(rows))]))
    assert found[0] == pytest.approx(found[1], abs=2e-3)


@pytest.mark.parametrize("spoil", [False, True])
def test_a_pass_that_was_killed_goes_on_unless_a_file_of_it_is_gone(context, rows, little, monkeypatch, spoil):
    monkeypatch.setattr(hidden, "_RECORDED_EVERY", 5)
    views, reads, real = [View((1, 2)), View((0, 1, 2), 4)], context.read(rows), hidden.last_layers
    hidden.keep(context, reads, views)
    expected = [hidden_states(context, reads, view).states.copy() for view in views]
    hidden.forget(context)
    assert not list(context.folder.iterdir())
    seen = []

    def killed(model, some):
        seen.extend(some)
        if len(seen) > 30:
            raise KeyboardInterrupt
        return real(model, some)

    monkeypatch.setattr(hidden, "last_layers", killed)
    with pytest.raises(KeyboardInterrupt):
        hidden.keep(context, reads, views)
    if spoil:
        next(context.folder.glob("*.partial")).unlink()
    seen.clear()
    monkeypatch.setattr(hidden, "last_layers", lambda model, some: (seen.extend(some), real(model, some))[1])
    hidden.keep(context, reads, views)
    assert (len(seen) == len(rows)) == spoil
    found = [hidden_states(context, reads, view).states for view in views]
    assert all(map(np.array_equal, found, expected)) and len(list(context.folder.iterdir())) == 2


def test_a_full_disk_is_named_before_the_model_is_read(context, rows, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden.os, "posix_fallocate", full)
    monkeypatch.setattr(hidden, "passing", lambda *_: pytest.fail("read"))
    with pytest.raises(RedflagError, match="another hidden_dir"):
        hidden_states(context, context.read(rows))
    assert not list(context.folder.iterdir())
