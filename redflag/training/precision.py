"""Whether bfloat16 is fast here: on a processor without the instructions it is emulated, some fifty times slower."""

from __future__ import annotations

import torch


def bf16_is_fast() -> bool:
    """True where bfloat16 matrix products run in hardware (CUDA with bf16, or a CPU with AVX512-BF16 or AMX)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:  # private names of torch: without them, assume the slow and exact way
        return False
