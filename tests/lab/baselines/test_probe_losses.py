"""Probes' losses and smoothing: literal tables, and plain loops over tokens."""

import math

import numpy as np
import pytest
import torch

from redflag.lab.baselines.probe_losses import ema, softmax_weighted, swim, token_bce, towards_maximum

INF = math.inf


@pytest.mark.parametrize(
    ("logits", "window", "smooth"),
    [
        ([4.0, 0.0, 2.0, 6.0], 1, [4.0, 0.0, 2.0, 6.0]),
        ([4.0, 0.0, 2.0, 6.0], 2, [4.0, 2.0, 1.0, 4.0]),
        ([4.0, 0.0, 2.0, 6.0], 3, [4.0, 2.0, 2.0, 8.0 / 3]),
        ([4.0, 0.0, 2.0, 6.0], 16, [4.0, 2.0, 2.0, 3.0]),
    ],
)
def test_the_sliding_mean_is_this_table(logits, window, smooth):
    assert swim(torch.tensor([logits]), window)[0].tolist() == pytest.approx(smooth, abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "decay", "start", "smooth"),
    [
        ([8.0, 8.0, 0.0], 0.5, 0.0, [4.0, 6.0, 3.0]),
        ([8.0, 8.0, 0.0], 1.0, 5.0, [8.0, 8.0, 0.0]),
        ([0.0, 0.0], 2 / 17, 17.0, [15.0, 15.0 * 15 / 17]),
        ([], 0.5, 1.0, []),
    ],
)
def test_the_moving_average_is_this_table(logits, decay, start, smooth):
    assert ema(np.array(logits), decay, start).tolist() == pytest.approx(smooth)


@pytest.mark.parametrize(
    ("omega", "predicted"), [(0.0, [1.0, 3.0, 2.0, 0.0]), (0.5, [1.0, 3.0, 2.5, 1.5]), (1.0, [1.0, 3.0, 3.0, 3.0])]
)
def test_the_predictor_moves_to_the_cumulative_maximum(omega, predicted):
    assert towards_maximum(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), omega)[0].tolist() == predicted


def bce(label, z):
    return math.log1p(math.exp(-z)) if label else math.log1p(math.exp(z))


def by_hand(z, harmful, window, temperature, reading):
    """The loss of one response as the paper writes it, token by token."""
    smooth = [sum(z[max(0, t + 1 - window) : t + 1]) / min(window, t + 1) for t in range(len(z))]
    counted = range(min(window, len(z)) - 1, len(z))
    total = sum(math.exp(smooth[t] / temperature) for t in counted)
    weights = {t: math.exp(smooth[t] / temperature) / total for t in counted}
    if reading == "pooled":
        return bce(harmful, sum(weights[t] * smooth[t] for t in counted))
    return sum(weights[t] * bce(harmful, smooth[t]) for t in counted)


def responses(seed, lengths=(1, 3, 4, 9)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(lengths), max(lengths), generator=generator, dtype=torch.float64) * 2
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    # What stands in the padding must not count.
    return torch.where(mask, logits, 50.0), mask, lengths


@pytest.mark.parametrize("reading", ["sum", "pooled"])
@pytest.mark.parametrize(("window", "temperature"), [(1, 1.0), (4, 1.0), (4, 0.3), (16, 1.0)])
@pytest.mark.parametrize("harmful", [0.0, 1.0])
def test_the_softmax_weighted_loss_is_that_of_a_loop_over_tokens(reading, window, temperature, harmful):
    logits, mask, lengths = responses(1)
    logits.requires_grad_(True)
    loss = softmax_weighted(logits, mask, torch.full((4,), harmful), window, temperature, reading)
    expected = [by_hand(logits[b, :n].tolist(), harmful, window, temperature, reading) for b, n in enumerate(lengths)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-9)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[~mask] == 0).all()
    # The gradient of one logit, by a difference.
    step = 1e-5
    z = logits[3].tolist()
    sides = [by_hand([*z[:8], z[8] + s], harmful, window, temperature, reading) for s in (step, -step)]
    assert float(logits.grad[3, 8]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4, abs=1e-9)


def test_a_small_temperature_takes_the_greatest_and_a_large_one_the_mean():
    z = torch.tensor([[1.0, 4.0, -2.0]])
    mask, harmful = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1)
    cold, warm = (float(softmax_weighted(z, mask, harmful, 1, tau)) for tau in (1e-3, 1e6))
    assert cold == pytest.approx(bce(0, 4.0), rel=1e-5)
    assert warm == pytest.approx(sum(bce(0, v) for v in (1.0, 4.0, -2.0)) / 3, rel=1e-5)


def test_harmless_beginnings_of_harmful_responses_are_not_punished():
    """Twice the harmless steps before the harm: the loss hardly changes, where that at every step rises."""
    mask, harmful = torch.ones(1, 12, dtype=torch.bool), torch.ones(1)
    few, many = torch.tensor([[-4.0] * 4 + [6.0] * 8]), torch.tensor([[-4.0] * 8 + [6.0] * 4])
    change = softmax_weighted(many, mask, harmful, 1, 1.0) - softmax_weighted(few, mask, harmful, 1, 1.0)
    assert abs(float(change)) < 0.01
    ones = torch.ones(1, 12)
    assert float(token_bce(many, ones, mask, ones) - token_bce(few, ones, mask, ones)) > 1.0


@pytest.mark.parametrize("omega", [0.0, 0.25, 1.0])
def test_the_token_loss_with_cumulative_maximum_is_that_of_a_loop_over_tokens(omega):
    logits, mask, lengths = responses(2)
    labels = torch.zeros_like(logits)
    labels[1:3] = 1.0
    weights = torch.where(labels > 0, 1.5, 0.5)
    total = 0.0
    for b, n in enumerate(lengths):
        greatest = -INF
        for t in range(n):
            greatest = max(greatest, float(logits[b, t]))
            predicted = (1 - omega) * float(logits[b, t]) + omega * greatest
            total += float(weights[b, t]) * bce(float(labels[b, t]), predicted)
    loss = token_bce(towards_maximum(logits, omega), labels, mask, weights)
    assert float(loss) == pytest.approx(total / sum(lengths), rel=1e-9)
