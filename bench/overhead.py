"""CPU time of one call of each public op on tiny inputs: the cost of everything but the numbers.

Run: python -m bench.overhead [--against PATH] [--ops linear_logprob ...] [--json PATH]
PATH is the root of another checkout; a process of each takes samples in turns.
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
# ops without gradient
CONSTANT = ("group_advantage", "prism_advantage")
FORWARD, TRAIN = "forward", "forward+backward"
T, V, D, E, K = 8, 64, 16, 4, 2
# of a sample, and of an op
CALLS, SAMPLES = 10, 100


def calls() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yields each op's name and a call, which returns a scalar to differentiate unless the op is in CONSTANT."""
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
    yield "group_advantage", lambda: pk.group_advantage(constant, group)
    yield "prism_advantage", lambda: pk.prism_advantage(constant, constant, group)
    yield "pair_loss", lambda: pk.pair_loss(logp, logp + 1)[0]
    yield "moe_route", lambda: pk.moe_route(x, router, K).weight.sum()
    yield "moe_experts", lambda: pk.moe_experts(x, routing, gate_up, down).sum()
    yield "prefix_attention", lambda: pk.prefix_attention(q, k, v, pack).sum()


def serve() -> None:
    """Answers each line "op, pass" on stdin with the microseconds of a call."""
    torch.set_num_threads(1)
    known = dict(calls())
    for line in sys.stdin:
        op, pass_ = line.strip().split(", ")
        call, trains = known[op], pass_ == TRAIN
        begin = time.thread_time()
        for _ in range(CALLS):
            result = call()
            if trains:
                result.backward()
        print((time.thread_time() - begin) / CALLS * 1e6, flush=True)


def start(root: Path) -> subprocess.Popen[str]:
    """Returns a process that serves the package of one checkout."""
    command, environment = [sys.executable, "-P", __file__, "--serve"], os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(server: subprocess.Popen[str], name: str) -> float:
    """Returns a server's answer for an op and a pass."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{name}\n")
    server.stdin.flush()
    return float(server.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", type=Path, help="root of another checkout to compare with")
    parser.add_argument("--ops", nargs="*", help="measure these ops only")
    parser.add_argument("--json", type=Path, help="write the medians to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    servers = {"this": start(ROOT)} | ({"other": start(args.against.resolve())} if args.against else {})
    rows = {}
    ops = [op for op, _ in calls() if not args.ops or op in args.ops]
    for name in (f"{op}, {p}" for op in ops for p in ((FORWARD,) if op in CONSTANT else (FORWARD, TRAIN))):
        samples = [{who: ask(server, name) for who, server in servers.items()} for _ in range(SAMPLES + 5)]
        row = rows[name] = {who: statistics.median(sample[who] for sample in samples[5:]) for who in servers}
        ratio = f" x {row['this'] / row['other']:.3f}" if "other" in row else ""
        print(f"{name:<40}" + "".join(f"{who} {value:8.1f} us  " for who, value in row.items()) + ratio, flush=True)
    for server in servers.values():
        server.kill()
    if args.json:
        args.json.write_text(json.dumps({"unit": "us", "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
