"""A training run's files: the flagged model's folder, and checkpoints to resume from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import cached_file

from redflag.errors import RedflagError
from redflag.flags import FILE, FlagSpec

# Weights and optimizer in a checkpoint: of whole models, and of FSDP2 in one file each or one file per process.
CHECKPOINTS = (
    ("*.safetensors", "optimizer.pt"),
    ("pytorch_model_fsdp.bin", "optimizer.bin"),
    ("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"),
)
# A folder without any of these does not load.
CONFIGURATIONS = ("config.json", "adapter_config.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Other files that a model is loaded from, as transformers and PEFT name them. An engine that finds shards or an adapter
# of an earlier run beside a model in one file loads them too.
LOADED = (
    *PROCESSORS,
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates",
)


def save(
    model: Any,
    tokenizer: Any,
    spec: FlagSpec,
    output: Path,
    merge: bool,
    result: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Writes everything to a temporary folder, then moves it into place; `redflag.json` comes last.

    `dtype` is the type in which a whole model's weights are saved; None leaves them as they are.

    Returns:
        `result` with its `run_id`.

    Raises:
        RedflagError: The files cannot be written.
    """
    # The run id is a hash of the options and the trained weights, so equal runs have equal ids.
    digest = hashlib.sha256(json.dumps(result["arguments"], sort_keys=True).encode())
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    spec = dataclasses.replace(spec, run_id=digest.hexdigest()[:16])
    result = {**result, "run_id": spec.run_id}
    if merge and hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if dtype is not None and not hasattr(model, "peft_type"):
        model = model.to(dtype)
    for adapter in getattr(model, "peft_config", {}).values():
        # `read_model` takes a GGUF file as an adapter's base; PEFT would look for it on the hub during training.
        adapter.base_model_name_or_path = adapter.base_model_name_or_path or result["arguments"].get("model")
    temporary = output / ".saving"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # The adapter holds the flags' rows already; PEFT would add the whole matrix if it was enlarged by them.
        model.save_pretrained(temporary, **({"save_embedding_layers": False} if hasattr(model, "peft_type") else {}))
        tokenizer.save_pretrained(temporary)
        if not hasattr(model, "peft_type"):
            copy_processors(model.config.name_or_path, temporary)
        (temporary / "train.json").write_text(json.dumps(result, indent=2, default=str), encoding="utf-8")
        # redflag.json last: a folder without it is not a flagged model.
        replace_model(temporary, output)
        spec.save(output)
    except (OSError, SafetensorError) as error:
        rest = (
            "There is no checkpoint: free space and train again."
            if last_checkpoint(output) is None
            else "Its checkpoints are there: free space and run again with --resume."
        )
        raise RedflagError(f"the model could not be written to {output} ({error}). {rest}") from error
    return result


def replace_model(new: Path, output: Path) -> None:
    """Replaces the files of an older model; nothing of it stays that would be loaded.

    A kill at any point leaves the older model, the new one, or a folder that does not load: the older model's
    configuration is removed first and the new one's arrives last.

    Args:
        new: Folder with the files, on the same file system; removed afterwards.
        output: The model's folder, which may hold other files (checkpoints, thresholds); `redflag.json` is for the
            caller to write.
    """
    for pattern in (FILE, *CONFIGURATIONS, *LOADED):
        for path in output.glob(pattern):
            _remove(path)
    for path in sorted(new.iterdir(), key=lambda path: (path.name in CONFIGURATIONS, path.name)):
        _remove(output / path.name)
        os.replace(path, output / path.name)
    new.rmdir()


def copy_processors(base: str, folder: Path) -> None:
    """Copies a multimodal base's image processor files, without which engines do not start it, even for text."""
    for name in PROCESSORS if base else ():
        try:
            path = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):  # The base cannot be reached any more; the trained model is worth saving anyway.
            continue
        if path is not None:
            shutil.copyfile(path, folder / name)


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = []
    for path in output.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if (path / "scheduler.pt").stat().st_size and any(_holds(path, *files) for files in CHECKPOINTS):
                complete.append((int(path.name.rpartition("-")[2]), path))
        except (OSError, ValueError):
            continue
    return max(complete)[1] if complete else None


def _holds(path: Path, *patterns: str) -> bool:
    return all(any(file.stat().st_size for file in path.glob(pattern)) for pattern in patterns)


def _remove(path: Path) -> None:
    """Removes a file or a folder if it exists: renaming a folder does not overwrite another folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class EpochOrder(TrainerCallback, ExportableState):
    """Saves the state of PyTorch's generator at the start of the epoch in each checkpoint's `trainer_state.json`.

    transformers' length-grouped sampler draws its order from the global generator when an epoch begins. A resumed run
    restores that generator only after skipping the rows already seen, and would therefore skip other rows.
    """

    def __init__(self) -> None:
        self._begin: torch.Tensor | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the checkpoint's state, once."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if self._begin is None and saved:
            # A run resumed from a checkpoint at the end of an epoch starts with the next epoch.
            within = state.epoch is not None and state.epoch % 1 != 0
            generator_state = saved["begin" if within else "now"]
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(generator_state), dtype=torch.uint8))
        self._begin = torch.get_rng_state()

    def state(self) -> dict[str, Any]:
        """State for the checkpoint."""
        begin = torch.get_rng_state() if self._begin is None else self._begin
        return {"begin": begin.numpy().tobytes().hex(), "now": torch.get_rng_state().numpy().tobytes().hex()}
