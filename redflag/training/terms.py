"""The optional terms of the loss: their settings, and their sum for one batch.

Each has a coefficient that is 0 by default; then the term is not computed. Like the flag and keep terms, each is a mean
over the whole accumulated batch of all processes: a sum over this micro-batch, divided by the term's entry in `Counts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from redflag.bounds import check_choice, option
from redflag.errors import RedflagError
from redflag.training.adversarial import shifted, worst_shift
from redflag.training.answers import constraint_weights, places_in_answer
from redflag.training.batch import BatchState
from redflag.training.consistency import consistency_loss, group_keys
from redflag.training.encode import IGNORE
from redflag.training.forecasts import check_forecasts, column
from redflag.training.hidden_states import last_hidden, unwrapped
from redflag.training.log_probs import class_log_probs, token_log_probs
from redflag.training.loss import flag_log_odds
from redflag.training.presto import check_eager, presto_loss

COEFFICIENTS = ("answer_coef", "after_coef", "benign_coef", "consistency_coef", "presto_coef", "adversarial_coef")
CHOICES = {
    "answers": ("marked", "harmless", "all"),
    "consistency": ("logit", "kl"),
    "consistency_at": ("first", "peak"),
    "presto_queries": ("answer", "all"),
}


@dataclass
class TermsConfig:
    """Settings of the optional terms; `RedFlagConfig` has them all."""

    maximum_offset: int | None = option(
        None, "insert, until: last response position that may be drawn; default: the end."
    )
    plain_share: float = option(
        0.0, "Share of the rows with a category that keep their answer and get no flag, drawn by id."
    )
    forecasts: str = option(
        "off",
        "Soft targets before the onset from the rows' forecasts: off, hold (each until the next), linear or points.",
    )
    after_coef: float = option(
        0.0, "Weight of the keep term on the tokens after an inserted flag, on top of keep_coef."
    )
    benign_coef: float = option(0.0, "Weight of the keep term on harmless responses, on top of keep_coef.")
    answer_coef: float = option(
        0.0, "Weight of the cross-entropy on answers, whose language is then not kept but learnt."
    )
    answers: str = option(
        "marked", "answer_coef: marked (rows with a prefill, 0 included), harmless (and marked), or all."
    )
    constraint_beta: float = option(0.0, "answer_coef: strength of constrained fine-tuning; published 0.1, 0 = off.")
    consistency_coef: float = option(0.0, "Weight of equal flag probabilities in rows of one group.")
    consistency: str = option("logit", "consistency_coef: logit (squared gap) or kl (symmetric divergence).")
    consistency_at: str = option(
        "first", "consistency_coef: first (before the response) or peak (of the response, by category)."
    )
    presto_coef: float = option(0.0, "Weight of attention on prefills in refusals; needs attention eager.")
    presto_queries: str = option("answer", "presto_coef: answer (prefill and refusal, +1 each) or all.")
    adversarial_coef: float = option(
        0.0, "Weight of the flag term on prompts whose embeddings were shifted against it."
    )
    adversarial_steps: int = option(10, "adversarial_coef: signed steps of the shift.")
    adversarial_step_size: float = option(1e-4, "adversarial_coef: size of a step.")
    adversarial_radius: float = option(0.05, "adversarial_coef: largest l2 norm of the shift of one token.")

    def check_terms(self) -> None:
        """Checks the settings.

        Raises:
            RedflagError: A number is out of bounds, or a name is unknown.
        """
        for name in (*COEFFICIENTS, "constraint_beta", "adversarial_step_size", "adversarial_radius"):
            if not getattr(self, name) >= 0:
                raise RedflagError(f"{name} must be at least 0 (got {getattr(self, name)}).")
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if not 0 <= self.plain_share <= 1:
            raise RedflagError(f"plain_share must be at least 0 and at most 1 (got {self.plain_share}).")
        if self.adversarial_steps < 1:
            raise RedflagError(
                f"adversarial_steps must be at least 1 (got {self.adversarial_steps}). To switch the term off, set "
                "adversarial_coef to 0."
            )


def optional_terms(args: Any, state: BatchState) -> dict[str, torch.Tensor]:
    """The terms that are switched on, each without its coefficient and divided by its count."""
    groups, answered = state.counts.groups.clamp(min=1), state.counts.answered.clamp(min=1)
    terms = {}
    if args.answer_coef:
        terms["answer"] = _answer(args, state) / answered
    if args.consistency_coef:
        terms["consistency"] = _consistency(args, state) / groups
    if args.presto_coef:
        batch = state.batch
        end = batch["attention_mask"].sum(1)
        parts = (batch["response_start"], batch["prefill"], end)
        terms["presto"] = presto_loss(state.attentions, *parts, args.presto_queries) / answered
    if args.adversarial_coef:
        terms["adversarial"] = _adversarial(args, state) / state.counts.flagged.clamp(min=1)
    return terms


def _answer(args: Any, state: BatchState) -> torch.Tensor:
    row, column = state.judged.row, state.judged.column
    in_answer = state.batch["answered"][row, column]
    row, column = row[in_answer], column[in_answer]
    tokens = state.batch["labels"][row, column]
    log_probs = token_log_probs(state.hidden[row, column - 1], state.head, state.flag_ids, tokens)
    if not args.constraint_beta:  # plain cross-entropy
        return -log_probs.sum()
    with torch.no_grad():
        reference_log_probs = token_log_probs(
            state.reference_NH[in_answer], state.reference_head, state.flag_ids, tokens
        )
    return -(
        constraint_weights(log_probs, reference_log_probs, places_in_answer(row), args.constraint_beta) * log_probs
    ).sum()


def _consistency(args: Any, state: BatchState) -> torch.Tensor:
    batch = state.batch
    keys = group_keys(batch["group"], batch["flag_class"], args.consistency_at)
    if args.consistency_at == "first":
        # The state before the response has read only the prompt, so rows that ask the same thing must agree whatever
        # follows.
        rows = torch.arange(len(keys), device=keys.device)
        hidden = state.hidden[rows, (batch["response_start"] - 1).clamp(min=0)]
    else:
        # The position of each response with the highest odds of a flag. It is chosen without gradients; they flow
        # through the state there. Inserted flags are left out: none is in the text before an alarm.
        read = (batch["labels"] != IGNORE) & ~batch["inserted"]
        compared = read[state.judged.row, state.judged.column] & (keys[state.judged.row] >= 0)
        row, column = state.judged.row[compared], state.judged.column[compared]
        odds = flag_log_odds(state.hidden[row, column - 1].detach(), state.head, state.flag_ids)
        peaks = torch.full(read.shape, -torch.inf, device=read.device).index_put((row, column), odds).max(1)
        # A response that was cut off entirely has no peak, so its row is compared with none.
        keys = torch.where(peaks.values > -torch.inf, keys, -1)
        rows = torch.arange(len(keys), device=keys.device)
        hidden = state.hidden[rows, (peaks.indices - 1).clamp(min=0)]
    return consistency_loss(class_log_probs(hidden, state.head, state.flag_ids), keys, args.consistency)


def _adversarial(args: Any, state: BatchState) -> torch.Tensor:
    """Sum of the flag term over the flagged positions of this batch, on the worst prompts found."""
    labels = state.batch["flag_labels"]
    flagged = (labels > 0).any(1)
    # A batch without flags uses its first row: every process must run the model equally often, or collectives hang.
    flagged[0] |= ~flagged.any()
    ids, mask, labels = (state.batch[n][flagged] for n in ("input_ids", "attention_mask", "flag_labels"))
    starts = state.batch["response_start"][flagged]
    row, column = (labels[:, 1:] > 0).nonzero(as_tuple=True)

    def loss_of(shift: torch.Tensor, model: Any) -> torch.Tensor:
        with shifted(model, shift):
            hidden = last_hidden(model, ids, mask)
        classes = class_log_probs(hidden[row, column], state.head, state.flag_ids)
        return -classes.gather(1, labels[row, column + 1][:, None]).sum() + 0.0 * hidden.float().sum()

    # The search for the shift changes no weight, so it goes past DDP and similar wrappers; the last pass does not.
    plain = unwrapped(state.model)
    where = torch.arange(ids.shape[1], device=ids.device) < starts[:, None]
    settings = (args.adversarial_steps, args.adversarial_step_size, args.adversarial_radius)
    shift = worst_shift(lambda s: loss_of(s, plain), where, state.hidden.shape[-1], *settings)
    return loss_of(shift, state.model)


def check_terms_fit(args: Any, model: Any, dataset: Any) -> None:
    """Checks that the terms that are on can work: eager attention, rows with prefills, groups or forecasts.

    Raises:
        RedflagError: A term that is on would fail or have no effect.
    """
    if args.presto_coef:
        check_eager(model)
    marks = column(dataset, "prefill")
    if args.presto_coef and not any(mark > 0 for mark in marks):
        raise RedflagError("presto_coef must be 0 if no row has a prefill. Add such rows (key prefill, in characters).")
    if args.answer_coef and args.answers == "marked" and not any(mark >= 0 for mark in marks):
        raise RedflagError(
            "answers must be harmless or all if no row has the key prefill (got marked). Choose one, or mark rows."
        )
    groups = [group for group in column(dataset, "group") if group >= 0]
    if args.consistency_coef and len(set(groups)) == len(groups):
        raise RedflagError("consistency_coef must be 0 if no two rows share a group. Give paraphrases the same group.")
    check_forecasts(args.forecasts, dataset)
