"""Forecasts as soft targets: where they stand, what they weigh, and that forecasts of 0 and 1 are hard labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from terms import check_loss, moved_trainer, row, settings_of, split_log_probs, world
from tiny import make_rows

from redflag.errors import RedflagError
from redflag.flags import Flag, FlagSpec
from redflag.training import loss as loss_module
from redflag.training.encode import IGNORE, Example, PlacementConfig, build_dataset, encode, place
from redflag.training.forecasts import spread
from redflag.training.loss import Forecast, Head, flag_and_keep_loss

TWO = FlagSpec((Flag("weapons", "<f>", id=90), Flag("fraud", "<g>", id=91)))
X, N = IGNORE, -1.0


# Where targets stand.


@pytest.mark.parametrize(
    ("how", "points", "expected"),
    [
        ("hold", [(0, 0.2), (2, 0.6)], [0.2, 0.2, 0.6, 0.6, 0.6]),
        ("linear", [(0, 0.2), (2, 0.6)], [0.2, 0.4, 0.6, 0.6, 0.6]),
        ("points", [(0, 0.2), (2, 0.6)], [0.2, N, 0.6, N, N]),
        ("hold", [(3, 0.5)], [N, N, N, 0.5, 0.5]),
        ("linear", [(3, 0.0), (7, 1.0)], [N, N, N, 0.0, 0.25]),  # the second lies behind the end
        ("hold", [(3, 0.0), (7, 1.0)], [N, N, N, 0.0, 0.0]),
        ("points", [(7, 1.0)], [N] * 5),
        ("hold", [(9, 1.0)], [N] * 5),
    ],
)
def test_targets_between_forecasts(how, points, expected):
    assert spread(points, 5, how) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(
    points=st.dictionaries(st.integers(0, 12), st.floats(0, 1), min_size=1),
    count=st.integers(1, 10),
    how=st.sampled_from(["hold", "linear", "points"]),
)
def test_targets_lie_between_the_forecasts_around_them_and_meet_them(points, count, how):
    found = spread(sorted(points.items()), count, how)
    for token, target in enumerate(found):
        before = [harm for place, harm in sorted(points.items()) if place <= token]
        after = [harm for place, harm in sorted(points.items()) if place > token]
        if token in points:
            assert target == points[token]
        elif not before or how == "points":
            assert target == N
        else:
            ends = [before[-1], *(after[:1] if how == "linear" else [])]
            assert min(ends) - 1e-9 <= target <= max(ends) + 1e-9


def example(onset=0, flag_class=0, **more):
    """Two prompt tokens and five of a response, with forecasts of 0.25 at the first and 0.75 at the third."""
    points = [[0.0, 0.25], [2.0, 0.75]]
    ids = [1, 2, 11, 12, 13, 14, 15]
    one = Example(row=0, input_ids=ids, response_start=2, onset=onset, flag_class=flag_class)
    return {**one, "forecast": points, "forecast_class": flag_class or 1, **more}


@pytest.mark.parametrize(
    ("config", "more", "flag_labels", "forecast"),
    [
        (dict(), {}, [0, 0, 0, 0, 0], [0.25, 0.25, 0.75, 0.75, 0.75]),
        (dict(), dict(onset=3, flag_class=2), [0, 0, 0, 2, 2], [0.25, 0.25, 0.75, N, N]),  # hard from the onset on
        (dict(), dict(onset=0, flag_class=1), [1, 1, 1, 1, 1], [N] * 5),
        (dict(forecasts="points"), dict(onset=3, flag_class=1), [0, X, 0, 1, 1], [0.25, N, 0.75, N, N]),
        (dict(forecasts="linear"), dict(onset=3, flag_class=1), [0, 0, 0, 1, 1], [0.25, 0.5, 0.75, N, N]),
        (dict(soft_margin=1), dict(onset=3, flag_class=1), [0, 0, X, 1, 1], [0.25, 0.25, N, N, N]),
        (dict(placement="first"), {}, [0, X, X, X, X], [0.25, N, N, N, N]),
        (dict(placement="first"), dict(onset=3, flag_class=1), [1, X, X, X, X], [N] * 5),
        (dict(), dict(prefill=2), [X, X, 0, 0, 0], [N, N, 0.75, 0.75, 0.75]),
        (dict(placement="insert"), dict(onset=4, flag_class=1), [0, 0, 0, 0, 1, X], [0.25, 0.25, 0.75, 0.75, N, N]),
        (dict(placement="until"), dict(onset=4, flag_class=1), [0, 0, 0, 0, 1, X], [0.25, 0.25, 0.75, 0.75, N, N]),
    ],
    ids=str,
)
def test_a_forecast_softens_class_none_and_nothing_else(config, more, flag_labels, forecast):
    placed = place(example(**more), PlacementConfig(**{"placement": "dense", "forecasts": "hold", **config}), TWO)
    assert placed.flag_labels == [X, X, *flag_labels]
    assert placed.forecast == [N, N, *forecast]
    off = place(example(**more), PlacementConfig(**{"placement": "dense", **config, "forecasts": "off"}), TWO)
    assert off.forecast is None


def test_a_flag_to_read_past_has_the_forecast_of_the_moment_before_it():
    for epoch in range(8):
        config = PlacementConfig("dense", in_context=1.0, forecasts="hold")
        placed = place(example(onset=4, flag_class=1), config, TWO, 0, epoch)
        at = placed.inserted.index(True)
        assert len(placed.forecast) == len(placed.input_ids) == 8
        assert placed.forecast[at] == placed.forecast[at + 1] and placed.flag_labels[at] == placed.flag_labels[at + 1]


def test_characters_become_the_tokens_that_hold_them(flagged):
    _, tokenizer, spec, _ = flagged
    text = "the cat sat on a mat"
    one = encode(
        row("tell", text, "harm", onset=12, forecast=[[0, 0.1], [5, 0.2], [6, 0.3], [12, 1.0, 4]]), tokenizer, spec
    )
    at = [int(token) for token, _ in one["forecast"]]
    spans = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    for token, character in zip(at, (0, 6, 12), strict=True):  # 5 and 6 stand in one token, where the last counts
        assert spans[token][0] <= character < spans[token][1]
    assert [harm for _, harm in one["forecast"]] == [0.1, 0.3, 1.0] and one["onset"] == at[2]
    assert one["forecast_class"] == 1


def test_a_harmless_row_forecasts_the_only_flag_or_the_one_it_names(tokenizer, tmp_path):
    quiet = row("tell", "the cat sat", forecast=[[0, 0.5]], id="q")
    named = replace(quiet, forecast_category="theft")
    loud = row("tell", "the cat sat", "harm", onset=4, forecast=[[0, 0.5]])
    assert world(tokenizer, [quiet, loud])[2]["forecast_class"] == [1, 1]
    model, spec, data = world(tokenizer, [named, loud, row("tell", "ran home")], "harm", "theft")
    assert data["forecast_class"] == [2, 1, 0] and data["forecast"][2] == []
    moved_trainer(tokenizer, model, spec, data, settings_of(tmp_path, forecasts="hold"), True)
    with pytest.raises(RedflagError, match=r"row 0 must have a forecast_category: it is harmless"):
        model, spec, data = world(tokenizer, [quiet, loud], "harm", "theft")
        moved_trainer(tokenizer, model, spec, data, settings_of(tmp_path, forecasts="hold"), True)
    with pytest.raises(RedflagError, match=r"forecasts must be off for rows without forecasts .* Make forecasts with"):
        model, spec, data = world(tokenizer, [replace(quiet, forecast=None), replace(loud, forecast=None)])
        moved_trainer(tokenizer, model, spec, data, settings_of(tmp_path, forecasts="hold"), True)
    with pytest.raises(RedflagError, match=r"forecasts must be .*got 'smooth'"):
        settings_of(tmp_path, forecasts="smooth")


def test_a_row_whose_flag_is_left_out_forecasts_nothing(tokenizer):
    spec = world(tokenizer, [row("a", "the cat")])[1]
    loud = row("tell", "the cat sat", "harm", onset=4, forecast=[[0, 0.5]], id="x")
    (plain,) = build_dataset([loud], tokenizer, spec, 64, plain_share=1.0)
    assert (plain["flag_class"], plain["forecast"], plain["forecast_class"]) == (0, [], 0)


# The loss with a second class.


def case(seed, flags, rows, dtype=torch.float32, count=7, hidden=5, vocabulary=16, **extras):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    ids, weight = [3, 11, 0][:flags], normal(vocabulary, hidden)
    head = Head(
        weight.clone().requires_grad_(not rows), normal(flags, hidden).requires_grad_() if rows else None, **extras
    )
    labels = torch.randint(-1, flags + 1, (count,), generator=draw)
    labels = torch.where(labels < 0, IGNORE, labels)
    first, keep, second = torch.rand(3, count, generator=draw, dtype=torch.float64).to(dtype)
    second = torch.where(labels == 0, second, 0.0)
    classes = torch.randint(1, flags + 1, (count,), generator=draw)
    states, reference = normal(count, hidden).requires_grad_(), normal(count, hidden)
    tokens = torch.randint(0, vocabulary, (count,), generator=draw)
    return states, reference, head, Head(weight, **extras), ids, labels, tokens, first, keep, classes, second


def loop(states, reference, head, reference_head, ids, labels, tokens, first, keep, classes, second):
    """One position after the other, with full softmaxes."""

    def logits(h, which):
        weight = which.weight
        if which.flag_rows is not None:
            weight = weight.index_copy(0, torch.tensor(ids), which.flag_rows)
        z = which.scale * (weight @ h)
        return z if which.cap is None else which.cap * torch.tanh(z / which.cap)

    language = [v for v in range(head.weight.shape[0]) if v not in ids]
    total = torch.zeros((), dtype=states.dtype)
    for i in range(states.shape[0]):
        z, z_ref = logits(states[i], head), logits(reference[i], reference_head)
        whole = z.softmax(0)
        probabilities = torch.stack([whole[language].sum(), *(whole[f] for f in ids)])
        if labels[i] >= 0:
            total = total - first[i] * probabilities[labels[i]].log()
        total = total - second[i] * probabilities[classes[i]].log()
        p, q = z_ref[language].softmax(0), z[language].softmax(0)
        total = total + keep[i] * (p * (p.log() - q.log())).sum()
    return total


def fast(states, reference, head, reference_head, ids, labels, tokens, first, keep, classes, second):
    flags = torch.tensor(ids)
    return flag_and_keep_loss(
        states, reference, head, reference_head, flags, labels, tokens, first, keep, Forecast(classes, second)
    )[0]


@pytest.mark.parametrize("flags", [1, 3])
@pytest.mark.parametrize("rows", [True, False], ids=["flag_rows", "full_matrix"])
@pytest.mark.parametrize("extras", [{}, {"cap": 2.0, "scale": 1.5}], ids=str)
@pytest.mark.parametrize("at_once", [1, 48, 10_000], ids=["one_position", "partial_chunk", "one_chunk"])
def test_value_and_gradients_equal_the_per_token_loop(monkeypatch, flags, rows, extras, at_once):
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
    given = case(0, flags, rows, **extras)
    leaves = [given[0], given[2].flag_rows if rows else given[2].weight]
    expected, got = loop(*given), fast(*given)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rows", [True, False], ids=["flag_rows", "full_matrix"])
@pytest.mark.parametrize("at_once", [48, 10_000], ids=["chunks", "one_chunk"])
def test_gradients_hold_in_double_precision(monkeypatch, rows, at_once):
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
    states, reference, head, *rest = case(1, 2, rows, torch.float64, count=4, hidden=3, cap=3.0)

    def of(states, matrix):
        changed = replace(head, flag_rows=matrix) if rows else replace(head, weight=matrix)
        return fast(states, reference, changed, *rest)

    leaves = (states, head.flag_rows if rows else head.weight)
    assert of(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(of, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_where_nothing_is_forecast_the_loss_has_the_same_bits():
    given = case(2, 2, True)
    states, head, second = given[0], given[2], torch.zeros(7)
    plain = flag_and_keep_loss(*given[:4], torch.tensor(given[4]), *given[5:9])[0]
    got = fast(*given[:-1], second)
    assert torch.equal(got, plain)
    leaves = [states, head.flag_rows]
    for mine, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(plain, leaves), strict=True):
        assert torch.equal(mine, theirs)


# The trainer.


def forecast_rows(count=12, spread_over=(0.1, 0.7, 0.4)):
    """Of three rows one harmful; two of three with forecasts at their beginnings and behind."""
    rows = []
    for i, one in enumerate(make_rows(count)):
        points = [[0, spread_over[i % 3]], [5, spread_over[(i + 1) % 3]], [9, spread_over[(i + 2) % 3]]]
        rows.append(one if i % 3 == 1 else replace(one, forecast=points))
    return rows


def flag_term(net, examples, config, spec):
    """Over positions, with whole logits: hard labels, and forecasts that weigh on both sides."""
    sums, masses = [torch.zeros(()), torch.zeros(())], [0.0, 0.0]
    for one in examples:
        placed = place(one, config.placement_config(), spec, config.seed, 0)
        z = net(input_ids=torch.tensor([placed.input_ids])).logits[0]
        for j in range(1, len(placed.input_ids)):
            label = placed.flag_labels[j]
            if label == IGNORE:
                continue
            classes = split_log_probs(z[j - 1], spec)[0]
            soft = placed.forecast[j] if placed.forecast is not None else N
            f, k = (1.0, label) if label else (soft, one["forecast_class"]) if soft != N else (0.0, 1)
            for side, (share, wanted) in enumerate(((1 - f, 0), (f, k))):
                if share:
                    sums[side] = sums[side] - share * classes[wanted]
                masses[side] += share
    w = config.harmful_weight
    return config.flag_coef * ((1 - w) * sums[0] / max(1, masses[0]) + w * sums[1] / max(1, masses[1]))


@pytest.mark.parametrize("how", ["hold", "linear", "points"])
@pytest.mark.parametrize(
    ("full", "more"),
    [(True, {}), (False, {"placement": "insert"}), (True, {"in_context": 0.5, "soft_margin": 1})],
    ids=str,
)
def test_the_trainers_loss_and_gradients_equal_a_loop_over_tokens(tmp_path, tokenizer, how, full, more):
    model, spec, data = world(tokenizer, forecast_rows())
    config = settings_of(tmp_path, forecasts=how, keep_coef=0.0, flag_coef=0.7, harmful_weight=0.3, **more)
    trainer, _ = moved_trainer(tokenizer, model, spec, data, config, full)
    examples = [data[i] for i in range(8)]
    soft = [place(one, config.placement_config(), spec, 5).forecast for one in examples]
    assert sum(0 < f < 1 for found in soft if found for f in found) > 10
    check_loss(trainer, examples, lambda net: flag_term(net, examples, config, spec))


def test_forecasts_name_the_flag_they_raise(tmp_path, tokenizer):
    rows = [replace(one, forecast_category=None if one.harmful else "theft") for one in forecast_rows(6)]
    model, spec, data = world(tokenizer, rows, "harm", "theft")
    config = settings_of(tmp_path, forecasts="hold", keep_coef=0.0)
    trainer, _ = moved_trainer(tokenizer, model, spec, data, config, True)
    examples = [data[i] for i in range(6)]
    assert {one["forecast_class"] for one in examples if one["forecast"]} == {1, 2}
    check_loss(trainer, examples, lambda net: flag_term(net, examples, config, spec))


def losses(tmp_path, tokenizer, rows, **more):
    """(loss, gradients, counts) of one batch of all rows."""
    model, spec, data = world(tokenizer, rows)
    trainer, _ = moved_trainer(tokenizer, model, spec, data, settings_of(tmp_path, **more), True)
    batch = trainer.data_collator([data[i] for i in range(len(rows))])
    counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
    loss.backward()
    return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}, counts


def test_forecasts_of_0_and_1_are_hard_labels(tmp_path, tokenizer):
    """A row that is harmless up to a character and forecast from there on with 1 is the row with its onset there."""
    hard = [one for one in make_rows(12) if one.onset != 0]
    soft = [
        replace(one, category=None, onset=None, forecast=[[0, 0.0], *([[one.onset, 1.0]] if one.harmful else [])])
        for one in hard
    ]
    assert any(one.harmful for one in hard) and not any(one.harmful for one in soft)
    plain, soft = losses(tmp_path, tokenizer, hard), losses(tmp_path, tokenizer, soft, forecasts="hold")
    torch.testing.assert_close(soft[0], plain[0], rtol=1e-6, atol=0)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(soft[1][name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    flagged, mass = plain[2][1], soft[2][-1]
    assert mass == flagged > 0 and soft[2][1] == 0 and soft[2][2] - mass == plain[2][2]


def test_without_the_option_forecasts_change_no_bit_and_with_it_they_change_only_rows_that_have_one(
    tmp_path, tokenizer
):
    rows = forecast_rows(12)
    without = [replace(one, forecast=None) for one in rows]
    first, second = losses(tmp_path, tokenizer, rows), losses(tmp_path, tokenizer, without)
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())
    config = PlacementConfig("dense", forecasts="hold")
    _, spec, data = world(tokenizer, rows)
    for one in data:
        got, plain = place(one, config, spec), place(one, PlacementConfig("dense"), spec)
        assert got._replace(forecast=None) == plain and (got.forecast is None) == (not one["forecast"])
    softened = losses(tmp_path, tokenizer, rows, forecasts="hold")
    assert not torch.equal(first[0], softened[0])
    # Forecasts that are no news (0 where the label is none, 1 behind the onset) leave every bit as it was.
    known = [replace(one, forecast=[[0, 0.0], *([[one.onset, 1.0]] if one.harmful else [])]) for one in without]
    third = losses(tmp_path, tokenizer, known, forecasts="hold")
    assert torch.equal(third[0], second[0])
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in third[1].items())


@pytest.mark.parametrize("how", ["linear", "points"])
def test_micro_batches_count_the_forecasts_of_all_together(tmp_path, tokenizer, how):
    """Rows with forecasts come in clumps, so that micro-batches hold unlike numbers of them, and some none."""
    rows = [replace(one, forecast=None) if i % 4 < 2 else one for i, one in enumerate(forecast_rows(12))]
    whole, gradients, counts = losses(tmp_path, tokenizer, rows, forecasts=how)
    model, spec, data = world(tokenizer, rows)
    config = settings_of(tmp_path, forecasts=how, gradient_accumulation_steps=6)
    trainer, _ = moved_trainer(tokenizer, model, spec, data, config, True)
    batches = [trainer.data_collator([data[i], data[i + 1]]) for i in range(0, 12, 2)]
    together = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert counts[-1] > 1 and len({float((batch["forecast"] >= 0).sum()) for batch in batches}) > 2
    torch.testing.assert_close(together, counts)
    parts = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=together) for batch in batches]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
    sum(parts).backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_counts_of_several_processes_are_added_with_their_forecasts(tmp_path, tokenizer, monkeypatch):
    """Two processes of which one has forecasts: both divide by the numbers of both (run for real in test_processes)."""
    rows = forecast_rows(12)
    model, spec, data = world(tokenizer, rows)
    trainer, _ = moved_trainer(tokenizer, model, spec, data, settings_of(tmp_path, forecasts="hold"), True)
    mine, theirs = ([trainer.data_collator([data[i] for i in part])] for part in ((0, 2), (1, 4)))
    apart = [trainer._get_num_items_in_batch(batches, torch.device("cpu")) for batches in (mine, theirs)]
    assert apart[0][-1] > 0 and apart[1][-1] == 0 and apart[0].dtype == apart[1].dtype == torch.float32
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda counts: torch.cat([counts, apart[1][None]]))
    both = trainer._get_num_items_in_batch(mine, torch.device("cpu"))
    assert torch.equal(both, apart[0] + apart[1])
