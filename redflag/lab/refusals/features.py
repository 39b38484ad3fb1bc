"""Texts as numbers: n-grams, which need no download, or the mean hidden state of an embedding model.

Both give one row of features per text, of length 1, so that texts of any length compare.
"""

from __future__ import annotations

import functools
import itertools
import re
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError

Floats = npt.NDArray[np.float32]

# Without quotation marks: some sets of prompts put them around everything.
_WORD = re.compile(r"\w+(?:'\w+)?|[?!:;,.()<>{}*#]")
_SIZES = range(3, 6)  # lengths of character n-grams
_LONGEST = 24  # characters of a word that are used; longer strings are not words of a language
_CACHED = 200_000  # words whose features are cached


class Features(Protocol):
    """Texts -> rows of numbers."""

    def fit(self, texts: Sequence[str]) -> None:
        """Learns a vocabulary or a scale."""

    def transform(self, texts: Sequence[str]) -> Any:
        """N x F: a sparse matrix or an array."""

    def state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """The JSON and the arrays that `restore` takes."""


class Ngrams:
    """TF-IDF (scikit-learn, sublinear counts) of words, word pairs and the character n-grams inside words.

    Attributes:
        names: The vocabulary: `w word`, `p word word`, `c gram` (`^` and `$` are a word's ends).
    """

    def __init__(self, *, min_count: int = 3, most: int = 60_000) -> None:
        self.min_count, self.most = min_count, most
        self._use([])

    def fit(self, texts: Sequence[str]) -> None:
        """Takes the vocabulary from texts."""
        from sklearn.feature_extraction.text import CountVectorizer

        counter = CountVectorizer(analyzer=_names, min_df=self.min_count, max_features=self.most, dtype=np.float32)
        try:
            counts = counter.fit_transform(texts)
        except ValueError as error:  # scikit-learn's way to say that no name is left
            raise RedflagError(
                f"some word must be in {self.min_count} of the texts (got {len(texts)} without one). Give more rows."
            ) from error
        self._use(counter.get_feature_names_out().tolist())
        self._tfidf.fit(counts)

    def transform(self, texts: Sequence[str]) -> Any:
        """A SciPy CSR matrix, N x F; the row of a text without a known feature is empty."""
        from scipy.sparse import csr_matrix

        # As `CountVectorizer.transform`, but a word's features are looked up once, which is three times as fast on
        # text, whose words repeat.
        indices, ends = array("i"), array("q", [0])
        for text in texts:
            words = _words(text)
            for word in words:
                indices.extend(self._of_word(word))
            indices.extend(self._index[pair] for pair in _pairs(words) if pair in self._index)
            ends.append(len(indices))
        ones = np.ones(len(indices), np.float32)
        counts = csr_matrix((ones, np.array(indices), np.array(ends)), shape=(len(texts), len(self.names)))
        counts.sum_duplicates()
        return self._tfidf.transform(counts)

    def state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        return {"kind": "ngrams", "names": self.names}, {"idf": self._tfidf.idf_.astype(np.float32)}

    def _use(self, names: list[str], idf: Floats | None = None) -> None:
        from sklearn.feature_extraction.text import TfidfTransformer

        self.names, self._index = names, {name: i for i, name in enumerate(names)}
        self._of_word = functools.lru_cache(_CACHED)(self._look_up)
        self._tfidf = TfidfTransformer(sublinear_tf=True)
        if idf is not None:
            self._tfidf.idf_ = idf

    def _look_up(self, word: str) -> array[int]:
        """Columns of a word and of its n-grams."""
        return array("i", (self._index[name] for name in _grams(word) if name in self._index))


class Embeddings:
    """Mean of a model's last hidden states over a text's tokens, each feature brought to mean 0 and deviation 1.

    Any folder or hub name that `AutoModel` loads will do: a sentence embedder, an encoder, or the model that is to be
    flagged.
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
        """N x D."""
        raw = self.raw(texts)
        if raw.shape[1] != len(self.mean):
            raise RedflagError(
                f"the embedding model {self.model} must give {len(self.mean)} numbers per text, as in training (got "
                f"{raw.shape[1]}). Restore the old model, or train again."
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
        means: list[Any] = [None] * len(texts)
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
                    means[i] = row
        width = model.config.hidden_size
        return np.stack(means).astype(np.float32) if means else np.empty((0, width), np.float32)

    def state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
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
                    f"the embedding model {self.model} does not load ({reason}). Give a folder or hub name that "
                    "transformers supports, or leave it out to use n-grams."
                ) from error
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
            tokenizer.padding_side = "right"
            model = model.to(inference_device()).eval()
            self._loaded = tokenizer, model
        return self._loaded


def restore(record: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> Ngrams | Embeddings:
    """Features as `state` gave them."""
    if record.get("kind") == "ngrams":
        ngrams = Ngrams()
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
    from scipy.sparse import hstack

    matrices = list(parts)
    if len(matrices) == 1:
        return matrices[0]
    return np.hstack(matrices) if isinstance(matrices[0], np.ndarray) else hstack(matrices, format="csr")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold().replace("’", "'"))


def _pairs(words: Sequence[str]) -> list[str]:
    return [f"p {a} {b}" for a, b in itertools.pairwise(words)]


@functools.lru_cache(_CACHED)
def _grams(word: str) -> tuple[str, ...]:
    """The word, and each n-gram in it once."""
    framed = f"^{word[:_LONGEST]}$"
    grams = {framed[i : i + n] for n in _SIZES for i in range(len(framed) - n + 1)}
    return (f"w {word}", *(f"c {gram}" for gram in grams))


def _names(text: str) -> list[str]:
    """All features of a text, each as often as it occurs."""
    words = _words(text)
    return [*itertools.chain.from_iterable(map(_grams, words)), *_pairs(words)]
