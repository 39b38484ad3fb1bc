"""RedFlagTrainer: TRL's SFTTrainer with another loss.

It overrides SFTTrainer at few points: the collator (flags are placed when a batch is made), `_get_num_items_in_batch`
(a vector of counts instead of one number), `compute_loss` (flag term + keep term), `evaluate` (AUROC and exact means).
The model's own forward is called unchanged, so wrappers (DDP, activation checkpointing) stay in effect; the last hidden
states are captured during it, and `redflag.training.loss` applies the head in chunks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from redflag.bounds import option
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.kept_states import KeptStates
from redflag.stats.metrics import auroc
from redflag.training import sharded
from redflag.training.adapter import adapters_off, cheap_flag_rows, output_head
from redflag.training.batch import BatchState, Counts, JudgedPositions, flag_weights, keep_weights, response_weights
from redflag.training.consistency import GroupSampler
from redflag.training.encode import IGNORE, Collator, Example, PlacementConfig
from redflag.training.hidden_states import check_head, last_hidden
from redflag.training.loss import Positions, flag_and_keep_loss
from redflag.training.metric_means import Means, rows_that_count
from redflag.training.presto import watched_attention
from redflag.training.reference import reference_states
from redflag.training.terms import TermsConfig, check_terms_fit, optional_terms
from redflag.weights.memory import KeepMemory
from redflag.weights.precision import Machine, choose_precision


@dataclass
class RedFlagConfig(TermsConfig, SFTConfig):
    """SFTConfig plus the loss and the placement. Defaults that differ are redefined here."""

    output_dir: str | None = option(None, "Folder for the model and everything about it.")
    learning_rate: float = option(1e-3, "Peak learning rate (LoRA).")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule.")
    warmup_steps: float = option(0.05, "Warm-up steps, or a share of all steps if below 1.")
    num_train_epochs: float = option(1.0, "Passes over the rows.")
    max_length: int | None = option(1024, "Most tokens per row; the prompt's oldest turns go first.")
    bf16: bool | None = option(None, "bfloat16 autocast; default: where the hardware has it.")
    use_cpu: bool = option(False, "Train on the CPU even where there is a GPU.")
    gradient_checkpointing: bool | None = option(None, "Old name of activation_checkpointing.")
    remove_unused_columns: bool = option(False, "Must stay false: the collator needs them all.")
    placement: str = option("dense", "first, open, insert, until or dense.")
    minimum_offset: int = option(0, "insert, until: first response position that may be drawn.")
    insertions: int = option(1, "insert, until: flags per harmful response.")
    soft_margin: int = option(0, "Tokens before a known onset that are not judged.")
    in_context: float = option(
        0.0, "first, open, dense: share of rows with a flag to read past, for models that reflect."
    )
    flag_coef: float = option(1.0, "Weight of the flag term.")
    keep_coef: float = option(8.0, "Weight of the keep term, KL(reference || trained).")
    peak_coef: float = option(
        0.0,
        "Weight of the flag term taken by response: in each, the positions with the highest log-odds of a "
        "flag weigh most, and each response weighs the same.",
    )
    peak_window: int = option(16, "peak_coef: log-odds are first averaged over so many positions.")
    peak_temperature: float = option(
        1.0, "peak_coef: inf = all positions of a response weigh the same, near 0 = its peak."
    )
    reference_cache: str | None = option(
        None, "Folder that caches the reference's hidden states (float16) over passes and runs."
    )
    harmful_weight: float = option(
        0.5, "Share of harmful positions in the flag term; harmless positions have the rest."
    )

    def __post_init__(self) -> None:
        if not self.output_dir:  # transformers would choose a folder of its own
            raise RedflagError(
                "output_dir must be a folder for the model (got none). For example --output-dir runs/mine."
            )
        precision = choose_precision(Machine.here(), bf16=self.bf16, fp16=self.fp16, use_cpu=self.use_cpu)
        # One place decides on precision; the result goes into the fields that transformers reads.
        self.bf16 = precision.autocast
        # transformers expects a GPU for bfloat16 unless `use_cpu` is set.
        self.use_cpu = self.use_cpu or (precision.autocast and precision.device == "cpu")
        sharded.refuse_deepspeed(self)
        super().__post_init__()
        for name in ("flag_coef", "keep_coef", "peak_coef"):
            if not getattr(self, name) >= 0:
                raise RedflagError(f"{name} must be at least 0 (got {getattr(self, name)}).")
        if self.peak_window < 1:
            raise RedflagError(f"peak_window must be at least 1 (got {self.peak_window}).")
        if not self.peak_temperature > 0:
            raise RedflagError(f"peak_temperature must be above 0 (got {self.peak_temperature}).")
        if not 0 <= self.harmful_weight <= 1:
            raise RedflagError(f"harmful_weight must be at least 0 and at most 1 (got {self.harmful_weight}).")
        if self.packing or self.padding_free or self.remove_unused_columns:
            raise RedflagError(
                "packing, padding_free and remove_unused_columns must be off. They would drop the flag labels."
            )
        self.check_terms()
        self.placement_config()

    def placement_config(self) -> PlacementConfig:
        """The fields that say where flags stand."""
        return PlacementConfig(**{item.name: getattr(self, item.name) for item in fields(PlacementConfig)})


class RedFlagTrainer(SFTTrainer):
    """Teaches a model its flags and pins its language to the reference.

    Args:
        model: Causal language model with flags attached (`redflag.flags.attach`).
        train_dataset: Encoded rows (`redflag.training.encode.encode`), as `eval_dataset`.
        processing_class: The tokenizer with the flags.
        peft_config: `redflag.training.adapter.lora_config(...)`; None trains all weights, against a frozen copy.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "redflag"]

    def __init__(
        self,
        model: PreTrainedModel,
        args: RedFlagConfig,
        spec: FlagSpec,
        train_dataset: Sequence[Example] | Dataset,
        eval_dataset: Sequence[Example] | Dataset | None = None,
        processing_class: PreTrainedTokenizerFast | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        assert processing_class is not None, "processing_class is the tokenizer with the flags attached"
        self.spec = spec
        self._frozen = None
        if peft_config is None and not hasattr(model, "peft_config"):
            self._frozen = copy.deepcopy(model).eval().requires_grad_(False)
        self._cached_states = None
        if args.reference_cache:
            self._cached_states = KeptStates(args.reference_cache, model, "bfloat16" if args.bf16 else str(model.dtype))
        pad = processing_class.pad_token_id
        answers = args.answers if args.answer_coef else None
        collator = Collator(args.placement_config(), spec, 0 if pad is None else pad, args.seed, answers=answers)
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__init__(
            model=model,
            args=args,
            train_dataset=_as_dataset(train_dataset),
            eval_dataset=None if eval_dataset is None else _as_dataset(eval_dataset),
            processing_class=processing_class,
            data_collator=collator,
            peft_config=peft_config,
            **kwargs,
        )
        sharded.check_plugin(self.accelerator, args.save_strategy != "no", self._frozen is None)
        cheap_flag_rows(self.model)
        self.add_callback(_EpochOfCollator(collator))
        self.add_callback(KeepMemory())
        # The loss is normalised here over the whole accumulated batch, so the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self._flag_ids = torch.tensor(spec.ids)
        self._eval_rows: list[tuple[float, bool]] = []
        self._means = {"train": Means(), "eval": Means()}
        if self._frozen is not None:
            self._frozen = sharded.place_reference(self._frozen, self.accelerator)
        check_head(self.accelerator.unwrap_model(self.model), spec)
        check_terms_fit(args, self.accelerator.unwrap_model(self.model), self.train_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """With the consistency term, batches hold whole groups."""
        if self.args.consistency_coef:
            groups = list((self.train_dataset if train_dataset is None else train_dataset)["group"])
            return GroupSampler(groups, self.args.per_device_train_batch_size * max(1, self.args.n_gpu), self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """`Counts` of the whole accumulated batch, over all processes, as a tensor."""
        if not batch_samples:
            return None
        at = self.args.consistency_at
        counts = torch.stack([Counts.of(batch, at).to_tensor() for batch in batch_samples]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with sharded.tied_matrix_seen(self.model):
            return super()._prepare_for_training(*args, **kwargs)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass, with a sharded head gathered for all of it."""
        with sharded.head_stays_whole(model):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Flag term + keep term, each over its own number of positions, and the optional terms."""
        training = self.model.training
        device = inputs["labels"].device
        flag_ids = self._flag_ids.to(device)

        # Denominators: in training, the counts of the whole accumulated batch, so that a position weighs the same
        # in every micro-batch and process. An evaluation batch uses its own (`_record` computes exact means).
        numbers = num_items_in_batch if training else None
        if numbers is None:
            numbers = Counts.of(inputs, self.args.consistency_at).to_tensor()
        counts = Counts.from_tensor(numbers.to(device))

        # The judged positions, and the hidden states one column earlier that judge them. The reference goes first and
        # keeps only the N states, so that the (B, T, H) states of two models are never in memory together.
        judged = JudgedPositions.of(inputs)
        row, before = judged.row, judged.column - 1
        with self._reference(model) as reference:
            reference_head = output_head(self.accelerator.unwrap_model(reference), self.spec)
            reference_NH = reference_states(
                reference, reference_head, inputs, judged, self._cached_states, self.accelerator
            )
        with watched_attention(model, training and self.args.presto_coef > 0) as attentions:
            hidden = last_hidden(model, inputs["input_ids"], inputs["attention_mask"])
        head = output_head(self.accelerator.unwrap_model(model), self.spec)

        # Weights: the coefficients over the counts, so that the sums below are means.
        flag_weights_N, forecast_N = flag_weights(self.args, inputs, judged, counts)
        if self.args.peak_coef and training:
            by_response_N = response_weights(self.args, hidden[row, before].detach(), head, flag_ids, judged, counts)
            flag_weights_N = flag_weights_N + self.args.peak_coef * by_response_N
        flag_weights_N = torch.where(judged.flag_labels != IGNORE, flag_weights_N, 0.0)

        # Flag and keep term. An inserted flag is not language, so no likelihood is reported for it.
        loss, figures = flag_and_keep_loss(
            hidden[row, before],
            reference_NH,
            head,
            reference_head,
            flag_ids,
            judged.flag_labels,
            judged.labels.masked_fill(inputs["inserted"][row, judged.column], IGNORE),
            flag_weights_N,
            keep_weights(self.args, inputs, judged, counts),
            forecast_N,
        )
        self._record(figures, judged, inputs["flag_class"], "train" if training else "eval")
        if not training:
            return (loss, {}) if return_outputs else loss

        # Optional terms. Each is this batch's part of a mean over all batches and processes. `Means` averages what it
        # is given, so for the log the part is multiplied by the number of batches and processes.
        state = BatchState(
            model, inputs, hidden, reference_NH, judged, head, reference_head, flag_ids, attentions, counts
        )
        for name, value in optional_terms(self.args, state).items():
            loss = loss + getattr(self.args, f"{name}_coef") * value
            share = self.args.gradient_accumulation_steps * self.accelerator.num_processes
            self._means["train"].add(name, value.detach() * share)

        # What SFTTrainer's own `compute_loss` would do: count tokens, and undo DDP's mean of gradients over processes
        # where the counts are already those of all processes.
        tokens = self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
        self._total_train_tokens += tokens // self.get_tp_size()
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the terms since the last time, over the positions of all processes."""
        if self.model.training:
            means = self._means["train"].take(self.accelerator)
            self._metrics["train"].update({name: [mean] for name, mean in means.items() if not math.isnan(mean)})
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Adds exact means over all positions, and the AUROC of the response peak of p(any flag).

        `in_context` is off: no flag is in the text before an alarm.
        """
        self._eval_rows, self._means["eval"] = [], Means()
        collator: Any = self.data_collator
        config = collator.config
        collator.config = replace(config, in_context=0.0)
        try:
            metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            collator.config = config
        gathered = gather_object([self._eval_rows])
        rows = [pair for part in gathered for pair in part]
        figures = self._means["eval"].take(self.accelerator)
        if "nll" in figures:
            ratio = torch.exp(torch.tensor(figures.pop("nll") - figures.pop("reference_nll"))).item()
            figures["perplexity_ratio"] = ratio
        if len({harmful for _, harmful in rows}) == 2:
            figures["auroc"] = auroc([peak for peak, _ in rows], [harmful for _, harmful in rows])
        figures = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        if self.state.log_history and self.is_world_process_zero():
            self.state.log_history[-1].update(figures)
        metrics.update(figures)
        return metrics

    def _record(self, figures: Positions, judged: JudgedPositions, flag_class: torch.Tensor, mode: str) -> None:
        """Metrics of one batch."""
        row, flag_labels = judged.row, judged.flag_labels
        harmful_row = flag_class[row] > 0
        flagged, unflagged, pinned = flag_labels > 0, flag_labels == 0, judged.labels != IGNORE
        masked = {
            "flag_loss": (figures.flag_loss, flag_labels != IGNORE),
            "keep_kl": (figures.keep_kl, pinned),
            "p_flag_harmful": (figures.p_flag, flagged),
            "p_flag_harmless": (figures.p_flag, unflagged),
        }
        if mode == "eval":
            real = rows_that_count(self.accelerator, len(flag_class), self.args.eval_batch_size)
            masked = {name: (values, where & (row < real)) for name, (values, where) in masked.items()}
            pinned = pinned & (row < real)
            text = pinned & ~harmful_row & figures.nll.isfinite()
            masked |= {
                "keep_kl_harmless": (figures.keep_kl, pinned & ~harmful_row),
                "nll": (figures.nll, text),
                "reference_nll": (figures.reference_nll, text),
            }
            peaks = torch.zeros(len(flag_class), device=row.device).scatter_reduce(0, row, figures.p_flag, "amax")
            self._eval_rows += list(zip(peaks.tolist(), (flag_class > 0).tolist(), strict=True))[:real]
        for name, (values, where) in masked.items():
            self._means[mode].add(name, values[where])

    @contextmanager
    def _reference(self, model: Any) -> Any:
        """The model before training: adapters off, or the frozen copy."""
        if self._frozen is not None:
            yield self._frozen
            return
        plain = self.accelerator.unwrap_model(model)
        was_training = plain.training
        with adapters_off(plain):
            plain.eval()
            yield model
            plain.train(was_training)


def _as_dataset(examples: Sequence[Example] | Dataset) -> Dataset:
    return examples if isinstance(examples, Dataset) else Dataset.from_list([dict(example) for example in examples])


class _EpochOfCollator(TrainerCallback):
    """Sets the collator's epoch, also after a resume."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)
