"""Speed of the engine and of transformers' `generate`, on the tiny policy with one image a prompt.

`python -m bench.end_to_end.rollout` prints a line for each, after a check that greedy responses are equal. Every
response has the full length, so that both do the same work. `generate` returns only tokens, the engine also their
log-probabilities.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.timing import Timed, interleave
from prism.models.packed import batch_images
from prism.models.prompts import EncodedPrompt, join_images
from prism.models.tiny import tiny_policy
from prism.models.vocabulary import IMAGE_TOKEN
from prism.rollout.engine import Engine
from prism.rollout.options import Sampling


@dataclass(frozen=True)
class Shape:
    """What is generated."""

    prompts: int = 8
    n: int = 4
    new_tokens: int = 64
    # text tokens of the shortest prompt; each further prompt has three more
    text: int = 40
    # patches along each side of the image
    image_side: int = 8


class Duel:
    """The sizes of the work, the same for both."""

    def __init__(self, shape: Shape, device: str, path: str | None) -> None:
        self.shape, self.device = shape, device
        model, self.tokenizer = tiny_policy()
        # larger weights than at initialisation, so that greedy choices are not near-ties
        torch.nn.init.normal_(model.lm_head.weight, std=0.3)
        self.model = model.to(device)
        batch_images(self.model.model.visual)
        self.prompts = make_prompts(shape, self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        self.engine = Engine(self.model, self.tokenizer, path=path)
        self.sampling = Sampling(group=shape.n, max_new_tokens=shape.new_tokens)
        self.inputs = padded(self.prompts, self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), device)

    def ours(self, sampling: Sampling | None = None) -> list[list[int]]:
        """Returns the engine's responses."""
        found = self.engine.generate(self.prompts, sampling or self.sampling, stop_token_ids=())
        return [rollout.token_ids for rollout in found]

    def stock(self, sampling: Sampling | None = None) -> list[list[int]]:
        """Returns `generate`'s responses."""
        sampling = sampling or self.sampling
        chance = {"do_sample": False} if sampling.temperature == 0 else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        tokens = self.model.generate(
            **self.inputs,
            **chance,
            num_return_sequences=sampling.group,
            min_new_tokens=sampling.max_new_tokens,
            max_new_tokens=sampling.max_new_tokens,
            suppress_tokens=sorted(self.engine.banned_token_ids(())),
        )
        return tokens[:, self.inputs["input_ids"].shape[1] :].tolist()


def make_prompts(shape: Shape, image_token: int) -> list[EncodedPrompt]:
    """Returns prompts of random text, each with its own image before the text."""
    rng = torch.Generator().manual_seed(0)
    side = shape.image_side
    grid = torch.tensor([[1, side, side]])
    return [
        EncodedPrompt(
            [image_token] * (side * side // 4) + torch.randint(0, 250, (shape.text + 3 * p,), generator=rng).tolist(),
            torch.randn(side * side, 1536, generator=rng),
            grid,
        )
        for p in range(shape.prompts)
    ]


def padded(prompts: list[EncodedPrompt], image_token: int, device: str) -> dict[str, Tensor]:
    """Returns the inputs of `generate`: prompts padded on the left."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(p.input_ids)) + p.input_ids for p in prompts])
    lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    pixels, grids = join_images(prompts)
    assert pixels is not None and grids is not None
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == image_token).int()}
    return {name: x.to(device) for name, x in {**inputs, "pixel_values": pixels, "image_grid_thw": grids}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--path", choices=("lean", "stock"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    arguments = parser.parse_args()
    shape = Shape()
    duel = Duel(shape, arguments.device, arguments.path)
    greedy = replace(duel.sampling, group=1, temperature=0.0)
    if duel.ours(greedy) != duel.stock(greedy):
        raise SystemExit("greedy responses differ: no speed is reported")
    calls = {f"engine, {duel.engine.path}": Timed(duel.ours), "transformers generate": Timed(duel.stock)}
    durations = interleave(calls, arguments.device, rounds=arguments.rounds)
    tokens = shape.prompts * shape.n * shape.new_tokens
    medians = {name: statistics.median(times) for name, times in durations.items()}
    ours, stock = medians.values()
    report = {
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "rollouts": shape.prompts * shape.n,
        "new_tokens": shape.new_tokens,
        "tokens_per_second": {name: round(tokens / time) for name, time in medians.items()},
        "step_ms": {name: round(1e3 * time / shape.new_tokens, 3) for name, time in medians.items()},
        "speedup": round(stock / ours, 2),
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(
        f"{report['rollouts']} rollouts of {shape.new_tokens} tokens, {report['device']}, {report['threads']} threads"
    )
    for name in medians:
        print(f"{name:24} {report['tokens_per_second'][name]:8,} tokens/s  {report['step_ms'][name]:7.3f} ms a step")
    print(f"speedup {report['speedup']}")


if __name__ == "__main__":
    main()
