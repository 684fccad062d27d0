"""Time and peak memory of a whole RLVR step, ours and TRL's: sampling, rewards, loss, backward, AdamW.

Run `python -m bench.end_to_end.trl_step` in the environment of TRL, .venv-trl (`make test-peers` makes it). Both sides
begin with the same random weights of the tiny policy and read the same prompts and images of the embedded world, step
by step, with the same rewards. They run as users call them: `GRPOTrainer.train` on transformers' model, and `generate`,
`reward`, `policy_update`. Every completion has the full length, because neither side may sample a token that ends it.
Two processes take steps in turns; two others, one after the other, measure the peak of their resident set.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

from bench import results
from bench.end_to_end import turns
from bench.end_to_end.turns import Said, Turn
from prism.config import Config, load_config
from prism.data.problem import Problem
from prism.models.policy import Policy
from prism.models.prompts import EncodedPrompt, PromptEncoder
from prism.models.tiny import tiny_image_processor, tiny_policy
from prism.rewards import score_batch
from prism.rollout.batch import generate
from prism.rollout.engine import Engine, Rollout
from prism.rollout.options import Sampling
from prism.runtime.optimiser import StageOptimiser
from prism.stages.rlvr import reward_rollouts
from prism.stages.update import policy_update
from prism.worlds.shapes.carelessness import Carelessness
from prism.worlds.shapes.problems import ShapesProblems
from prism.worlds.shapes.world import ShapesWorld
from prism_kernels import group_advantage

PUBLISHED, OURS = "TRL", "ours"
FASTER, MEMORY_LIMIT = 2.5, 1.0
# tolerance of the first step's entropies: both sides sample the same policy on the same prompts
ENTROPY_TOLERANCE = 0.1
# steps of the processes that measure memory: AdamW's moments exist from the second step on
MEMORY_STEPS = 3


@dataclass(frozen=True)
class Shape:
    """The sizes of a step, and the policy's learning rate."""

    prompts: int = 4
    group: int = 8
    tokens: int = 64
    lr: float = 5e-5
    # factor of the images' width and height over the world's images, which take 9 tokens
    enlarge: int = 1


def problems(shape: Shape, steps: int) -> list[Problem]:
    """Returns the problems of all steps, in the order of the steps."""
    count = shape.prompts * steps
    drawn = ShapesProblems(ShapesWorld(0, Carelessness()), "rl", count).take(range(count))
    wider = [tuple(image.resize([shape.enlarge * side for side in image.size], 0) for image in p.images) for p in drawn]
    return [replace(problem, images=images) for problem, images in zip(drawn, wider)]


def start() -> tuple[Qwen3VLForConditionalGeneration, Qwen2Tokenizer]:
    """Returns both sides' initial random policy, and its tokenizer."""
    model, tokenizer = tiny_policy()
    # a larger head than at initialisation, so that the logits differ
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model, tokenizer


def variety(texts: Sequence[str]) -> list[float]:
    """Returns small rewards for distinct characters: random responses are all wrong, but rewards must differ."""
    return [0.01 * len(set(text)) for text in texts]


class FullLength(Engine):
    """An engine whose responses never stop: tokens that end them are banned, like the other special tokens."""

    def generate(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, **options: Any) -> list[Rollout]:
        return super().generate(prompts, sampling, **{**options, "stop_token_ids": ()})


def settings(shape: Shape, steps: int) -> Config:
    """Returns the default settings with the sizes of the step, TRL's weight decay, and no KL term (TRL's beta is 0)."""
    sizes = {"prompts": shape.prompts, "group": shape.group, "max_new_tokens": shape.tokens}
    optimiser = {"lr": shape.lr, "steps": steps, "weight_decay": 0.0}
    given = {f"rollout.rlvr.{key}": value for key, value in sizes.items()}
    given |= {f"optimiser.rlvr.{key}": value for key, value in optimiser.items()}
    return load_config(None, given | {"run.device": "cpu", "algorithm.rlvr.kl_coef": 0.0})


def our_steps(shape: Shape, steps: int) -> Iterator[Callable[[], Said]]:
    """Yields our steps."""
    config = settings(shape, steps)
    model, tokenizer = start()
    encoder = PromptEncoder(tokenizer, tiny_image_processor())
    policy, engine = Policy(model), FullLength(model, tokenizer)
    optimiser = StageOptimiser(policy, config.optimiser.rlvr, steps)
    algorithm, sampling = config.algorithm.rlvr, config.rollout.rlvr
    data = problems(shape, steps)
    policy.train()

    def step(index: int) -> Said:
        own = data[index * shape.prompts : (index + 1) * shape.prompts]
        batch = generate(engine, own, encoder, sampling, seed=index)
        value = reward_rollouts(batch, config).total + torch.tensor(variety(batch.texts))
        logged = policy_update(
            policy,
            batch,
            group_advantage(value, batch.group, **algorithm.advantage_options()),
            encoder,
            optimiser,
            algorithm,
            config.memory,
            temperature=sampling.temperature,
            longest=sampling.max_new_tokens,
            responses=config.optimiser.rlvr.batch,
        )
        optimiser.next_rate()
        read = sum(len(batch.prompts[rollout.prompt].input_ids) for rollout in batch.rollouts)
        return {
            "loss": logged["loss"],
            "grad_norm": logged["grad_norm"],
            "entropy": logged["entropy"],
            "shortest": float(batch.lengths.min()),
            "tokens": float(read + batch.lengths.sum()),
        }

    for index in range(steps):
        yield lambda index=index: step(index)


def make_processor(image_processor: Any, tokenizer: Any) -> Any:
    """Returns the Qwen3-VL processor that TRL needs."""
    from transformers import ProcessorMixin
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    class Processor(Qwen3VLProcessor):
        """A processor for images only; the part for videos needs torchvision."""

        def __init__(self, image_processor: Any, tokenizer: Any) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            names = [self.image_token, self.video_token]
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(names)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=tokenizer.chat_template)

    return Processor(image_processor, tokenizer)


def make_trainer(shape: Shape, steps: int, folder: str, **options: Any) -> Any:
    """Returns TRL's trainer with the same policy, prompts, rewards and settings.

    Args:
        shape: the sizes of the step.
        steps: the number of steps.
        folder: the trainer's output folder.
        options: further options of the trainer.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = start()
    # loaded as by TRL, which uses the processor's padded image tokens
    tokenizer.padding_side = "left"
    args = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=shape.prompts * shape.group,
        num_generations=shape.group,
        max_completion_length=shape.tokens,
        # tokens that end a completion, and vision tokens
        generation_kwargs={"suppress_tokens": sorted(Engine(model, tokenizer).banned_token_ids(()))},
        temperature=1.0,
        beta=0.0,
        # a mean over all tokens of the step
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.2,
        max_steps=steps,
        learning_rate=shape.lr,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        shuffle_dataset=False,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        # checkpointing would trade time for memory; ours does not use it either
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": problem.prompt}]}],
            "images": list(problem.images),
            "gold": problem.answer,
        }
        for problem in problems(shape, steps)
    ]

    def worth(completions: list[Any], gold: list[str], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [v.score + more for v, more in zip(score_batch(texts, gold), variety(texts))]

    processor = make_processor(tiny_image_processor(), tokenizer)
    return GRPOTrainer(model, worth, args, train_dataset=Dataset.from_list(rows), processing_class=processor, **options)


def child(side: str, shape: Shape, steps: int, memory: bool) -> None:
    """Trains one step for each input line."""
    turn = Turn(memory)
    if side == OURS:
        for step in our_steps(shape, steps):
            turn.begin()
            said = step()
            turn.end()
            turn.say(said)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(shape, steps, folder, callbacks=[callback(turn, Reader())]).train()


def callback(turn: Turn, read: Callable[[dict[str, float]], Said]) -> Any:
    """Returns a callback that makes TRL's trainer take turns; `read` turns the log of a step into its report."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            # the last log covers the whole training
            if "grad_norm" in logs:
                turn.say(read(logs))

    return Turns()


class Reader:
    """Returns TRL's log of a step under our names; TRL's count of tokens is cumulative."""

    def __init__(self) -> None:
        self.tokens = 0.0

    def __call__(self, logs: dict[str, float]) -> Said:
        before, self.tokens = self.tokens, logs["num_tokens"]
        said = {key: logs[key] for key in ("loss", "grad_norm", "entropy")}
        return {**said, "shortest": logs["completions/min_length"], "tokens": self.tokens - before}


def agree(shape: Shape, taken: dict[str, list[Said]]) -> None:
    """Raises if the two sides did not do the same work."""
    for name, reports in taken.items():
        for said in reports:
            if said["shortest"] != shape.tokens:
                raise RuntimeError(f"{name}: expected completions of {shape.tokens} tokens, got {said['shortest']:g}")
            if not said["grad_norm"] > 0:
                raise RuntimeError(f"{name}: expected a gradient, got one of norm {said['grad_norm']}")
    for theirs, ours in zip(taken[PUBLISHED], taken[OURS]):
        if theirs["tokens"] != ours["tokens"]:
            raise RuntimeError(f"the sides read other prompts: {theirs['tokens']:g} and {ours['tokens']:g} tokens")
    first = [taken[name][0]["entropy"] for name in (PUBLISHED, OURS)]
    if abs(first[0] - first[1]) > ENTROPY_TOLERANCE * first[0]:
        raise RuntimeError(f"the sides sampled other policies: entropies {first[0]} and {first[1]}")


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Returns the content of the result file."""
    match = turns.Match(__spec__.name, (PUBLISHED, OURS), shape)
    with match.both(rounds + 1) as sides:
        taken = turns.take_turns(sides, rounds + 1)
    agree(shape, taken)
    rows = turns.rows(taken, match.peaks(MEMORY_STEPS))
    bars = [
        results.bar("times faster than TRL's step", ">=", FASTER, 1 / turns.over(rows, "median_s")),
        results.bar("peak memory over TRL's", "<=", MEMORY_LIMIT, turns.over(rows, "peak_bytes")),
        results.bar(
            "peak of the step's own memory over TRL's", "<=", MEMORY_LIMIT, turns.over(rows, "peak_extra_bytes")
        ),
    ]
    label = f"{shape.prompts} x {shape.group} completions of {shape.tokens} tokens, a tiny Qwen3-VL with images, fp32"
    op = "trl_step" if shape.enlarge == 1 else f"trl_step_images_x{shape.enlarge}"
    prompt = statistics.mean(said["tokens"] for said in taken[OURS]) / (shape.prompts * shape.group) - shape.tokens
    label += f", prompts of {prompt:.0f} tokens"
    return {**results.header(op, "cpu"), "label": label, "shape": asdict(shape), "rows": rows, "bars": bars}


if __name__ == "__main__":
    turns.main(__doc__, Shape, child, measure, "an RLVR step", rounds=20)
