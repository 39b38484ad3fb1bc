"""What training did to the language: the distribution over all other tokens, compared with the base model's.

Both models read the same harmless responses; flags are removed from both distributions, which are renormalised, as the
guard does when it samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from redflag.backends.head import backbone, head_agrees, head_logits, plain_model
from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.lab.report.evaluation import Language
from redflag.progress import track
from redflag.prompt import render_response

LOGITS_AT_ONCE = 8_388_608  # numbers alive at one time, of each of the two models


@torch.inference_mode()
def language_change(
    flagged: Any,
    reference: Any,
    tokenizer: Any,
    spec: FlagSpec,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
) -> Language:
    """How far a flagged model's language moved from the reference's, on the tokens of given responses.

    Args:
        reference: The model before training; its vocabulary may lack rows that were added for the flags.
        rows: Conversations; harmful ones are left out, for their language may change.
        max_length: Longest prompt + response in tokens; longer conversations are left out and counted.

    Raises:
        RedflagError: No harmless response fits, or the two models do not share a vocabulary.
    """
    pairs, left_out = [], 0
    for row in rows:
        if not row.harmful:
            rendered = render_response(tokenizer, row.messages, spec)
            pair = (rendered.prompt_ids, [*rendered.response_ids, *rendered.tail_ids])
            fits = max_length is None or sum(map(len, pair)) <= max_length
            pairs += [pair] if fits else []
            left_out += not fits
    if not pairs:
        raise RedflagError("the rows must have a harmless response that fits the context (got none). Give others.")
    words = [plain_model(model).get_output_embeddings().weight.shape[0] for model in (flagged, reference)]
    if words[0] < words[1] or max(max(p + r) for p, r in pairs) >= words[1]:
        raise RedflagError(
            f"base must be the model that the flags were trained on (got one of {words[1]} output rows, and "
            f"{words[0]} with flags)."
        )
    device = plain_model(flagged).device
    models = [flagged.eval(), reference.to(device).eval()]
    apart = all(head_agrees(model, torch.tensor([pairs[0][0][:4]], device=device)) for model in models)
    # Flags behind the reference's vocabulary have no column there, and none in what is compared.
    flag_ids = torch.tensor([i for i in spec.ids if i < words[1]], dtype=torch.long, device=device)
    total, nll = 0.0, [0.0, 0.0]
    tokens = sum(len(response) for _, response in pairs)
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    size = batch_size if apart else 1
    starts = range(0, len(pairs), size)
    for start in track(starts, "language", len(starts), "batches"):
        hidden = [states_before(model, pairs[start : start + size], device, apart) for model in models]
        chosen = torch.tensor([t for _, response in pairs[start : start + size] for t in response], device=device)
        for part in range(0, len(chosen), step := max(1, LOGITS_AT_ONCE // words[1])):
            spans = [states[part : part + step] for states in hidden]
            log_probs = [
                _language(head_logits(model, span) if apart else span, words[1], flag_ids)
                for model, span in zip(models, spans, strict=True)
            ]
            total += math.fsum(_divergence(*log_probs).tolist())
            targets = chosen[part : part + step, None]
            for i, logs in enumerate(log_probs):
                nll[i] -= math.fsum(logs.gather(1, targets)[:, 0].tolist())
    ratio = math.exp((nll[0] - nll[1]) / tokens)
    return Language(keep_kl=total / tokens, perplexity_ratio=ratio, tokens=tokens, rows=len(pairs), left_out=left_out)


def states_before(model: Any, pairs: Sequence[tuple[list[int], list[int]]], device: Any, apart: bool) -> torch.Tensor:
    """Last hidden states (or, where head and backbone cannot be parted, logits) before every response token."""
    rows = [[*prompt, *response] for prompt, response in pairs]
    width = max(map(len, rows))
    # Padded on the right, where no position looks.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    if apart:
        states = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    else:
        states = model(input_ids=ids, use_cache=False).logits
    return torch.cat([states[i, len(p) - 1 : len(p) + len(r) - 1] for i, (p, r) in enumerate(pairs)])


def _language(logits: torch.Tensor, words: int, flag_ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of everything but flags, float32 (Apple's GPUs have no float64), N x words."""
    logits = logits[:, :words].float().index_fill(1, flag_ids, -math.inf)
    return torch.log_softmax(logits, dim=-1)


def _divergence(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """KL(old || new) of each position, shape `(N,)`.

    Summed as old * log(old / new) - old + new, the same where both sum to one: what float32 loses in the two
    normalisers then cancels to first order.
    """
    p = old.exp()
    return (p * (old - new).nan_to_num(0.0) - p + new.exp()).sum(-1)
