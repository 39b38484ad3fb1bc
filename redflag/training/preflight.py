"""Checks before a training run for whatever would make it fail after its last step."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from redflag.backends.head import plain_model
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.prompt import template_hash
from redflag.weights.gguf import is_gguf

# Settings of `generation_config.json` without effect unless `num_beams`, `return_dict_in_generate` or `use_cache` is
# set; transformers saves no configuration that sets one for nothing.
_BEAMS = ("early_stopping", "length_penalty")
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_CACHE = ("cache_implementation", "cache_config")


def refuse_quantised(name: str) -> None:
    """Refuses a model with quantised weights: adapters cannot be merged into them, nor rows added.

    Weights of a GGUF file are dequantised when they are read, and pass.

    Raises:
        RedflagError: `config.json` names a quantisation.
    """
    if is_gguf(name):
        return
    try:
        described, _ = PreTrainedConfig.get_config_dict(name)
    except Exception:  # `read_model` reports it, with a better message.
        return
    # Older files of compressed-tensors call it `compression_config`.
    quantised = described.get("quantization_config") or described.get("compression_config")
    if not quantised:
        return
    method = quantised.get("quant_method", "quantised")
    if method == "mxfp4":
        raise RedflagError(
            f"{name} must not hold its experts as MXFP4 numbers, which can be neither trained nor saved. Write a "
            "bfloat16 copy first, as recipes/models/gpt_oss_base.py does."
        )
    raise RedflagError(
        f"{name} must hold its weights as 16-bit or 32-bit numbers (got quant_method {method!r}). An adapter cannot be "
        "merged into quantised weights, and training one on them (--merge false) is not supported. Train the model "
        "before quantisation, and quantise the result."
    )


def refuse_part(name: str, model: Any) -> None:
    """Refuses a multimodal model of which only the text part was loaded: its saved weights would have other names.

    Raises:
        RedflagError: `config.json` names another kind of model than was loaded.
    """
    if is_gguf(name):
        return
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception:  # An adapter's folder has none.
        return
    if config.model_type != model.config.model_type:
        named = ", ".join(config.architectures or ()) or config.model_type
        raise RedflagError(
            f"{name} must load as what its config.json names, {named} (got its text part, {type(model).__name__}). "
            "Engines would look for the weights under other names than they are saved. Save the text part as a model "
            "of its own first, with AutoModelForCausalLM, and check that your engine serves it."
        )


def repair_generation(model: Any) -> list[str]:
    """Removes contradictions from a model's `generation_config.json`, with which transformers would refuse to save it.

    Engines sample as before: vLLM and SGLang follow its temperature whatever `do_sample` says. Settings without effect
    are dropped.

    Returns:
        A line for each setting that was changed.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None or _is_sound(generation):
        return []
    changes: dict[str, Any] = {}
    if generation.pad_token_id is not None and generation.pad_token_id < 0:
        changes["pad_token_id"] = None
    for is_idle, names in (
        (generation.num_beams in (None, 1), _BEAMS),
        (generation.return_dict_in_generate is not True, _OUTPUTS),
        (generation.use_cache is False, _CACHE),
    ):
        changes |= {key: None for key in names if is_idle and getattr(generation, key, None)}
    before = {key: getattr(generation, key) for key in changes}
    _set(generation, changes)
    if generation.do_sample is not True and not _is_sound(generation):
        # Engines take a temperature of 0 for greedy decoding; transformers rejects it.
        greedy = {"temperature": None, "top_k": 1} if generation.temperature == 0 else {}
        sampled = {**greedy, "do_sample": True}
        before |= {key: getattr(generation, key) for key in sampled}
        _set(generation, sampled)
    return [f"generation_config.json: {key} {old!r} -> {getattr(generation, key)!r}" for key, old in before.items()]


def try_saving(model: Any, tokenizer: Any, spec: FlagSpec, output: Path, merge: bool) -> None:
    """Saves everything but the weights to a temporary folder and reads it back.

    The folder is created if missing. `merge`: the whole model will be saved, not the adapter alone.

    Raises:
        RedflagError: The result could not be saved, or would not load.
    """
    whole = merge or not hasattr(model, "peft_config")
    weights = [p for p in model.parameters() if whole or p.requires_grad]
    try:
        output.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(output).free, sum(p.numel() * p.element_size() for p in weights)
        if free < needed:
            raise RedflagError(
                f"{output} must have room for the result, {needed / 1e9:.1f} GB (got {free / 1e9:.1f} GB free). Free "
                "space, or choose another output_dir"
            )
        with tempfile.TemporaryDirectory(dir=output, prefix=".trying-") as folder:
            if whole:
                plain = plain_model(model)
                plain.config.save_pretrained(folder)
                if plain.can_generate():
                    plain.generation_config.validate(strict=True)
                    plain.generation_config.save_pretrained(folder)
                AutoConfig.from_pretrained(folder)
            else:
                model.peft_config[model.active_adapter].save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            again = AutoTokenizer.from_pretrained(folder)
            ids = tuple(again.convert_tokens_to_ids([flag.token for flag in spec.flags]))
            if (template_hash(again), ids) != (spec.template_hash, spec.ids):
                raise ValueError("the tokenizer that was read back has another chat template or other flag ids")
    except RedflagError:
        raise
    except Exception as error:  # The libraries raise a dozen types here; each would end the run at its last step.
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RedflagError(
            f"the trained model could not be saved in {output}, or would not load from it ({reason}). Nothing was "
            "trained yet. Correct the base model's files that this names."
        ) from error


def try_evaluation(trainer: Any, examples: Any) -> None:
    """Evaluates two rows, as at the end of the run; skipped for a model that is sharded over processes."""
    if not len(examples) or trainer.args.world_size > 1 or trainer.is_fsdp_enabled:
        return
    model = trainer.model
    was_training = model.training
    model.eval()
    batch = trainer.data_collator([examples[i] for i in range(min(2, len(examples)))])
    trainer.prediction_step(model, batch, prediction_loss_only=True)
    model.train(was_training)


def _set(generation: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        setattr(generation, key, value)


def _is_sound(generation: Any) -> bool:
    """Whether transformers would save it. The trainer changes it, and a changed one must be free of contradictions."""
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True
