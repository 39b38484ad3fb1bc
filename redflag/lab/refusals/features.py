"""Texts as numbers: n-grams, which need no download, or the mean hidden state of an embedding model.

Both give one row of features per text, of length 1, so that texts of any length compare.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError

Floats = npt.NDArray[np.float32]

# Quotation marks are left out: sets of prompts differ in whether they put them round everything.
_WORD = re.compile(r"\w+(?:'\w+)?|[?!:;,.()<>{}*#]")
_LONGEST = 24  # characters of a word that are looked at; what is longer is no word of a language
_CACHED = 200_000  # words whose features are remembered; texts repeat their words


class Features(Protocol):
    """What makes features of texts."""

    def fit(self, texts: Sequence[str]) -> None:
        """Learns what there is to learn: a vocabulary, a scale."""

    def transform(self, texts: Sequence[str]) -> Any:
        """N x F: a sparse matrix or an array."""

    def state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """What `restore` needs: JSON, and arrays."""


class Ngrams:
    """TF-IDF of words, word pairs and the character n-grams inside words.

    As scikit-learn's `TfidfVectorizer` with sublinear counts, but each word's n-grams are looked up once, which makes
    it an order faster on text, whose words repeat.

    Attributes:
        names: The vocabulary: `w word`, `p word word`, `c gram` (`^` and `$` are a word's ends).
        idf: Inverse document frequencies, F.
    """

    def __init__(self, *, sizes: tuple[int, int] = (3, 5), min_count: int = 3, most: int = 60_000) -> None:
        """Sets it up.

        Args:
            sizes: Least and greatest length of the character n-grams.
            min_count: Texts that a feature must be in.
            most: Features kept, those in most texts first.
        """
        self.sizes, self.min_count, self.most = sizes, min_count, most
        self.names: list[str] = []
        self.idf: Floats = np.empty(0, np.float32)
        self._index: dict[str, int] = {}
        self._pairs: dict[tuple[str, str], int] = {}
        self._known: dict[str, array[int]] = {}

    def fit(self, texts: Sequence[str]) -> None:
        """Takes the vocabulary from texts.

        Raises:
            RedflagError: The texts have nothing in common.
        """
        counts: Counter[str] = Counter()
        cache: dict[str, list[str]] = {}
        for text in texts:
            words = _words(text)
            found: set[str] = set()
            for word in set(words):
                if word not in cache:
                    cache[word] = self._grams(word)
                found.update(cache[word])
            found.update(f"p {a} {b}" for a, b in itertools.pairwise(words))
            counts.update(found)
        frequent = [(-count, name) for name, count in counts.items() if count >= self.min_count]
        if not frequent:
            raise RedflagError(
                f"no word is in {self.min_count} of the {len(texts)} texts, so nothing can be learnt from them: "
                "give more rows"
            )
        kept = sorted(frequent)[: self.most]
        idf = [np.log((1 + len(texts)) / (1 - count)) + 1 for count, _ in kept]
        self._use([name for _, name in kept], np.array(idf, np.float32))

    def transform(self, texts: Sequence[str]) -> Any:
        """A SciPy CSR matrix, N x F; the row of a text without a known feature is empty."""
        from scipy.sparse import csr_matrix

        indices, ends = array("i"), array("q", [0])
        known, pairs = self._known, self._pairs
        for text in texts:
            words = _words(text)
            for word in words:
                found = known.get(word)
                if found is None:
                    found = array("i", (self._index[name] for name in self._grams(word) if name in self._index))
                    if len(known) < _CACHED:
                        known[word] = found
                indices.extend(found)
            indices.extend(pairs[pair] for pair in itertools.pairwise(words) if pair in pairs)
            ends.append(len(indices))
        shape = (len(texts), len(self.names))
        ones = np.ones(len(indices), np.float32)
        matrix = csr_matrix((ones, np.array(indices, np.int32), np.array(ends, np.int64)), shape=shape)
        matrix.sum_duplicates()
        matrix.data = (1 + np.log(matrix.data)) * self.idf[matrix.indices]
        squares = np.add.reduceat(np.append(matrix.data**2, 0), matrix.indptr[:-1]) if len(texts) else np.empty(0)
        lengths = np.diff(matrix.indptr)
        squares = np.where(lengths > 0, squares, 1.0)
        matrix.data /= np.repeat(np.sqrt(squares), lengths)
        return matrix

    def state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """See `Features.state`."""
        return {"kind": "ngrams", "sizes": list(self.sizes), "names": self.names}, {"idf": self.idf}

    def _use(self, names: list[str], idf: Floats) -> None:
        self.names, self.idf, self._known = names, idf, {}
        self._index = {name: i for i, name in enumerate(names)}
        split = ((name.split(" "), i) for i, name in enumerate(names) if name.startswith("p "))
        self._pairs = {(parts[1], parts[2]): i for parts, i in split}

    def _grams(self, word: str) -> list[str]:
        framed = f"^{word[:_LONGEST]}$"
        low, high = self.sizes
        grams = {framed[i : i + n] for n in range(low, high + 1) for i in range(len(framed) - n + 1)}
        return [f"w {word}", *(f"c {gram}" for gram in sorted(grams))]


class Embeddings:
    """Mean of a model's last hidden states over a text's tokens, each feature brought to mean 0 and deviation 1.

    Any folder or hub name that `AutoModel` loads will do: a sentence embedder, an encoder, or the model that is to be
    flagged.

    Attributes:
        model: Folder or name.
        max_length: Tokens of a text that are read.
    """

    def __init__(self, model: str, *, max_length: int = 128, batch_size: int = 32) -> None:
        """Sets it up; the model is loaded at first use."""
        self.model, self.max_length, self.batch_size = model, max_length, batch_size
        self.mean: Floats = np.empty(0, np.float32)
        self.scale: Floats = np.empty(0, np.float32)
        self._loaded: Any = None
        self._seen: dict[str, Floats] | None = None

    def again(self) -> Embeddings:
        """Fresh features of the same model, which is loaded once, and reads each text once."""
        other = Embeddings(self.model, max_length=self.max_length, batch_size=self.batch_size)
        self._seen = {} if self._seen is None else self._seen
        other._loaded, other._seen = self._load(), self._seen
        return other

    def fit(self, texts: Sequence[str]) -> None:
        """Measures mean and deviation."""
        raw = self.raw(texts)
        self.mean, self.scale = raw.mean(0), np.maximum(raw.std(0), 1e-6)

    def transform(self, texts: Sequence[str]) -> Floats:
        """N x D.

        Raises:
            RedflagError: The model gives vectors of another size than those learnt from.
        """
        raw = self.raw(texts)
        if raw.shape[1] != len(self.mean):
            raise RedflagError(
                f"the embedding model {self.model} gives {raw.shape[1]} numbers per text, but the classifier was "
                f"trained on {len(self.mean)}: it is another model; put the old one back, or train again"
            )
        scaled = (raw - self.mean) / self.scale
        return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-6)

    def raw(self, texts: Sequence[str]) -> Floats:
        """Mean hidden states as they are, N x D."""
        if self._seen is None:
            return self._read(texts)
        new = list(dict.fromkeys(text for text in texts if text not in self._seen))
        self._seen |= zip(new, self._read(new), strict=True)
        return np.stack([self._seen[text] for text in texts])

    def _read(self, texts: Sequence[str]) -> Floats:
        import torch

        tokenizer, model = self._load()
        # Equally long texts together: little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[Any] = [None] * len(texts)
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                encoded = tokenizer(
                    [texts[i] or " " for i in batch],
                    padding=True,
                    truncation=True,
                    max_length=self.max_length,
                    return_tensors="pt",
                ).to(model.device)
                hidden_BTD = model(**encoded).last_hidden_state.float()
                mask_BT1 = encoded["attention_mask"].unsqueeze(-1).float()
                mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
                for i, row in zip(batch, mean_BD.cpu().numpy(), strict=True):
                    found[i] = row
        width = model.config.hidden_size
        return np.stack(found).astype(np.float32) if found else np.empty((0, width), np.float32)

    def state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """See `Features.state`; the model itself stays where it is."""
        record = {"kind": "embeddings", "model": self.model, "max_length": self.max_length}
        return record, {"mean": self.mean, "scale": self.scale}

    def _load(self) -> Any:
        if self._loaded is None:
            from transformers import AutoModel, AutoTokenizer

            from redflag.weights.precision import inference_device

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.model)
                model = AutoModel.from_pretrained(self.model)
            except (OSError, ValueError, KeyError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise RedflagError(
                    f"the embedding model {self.model} cannot be loaded ({reason}): give a folder or hub name that "
                    "transformers knows, or leave it out to use n-grams"
                ) from error
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
            tokenizer.padding_side = "right"
            model = model.to(inference_device()).eval()
            self._loaded = tokenizer, model
        return self._loaded


def restore(record: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> Ngrams | Embeddings:
    """Features as `state` gave them.

    Raises:
        ValueError: They do not fit together.
    """
    if record.get("kind") == "ngrams":
        low, high = map(int, record["sizes"])
        ngrams = Ngrams(sizes=(low, high))
        names = [str(name) for name in record["names"]]
        if len(names) != len(arrays["idf"]):
            raise ValueError(f"{len(names)} names of features for {len(arrays['idf'])} numbers")
        ngrams._use(names, arrays["idf"].astype(np.float32))
        return ngrams
    if record.get("kind") == "embeddings":
        embeddings = Embeddings(str(record["model"]), max_length=int(record["max_length"]))
        embeddings.mean, embeddings.scale = arrays["mean"], arrays["scale"]
        return embeddings
    raise ValueError(f"features of the kind {record.get('kind')!r}")


def stack(parts: Iterable[Any]) -> Any:
    """Features of several texts of a pair, side by side."""
    found = list(parts)
    if len(found) == 1:
        return found[0]
    if isinstance(found[0], np.ndarray):
        return np.hstack(found)
    from scipy.sparse import hstack

    return hstack(found, format="csr")


def is_folder(model: str) -> bool:
    """Whether a model's name is a folder here."""
    return Path(model).is_dir()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold().replace("’", "'"))
