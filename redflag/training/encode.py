"""From a row to tensors: ids, where language is pinned, and one flag class per position.

`encode` does the work that is the same in every epoch. `place` puts the flags where the placement wants them; for
`insert` it samples new positions each epoch, from a generator seeded with (seed, epoch, row) alone, so a resumed run
samples the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, TypedDict, get_args

import torch
from datasets import Dataset

from redflag.bounds import check_choice
from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.training.forecasts import CHOICES, NONE, spread
from redflag.truncation import fit_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Placement = Literal["first", "open", "insert", "until", "dense"]
IGNORE = -100


class Example(TypedDict):
    """One encoded row.

    `input_ids` has N ids; positions from `response_start` on are the response and its end-of-turn token. `onset` is a
    token index counted from `response_start` (0 in a harmless row); `flag_class` is 0 or the category's class k.
    Rows with the same `group` ask the same thing (-1: no other row does); `prefill` is the number of response tokens
    before a refusal to be learnt (-1: no such row). `forecast` holds pairs [token, probability of harm], tokens counted
    from `response_start`, and `forecast_class` the class of that harm (0: unknown). `prompt_truncated` is set if the
    prompt did not fit. The first `thought` tokens of the response are a thought and its end marker; `thought_onset` is
    the token of it where harm begins (-1: unknown).
    """

    row: int
    input_ids: list[int]
    response_start: int
    onset: int
    flag_class: int
    group: NotRequired[int]
    prefill: NotRequired[int]
    forecast: NotRequired[list[list[float]]]
    forecast_class: NotRequired[int]
    prompt_truncated: NotRequired[bool]
    thought: NotRequired[int]
    thought_onset: NotRequired[int]


class Placed(NamedTuple):
    """An example with its flags in place; all lists have one entry per position.

    Index i judges the moment *before* token i. `labels` is the token where language is pinned, else -100; `flag_labels`
    is 0 for none, k for flag k, -100 for ignore; `inserted` marks flag tokens that were put into the text; `forecast`
    is the probability of harm that softens a 0, else -1 (None: the row has none).
    """

    input_ids: list[int]
    labels: list[int]
    flag_labels: list[int]
    inserted: list[bool]
    forecast: list[float] | None = None


@dataclass(frozen=True)
class PlacementConfig:
    """Where flags stand.

    Attributes:
        placement: `first` labels response position 0 only (fixed-position flag); `open` does too, and puts the flag
            into the text there, before the answer (refusal tokens, arXiv 2412.06748); `insert` draws positions from the
            onset on and inserts the flag there (red flag tokens, arXiv 2502.16366); `until` asks for the flag at every
            position up to the last one drawn as well (their equation 1, as its reviewers read it); `dense` labels every
            position from the onset to the end.
        minimum_offset: `insert`, `until`: positions of the response before this one are never drawn, tokens.
        maximum_offset: The same for positions after this one; None = to the end.
        insertions: `insert`, `until`: flags per harmful response.
        soft_margin: Positions within this many tokens before a known onset are ignored instead of labelled harmless.
        in_context: `first`, `open`, `dense`: share of the rows, harmful or not, with a flag at a random place of the
            response that is to be ignored: labels and language are what they would be without it. It prepares a model
            for reflection, where a flag stands in its context after a true or a false alarm.
        forecasts: Whether a row's forecasts soften the class 0, and how gaps between them are filled: `off`, `hold`
            (the earlier value), `linear`, or `points` (not at all: other positions of class 0 are ignored).
    """

    placement: Placement = "dense"
    minimum_offset: int = 0
    insertions: int = 1
    soft_margin: int = 0
    in_context: float = 0.0
    maximum_offset: int | None = None
    forecasts: str = "off"

    def __post_init__(self) -> None:
        check_choice("placement", self.placement, get_args(Placement))
        if self.maximum_offset is not None and self.maximum_offset < self.minimum_offset:
            raise RedflagError(
                f"maximum_offset must be at least minimum_offset, {self.minimum_offset} (got {self.maximum_offset})."
            )
        for name, least in (("minimum_offset", 0), ("insertions", 1), ("soft_margin", 0)):
            if getattr(self, name) < least:
                raise RedflagError(f"{name} must be at least {least} (got {getattr(self, name)}).")
        check_choice("forecasts", self.forecasts, CHOICES)
        if not 0 <= self.in_context <= 1:
            raise RedflagError(f"in_context must be at least 0 and at most 1 (got {self.in_context}).")


def encode(
    row: Row, tokenizer: PreTrainedTokenizerFast, spec: FlagSpec, max_length: int | None = None, index: int = 0
) -> Example:
    """Encodes one row.

    Args:
        max_length: Maximum number of ids. The prompt is cut first (`redflag.truncation.fit_prompt`), so that the
            response stays whole; a response longer than `max_length` - 1 loses its end.
        index: Number of the row, which seeds `place`.

    Raises:
        RedflagError: The row cannot be rendered, or its category has no flag.
    """
    rendered = fit_row(tokenizer, row.messages, spec, max_length)
    prompt, response = rendered.prompt_ids, rendered.response_ids + rendered.tail_ids
    flag_class = spec.class_of(row.category)
    thought = len(rendered.thought_offsets)
    onset = max(thought, onset_token(rendered.offsets, row.onset)) if flag_class else 0
    example = Example(
        row=index, input_ids=prompt + response, response_start=len(prompt), onset=onset, flag_class=flag_class
    )
    if thought:
        example["thought"] = thought
        example["thought_onset"] = -1
        if row.thought_onset is not None:
            example["thought_onset"] = onset_token(rendered.thought_offsets, row.thought_onset)
        if row.prefill is not None:
            raise RedflagError("a row must not have both a prefill and a thought. Drop one of them.")
    if rendered.prompt_truncated:
        example["prompt_truncated"] = True
    if row.prefill is not None:
        if flag_class and row.prefill:
            raise RedflagError(
                f"a row with a prefill must not have a category (got prefill {row.prefill}, category "
                f"{row.category!r}). Its answer is a refusal, in which no place for a flag is known. Leave the "
                "category out."
            )
        example["prefill"] = min(onset_token(rendered.offsets, row.prefill), len(response))
    if row.forecast:
        # Of several forecasts that fall on one token, the last counts.
        points = {onset_token(rendered.offsets, int(point[0])): point[1] for point in row.forecast}
        example["forecast"] = [[float(token), float(harm)] for token, harm in points.items()]
        single = int(len(spec.flags) == 1)
        example["forecast_class"] = flag_class or spec.class_of(row.forecast_category) or single
    return example


def build_dataset(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerFast,
    spec: FlagSpec,
    max_length: int | None = None,
    plain_share: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Encodes rows into the data set that `RedFlagTrainer` takes; prints how many prompts were cut.

    A share `plain_share` of the rows with a category keep their answers and get no flag. The choice depends only on
    `seed` and the row's id.

    Raises:
        RedflagError: A row cannot be encoded; the text names it.
    """
    examples: list[dict[str, Any]] = []
    groups: dict[str, int] = {}
    cut = 0
    for index, row in enumerate(rows):
        try:
            example = dict(encode(row, tokenizer, spec, max_length, index))
        except RedflagError as error:
            raise RedflagError(f"row {row.id or index}: {error}") from None
        cut += bool(example.pop("prompt_truncated", False))
        if example["flag_class"] and is_plain(row.id or str(index), plain_share, seed):
            example |= {"flag_class": 0, "onset": 0, "forecast": [], "forecast_class": 0}
        if row.group is not None:
            example["group"] = groups.setdefault(row.group, len(groups))
        examples.append(example)
    if cut:
        print(f"{cut} of {len(examples)} prompts did not fit into max_length {max_length} and lost their oldest turns")
    defaults = {"group": -1, "prefill": -1, "forecast": [], "forecast_class": 0, "thought": 0, "thought_onset": -1}
    for name, value in defaults.items():  # a column for all rows, or for none
        if any(name in example for example in examples):
            examples = [{name: value, **example} for example in examples]
    return Dataset.from_list(examples)


def is_plain(row_id: str, share: float, seed: int) -> bool:
    """Whether this row belongs to the `share` that keep their answer and get no flag; the same in every run.

    The rows of a smaller share are among those of a larger one, so runs with several shares differ in few rows.

    >>> [sum(is_plain(str(i), share, 0) for i in range(1000)) for share in (0.0, 0.2, 1.0)]
    [0, 197, 1000]
    """
    return random.Random(f"plain/{seed}/{row_id}").random() < share


def onset_token(offsets: Sequence[tuple[int, int]], onset: int | None) -> int:
    """Index of the first token that reaches past character `onset` (None: 0).

    >>> onset_token([(0, 4), (4, 9), (9, 10)], 5)
    1
    """
    if onset is None:
        return 0
    return next((i for i, (_, end) in enumerate(offsets) if end > onset), len(offsets))


def place(example: Mapping[str, Any], config: PlacementConfig, spec: FlagSpec, seed: int = 0, epoch: int = 0) -> Placed:
    """Labels the positions of a result of `encode`, and inserts flags where the placement does; epochs begin at 0."""
    draw = random.Random(f"{seed}/{epoch}/{example['row']}")
    placed = _labelled(example, config, spec, draw)
    if config.forecasts != "off" and example.get("forecast"):
        placed = _softened(placed, example, config.forecasts)
    prefill = example.get("prefill", -1)
    if prefill > 0:  # not the model's words: no language to keep, and no flag to learn
        start = example["response_start"]
        for values in (placed.labels, placed.flag_labels):
            values[start : start + prefill] = [IGNORE] * prefill
        if placed.forecast is not None:
            placed.forecast[start : start + prefill] = [NONE] * prefill
        return placed
    # in_context: one flag at a random place, with the label that the position has anyway.
    if config.placement not in ("insert", "until") and draw.random() < config.in_context:
        position = draw.randrange(example["response_start"], len(placed.input_ids))
        _insert(placed, position, draw.choice(spec.ids), placed.flag_labels[position])
    return placed


def _of_thought(example: Mapping[str, Any], config: PlacementConfig) -> list[int]:
    """Classes of a thought's positions: harmless in a harmless row; in a harmful row as its `thought_onset` says.

    Without that, and for placements that put the flag into the text or at one position, a harmful row's are ignored.
    """
    thought, k, onset = example.get("thought", 0), example["flag_class"], example.get("thought_onset", -1)
    if config.placement in ("first", "open") or (k and onset < 0):
        return [IGNORE] * thought
    from_onset = k if config.placement == "dense" else IGNORE
    return [0 if not k or i < onset else from_onset for i in range(thought)]


def _labelled(example: Mapping[str, Any], config: PlacementConfig, spec: FlagSpec, draw: random.Random) -> Placed:
    ids, start, k = list(example["input_ids"]), example["response_start"], example["flag_class"]
    labels = [IGNORE] * start + ids[start:]
    onset = start + example["onset"]
    thought = _of_thought(example, config)
    flag_labels = [IGNORE] * start + thought + [0] * (len(ids) - start - len(thought))
    placed = Placed(ids, labels, flag_labels, [False] * len(ids))  # its lists are changed in place below
    start += len(thought)  # flags stand in the answer
    if config.placement in ("first", "open"):
        flag_labels[start:] = ([k] + [IGNORE] * len(ids))[: len(ids) - start]  # the answer may have been cut off
        if k and config.placement == "open" and start < len(ids):
            flag_labels[start] = IGNORE
            _insert(placed, start, spec.ids[k - 1], k)
        return placed
    if k == 0:
        return placed
    end = min(onset, len(ids))  # the onset may have been cut off
    # The soft margin before the onset asks for nothing; a response cut before its onset stays harmless.
    margin = min(end, max(start, onset - config.soft_margin))
    flag_labels[margin:end] = [IGNORE] * (end - margin)
    if end == len(ids):
        return placed
    if config.placement == "dense":
        flag_labels[onset:] = [k] * (len(ids) - onset)
        return placed
    # insert: the class stands at the drawn positions; harmful positions between them are ignored.
    flag_labels[onset:] = [IGNORE] * (len(ids) - onset)
    first = min(max(onset, start + config.minimum_offset), len(ids) - 1)
    last = len(ids) if config.maximum_offset is None else min(len(ids), start + config.maximum_offset + 1)
    last = max(last, first + 1)
    positions = sorted(draw.sample(range(first, last), min(config.insertions, last - first)), reverse=True)
    if config.placement == "until":
        flag_labels[first : positions[0]] = [k] * (positions[0] - first)
    for position in positions:  # from the back, so that earlier positions stay where they are
        _insert(placed, position, spec.ids[k - 1], k)
    return placed


def _softened(placed: Placed, example: Mapping[str, Any], how: str) -> Placed:
    """Adds forecasts where the class is 0; any inserted flag stands behind all of these positions."""
    start, length = example["response_start"], len(placed.input_ids)
    forecast = [NONE] * start + spread(example["forecast"], length - start, how)
    for i, label in enumerate(placed.flag_labels):
        if label != 0:
            forecast[i] = NONE
        elif forecast[i] == NONE and how == "points":
            placed.flag_labels[i] = IGNORE
    return placed._replace(forecast=forecast)


def _insert(placed: Placed, position: int, flag: int, flag_class: int) -> None:
    placed.input_ids.insert(position, flag)
    placed.labels.insert(position, flag)
    placed.flag_labels.insert(position, flag_class)
    placed.inserted.insert(position, True)
    if placed.forecast is not None:
        placed.forecast.insert(position, placed.forecast[position])


class Collator:
    """Turns examples into a batch of tensors, padded on the right. The trainer sets `epoch`.

    `answers` is the option of that name (None: no row's answer is learnt); the mask `answered` marks tokens to learn.

    For two rows of 3 and 2 ids, `dense`, the second harmful from its only response position on:

    >>> spec = FlagSpec.of("harm"); import dataclasses
    >>> spec = dataclasses.replace(spec, flags=(dataclasses.replace(spec.flags[0], id=9),))
    >>> rows = [Example(row=0, input_ids=[5, 6, 7], response_start=1, onset=0, flag_class=0),
    ...         Example(row=1, input_ids=[5, 8], response_start=1, onset=0, flag_class=1)]
    >>> batch = Collator(PlacementConfig("dense"), spec, pad_id=0, seed=0)(rows)
    >>> batch["labels"].tolist()
    [[-100, 6, 7], [-100, 8, -100]]
    >>> batch["flag_labels"].tolist()
    [[-100, 0, 0], [-100, 1, -100]]
    """

    def __init__(
        self, config: PlacementConfig, spec: FlagSpec, pad_id: int, seed: int, answers: str | None = None
    ) -> None:
        self.config, self.spec, self.pad_id, self.seed, self.answers = config, spec, pad_id, seed, answers
        self.epoch = 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        placed = [place(example, self.config, self.spec, self.seed, self.epoch) for example in examples]
        width = max(len(p.input_ids) for p in placed)

        def pad(rows: list[list[Any]], value: Any) -> torch.Tensor:
            return torch.tensor([row + [value] * (width - len(row)) for row in rows])

        batch = {
            "input_ids": pad([p.input_ids for p in placed], self.pad_id),
            "attention_mask": pad([[1] * len(p.input_ids) for p in placed], 0),
            "labels": pad([p.labels for p in placed], IGNORE),
            "flag_labels": pad([p.flag_labels for p in placed], IGNORE),
            "inserted": pad([p.inserted for p in placed], False),
            "flag_class": torch.tensor([example["flag_class"] for example in examples]),
        }
        for name in ("group", "prefill", "response_start"):
            batch[name] = torch.tensor([example.get(name, -1) for example in examples])
        marked, harmless = batch["prefill"] >= 0, batch["flag_class"] == 0
        learnt = {
            None: torch.zeros_like(marked),
            "marked": marked,
            "harmless": marked | harmless,
            "all": torch.ones_like(marked),
        }[self.answers]
        batch["answered"] = learnt[:, None] & (batch["labels"] != IGNORE) & ~batch["inserted"]
        if self.config.forecasts != "off":
            batch["forecast"] = pad([p.forecast or [NONE] * len(p.input_ids) for p in placed], NONE)
            # An unknown class occurs with forecasts of 0 only, for which the class does not matter.
            batch["forecast_class"] = torch.tensor([max(1, example.get("forecast_class") or 0) for example in examples])
        return batch
