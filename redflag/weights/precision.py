"""Device, weights' type and autocast, chosen in one place by what the machine supports.

bfloat16 is used where it is fast, as autocast around float32 weights or as the weights' own type. On a processor
without the instructions it is emulated, some fifty times slower. What is *saved* does not depend on the machine: the
folder has the type of the base model, unless another one is given.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from redflag.errors import RedflagError

BF16_VARIABLE = "REDFLAG_BF16"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Devices without double precision.
NARROW_DEVICES = {"mps"}


@dataclass(frozen=True)
class Machine:
    """The available devices; the last two fields say where bfloat16 matrix products run in hardware."""

    cuda: bool = False
    mps: bool = False
    cuda_bf16: bool = False
    cpu_bf16: bool = False

    @classmethod
    def here(cls) -> Machine:
        """This machine; REDFLAG_BF16=on or off overrides its devices' support of bfloat16."""
        forced = os.environ.get(BF16_VARIABLE, "")
        if forced not in ("", "on", "off"):
            raise RedflagError(
                f"{BF16_VARIABLE} must be on or off (got {forced!r}). Unset it to let the hardware decide."
            )
        cuda = torch.cuda.is_available()
        if forced:
            return cls(cuda, torch.backends.mps.is_available(), forced == "on", forced == "on")
        cuda_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        return cls(cuda, torch.backends.mps.is_available(), cuda_bf16, _cpu_has_bf16())


@dataclass(frozen=True)
class Precision:
    """Device and types of training.

    Attributes:
        device: "cuda", "mps" or "cpu".
        autocast: Whether the forward pass is under bfloat16 autocast.
        weights: Type of the weights while training.
        saved: Type of the weights in the folder that is written.
    """

    device: str
    autocast: bool
    weights: torch.dtype
    saved: torch.dtype


def choose_precision(
    machine: Machine,
    stored: torch.dtype = torch.float32,
    *,
    dtype: str = "auto",
    bf16: bool | None = None,
    fp16: bool = False,
    use_cpu: bool = False,
) -> Precision:
    """Chooses device and types for training; explicit options win.

    Args:
        stored: Type of the base model's weights on disk.
        dtype: Type to train and save the weights in; "auto" saves as stored and trains in float32 if that type is slow
            on this machine or, as float16, overflows.
        bf16: bfloat16 autocast; None = where it is fast.
        fp16: float16 autocast, which excludes bf16.

    Raises:
        RedflagError: An option is not supported on this machine.

    >>> choose_precision(Machine(cpu_bf16=True), torch.float32)
    Precision(device='cpu', autocast=True, weights=torch.float32, saved=torch.float32)
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise RedflagError(f"dtype must be auto, {', '.join(DTYPES)} (got {dtype!r}).")
    device = "cpu" if use_cpu or not (machine.cuda or machine.mps) else "cuda" if machine.cuda else "mps"
    fast = {"cpu": machine.cpu_bf16, "cuda": machine.cuda_bf16, "mps": False}[device]
    if bf16 and device == "cuda" and not fast:
        raise RedflagError("bf16 must be false on this GPU (got true). It has no bfloat16 arithmetic. Use --fp16 true.")
    if fp16 and device == "cpu":
        raise RedflagError("fp16 must be false on a CPU (got true). Mixed precision in float16 needs a GPU.")
    autocast = not fp16 and (fast if bf16 is None else bf16)
    if dtype != "auto":
        return Precision(device, autocast, DTYPES[dtype], DTYPES[dtype])
    trainable = stored == torch.bfloat16 and fast
    return Precision(device, autocast, stored if trainable else torch.float32, stored)


def inference_device() -> str:
    """The device for "auto". Apple's GPU is used only if given by name: nothing was measured there."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def widest(device: Any) -> torch.dtype:
    """float64, or float32 on a device that has no double precision (Apple's GPU)."""
    return torch.float32 if torch.device(device).type in NARROW_DEVICES else torch.float64


def _cpu_has_bf16() -> bool:
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:  # private names of torch; without them, assume no hardware support
        return False
