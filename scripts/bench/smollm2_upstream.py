"""SmolLM2 with the shipped flag in front of a stock vLLM: each table of docs/engines.md about it by one command.

    python recipes/smollm2/rows.py --data DATA --licences open --output runs/smollm2-open
    python scripts/bench/smollm2_upstream.py probabilities    # |dp| in float32 and bfloat16: scripts/bench/dtype.py
    python scripts/bench/smollm2_upstream.py thresholds       # redflag calibrate, and calibrate --upstream
    python scripts/bench/smollm2_upstream.py speed            # 1, 16 and 64 streams: scripts/bench/serve.py
    python scripts/bench/smollm2_upstream.py soak --minutes 20    # 32 clients, the engine killed twice: soak.py

The model is merged once, as `scripts/pack-flag --merged` does. Results lie under `--output`, as JSON; a stage whose
result is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve import serve

from redflag.files import atomic_write
from redflag.flags import FlagSpec
from redflag.models.named import DEFAULT, model_folder
from redflag.models.pack import merge_flag

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--rows", type=Path, default=Path("runs/smollm2-open/rows"), help="what rows.py made")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2-upstream"))
    parser.add_argument("--vllm", default=str(ROOT / ".vllm/bin/python"), help="Python of vLLM's environment")
    parser.add_argument("--count", type=int, default=200, help="probabilities: responses")
    parser.add_argument(
        "--tokens", type=int, help="most tokens of a response; default: speed 64, probabilities, soak 32"
    )
    parser.add_argument("--dtype", default="float32", help="speed, soak: the engine's type")
    parser.add_argument("--calibration", type=int, help="thresholds: take so many rows alone")
    parser.add_argument("--rounds", type=int, default=3, help="speed: rounds that count")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64], help="speed: at once")
    parser.add_argument("--minutes", type=float, default=20.0, help="soak: how long")
    parser.add_argument("--threshold", type=float, default=0.05, help="soak: low, so that there are alarms")
    arguments = parser.parse_args()
    output = arguments.output
    arguments.tokens = arguments.tokens or (64 if arguments.stage == "speed" else 32)
    output.mkdir(parents=True, exist_ok=True)
    shipped = model_folder(DEFAULT)
    if not (output / "model" / "redflag.json").is_file():
        merge_flag(shipped, output / "model")
    if FlagSpec.load(output / "model").run_id != FlagSpec.load(shipped).run_id:
        sys.exit(f"{output} must hold the flag that ships (got an earlier one). Delete it, or give another --output.")
    made = output / f"{arguments.stage}.json"
    if made.is_file():
        print(f"{made} is there already; delete it to measure again", file=sys.stderr)
    else:
        result = STAGES[arguments.stage](arguments, output / "model")
        with atomic_write(made) as file:
            file.write(json.dumps(result, indent=2).encode())
    print(made.read_text())


def bench(name: str, *options: Any) -> dict[str, Any]:
    """The JSON that another bench prints; its table goes to standard error."""
    command = [sys.executable, str(HERE / f"{name}.py"), *map(str, options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout.strip():
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return dict(json.loads(done.stdout))


def probabilities(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Half calibration, half test rows; their answers are begun, so that some alarm."""
    rows = arguments.output / "rows.jsonl"
    half = arguments.count // 2
    lines = [
        line
        for name in ("calibration", "test")
        for line in (arguments.rows / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:half]
    ]
    rows.write_text("".join(lines), encoding="utf-8")
    options = ["--count", arguments.count, "--tokens", arguments.tokens, "--begun", 240, "--vllm", arguments.vllm]
    return bench("dtype", "--model", model, "--rows", rows, *options)


def thresholds(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Thresholds of the same rows by a model in this process and by a vLLM, in both types."""
    rows = arguments.rows / "calibration.jsonl"
    if arguments.calibration:
        lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)[: arguments.calibration]
        rows = arguments.output / "calibration.jsonl"
        rows.write_text("".join(lines), encoding="utf-8")
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        found[f"transformers, {dtype}"] = calibrated(arguments, model, rows, "--dtype", dtype)
        command = [arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "bench", "--host", "127.0.0.1", "--dtype", dtype, "--enforce-eager"]
        # Small blocks: every position is a prompt of its own, and what it shares with the last one is found by blocks.
        command += ["--max-model-len", "512", "--block-size", "32", "--disable-uvicorn-access-log"]
        with serve(command, "/health") as server:
            found[f"vLLM, {dtype}"] = calibrated(arguments, model, rows, "--upstream", server.url)
    return found


def calibrated(arguments: argparse.Namespace, model: Path, rows: Path, *way: str) -> dict[str, Any]:
    """What one calibration writes, and how long it took."""
    folder = arguments.output / "calibrated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in model.resolve().iterdir():
        if path.name != "thresholds.json":
            (folder / path.name).symlink_to(path)
    command = [sys.executable, "-m", "redflag.cli", "calibrate", "--model", str(folder), "--input", str(rows)]
    command += ["--config", str(ROOT / "recipes/smollm2/calibrate.yaml"), "--max_length", "448", *way]
    begun = time.monotonic()
    if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit(status)  # The verb has said why.
    made = json.loads((folder / "thresholds.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    line = {name: made[name] for name in ("values", "sample_size", "realised_fpr", "held_out_size")}
    line["seconds"] = round(time.monotonic() - begun)
    print(f"{way}: {line}", file=sys.stderr, flush=True)
    return line


def speed(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Plain, with the fields, `redflag serve`, halt in the engine."""
    options = ["--rounds", arguments.rounds, "--streams", *arguments.streams, "--tokens", arguments.tokens]
    options += ["--vllm", arguments.vllm]
    engine = f"--dtype {arguments.dtype} --enforce-eager --max-model-len 512"
    return bench("serve", "--model", model, *options, f"--vllm-arguments={engine}")


def soak(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """32 clients for minutes, the engine killed twice."""
    options = ["--seconds", 60 * arguments.minutes, "--clients", 32, "--vllm", arguments.vllm, "--kills", 2]
    options += ["--tokens", arguments.tokens, "--threshold", arguments.threshold, "--request-timeout", 90]
    options += ["--dtype", arguments.dtype]
    return bench("soak", "--model", model, *options)


STAGES: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "probabilities": probabilities,
    "thresholds": thresholds,
    "speed": speed,
    "soak": soak,
}

if __name__ == "__main__":
    main()
