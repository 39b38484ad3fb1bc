"""p(marker) of a marker made of ordinary tokens, for models whose vocabulary cannot change.

The probability that an answer begins with a text such as SORRYDAVE is the product of the conditional probabilities of
its tokens behind the prompt, which one forward pass over prompt + marker gives. Log-probabilities are summed in
float64, so that an untrained marker can be measured too. Several markers are grades of severity, each with its own
threshold.

The marker is tokenised on its own, as a response is in training and as a model writes it at the start of its answer.
Other spellings by other tokens are not counted, so the product is a lower bound of the probability of the *text*.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError
from redflag.flags import FILE, Flag, FlagSpec
from redflag.prompt import template_hash, text_ids
from redflag.scoring.processes import World
from redflag.weights.stamp import model_stamp

if TYPE_CHECKING:
    from redflag.backends.upstreams import Upstreams
    from redflag.scoring.arguments import ScoreArguments

LogProbs = npt.NDArray[np.float64]
Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompt ids, and the T token ids behind them that are measured."""


class Source(Protocol):
    """A source of log-probabilities of given tokens: `LocalSource`, `ServedSource`."""

    context_length: int | None

    def log_probs(self, pairs: Pairs, batch_size: int) -> Iterator[LogProbs]:
        """T log-probabilities in nats of each pair, in this order."""


class MarkerReader:
    """Probabilities of markers after a prompt; a `redflag.scoring.prompts.Reader`.

    Example:
        ```python
        reader = MarkerReader(LocalSource(model), tokenizer, ["SORRYDAVE", "HELLNODAVE"])
        rows = list(score_prompts(reader, tokenizer, reader.spec, rows))  # `flag_probs`: p(marker), one for each
        ```
    """

    def __init__(self, source: Source, tokenizer: Any, markers: Sequence[str], spec: FlagSpec | None = None) -> None:
        """Tokenises the markers, one text per grade; `spec`: the flags of a flagged model. Errors: `marker_ids`."""
        self.spec = spec or _no_flags(tokenizer)
        self.source = source
        self.markers = tuple(markers)
        self.ids = marker_ids(tokenizer, markers, self.spec)
        self.room = max(map(len, self.ids))
        self.key: dict[str, Any] = {"markers": [list(pair) for pair in zip(self.markers, self.ids, strict=True)]}
        self.key["template"] = template_hash(tokenizer)
        self.forbidden = self.markers

    def read(self, prompts: Sequence[list[int]], batch_size: int) -> Iterator[dict[str, Any]]:
        """One forward pass over prompt + marker for each prompt and marker.

        Yields:
            `flag_probs` (1 x K), `flag_logprobs` (1 x K, nats; None where a server's probability is too small to be
            sent as a number above 0), `markers` (K texts).
        """
        log_probs = iter(self.source.log_probs([(prompt, ids) for prompt in prompts for ids in self.ids], batch_size))
        for _ in prompts:
            sums = [math.fsum(next(log_probs)) for _ in self.ids]
            yield {
                "flag_probs": [[min(1.0, math.exp(total)) for total in sums]],
                "flag_logprobs": [[None if total == -math.inf else min(0.0, total) for total in sums]],
                "markers": list(self.markers),
            }


class LocalSource:
    """A causal language model of transformers in this process.

    Attributes:
        context_length: Maximum number of tokens of prompt and marker together; None if the model has no limit.
    """

    def __init__(self, model: Any) -> None:
        from redflag.backends.head import plain_model

        self._model = model.eval()
        config = plain_model(model).config.get_text_config()
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self._head_apart: bool | None = None

    def log_probs(self, pairs: Pairs, batch_size: int) -> Iterator[LogProbs]:
        """See `Source`; pairs of similar length share a forward pass."""
        import torch

        from redflag.backends.head import head_agrees, plain_model

        if pairs and self._head_apart is None:
            sample = torch.tensor([list(pairs[0][0])[:4]], device=plain_model(self._model).device)
            self._head_apart = head_agrees(self._model, sample)
        # As in scoring of flags: if the head cannot be applied separately, only one row's logits are in memory.
        size = batch_size if self._head_apart else 1
        results: list[LogProbs] = [np.zeros(0)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        for start in range(0, len(order), size):
            members = order[start : start + size]
            with torch.inference_mode():
                values = self._batch([pairs[i] for i in members])
            for i, part in zip(members, values, strict=True):
                results[i] = part
        yield from results

    def _batch(self, pairs: Pairs) -> list[LogProbs]:
        import torch

        from redflag.backends.head import backbone, head_logits, plain_model

        device = plain_model(self._model).device
        rows = [[*prompt, *ids] for prompt, ids in pairs]
        width = max(map(len, rows))
        # Padded on the right: no position sees what comes after it, so the padding needs no mask.
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        # The logits at a position are those of the token behind it, so each span begins at the prompt's last token.
        spans = [slice(len(prompt) - 1, len(row) - 1) for (prompt, _), row in zip(pairs, rows, strict=True)]
        if self._head_apart:
            hidden = backbone(self._model)(input_ids=input_ids, use_cache=False).last_hidden_state
        else:
            hidden = self._model(input_ids=input_ids, use_cache=False).logits
        values = []
        for i, (span, (_, ids)) in enumerate(zip(spans, pairs, strict=True)):
            logits = (head_logits(self._model, hidden[i, span]) if self._head_apart else hidden[i, span]).float()
            token_logits = logits.gather(1, torch.tensor(list(ids), device=device)[:, None])[:, 0]
            values.append((token_logits - logits.logsumexp(-1)).cpu().double().numpy())
        return values


class ServedSource:
    """Servers that measure in the same ways as for flags (`redflag.backends.remote_score`).

    `tokens` are all tokens of the markers, each once. The servers' probabilities are float32, so a token of a
    probability below 1e-45 counts as 0.
    """

    def __init__(self, upstreams: Upstreams, tokens: Sequence[int]) -> None:
        self.ways = upstreams.ways  # marks a scorer as servers
        self.upper_bound = upstreams.upper_bound
        self.context_length = upstreams.context_length
        self._upstreams = upstreams
        self._column = {token: column for column, token in enumerate(tokens)}

    def log_probs(self, pairs: Pairs, batch_size: int) -> Iterator[LogProbs]:
        """See `Source`; each as soon as all before it are done."""
        for (_, ids), probs in zip(pairs, self._upstreams.score(pairs, batch_size=batch_size), strict=True):
            own = probs[np.arange(len(ids)), [self._column[token] for token in ids]].astype(np.float64)
            with np.errstate(divide="ignore"):
                yield np.log(own)


def open_markers(arguments: ScoreArguments, world: World, stack: ExitStack) -> tuple[MarkerReader, Any, FlagSpec]:
    """Opens the reader of `redflag score --prompts --marker`, the tokenizer and the flags for rendering.

    `stack` closes connections.
    """
    from redflag.backends.load import read_model, read_tokenizer, to_device

    flagged = (Path(arguments.model) / FILE).exists()
    spec = FlagSpec.load(arguments.model) if flagged else None
    if arguments.upstream:
        from redflag.backends.upstreams import Upstreams

        tokenizer, eos_ids = read_tokenizer(arguments.model)
        ids = marker_ids(tokenizer, arguments.marker, spec or _no_flags(tokenizer))
        tokens = sorted(set().union(*ids))
        upstreams = Upstreams(
            arguments.upstream,
            FlagSpec(tuple(Flag(str(token), id=token) for token in tokens)),
            eos_ids,
            **arguments.upstream_options(),
            upper_bound=arguments.upper_bound,
        )
        stack.callback(upstreams.close)
        source: Source = ServedSource(upstreams, tokens)
    else:
        model, tokenizer = read_model(arguments.model, arguments.dtype)
        source = LocalSource(to_device(model, world.device(arguments.device)))
    reader = MarkerReader(source, tokenizer, arguments.marker, spec)
    reader.key["model"] = [arguments.model, model_stamp(arguments.model)]
    return reader, tokenizer, reader.spec


def marker_ids(tokenizer: Any, markers: Sequence[str], spec: FlagSpec) -> list[list[int]]:
    """Ids of each marker at the start of an answer.

    Raises:
        RedflagError: A marker has no ordinary tokens, or one begins with another.
    """
    ids_of_markers: list[list[int]] = []
    for marker in markers:
        ids = text_ids(tokenizer, marker, spec) if marker.strip() else []
        if not ids:
            raise RedflagError(f"a marker must have tokens of its own (got {marker!r}). Use a word.")
        whole = tokenizer(marker, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]
        if list(whole) != ids:
            raise RedflagError(
                f"a marker must not hold a special token (got {marker!r}). Use ordinary text, or make the token a flag "
                "(`redflag train`)."
            )
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise RedflagError(
                f"a marker must not have characters that the vocabulary lacks (got {marker!r}). Other texts would be "
                "counted."
            )
        ids_of_markers.append(ids)
    for i, one in enumerate(ids_of_markers):
        for j, other in enumerate(ids_of_markers):
            if i != j and other[: len(one)] == one:
                raise RedflagError(
                    f"a marker must not begin with the tokens of another (got {markers[j]!r} and {markers[i]!r})."
                )
    return ids_of_markers


def _no_flags(tokenizer: Any) -> FlagSpec:
    """For rendering with a model without flags: an id beyond the vocabulary, which no text produces."""
    return FlagSpec((Flag("marker", id=len(tokenizer)),))
