"""A discriminator's folder from a dense model: `prism upcycle`."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import Qwen3VLForConditionalGeneration

from prism.config import Config
from prism.discriminator.model import Discriminator
from prism.discriminator.storage import save_discriminator
from prism.discriminator.upcycle import UpcycleReport, measure_upcycle, upcycle
from prism.models.building import device_of, load_dense, load_encoder, plain_policy
from prism.models.prompts import PLACEHOLDER, Message, PromptEncoder
from prism.worlds.shapes.problems import problem_of
from prism.worlds.shapes.world import ShapesWorld

# questions of the embedded world on whose images and answers the change is measured: one chat, so nothing is padded
QUESTIONS = 8


def write_discriminator(config: Config) -> UpcycleReport:
    """Returns by how much the function changed of the discriminator that it writes, untrained, as the settings say.

    It is what a run would upcycle: of model.discriminator, or where that is `policy`, of model.policy.
    """
    wanted, folder = config.discriminator, Path(config.run.folder)
    dense, encoder = _dense(config)
    model = upcycle(
        dense, wanted.experts, wanted.top_k, noise=wanted.noise, router_std=wanted.router_std, seed=config.run.seed
    )
    batch = {name: value.to(dense.device) for name, value in _batch(encoder).items()}
    # before the discriminator sets its attention to packs
    report = measure_upcycle(dense, model, batch, wanted.noise)
    done = save_discriminator(
        Discriminator(model, images=wanted.images, kind_bias=wanted.kind_bias), folder / "discriminator"
    )
    (folder / "upcycle.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    _print(config, report, len(batch["input_ids"][0]))
    Console().print(f"the discriminator is in {done}: --model.discriminator {done}", soft_wrap=True, highlight=False)
    return report


def _dense(config: Config) -> tuple[Qwen3VLForConditionalGeneration, PromptEncoder]:
    named = config.model.discriminator
    if named == "policy":
        return plain_policy(config)
    dense = load_dense("model.discriminator", named, getattr(torch, config.model.dtype))
    torch.nn.Module.to(dense, device_of(config))
    return dense, load_encoder(named, config.model.max_image_pixels)


def _batch(encoder: PromptEncoder) -> dict[str, torch.Tensor]:
    """Returns a chat about images of the embedded world, as transformers' processor would."""
    problems = [problem_of(sample) for sample in ShapesWorld().samples("validation", QUESTIONS)]
    messages: list[Message] = []
    for problem in problems:
        messages += [
            {"role": "user", "content": f"{PLACEHOLDER}{problem.prompt}"},
            {"role": "assistant", "content": problem.teacher},
        ]
    prompt = encoder.encode(messages, [image for problem in problems for image in problem.images])
    assert prompt.pixel_values is not None and prompt.image_grid_thw is not None, "the chat has images"
    ids = torch.tensor([prompt.input_ids])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == encoder.image_token_id).int(),
        "pixel_values": prompt.pixel_values,
        "image_grid_thw": prompt.image_grid_thw,
    }


def _print(config: Config, report: UpcycleReport, tokens: int) -> None:
    wanted, console = config.discriminator, Console()
    made = f"{wanted.experts} experts, {wanted.top_k} a token, noise {report.noise:g} of each weight's deviation"
    console.print(f"{made}; change over {tokens} tokens with images, root mean squares:", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("behind")
    table.add_column("change", justify="right")
    rows = {f"layer {index}": change for index, change in enumerate(report.layer_change, 1)}
    rows |= {"the final norm": report.hidden_change}
    if report.logit_change is not None:
        rows["the head"] = report.logit_change
    for name, change in rows.items():
        table.add_row(name, f"{change:.3%}")
    console.print(table)
