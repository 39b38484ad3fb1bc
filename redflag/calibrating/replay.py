"""`redflag.watching.monitor` over many recorded responses at once: the same scores, bit by bit, in far less time.

The formulas are in that module. Here the responses are sorted by length and put side by side in blocks, T steps x B
responses x K flags, and each step of a block is computed for all its responses at once. Every number goes through the
same float64 operations in the same order as in `Monitor.feed`, so scores, peaks and alarms are *equal* to those of the
stream and not merely close: a threshold one float above a peak acts the same in both. That requires the standard
library's logarithm in `cusum`; see `_logarithm`.

Memory beyond the recording is that of a block or two; `scores` alone returns something as large as the recording.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError
from redflag.watching.monitor import LOGIT_CLIP, MonitorConfig, UnjudgedError, _logit, judged

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# Steps x responses x flags of a block: 8 MiB of float64, which fits the caches of a core.
BLOCK = 1 << 20


class Responses(Protocol):
    """N responses, their judged steps end to end; a `Recording` is one."""

    @property
    def probs(self) -> npt.NDArray[np.floating[Any]]:
        """S x K probabilities."""

    @property
    def starts(self) -> Indices:
        """N + 1 offsets: response i has steps `starts[i]` to `starts[i + 1]`."""


@dataclass(frozen=True)
class Steps:
    """`Responses`, and N x K factors of earlier answers for the odds of their scores (`redflag.watching.memory`)."""

    probs: npt.NDArray[np.floating[Any]]
    starts: Indices
    factors: Floats | None = None

    @classmethod
    def of(cls, responses: Iterable[Any], flags: int, what: str = "") -> Steps:
        """Gathers responses that are arrays or lists.

        Args:
            responses: Each T x K probabilities, T >= 0; double precision is kept.
            what: Prefix of "response 3" in errors.

        Raises:
            UnjudgedError: A step is not K numbers in [0, 1].
        """
        pieces: list[npt.NDArray[np.floating[Any]]] = []
        for number, response in enumerate(responses):
            single = isinstance(response, np.ndarray) and response.dtype == np.float32
            kind: type[np.floating[Any]] = np.float32 if single else np.float64
            try:
                piece: npt.NDArray[np.floating[Any]] = np.asarray(response, dtype=kind)
                sound = piece.shape == (len(response), flags) or not piece.size
            except (OverflowError, TypeError, ValueError):
                sound = False
            if not sound or not _in_range(piece):
                raise UnjudgedError(f"{what} response {number} cannot be judged: {_fault(response, flags)}".lstrip())
            pieces.append(piece.reshape(-1, flags))
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
        return cls(np.concatenate(pieces) if pieces else np.zeros((0, flags)), starts)


def scores(config: MonitorConfig, responses: Responses) -> Floats:
    """All scores: S x K, laid out as the probabilities are.

    Raises:
        UnjudgedError: A probability is not a number in [0, 1]; the message names the response.
    """
    result = np.zeros(responses.probs.shape)
    for block, _, values in _folded([config], responses, None):
        result[block.steps[block.inside]] = values[block.inside]
    return result


def peaks(config: MonitorConfig, responses: Responses, among: Sequence[int] | Indices | None = None) -> Floats:
    """The highest score of each flag in each response: N x K, zeros where a response has no steps.

    Args:
        among: Indices of the wanted responses; None = all.

    Raises:
        UnjudgedError: A probability is not a number in [0, 1]; the message names the response.
    """
    return peaks_of([config], responses, among)[0]


def peaks_of(
    configs: Sequence[MonitorConfig], responses: Responses, among: Sequence[int] | Indices | None = None
) -> Floats:
    """The peaks under each of several monitors in one pass: C x N x K. Otherwise as `peaks`."""
    count = len(responses.starts) - 1
    highest = np.zeros((len(configs), count, responses.probs.shape[1]))
    for block, number, values in _folded(configs, responses, among):
        if not block.inside.all():
            values[~block.inside] = 0.0
        highest[number, block.chosen] = values.max(axis=0, initial=0.0)
    return highest if among is None else highest[:, _indices(among)]


def alarms(
    config: MonitorConfig,
    responses: Responses,
    thresholds: Sequence[float] | Floats,
    among: Sequence[int] | Indices | None = None,
) -> Indices:
    """The step of each response at which a score first reaches its threshold: N, -1 where none does.

    Args:
        thresholds: K thresholds, or N x K: each response's own.
        among: Indices of the wanted responses; None = all. `thresholds` and the result are in that order.

    Raises:
        UnjudgedError: As `peaks`.
    """
    count, flags = len(responses.starts) - 1, responses.probs.shape[1]
    rows = np.arange(count) if among is None else _indices(among)
    limits = np.full((count, flags), np.inf)
    limits[rows] = np.asarray(thresholds, dtype=np.float64)
    first = np.full(count, -1, dtype=np.int64)
    for block, _, values in _folded([config], responses, among):
        hits = (values >= limits[block.chosen]).any(axis=2) & block.inside
        first[block.chosen] = np.where(hits.any(axis=0), hits.argmax(axis=0), -1)
    return first[rows]


def first_alarms(scores: Floats, responses: Responses, thresholds: Sequence[float] | Floats) -> Indices:
    """As `alarms`, from the S x K scores that `scores` returned."""
    hits = np.flatnonzero((scores >= np.asarray(thresholds, dtype=np.float64)).any(axis=1))
    owners = np.searchsorted(responses.starts, hits, side="right") - 1
    first_steps = np.full(len(responses.starts) - 1, -1, dtype=np.int64)
    owners, first = np.unique(owners, return_index=True)
    first_steps[owners] = hits[first] - responses.starts[owners]
    return first_steps


class _Block(NamedTuple):
    """B responses side by side: their indices, T x B places in `probs`, and which of those are theirs."""

    chosen: Indices
    steps: Indices
    inside: npt.NDArray[np.bool_]


def _folded(
    configs: Sequence[MonitorConfig], responses: Responses, among: Sequence[int] | Indices | None
) -> Iterator[tuple[_Block, int, Floats]]:
    """Block by block, and in each for every monitor: its number and the T x B x K scores (junk outside `inside`)."""
    _check(responses)
    lengths = np.diff(responses.starts)
    factors: Floats | None = getattr(responses, "factors", None)
    rows = np.arange(len(lengths)) if among is None else np.unique(_indices(among))
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    flags = responses.probs.shape[1]
    begin = 0
    while begin < len(rows) and (longest := int(lengths[rows[begin]])):
        members = rows[begin : begin + max(1, BLOCK // (longest * flags))]
        begin += len(members)
        time = np.arange(longest)[:, None]
        block = _Block(members, responses.starts[members] + time, time < lengths[members])
        # "clip": indices may reach beyond the end of the last response.
        probs = responses.probs.take(block.steps, axis=0, mode="clip").astype(np.float64)
        logits = _logits(probs) if any(config.aggregation == "cusum" for config in configs) else None
        for number, config in enumerate(configs):
            values = _fold(config, probs, logits)
            yield block, number, values if factors is None else raised(values, factors[members])


def _fold(config: MonitorConfig, probs: Floats, logits: Floats | None) -> Floats:
    """The scores of a block, a new array; the order of operations is that of `Monitor.feed`."""
    if config.aggregation == "max":
        values = probs.copy()
    elif config.aggregation == "first":
        values = np.zeros_like(probs)
        values[:1] = probs[:1]
    elif config.aggregation == "run":
        values = _lowest(probs, config.window)
    elif config.aggregation == "ema":
        old = 1.0 - config.decay
        values = config.decay * probs
        values[0] += old * config.prior
        held = np.empty_like(values[0])
        for before, now in itertools.pairwise(values):
            np.multiply(before, old, out=held)
            np.add(now, held, out=now)
    else:
        assert logits is not None
        gain = _logit(config.prior) + config.drift
        values = logits.copy()
        state = np.zeros_like(values[0])
        for now in values:
            np.add(state, now, out=now)
            np.subtract(now, gain, out=now)
            np.maximum(now, 0.0, out=now)
            state = now
    values[: config.warm_up] = 0.0
    return values


def raised(scores: Floats, factors: Floats) -> Floats:
    """`redflag.watching.memory.raised` for arrays, bit by bit."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        lifted = 1.0 / (1.0 + (1.0 - scores) / scores / factors)
    return np.where((factors == 1.0) | (scores == 0.0), scores, np.maximum(scores, lifted))


def _lowest(probs: Floats, window: int) -> Floats:
    """Minimum of the last `window` steps, in about log2(window) passes; 0 before there are so many."""
    values, width = probs.copy(), 1
    while width < min(window, len(values)):
        further = min(width, window - width)
        # The last `width` steps, and the `width` that end `further` steps earlier: `width + further` steps in all.
        values[further:] = np.minimum(values[further:], values[:-further])
        width += further
    values[: window - 1] = 0.0
    return values


def _logits(probs: Floats) -> Floats:
    """Log-odds in nats, clipped as the monitor clips them."""
    clipped = np.minimum(np.maximum(probs, LOGIT_CLIP), 1.0 - LOGIT_CLIP).reshape(-1)
    odds = clipped / (1.0 - clipped)
    log = _logarithm()
    # In chunks: the logarithms may be Python objects for a moment.
    for start in range(0, len(odds), 8192):
        odds[start : start + 8192] = log(odds[start : start + 8192])
    return odds.reshape(probs.shape)


@functools.cache
def _logarithm() -> Callable[[Floats], Any]:
    """`math.log` for arrays.

    numpy uses the C library's logarithm, as `math` does, or on some processors (AVX-512) one of its own that differs in
    the last bit of some values in a thousand. A test on a few thousand values tells which; its own is not used,
    although it is twenty times as fast as calling `math.log` for each value.
    """
    probe = np.random.default_rng(0).random(1 << 15)
    probe = probe / (1.0 - probe)
    if np.array_equal(np.log(probe), [math.log(x) for x in probe.tolist()]):
        return np.log
    return np.frompyfunc(math.log, 1, 1)


def _indices(among: Sequence[int] | Indices) -> Indices:
    return np.asarray(among, dtype=np.int64)


def _in_range(probs: npt.NDArray[np.floating[Any]]) -> bool:
    # Both fail for NaN, which `min` passes on.
    return not probs.size or bool(probs.min() >= 0.0 and probs.max() <= 1.0)


def _fault(response: Any, flags: int) -> str:
    """The monitor's message for a response that it would refuse."""
    try:
        for step in response:
            judged(step, flags)
    except RedflagError as error:
        return str(error)
    except TypeError:
        pass
    return f"it is not T steps of {flags} numbers in [0, 1]"


def _check(responses: Responses) -> None:
    if _in_range(responses.probs):
        return
    with np.errstate(invalid="ignore"):
        bad = int(np.flatnonzero(~((responses.probs >= 0.0) & (responses.probs <= 1.0)).all(axis=1))[0])
    owner = int(np.searchsorted(responses.starts, bad, side="right")) - 1
    step = bad - int(responses.starts[owner])
    raise UnjudgedError(
        f"response {owner} cannot be judged at step {step}: {_fault([responses.probs[bad]], responses.probs.shape[1])}"
    )
