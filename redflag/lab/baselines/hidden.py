"""Hidden states of given responses, computed once per set of rows and kept on disk for all probes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError
from redflag.lab.baselines.bench import Bench, Read, digest, model_stamp

# Numbers alive at one time in a forward pass: 256 MB of float32.
_AT_ONCE = 64_000_000
_HALF_MAX = 65504.0


class Hidden(NamedTuple):
    """Hidden states of N responses with S judged steps.

    Attributes:
        states: S x (L + 1) x H, float16, on disk: the embedding's output, then that of each of the L layers (the last
            one behind the final norm), at the position where the step's token is predicted.
        starts: N + 1 offsets: response i has steps `starts[i]` to `starts[i + 1]`.
    """

    states: npt.NDArray[np.float16]
    starts: npt.NDArray[np.int64]

    def of(self, rows: Sequence[int], layers: Sequence[int]) -> npt.NDArray[np.float32]:
        """Steps of these responses end to end, the layers' states side by side: s x (layers * H)."""
        pieces = [self.states[self.starts[i] : self.starts[i + 1]][:, layers] for i in rows]
        states = np.concatenate(pieces).astype(np.float32)
        return states.reshape(len(states), -1)


def hidden_states(bench: Bench, reads: Sequence[Read]) -> Hidden:
    """Hidden states of these rows, from disk when they are there.

    They take 2 bytes x steps x (L + 1) x H in `bench.folder`; `forget` drops them.
    """
    starts = np.concatenate([[0], np.cumsum([len(read.judged_ids) for read in reads])]).astype(np.int64)
    ids = [[read.prompt_ids, read.judged_ids] for read in reads]
    path = bench.folder / f"{digest([model_stamp(bench.hidden_folder), ids])}.npy"
    if not path.exists():
        _compute(bench, reads, starts, path)
    return Hidden(np.load(path, mmap_mode="r"), starts)


def forget(bench: Bench) -> None:
    """Drops all hidden states of this bench from disk, also what a killed run left of some."""
    for path in [*bench.folder.glob("*.npy"), *bench.folder.glob("*.partial")]:
        path.unlink()


def last_layers(model: Any, rows: Sequence[Sequence[int]]) -> Any:
    """A batch's hidden states of all layers, B x T x (L + 1) x H, rows padded on the right.

    Args:
        model: A causal language model.
        rows: Ids.
    """
    import torch

    from redflag.backends.head import backbone

    width = max(map(len, rows))
    # No position sees what comes after it, so the padding needs no mask.
    batch = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    with torch.inference_mode():
        out = backbone(model)(input_ids=batch, use_cache=False, output_hidden_states=True)
        return torch.stack(out.hidden_states, dim=2)


def _compute(bench: Bench, reads: Sequence[Read], starts: npt.NDArray[np.int64], path: Path) -> None:
    import torch

    from redflag.backends.load import read_model

    model, _ = read_model(bench.hidden_folder, torch.float32 if bench.device == "cpu" else "auto")
    model = model.to(bench.device).eval()
    layers, width = bench.config.num_hidden_layers + 1, bench.config.hidden_size
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    shape = (int(starts[-1]), layers, width)
    states = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    _reserve(partial)
    for picks in _batches(reads, max(1, _AT_ONCE // (layers * width)), bench.batch_size):
        # The last token is never read from: nothing is predicted after it.
        found = last_layers(model, [(reads[i].prompt_ids + reads[i].judged_ids)[:-1] for i in picks])
        found = found.float().clamp(-_HALF_MAX, _HALF_MAX).cpu().numpy()
        for i, one in zip(picks, found, strict=True):
            first = len(reads[i].prompt_ids) - 1
            states[starts[i] : starts[i + 1]] = one[first : first + len(reads[i].judged_ids)]
    states.flush()
    del states
    os.replace(partial, path)


def _reserve(path: Path) -> None:
    """Takes the disk space now: writing to a mapped file on a full disk would end the process."""
    size = path.stat().st_size
    try:
        if hasattr(os, "posix_fallocate"):
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink()
        raise RedflagError(
            f"hidden states take {size / 1e9:.1f} GB in {path.parent}, which cannot be had ({error.strerror}): free "
            "the space, or give another hidden_dir"
        ) from error


def _batches(reads: Sequence[Read], most_tokens: int, batch_size: int) -> list[list[int]]:
    """Rows of like length together; a batch holds at most so many tokens, padding counted, but one row at least."""
    order = sorted(range(len(reads)), key=lambda i: len(reads[i].prompt_ids) + len(reads[i].judged_ids))
    batches: list[list[int]] = [[]]
    for i in order:
        length = len(reads[i].prompt_ids) + len(reads[i].judged_ids)
        if batches[-1] and (len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * length > most_tokens):
            batches.append([])
        batches[-1].append(i)
    return batches
