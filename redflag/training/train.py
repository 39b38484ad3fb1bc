"""`redflag train`: rows and a model in, a flagged model out."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import random
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from redflag.backends.load import read_model
from redflag.bounds import check_bounds
from redflag.data.options import RowOptions
from redflag.data.rows import Row, Rows, load_rows
from redflag.data.summary import label_table, warnings_about
from redflag.errors import RedflagError
from redflag.files import require_writable
from redflag.flags import FlagSpec, attach
from redflag.models.named import model_folder
from redflag.progress import Progress, on_terminal
from redflag.prompt import check_template, template_hash
from redflag.training.adapter import lora_config
from redflag.training.encode import build_dataset
from redflag.training.preflight import refuse_part, refuse_quantised, repair_generation, try_evaluation, try_saving
from redflag.training.resume_order import EpochOrder
from redflag.training.saving import last_checkpoint, save
from redflag.training.sharded import whole_model
from redflag.training.start import STARTS, fit_flag_rows, may_fit
from redflag.training.trainer import RedFlagConfig, RedFlagTrainer
from redflag.versions import versions
from redflag.weights.precision import DTYPES, Machine, choose_precision

VERSIONS = ("redflag-llm", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers")


@dataclass
class TrainArguments(RowOptions):
    """Model, rows and adapter; the loss and the optimizer are in `RedFlagConfig`."""

    model: str = field(metadata={"help": "Model to flag: folder, hub name or GGUF file."})
    input: str = field(metadata={"help": "Training rows: JSONL, JSON, CSV, Parquet, a folder, or a hub data set."})
    eval_input: str | None = field(default=None, metadata={"help": "Held-out rows; default: a share of the input."})
    eval_share: float = field(
        default=0.1,
        metadata={"help": "Share of the input's groups held out without eval_input.", "least": 0, "below": 1},
    )
    categories: list[str] = field(default_factory=lambda: ["harm"], metadata={"help": "One flag for each."})
    on_bad_row: str = field(default="stop", metadata={"help": "stop or skip (bad rows are counted and named)."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Use at most this many training rows, drawn by seed.", "least": 1}
    )
    harmless_per_harmful: float | None = field(
        default=None,
        metadata={"help": "Thin out the larger side to this ratio; default: rows as they are.", "above": 0},
    )
    full: bool = field(default=False, metadata={"help": "Train all weights against a frozen copy, without LoRA."})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank.", "least": 1})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA scale; default 2r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout.", "least": 0, "most": 1})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "As in PEFT; commas between names."})
    merge: bool = field(
        default=True, metadata={"help": "Save merged weights, which stock engines load; else the adapter."}
    )
    flag_start: str = field(
        default="fitted",
        metadata={
            "help": "Output rows of the flags before step 1: fitted (log-odds near -4 on harmless rows) or mean (of "
            "other rows; also where a flag stands in the text and the rows are embeddings too)."
        },
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


def train(model: str | Path, *, rows: str | Path, output_dir: str | Path, **options: Any) -> dict[str, Any]:
    """Trains a flagged model, as `redflag train` does.

    Args:
        model: Base model: folder, hub name or GGUF file.
        rows: Training rows: a file, a folder or a hub data set.
        output_dir: Folder of the flagged model.
        **options: Other options of the verb: fields of `TrainArguments` and `RedFlagConfig`.

    Returns:
        The contents of `train.json` in `output_dir`.

    Raises:
        RedflagError: Input or settings are invalid, or the result could not be written.

    Example:
        ```python
        train("Qwen/Qwen3-0.6B", rows="rows.jsonl", output_dir="flagged", num_train_epochs=2)
        ```
    """
    own = {item.name for item in dataclasses.fields(TrainArguments)} & set(options)
    arguments = TrainArguments(str(model), str(rows), **{name: options.pop(name) for name in own})
    return run(arguments, RedFlagConfig(output_dir=str(output_dir), **options))


def run(arguments: TrainArguments, config: RedFlagConfig) -> dict[str, Any]:
    """Trains, saves model + tokenizer + `redflag.json` + `train.json` in `config.output_dir`; returns `train.json`.

    Raises:
        RedflagError: Input or settings are invalid, or the result could not be written (checkpoints stay).
    """
    # 1. Everything that can be refused without reading rows or weights.
    output = Path(config.output_dir or "")
    _check_numbers(arguments, config)
    arguments = dataclasses.replace(arguments, model=model_folder(arguments.model, flagged=False))
    if output.resolve() == Path(arguments.model).resolve():
        raise RedflagError(f"output_dir must not be the base model's folder (got {output}). Choose another folder.")
    require_writable(output, "output_dir")
    checkpoint = last_checkpoint(output) if arguments.resume else None
    if not arguments.resume and last_checkpoint(output) is not None:
        raise RedflagError(
            f"output_dir must not hold checkpoints of an earlier run (got {output}). Add --resume to continue that "
            "run, or choose another folder."
        )
    # 2. Rows, the base model, and its flags. The template's hash binds thresholds to the prompts trained on.
    set_seed(config.seed)
    train_rows, eval_rows, sources = _rows(arguments, config.seed)
    model, tokenizer, saved = load_model(arguments.model, arguments.dtype, config.use_cpu)
    check_template(tokenizer)
    if arguments.attention:
        model.set_attn_implementation(arguments.attention)
    spec = attach(model, tokenizer, FlagSpec.of(*arguments.categories))
    spec = dataclasses.replace(spec, template_hash=template_hash(tokenizer))
    train_set = build_dataset(train_rows, tokenizer, spec, config.max_length, config.plain_share, config.seed)
    eval_set = build_dataset(eval_rows, tokenizer, spec, config.max_length)
    _check_classes(train_set)
    # 3. Initial rows of the flags, before PEFT wraps the model.
    if arguments.flag_start == "fitted" and may_fit(model, config.placement_config()):
        if config.world_size == 1:
            model.to(config.device)  # where the trainer would put it
        fit_flag_rows(model, spec, train_set)
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
    # On a terminal a bar takes the place of the trainer's lines; a log needs their figures, and no bar.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    shown = _ShowProgress()
    trainer.add_callback(shown)
    if not on_terminal():
        trainer.add_callback(PrinterCallback)
    # 4. Whatever would fail after hours is tried before the first step.
    try_saving(trainer.accelerator.unwrap_model(trainer.model), tokenizer, spec, output, arguments.merge)
    try_evaluation(trainer, eval_set)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except OSError as error:
        raise RedflagError(
            f"{output} could not be written ({error}). Training stopped. Free space and continue with --resume."
        ) from error
    finally:
        interrupt.restore()
        shown.close()
    if interrupt.caught:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; continue with --resume")
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
        "versions": versions(*VERSIONS),
        "python": platform.python_version(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
    }
    # 5. All processes take part in gathering the weights; the first one writes them.
    model = whole_model(trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator)
    if trainer.is_world_process_zero():
        result = save(model, tokenizer, spec, output, arguments.merge, result, saved)
    return result


def load_model(name: str, dtype: str = "auto", use_cpu: bool = False) -> tuple[Any, Any, torch.dtype]:
    """A causal language model to train, its tokenizer, and the type in which its weights will be saved."""
    machine = Machine.here()
    choose_precision(machine, dtype=dtype, use_cpu=use_cpu)  # refuses an unknown type before a long download
    refuse_quantised(name)
    model, tokenizer = read_model(name, DTYPES.get(dtype, "auto"))
    refuse_part(name, model)
    for line in repair_generation(model):
        print(line)
    precision = choose_precision(machine, model.dtype, dtype=dtype, use_cpu=use_cpu)
    return model.to(precision.weights), tokenizer, precision.saved


def _rows(arguments: TrainArguments, seed: int) -> tuple[list[Row], list[Row], dict[str, Any]]:
    """Training rows, held-out rows, and the hash and size of each source."""

    def read(source: str) -> Rows:
        loaded = load_rows(
            source,
            **arguments.row_options(),
            on_bad_row=arguments.on_bad_row,  # type: ignore[arg-type]
        )
        if int(os.environ.get("RANK", "0")) == 0:
            for bad in loaded.skipped[:20]:
                print(f"skipped {bad}")
            print("\n".join([f"{source}:", *label_table(loaded), *warnings_about(loaded)]))
        sources[source] = {"sha256": loaded.sha256, "rows": len(loaded), "skipped": len(loaded.skipped)}
        return loaded

    sources: dict[str, Any] = {}
    draw = random.Random(seed)
    rows = read(arguments.input).rows
    if arguments.eval_input:
        held_out = read(arguments.eval_input).rows
    else:
        groups = sorted({row.group or row.id or str(i) for i, row in enumerate(rows)})
        draw.shuffle(groups)
        held_out_groups = set(groups[: round(arguments.eval_share * len(groups))])
        held_out = [row for i, row in enumerate(rows) if (row.group or row.id or str(i)) in held_out_groups]
        rows = [row for i, row in enumerate(rows) if (row.group or row.id or str(i)) not in held_out_groups]
    if arguments.harmless_per_harmful is not None:
        ratio = arguments.harmless_per_harmful
        harmful, harmless = [r for r in rows if r.harmful], [r for r in rows if not r.harmful]
        harmless = draw.sample(harmless, min(len(harmless), round(ratio * len(harmful))))
        harmful = draw.sample(harmful, min(len(harmful), round(len(harmless) / ratio)))
        rows = harmful + harmless
        draw.shuffle(rows)
    if arguments.max_rows is not None and arguments.max_rows < len(rows):
        rows = draw.sample(rows, arguments.max_rows)
    return rows, held_out, sources


def _check_numbers(arguments: TrainArguments, config: RedFlagConfig) -> None:
    """Refuses numbers that would end in a traceback from torch or PEFT, minutes later."""
    check_bounds(arguments)
    if arguments.flag_start not in STARTS:
        raise RedflagError(f"flag_start must be one of {', '.join(STARTS)} (got {arguments.flag_start!r})")
    for name, least, most in (
        ("learning_rate", 0, math.inf),
        ("per_device_train_batch_size", 1, math.inf),
        ("per_device_eval_batch_size", 1, math.inf),
        ("gradient_accumulation_steps", 1, math.inf),
        ("seed", 0, 2**32 - 1),
    ):
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            limits = f"at least {least}" + (f" and at most {most}" if most < math.inf else "")
            raise RedflagError(f"{name} must be {limits} (got {value}).")


def _check_classes(examples: Dataset) -> None:
    harmful = sum(k > 0 for k in examples["flag_class"]) if len(examples) else 0
    if not harmful or harmful == len(examples):
        missing = "harmful" if not harmful else "harmless"
        raise RedflagError(
            f"the training rows must be harmful and harmless (got {len(examples)} rows, none of them {missing}). Add "
            "such rows, or check how labels are mapped."
        )


def _changed(config: RedFlagConfig) -> Mapping[str, Any]:
    """The settings that differ from the defaults, and all of redflag's own."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    own = {f.name for f in dataclasses.fields(RedFlagConfig) if f.name in RedFlagConfig.__annotations__}
    return {k: v for k, v in config.to_dict().items() if k in own or (k in defaults and v != defaults[k])}


class _ShowProgress(TrainerCallback):
    """How far training and evaluation are, with the newest loss."""

    def __init__(self) -> None:
        self.training: Progress | None = None
        self.evaluation: Progress | None = None
        self.batches = 0
        self.note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training = Progress("training", state.max_steps, "steps", begin=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training is not None:
            self.training(state.global_step, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.note = f"loss {float(logs['loss']):.4g}"

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            if self.evaluation is None:
                self.evaluation, self.batches = Progress("evaluating", len(eval_dataloader), "batches"), 0
            self.batches += 1
            self.evaluation(self.batches)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None
            if on_terminal() and "eval_loss" in (metrics or {}):
                print(f"held-out rows at step {state.global_step}: loss {metrics['eval_loss']:.4g}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bars away, however training ended."""
        for progress in (self.evaluation, self.training):
            if progress is not None:
                progress.close(finished=False)


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
            print("\nstopping after this step and saving a checkpoint (Ctrl-C again: stop at once)")

        try:
            self.before = signal.signal(signal.SIGINT, handle)
        except ValueError:  # not in the main thread
            self.before = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.caught:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Restores the previous signal handler, however training ended."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
