"""`redflag show`: `redflag.terminal.show` with the view that only training knows, tokens with their labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from redflag.bounds import option
from redflag.data.rows import Row
from redflag.terminal import show


@dataclass
class ShowArguments(show.ShowArguments):
    """Rows, scored rows or traces in colour; with a model, rows as the trainer sees them."""

    placement: str = option("dense", "With --model: first, open, insert, until or dense.")


ARGUMENTS = ShowArguments
POSITIONAL = show.POSITIONAL


def run(arguments: ShowArguments) -> int:
    """The verb."""
    return show.run(arguments, lambda model: token_view(model, arguments.placement))


def token_view(model: str, placement: str) -> Callable[[Row], show.Pieces]:
    """A row's response tokens as (text, flag target, harmful); target 1 is a flag, 0 none, None unjudged."""
    from transformers import AutoTokenizer

    from redflag.errors import RedflagError
    from redflag.flags import FlagSpec
    from redflag.training.encode import IGNORE, PlacementConfig, encode, place

    spec = FlagSpec.load(model)
    config = PlacementConfig(placement)  # type: ignore[arg-type]
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise RedflagError(f"the tokenizer in {model} cannot be loaded ({error}). Train the model again.") from None

    def view(row: Row) -> show.Pieces:
        example = encode(row, tokenizer, spec)
        placed = place(example, config, spec)
        for i in range(example["response_start"], len(placed.input_ids)):
            label = placed.flag_labels[i]
            target = None if label == IGNORE else float(label > 0)
            yield tokenizer.decode([placed.input_ids[i]]), target, label > 0

    return view
