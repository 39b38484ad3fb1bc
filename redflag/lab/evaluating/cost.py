"""The cost of watching relative to the model's own forward pass, as the papers give it ("+23.7%").

There are two measures. By formula: FLOPs per response token, 2 for every weight that is multiplied with (without
attention), on any machine; prompts do not count. Measured: seconds per response token, on the machine of the report,
batched, with everything that formulas leave out (look-ups, detokenising, Python). A pass over a prompt, the model's own
or a second model's, is spread over the response that follows.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from redflag.data.rows import Rows
from redflag.files import keep_json, kept_json
from redflag.flags import FlagSpec
from redflag.lab.baselines import Cost
from redflag.lab.baselines.shared import forward_flops
from redflag.lab.report.method import Compute
from redflag.weights.stamp import model_stamp

if TYPE_CHECKING:
    from redflag.lab.evaluating.arguments import EvaluateArguments
    from redflag.lab.evaluating.stages import Models

# Conversations on which the pass is timed, and rounds, of which the quickest counts.
_ROWS, _ROUNDS = 64, 3


def passes(arguments: EvaluateArguments, models: Models, rows: Rows, spec: FlagSpec, path: Path) -> tuple[Cost, Cost]:
    """The model's own forward pass, and what reading the flags adds to it; measured once, on a few rows."""
    made_of = [model_stamp(arguments.model), rows.fingerprint, arguments.device, arguments.dtype, arguments.batch_size]
    if cached := kept_json(path, made_of=made_of):
        return Cost(**cached["pass"]), Cost(**cached["flags"])
    plain, reading, width = (None, None, None) if arguments.upstream else _timed(models, rows, arguments.batch_size)
    own = Cost(
        microseconds_per_token=plain,
        flops_per_token=forward_flops(arguments.base or arguments.model),
        note="the model's own forward pass, batched, with the logits of every response token; the time holds the "
        "prompts'",
    )
    flags = Cost(
        microseconds_per_token=reading,
        flops_per_token=None if width is None else 2.0 * width * len(spec.flags),
        note="on top of the model's own forward pass: a row of the head for each flag; the time is that of reading "
        "probabilities from the logits, the sum over the vocabulary included",
    )
    keep_json(path, {"made_of": made_of, "pass": asdict(own), "flags": asdict(flags)}, indent=2)
    return own, flags


def relative(cost: Cost | None, own: Cost) -> Compute:
    """What a method adds to the model's own pass.

    A method that takes the model's place adds no FLOPs; its time is that of the pass itself, and adds nothing known.

    Example:
        >>> own = Cost(microseconds_per_token=50.0, flops_per_token=8e9, note="")
        >>> relative(Cost(microseconds_per_token=1.0, flops_per_token=377e3, note=""), own)
        Compute(flops=4.7125e-05, seconds=0.02)
    """
    if cost is None:
        return Compute()
    flops, taken = cost.flops_per_token, cost.microseconds_per_token
    whole, took = own.flops_per_token, own.microseconds_per_token
    return Compute(
        flops / whole if flops is not None and whole else None,
        taken / took if taken is not None and took and flops != 0.0 else None,
    )


def of_cascade(first: Cost, second: Cost, read: float) -> Cost:
    """What a cascade costs: its first stage at every token, its second at the tokens that it reads.

    Args:
        read: Tokens that the second reads per response token of harmless traffic.
    """

    def both(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else one + read * other

    return Cost(
        microseconds_per_token=both(first.microseconds_per_token, second.microseconds_per_token),
        flops_per_token=both(first.flops_per_token, second.flops_per_token),
        note=f"the first stage at every token, the second at {read:.2%} as many on harmless responses; {first.note}",
    )


def _timed(models: Models, rows: Rows, batch_size: int) -> tuple[float, float, int]:
    """Microseconds per judged token of the pass, and of reading the flags; and the width of the hidden states."""
    import torch

    from redflag.backends.choose import measure
    from redflag.backends.head import head_agrees, head_logits, plain_model
    from redflag.lab.evaluating.language import LOGITS_AT_ONCE, states_before
    from redflag.scoring.fitting import fit

    backend, tokenizer, spec = models.flagged
    fitted = [fit(tokenizer, spec, row, i, models.limit) for i, row in enumerate(rows.rows[:_ROWS])]
    pairs = [(one.prompt_ids, [*one.response_ids, *one.tail_ids]) for one in fitted]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    model = plain_model(backend.model).eval()
    flag_ids = torch.tensor(spec.ids, device=model.device)
    apart = head_agrees(model, torch.tensor([pairs[0][0][:4]], device=model.device))
    words, width = model.get_output_embeddings().weight.shape
    size = batch_size if apart else 1

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def one_round() -> tuple[float, float]:
        plain = reading = 0.0
        for start in range(0, len(pairs), size):
            begun = now()
            states = states_before(model, pairs[start : start + size], model.device, apart)
            plain += now() - begun
            for part in states.split(max(1, LOGITS_AT_ONCE // words)):
                begun = now()
                logits = head_logits(model, part) if apart else part
                read = now()
                measure(logits.float(), flag_ids)
                plain, reading = plain + read - begun, reading + now() - read
        return plain, reading

    with torch.inference_mode():
        one_round()  # Warms up.
        rounds = [one_round() for _ in range(_ROUNDS)]
    tokens = sum(len(response) for _, response in pairs)
    plain, reading = (1e6 * min(times) / tokens for times in zip(*rounds, strict=True))
    return plain, reading, int(width)
