"""Flags: special tokens that mean "harm is imminent or under way", and attaching them to a model.

A flag is measured at every step; it is never sampled, never shown and never accepted from a user. `attach` gives a
model its flags, `redflag.json` carries them on disk, and `redflag.prompt` keeps user text from ever becoming one.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redflag.errors import RedflagError
from redflag.files import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FORMAT = 1
FILE = "redflag.json"

# Tokens that model families reserve for users: Llama 3, Gemma, BERT, Mistral Tekken, Mistral v3, Qwen 1, T5, OLMo 2,
# Phi, Falcon, InternLM, DeepSeek.
_RESERVED = re.compile(
    r"<\|?(reserved|fim_reserved)[\w ]*_?\d+\|?>|<unused_?\d+>|\[unused\d+\]|<SPECIAL_\d+>|\[control_\d+\]"
    r"|<\|extra_\d+\|>|<\|?extra_id_\d+\|?>|<\|(dummy|placeholder)_?\d+\|>|>>UNUSED_\d+<<|\[UNUSED_TOKEN_\d+\]"
    r"|<｜place▁holder▁no▁\d+｜>"
)


@dataclass(frozen=True)
class Flag:
    """One flag token.

    Attributes:
        category: The kind of harm; rows and thresholds refer to it.
        token: Its text in the tokenizer. `attach` replaces the text by that of a reserved token, if it uses one.
        description: A line that describes the harm; the new embedding starts from its mean.
        severity: Grade, 1 = mildest; for policies that distinguish grades.
        id: Vocabulary id; None until attached.
    """

    category: str
    token: str = ""
    description: str = ""
    severity: int = 1
    id: int | None = None


@dataclass(frozen=True)
class FlagSpec:
    """All flags of one model, in the order of their classes 1..K.

    Attributes:
        flags: The flags.
        run_id: Name of the training run; thresholds belong to it.
        template_hash: Hash of the prompt template that the model was trained with.

    Example:
        >>> spec = FlagSpec.of("weapons", "fraud")
        >>> spec.categories, spec.class_of("fraud"), spec.class_of(None)
        (('weapons', 'fraud'), 2, 0)
    """

    flags: tuple[Flag, ...]
    run_id: str = ""
    template_hash: str = ""

    def __post_init__(self) -> None:
        if not self.flags:
            raise RedflagError("a model must have at least one flag. Name a category.")
        for flag in self.flags:
            if not flag.category.strip():
                raise RedflagError("a flag's category must not be empty. For example 'harm'.")
            if flag.token != flag.token.strip():
                raise RedflagError(
                    f"a flag token must not begin or end with white space, which is easily lost (got {flag.token!r})."
                )
        for what in ("category", "token", "id"):
            values = [v for v in (getattr(flag, what) for flag in self.flags) if v not in ("", None)]
            double = next((v for v in values if values.count(v) > 1), None)
            if double is not None:
                raise RedflagError(f"each flag must have its own {what} (got {double!r} twice).")

    @classmethod
    def of(cls, *categories: str) -> FlagSpec:
        """A spec with one flag per category, texts and descriptions by default."""
        flags = []
        for category in categories:
            what = category.replace("_", " ").replace("-", " ")
            about = "" if what == "harm" else f" of the kind {what}"
            flags.append(
                Flag(category, _token_text(category), f"warning: dangerous harm{about} is imminent or under way")
            )
        return cls(tuple(flags))

    @property
    def categories(self) -> tuple[str, ...]:
        """The K categories."""
        return tuple(flag.category for flag in self.flags)

    @property
    def ids(self) -> tuple[int, ...]:
        """The K vocabulary ids."""
        missing = [flag.category for flag in self.flags if flag.id is None]
        if missing:
            raise RedflagError(f"the flag {missing[0]!r} must have a token id. Call redflag.flags.attach first.")
        return tuple(flag.id for flag in self.flags if flag.id is not None)

    def class_of(self, category: str | None) -> int:
        """Class of a row's category: 0 for harmless (None), k for flag k. A lone flag stands for every category."""
        if category is None:
            return 0
        if category in self.categories:
            return self.categories.index(category) + 1
        if len(self.flags) == 1:
            return 1
        raise RedflagError(
            f"the category of a row must be one of the flags', {', '.join(self.categories)} (got {category!r}). Add a "
            "flag for it, or map the category onto an existing one."
        )

    def strip(self, text: str) -> str:
        """`text` without any flag's text, also if removing one would form another."""
        while True:
            before = text
            for flag in self.flags:
                if flag.token:
                    text = text.replace(flag.token, "")
            if text == before:
                return text

    def save(self, directory: str | Path) -> None:
        """Writes `redflag.json`, whole or not at all.

        Raises:
            RedflagError: The operating system refuses.
        """
        path = Path(directory) / FILE
        record = {"format": FORMAT, "run_id": self.run_id, "template_hash": self.template_hash}
        text = json.dumps(
            {**record, "flags": [dataclasses.asdict(f) for f in self.flags]}, indent=2, ensure_ascii=False
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RedflagError(f"the folder {directory} cannot be created ({error}). Choose another one.") from error
        with atomic_write(path) as file:
            file.write((text + "\n").encode())

    @classmethod
    def load(cls, directory: str | Path) -> FlagSpec:
        """Reads `redflag.json`; an unknown format or key is refused."""
        path = Path(directory) / FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RedflagError(
                f"{directory} must be a flagged model's folder ({path} does not exist). Train one with `redflag train`."
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise RedflagError(f"{path} cannot be read ({error}). Restore it from the training run.") from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            other = record.get("format") if isinstance(record, dict) else record
            raise RedflagError(
                f"{path} must have the format {FORMAT} (got {other!r}). Use the version of redflag that wrote it."
            )
        _refuse_unknown(record, {"format", "run_id", "template_hash", "flags"}, path)
        flags = record.get("flags")
        if not isinstance(flags, list) or not flags or not all(isinstance(flag, dict) for flag in flags):
            raise RedflagError(f"{path} must have a list of flags. Restore it from the training run.")
        for name in ("run_id", "template_hash"):
            _check_type(record, name, str, path)
        for flag in flags:
            _refuse_unknown(flag, {field.name for field in dataclasses.fields(Flag)}, path)
            if not flag.get("category") or not flag.get("token"):
                raise RedflagError(f"each flag in {path} must have category and token (got {flag}). Restore the file.")
            for name, kind in (("category", str), ("token", str), ("description", str), ("severity", int)):
                _check_type(flag, name, kind, path)
            if flag.get("id") is not None:
                _check_type(flag, "id", int, path)
        try:
            return cls(
                tuple(Flag(**flag) for flag in flags),
                run_id=record.get("run_id", ""),
                template_hash=record.get("template_hash", ""),
            )
        except RedflagError as error:
            raise RedflagError(f"{path}: {error}") from None


def attach(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, spec: FlagSpec) -> FlagSpec:
    """Adds the flags of `spec` to the model and its tokenizer, in place.

    Each flag uses a reserved token of the tokenizer, or else a spare row of the embedding matrix (matrices are often
    larger than the vocabulary), or else the matrix is resized. The new input row is the mean embedding of the flag's
    description. The new output row is the mean of all rows: its logit is then the mean logit, so by Jensen's inequality
    p(flag) <= 1/V at every position. With a tied head there is one row for both: the description's mean, whose p(flag)
    is at most the mean probability of the description's own tokens.

    A token that the tokenizer knows already keeps its id; a flag with an id (of a spec read from disk) also keeps its
    trained rows.

    Returns:
        The spec with token texts and ids filled in.

    Raises:
        RedflagError: The tokenizer is not a fast one, or a flag's token serves another purpose.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise RedflagError(
            f"the tokenizer must be a fast one (got {type(tokenizer).__name__}). With others user text could form a "
            "flag. Load it with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    named = {flag.token for flag in spec.flags}
    for flag in spec.flags:
        if flag.id is not None and vocabulary.get(flag.token) != flag.id:
            raise RedflagError(
                f"the flag token {flag.token!r} has the id {vocabulary.get(flag.token)} in this tokenizer and "
                f"{flag.id} in the spec, so they belong to different models: load both from one folder"
            )
        if flag.token in vocabulary and _has_purpose(tokenizer, flag.token):
            raise RedflagError(
                f"a flag token must not be used in the model's conversations (got {flag.token!r}). Name an unused "
                "token, or none."
            )
    reserved = [
        text
        for index, text in sorted((i, str(t)) for i, t in tokenizer.added_tokens_decoder.items())
        if _RESERVED.fullmatch(text) and not _has_purpose(tokenizer, text) and text not in named and index < rows
    ]
    tokens = []
    for flag in spec.flags:
        if flag.token not in vocabulary:
            candidates = iter(reserved)
            token = next(
                (t for t in candidates if _make_special(tokenizer, t)), flag.token or _token_text(flag.category)
            )
            reserved = list(candidates)
        else:
            token = flag.token
        if not _make_special(tokenizer, token):
            raise RedflagError(
                f"a flag token must not arise from ordinary text in this tokenizer (got {token!r}). Users could write "
                "the flag. Name another token, or none."
            )
        tokens.append(token)
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    flags = tuple(
        dataclasses.replace(flag, token=token, id=index)
        for flag, token, index in zip(spec.flags, tokens, ids, strict=True)
    )
    attached = dataclasses.replace(spec, flags=flags)
    _start_rows(model, tokenizer, flags, [new for new, old in zip(flags, spec.flags, strict=True) if old.id is None])
    return attached


def _token_text(category: str) -> str:
    slug = re.sub(r"\W+", "_", category.strip().lower())
    return f"<|redflag_{slug}|>"


def _has_purpose(tokenizer: PreTrainedTokenizerFast, token: str) -> bool:
    """Whether a token has a role (end of sequence, padding, ...) or a chat template writes it."""
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    templates = tokenizer.chat_template or ""
    if not isinstance(templates, str):
        templates = "\n".join(templates.values())
    return token in templates or any(token == str(getattr(tokenizer, name, None)) for name in names)


def _make_special(tokenizer: PreTrainedTokenizerFast, token: str) -> bool:
    """Makes `token` a special token, existing or new; returns whether its text in a message stays ordinary text."""
    from tokenizers import AddedToken

    # Not normalised: no look-alike is folded into it. Special: `split_special_tokens` splits its text.
    added = AddedToken(token, special=True, normalized=False, lstrip=False, rstrip=False)
    tokenizer.add_tokens([added], special_tokens=True)
    text = tokenizer(token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tokenizer.convert_tokens_to_ids(token) not in text


def _start_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, flags: Sequence[Flag], fresh: Sequence[Flag]
) -> None:
    import torch

    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is None or head.weight.data_ptr() == embedding.data_ptr()
    bias = getattr(head, "bias", None)
    ids = {flag.id for flag in flags if flag.id is not None}
    language = [i for i in range(min(len(tokenizer), embedding.shape[0])) if i not in ids]

    def mean(weight: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        if rows is not language:
            return weight[list(rows)].float().mean(0)
        # The sum of a slice less the flags needs no second matrix in float32, which `weight[language]` would.
        count = min(len(tokenizer), len(weight))
        inside = [i for i in ids if i < count]
        total = weight[:count].sum(0, dtype=torch.float32)
        return (total - weight[inside].float().sum(0)) / len(language)

    with torch.no_grad():
        for flag in fresh:
            text = flag.description or f"warning: dangerous harm of the kind {flag.category} is imminent or under way"
            words = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i not in ids] or language
            embedding[flag.id] = mean(embedding, words).to(embedding)
            # A tied head is the embedding; only its own bias remains to be set.
            rows = words if tied else language
            if not tied:
                head.weight[flag.id] = mean(head.weight, rows).to(head.weight)
            if bias is not None:
                bias[flag.id] = mean(bias, rows).to(bias)


def _check_type(record: Mapping[str, Any], name: str, kind: type, path: Path) -> None:
    if name in record and type(record[name]) is not kind:
        raise RedflagError(f"{path} has {name}: {record[name]!r}, which is no {kind.__name__}: restore it from the run")


def _refuse_unknown(record: Mapping[str, Any], allowed: set[str], path: Path) -> None:
    unknown = sorted(set(record) - allowed)
    if unknown:
        raise RedflagError(
            f"keys of {path} must be among {', '.join(sorted(allowed))} (got {unknown[0]!r}). It was written by "
            "another version or edited."
        )
