"""The options of `redflag score`."""

from __future__ import annotations

from dataclasses import dataclass, field

from redflag.data.options import RowOptions
from redflag.scoring.options import ScoringOptions


@dataclass(kw_only=True)
class ScoreArguments(RowOptions, ScoringOptions):
    """Flag probabilities of given conversations, one JSON row per input row."""

    input: str = field(metadata={"help": "Conversations: JSONL, JSON, CSV, Parquet, a folder, or a hub data set."})
    output: str = field(metadata={"help": "JSONL to write; an interrupted run is continued from <output>.parts."})
    prompts: bool = field(
        default=False,
        metadata={"help": "Measure only before the answer; rows need no response, and an existing one is ignored."},
    )
    marker: list[str] = field(
        default_factory=list,
        metadata={"help": "... the probability that the answer begins with this text, instead of flags; any model."},
    )
    upper_bound: bool = field(
        default=False,
        metadata={"help": "upstream: upper bounds from the 20 most likely tokens: fast, and for old servers."},
    )
