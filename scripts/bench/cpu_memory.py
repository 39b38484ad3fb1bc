#!/usr/bin/env python3
"""`redflag train` on a CPU, with and without what `redflag.weights.memory` does: tokens per second and memory.

    python scripts/bench/cpu_memory.py    # SmolLM2-135M's shape, bfloat16, LoRA, 200 steps of mixed lengths
    python scripts/bench/cpu_memory.py --steps 40 --kinds off on tcmalloc

    python scripts/bench/cpu_memory.py --only-allocations --steps 30   # the tensors of such steps, without arithmetic

Random weights and random words; all kinds train on the same batches. Each runs in a process of its own. Where other
programs share the cores, short runs in turn (--rounds) compare better than one long one. tcmalloc is preloaded, for
comparison, from --tcmalloc. Prints a line per run and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = ("off", "on", "tcmalloc")
TCMALLOC = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["off", "on"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576, help="64 x heads; 64 shows memory in minutes, not speed")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shortest", type=int, default=32, help="tokens of the shortest row; a quarter is prompt")
    parser.add_argument("--longest", type=int, default=224)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only-allocations", action="store_true", help="for a machine that others keep busy")
    parser.add_argument("--tcmalloc", default=TCMALLOC)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps((run_allocations if arguments.only_allocations else run_one)(arguments)))
        return
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in arguments.kinds}
    for number in range(arguments.rounds):
        for kind in arguments.kinds:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
            if kind == "tcmalloc":
                environment["LD_PRELOAD"] = arguments.tcmalloc
            command = [sys.executable, __file__, *sys.argv[1:], "--one", kind]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{kind} failed:\n{done.stderr[-3000:]}")
            runs[kind].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"round {number + 1} {kind}: {runs[kind][-1]}", flush=True)
    names = list(runs[arguments.kinds[0]][0])
    print("\n| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for kind, found in runs.items():
        medians = (statistics.median(run[name] for run in found) for name in names)
        print(f"| {kind} | " + " | ".join(f"{value:.4g}" for value in medians) + " |")


def run_one(arguments: argparse.Namespace) -> dict[str, float]:
    """One training. Seconds are those after the third step; memory is what the process holds at the end of steps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from redflag.data.rows import Row
    from redflag.flags import FlagSpec, attach
    from redflag.models.pretrain import train_tokenizer
    from redflag.training.adapter import lora_config
    from redflag.training.encode import encode
    from redflag.training.trainer import RedFlagConfig, RedFlagTrainer
    from redflag.weights.memory import KeepMemory

    torch.manual_seed(0)
    words = [f"word{i}" for i in range(500)]
    tokenizer = train_tokenizer([" ".join(words)], 1200)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 192),
        intermediate_size=arguments.hidden * 8 // 3,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    draw = random.Random(0)
    examples = []
    for i in range(arguments.batch_size * arguments.steps):
        length = round(arguments.shortest * (arguments.longest / arguments.shortest) ** draw.random())
        messages = [
            {"role": "user", "content": " ".join(draw.choices(words, k=length // 4))},
            {"role": "assistant", "content": " ".join(draw.choices(words, k=length))},
        ]
        example = encode(Row(messages, category="harm" if i % 3 == 0 else None), tokenizer, spec, length, i)
        examples.append({**example, "input_ids": (example["input_ids"] * 4)[:length], "response_start": length // 4})
    seconds: list[float] = []
    held: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            seconds.append(time.perf_counter())
            held.append(rss_gb())

    with tempfile.TemporaryDirectory() as folder:
        settings = RedFlagConfig(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch_size,
            max_steps=arguments.steps,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
            learning_rate=1e-4,
            max_length=None,
        )
        peft = lora_config(model, spec, 32)
        trainer = RedFlagTrainer(
            model, settings, spec, examples, processing_class=tokenizer, peft_config=peft, callbacks=[Clock()]
        )
        if arguments.one != "on":
            trainer.remove_callback(KeepMemory)
        before = resource.getrusage(resource.RUSAGE_SELF)
        trainer.train()
    after = resource.getrusage(resource.RUSAGE_SELF)
    tokens = sum(len(example["input_ids"]) for example in examples) * (arguments.steps - 3) / arguments.steps
    quarter = max(1, len(held) // 4)
    return {
        "tokens/s": tokens / (seconds[-1] - seconds[2]),
        "seconds": seconds[-1] - seconds[2],
        "user s": after.ru_utime - before.ru_utime,
        "system s": after.ru_stime - before.ru_stime,
        "GB, first quarter of the steps": max(held[:quarter]),
        "GB, last quarter": max(held[-quarter:]),
        "GB, peak": after.ru_maxrss / 2**20,
    }


def run_allocations(arguments: argparse.Namespace) -> dict[str, float]:
    """Makes, writes and drops tensors of the sizes and in the order of training steps."""
    import types

    import torch

    from redflag.weights.memory import KeepMemory

    torch.set_num_threads(1)
    keeper, settings = KeepMemory(), types.SimpleNamespace(device=torch.device("cpu"))
    if arguments.one == "on":
        keeper.on_train_begin(settings, None, None)

    def made(count: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(count, dtype=dtype).fill_(1)

    draw, hidden, vocabulary, layers = random.Random(0), arguments.hidden, 49_152, arguments.layers
    weights, optimizer, held = made(200_000_000), [], []
    before = resource.getrusage(resource.RUSAGE_SELF)
    for step in range(arguments.steps):
        ratio = arguments.longest / arguments.shortest
        tokens = arguments.batch_size * round(arguments.shortest * ratio ** (draw.random() if step else 1))
        kept = []
        for is_reference in (True, False):
            for _ in range(layers):
                sizes = [hidden] * 7 + [hidden * 2 // 3] * 2 + [hidden * 8 // 3] * 4 + [64]
                layer = [made(tokens * size) for size in sizes]
                if not is_reference:
                    kept.append(layer)
        for start in range(0, tokens * 3 // 4, 341):  # the head, some positions at a time
            count = min(341, tokens * 3 // 4 - start) * vocabulary
            for dtypes in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32,) * 3):
                _logits = [made(count, dtype) for dtype in dtypes]
        for layer in reversed(kept):
            _gradients = [made(tensor.numel()) for tensor in layer[:4]]
            if step == 0:
                optimizer += [made(40_000, torch.float32) for _ in range(20)]
            layer.clear()
        keeper.on_step_end(settings, None, None)
        held.append(rss_gb())
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert len(weights) and len(optimizer)
    quarter = max(1, len(held) // 4)
    return {
        "user s": after.ru_utime - before.ru_utime,
        "system s": after.ru_stime - before.ru_stime,
        "page faults": after.ru_minflt - before.ru_minflt,
        "GB, first quarter of the steps": max(held[:quarter]),
        "GB, last quarter": max(held[-quarter:]),
        "GB, peak": after.ru_maxrss / 2**20,
    }


def rss_gb() -> float:
    """Memory that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


if __name__ == "__main__":
    main()
