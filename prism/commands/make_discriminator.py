"""`prism upcycle`: writes the folder of a discriminator that is made from a dense model."""

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
from prism.models.prompts import Message, PromptEncoder
from prism.models.vocabulary import PLACEHOLDER
from prism.worlds.shapes.problems import problem_of
from prism.worlds.shapes.world import ShapesWorld

# the change is measured on one chat of this many questions of the embedded world, so that nothing is padded
QUESTIONS = 8


def write_discriminator(config: Config) -> UpcycleReport:
    """Writes the discriminator with which a run would begin, and returns how much upcycling changed its function.

    It is made from model.discriminator, or from model.policy where that is `policy`.
    """
    settings, folder = config.discriminator, Path(config.run.folder)
    dense, encoder = _dense(config)
    model = upcycle(
        dense,
        settings.experts,
        settings.top_k,
        noise=settings.noise,
        router_std=settings.router_std,
        seed=config.run.seed,
    )
    batch = {name: value.to(dense.device) for name, value in _batch(encoder).items()}
    # measured before Discriminator makes its attention one of packs
    report = measure_upcycle(dense, model, batch, settings.noise)
    discriminator = Discriminator(model, images=settings.images, kind_bias=settings.kind_bias)
    path = save_discriminator(discriminator, folder / "discriminator")
    (folder / "upcycle.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    _print(config, report, len(batch["input_ids"][0]))
    Console().print(f"the discriminator is in {path}: --model.discriminator {path}", soft_wrap=True, highlight=False)
    return report


def _dense(config: Config) -> tuple[Qwen3VLForConditionalGeneration, PromptEncoder]:
    name = config.model.discriminator
    if name == "policy":
        return plain_policy(config)
    dense = load_dense("model.discriminator", name, getattr(torch, config.model.dtype))
    torch.nn.Module.to(dense, device_of(config))
    return dense, load_encoder("model.discriminator", name, config.model.max_image_pixels)


def _batch(encoder: PromptEncoder) -> dict[str, torch.Tensor]:
    """Returns a chat about images of the embedded world, in the form of transformers' processor."""
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
    settings, console = config.discriminator, Console()
    made = f"{settings.experts} experts, {settings.top_k} a token, noise {report.noise:g} of each weight's deviation"
    console.print(f"{made}; change over {tokens} tokens with images, root mean squares:", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("after")
    table.add_column("change", justify="right")
    rows = {f"layer {index}": change for index, change in enumerate(report.layer_change, 1)}
    rows |= {"the final norm": report.hidden_change}
    if report.logit_change is not None:
        rows["the head"] = report.logit_change
    for name, change in rows.items():
        table.add_row(name, f"{change:.3%}")
    console.print(table)
