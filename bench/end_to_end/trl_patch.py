"""Time and peak memory of a step of TRL's GRPOTrainer with and without our head, in separate processes.

Run `python -m bench.end_to_end.trl_patch` in the environment of TRL, .venv-trl (`make test-peers` makes it). A step is
forward, loss, backward, clipping and AdamW on existing completions, because the patch does not touch sampling; with
--sample each step also samples its completions. Two trainers take steps in turns; two others, one after the other,
measure the peak of their resident set.
"""

import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench import results
from bench.end_to_end import turns
from bench.end_to_end.trl_step import callback, make_processor
from bench.end_to_end.turns import Said, Turn
from prism.models.sizes import TinySize
from prism.models.tiny import tiny_image_processor, tiny_policy

PUBLISHED, PATCHED = "TRL", "TRL with our patch"
# tolerance: both sides compute the same in fp32
TOLERANCE = 1e-4
STEP_LIMIT, MEMORY_LIMIT = 0.8, 1.0
# steps of the processes that measure memory: AdamW's moments exist from the second step on
MEMORY_STEPS = 2


@dataclass(frozen=True)
class Sizes:
    """The sizes of a vision-language model, nearly all of it head, and of the completions of one prompt."""

    vocabulary: int = 151936
    width: int = 256
    layers: int = 2
    completions: int = 4
    tokens: int = 512
    sample: bool = False


def make_trainer(sizes: Sizes, turn: Turn, steps: int, folder: str) -> Any:
    """Returns a GRPOTrainer on a random Qwen3-VL."""
    from datasets import Dataset
    from PIL import Image
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GRPOTrainer):
        """A trainer with random tokens as completions, unless it samples them."""

        def _generate_single_turn(self, prompt_ids: Any, *rest: Any) -> Any:
            if sizes.sample:
                return super()._generate_single_turn(prompt_ids, *rest)
            generator = torch.Generator().manual_seed(len(prompt_ids))
            # the tokens of text, below the special ones
            return torch.randint(0, 250, (len(prompt_ids), sizes.tokens), generator=generator).tolist(), None

    size = TinySize(hidden_size=sizes.width, intermediate_size=2 * sizes.width + 64, layers=sizes.layers, image_side=64)
    model, tokenizer = tiny_policy(size)
    torch.manual_seed(0)
    model.resize_token_embeddings(sizes.vocabulary, mean_resizing=False)
    args = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=sizes.completions,
        num_generations=sizes.completions,
        max_completion_length=sizes.tokens,
        num_iterations=1 if sizes.sample else steps,
        max_steps=steps,
        # so low that no ratio comes near the clip range, where a rounding would decide whether a token counts
        learning_rate=1e-5,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
    )
    content = [{"type": "image"}, {"type": "text", "text": "How many circles are there?"}]
    rows = [{"prompt": [{"role": "user", "content": content}], "images": [Image.new("RGB", (64, 64), (200, 30, 30))]}]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(place % 3) for place in range(len(completions))]

    def read(logs: dict[str, float]) -> Said:
        return {key: logs[key] for key in ("loss", "grad_norm")}

    processor = make_processor(tiny_image_processor(size), tokenizer)
    data = Dataset.from_list(rows * 8)
    return Trainer(
        model, reward, args, train_dataset=data, processing_class=processor, callbacks=[callback(turn, read)]
    )


def child(side: str, sizes: Sizes, steps: int, memory: bool) -> None:
    """Trains one step for each input line."""
    from prism_kernels.integrations import trl

    turn = Turn(memory)
    with tempfile.TemporaryDirectory() as folder, trl.patch() if side == PATCHED else nullcontext():
        make_trainer(sizes, turn, steps, folder).train()


def measure(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Returns the content of the result file."""
    match = turns.Match(__spec__.name, (PUBLISHED, PATCHED), sizes)
    # the first step warms up and makes the completions
    with match.both(rounds + 1) as sides:
        taken = turns.take_turns(sides, rounds + 1)
    agree(taken)
    rows = turns.rows(taken, match.peaks(MEMORY_STEPS))
    bars = [
        results.bar("step time over TRL's", "<=", STEP_LIMIT, turns.over(rows, "median_s")),
        results.bar("peak memory over TRL's", "<=", MEMORY_LIMIT, turns.over(rows, "peak_bytes")),
    ]
    title = f"{sizes.completions} completions of {sizes.tokens} tokens, V={sizes.vocabulary}, D={sizes.width}, fp32"
    title += ", sampling included" if sizes.sample else ""
    return {**results.header(op(sizes), "cpu"), "label": title, "sizes": asdict(sizes), "rows": rows, "bars": bars}


def op(sizes: Sizes) -> str:
    """Returns the name of the result."""
    return "trl_patch_sampling" if sizes.sample else "trl_patch"


def agree(taken: dict[str, list[Said]]) -> None:
    """Raises if the two sides did not compute the same."""
    for theirs, ours in zip(taken[PUBLISHED], taken[PATCHED]):
        for key in ("loss", "grad_norm"):
            if abs(theirs[key] - ours[key]) > TOLERANCE * max(abs(theirs[key]), TOLERANCE):
                raise RuntimeError(f"the two sides differ in {key}: {theirs[key]} and {ours[key]}")


if __name__ == "__main__":
    turns.main(__doc__, Sizes, child, measure, "a step of GRPOTrainer", rounds=5)
