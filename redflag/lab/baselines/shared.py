"""What the baselines of one comparison share: rows as ids, a base model, limits, and how scores become a recording."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.flags import FILE, Flag, FlagSpec
from redflag.lab.baselines import Cost
from redflag.progress import track
from redflag.scoring.fitting import fit
from redflag.scoring.processes import World
from redflag.scoring.recording import Recording
from redflag.scoring.scored import Scored, as_recorded

Floats = npt.NDArray[np.float32]
HiddenFrom = Literal["reference", "flagged"]


class Read(NamedTuple):
    """A row as ids."""

    row: Row
    prompt_ids: list[int]
    judged_ids: list[int]  # the T tokens of the response, then the M that end its turn: a step for each
    tokens: int  # T
    onset: int | None  # index of the first harmful token; None in a harmless row
    truncated: bool  # whether the end of the response did not fit


@dataclass
class Timing:
    """Time spent on judged steps; that of passes over their prompts is included."""

    seconds: float = 0.0
    steps: int = 0

    @contextmanager
    def measuring(self, steps: int) -> Iterator[None]:
        """Adds the time of a block and the number of steps that it judged."""
        begun = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begun
        self.steps += steps

    @property
    def microseconds_per_token(self) -> float | None:
        return 1e6 * self.seconds / self.steps if self.steps else None


@dataclass(frozen=True)
class BaselineContext:
    """What the baselines of one comparison share."""

    base: Path  # folder of the model before it got its flags: baselines read it or are trained from it
    model: Path | None  # folder of the flagged model, whose tokenizer splits the responses; None: the base model's does
    folder: Path  # where hidden states are stored while they are needed
    seed: int = 0
    # maximum tokens of prompt and response; a prompt that does not fit loses its oldest turns
    max_length: int | None = None
    batch_size: int = 32  # conversations per forward pass
    hidden_from: HiddenFrom = "reference"  # whose hidden states the probes read
    device: str = "cpu"
    bf16: bool = False  # whether models that are only read run under bfloat16 autocast

    def __post_init__(self) -> None:
        if self.device == "auto":
            from redflag.weights.precision import inference_device

            object.__setattr__(self, "device", inference_device())

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that splits the responses."""
        from redflag.backends.load import plain_tokenizer

        source = self.base if self.model is None else self.model
        try:
            return plain_tokenizer(source)
        except (OSError, ValueError) as error:
            raise RedflagError(
                f"the folder {source} must hold a tokenizer ({str(error).partition(chr(10))[0]}). Give a "
                "model's folder."
            ) from error

    @cached_property
    def spec(self) -> FlagSpec:
        """The flags that no row may write."""
        if self.model is not None and (self.model / FILE).exists():
            return FlagSpec.load(self.model)
        # An id that the tokenizer never gives: rows are rendered as they are for a flagged model.
        return FlagSpec((Flag("harm", id=len(self.tokenizer)),))

    @cached_property
    def limit(self) -> int | None:
        """Maximum tokens of prompt and response: `max_length`, or the base model's context."""
        return self.max_length or getattr(self.config, "max_position_embeddings", None)

    @cached_property
    def config(self) -> Any:
        """The base model's configuration, of its text part."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.base).get_text_config()

    @cached_property
    def forward_flops(self) -> float | None:
        """FLOPs per token of the base model's own forward pass, where they are known."""
        return forward_flops(self.base)

    def cost(self, timing: Timing, flops: float, note: str) -> Cost:
        """A cost whose note also tells the FLOPs per token as a share of the model's own forward pass, if known."""
        if self.forward_flops is not None:
            note += f"; {flops / self.forward_flops:.2%} of that pass's {self.forward_flops:.3g} FLOPs"
        return Cost(timing.microseconds_per_token, float(flops), note)

    @property
    def hidden_folder(self) -> Path:
        """The model whose hidden states are read."""
        if self.hidden_from == "reference":
            return self.base
        if self.model is None:
            raise RedflagError("model_dir must be given to read the flagged model's hidden states.")
        return self.model

    def read(self, rows: Sequence[Row]) -> list[Read]:
        """Rows as ids, cut as scoring cuts them."""
        reads = []
        for number, row in enumerate(rows):
            fitted = fit(self.tokenizer, self.spec, row, number, self.limit)
            judged = fitted.response_ids + fitted.tail_ids
            tokens = len(fitted.response_ids)
            reads.append(Read(row, fitted.prompt_ids, judged, tokens, fitted.onset, fitted.truncated))
        return reads

    def record(self, reads: Sequence[Read], probs: Sequence[Floats], name: str) -> Recording:
        """A recording with one flag, "harm", from the T + M probabilities of each row."""
        responses = []
        for read, judged in zip(reads, probs, strict=True):
            assert judged.shape == (len(read.judged_ids),), (judged.shape, len(read.judged_ids))
            column = judged.astype(np.float32)[:, None]
            probs_of = column[: read.tokens], column[read.tokens :]
            scored = Scored(read.row, read.judged_ids[: read.tokens], *probs_of, read.onset, read.truncated)
            responses.append(as_recorded(scored))
        return Recording.of(["harm"], responses, {"baseline": name, "seed": self.seed})


def trained_on(most_rows: int | None) -> str:
    """What a description says of the rows."""
    if most_rows is None:
        return "trained on the same rows as the flag."
    return f"trained on at most {most_rows} of the flag's rows, drawn by seed."


def require_one_process(name: str) -> None:
    """Refuses to train a model in a process that others have left by the time that its rows are scored.

    Raises:
        RedflagError: There are several.
    """
    if (size := World.here().size) > 1:
        raise RedflagError(
            f"the baseline {name!r} must be trained by one process (got {size}). The others have left when rows are "
            "scored. Give the same command again without `accelerate launch`: it goes on from there."
        )


def digest(value: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def forward_flops(folder: str | Path) -> float | None:
    """FLOPs per token of a model's own forward pass: 2 x weights that are multiplied with, attention apart.

    None where its weights do not lie in safetensors files, or only an adapter's do.
    """
    from safetensors import safe_open
    from transformers import AutoConfig

    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        return None
    tied = AutoConfig.from_pretrained(folder).get_text_config().tie_word_embeddings
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                # A tied embedding is multiplied with as the head; one of its own is only looked up in.
                if "embed" not in name or tied:
                    total += int(np.prod(file.get_slice(name).get_shape()))
    return 2.0 * total if total else None


def thinned(rows: Sequence[Row], most: int | None, seed: int) -> list[Row]:
    """At most `most` rows, in their order, drawn so that the share of harmful ones stays."""
    if most is None or len(rows) <= most:
        return list(rows)
    draw = random.Random(seed)
    picks: list[int] = []
    for harmful in (True, False):
        side = [i for i, row in enumerate(rows) if row.harmful == harmful]
        picks += draw.sample(side, min(len(side), max(1, round(most * len(side) / len(rows)))))
    return [rows[i] for i in sorted(picks)]


def drawn_batches(lengths: Sequence[int], size: int, generator: torch.Generator) -> list[list[int]]:
    """Indices of examples: those of similar length together (half the padding), batches in random order."""
    jitter = torch.rand(len(lengths), generator=generator).tolist()
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] * (0.8 + 0.4 * jitter[i]))
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def multiplied_weights(model: Any) -> int:
    """Number of weights that a forward pass multiplies with; embeddings are only looked up in."""
    return sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)


def score_pairs(backend: Any, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int, what: str) -> list[Any]:
    """Flag probabilities of responses, in the batches that `HFBackend.score` would make, with progress."""
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    scores: list[Any] = [None] * len(pairs)
    starts = range(0, len(order), batch_size)
    for start in track(starts, what, len(starts), "batches"):
        picks = order[start : start + batch_size]
        for i, probs in zip(picks, backend.score([pairs[i] for i in picks], batch_size=batch_size), strict=True):
            scores[i] = probs
    return scores
