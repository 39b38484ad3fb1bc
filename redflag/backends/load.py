"""A model from its folder, refused unless all of it is there and belongs together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL
from transformers.utils import logging

from redflag.backends.hf import HFBackend, find_eos_ids
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.prompt import check_template, template_hash
from redflag.weights.gguf import is_gguf, read_gguf_config, read_gguf_tokenizer, read_gguf_weights
from redflag.weights.precision import inference_device


def read_model(name: str | Path, dtype: Any = "auto") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a folder, a GGUF file or the hub.

    Raises:
        RedflagError: They do not load, or the files lack weights (transformers would draw random ones).
    """
    try:
        tokenizer = plain_tokenizer(name)
        model, lacking = _read_weights(name, dtype)
    except RedflagError:
        raise
    except Exception as error:  # A damaged file shows itself in a dozen ways: JSON, safetensors, shapes, missing keys.
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RedflagError(
            f"{name} does not load as a model with its tokenizer ({reason}): give the folder of a complete model, "
            "such as `redflag train` writes, a hub name, or a GGUF file of a kind that transformers reads"
        ) from error
    tied = model.get_output_embeddings() is not None and model.config.get_text_config().tie_word_embeddings
    # The flag rows of a tied head are those of the embedding, and lie in an adapter's file only once.
    missing = sorted(key for key in lacking if not (tied and ".token_adapter." in key))
    if missing:
        raise RedflagError(
            f"{name} lacks {len(missing)} of the model's weights ({missing[0]}, ...), which would be random numbers: "
            "restore the files or train again"
        )
    return model, tokenizer


def _read_weights(name: str | Path, dtype: Any) -> tuple[Any, set[str]]:
    """A model, and the names of the weights that its files lack."""
    config = Path(name) / "adapter_config.json"
    if not config.is_file():
        return _read_whole(name, dtype)
    model, lacking = read_base(name, dtype)
    # transformers reports weights that a tied head has no need of; what is really missing is refused by the caller.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return model, lacking | set(model.load_adapter(str(name)).missing_keys)
    finally:
        logging.set_verbosity(verbosity)


def read_base(folder: str | Path, dtype: Any = "auto") -> tuple[Any, set[str]]:
    """The model that an adapter's folder names, with room for its flags, and the weights that its files lack."""
    adapter = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    model, lacking = _read_whole(adapter["base_model_name_or_path"], dtype)
    # The base has no rows for flags that were put behind its vocabulary; the adapter holds them, and needs the place.
    trained = adapter.get("trainable_token_indices") or []
    ids = [i for part in (trained.values() if isinstance(trained, dict) else [trained]) for i in part]
    if ids and max(ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    return model, lacking


def _read_whole(name: str | Path, dtype: Any) -> tuple[Any, set[str]]:
    if is_gguf(name):
        return read_gguf_weights(name, dtype)
    model, found = _auto_class(name).from_pretrained(name, dtype=dtype, output_loading_info=True)
    return model, set(found["missing_keys"])


def plain_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model that may be a GGUF file; transformers' own errors pass through."""
    return read_gguf_tokenizer(name) if is_gguf(name) else AutoTokenizer.from_pretrained(name)


def _auto_class(name: str | Path) -> Any:
    """What loads a model as the class that its files name.

    Of a multimodal model such as Qwen3.5 `AutoModelForCausalLM` gives the text part, whose class and weights have other
    names when it is saved, which engines do not load. (Of Gemma 3 it gives the whole.)
    """
    config = AutoConfig.from_pretrained(name)
    kind = config.model_type
    whole = kind in CAUSAL and MULTIMODAL.get(kind) in (config.architectures or ())
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def load_flagged(
    directory: str | Path, device: str | None = "auto", dtype: Any = "auto"
) -> tuple[HFBackend, Any, FlagSpec]:
    """A flagged model, ready to measure.

    Args:
        directory: What `redflag train` wrote.
        device: Where the model shall run; "auto" is the first GPU where there is one; None stays on the CPU.
        dtype: The weights' type; "auto" takes the saved one.

    Returns:
        Backend, tokenizer and flags.

    Raises:
        RedflagError: Something is missing or cannot be used, or the files do not belong together.
    """
    spec = FlagSpec.load(directory)
    model, tokenizer = read_model(directory, dtype)
    _check(directory, tokenizer, spec)
    if getattr(model, "_hf_peft_config_loaded", False) and model.dtype == torch.float32:
        # Half of the time of a step otherwise; in 16 bits the weights would lose a part of what was learnt.
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
    return HFBackend(to_device(model, device), tokenizer, spec), tokenizer, spec


def to_device(model: Any, device: str | None) -> Any:
    """The model on a device; "auto" is the first GPU where there is one, None leaves it where it is.

    Raises:
        RedflagError: It cannot run there.
    """
    if device == "auto":
        device = inference_device()
    if device is None:
        return model
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:  # PyTorch without CUDA answers with an assertion.
        reason = str(error).strip().partition("\n")[0]
        raise RedflagError(
            f"the model cannot run on device {device!r} ({reason}): give cpu, or a device that this machine has"
        ) from error


def load_tokenizer(directory: str | Path) -> tuple[Any, FlagSpec, frozenset[int]]:
    """What a flagged model's folder says without its weights: for a model that another process serves.

    Returns:
        Tokenizer, flags, and the ids that end a response.

    Raises:
        RedflagError: Something is missing or cannot be used, or the files do not belong together.
    """
    spec = FlagSpec.load(directory)
    tokenizer, eos_ids = read_tokenizer(directory)
    _check(directory, tokenizer, spec)
    return tokenizer, spec, eos_ids - frozenset(spec.ids)


def read_tokenizer(directory: str | Path) -> tuple[Any, frozenset[int]]:
    """The tokenizer of any model's folder, and the ids that end a response.

    Raises:
        RedflagError: They do not load.
    """
    try:
        tokenizer = plain_tokenizer(directory)
        configuration = read_gguf_config(directory) if is_gguf(directory) else AutoConfig.from_pretrained(directory)
    except RedflagError:
        raise
    except Exception as error:  # As in `read_model`.
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RedflagError(
            f"{directory} does not load as a tokenizer with its model configuration ({reason}): give the folder of the "
            "model that the server runs, such as `redflag train` writes"
        ) from error
    try:
        generation: Any = None if is_gguf(directory) else GenerationConfig.from_pretrained(directory)
    except OSError:  # A model need not have one.
        generation = None
    return tokenizer, find_eos_ids(generation, configuration, configuration.get_text_config(), tokenizer)


def _check(directory: str | Path, tokenizer: Any, spec: FlagSpec) -> None:
    if spec.template_hash and spec.template_hash != template_hash(tokenizer):
        raise RedflagError(
            f"the prompt template in {directory} is not the one that its flags were trained with, so their "
            "probabilities would mean nothing: restore the tokenizer that `redflag train` saved, or train again"
        )
    check_template(tokenizer)
    for flag in spec.flags:
        if (known := tokenizer.convert_tokens_to_ids(flag.token)) != flag.id:
            raise RedflagError(
                f"the flag {flag.token!r} has id {flag.id} in {directory}/redflag.json and {known} in the tokenizer, "
                "so another token would be watched in its place: restore both from one training run"
            )
