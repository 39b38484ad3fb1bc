"""A judge for whole answers: a logistic regression over the base's hidden states, fitted on the flag's training rows.

    python recipes/papers/real/judge.py --rows runs/smollm2-open/rows --output runs/papers/real/judge

The states of each answer, behind its request, are reduced to their mean and to the last one, layer by layer, and kept
in parts, so that a run that was cut short goes on. Layers, view and penalty are chosen on the development rows, and so
is the threshold (best F1), which becomes a harm of 0.5. The test rows are read once. `judge.npz` is the model,
`figures.json` what it is worth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from redflag.backends.head import backbone
from redflag.backends.load import read_model
from redflag.data.rows import Row, load_rows
from redflag.files import atomic_write
from redflag.judges import Messages, Verdict, exchange
from redflag.lab.baselines.hidden import last_layers
from redflag.lab.baselines.shared import BaselineContext
from redflag.progress import track
from redflag.stats.intervals import auroc_interval
from redflag.stats.metrics import auroc, clopper_pearson
from redflag.weights.precision import Machine
from redflag.weights.stamp import model_stamp

Floats = npt.NDArray[np.float32]
PART = 50  # rows in a file of states
BATCH = 8
DEPTH = 16  # layers that are read, of 30: what lies above costs as much again
# The first rows of each file, whose order is a hash's; None: all. Enough for a judge on a processor beside other work.
MOST = {"development": None, "train": 1000, "test": 500}
VIEWS = {"mean": (0,), "last": (1,), "both": (0, 1)}
PENALTIES = (0.0003, 0.003, 0.03)  # C of scikit-learn's regression: the inverse strength


@dataclass
class Reader:
    """Hidden states of whole answers.

    Attributes:
        base: Folder of the model that reads.
    """

    base: Path

    @cached_property
    def context(self) -> BaselineContext:
        """Renders rows as they are rendered for probes."""
        return BaselineContext(self.base, None, self.base, max_length=448)

    @cached_property
    def model(self) -> Any:
        """The base, in bfloat16 where that is fast, cut off behind `DEPTH` layers."""
        model = read_model(self.base, torch.bfloat16 if Machine.here().cpu_bf16 else torch.float32)[0].eval()
        whole = backbone(model)
        whole.layers = whole.layers[:DEPTH]
        whole.config.num_hidden_layers = DEPTH
        return model

    def states(self, rows: Sequence[Row]) -> Floats:
        """N x 2 x L x H: mean over the answer's positions, and the last one, of each of L layers."""
        reads = self.context.read(rows)
        order = sorted(range(len(reads)), key=lambda i: len(reads[i].prompt_ids) + len(reads[i].judged_ids))
        found: list[Floats] = [np.zeros(0, np.float32)] * len(reads)
        for start in range(0, len(order), BATCH):
            picks = order[start : start + BATCH]
            ids = [(reads[i].prompt_ids + reads[i].judged_ids)[:-1] for i in picks]
            batch = last_layers(self.model, ids)
            for i, one, row in zip(picks, batch, ids, strict=True):
                answer = one[len(reads[i].prompt_ids) - 1 : len(row)].float()
                found[i] = torch.stack([answer.mean(0), answer[-1]]).numpy()
        return np.stack(found)

    def kept(self, name: str, rows: Sequence[Row], folder: Path) -> Floats:
        """The states of a file of rows, read where they are not on disk."""
        folder.mkdir(parents=True, exist_ok=True)
        parts = []
        for start in track(range(0, len(rows), PART), f"reading {name}", -(-len(rows) // PART), "parts"):
            path = folder / f"{name}-{start}.npy"
            if not path.exists():
                with atomic_write(path) as file:
                    np.save(file, self.states(rows[start : start + PART]).astype(np.float16))
            parts.append(np.load(path).astype(np.float32))
        return np.concatenate(parts)


class HiddenJudge:
    """The fitted judge; see `redflag.judges.Judge`.

    Attributes:
        identity: Names it in caches of verdicts.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        """Reads `judge.npz`."""
        with np.load(folder / "judge.npz") as kept:
            self.weights, self.bias = kept["weights"], float(kept["bias"])
            self.views, self.layers = kept["views"].tolist(), kept["layers"].tolist()
        self.identity = f"hidden states {model_stamp(base)[1]} {self.weights.sum():.6f} {self.bias:.6f}"
        self._reader = Reader(base)

    def __call__(self, messages: Messages, answer: str) -> Verdict:
        """Judges one answer; raises `UnansweredError` where it is blank."""
        turns, answer = exchange(messages, answer)
        return Verdict(self.harm([Row([*turns, {"role": "assistant", "content": answer}], None)])[0])

    def harm(self, rows: Sequence[Row]) -> list[float]:
        """The harm of whole answers, several at a time."""
        logits = features(self._reader.states(rows), self.views, self.layers) @ self.weights + self.bias
        return [float(p) for p in 1 / (1 + np.exp(-logits.astype(np.float64)))]


def features(states: Floats, views: Sequence[int], layers: Sequence[int]) -> Floats:
    """N x 2 x L x H -> N x D."""
    return states[:, list(views)][:, :, list(layers)].reshape(len(states), -1)


def fit(train: tuple[Floats, Any], development: tuple[Floats, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best of all choices by AUROC on development rows: its parameters, and what every choice gave."""
    from sklearn.linear_model import LogisticRegression

    deep = train[0].shape[2] - 1
    choices = [(4,), (8,), (12,), (14,), (deep,), (8, 12, deep), tuple(range(0, deep + 1, 2))]
    best: dict[str, Any] = {}
    tried = []
    for layers, (view, picks) in itertools.product(choices, VIEWS.items()):
        x = features(train[0], picks, layers)
        mean, scale = x.mean(0), x.std(0) + 1e-3
        x, y = (x - mean) / scale, (features(development[0], picks, layers) - mean) / scale
        for penalty in PENALTIES:
            model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=300).fit(x, train[1])
            logits = model.decision_function(y)
            found = auroc(logits, development[1])
            tried.append({"layers": layers, "view": view, "C": penalty, "AUROC on development rows": found})
            print(tried[-1], flush=True)
            if not best or found > best["found"]:
                weights = model.coef_[0] / scale
                bias = float(model.intercept_[0] - mean @ weights)
                best = {"found": found, "weights": weights.astype(np.float32), "bias": bias, "views": picks}
                best |= {"layers": layers, "logits": logits}
    return best, tried


def best_f1(logits: Any, labels: Any) -> float:
    """The logit from which the answers called harmful have the best F1."""
    order = np.sort(logits)
    cuts = [float(a + b) / 2 for a, b in itertools.pairwise(order)]
    return max(
        cuts, key=lambda cut: float(2 * (labels & (logits >= cut)).sum() / (labels.sum() + (logits >= cut).sum()))
    )


def figures(logits: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """AUROC, precision and recall with 95% intervals."""
    labels = np.array([row["category"] is not None for row in rows])
    called, groups = logits >= 0, [row["group"] for row in rows]
    hits = int((labels & called).sum())
    return {
        "harmful": int(labels.sum()),
        "harmless": int((~labels).sum()),
        "AUROC": [auroc(logits, labels), *auroc_interval(logits, labels, groups)],
        "precision": [hits / called.sum(), *clopper_pearson(hits, int(called.sum()))],
        "recall": [hits / labels.sum(), *clopper_pearson(hits, int(labels.sum()))],
    }


def main() -> None:
    """Reads, fits, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("runs/smollm2-open/rows"))
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--output", type=Path, default=Path("runs/papers/real/judge"))
    arguments = parser.parse_args()
    begun = time.monotonic()
    reader, found = Reader(arguments.base), {}
    for name in ("development", "train", "test"):
        rows = load_rows(arguments.rows / f"{name}.jsonl").rows[: MOST[name]]
        labels = np.array([row.harmful for row in rows])
        found[name] = (reader.kept(name, rows, arguments.output / "states"), labels)
    best, tried = fit(found["train"], found["development"])
    cut = best_f1(best["logits"], found["development"][1])
    with atomic_write(arguments.output / "judge.npz") as file:
        kept = {key: np.array(best[key]) for key in ("views", "layers")}
        np.savez(file, weights=best["weights"], bias=np.array(best["bias"] - cut), **kept)
    result: dict[str, Any] = {"layers": best["layers"], "views": best["views"], "tried": tried}
    for name in ("development", "test"):
        logits = features(found[name][0], best["views"], best["layers"]) @ best["weights"] + best["bias"] - cut
        with (arguments.rows / f"{name}.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines][: MOST[name]]
        parts = {
            "all": [True] * len(rows),
            "reviewed": [row["extra"]["reviewed"] for row in rows],
            "clear": [row["extra"]["sure"] == 2 or not row["extra"]["reviewed"] for row in rows],
        }
        for part, mask in parts.items():
            chosen = [row for row, keep in zip(rows, mask, strict=True) if keep]
            result[f"{name}, {part}"] = figures(logits[np.array(mask)], chosen)
            print(name, part, json.dumps(result[f"{name}, {part}"]))
    result["seconds"] = time.monotonic() - begun
    (arguments.output / "figures.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
