"""Requests to an OpenAI-compatible completion server, and steps from its answers. No network code.

Written against vLLM 0.32 (`vllm/entrypoints/openai/completion`). With `return_tokens_as_token_ids` a chunk reads

    {"choices": [{"index": 0, "text": " cat", "finish_reason": null, "token_ids": [667], "logprobs":
      {"tokens": ["token_id:667"], "top_logprobs": [{"token_id:667": -7.88, "token_id:5": -3.80}], ...}}]}

with one token or several. Everything unexpected is a fault: no token is passed on without the probabilities that were
measured before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from types import EllipsisType
from typing import Any

from redflag.backends import Sampling
from redflag.errors import RedflagError
from redflag.trace import Logprobs, Step

MOST_IDS = 128  # vLLM's MAX_LOGPROB_TOKEN_IDS
TOP = 20  # vLLM's default of --max-logprobs
_LONGEST_EVENT = 1 << 24  # bytes; the first chunk repeats the prompt's ids


def request_body(
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    *,
    model: str,
    measured: Sequence[int],
    banned: Collection[int],
    eos_ids: Collection[int],
    upper_bound: bool,
    allowed: Sequence[int] = (),
) -> dict[str, Any]:
    """The body of a request to `/v1/completions`.

    Every sampling option is sent: the server would take missing ones from the model's `generation_config.json`.

    Args:
        sampling: `stop` is not sent.
        measured: Ids whose log-probability is requested at every step.
        banned: Ids that must not be chosen.
        upper_bound: Request the `TOP` most likely tokens, for a server without `logprob_token_ids`.
        allowed: The only ids that may be chosen, which vLLM applies after taking log-probabilities; empty allows all.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "stream": True,
        "n": 1,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,  # -1 is off in every version, 0 only in newer ones
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(eos_ids),
        "logprobs": TOP if upper_bound else len(set(measured)),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed % (1 << 63)  # vLLM reads -1 as "no seed"
    if not upper_bound:
        body["logprob_token_ids"] = list(dict.fromkeys(measured))
    if allowed:
        body["allowed_token_ids"] = list(allowed)
    if banned:
        body["logit_bias"] = {str(token_id): -100.0 for token_id in sorted(banned)}
    return body


class StreamReader:
    """Parses the bytes of one streamed answer into steps; a state machine without I/O.

    Attributes:
        finish: `"stop"` or `"length"` once the response is over, `"nan"` after a step that could not be judged; None
            before that. Data fed after the end is ignored.

    Example:
        >>> reader = StreamReader([7], measured=[5], banned=[5], eos_ids=[1])
        >>> chunk = {"choices": [{"text": "a", "token_ids": [9], "finish_reason": "length",
        ...     "logprobs": {"tokens": ["token_id:9"], "top_logprobs": [{"token_id:9": -1.0, "token_id:5": -2.0}]}}]}
        >>> reader.feed(b"data: " + json.dumps(chunk).encode() + b"\\n\\n")
        [Step(token_id=9, flag_probs=(0.1353352832366127,), logprobs=None, earlier=None)]
        >>> reader.finish
        'length'
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        measured: Sequence[int],
        banned: Collection[int],
        eos_ids: Collection[int],
        upper_bound: bool = False,
        vocab_size: int | None = None,
        logprobs: bool = False,
    ) -> None:
        """Takes the arguments of the request.

        Args:
            logprobs: Steps carry the chosen token's log-probability; then `measured` must be all flags.
        """
        self.finish: str | None = None
        self._prompt = list(prompt)
        self._names = tuple(f"token_id:{token_id}" for token_id in measured)
        self._banned = frozenset(banned)
        self._eos_ids = frozenset(eos_ids)
        self._upper_bound = upper_bound
        self._vocab_size = math.inf if vocab_size is None else vocab_size
        self._logprobs = logprobs
        self._rest = b""
        self._last: int | None = None

    def feed(self, data: bytes) -> list[Step]:
        """Takes the next bytes, split anywhere.

        Returns:
            The steps completed by them.

        Raises:
            ConnectionError: The answer does not match the request, or the server reports a failure.
            RedflagError: The server refuses the request in the stream; only before the first step.
        """
        # Split as bytes: a piece of data can end inside a character, but a line cannot.
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _LONGEST_EVENT:
            raise ConnectionError(f"the server sent a line of more than {_LONGEST_EVENT} bytes")
        steps: list[Step] = []
        for line in lines:
            if self.finish is not None:
                break
            # Other fields of server-sent events, keep-alive comments and empty lines are skipped.
            if line.startswith(b"data:"):
                self._chunk(line[5:].strip(), steps)
        return steps

    def ended(self) -> None:
        """To be called when the server closes the stream.

        Raises:
            ConnectionError: The response was not over.
        """
        if self.finish is None:
            raise ConnectionError("the server ended the stream without a finish_reason")

    def _chunk(self, data: bytes, steps: list[Step]) -> None:
        if data == b"[DONE]":
            self.ended()
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                self._refused(chunk["error"])
            for choice in self._choices(chunk):  # empty in a chunk that only reports usage
                self._choice(choice, steps)
        except ConnectionError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ConnectionError(
                f"the server sent a chunk of an unexpected shape ({type(error).__name__}: {error}): {data[:200]!r}"
            ) from error
        except RedflagError:
            raise
        except ValueError as error:
            raise ConnectionError(f"the server sent invalid JSON ({error}): {data[:200]!r}") from error

    def _choices(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = chunk["choices"]
        return choices

    def _choice(self, choice: dict[str, Any], steps: list[Step]) -> None:
        if choice.get("index", 0) != 0:
            raise ConnectionError("the server sent a second response to a request for one")
        if (prompt := choice.get("prompt_token_ids")) is not None and prompt != self._prompt:
            raise ConnectionError("the server changed the prompt, so this response belongs to another one")
        self._steps(choice, steps)
        if (finish := choice.get("finish_reason")) is None or self.finish is not None:
            return
        if finish not in ("stop", "length"):
            raise ConnectionError(f"the server cut the response off: finish_reason {finish!r}")
        # "stop" at any other token would be a stop that redflag did not ask for, in the middle of the response.
        if finish == "stop" and self._last not in self._eos_ids:
            raise ConnectionError(
                f"the server ended the response at token {self._last} (stop_reason {choice.get('stop_reason')!r}), "
                f"which is not one of the end-of-sequence ids {sorted(self._eos_ids)}"
            )
        self.finish = finish

    def _steps(self, choice: dict[str, Any], steps: list[Step]) -> None:
        logprobs = choice.get("logprobs")
        token_ids = choice.get("token_ids")
        if not logprobs:
            if token_ids or choice.get("text"):
                raise ConnectionError("the server sent a token without log-probabilities")
            return
        # Ids, names and log-probabilities are three parallel lists. They must agree at every token, or the
        # probabilities could belong to another token than the one that is shown.
        names, tops = logprobs["tokens"], logprobs["top_logprobs"]
        if token_ids is None:  # a server that supports only `return_tokens_as_token_ids`
            token_ids = [_token_id(name) for name in names]
        chosen = logprobs.get("token_logprobs") or [...] * len(names)
        if not len(token_ids) == len(names) == len(tops) == len(chosen):
            raise ConnectionError(
                f"the server sent {len(token_ids)} tokens with {len(tops)} sets of log-probabilities for {len(names)}"
            )
        if not token_ids and choice.get("text"):
            raise ConnectionError("the server sent text without tokens")
        for token_id, name, top, logprob in zip(token_ids, names, tops, chosen, strict=True):
            if type(token_id) is not int or not 0 <= token_id < self._vocab_size or name != f"token_id:{token_id}":
                raise ConnectionError(f"the server named token {token_id!r} {name!r}, so its id is not certain")
            if self.finish is not None or self._last in self._eos_ids:
                raise ConnectionError(f"the server continued after the end of the response, with token {token_id}")
            if token_id in self._banned:
                raise ConnectionError(f"the server chose token {token_id}, which logit_bias bans")
            check_own(name, top, logprob)
            probs = (
                self._bounds(name, top) if self._upper_bound else tuple(measured_in(one, top) for one in self._names)
            )
            steps.append(Step(token_id, probs, self._language(top[name], probs) if self._logprobs else None))
            self._last = token_id
            # The step is passed on: its consumer halts on NaN. Later steps of the same chunk must not follow it.
            if any(map(math.isnan, probs)):
                self.finish = "nan"
                return

    def _language(self, logprob: float | None, flag_probs: Sequence[float]) -> Logprobs:
        """The chosen token's log-probability without the flags, whose mass is spread over the other tokens."""
        # log q(token) = log p(token) - log(1 - p(all flags))
        left = 1.0 - math.fsum(flag_probs)
        if logprob is None or not left > 0.0:
            return Logprobs(math.nan)
        return Logprobs(min(0.0, logprob - math.log(left)))

    def _bounds(self, chosen: str, top: dict[str, float | None]) -> tuple[float, ...]:
        """Upper bounds for the measured ids: one that is not among the most likely is below the last of them."""
        probs = {name: probability_of(logprob) for name, logprob in top.items()}
        if any(map(math.isnan, probs.values())):
            return (math.nan,) * len(self._names)
        # The chosen token may be a 21st, less likely than some that are not listed.
        bound = min((prob for name, prob in probs.items() if name != chosen), default=0.0)
        # Other requests in the batch can make vLLM send fewer, or -inf for some, which gives no bound.
        if len(probs) < TOP or bound == 0.0:
            raise ConnectionError(f"the server sent {len(probs)} log-probabilities, not the {TOP} largest")
        return tuple(probs.get(name, bound) for name in self._names)

    def _refused(self, error: Any) -> None:
        if not isinstance(error, dict):
            error = {"message": error}
        reason, code = reason_of({"error": error}), error.get("code")
        if self._last is None and type(code) is int and 400 <= code < 500 and code not in (408, 429):
            raise RefusalError(code, reason)
        raise ConnectionError(f"the server failed: {reason}")


class RefusalError(RedflagError):
    """The server refuses a request.

    Attributes:
        status: HTTP status, 400 to 499.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"The upstream server refused the request ({status}: {reason})")
        self.status, self.reason = status, reason


def reason_of(body: Any) -> str:
    """The server's message in the body of an error, in any of the common shapes.

    Example:
        >>> reason_of({"error": {"message": "too long"}}), reason_of({"detail": "no"}), reason_of(None)
        ('too long', 'no', 'no reason given')
    """
    for _ in range(2):
        if isinstance(body, dict):
            body = body.get("error") or body.get("message") or body.get("detail")
    if isinstance(body, dict | list):
        body = json.dumps(body)
    return str(body)[:1000] if body else "no reason given"


def measured_in(name: str, top: dict[str, float | None]) -> float:
    """The probability of a measured id at one position; NaN if it was masked."""
    if name not in top:
        raise ConnectionError(f"the server sent no log-probability of {name}")
    logprob = top[name]
    # A raw logit is finite: -inf means that something, such as structured output, masked the token before it was
    # measured.
    return math.nan if logprob is not None and logprob <= _MASKED else probability_of(logprob)


def check_own(chosen: str, top: Mapping[str, float | None], logprob: float | EllipsisType | None = ...) -> None:
    """Checks that log-probabilities belong to the position at which a token was chosen, not to a neighbour.

    A server that sends several tokens at once may copy or shift them; a flag's would then belong to another step. The
    log-probabilities of a position always include its chosen token's.

    Args:
        chosen: The chosen token's name.
        top: Name -> log-probability, as sent for its position.
        logprob: The chosen token's log-probability, which servers also send separately; `...` if this one did not.

    Raises:
        ConnectionError: They belong to another position.
    """
    if chosen not in top:
        raise ConnectionError(f"the server sent log-probabilities of another token: {chosen} is not among them")
    if logprob is ... or _same(top[chosen], logprob):
        return
    raise ConnectionError(
        f"the server sent log-probabilities of another token: {chosen} has {top[chosen]} there, and {logprob} by itself"
    )


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None or math.isnan(one) or math.isnan(other):
        return (one is None or math.isnan(one)) and (other is None or math.isnan(other))
    return one == other or abs(one - other) <= _ROUNDING


_ROUNDING = 1e-4
_MASKED = -9999.0  # what vLLM writes for -inf


def probability_of(logprob: float | None) -> float:
    """A probability in [0, 1]; NaN if the engine has none (vLLM writes NaN as null)."""
    if logprob is None or math.isnan(logprob):
        return math.nan
    if logprob > 1e-3:
        raise ConnectionError(f"the server sent {logprob}, which is not a log-probability")
    return min(1.0, math.exp(logprob))


def _token_id(name: str) -> int:
    word, _, number = name.partition(":")
    if word != "token_id" or not number.isdecimal():
        raise ConnectionError(f"the server named a token {name!r} instead of its id")
    return int(number)
