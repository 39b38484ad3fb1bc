"""Sharded weights: what FSDP2 does not handle by itself when the head is read outside the model's forward.

Every process holds a part of each matrix and gathers a layer when it is called. This module covers the three cases
outside a call: the loss reads the head's matrix, the reference is a second model, and saving needs whole matrices.
accelerate does the sharding, as its configuration says; whatever depends on torch's `FSDPModule` is here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from peft import get_peft_model
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch.distributed.fsdp import FSDPModule, StateDictType

from redflag.backends.head import plain_model
from redflag.errors import RedflagError


def refuse_deepspeed(config: Any) -> None:
    """Refuses DeepSpeed before anything is loaded: it is not supported, and its losses would be silently wrong.

    Raises:
        RedflagError: DeepSpeed was asked for.
    """
    if config.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise RedflagError(
            "DeepSpeed is not supported. Its ZeRO-3 hides the head's matrix from the loss. Use FSDP2 "
            "(fsdp_version: 2 in the accelerate configuration), which shards as much."
        )


def check_plugin(accelerator: Any, saves: bool, adapter: bool) -> None:
    """Refuses the ways of sharding whose results would be silently wrong.

    Raises:
        RedflagError: FSDP1; or sharded checkpoints, from which an adapter would resume without its own weights and its
            optimizer's (transformers 5.23, accelerate 1.15).
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise RedflagError(
            f"fsdp_version must be 2 (got {plugin.fsdp_version}). FSDP1's flat shards hide the head's matrix from the "
            "loss. Set it in the accelerate configuration."
        )
    if saves and adapter and plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT:
        raise RedflagError(
            "fsdp_state_dict_type must be FULL_STATE_DICT for an adapter (got SHARDED_STATE_DICT). An adapter cannot "
            "resume from sharded checkpoints. Set it in the accelerate configuration, or add --save-strategy no."
        )


def _ties(model: torch.nn.Module) -> Callable[[], None]:
    """Records which modules share a parameter; calling the result restores the sharing after loading has broken it."""
    users: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append((module, name))

    def tie() -> None:
        for (first, own), *others in users.values():
            for module, name in others:
                setattr(module, name, getattr(first, own))

    return tie


@contextmanager
def tied_matrix_seen(model: torch.nn.Module) -> Iterator[None]:
    """Within the context, a tied embedding and head with trainable rows return the same matrix object.

    accelerate puts tied matrices into one unit if `embedding.weight is head.weight`. PEFT's layers return a new copy
    with the trained rows on each access, and torch refuses two units over one matrix. transformers cannot tie weights
    through PEFT's layers either, which is necessary after loading by way of the meta device.
    """
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    if not layers:
        yield
        return
    for layer in layers:
        layer.__dict__["get_merged_weights"] = lambda _adapters, layer=layer: layer.base_layer.weight
    model.__dict__["tie_weights"] = _ties(model)
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]
        for layer in layers:
            del layer.__dict__["get_merged_weights"]


def place_reference(model: Any, accelerator: Any) -> Any:
    """Moves a frozen model to the device, in place; under FSDP2 it is sharded as the trained model will be."""
    return fsdp2_prepare_model(accelerator, model) if accelerator.is_fsdp2 else model.to(accelerator.device)


def _owners(model: Any) -> list[FSDPModule]:
    """The FSDP units that hold the head's weights: its own (shared with a tied embedding), and those around it."""
    units: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    head = plain_model(model).get_output_embeddings() if units else None
    return [unit for unit in units if any(module is head for module in unit.modules())]


def gather_head(model: Any) -> None:
    """Gathers the head's matrix on each process, if it is sharded; all processes must call it together.

    It stays whole until its unit is sharded again: by the backward pass, or at the end of `head_stays_whole`.
    """
    for unit in _owners(model):
        unit.unshard()


@contextmanager
def head_stays_whole(model: Any) -> Iterator[None]:
    """Keeps backward passes from sharding the head's matrix again; leaving the context shards it.

    A step may run the model forward and backward several times before the head's last gradient arrives. The context
    must end before gradients are clipped, since only shards hold gradients.
    """
    units = _owners(model)
    for unit in units:
        unit.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_backward(True, recurse=False)
            unit.reshard()


def whole_model(model: Any, accelerator: Any) -> Any:
    """The model with whole weights, for saving; all processes must call it together.

    Returns:
        The model itself if nothing is sharded. Otherwise, on process 0, a model of the same class in main memory with
        the gathered weights; None on the other processes.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    plain = plain_model(model)
    kind: Any = next(c for c in type(plain).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        shell = kind._from_config(plain.config)
        shell.generation_config = plain.generation_config
        if plain is not model:
            shell = get_peft_model(shell, model.peft_config[model.active_adapter])
    tie = _ties(shell)
    # Under mixed precision accelerate trains float32 copies; the saved folder has the type that the model was loaded
    # in.
    types = {name: weight.dtype for name, weight in shell.state_dict().items()}
    weights = {name: weight.to(types.get(name, weight.dtype)) for name, weight in weights.items()}
    mismatch = shell.load_state_dict(weights, assign=True, strict=False)
    tie()
    left = [name for name, parameter in shell.named_parameters() if parameter.is_meta]
    assert not left and not mismatch.unexpected_keys, (left, mismatch)
    return shell
