"""Which token opens a response: the decision rule of refusal tokens, applied once, before the first token.

As in the released inference scripts of Jain et al., "Refusal Tokens" (arXiv 2412.06748). The model was trained to open
each answer with a token for the reason of a refusal, or with a respond token. This rule, not sampling, chooses it:

- *one token for refusals*: refuse where p(refuse) >= T; with `compare` (their T = -1) where p(refuse) >= p(respond);
- *one per category*: take the likeliest. If it is `selected`, refuse for it where its p >= its T, else respond; if not,
  the model's own choice stands.

Here the tokens are flags. "Respond" is the absence of all of them (the probability left for ordinary tokens) or a flag
of its own. Differences from the published rule:

- *Temperature.* Theirs flattens the softmax over the vocabulary; here the classes are the flags and all ordinary tokens
  together, since engines give only the flags' probabilities. The order of a category and an explicit respond token is
  the same under both (so `compare` with such a token agrees). p against a threshold differs: over a vocabulary the many
  small tokens gain more. (Their script for categories sets temperatures 1, 1.5 and 2 in a loop and decides after it, so
  always with 2.)
- *The model's own choice* for a category that is not selected is theirs over the vocabulary, here that of the category
  or respond, whichever is likelier.
- *No respond token.* p(respond) is then the sum over ordinary tokens, where theirs is one token's.

For a single flag, temperature t and bias b only move the threshold: p' >= T just where
logit(p) >= t logit(T) - b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from redflag.errors import RedflagError
from redflag.watching.checks import check_flag, check_number, is_number

if TYPE_CHECKING:
    from redflag.watching.thresholds import Thresholds


class Decision(NamedTuple):
    """The token that opens the response.

    Attributes:
        category: The category of the refusal; None = the model responds.
        likeliest: The likeliest category, whether chosen or not.
        probability: Its probability after temperature and bias.
        limit: The value that it was compared with: its threshold, or the probability of responding.
    """

    category: str | None
    likeliest: str
    probability: float
    limit: float


@dataclass(frozen=True)
class FirstTokenRule:
    """The rule and its settings; the module's docstring defines it.

    Attributes:
        compare: Compare with the probability of responding instead of thresholds.
        selected: Categories that thresholds decide on; None = all.
        respond: The flag that says "respond", if the model has one.
        temperature: Divides the classes' logits, as a softmax temperature does.
        bias: Category -> nats added to its logit, before the temperature.
        thresholds: Category -> threshold in place of the one in `thresholds.json`.

    Raises:
        RedflagError: A value is invalid.

    Example:
        >>> rule = FirstTokenRule(selected=("fraud",))
        >>> limits = {"fraud": 0.9, "theft": 0.9}
        >>> rule.decide({"fraud": 0.6, "theft": 0.1}, limits).category  # below its threshold
        >>> rule.decide({"fraud": 0.1, "theft": 0.6}, limits).category  # not selected: the model's own choice
        'theft'
    """

    compare: bool = False
    selected: tuple[str, ...] | None = None
    respond: str | None = None
    temperature: float = 1.0
    bias: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_flag("compare", self.compare)
        if self.selected is not None:
            if isinstance(self.selected, str) or not all(isinstance(name, str) for name in self.selected):
                raise RedflagError(f"selected must be a list of categories, or None for all (got {self.selected!r}).")
            object.__setattr__(self, "selected", tuple(self.selected))
        whose = "the temperature of the first token"
        check_number(whose, self.temperature, "a finite number above 0", lambda x: 0 < x < math.inf)
        for name, numbers in (("bias", self.bias), ("thresholds", self.thresholds)):
            if not isinstance(numbers, Mapping) or not all(
                is_number(value) and math.isfinite(value) for value in numbers.values()
            ):
                raise RedflagError(
                    f"the {name} of the first token must map categories to finite numbers (got {numbers!r})."
                )
            object.__setattr__(self, name, dict(numbers))
        for category, value in self.thresholds.items():
            check_number(f"the threshold of {category!r}", value, "above 0 and at most 1", lambda x: 0 < x <= 1)

    def check(self, thresholds: Thresholds) -> None:
        """Checks that the rule fits thresholds and their flags.

        Raises:
            RedflagError: Naming the first mismatch.
        """
        categories = list(thresholds.values)
        respond = () if self.respond is None else (self.respond,)
        for what, names in (
            ("respond", respond),
            ("selected", self.selected or ()),
            ("bias", self.bias),
            ("thresholds", self.thresholds),
        ):
            if unknown := sorted(set(names) - set(categories)):
                raise RedflagError(
                    f"{what} of the first token must name flags among {categories} (got {unknown[0]!r}). Fix the name."
                )
        if categories == list(respond):
            raise RedflagError(
                f"respond must not be the only flag (got {self.respond!r}). Nothing could be refused. Leave respond "
                "out."
            )
        if self.respond in (*(self.selected or ()), *self.thresholds):
            raise RedflagError(
                f"selected and thresholds must not name the respond flag (got {self.respond!r}). Leave it out."
            )
        if thresholds.monitor.aggregation != "first":
            raise RedflagError(
                "the monitor must be first for a decision at the first token (got thresholds of the monitor "
                f"{thresholds.monitor.aggregation!r}). Calibrate with the aggregation first."
            )
        moved = self.temperature != 1.0 or any(self.bias.values())
        own_thresholds = set(categories) <= {*self.thresholds, *respond}
        if moved and not self.compare and thresholds.guarantee != "manual" and not own_thresholds:
            raise RedflagError(
                "temperature and bias of the first token must be left out with calibrated thresholds. They change the "
                "false-alarm rate. Leave both out, or set thresholds in the rule."
            )

    def classes(self, probs: Mapping[str, float]) -> tuple[dict[str, float], float]:
        """The flags' probabilities, and that of all ordinary tokens together, after temperature and bias.

        With p_c the classes' probabilities (the last is the remainder for ordinary tokens), the result is
        p_c^(1/t) e^(b_c/t), normalised; without temperature and bias exactly p_c. With an engine that gives upper
        bounds the remainder may be 0.

        Args:
            probs: Category -> probability before the first token, of all flags.
        """
        rest = max(0.0, 1.0 - math.fsum(probs.values()))
        if self.temperature == 1.0 and not any(self.bias.values()):
            return dict(probs), rest
        logits = [(_log(p) + self.bias.get(name, 0.0)) / self.temperature for name, p in probs.items()]
        logits.append(_log(rest) / self.temperature)
        top = max(logits)
        weights = [math.exp(z - top) for z in logits]
        total = math.fsum(weights)
        return {name: w / total for name, w in zip(probs, weights, strict=False)}, weights[-1] / total

    def decide(self, probs: Mapping[str, float], thresholds: Mapping[str, float]) -> Decision:
        """Chooses the token that opens the response; ties refuse, as in the released code.

        Args:
            probs: Category -> probability before the first token, of all flags.
            thresholds: Category -> threshold, for those that `self.thresholds` does not name.
        """
        flags, rest = self.classes(probs)
        responding = rest if self.respond is None else flags.pop(self.respond)
        likeliest = max(flags, key=lambda name: flags[name])  # of equal ones the first, as in argmax
        own = self.selected is not None and likeliest not in self.selected
        limit = responding
        if not (self.compare or own):
            limit = {**thresholds, **self.thresholds}[likeliest]
        refused = flags[likeliest] >= limit
        return Decision(likeliest if refused else None, likeliest, flags[likeliest], limit)


def _log(p: float) -> float:
    return math.log(p) if p > 0.0 else -math.inf
