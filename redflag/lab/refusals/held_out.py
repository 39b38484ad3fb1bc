"""Training with cross-validated figures: every pair is also judged by regressions that never saw its request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError
from redflag.lab.refusals.classifier import RefusalClassifier, Regression
from redflag.lab.refusals.features import Features
from redflag.lab.refusals.pairs import RequestAndAnswer
from redflag.lab.refusals.taxonomy import Level, Taxonomy
from redflag.progress import track

Counts = npt.NDArray[np.int64]
RESAMPLES = 1000


def train(
    pairs: Sequence[RequestAndAnswer],
    taxonomy: Taxonomy,
    features: Callable[[], Features],
    *,
    level: Level = "category",
    c: float = 10.0,
    folds: int = 5,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> RefusalClassifier:
    """A classifier trained on all pairs, with cross-validated figures (0 folds: none) in `made["held_out"]`.

    The refusal stage reads answers, the prompt stage requests, and the category stage requests, or requests and answers
    where all rows that have a category have an answer.

    Args:
        taxonomy: Names of categories; labels that it does not know make the rows useless for that stage, and are
            counted in `made["unknown"]`.

    Raises:
        RedflagError: Rows are missing, or an option is out of bounds.
    """
    if folds == 1 or folds < 0:
        raise RedflagError(f"folds must be 0, or 2 or more (got {folds}).")
    if not c > 0:
        raise RedflagError(f"c must be above 0 (got {c}).")
    names = [taxonomy.label(pair.categories[0], level) if pair.categories else None for pair in pairs]
    unknown = sum(bool(pair.categories) and name is None for pair, name in zip(pairs, names, strict=True))
    kinds = [(pair, name) for pair, name in zip(pairs, names, strict=True) if name is not None]
    # What each stage tells apart, what it reads, and its rows with their labels.
    tasks: dict[str, tuple[tuple[str, ...], tuple[str, ...], list[tuple[RequestAndAnswer, str]]]] = {
        "refusal": (
            ("no refusal", "refusal"),
            ("response",),
            [(p, "refusal" if p.refusal else "no refusal") for p in pairs if p.refusal is not None],
        ),
        "category": (
            taxonomy.classes(level),
            ("prompt", "response") if kinds and all(pair.response for pair, _ in kinds) else ("prompt",),
            kinds,
        ),
        "prompt": (
            ("harmless", "harmful"),
            ("prompt",),
            _once((p, "harmful" if p.prompt_harmful else "harmless") for p in pairs if p.prompt_harmful is not None),
        ),
    }
    if not tasks["refusal"][2]:
        raise RedflagError("some rows must have the label `refusal` (got none).")
    classifier = RefusalClassifier(taxonomy, level)
    figures: dict[str, Any] = {}
    for name, (classes, reads, labelled) in tasks.items():
        if not labelled:
            continue
        begun = time.monotonic()

        def fresh(classes: tuple[str, ...] = classes, reads: tuple[str, ...] = reads) -> Regression:
            return Regression(classes, reads, [features() for _ in reads])

        stage = fresh()
        stage.fit([pair for pair, _ in labelled], [label for _, label in labelled], c=c, seed=seed)
        classifier.stages[name] = stage
        if folds:
            figures[name] = _held_out(labelled, stage.classes, fresh, c, folds, seed)
            figures[name]["reads"] = list(reads)
        score = f", macro-F1 {figures[name]['macro_f1']:.3f} on held-out requests" if folds else ""
        log(f"{name}: {len(labelled):,} rows, {len(stage.classes)} classes{score} ({time.monotonic() - begun:.0f} s)")
    classifier.made = {"rows": len(pairs), "unknown": unknown, "c": c, "seed": seed, "held_out": figures}
    return classifier


def macro_f1(confusion: Counts) -> float:
    """Mean over classes of the F1, from a confusion matrix, truth x guess; classes that never occur do not count.

    >>> round(macro_f1(np.array([[8, 2], [1, 9]])), 4)
    0.8496
    """
    return float(np.nanmean(f1(confusion)))


def f1(confusion: Counts) -> npt.NDArray[np.float64]:
    """F1 of each class; NaN for one that neither occurs nor is guessed."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    total = confusion.sum(-1) + confusion.sum(-2)
    return np.divide(2 * hits, total, out=np.full(hits.shape, np.nan), where=total > 0)


def figures_of(
    truth: Counts, guess: Counts, groups: Sequence[str], classes: Sequence[str], seed: int
) -> dict[str, Any]:
    """Confusion matrix, F1s and their intervals.

    Args:
        groups: Requests; a bootstrap draws whole ones, for answers to one request are not independent.

    Returns:
        `macro_f1` and `macro_f1_interval` (95%, percentiles), `accuracy`, `f1` (per class), `confusion` (truth x
        guess), `classes`, `rows`, `requests`.
    """
    size = len(classes)
    _, units = np.unique(np.asarray(groups), return_inverse=True)
    # The confusion matrix of each request; a resample is a weighted sum of them.
    each = np.zeros((int(units.max()) + 1, size, size), np.int64)
    np.add.at(each, (units, truth, guess), 1)
    confusion = each.sum(0)
    draw = np.random.default_rng(seed)
    flat = each.reshape(len(each), -1)
    scores = []
    for _ in range(RESAMPLES):
        times = np.bincount(draw.integers(len(each), size=len(each)), minlength=len(each))
        scores.append(macro_f1((times @ flat).reshape(size, size)))
    low, high = np.quantile(scores, (0.025, 0.975))
    each_f1 = f1(confusion)
    return {
        "macro_f1": macro_f1(confusion),
        "macro_f1_interval": [float(low), float(high)],
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "f1": {name: None if np.isnan(x) else float(x) for name, x in zip(classes, each_f1, strict=True)},
        "confusion": confusion.tolist(),
        "classes": list(classes),
        "rows": len(truth),
        "requests": len(each),
    }


def divide(groups: Sequence[str], folds: int, seed: int) -> Iterator[tuple[Counts, Counts]]:
    """For each fold the indices to train on and those held out; all of one group are on one side.

    Raises:
        RedflagError: There are fewer groups than folds.
    """
    from sklearn.model_selection import GroupKFold

    if (different := len(set(groups))) < folds:
        raise RedflagError(
            f"there must be at least {folds} different requests for {folds} folds (got {different}). Give more rows, "
            "or folds 0."
        )
    yield from GroupKFold(folds, shuffle=True, random_state=seed).split(groups, groups=groups)


def _held_out(
    labelled: Sequence[tuple[RequestAndAnswer, str]],
    classes: Sequence[str],
    fresh: Callable[[], Regression],
    c: float,
    folds: int,
    seed: int,
) -> dict[str, Any]:
    pairs, labels = [pair for pair, _ in labelled], [label for _, label in labelled]
    groups = [pair.group for pair in pairs]
    guess = np.zeros(len(pairs), np.int64)
    parts = divide(groups, folds, seed)
    for others, held_out in track(parts, "figures on held-out requests", folds, "folds"):
        stage = fresh()
        stage.fit([pairs[i] for i in others], [labels[i] for i in others], c=c, seed=seed)
        best = stage.probabilities([pairs[i] for i in held_out]).argmax(1)
        guess[held_out] = [classes.index(stage.classes[i]) for i in best]
    return figures_of(np.array([classes.index(label) for label in labels]), guess, groups, classes, seed)


def _once(labelled: Iterable[tuple[RequestAndAnswer, str]]) -> list[tuple[RequestAndAnswer, str]]:
    """One row per request, however many answers it has."""
    first: dict[str, tuple[RequestAndAnswer, str]] = {}
    for pair, label in labelled:
        first.setdefault(pair.group, (pair, label))
    return list(first.values())
