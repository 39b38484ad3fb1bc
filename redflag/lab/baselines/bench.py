"""What the baselines of one comparison share: rows as ids, a base model, limits, and how scores become a recording."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.flags import FILE, Flag, FlagSpec
from redflag.progress import track
from redflag.scoring.fitting import fit
from redflag.scoring.recording import Recording
from redflag.scoring.scored import Scored, as_recorded

Floats = npt.NDArray[np.float32]
HiddenFrom = Literal["reference", "flagged"]


class Read(NamedTuple):
    """A row as ids.

    Attributes:
        row: The row.
        prompt_ids: What stands before the response.
        judged_ids: The T tokens of the response, then the M that end its turn: a step for each.
        tokens: T.
        onset: Index of the first harmful token; None in a harmless row.
        truncated: Whether the end of the response did not fit.
    """

    row: Row
    prompt_ids: list[int]
    judged_ids: list[int]
    tokens: int
    onset: int | None
    truncated: bool


@dataclass(frozen=True)
class Bench:
    """What the baselines of one comparison share.

    Attributes:
        base: Folder of the model before it got its flags, the reference: baselines read it or are trained from it.
        model: Folder of the flagged model, whose tokenizer splits the responses; None: the base model's does.
        folder: Where hidden states are kept while they are needed.
        seed: Seeds everything that is drawn.
        max_length: Most tokens of prompt and response; a prompt that does not fit loses its oldest turns.
        batch_size: Conversations per forward pass.
        hidden_from: Whose hidden states the probes read.
        device: Where models run; "auto" is the first GPU where there is one.
        bf16: Whether hidden states are read, and questions asked, under bfloat16 autocast.
    """

    base: Path
    model: Path | None
    folder: Path
    seed: int = 0
    max_length: int | None = None
    batch_size: int = 32
    hidden_from: HiddenFrom = "reference"
    device: str = "cpu"
    bf16: bool = False

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
                f"{source} has no tokenizer that loads ({str(error).partition(chr(10))[0]}): give a model's folder"
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
        """Most tokens of prompt and response: `max_length`, or what the base model holds."""
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

    def beside_forward(self, flops: float) -> str:
        """FLOPs per token as a share of the model's own forward pass, in words."""
        if self.forward_flops is None:
            return ""
        return f"; {flops / self.forward_flops:.2%} of that pass's {self.forward_flops:.3g} FLOPs"

    @property
    def hidden_folder(self) -> Path:
        """The model whose hidden states are read.

        Raises:
            RedflagError: The flagged model's are asked for and there is none.
        """
        if self.hidden_from == "reference":
            return self.base
        if self.model is None:
            raise RedflagError("hidden states of the flagged model are asked for and there is none: give its folder")
        return self.model

    def read(self, rows: Sequence[Row]) -> list[Read]:
        """Rows as ids, cut as scoring cuts them.

        Raises:
            RedflagError: A row cannot be rendered.
        """
        found = []
        for number, row in enumerate(rows):
            fitted = fit(self.tokenizer, self.spec, row, number, self.limit)
            judged = fitted.response_ids + fitted.tail_ids
            tokens = len(fitted.response_ids)
            found.append(Read(row, fitted.prompt_ids, judged, tokens, fitted.onset, fitted.truncated))
        return found

    def record(self, reads: Sequence[Read], probs: Sequence[Floats], name: str) -> Recording:
        """A recording with one flag, "harm".

        Args:
            reads: N rows.
            probs: For each its T + M probabilities.
            name: The baseline's.
        """
        responses = []
        for read, judged in zip(reads, probs, strict=True):
            assert judged.shape == (len(read.judged_ids),), (judged.shape, len(read.judged_ids))
            column = judged.astype(np.float32)[:, None]
            probs_of = column[: read.tokens], column[read.tokens :]
            scored = Scored(read.row, read.judged_ids[: read.tokens], *probs_of, read.onset, read.truncated)
            responses.append(as_recorded(scored))
        return Recording.of(["harm"], responses, {"baseline": name, "seed": self.seed})


def digest(value: Any) -> str:
    """A short name for anything that JSON can hold."""
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


def model_stamp(folder: str | Path) -> list[Any]:
    """What changes when a model's folder is made anew: its configuration, and the size and time of its weights."""
    folder = Path(folder)
    weights = [folder] if folder.is_file() else sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    config = folder / "config.json"
    return [
        config.read_text(encoding="utf-8") if config.exists() else None,
        [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
    ]


def thinned(rows: Sequence[Row], most: int | None, seed: int) -> list[Row]:
    """At most `most` rows, in their order, drawn so that the share of harmful ones stays."""
    if most is None or len(rows) <= most:
        return list(rows)
    draw = random.Random(seed)
    kept: list[int] = []
    for harmful in (True, False):
        side = [i for i, row in enumerate(rows) if row.harmful == harmful]
        kept += draw.sample(side, min(len(side), max(1, round(most * len(side) / len(rows)))))
    return [rows[i] for i in sorted(kept)]


def score_pairs(backend: Any, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int, what: str) -> list[Any]:
    """Flag probabilities of given responses, in the batches that `HFBackend.score` would make of all of them."""
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    found: list[Any] = [None] * len(pairs)
    starts = range(0, len(order), batch_size)
    for start in track(starts, what, len(starts), "batches"):
        picks = order[start : start + batch_size]
        for i, probs in zip(picks, backend.score([pairs[i] for i in picks], batch_size=batch_size), strict=True):
            found[i] = probs
    return found
