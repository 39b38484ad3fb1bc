"""Fine-tuning by transformers' Trainer, with targets or a loss that `redflag train` does not know."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from redflag.backends.head import backbone, head_logits
from redflag.progress import Progress

IGNORE = -100
# Models up to this size have all their weights trained by default.
SMALL = 100_000_000

# An example: `input_ids` and `labels`, for each position its target (predicted from the ids before it; it may differ
# from the id there) or `IGNORE`; and numbers that a loss of one's own reads. A batch: the same as tensors, padded.
Example = Mapping[str, Any]
# (model, batch, share of the training done) -> loss
Loss = Callable[[Any, Mapping[str, Tensor], float], Tensor]


@dataclass(frozen=True)
class Tuning:
    """How a model is trained."""

    # peak; None: 5e-4 for all weights of a small model, 2e-5 of a large one, 2e-4 for LoRA
    learning_rate: float | None = None
    passes: int = 1  # passes over the rows
    rows: int = 16  # examples per step
    lora_r: int | None = None  # rank; 0 trains all weights; None: all of a model of up to 100 million, else rank 32


def fine_tune(
    model: Any,
    examples: Sequence[Example],
    tuning: Tuning,
    *,
    seed: int,
    loss: Loss | None = None,
    head: torch.nn.Module | None = None,
) -> Any:
    """Trains a causal language model, by default with the mean cross-entropy over all targets of a batch.

    Args:
        head: Another module that is trained along.

    Returns:
        The model, adapters merged, in evaluation mode, on the device that it came on.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Tuner(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
            if loss is None:
                return language_loss(model, hidden_of(model, inputs), inputs)
            return loss(model, inputs, self.state.global_step / self.state.max_steps)

    class ShowProgress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.progress = Progress("fine-tuning", state.max_steps, "steps")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.progress(state.global_step)

    device = model.device
    size = sum(parameter.numel() for parameter in model.parameters())
    rank = (0 if size <= SMALL else 32) if tuning.lora_r is None else tuning.lora_r
    torch.manual_seed(seed)
    trained = _with_lora(model, rank) if rank else model
    if head is not None:
        trained.add_module("head_beside", head)  # the optimizer takes the model's own parameters
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            learning_rate=tuning.learning_rate or (2e-4 if rank else 5e-4 if size <= SMALL else 2e-5),
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            num_train_epochs=tuning.passes,
            per_device_train_batch_size=tuning.rows,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            seed=seed,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # with several, the Trainer would spread a batch over all of them
        trainer = Tuner(trained, arguments, data_collator=padded, train_dataset=examples, callbacks=[ShowProgress()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if head is not None:
        del trained.head_beside
        head.to(device)
    return (trained.merge_and_unload() if rank else trained).to(device).eval()


def hidden_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Last hidden states of a batch, B x T x H.

    No position sees what comes after it, so the padding on the right needs no mask.
    """
    states: Tensor = backbone(model)(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return states


def language_loss(model: Any, hidden_BTH: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy over all targets of a batch."""
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORE
    logits = head_logits(model, hidden_BTH[:, :-1][counted]).float()
    return cross_entropy(logits, targets[counted], reduction="sum") / counted.sum().clamp(min=1)


def padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch, padded on the right."""
    batch = {name: [torch.tensor(example[name]) for example in examples] for name in examples[0]}
    pads = {"input_ids": 0, "labels": IGNORE}
    return {
        name: pad_sequence(values, batch_first=True, padding_value=pads[name]) if name in pads else torch.stack(values)
        for name, values in batch.items()
    }


def _with_lora(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)
