"""Options for measuring rows, shared by several verbs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from redflag.backends.open import UpstreamOptions, open_scorer
from redflag.bounds import option
from redflag.flags import FlagSpec
from redflag.scoring.processes import World

if TYPE_CHECKING:
    from redflag.backends.hf import HFBackend
    from redflag.backends.upstreams import Upstreams


@dataclass(kw_only=True)
class ScoringOptions(UpstreamOptions):
    """The flagged model, where it runs, and how its rows are read and batched."""

    model: str = field(metadata={"help": "Folder of a flagged model (with redflag.json)."})
    upstream: list[str] = option(
        [], "Addresses of OpenAI-compatible servers of this model that measure; default: none."
    )
    batch_size: int = option(16, "Conversations per forward pass; with upstream: at a time per server.", least=1)
    max_length: int | None = option(None, "Longest prompt + response in tokens; default: the model's context.", least=2)
    on_bad_row: Literal["stop", "skip"] = option("stop", "stop at a malformed row, or skip it.")
    device: str = option("auto", "auto, cpu, cuda, cuda:0, ...")
    dtype: str = option("auto", "auto (as saved), float32, bfloat16 or float16.")

    def scorer(
        self, world: World, stack: ExitStack, upper_bound: bool = False
    ) -> tuple[HFBackend | Upstreams, Any, FlagSpec]:
        """Opens scorer, tokenizer and flags; `stack` closes the scorer."""
        served = {**self.upstream_options(), "upper_bound": upper_bound} if self.upstream else {}
        scorer, tokenizer, spec = open_scorer(
            self.model, self.upstream, device=world.device(self.device), dtype=self.dtype, **served
        )
        if hasattr(scorer, "close"):
            stack.callback(scorer.close)
        return scorer, tokenizer, spec
