#!/usr/bin/env python3
"""Peak memory and time of the loss, in chunks against the naive way that holds all logits.

    python scripts/bench/loss.py                       # 1,024 positions, vocabulary 151,936, hidden 896, float32, CPU

Forward and backward of flag term + keep term from the same hidden states; the head is frozen, flag rows are trained, as
in LoRA. Each way runs in a process of its own. Prints one JSON object; memory is above what stood before the loss.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--one", choices=["chunked", "naive"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments)))
        return
    found = {}
    for kind in ("chunked", "naive"):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", kind], capture_output=True, text=True, check=True
        )
        found[kind] = json.loads(done.stdout)
    assert abs(found["chunked"]["loss"] - found["naive"]["loss"]) < 1e-3, found
    found["memory_ratio"] = found["chunked"]["peak_mib"] / found["naive"]["peak_mib"]
    print(json.dumps(found))


def run_one(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    from redflag.training.loss import Head, flag_and_keep_loss

    torch.manual_seed(0)
    n, v, h = arguments.positions, arguments.vocabulary, arguments.hidden
    weight, rows = torch.randn(v, h).div_(h**0.5), torch.randn(1, h).div_(h**0.5).requires_grad_()
    hidden, reference = torch.randn(n, h).requires_grad_(), torch.randn(n, h)
    flag_ids, flag_labels = torch.tensor([v - 1]), torch.randint(0, 2, (n,))
    labels, weights = torch.randint(0, v - 1, (n,)), torch.full((n,), 1 / n)
    before, start = peak_mib(), time.perf_counter()
    if arguments.one == "chunked":
        loss, _ = flag_and_keep_loss(
            hidden,
            reference,
            Head(weight, rows),
            Head(weight),
            flag_ids,
            flag_labels,
            labels,
            weights,
            weights,
        )
    else:
        z = (hidden @ weight.T).index_copy(1, flag_ids, hidden @ rows.T)
        z_ref = reference @ weight.T
        language = torch.ones(v, dtype=torch.bool).index_fill(0, flag_ids, False)
        classes = torch.stack([z[:, language].logsumexp(1), z[:, flag_ids[0]]], 1)
        log_q, log_p = z[:, language].log_softmax(1), z_ref[:, language].log_softmax(1)
        keep = (log_p.exp() * (log_p - log_q)).sum(1)
        loss = torch.nn.functional.cross_entropy(classes, flag_labels) + keep.mean()
    loss.backward()
    return {"loss": loss.item(), "seconds": time.perf_counter() - start, "peak_mib": peak_mib() - before}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
