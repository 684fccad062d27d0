"""CPU time of one call of each public op on tiny inputs: the cost of everything but the numbers.

Run: python -m bench.overhead [--against PATH] [--ops linear_logprob ...] [--json PATH]
PATH is the root of another checkout, whose processes take turns with this one's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import prism_kernels as pk
from prism_kernels.packing import Branch, Kind, PrefixGroup, build_pack

ROOT = Path(__file__).resolve().parent.parent
FORWARD, TRAIN = "forward", "forward+backward"
T, V, D, E, K = 8, 64, 16, 4, 2
# the calls of a sample, and the samples of a process
CALLS, SAMPLES = 20, 60


def calls() -> Iterator[tuple[str, Callable[[], Tensor | None]]]:
    """Yields each op's name and a call, which returns a scalar to differentiate, or None where there is no gradient."""
    rng = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).requires_grad_()

    hidden, weight, bias, logits = leaf(T, D), leaf(V, D), leaf(V), leaf(T, V)
    target = torch.randint(0, V, (T,), generator=rng)
    logp, old, advantage = leaf(T), -torch.rand(T, generator=rng), torch.randn(2, generator=rng)
    cu_seqlens, group = torch.tensor([0, T // 2, T], dtype=torch.int32), torch.arange(T) // 4
    router, gate_up, down, x = leaf(E, D), leaf(E, 2 * D, D), leaf(E, D, D), leaf(T, D)
    pack = build_pack([PrefixGroup(range(4), [Branch(range(2), Kind.REASONING)] * 2)])
    q, k, v = leaf(T, 2, D), leaf(T, 1, D), leaf(T, 1, D)
    constant = old.clone()
    routing = pk.Routing.from_topk(torch.arange(T * K).view(T, K) % E, torch.ones(T, K) / K, E)

    yield "linear_logprob", lambda: pk.linear_logprob(hidden, weight, target, bias=bias).logp.sum()
    yield "token_logprob", lambda: pk.token_logprob(logits, target).logp.sum()
    yield (
        "linear_policy_loss",
        lambda: pk.linear_policy_loss(hidden, weight, target, old, advantage, cu_seqlens, bias=bias)[0],
    )
    yield "policy_loss", lambda: pk.policy_loss(logp, old, advantage, cu_seqlens)[0]
    yield "group_advantage", lambda: (pk.group_advantage(constant, group), None)[1]
    yield "prism_advantage", lambda: (pk.prism_advantage(constant, constant, group), None)[1]
    yield "pair_loss", lambda: pk.pair_loss(logp, logp + 1)[0]
    yield "moe_route", lambda: pk.moe_route(x, router, K).weight.sum()
    yield "moe_experts", lambda: pk.moe_experts(x, routing, gate_up, down).sum()
    yield "prefix_attention", lambda: pk.prefix_attention(q, k, v, pack).sum()


def measure(chosen: list[str]) -> dict[str, float]:
    """Returns the median microseconds of a call, by op and pass."""
    torch.set_num_threads(1)
    medians = {}
    for op, call in calls():
        if chosen and op not in chosen:
            continue

        def train(call: Callable[[], Tensor | None] = call) -> None:
            loss = call()
            if loss is not None:
                loss.backward()

        differentiable = call() is not None
        for name, run in ((FORWARD, call), (TRAIN, train)):
            if name == TRAIN and not differentiable:
                continue
            samples = []
            for _ in range(SAMPLES + 5):
                begin = time.thread_time()
                for _ in range(CALLS):
                    run()
                samples.append((time.thread_time() - begin) / CALLS * 1e6)
            medians[f"{op}, {name}"] = statistics.median(samples[5:])
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", type=Path, help="root of another checkout to compare with")
    parser.add_argument("--ops", nargs="*", default=[], help="measure these ops only")
    parser.add_argument("--turns", type=int, default=5, help="processes of each checkout")
    parser.add_argument("--json", type=Path, help="write the medians to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.ops)))
        return
    roots = {"this": ROOT} | ({"other": args.against.resolve()} if args.against else {})
    command = [sys.executable, "-P", __file__, "--child", "--ops", *args.ops]
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for turn in range(args.turns):
        # every other turn backwards, so that none always follows the other
        for name, root in sorted(roots.items(), reverse=turn % 2 == 1):
            child = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, check=True)
            turns[name].append(json.loads(child.stdout))
    rows = {key: {n: statistics.median(t[key] for t in turns[n]) for n in roots} for key in turns["this"][0]}
    for key, row in rows.items():
        ratio = f" x {row['this'] / row['other']:.3f}" if "other" in row else ""
        print(f"{key:<40}" + "".join(f"{name} {value:8.1f} us  " for name, value in row.items()) + ratio)
    if args.json:
        args.json.write_text(json.dumps({"unit": "us", "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
