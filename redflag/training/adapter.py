"""LoRA with trainable flag rows, and the model's head as the loss needs it."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from redflag.backends.head import logit_finish, plain_model
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.training.loss import Head
from redflag.training.sharded import gather_head


def lora_config(
    model: Any,
    spec: FlagSpec,
    r: int = 32,
    alpha: int | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
) -> LoraConfig:
    """LoRA on the model's linear layers, with just the flag rows trainable in embedding and head.

    `alpha` is 2r by default, `target_modules` as in PEFT. The model has its flags attached.

    Raises:
        RedflagError: A target module is not in the model.
    """
    if not isinstance(target_modules, str):
        suffixes = {part for name, _ in model.named_modules() for part in (name, name.rpartition(".")[2])}
        missing = [name for name in target_modules if name not in suffixes]
        if missing:
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            raise RedflagError(
                f"target_modules must name modules of the model (got {missing[0]!r}). Choose from "
                f"{', '.join(sorted(linear))}, or all-linear."
            )
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {names[id(embedding)].rpartition(".")[2]: list(spec.ids)}
    if head is not None and head.weight is not embedding.weight:
        rows[names[id(head)].rpartition(".")[2]] = list(spec.ids)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        trainable_token_indices=rows,
    )


def cheap_flag_rows(model: torch.nn.Module) -> None:
    """Makes PEFT's trainable-token layers compute only their own rows.

    PEFT copies the whole V x H matrix to write K rows into it, in every forward pass, and keeps a V x H gradient of the
    copy. Using the frozen matrix and overwriting only the K rows' outputs gives the same result.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.forward_adapters = types.MethodType(_forward_rows, module)


_peft_forward = TrainableTokensLayer.forward_adapters


def _forward_rows(
    self: TrainableTokensLayer, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any
) -> torch.Tensor:
    if self.disable_adapters or not active_adapters or self.merged:
        return _peft_forward(self, x, active_adapters, *args, **kwargs)
    result = self.base_layer(x, *args, **kwargs)
    is_embedding = isinstance(self.base_layer, torch.nn.Embedding)
    for adapter in active_adapters:
        rows, indices = self.trainable_tokens_delta[adapter], self.token_indices[adapter]
        # Output side: only the flags' logits depend on the trained rows, so overwrite those K columns.
        if not is_embedding:
            logits = torch.nn.functional.linear(x, rows.to(x.dtype)).to(result.dtype)
            if self.base_layer.bias is not None:
                logits = logits + self.base_layer.bias[indices].to(result.dtype)
            result = result.index_copy(-1, torch.tensor(indices, device=result.device), logits)
            continue
        # Scaled embeddings (Gemma) multiply in their forward; the row gets the same factor.
        scale = getattr(self.base_layer, "embed_scale", None)
        for row, index in zip(rows, indices, strict=True):
            # Input side: positions that hold a flag get its trained row.
            value = row.to(result.dtype) if scale is None else (row * scale.to(row.dtype)).to(result.dtype)
            result = torch.where((x == index)[..., None], value, result)
    return result


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Runs the model as it was before training; changes nothing but the adapters' own switch.

    PEFT's `disable_adapter` also switches the adapters' gradients off and on again. Under FSDP2 the weights are other
    objects by then, so the flag rows of an embedding would get no gradient from the first step on.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [module for module in model.modules() if isinstance(module, kinds) and not module.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def output_head(model: Any, spec: FlagSpec) -> Head:
    """The output head for the loss, of a model with or without PEFT, with adapters on or off.

    Gathers a sharded head, so all processes must call it together.

    Raises:
        RedflagError: The head is not a plain matrix, for example because it has a LoRA adapter of its own.
    """
    gather_head(model)
    plain = plain_model(model)
    module, flag_rows = plain.get_output_embeddings(), None
    adapter = getattr(module, "token_adapter", None)
    if adapter is None and module.weight is None:
        adapter = getattr(plain.get_input_embeddings(), "token_adapter", None)
    if adapter is not None:
        if not adapter.disable_adapters and adapter.active_adapters:
            name = adapter.active_adapters[0]
            if tuple(adapter.token_indices[name]) != spec.ids:
                raise RedflagError(
                    f"the adapter must train the flags' rows {list(spec.ids)} (got {adapter.token_indices[name]}). "
                    "Build its configuration with redflag.training.adapter.lora_config."
                )
            flag_rows = adapter.trainable_tokens_delta[name]
        module = adapter.base_layer
    if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or hasattr(module, "lora_A"):
        raise RedflagError(
            f"the output head must be a plain matrix, which can be applied in chunks (got {type(module).__name__}). "
            "Leave the head out of target_modules and modules_to_save."
        )
    return Head(module.weight, flag_rows, getattr(module, "bias", None), *logit_finish(plain))
