"""Two baselines on the rows the flags are trained and tested on, written as `redflag score` writes flags.

    python recipes/small-real/baselines.py --output runs/small-real

* `tfidf`: TF-IDF of the words and word pairs of the response so far, logistic regression (scikit-learn).
* `probe`: a linear probe on the base model's last hidden state, binary cross-entropy at every response token.

Step i is judged from what stands before token i, as a flag is, so the same monitor and the same table apply.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from redflag.corpus.rows import Row, load_rows
from redflag.flags import Flag, FlagSpec
from redflag.prompt import render_response
from redflag.training.pretrain import RESERVED_TOKENS

MAX_LENGTH = 256  # As in train.yaml.
PREFIXES_PER_ROW = 2
C = 3.0  # Of 1, 3, 10 and 30: best AUROC in 3-fold cross-validation over the training rows' groups.

Floats = npt.NDArray[np.float32]


class Ids(NamedTuple):
    """One row as tokens: the prompt, up to where the answer starts, and the answer."""

    prompt: list[int]
    response: list[int]


def tokenize(tokenizer: Any, rows: Sequence[Row]) -> list[Ids]:
    """Rows rendered with the chat template, cut to `MAX_LENGTH` as scoring cuts them: the prompt loses its front."""
    # The token that becomes the flag, so that both sides tokenise alike.
    spec = FlagSpec((Flag("harm", RESERVED_TOKENS[0], id=tokenizer.convert_tokens_to_ids(RESERVED_TOKENS[0])),))
    result = []
    for row in rows:
        rendered = render_response(tokenizer, row.messages, spec)
        response = rendered.response_ids[: MAX_LENGTH - 1]
        result.append(Ids(rendered.prompt_ids[-(MAX_LENGTH - len(response)) :], response))
    return result


def checkpoints(length: int) -> list[int]:
    """Steps at which the text so far is read anew: all of the first 16, then every fourth; between, the score holds."""
    return [*range(min(16, length)), *range(16, length, 4)]


def tfidf(tokenizer: Any, train: Sequence[Row], train_ids: Sequence[Ids], test_ids: Sequence[Ids]) -> list[Floats]:
    """Trains on whole answers and random beginnings of them; returns T probabilities per test row."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    rng = random.Random(0)
    texts, labels = [], []
    for row, ids in zip(train, train_ids, strict=True):
        cuts = [len(ids.response), *(rng.randint(1, len(ids.response)) for _ in range(PREFIXES_PER_ROW))]
        texts += tokenizer.batch_decode([ids.response[:cut] for cut in cuts])
        labels += [row.harmful] * len(cuts)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    model = LogisticRegression(C=C, class_weight="balanced", max_iter=300)
    model.fit(vectorizer.fit_transform(texts), labels)
    result = []
    for start in range(0, len(test_ids), 256):
        part = test_ids[start : start + 256]
        steps = [checkpoints(len(ids.response)) for ids in part]
        prefixes = [ids.response[:i] for ids, at in zip(part, steps, strict=True) for i in at]
        probs = model.predict_proba(vectorizer.transform(tokenizer.batch_decode(prefixes)))[:, 1].astype(np.float32)
        pieces = np.split(probs, np.cumsum([len(at) for at in steps])[:-1])
        for ids, at, piece in zip(part, steps, pieces, strict=True):
            piece[0] = 0.0  # Nothing has been written yet: there is nothing to alarm on.
            result.append(piece[np.searchsorted(at, np.arange(len(ids.response)), side="right") - 1])
    return result


def hidden_states(model: Any, rows: Sequence[Ids], batch_size: int = 32) -> Iterator[tuple[int, Floats]]:
    """Index of a row and its T x H hidden states, each taken where the response token after it is predicted."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].response))
    for start in range(0, len(order), batch_size):
        picks = order[start : start + batch_size]
        # The last token is never read from: nothing is predicted after it.
        sequences = [(rows[i].prompt + rows[i].response)[:-1] for i in picks]
        width = max(map(len, sequences))
        # Causal attention never looks at padding on the right.
        batch = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        with torch.inference_mode():
            hidden = model(input_ids=batch, use_cache=False).last_hidden_state.float().numpy()
        for i, states, sequence in zip(picks, hidden, sequences, strict=True):
            yield i, states[len(rows[i].prompt) - 1 : len(sequence)].copy()


def probe(base: Path, train: Sequence[Row], train_ids: Sequence[Ids], test_ids: Sequence[Ids]) -> list[Floats]:
    """Trains on every response token, both classes weighing the same in all; returns T probabilities per test row."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().model
    total = sum(len(ids.response) for ids in train_ids)
    features = np.empty((total, model.config.hidden_size), dtype=np.float32)
    labels = np.empty(total, dtype=np.float32)
    filled = 0
    for i, states in hidden_states(model, train_ids):
        features[filled : filled + len(states)] = states
        labels[filled : filled + len(states)] = train[i].harmful
        filled += len(states)
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    features -= mean
    features /= scale
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    share = float(y.mean())
    weights = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))
    line = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ line[:-1] + line[-1]
        value = (
            torch.nn.functional.binary_cross_entropy_with_logits(logits, y, weights) + 1e-4 * line[:-1].square().sum()
        )
        value.backward()
        return value

    optimizer.step(loss)
    vector = line.detach().numpy()
    result: list[Floats] = [np.empty(0, dtype=np.float32)] * len(test_ids)
    for i, states in hidden_states(model, test_ids):
        result[i] = (1 / (1 + np.exp(-((states - mean) / scale @ vector[:-1] + vector[-1])))).astype(np.float32)
    return result


def write(path: Path, rows: Sequence[Row], ids: Sequence[Ids], probs: Sequence[Floats], tokenizer: Any) -> None:
    """Writes rows as `redflag score` does, with a single column of probabilities."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row, (_, response), p in zip(rows, ids, probs, strict=True):
            scored = {
                "id": row.id,
                "token_ids": response,
                "tokens": [tokenizer.decode([t]) for t in response],
                "flag_probs": [[float(v)] for v in p],
                "peak": [float(p.max())],
                "onset": 0 if row.harmful else None,
                "category": row.category,
                "group": row.group,
                "source": row.source,
                "truncated": False,
            }
            file.write(json.dumps(scored, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(temporary, path)


def main(output: Path, names: Sequence[str]) -> None:
    """Trains and scores the baselines that have no file yet."""
    from transformers import AutoTokenizer

    base = output / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, test = (load_rows(output / "rows" / f"{name}.jsonl").rows for name in ("train", "test"))
    train_ids, test_ids = tokenize(tokenizer, train), tokenize(tokenizer, test)
    for name in names:
        path = output / "baselines" / f"{name}.jsonl"
        if path.exists():
            print(f"{name}: there already, {path}")
            continue
        if name == "tfidf":
            probs = tfidf(tokenizer, train, train_ids, test_ids)
        else:
            probs = probe(base, train, train_ids, test_ids)
        write(path, test, test_ids, probs, tokenizer)
        print(f"{name}: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/small-real"))
    parser.add_argument("--names", nargs="+", choices=("tfidf", "probe"), default=["tfidf", "probe"])
    arguments = parser.parse_args()
    main(arguments.output, arguments.names)
