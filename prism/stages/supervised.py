"""Fine-tuning on demonstrations, packed: the stages `base`, `sft` and `distill`."""

import torch

from prism.config.sections import Memory
from prism.data.problem import Problem
from prism.models.batches import pack_responses, response_ids
from prism.models.policy import Policy
from prism.models.prompts import PromptEncoder
from prism.runtime.inspection import of_responses
from prism.runtime.optimiser import Stepper


def supervised_step(
    policy: Policy, problems: list[Problem], encoder: PromptEncoder, stepper: Stepper, memory: Memory
) -> dict[str, float]:
    """Takes one step on the teachers' responses of some problems; returns what is logged.

    The loss is the mean over all response tokens of the batch, whatever the packs.
    """
    prompts = [problem.encoded(encoder) for problem in problems]
    responses = response_ids([problem.teacher or "" for problem in problems], encoder)
    tokens = sum(map(len, responses))
    stepper.begin()
    total = torch.zeros(())
    for part in pack_responses(prompts, responses, range(len(problems)), encoder, memory.pack_tokens):
        part = part.to(policy.device)
        out = policy(part.pack, part.pixel_values, part.image_grid_thw, cache_bytes=memory.head_cache_bytes)
        loss = -out.logp.sum() / tokens
        loss.backward()
        total += loss.detach().cpu()
    stepped = stepper.end([total], of_responses(prompts, responses, range(len(problems))))
    return {
        "loss": float(total),
        "tokens": tokens,
        "lr": stepped.lr,
        "grad_norm": stepped.grad_norm,
        "skipped": int(stepped.skipped is not None),
    }
