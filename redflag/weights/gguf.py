"""Models in one GGUF file, as llama.cpp and Ollama use them, read by transformers into ordinary weights."""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

from redflag.errors import RedflagError


def is_gguf(name: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return str(name).lower().endswith(".gguf")


def read_gguf_config(name: str | Path) -> Any:
    """The configuration that a GGUF file describes.

    Raises:
        RedflagError: The file isn't there, or the package gguf is not installed.
    """
    file = _file(name)
    with tempfile.TemporaryDirectory() as empty:
        return AutoConfig.from_pretrained(empty, gguf_file=file)


def read_gguf_tokenizer(name: str | Path) -> Any:
    """The tokenizer in a GGUF file, which splits text as llama.cpp does.

    Raises:
        RedflagError: The file isn't there, or the package gguf is not installed.
    """
    file = _file(name)
    # An empty folder, since transformers would read the tokenizer of other files beside this one.
    with tempfile.TemporaryDirectory() as empty:
        tokenizer = AutoTokenizer.from_pretrained(empty, gguf_file=file)
    return _as_in_file(tokenizer, file)


def read_gguf_weights(name: str | Path, dtype: Any = "auto") -> tuple[Any, set[str]]:
    """A causal language model of ordinary weights from a GGUF file, and the names of the weights that it lacks.

    The type "auto" is float32, whatever the file holds.

    Raises:
        RedflagError: The file isn't there, or the package gguf is not installed.
    """
    file = _file(name)
    whole = GgufConfig(dequantize=True)
    with tempfile.TemporaryDirectory() as empty:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            empty, gguf_file=file, dtype=dtype, quantization_config=whole, output_loading_info=True
        )
    # The temporary folder and the file's title must not be saved as the model's name.
    vars(model.config).pop("_model_name_or_path", None)
    model.name_or_path = model.config.name_or_path = ""
    return model, set(loading_info["missing_keys"])


def _file(name: str | Path) -> str:
    """The file's absolute path."""
    path = Path(name)
    if not path.is_file():
        raise RedflagError(
            f"{name} must be a GGUF file on this machine (it does not exist). Files on the hub are not fetched. "
            "Download it first."
        )
    if find_spec("gguf") is None:
        raise RedflagError(f"the package gguf must be installed to read {name}. pip install gguf")
    return str(path.absolute())


def _as_in_file(tokenizer: Any, file: str) -> Any:
    """The tokenizer without the token that transformers adds, and with the file's rule for digits."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tokens, rule = reader.get_field("tokenizer.ggml.tokens"), reader.get_field("tokenizer.ggml.pre")
    count = len(tokens.data) if tokens is not None else len(tokenizer)
    if len(tokenizer) > count:
        # A GPT-2 tokenizer gets an <|endoftext|> behind its vocabulary if it has none, for which the model has no row.
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < count]
        roles = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        roles = {name: token for name, token in roles.items() if tokenizer.convert_tokens_to_ids(token) < count}
        fast = Tokenizer.from_str(json.dumps(described))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=tokenizer.chat_template, **roles)
    if rule is not None and rule.contents() == "smollm":
        # The file splits digits first, one by one; transformers splits as GPT-2 does. No merge joins digits in either
        # case, but a line break before a digit becomes another token, as in numbered lists.
        fast = tokenizer.backend_tokenizer
        fast.pre_tokenizer = Sequence([Digits(individual_digits=True), fast.pre_tokenizer])
    return tokenizer
