"""The loss: flag cross-entropy + keep term, from hidden states, without ever holding B x T x V logits.

Write z for the logits at one position, F for the K flags, L for the language vocabulary (everything else).

- flag term: (K+1)-way cross-entropy over the classes "none" (logit: logsumexp of z over L) and each flag's z;
- keep term: KL(reference || trained) between the two language distributions, softmax of z over L.

Both need the head's V logits only for a moment, so the head is applied to a few positions at a time, for student and
reference alike, and the gradient is written down in closed form in the same pass (as fused cross-entropy kernels do):

    d flag / d z_l = (P(none) - [class is none]) q_l        d flag / d z_k = P(k) - [class is k]
    d keep / d z_l = q_l - p_l                              d keep / d z_k = 0

with q the trained and p the reference language distribution, and P the K+1 class probabilities. A forecast adds a
second target class at the same position, with its own weight; cross-entropies and gradients add up.

The caller supplies each position's weight. `peak_weights` are the weights of a response-level loss (the
softmax-weighted loss of Constitutional Classifiers++, arXiv 2601.04603): within a response the positions with the
highest log-odds of a flag weigh most, so harmless beginnings of harmful responses cost little and a confident false
alarm costs much.

Shapes: N positions, H hidden, V vocabulary, K flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from redflag.weights.precision import widest

# Logits in memory at one time, in elements: 64 MB of float32 per tensor, about four tensors. With smaller chunks,
# reading the head from memory would dominate.
LOGITS_AT_ONCE = 16_777_216


@dataclass
class Head:
    """The output head of a causal language model, as numbers.

    Attributes:
        weight: Matrix, (V, H). Receives a gradient where it requires one (full fine-tuning).
        flag_rows: The flags' own trainable rows, (K, H), which stand in for those of `weight`; None = use `weight`.
        bias: (V,) or None.
        scale: Factor on the logits (Granite, Cohere, ...).
        cap: Soft cap, logits = cap * tanh(logits / cap) (Gemma 2), or None.
    """

    weight: torch.Tensor
    flag_rows: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def positions_at_once(self) -> int:
        """Number of positions whose logits may be in memory at one time."""
        return max(1, LOGITS_AT_ONCE // self.weight.shape[0])

    def logits(self, hidden_NH: torch.Tensor, flag_ids: torch.Tensor) -> torch.Tensor:
        """Logits (N, V), flags included, in float32 (float64 where the states are)."""
        raw = torch.nn.functional.linear(hidden_NH, self.weight.to(hidden_NH.dtype))
        if self.flag_rows is not None:
            raw[:, flag_ids] = torch.nn.functional.linear(hidden_NH, self.flag_rows.to(hidden_NH.dtype))
        logits = raw.to(_wide(raw))
        if self.bias is not None:
            logits += self.bias.to(logits.dtype)
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits

    def pull_back(self, d_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient on `weight @ hidden`, from that on the finished logits (overwrites `d_logits`)."""
        if self.cap is not None:
            d_logits *= 1 - (logits / self.cap) ** 2
        if self.scale != 1.0:
            d_logits *= self.scale
        return d_logits


class Forecast(NamedTuple):
    """Second targets of N positions: flag k (1 ... K) of each, and its weight (0 = none)."""

    classes: torch.Tensor
    weights: torch.Tensor


class Positions(NamedTuple):
    """Metrics of each of N positions, detached.

    `flag_loss` (against the label alone, without forecasts) and `keep_kl` in nats (unweighted), `p_flag` = probability
    of any flag, `nll` and `reference_nll` the negative log-likelihood of the label under the two language
    distributions, nats (NaN where there is no label).
    """

    flag_loss: torch.Tensor
    keep_kl: torch.Tensor
    p_flag: torch.Tensor
    nll: torch.Tensor
    reference_nll: torch.Tensor


def flag_and_keep_loss(
    hidden_NH: torch.Tensor,
    reference_NH: torch.Tensor,
    head: Head,
    reference_head: Head,
    flag_ids: torch.Tensor,
    flag_labels_N: torch.Tensor,
    labels_N: torch.Tensor,
    flag_weights_N: torch.Tensor,
    keep_weights_N: torch.Tensor,
    forecast_N: Forecast | None = None,
) -> tuple[torch.Tensor, Positions]:
    """Weighted sum over positions of the flag term and the keep term.

    Args:
        hidden_NH: Last hidden states of the trained model, one per position judged.
        reference_NH: The reference's hidden states at the same positions (of the text without inserted flags).
        flag_ids: K vocabulary ids.
        flag_labels_N: 0 none, k flag k, -100 ignore.
        labels_N: Token at the position, -100 where there is none; only for `Positions`.
        flag_weights_N: Weight of the flag term at each position (coefficient over normaliser).
        keep_weights_N: Weight of the keep term; 0 where language is not pinned.
        forecast_N: Second target classes; None = no forecasts.

    Returns:
        The loss, a scalar that carries gradients to `hidden_NH`, `head.weight` and `head.flag_rows`; and `Positions`.
    """
    loss, *figures = _FlagAndKeep.apply(
        hidden_NH,
        head.weight,
        head.flag_rows,
        reference_NH,
        head,
        reference_head,
        flag_ids,
        flag_labels_N,
        labels_N,
        flag_weights_N,
        keep_weights_N,
        forecast_N,
    )
    return loss, Positions(*figures)


@torch.no_grad()
def flag_log_odds(hidden_NH: torch.Tensor, head: Head, flag_ids: torch.Tensor) -> torch.Tensor:
    """Log-odds of any flag at N positions, nats: logsumexp of the flags' logits minus logsumexp of all others."""
    log_odds = [hidden_NH.new_zeros(0, dtype=torch.float32)]
    for part in hidden_NH.split(head.positions_at_once):
        z = head.logits(part, flag_ids)
        flags = z[:, flag_ids].logsumexp(-1)
        z[:, flag_ids] = -torch.inf
        log_odds.append(flags - z.logsumexp(-1))
    return torch.cat(log_odds)


def peak_weights(log_odds_N: torch.Tensor, response_N: torch.Tensor, window: int, temperature: float) -> torch.Tensor:
    """Weights of positions within their response: softmax over it of the mean of the last `window` log-odds.

    They are constants within a step: no gradient flows through them. An infinite temperature gives every position of a
    response the same weight; one near 0 gives all the weight to its peak.

    Args:
        log_odds_N: Log-odds of a flag at each position, nats.
        response_N: Number of the response that each position belongs to; positions of one response are adjacent.
        window: Length of the trailing mean in positions; shorter at the beginning of a response.
        temperature: Divides the means, above 0.

    Returns:
        N weights that sum to 1 over each response.
    """
    count = len(log_odds_N)
    if count == 0:
        return log_odds_N.float()
    # For each position, the index of the first position of its response: no window reaches back into another one.
    index = torch.arange(count, device=log_odds_N.device)
    begins = torch.ones_like(index, dtype=torch.bool)
    begins[1:] = response_N[1:] != response_N[:-1]
    segment = begins.cumsum(0) - 1
    first = index[begins][segment]
    # Window sums are differences of a running sum. It needs double precision (if the device has it): over long batches
    # float32 loses digits.
    wide = widest(log_odds_N.device)
    total = torch.cat([log_odds_N.new_zeros(1, dtype=wide), log_odds_N.to(wide).cumsum(0)])
    oldest = torch.maximum(first, index - window + 1)
    scaled = (total[index + 1] - total[oldest]) / (index + 1 - oldest) / temperature
    # Softmax within each response, with its maximum subtracted first.
    segments = int(segment[-1]) + 1
    highest = scaled.new_full((segments,), -torch.inf).scatter_reduce(0, segment, scaled, "amax")
    weight = (scaled - highest[segment]).exp()
    return (weight / weight.new_zeros(segments).index_add(0, segment, weight)[segment]).float()


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """Type to compute in: float32, or float64 for float64 input."""
    return torch.promote_types(tensor.dtype, torch.float32)


class _FlagAndKeep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        flag_rows: torch.Tensor | None,
        reference: torch.Tensor,
        head: Head,
        reference_head: Head,
        flag_ids: torch.Tensor,
        flag_labels: torch.Tensor,
        labels: torch.Tensor,
        flag_weights: torch.Tensor,
        keep_weights: torch.Tensor,
        forecast: Forecast | None,
    ) -> Any:
        count, chunk, wide = hidden.shape[0], head.positions_at_once, _wide(hidden)
        needs_hidden, needs_weight, needs_rows = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        d_rows = torch.zeros_like(flag_rows, dtype=wide) if flag_rows is not None and needs_rows else None
        figures = hidden.new_zeros((5, count), dtype=wide)
        loss = hidden.new_zeros((), dtype=wide)
        for start in range(0, count, chunk):
            part = slice(start, min(count, start + chunk))
            h, weights_f, weights_k = hidden[part], flag_weights[part].to(wide), keep_weights[part].to(wide)
            # Flag term. The flags' logits are set to -inf in `z`, so its logsumexp is the logit of the class "none".
            # The soft cap's derivative needs the logits from before that.
            z = head.logits(h, flag_ids)
            capped = z.clone() if head.cap is not None and (needs_hidden or needs_weight) else z
            f = z[:, flag_ids]
            z[:, flag_ids] = -torch.inf
            lse = z.logsumexp(-1)
            class_log_probs = torch.cat([lse[:, None], f], 1).log_softmax(-1)
            target = flag_labels[part].clamp(min=0)
            flag_loss = -class_log_probs.gather(1, target[:, None])[:, 0]
            flag_loss = torch.where(flag_labels[part] >= 0, flag_loss, 0.0)

            # Keep term: sum_l p_l (log p_l - log q_l) = sum_l p_l (z_ref_l - z_l) - lse_ref + lse, in place in `z_ref`.
            z_ref = reference_head.logits(reference[part], flag_ids)
            z_ref[:, flag_ids] = -torch.inf
            lse_ref = z_ref.logsumexp(-1)
            token = labels[part].clamp(min=0)[:, None]
            nll, nll_ref = lse - z.gather(1, token)[:, 0], lse_ref - z_ref.gather(1, token)[:, 0]
            z[:, flag_ids] = 0.0  # p is 0 there: keeps inf - inf out of the sum
            p = (z_ref - lse_ref[:, None]).exp_()
            z_ref[:, flag_ids] = 0.0
            keep = (z_ref.sub_(z).mul_(p)).sum(-1) - lse_ref + lse

            # The weighted sum, and the unweighted metrics of `Positions`.
            loss += (weights_f * flag_loss).sum() + (weights_k * keep).sum()
            if forecast is not None:
                second, weights_s = forecast.classes[part][:, None], forecast.weights[part].to(wide)
                loss -= (weights_s * class_log_probs.gather(1, second)[:, 0]).sum()
            missing = labels[part] < 0
            figures[0, part], figures[1, part] = flag_loss, keep
            figures[2, part] = -torch.expm1(class_log_probs[:, 0])
            figures[3, part], figures[4, part] = (
                nll.masked_fill(missing, torch.nan),
                nll_ref.masked_fill(missing, torch.nan),
            )
            if not (needs_hidden or needs_weight or needs_rows):
                continue

            # Gradients, as in the docstring; `z` becomes q, then d loss / d z, in place.
            weights_f = torch.where(flag_labels[part] >= 0, weights_f, 0.0)
            # d / d class logits = weight * (P - one-hot target); both targets of a position add up.
            d_classes = class_log_probs.exp()
            d_classes.scatter_add_(1, target[:, None], torch.full_like(d_classes[:, :1], -1.0))
            d_classes *= weights_f[:, None]
            if forecast is not None:
                d_second = class_log_probs.exp()
                d_second.scatter_add_(1, second, torch.full_like(d_second[:, :1], -1.0))
                d_classes += d_second * weights_s[:, None]
            q = z.sub_(lse[:, None]).exp_()
            d = q.mul_((weights_k + d_classes[:, 0])[:, None]).sub_(p.mul_(weights_k[:, None]))
            d[:, flag_ids] = d_classes[:, 1:]
            # Through scale and cap, then the chain rule of the matrix. The flags' own rows stand in for the matrix's,
            # so their share of the gradient goes to them and must not reach `weight`.
            d = head.pull_back(d, capped)
            d_flags = d[:, flag_ids].to(h.dtype)
            if flag_rows is not None:
                d[:, flag_ids] = 0.0
            d = d.to(h.dtype)
            if d_hidden is not None:
                d_hidden[part] = d @ weight.to(h.dtype)
                if flag_rows is not None:
                    d_hidden[part] += d_flags @ flag_rows.to(h.dtype)
            if d_weight is not None:
                d_weight += (d.T @ h).to(wide)
            if d_rows is not None:
                d_rows += (d_flags.T @ h).to(wide)
        ctx.save_for_backward(d_hidden, d_weight, d_rows)
        ctx.dtypes = (weight.dtype, None if flag_rows is None else flag_rows.dtype)
        outputs = tuple(figures.unbind(0))
        ctx.mark_non_differentiable(*outputs)
        return (loss, *outputs)

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, *_: Any) -> Any:
        d_hidden, d_weight, d_rows = ctx.saved_tensors
        scaled = (
            None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * d_loss).to(ctx.dtypes[0]),
            None if d_rows is None else (d_rows * d_loss).to(ctx.dtypes[1]),
        )
        return (*scaled, *([None] * 9))
