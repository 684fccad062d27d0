"""A step of TRL's GRPOTrainer with and without our head: time and peak memory, each side in processes of its own.

`python -m bench.end_to_end.trl_patch`, in the environment of TRL (`make test-peers` makes it: .venv-trl). A step is
forward, loss, backward, clipping and AdamW on completions that are there already, since sampling is not touched by the
patch; with --sample each step samples its completions too. Two trainers take steps in turns; two others, one after the
other, tell the peak of their resident set.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.timing import PeakMemory

PUBLISHED, PATCHED = "TRL", "TRL with our patch"
# both sides compute the same in fp32
TOLERANCE = 1e-4
STEP_LIMIT, MEMORY_LIMIT = 0.8, 1.0


@dataclass(frozen=True)
class Sizes:
    """A vision-language model of which the head is nearly all, and the completions of one prompt with an image."""

    vocabulary: int = 151936
    width: int = 256
    layers: int = 2
    completions: int = 4
    tokens: int = 512
    sample: bool = False


def make_trainer(sizes: Sizes, callback: Any, steps: int, folder: str) -> Any:
    """Returns a GRPOTrainer on a random Qwen3-VL."""
    from datasets import Dataset
    from PIL import Image
    from transformers import ProcessorMixin
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from trl import GRPOConfig, GRPOTrainer

    from prism.models.tiny import TinySize, tiny_image_processor, tiny_policy

    class Processor(Qwen3VLProcessor):
        """For images alone: the part for videos needs torchvision."""

        def __init__(self, image_processor: Any, tokenizer: Any) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            names = [self.image_token, self.video_token]
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(names)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=tokenizer.chat_template)

    class Trainer(GRPOTrainer):
        """Whose completions are random tokens, unless they are to be sampled."""

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
        # so low that no ratio comes near the clip range, where one rounding decides whether a token counts
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

    processor = Processor(tiny_image_processor(size), tokenizer)
    data = Dataset.from_list(rows * 8)
    return Trainer(model, reward, args, train_dataset=data, processing_class=processor, callbacks=[callback])


class Side:
    """A child process with one trainer, which takes a step when told."""

    def __init__(self, sizes: Sizes, patched: bool, memory: bool, steps: int) -> None:
        spec = json.dumps({"sizes": asdict(sizes), "patched": patched, "memory": memory, "steps": steps})
        environment = results.memory_environment() if memory else dict(os.environ)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.end_to_end.trl_patch", "--child", spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        )

    def step(self) -> dict[str, float]:
        """Returns what a step took, and its loss."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the trainer's process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def child(spec: dict[str, Any]) -> None:
    """Trains, a step for each line that comes."""
    from transformers import TrainerCallback

    from prism_kernels.integrations import trl

    # what libraries print must not be taken for an answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                raise SystemExit("the parent is gone")
            self.peak = PeakMemory("cpu")
            if spec["memory"]:
                self.peak.__enter__()
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.found = {"seconds": time.perf_counter() - self.begin}
            if spec["memory"]:
                self.peak.__exit__()
                self.found |= {"peak_extra_bytes": self.peak.bytes, "peak_bytes": self.peak.peak}

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "grad_norm" in logs:
                answers.write(json.dumps(self.found | {key: logs[key] for key in ("loss", "grad_norm")}) + "\n")
                answers.flush()

    with tempfile.TemporaryDirectory() as folder, trl.patch() if spec["patched"] else nullcontext():
        make_trainer(Sizes(**spec["sizes"]), Turns(), spec["steps"], folder).train()


def measure(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Returns the content of the result file."""
    steps = rounds + 1
    sides = {name: Side(sizes, name == PATCHED, False, steps) for name in (PUBLISHED, PATCHED)}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    try:
        for count in range(steps):
            order = list(sides.items())
            for name, side in order if count % 2 == 0 else reversed(order):
                taken[name].append(side.step())
    finally:
        for side in sides.values():
            side.close()
    agree(taken)
    rows = []
    for name, found in taken.items():
        memory = Side(sizes, name == PATCHED, True, 2)
        try:
            peak = [memory.step() for _ in range(2)][-1]
        finally:
            memory.close()
        # the first step warms up, and makes the completions
        samples = [step["seconds"] for step in found[1:]]
        row = {"contender": name, "median_s": statistics.median(samples), "samples_s": samples}
        rows.append(row | {key: peak[key] for key in ("peak_bytes", "peak_extra_bytes")})
    theirs, ours = rows
    bars = [
        results.bar("step time over TRL's", "<=", STEP_LIMIT, ours["median_s"] / theirs["median_s"]),
        results.bar("peak memory over TRL's", "<=", MEMORY_LIMIT, ours["peak_bytes"] / theirs["peak_bytes"]),
    ]
    title = f"{sizes.completions} completions of {sizes.tokens} tokens, V={sizes.vocabulary}, D={sizes.width}, fp32"
    title += ", sampling included" if sizes.sample else ""
    return {**results.header(op(sizes), "cpu"), "label": title, "sizes": asdict(sizes), "rows": rows, "bars": bars}


def op(sizes: Sizes) -> str:
    """Returns the name of the result."""
    return "trl_patch_sampling" if sizes.sample else "trl_patch"


def agree(taken: dict[str, list[dict[str, float]]]) -> None:
    """Refuses times of steps that did not compute the same."""
    for theirs, ours in zip(taken[PUBLISHED], taken[PATCHED]):
        for key in ("loss", "grad_norm"):
            if abs(theirs[key] - ours[key]) > TOLERANCE * max(abs(theirs[key]), TOLERANCE):
                raise RuntimeError(f"the two sides differ in {key}: {theirs[key]} and {ours[key]}")


def table(content: dict[str, Any]) -> str:
    """Returns a plain text table."""
    lines = [f"a step of GRPOTrainer, {content['label']}"]
    for row in content["rows"]:
        peak, extra = row["peak_bytes"] / results.MIB, row["peak_extra_bytes"] / results.MIB
        lines.append(
            f"  {row['contender']:<20} {row['median_s']:8.3f} s {peak:9.0f} MiB, of which the step {extra:.0f}"
        )
    return "\n".join([*lines, *results.bar_lines(content["bars"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in asdict(Sizes()).items():
        kind = {"action": "store_true"} if isinstance(default, bool) else {"type": int, "default": default}
        parser.add_argument(f"--{name}", **kind)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="folder of the JSON instead of bench/results/<machine>")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    if given.pop("child") is not None:
        child(json.loads(sys.argv[2]))
        return
    rounds, out = given.pop("rounds"), given.pop("out")
    content = measure(Sizes(**given), rounds)
    folder = results.RESULTS / results.machine("cpu") if out is None else Path(out)
    results.write(folder / f"{content['op']}.json", content)
    print(table(content))


if __name__ == "__main__":
    main()
