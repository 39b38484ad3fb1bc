"""SGLang's native `/generate` route: the request that measures flags, and steps out of what it streams back.

Pure functions: the owner of the connection posts `request(...)` to `/generate` and gives every `data:` line but
`[DONE]`, parsed, to `steps`. Written after SGLang's source (0.5.x); not yet run against a server.

Two traps. SGLang takes the log-probabilities that it returns *after* penalties, grammar and `logit_bias`, and after
temperature as well:

- **Temperature.** Values are those of softmax(z / T) unless the server was started with
  `SGLANG_RETURN_ORIGINAL_LOGPROB=1`. Without it only T = 1 and greedy requests are measured raw, and `request` refuses
  the others. `check_temperature` tells from two answers which it is.
- **Bias.** A flag that is banned cannot be measured. So flags are pushed down by a finite `FLAG_BIAS` b, which is taken
  out again: with q' the probabilities that SGLang returns and F the flags,

      1 / Z = sum over F of q'_i e^-b + 1 - sum over F of q'_i        q_i = q'_i e^-b Z in F,  q_j = q'_j Z elsewhere

  A flag is then chosen with e^-40 times its odds: not once in 10^11 steps at p = 0.999999. If it is, the step carries
  NaN, and the response is halted.

Penalties cannot be taken out, so they are refused. A grammar (`json_schema`, `regex`, `ebnf`) hides flags as -inf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from redflag.backends import Sampling
from redflag.errors import RedflagError
from redflag.trace import Step

FLAG_BIAS = -40.0
"""Nats added to the logit of every flag. Far enough that none is chosen, near enough for float32 to tell apart."""

# SGLang writes the logarithm of a probability that float32 rounds to 0 as its smallest number, or as null.
_LOST = -1e30


def request(
    token_ids: Sequence[int],
    sampling: Sampling,
    flag_ids: Sequence[int],
    watch: Sequence[int] = (),
    *,
    original_logprobs: bool = False,
) -> dict[str, Any]:
    """The body of a streamed `/generate` request.

    Args:
        token_ids: The prompt.
        sampling: How tokens are chosen. `stop` is ignored; the guard looks for stop texts.
        flag_ids: K token ids.
        watch: Other ids to measure in place of the flags.
        original_logprobs: The server was started with `SGLANG_RETURN_ORIGINAL_LOGPROB=1`.

    Raises:
        RedflagError: When the values returned would not be raw probabilities.

    Example:
        >>> body = request([1, 2, 3], Sampling(temperature=0.0), [5])
        >>> body["token_ids_logprob"], body["sampling_params"]["logit_bias"]
        ([5], {'5': -40.0})
    """
    if not token_ids:
        raise RedflagError("the prompt must hold at least one token (got none).")
    if not flag_ids or set(flag_ids) & set(watch):
        raise RedflagError(
            f"flag_ids must hold at least one flag, and none that is in watch (got {list(flag_ids)} and {list(watch)})."
        )
    if sampling.temperature not in (0.0, 1.0) and not original_logprobs:
        raise RedflagError(
            f"temperature must be 0 or 1 (got {sampling.temperature}). SGLang returns probabilities after temperature, "
            "for which thresholds do not hold. Use 0 or 1, or start it with SGLANG_RETURN_ORIGINAL_LOGPROB=1 and set "
            "original_logprobs."
        )
    if sampling.repetition_penalty != 1.0:
        raise RedflagError(
            f"repetition_penalty must be 1 (got {sampling.repetition_penalty}). SGLang returns probabilities after "
            "penalties, for which thresholds do not hold."
        )
    params = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "logit_bias": {str(flag): FLAG_BIAS for flag in flag_ids},
        "stop_token_ids": list(flag_ids),
    }
    if sampling.seed is not None:  # honoured by servers started with --enable-deterministic-inference
        params["sampling_seed"] = sampling.seed
    return {
        "input_ids": list(token_ids),
        "sampling_params": params,
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": [*flag_ids, *watch],
        "return_text_in_logprobs": False,
    }


def steps(chunk: Mapping[str, Any], seen: int, flag_ids: Sequence[int], watch: Sequence[int] = ()) -> tuple[Step, ...]:
    """The steps that a streamed chunk adds.

    Lists in a chunk begin at the first token, or with `--incremental-streaming-output` where the last chunk ended;
    `completion_tokens` tells which.

    Args:
        chunk: One parsed `data:` line.
        seen: Steps of this response so far.
        flag_ids: As in `request`.
        watch: As in `request`; the steps then carry these probabilities.

    Returns:
        One step per new token, with raw probabilities; NaN where a flag was not measured, or was chosen.

    Raises:
        RedflagError: When the server reports an error or aborted the request, or the chunk is not what was asked for.
    """
    if "error" in chunk:
        raise RedflagError(f"SGLang reports {chunk['error']!r}. The response is not judged to its end.")
    finish = finish_reason(chunk)
    if finish == "abort":
        raise RedflagError("SGLang aborted the request. The response is not judged to its end. See SGLang's log.")
    try:
        meta = chunk["meta_info"]
        tokens, measured = meta["output_token_logprobs"], meta["output_token_ids_logprobs"]
        new = int(meta["completion_tokens"]) - seen
        if len(tokens) != len(measured) or not 0 <= new <= len(tokens):
            raise ValueError(f"{len(tokens)} tokens, {len(measured)} measurements and {new} new ones")
        first = len(tokens) - new
        return tuple(
            _step(int(token[1]), {int(i): value for value, i, *_ in row}, flag_ids, watch)
            for token, row in zip(tokens[first:], measured[first:], strict=True)
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RedflagError(
            f"SGLang's chunk must hold token_ids_logprob (got {error!r}). Its tokens cannot be judged. Use a version "
            "whose /generate returns them."
        ) from error


def finish_reason(chunk: Mapping[str, Any]) -> str | None:
    """Why the response ended: `stop`, `length` or `abort`; None while it goes on."""
    reason = (chunk.get("meta_info") or {}).get("finish_reason")
    return reason.get("type") if isinstance(reason, Mapping) else reason


def check_temperature(cool: Step, hot: Step, tolerance: float = 1e-3) -> None:
    """Refuses a server whose probabilities depend on temperature.

    Ask for one token of the same prompt twice, at temperature 1 and at 2 with `original_logprobs=True`, and give both
    steps. A prompt at which p is neither near 0 nor near 1 tells most.

    Raises:
        RedflagError: When the probabilities differ, or there are none.
    """
    pairs = list(zip(cool.flag_probs, hot.flag_probs, strict=True))
    if not all(abs(one - other) <= tolerance for one, other in pairs):  # false for NaN
        raise RedflagError(
            f"flag probabilities must not depend on temperature (got {cool.flag_probs} at 1 and {hot.flag_probs} at "
            "2). Start SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB=1."
        )


def _step(token_id: int, logprobs: Mapping[int, float | None], flag_ids: Sequence[int], watch: Sequence[int]) -> Step:
    biased = {i: _prob(logprobs.get(i)) for i in (*flag_ids, *watch)}
    lifted = {i: biased[i] * math.exp(-FLAG_BIAS) for i in flag_ids}
    if token_id in flag_ids:  # a flag is never chosen, unless the bias did not arrive
        return Step(token_id, (math.nan,) * len(watch or flag_ids))
    z = 1.0 / (sum(lifted.values()) + 1.0 - sum(biased[i] for i in flag_ids))
    probs = {**{i: p * z for i, p in biased.items()}, **{i: p * z for i, p in lifted.items()}}
    return Step(token_id, tuple(min(probs[i], 1.0) if probs[i] >= 0.0 else math.nan for i in (watch or flag_ids)))


def _prob(logprob: float | None) -> float:
    return math.exp(min(logprob, 0.0)) if logprob is not None and logprob > _LOST else math.nan
