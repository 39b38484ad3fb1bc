"""`redflag train`: rows and a model in, a flagged model out."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, TrainerCallback, set_seed

from redflag.backends.load import read_model
from redflag.backends.precision import DTYPES, Machine, choose_precision
from redflag.corpus.rows import Row, Rows, load_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec, attach
from redflag.prompt import template_hash
from redflag.training.adapter import lora_config
from redflag.training.encode import build_dataset
from redflag.training.order import EpochOrder
from redflag.training.sharded import whole_model
from redflag.training.trainer import RedFlagConfig, RedFlagTrainer

# Weights and optimizer in a checkpoint: of whole models, and of FSDP2 in one file each or a part for every process.
CHECKPOINTS = (
    ("*.safetensors", "optimizer.pt"),
    ("pytorch_model_fsdp.bin", "optimizer.bin"),
    ("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"),
)
VERSIONS = ("redflag-llm", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers")


@dataclass
class TrainArguments:
    """What is trained on what; how is in `RedFlagConfig`."""

    model: str = field(metadata={"help": "Model to flag: folder or hub name."})
    input: str = field(metadata={"help": "Training rows: JSONL (.gz), parquet, a folder, or a hub data set."})
    eval_input: str | None = field(default=None, metadata={"help": "Held-out rows; default: a share of the input."})
    eval_share: float = field(
        default=0.1, metadata={"help": "Share of the input's groups held out without eval_input."}
    )
    categories: list[str] = field(default_factory=lambda: ["harm"], metadata={"help": "One flag for each."})
    columns: dict[str, str] | None = field(default=None, metadata={"help": "Our column -> the data set's column."})
    labels: dict[str, str | None] | None = field(
        default=None, metadata={"help": "Label -> category, or null = harmless."}
    )
    on_bad_row: str = field(default="stop", metadata={"help": "stop or skip (bad rows are counted and named)."})
    max_rows: int | None = field(default=None, metadata={"help": "Use at most this many training rows, drawn by seed."})
    harmless_per_harmful: float | None = field(
        default=None, metadata={"help": "Thin out the larger side to this ratio; default: rows as they are."}
    )
    full: bool = field(default=False, metadata={"help": "Train all weights against a frozen copy, without LoRA."})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA scale; default 2r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "As in PEFT; commas between names."})
    merge: bool = field(
        default=True, metadata={"help": "Save merged weights, which stock engines load; else the adapter."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Type to train and save the weights in; auto saves the type that the base has."},
    )
    attention: str | None = field(
        default=None, metadata={"help": "Attention of the model, such as eager; default: as transformers chooses."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint in output_dir."})


ARGUMENTS = (TrainArguments, RedFlagConfig)
POSITIONAL = None


def run(arguments: TrainArguments, config: RedFlagConfig) -> dict[str, Any]:
    """Trains, saves model + tokenizer + `redflag.json` + `train.json` in `config.output_dir`; returns `train.json`.

    Raises:
        RedflagError: Input or settings are wrong, or the result could not be written (checkpoints stay).
    """
    output = Path(config.output_dir or "")
    _check_numbers(arguments, config)
    if output.resolve() == Path(arguments.model).resolve():
        raise RedflagError(f"output_dir {output} is the model's own folder, which would be lost: choose another one")
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "may not be written to" if existing.is_dir() else "is a file"
        raise RedflagError(f"the folder {output} cannot be made, as {existing} {why}: choose another output_dir")
    checkpoint = last_checkpoint(output) if arguments.resume else None
    if not arguments.resume and last_checkpoint(output) is not None:
        raise RedflagError(
            f"{output} holds checkpoints of an earlier run, which a new run would mix with: add --resume to go on, or "
            "choose another --output_dir"
        )
    set_seed(config.seed)
    train_rows, eval_rows, sources = _rows(arguments, config.seed)
    model, tokenizer, saved = load_model(arguments.model, arguments.dtype, config.use_cpu)
    if arguments.attention:
        model.set_attn_implementation(arguments.attention)
    spec = attach(model, tokenizer, FlagSpec.of(*arguments.categories))
    spec = dataclasses.replace(spec, template_hash=template_hash(tokenizer))
    train_set = build_dataset(train_rows, tokenizer, spec, config.max_length, config.plain_share, config.seed)
    eval_set = build_dataset(eval_rows, tokenizer, spec, config.max_length)
    _check_classes(train_set)
    targets: Any = arguments.lora_target_modules
    peft_config = None
    if not arguments.full:
        targets = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
        peft_config = lora_config(model, spec, arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout, targets)
    interrupt = _StopAtInterrupt()
    trainer = RedFlagTrainer(
        model,
        config,
        spec,
        train_set,
        eval_set if len(eval_set) else None,
        tokenizer,
        peft_config,
        callbacks=[interrupt, EpochOrder()],
    )
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except OSError as error:
        raise RedflagError(
            f"{output} could not be written ({error}), training stopped: free space there and go on with --resume"
        ) from error
    finally:
        interrupt.restore()
    if interrupt.caught:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; go on with --resume")
    metrics = trainer.evaluate() if len(eval_set) else {}
    result = {
        "run_id": "",
        "arguments": dataclasses.asdict(arguments),
        "config": _changed(config),
        "data": sources,
        "rows": {"train": len(train_set), "eval": len(eval_set)},
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "metrics": metrics,
        "losses": [log for log in trainer.state.log_history if "loss" in log],
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
    }
    model = whole_model(trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator)
    if trainer.is_world_process_zero():
        result = save(model, tokenizer, spec, output, arguments.merge, result, saved)
    return result


def load_model(name: str, dtype: str = "auto", use_cpu: bool = False) -> tuple[Any, Any, torch.dtype]:
    """A causal language model to train, its tokenizer, and the type that its weights are saved in."""
    machine = Machine.here()
    choose_precision(machine, dtype=dtype, use_cpu=use_cpu)  # refuses an unknown type before a long download
    try:
        described, _ = PreTrainedConfig.get_config_dict(name)
    except Exception:  # `read_model` says what is wrong with it.
        described = {}
    if (described.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        raise RedflagError(
            f"{name} holds its experts as MXFP4 numbers, which cannot be trained, nor saved again: write a bfloat16 "
            "copy first, as recipes/gpt-oss-20b-redflag/base.py does"
        )
    model, tokenizer = read_model(name, DTYPES.get(dtype, "auto"))
    precision = choose_precision(machine, model.dtype, dtype=dtype, use_cpu=use_cpu)
    return model.to(precision.weights), tokenizer, precision.saved


def save(
    model: Any,
    tokenizer: Any,
    spec: FlagSpec,
    output: Path,
    merge: bool,
    result: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Writes everything beside its final name, then renames; `redflag.json` comes last and makes the folder a model."""
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
    temporary = output / ".saving"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # The flags' rows are in the adapter by themselves: PEFT would add the whole matrix where it has grown by them.
        model.save_pretrained(temporary, **({"save_embedding_layers": False} if hasattr(model, "peft_type") else {}))
        tokenizer.save_pretrained(temporary)
        (temporary / "train.json").write_text(json.dumps(result, indent=2, default=str), encoding="utf-8")
        for path in sorted(temporary.iterdir()):
            os.replace(path, output / path.name)
        temporary.rmdir()
        spec.save(output)
    except OSError as error:
        raise RedflagError(
            f"the model could not be written to {output} ({error}), its checkpoints are there: free space and run "
            "again with --resume"
        ) from error
    return result


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end; one that a kill cut short does not count."""
    found = []
    for path in output.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if (path / "scheduler.pt").stat().st_size and any(_holds(path, *files) for files in CHECKPOINTS):
                found.append((int(path.name.rpartition("-")[2]), path))
        except (OSError, ValueError):
            continue
    return max(found)[1] if found else None


def _holds(path: Path, *patterns: str) -> bool:
    return all(any(file.stat().st_size for file in path.glob(pattern)) for pattern in patterns)


def _rows(arguments: TrainArguments, seed: int) -> tuple[list[Row], list[Row], dict[str, Any]]:
    """Training and held-out rows, and what they came from."""

    def read(source: str) -> Rows:
        found = load_rows(
            source,
            columns=arguments.columns,
            labels=arguments.labels,
            on_bad_row=arguments.on_bad_row,  # type: ignore[arg-type]
        )
        for bad in found.skipped[:20]:
            print(f"skipped {bad}")
        sources[source] = {"sha256": found.sha256, "rows": len(found), "skipped": len(found.skipped)}
        return found

    sources: dict[str, Any] = {}
    draw = random.Random(seed)
    rows = read(arguments.input).rows
    if arguments.eval_input:
        held_out = read(arguments.eval_input).rows
    else:
        if not 0 <= arguments.eval_share < 1:
            raise RedflagError(f"eval_share is {arguments.eval_share}: it is a share of the rows, from 0 to below 1")
        groups = sorted({row.group or row.id or str(i) for i, row in enumerate(rows)})
        draw.shuffle(groups)
        chosen = set(groups[: round(arguments.eval_share * len(groups))])
        held_out = [row for i, row in enumerate(rows) if (row.group or row.id or str(i)) in chosen]
        rows = [row for i, row in enumerate(rows) if (row.group or row.id or str(i)) not in chosen]
    if arguments.harmless_per_harmful is not None:
        ratio = arguments.harmless_per_harmful
        if ratio <= 0:
            raise RedflagError(f"harmless_per_harmful is {ratio}: it is a ratio above 0")
        harmful, harmless = [r for r in rows if r.harmful], [r for r in rows if not r.harmful]
        harmless = draw.sample(harmless, min(len(harmless), round(ratio * len(harmful))))
        harmful = draw.sample(harmful, min(len(harmful), round(len(harmless) / ratio)))
        rows = harmful + harmless
        draw.shuffle(rows)
    if arguments.max_rows is not None and arguments.max_rows < len(rows):
        rows = draw.sample(rows, arguments.max_rows)
    return rows, held_out, sources


def _check_numbers(arguments: TrainArguments, config: RedFlagConfig) -> None:
    """Refuses at once what would come up as a traceback from somewhere in torch or peft, minutes later."""
    for owner, name, least, most in (
        (arguments, "lora_r", 1, math.inf),
        (arguments, "lora_dropout", 0, 1),
        (arguments, "max_rows", 1, math.inf),
        (config, "learning_rate", 0, math.inf),
        (config, "per_device_train_batch_size", 1, math.inf),
        (config, "per_device_eval_batch_size", 1, math.inf),
        (config, "gradient_accumulation_steps", 1, math.inf),
        (config, "seed", 0, 2**32 - 1),
    ):
        value = getattr(owner, name)
        if value is not None and not least <= value <= most:
            limits = f"from {least} to {most}" if most < math.inf else f"of {least} or more"
            raise RedflagError(f"{name} is {value}, with which nothing can be trained: give a number {limits}")


def _check_classes(examples: Dataset) -> None:
    harmful = sum(k > 0 for k in examples["flag_class"]) if len(examples) else 0
    if not harmful or harmful == len(examples):
        missing = "harmful" if not harmful else "harmless"
        raise RedflagError(
            f"none of the {len(examples)} training rows is {missing}, so there is nothing to tell apart: add such "
            "rows, or check how labels are mapped"
        )


def _changed(config: RedFlagConfig) -> Mapping[str, Any]:
    """The settings that differ from the defaults, and those of redflag in any case."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    own = {f.name for f in dataclasses.fields(RedFlagConfig) if f.name in RedFlagConfig.__annotations__}
    return {k: v for k, v in config.to_dict().items() if k in own or (k in defaults and v != defaults[k])}


class _StopAtInterrupt(TrainerCallback):
    """Ctrl-C ends the step, writes a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.caught = False
        self.before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def handle(*_: Any) -> None:
            if self.caught:
                raise KeyboardInterrupt
            self.caught = True
            print("\nstopping after this step; a checkpoint is written (again Ctrl-C: at once)")

        try:
            self.before = signal.signal(signal.SIGINT, handle)
        except ValueError:  # not in the main thread
            self.before = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.caught:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Puts the handler back that was there before, however training ended."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
