"""The options of `redflag score`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from redflag.backends.outbound import UpstreamOptions
from redflag.data.options import RowOptions


@dataclass
class ScoreArguments(RowOptions, UpstreamOptions):
    """Flag probabilities of given conversations, one JSON row per input row."""

    model: str = field(metadata={"help": "Folder of a flagged model (with redflag.json)."})
    input: str = field(metadata={"help": "Conversations: JSONL, JSON, CSV, Parquet, a folder, or a hub data set."})
    output: str = field(
        metadata={"help": "JSONL to write; an interrupted run is continued from <output>.partial or .parts."}
    )
    prompts: bool = field(
        default=False, metadata={"help": "Measure before the answer only; rows need none, and one there is ignored."}
    )
    marker: list[str] = field(
        default_factory=list,
        metadata={"help": "... the probability that the answer begins with this text, in place of flags; any model."},
    )
    upstream: list[str] = field(
        default_factory=list,
        metadata={"help": "Address(es) of OpenAI-compatible servers of this model, which measure instead."},
    )
    upper_bound: bool = field(
        default=False, metadata={"help": "... upper bounds from the 20 most likely tokens: quick, and for old servers."}
    )
    batch_size: int = field(
        default=16, metadata={"help": "Conversations per forward pass; with upstream: at a time per server."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt + response in tokens; default: the model's context."}
    )
    on_bad_row: Literal["stop", "skip"] = field(default="stop", metadata={"help": "What a malformed row does."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:0, ..."})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
