"""Estimates the requests, tokens and cost of a synthesis before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from redflag.errors import RedflagError
from redflag.lab.synthesis.constitution import Constitution
from redflag.lab.synthesis.options import Settings
from redflag.lab.synthesis.requests import PER_QUESTION, questions_for
from redflag.lab.synthesis.writer_prompts import COMPLY, PARAPHRASE, REQUESTS, TRANSLATE

_CHARACTERS = 4  # per token: a rule of thumb for English
_REQUEST = 30  # tokens of a request
_SENTENCES = 8  # of an answer
_SHARE = 0.6  # of the limit that answers use


@dataclass(frozen=True)
class Estimate:
    """Estimated requests, tokens and cost."""

    requests: int  # questions to the model: exact, but for what is left out on the way
    tokens_in: int  # tokens of these questions; by rule of thumb
    tokens_out: int  # tokens of the answers; by rule of thumb
    judged: int  # questions to the judge; by rule of thumb
    money: float | None  # price of the tokens; None without prices. The judge's are not in it

    def __str__(self) -> str:
        money = "" if self.money is None else f", at a price of {self.money:,.2f}"
        judged = f", and about {self.judged:,} questions to the judge" if self.judged else ""
        return (
            f"at most {self.requests:,} requests with about {self.tokens_in:,} tokens in and {self.tokens_out:,} out"
            f"{money}{judged}"
        )


def estimate(
    constitution: Constitution,
    settings: Settings,
    *,
    judged: bool,
    price_in: float | None = None,
    price_out: float | None = None,
) -> Estimate:
    """Counts questions and guesses tokens. Prices are per million tokens.

    Raises:
        RedflagError: Only one price is given, or one is negative.
    """
    if (price_in is None) != (price_out is None) or min(price_in or 0.0, price_out or 0.0) < 0:
        raise RedflagError(
            f"price_in and price_out must both be set, or neither (got {price_in} and {price_out}). They are prices of "
            "a million tokens."
        )
    answer = max(1, round(settings.max_tokens * _SHARE))
    instruction_length = sum(len(kind.description) + sum(map(len, kind.examples)) for kind in constitution.classes)
    n = len(constitution.classes)
    asking = _tokens(
        len(REQUESTS) + instruction_length / n + sum(len(k.description) for k in constitution.classes if k.harmful)
    )
    shares = constitution.shares(settings.requests)
    written = sum(questions_for(kind, share) for kind, share in zip(constitution.classes, shares, strict=True))
    answers = sum(shares) * settings.answers
    paraphrases = sum(shares) * settings.paraphrases
    translations = answers * len(settings.languages)
    parts = (  # questions, tokens in, tokens out of each
        (written, asking, PER_QUESTION * _REQUEST),
        (answers, _tokens(len(COMPLY)) + _REQUEST, answer),
        (paraphrases, _tokens(len(PARAPHRASE)) + _REQUEST, _REQUEST),
        (translations, _tokens(len(TRANSLATE)) + _REQUEST, _REQUEST),
        (translations, _tokens(len(TRANSLATE)) + answer, answer),
    )
    tokens_in, tokens_out = (round(sum(part[0] * part[i] for part in parts)) for i in (1, 2))
    harmful = sum(share for kind, share in zip(constitution.classes, shares, strict=True) if kind.harmful)
    verdicts = answers + harmful * settings.answers * _SENTENCES // 2
    verdicts *= 1 + len(settings.languages)
    money = None
    if price_in is not None and price_out is not None:
        money = (tokens_in * price_in + tokens_out * price_out) / 1e6
    return Estimate(
        written + answers + paraphrases + 2 * translations, tokens_in, tokens_out, verdicts if judged else 0, money
    )


def allow(estimated: Estimate, *, yes: bool, max_requests: int | None = None, max_cost: float | None = None) -> None:
    """Stops before the first request, unless `--yes` is set or the estimate is within all limits."""
    if yes:
        return
    if max_cost is not None and estimated.money is None:
        raise RedflagError(f"max_cost must come with price_in and price_out (got {max_cost} without prices).")
    if max_requests is None and max_cost is None:
        raise RedflagError(f"this would take {estimated}. No request was sent. Run the command again with --yes.")
    over = (max_requests is not None and estimated.requests > max_requests) or (
        max_cost is not None and estimated.money is not None and estimated.money > max_cost
    )
    if over:
        raise RedflagError(
            f"this would take {estimated}, which is more than the limit. No request was sent. Reduce the numbers, "
            "raise the limit, or add --yes."
        )


def _tokens(characters: float) -> float:
    return characters / _CHARACTERS
