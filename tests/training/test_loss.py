"""The loss against a per-token Python loop: values, gradients, masks, chunks, several flags, caps and scales."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redflag.training import loss as loss_module
from redflag.training.loss import Head, flag_and_keep_loss

N, H, V = 7, 5, 16


def naive(hidden, reference, head, reference_head, flag_ids, flag_labels, flag_weights, keep_weights):
    """One position after the other, with full softmaxes, as the module's docstring defines the terms."""

    def logits(h, which):
        weight = which.weight
        if which.flag_rows is not None:
            weight = weight.clone()
            weight = weight.index_copy(0, torch.tensor(flag_ids), which.flag_rows)
        z = weight @ h
        if which.bias is not None:
            z = z + which.bias
        z = z * which.scale
        return z if which.cap is None else which.cap * torch.tanh(z / which.cap)

    language = [v for v in range(head.weight.shape[0]) if v not in flag_ids]
    total = torch.zeros(())
    for i in range(hidden.shape[0]):
        z, z_ref = logits(hidden[i], head), logits(reference[i], reference_head)
        probabilities = torch.softmax(z, 0)
        classes = torch.stack([probabilities[language].sum(), *(probabilities[f] for f in flag_ids)])
        if flag_labels[i] >= 0:
            total = total - flag_weights[i] * torch.log(classes[flag_labels[i]])
        p, q = torch.softmax(z_ref[language], 0), torch.softmax(z[language], 0)
        total = total + keep_weights[i] * (p * (p.log() - q.log())).sum()
    return total


def make(seed, flags, rows, bias=False, scale=1.0, cap=None, n=N):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    flag_ids = [3, 11, 0][:flags]
    weight = normal(V, H)
    head = Head(
        weight.clone().requires_grad_(not rows),
        normal(flags, H).requires_grad_() if rows else None,
        normal(V) if bias else None,
        scale,
        cap,
    )
    reference_head = Head(weight.clone(), None, head.bias, scale, cap)
    hidden, reference = normal(n, H).requires_grad_(), normal(n, H)
    labels = torch.randint(-1, flags + 1, (n,), generator=generator)
    labels = torch.where(labels < 0, -100, labels)
    weights = torch.rand(2, n, generator=generator)
    weights[1, ::3] = 0.0  # some positions carry no keep term
    tokens = torch.randint(0, V, (n,), generator=generator)
    return hidden, reference, head, reference_head, flag_ids, labels, tokens, weights[0], weights[1]


def both(case):
    hidden, reference, head, reference_head, flag_ids, labels, tokens, flag_weights, keep_weights = case
    leaves = [leaf for leaf in (hidden, head.weight, head.flag_rows) if leaf is not None and leaf.requires_grad]
    expected = naive(hidden, reference, head, reference_head, flag_ids, labels.tolist(), flag_weights, keep_weights)
    expected_gradients = torch.autograd.grad(expected, leaves)
    got, found = flag_and_keep_loss(
        hidden, reference, head, reference_head, torch.tensor(flag_ids), labels, tokens, flag_weights, keep_weights
    )
    return expected, expected_gradients, got, torch.autograd.grad(got, leaves), found


@pytest.mark.parametrize("flags", [1, 2, 3])
@pytest.mark.parametrize("rows", [True, False], ids=["flag_rows", "full_matrix"])
@pytest.mark.parametrize(
    "extras", [{}, {"bias": True}, {"cap": 3.0}, {"scale": 0.5}, {"bias": True, "cap": 2.0, "scale": 2.0}], ids=str
)
@pytest.mark.parametrize("at_once", [1, 3 * V, 10_000], ids=["one_position", "partial_chunk", "one_chunk"])
def test_value_and_gradients_equal_the_per_token_loop(monkeypatch, flags, rows, extras, at_once):
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
    expected, expected_gradients, got, gradients, _ = both(make(0, flags, rows, **extras))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), flags=st.integers(1, 3), rows=st.booleans(), n=st.integers(1, 9))
def test_equal_to_the_loop_for_any_draw(seed, flags, rows, n):
    expected, expected_gradients, got, gradients, _ = both(make(seed, flags, rows, n=n))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-4)


def test_all_masked_is_zero_with_zero_gradients():
    hidden, reference, head, reference_head, flag_ids, labels, *_ = make(1, 2, True)
    nothing, ignore = torch.zeros(N), torch.full_like(labels, -100)
    got, _ = flag_and_keep_loss(
        hidden, reference, head, reference_head, torch.tensor(flag_ids), ignore, ignore, torch.ones(N), nothing
    )
    got.backward()
    assert got.item() == 0.0
    assert not hidden.grad.any() and not head.flag_rows.grad.any()


def test_no_positions_at_all_is_zero():
    hidden, reference, head, reference_head, flag_ids, *_ = make(1, 1, True, n=0)
    empty = torch.zeros(0, dtype=torch.long)
    got, found = flag_and_keep_loss(
        hidden, reference, head, reference_head, torch.tensor(flag_ids), empty, empty, torch.zeros(0), torch.zeros(0)
    )
    got.backward()
    assert got.item() == 0.0 and found.p_flag.shape == (0,)


def test_positions_report_what_they_say():
    hidden, _, head, _, flag_ids, labels, tokens, flag_weights, keep_weights = make(4, 2, False)
    with torch.no_grad():
        _, found = flag_and_keep_loss(
            hidden, hidden, head, head, torch.tensor(flag_ids), labels, tokens, flag_weights, keep_weights
        )
        probabilities = (hidden @ head.weight.T).softmax(-1)
    language = [v for v in range(V) if v not in flag_ids]
    torch.testing.assert_close(found.p_flag, probabilities[:, flag_ids].sum(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.keep_kl, torch.zeros(N), atol=1e-5, rtol=0)
    for i in range(N):
        if tokens[i] in language:
            q = probabilities[i, tokens[i]] / probabilities[i, language].sum()
            assert math.isclose(found.nll[i].item(), -math.log(q), abs_tol=1e-4)


def test_a_distribution_that_only_gains_a_flag_has_no_keep_loss():
    """Language is compared after renormalising, so a rising flag alone costs nothing."""
    hidden, _, head, _, flag_ids, labels, tokens, flag_weights, keep_weights = make(5, 1, True)
    loud = Head(head.weight.detach(), head.flag_rows.detach() + 3.0)
    _, found = flag_and_keep_loss(
        hidden, hidden.detach(), loud, head, torch.tensor(flag_ids), labels, tokens, flag_weights, keep_weights
    )
    torch.testing.assert_close(found.keep_kl, torch.zeros(N), atol=1e-5, rtol=0)


def test_memory_is_that_of_a_chunk_not_of_all_logits(monkeypatch):
    """No tensor of N x V is ever alive: the largest one made while the loss runs is a chunk."""
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 4 * V)
    case = make(6, 1, True, n=64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    hidden, reference, head, reference_head, flag_ids, labels, tokens, flag_weights, keep_weights = case
    with Watch():
        flag_and_keep_loss(
            hidden, reference, head, reference_head, torch.tensor(flag_ids), labels, tokens, flag_weights, keep_weights
        )
    assert largest <= 64 * H  # the hidden states themselves; 64 x V would be 1024
