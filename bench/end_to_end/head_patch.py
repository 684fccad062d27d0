"""Time and peak memory of a language model's log-probabilities in another trainer, before and after our patch.

Run `python -m bench.end_to_end.head_patch --trainer transformers`, or openrlhf, or verl in the environment
.venv-peers (`make test-peers` makes it). A step is forward and backward of the log-probabilities of one sequence, in
some cases also of the entropies, through the functions that the trainer calls. The model is random and consists almost
entirely of the head. Without the patch these run:

- transformers: log_softmax and gather on `model(...).logits`, because it has no log-probabilities.
- OpenRLHF: its Actor. If the package is not installed, `openrlhf_stand_in` replaces it.
- verl: the functions that its FSDP engine calls on the logits, in its order, with compiled entropies like verl's; and
  verl's own model forward with the fused head of the backend torch. The fused head of the backend triton needs a GPU.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench import results
from bench.end_to_end import openrlhf_stand_in, turns
from bench.end_to_end.turns import Said, Turn

LOGP, BOTH, FUSED = "log-probabilities", "log-probabilities and entropies", "FusedLinearForPPO"
NAMES = {"transformers": "transformers", "openrlhf": "OpenRLHF", "verl": "verl"}
CASES = {"transformers": (LOGP, BOTH), "openrlhf": (LOGP, BOTH), "verl": (LOGP, BOTH, FUSED)}
# in these trainers the patch must halve the memory of the unfused head
HALVED = ("transformers", "openrlhf")
MEMORY_LIMIT = 0.5
# tolerance: both sides compute the same in fp32
TOLERANCE = 1e-4
# steps of the processes that measure memory; the first warms up
MEMORY_STEPS = 2
# the compared rows of the large gradients
WATCHED = 8
# the log-probabilities of a case, and its entropies if it has any
Call = Callable[[], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a language model and of a sequence."""

    trainer: str = field(default="transformers", metadata={"choices": tuple(CASES)})
    vocabulary: int = 151936
    width: int = 256
    layers: int = 2
    tokens: int = 768


def make_model(sizes: Sizes) -> Any:
    """Returns a random Qwen3."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // 32,
        num_key_value_heads=sizes.width // 64,
        head_dim=32,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = Qwen3ForCausalLM(config).train()
    # a larger head than at initialisation, so that the logits differ
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    return model


def transformers_cases(model: Any, ids: Tensor, patched: bool) -> dict[str, Call]:
    """Returns the cases of transformers."""
    from prism_kernels.integrations.transformers.lm_head import patch_lm_head

    def before(entropy: bool) -> tuple[Tensor, Tensor | None]:
        logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        chosen = logp.gather(-1, ids[:, 1:, None])[..., 0]
        return chosen, -(logp.exp() * logp).sum(-1) if entropy else None

    def after(entropy: bool) -> tuple[Tensor, Tensor | None]:
        out = model(input_ids=ids, labels=ids, token_logprobs=True, entropy=entropy)
        return out.log_probs, out.entropy

    if patched:
        patch_lm_head(model)
    return {case: partial(after if patched else before, case == BOTH) for case in (LOGP, BOTH)}


def openrlhf_cases(model: Any, ids: Tensor, patched: bool) -> dict[str, Call]:
    """Returns the cases of OpenRLHF's Actor, or of its stand-in."""
    from prism_kernels.integrations import openrlhf, patching

    stand_in = openrlhf_stand_in.modules(compiled=True)
    sys.modules.update(stand_in)
    actor = import_module("openrlhf.models.actor").Actor(model)
    # only the package has this
    actor.packing_samples = False
    if patched:
        if stand_in:
            patching.version = lambda _: openrlhf_stand_in.VERSION
        openrlhf.patch()

    def call(entropy: bool) -> tuple[Tensor, Tensor | None]:
        mask = torch.ones_like(ids)
        logp, out = actor(ids, attention_mask=mask, return_output=True, return_logprobs=True, return_entropy=entropy)
        return logp, out.entropy if entropy else None

    return {case: partial(call, case == BOTH) for case in (LOGP, BOTH)}


def verl_cases(model: Any, ids: Tensor, patched: bool) -> dict[str, Call]:
    """Returns the cases of verl."""
    functional = import_module("verl.utils.torch_functional")
    dense = import_module("verl.models.transformers.dense_common")
    if patched:
        from prism_kernels.integrations import verl

        verl.patch()
    # engines are made after the patch and look these functions up then
    log_probabilities = functional.logprobs_from_logits
    entropies = torch.compile(functional.entropy_from_logits, dynamic=True)
    following = ids[0].roll(-1)

    def logits(entropy: bool) -> tuple[Tensor, Tensor | None]:
        rows = model(input_ids=ids).logits.squeeze(0)
        found = entropies(rows) if entropy else None
        return log_probabilities(logits=rows, labels=following, inplace_backward=not entropy), found

    def fused() -> tuple[Tensor, Tensor | None]:
        out = dense.forward_with_torch_backend(model, input_ids=ids, temperature=1.0, return_dict=True)
        return out.log_probs, out.entropy

    return {**{case: partial(logits, case == BOTH) for case in (LOGP, BOTH)}, FUSED: fused}


MAKERS: dict[str, Callable[[Any, Tensor, bool], dict[str, Call]]] = {
    "transformers": transformers_cases,
    "openrlhf": openrlhf_cases,
    "verl": verl_cases,
}


def sides(sizes: Sizes) -> tuple[str, str]:
    """Returns the names of the two sides."""
    return NAMES[sizes.trainer], f"{NAMES[sizes.trainer]} with our patch"


def child(side: str, sizes: Sizes, steps: int, memory: bool) -> None:
    """Runs a step of the case that each input line names."""
    turn = Turn(memory)
    model = make_model(sizes)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, sizes.vocabulary, (1, sizes.tokens), generator=generator)
    calls = MAKERS[sizes.trainer](model, ids, side == sides(sizes)[1])
    weights = torch.randn(2, sizes.tokens, generator=generator)
    for _ in range(steps):
        call = calls[turn.begin()]
        found = [x for x in call() if x is not None]
        sum((x.flatten() * w[: x.numel()]).sum() for x, w in zip(found, weights)).backward()
        turn.end()
        turn.say({"values": values(model, ids, found)})
        model.zero_grad()


def values(model: Any, ids: Tensor, outputs: list[Tensor]) -> dict[str, list[float]]:
    """Returns the compared values of a step: results, rows of the large gradients, and the norms of all gradients."""
    some, layer = ids[0, :WATCHED], model.model.layers[0]
    compared = {
        **dict(zip(("log-probabilities", "entropies"), outputs)),
        "the gradient of the head": model.lm_head.weight.grad[some],
        "the gradient of the embeddings": model.model.embed_tokens.weight.grad[some],
        "the gradient of the first query": layer.self_attn.q_proj.weight.grad[:WATCHED],
        "the gradient of the last norm": model.model.norm.weight.grad,
        "the norms of the gradients": torch.stack([vector_norm(p.grad) for p in model.parameters()]),
    }
    return {name: x.detach().flatten().tolist() for name, x in compared.items()}


def agree(case: str, taken: dict[str, list[Said]]) -> None:
    """Raises if the two sides did not compute the same."""
    for theirs, ours in zip(*taken.values()):
        for name, wanted in theirs["values"].items():
            expected, got = (torch.tensor(x, dtype=torch.float64) for x in (wanted, ours["values"][name]))
            apart = vector_norm(got - expected) / vector_norm(expected)
            # NaN must fail too
            if not apart <= TOLERANCE:
                raise RuntimeError(f"{case}: the two sides differ in {name} by {apart:.1e} of it")


def measure(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Returns the content of the result file."""
    cases = CASES[sizes.trainer]
    match = turns.Match(__spec__.name, sides(sizes), sizes)
    with match.both((rounds + 1) * len(cases)) as both:
        taken = {case: turns.take_turns(both, rounds + 1, case) for case in cases}
    for case in cases:
        agree(case, taken[case])
    peaks = match.peaks(MEMORY_STEPS, cases)
    rows, bars = [], []
    for case in cases:
        pair = turns.rows(taken[case], peaks, case)
        rows += pair
        if sizes.trainer in HALVED:
            name = f"memory of the step over the unfused head's, {case}"
            bars.append(results.bar(name, "<=", MEMORY_LIMIT, turns.over(pair, "peak_extra_bytes")))
    content = {
        **results.header(f"{sizes.trainer}_patch", "cpu"),
        "label": f"one sequence of {sizes.tokens:,} tokens, V={sizes.vocabulary:,}, D={sizes.width}, "
        f"{sizes.layers} layers, fp32",
        "sizes": asdict(sizes),
        "rows": rows,
        "bars": bars,
    }
    if sizes.trainer == "openrlhf":
        content["stand_in"] = bool(openrlhf_stand_in.modules())
    return content


if __name__ == "__main__":
    turns.main(__doc__, Sizes, child, measure, "forward and backward", rounds=3)
