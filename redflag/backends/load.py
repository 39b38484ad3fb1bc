"""Loads a model from its folder; incomplete or mismatched files are refused."""

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
        RedflagError: They do not load, or the files lack weights (transformers would initialise them randomly).
    """
    try:
        tokenizer = plain_tokenizer(name)
        model, lacking = _read_weights(name, dtype)
    except RedflagError:
        raise
    except Exception as error:  # Damaged files raise a dozen types: JSON, safetensors, shapes, missing keys.
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RedflagError(
            f"{name} does not load as a model with its tokenizer ({reason}). Give the folder of a complete model, such "
            "as `redflag train` writes, a hub name, or a GGUF file of a kind that transformers reads."
        ) from error
    tied = model.get_output_embeddings() is not None and model.config.get_text_config().tie_word_embeddings
    # A tied head shares the flag rows of the embedding, so an adapter's file holds them only once.
    missing = sorted(key for key in lacking if not (tied and ".token_adapter." in key))
    if missing:
        raise RedflagError(
            f"{name} must hold all of the model's weights ({len(missing)} missing: {missing[0]}, ...). They would "
            "be random numbers. Restore the files or train again."
        )
    return model, tokenizer


def _read_weights(name: str | Path, dtype: Any) -> tuple[Any, set[str]]:
    """A model, and the names of the weights that its files lack."""
    config = Path(name) / "adapter_config.json"
    if not config.is_file():
        return _read_whole(name, dtype)
    model, lacking = read_base(name, dtype)
    # transformers also reports weights that a tied head does not need; the caller refuses those really missing.
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
    # The base has no rows for flags that were added behind its vocabulary; the adapter's rows need the space.
    trained = adapter.get("trainable_token_indices") or []
    ids = [i for part in (trained.values() if isinstance(trained, dict) else [trained]) for i in part]
    if ids and max(ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    return model, lacking


def _read_whole(name: str | Path, dtype: Any) -> tuple[Any, set[str]]:
    if is_gguf(name):
        return read_gguf_weights(name, dtype)
    model, loading_info = _auto_class(name).from_pretrained(name, dtype=dtype, output_loading_info=True)
    return model, set(loading_info["missing_keys"])


def plain_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model that may be a GGUF file; transformers' own errors pass through."""
    return read_gguf_tokenizer(name) if is_gguf(name) else AutoTokenizer.from_pretrained(name)


def _auto_class(name: str | Path) -> Any:
    """The auto class that loads a model as the class that its files name.

    For a multimodal model such as Qwen3.5 `AutoModelForCausalLM` returns the text part, whose class and weights are
    saved under other names, which engines do not load. (For Gemma 3 it returns the whole model.)
    """
    config = AutoConfig.from_pretrained(name)
    kind = config.model_type
    whole = kind in CAUSAL and MULTIMODAL.get(kind) in (config.architectures or ())
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def load_flagged(
    directory: str | Path, device: str | None = "auto", dtype: Any = "auto"
) -> tuple[HFBackend, Any, FlagSpec]:
    """Loads a flagged model, ready to measure.

    Args:
        directory: Folder written by `redflag train`.
        device: "auto" is the first GPU, if there is one; None is the CPU.
        dtype: The weights' type; "auto" takes the saved one.

    Returns:
        Backend, tokenizer and flags.

    Raises:
        RedflagError: Something is missing or cannot be used, or the files do not belong together.
    """
    # redflag.json first: it is written last, so a folder that has it is complete.
    spec = FlagSpec.load(directory)
    model, tokenizer = read_model(directory, dtype)
    _check(directory, tokenizer, spec)
    if getattr(model, "_hf_peft_config_loaded", False) and model.dtype == torch.float32:
        # A step with an unmerged adapter takes twice as long. In 16 bits merging would lose a part of what was learnt.
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
    return HFBackend(to_device(model, device), tokenizer, spec), tokenizer, spec


def to_device(model: Any, device: str | None) -> Any:
    """Moves the model to a device; "auto" is the first GPU, if there is one, None leaves it where it is.

    Raises:
        RedflagError: The device is unknown or unusable.
    """
    if device == "auto":
        device = inference_device()
    if device is None:
        return model
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:  # PyTorch without CUDA raises an AssertionError.
        reason = str(error).strip().partition("\n")[0]
        raise RedflagError(
            f"device must be one that this machine has (got {device!r}: {reason}). For example cpu."
        ) from error


def load_tokenizer(directory: str | Path) -> tuple[Any, FlagSpec, frozenset[int]]:
    """Loads everything of a flagged model but its weights: for a model that another process serves.

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
            f"{directory} does not load as a tokenizer with its model configuration ({reason}). Give the folder of the "
            "model that the server runs, such as `redflag train` writes."
        ) from error
    try:
        generation: Any = None if is_gguf(directory) else GenerationConfig.from_pretrained(directory)
    except OSError:  # The file is optional.
        generation = None
    return tokenizer, find_eos_ids(generation, configuration, configuration.get_text_config(), tokenizer)


def _check(directory: str | Path, tokenizer: Any, spec: FlagSpec) -> None:
    if spec.template_hash and spec.template_hash != template_hash(tokenizer):
        raise RedflagError(
            f"the prompt template in {directory} must be the one that its flags were trained with. Under another one "
            "their probabilities are meaningless. Restore the tokenizer that `redflag train` saved, or train again."
        )
    check_template(tokenizer)
    for flag in spec.flags:
        if (token_id := tokenizer.convert_tokens_to_ids(flag.token)) != flag.id:
            raise RedflagError(
                f"the id of the flag {flag.token!r} must be the same in {directory}/redflag.json and the tokenizer "
                f"(got {flag.id} and {token_id}). Restore both from one training run."
            )
