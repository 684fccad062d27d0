"""`make demo-op`: compares plain PyTorch with `linear_logprob`: numbers, error, time and peak memory.

It needs torch and matplotlib, takes under two minutes on two cores, and writes out/demo.png.
"""

from pathlib import Path
from typing import Any

import torch

from bench.cases import CONFIDENT_EVERY, TRAIN, Case
from bench.measure import Bench, measure_together
from bench.plot import draw
from bench.registry import OUR_BACKENDS, Contender, contenders
from bench.results import MIB, document, machine
from prism_kernels.backend import resolve

CASES = {
    "cpu": Case("demo", "linear_logprob", 1024, 32768, 256, "float32"),
    "cuda": Case("demo", "linear_logprob", 4096, 151936, 2560, "bfloat16"),
}
LIMIT_S = 25.0
PICTURE = Path("out/demo.png")
PLAIN = "PyTorch"


def chosen(device: str) -> list[Contender]:
    """Returns plain PyTorch, and ours on its default backend with and without the cache."""
    backend = resolve("linear_logprob", torch.device(device))
    ours = f"ours, {OUR_BACKENDS[backend]}"
    known = {c.name: c for c in contenders("linear_logprob", device)}
    return [known[name] for name in (PLAIN, ours, f"{ours}, cache_bytes=0")]


def tokens(bench: Bench, pair: list[Contender]) -> str:
    """Returns a table of a few tokens' log-probabilities: exact, and from two contenders."""
    exact = bench.truth(TRAIN).logp
    found = [bench.stage.run(c.load(), TRAIN)[0].double() for c in pair]
    bench.stage.setup(False)
    # the least and the most confident tokens, and their ordinary neighbours
    sure = exact[::CONFIDENT_EVERY].argsort(descending=True) * CONFIDENT_EVERY
    picked = [*(sure[i] + 1 for i in (0, 1)), *(sure[i] for i in (-1, sure.numel() // 2, 0))]
    lines = [f"{'log-probability of':<22}{'exact (float64)':>18}" + "".join(f"{c.name:>18}" for c in pair)]
    for row in picked:
        name = "a confident token" if row % CONFIDENT_EVERY == 0 else "a token"
        lines.append(f"{name:<22}{exact[row]:18.8g}" + "".join(f"{f[row]:18.8g}" for f in found))
    apart = (found[0] - found[1]).abs().max()
    lines.append(f"largest difference between the two, over all {exact.numel()} tokens: {apart:.1e}")
    return "\n".join(lines)


def figures(rows: list[dict[str, Any]]) -> str:
    """Returns a table of the measured rows."""
    lines = [f"{'':<26}{'time':>10}{'memory':>12}{'error of logp':>16}{'confident tokens: logp':>25}{'gradient':>12}"]
    for row in rows:
        found = row["errors"]
        lines.append(
            f"{row['contender']:<26}{1e3 * row['median_s']:7.0f} ms{row['peak_extra_bytes'] / MIB:8.0f} MiB"
            f"{found['logp']:16.1e}{found['logp_confident']:25.1e}{found['gradient_confident']:12.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and draws."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case, pair = CASES[device], chosen(device)
    print(f"log-probabilities of {case.rows} tokens, forward and backward, on {machine(device)}: {case.label()}")
    print(f"plain PyTorch: log_softmax of hidden @ weight.T, then gather; {pair[1].name}: linear_logprob\n", flush=True)
    bench = Bench(case, device)
    print(tokens(bench, pair[:2]) + "\n", flush=True)
    rows = measure_together(bench, pair, LIMIT_S, passes=(TRAIN,))
    for row in rows:
        if "errors" not in row:
            raise SystemExit(f"bench.demo: {row['contender']}: {row['status']}")
    print(figures(rows))
    print("\nmemory: peak beyond inputs and gradients. errors: against float64; for confident tokens (1 - p between")
    print("1e-9 and 1e-3) relative: at 1 no digit is right.")
    draw(document("linear_logprob", device, [case], rows, with_bars=False), PICTURE)
    print(f"\nthe picture: {PICTURE.resolve()}")


if __name__ == "__main__":
    main()
