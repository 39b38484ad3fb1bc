"""Packs a trained adapter to ship with this package, or merges an adapter's folder into one ordinary model.

    python -m redflag.models.pack MODEL_FOLDER OUTPUT [--dtype float16]
    python -m redflag.models.pack MODEL_FOLDER OUTPUT --merged

`MODEL_FOLDER` is a folder written by `redflag train`, with its last checkpoint if it is merged, or a model by name.
`--merged` writes a model for stock engines such as vLLM, which cannot load adapters with vocabulary rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redflag.bounds import check_choice
from redflag.errors import RedflagError
from redflag.files import atomic_folder, require_writable
from redflag.flags import FILE, FlagSpec
from redflag.models.named import ADAPTER, model_folder

MOST = 8_000_000
DTYPES = ("bfloat16", "float16")
WEIGHTS = "adapter_model.safetensors"
# Written by hand, and kept for the next flag.
KEPT = ("README.md", "figures.json")
# The tokenizer is packed although the base has one, so that ids do not depend on the library that made the base.
NEEDED = (FILE, "thresholds.json", "tokenizer.json", "tokenizer_config.json")
ALSO = ("chat_template.jinja", "special_tokens_map.json", "train.json")


def pack_flag(folder: str | Path, output: str | Path, dtype: str = "float16") -> Path:
    """Writes a shipped flag's folder from a trained and calibrated adapter.

    Weights in 16 bits, configuration, flags, thresholds, tokenizer and `train.json` without its log. README.md and
    figures.json in the output folder are kept, everything else is replaced.

    Args:
        folder: Folder written by `redflag train` and `redflag calibrate`; if merged, with its last checkpoint.
        output: Created or replaced as a whole.

    Returns:
        `output`.

    Raises:
        RedflagError: A file is missing, the files do not belong together, or the weights are larger than 8 MB.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from redflag.watching.thresholds import Thresholds

    folder, output = Path(folder), Path(output)
    check_choice("dtype", dtype, DTYPES)
    adapter = _adapter_of(folder)
    for name in NEEDED:
        if not (folder / name).is_file():
            raise RedflagError(
                f"{folder} must hold {name} (it doesn't). Give a folder written by `redflag train` and "
                "`redflag calibrate`"
            )
    spec = FlagSpec.load(folder)
    Thresholds.load(folder).check(spec.run_id, spec.template_hash, "raw", spec.categories)
    with _whole(output) as new:
        trained = _trained(load_file(adapter / WEIGHTS))
        weights = {name: value.to(getattr(torch, dtype)) for name, value in trained.items()}
        if not all(torch.isfinite(value).all() for value in weights.values()):
            raise RedflagError(f"{adapter}/{WEIGHTS} must fit into {dtype} (got numbers that don't): choose bfloat16")
        save_file(weights, new / WEIGHTS, metadata={"format": "pt"})
        os.chmod(new / WEIGHTS, 0o644)
        if (size := (new / WEIGHTS).stat().st_size) > MOST:
            raise RedflagError(f"{WEIGHTS} must have at most {MOST:,} bytes (got {size:,}). Train with a lower lora_r")
        shutil.copyfile(adapter / ADAPTER, new / ADAPTER)
        for name in (*NEEDED, *ALSO):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, new / name)
        _rewrite(new / ADAPTER, {"base_model_name_or_path": "base"})
        if (new / "train.json").is_file():
            _rewrite(new / "train.json", {"losses": []})
        for name in KEPT:
            if (output / name).is_file():
                shutil.copyfile(output / name, new / name)
    return output


def merge_flag(folder: str | Path, output: str | Path) -> Path:
    """Writes an adapter's folder as one ordinary model, in the base's type, with flags and thresholds.

    Raises:
        RedflagError: The folder holds no adapter, or it cannot be read or written.
    """
    from peft import PeftModel

    from redflag.backends.load import read_base, read_tokenizer

    folder, output = Path(folder), Path(output)
    if not (folder / ADAPTER).is_file():
        raise RedflagError(f"{folder} must hold an adapter (got no {ADAPTER}): a merged model is served as it is")
    spec = FlagSpec.load(folder)
    model = PeftModel.from_pretrained(read_base(folder)[0], str(folder)).merge_and_unload()
    with _whole(output) as new:
        model.save_pretrained(new)
        for path in folder.iterdir():
            if path.is_file() and path.name not in (WEIGHTS, ADAPTER, "shipped.json", "README.md"):
                shutil.copyfile(path, new / path.name)
    assert read_tokenizer(output) and FlagSpec.load(output) == spec
    return output


def _adapter_of(folder: Path) -> Path:
    """Where a trained model's adapter lies: in its folder, or in the checkpoint behind its last step."""
    if (folder / ADAPTER).is_file() and (folder / WEIGHTS).is_file():
        return folder
    try:
        steps = json.loads((folder / "train.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        steps = "LAST"
    last = folder / f"checkpoint-{steps}"
    if not (last / ADAPTER).is_file() or not (last / WEIGHTS).is_file():
        raise RedflagError(
            f"{folder} must hold an adapter (got no {ADAPTER}, and no {last.name} with one). Train with --merge false, "
            "or with --save-strategy steps"
        )
    return last


def _trained(weights: dict[str, Any]) -> dict[str, Any]:
    """The trained weights: checkpoints also hold the matrix of the flag's row, and a tied head's row again."""
    rows = {name: value for name, value in weights.items() if name.endswith("trainable_tokens_delta")}
    first = next((value for name, value in rows.items() if "lm_head" not in name), None)
    again = {name for name, value in rows.items() if "lm_head" in name and first is not None and value.equal(first)}
    return {name: value for name, value in weights.items() if ".base_layer." not in name and name not in again}


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """As `atomic_folder`, which may replace nothing but a flag's folder.

    Raises:
        RedflagError: `output` holds other files, or cannot be written.
    """
    require_writable(output, "output")
    existing = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if output.exists() and not (output.is_dir() and (FILE in existing or existing <= set(KEPT))):
        raise RedflagError(f"{output} must be new or a flag's folder (it holds other files). Choose another")
    try:
        with atomic_folder(output) as new:
            yield new
    except OSError as error:
        raise RedflagError(f"{output} cannot be written ({error.strerror or error}): free space and repeat") from error


def _rewrite(file: Path, changes: dict[str, Any]) -> None:
    record = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**record, **changes}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="pack-flag", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--merged", action="store_true", help="one ordinary model, for engines without adapters")
    arguments = parser.parse_args()
    try:
        folder = model_folder(arguments.model)
        if arguments.merged:
            merge_flag(folder, arguments.output)
        else:
            pack_flag(folder, arguments.output, arguments.dtype)
    except RedflagError as error:
        print(f"pack-flag: {error}", file=sys.stderr)
        sys.exit(2)
    print(arguments.output)


if __name__ == "__main__":
    main()
