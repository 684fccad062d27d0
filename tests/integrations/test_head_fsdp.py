"""`patch_lm_head` under FSDP2: two gloo ranks with different data give the gradients of the unpatched model."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from prism_kernels.integrations.transformers.lm_head import patch_lm_head

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
# an odd vocabulary: the ranks' shards differ in size
V = 91
RANKS = 2
HALVES = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# where the head is, its precision, and what else is set
CASES = {
    "root": ("root", MixedPrecisionPolicy(), ()),
    "unit": ("unit", MixedPrecisionPolicy(), ()),
    "unit, bf16 with fp32 sums": ("unit", HALVES, ()),
    "unit, sum over ranks": ("unit", MixedPrecisionPolicy(), ("sum",)),
    "unit, two backward passes": ("unit", MixedPrecisionPolicy(), ("twice",)),
    "unit, one sum for two backward passes": ("unit", MixedPrecisionPolicy(), ("twice", "late")),
    "unit with the last norm": ("norm", MixedPrecisionPolicy(), ()),
    "tied, root": ("root", MixedPrecisionPolicy(), ("tied",)),
    "tied, unit with the embedding": ("embedding", MixedPrecisionPolicy(), ("tied",)),
}
TIED_UNIT = ("unit", MixedPrecisionPolicy(), ("tied",))


def make(tied):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=V, num_key_value_heads=1, head_dim=16, tie_word_embeddings=tied, **SIZES)
    )
    model.lm_head.weight.data.mul_(8)
    return model


def batch(rank, step):
    return torch.randint(0, V, (2, 11 + rank), generator=torch.Generator().manual_seed(10 * rank + step))


def shard(model, where, policy, options, mesh):
    parts = {
        "root": [],
        "unit": [model.lm_head],
        "norm": [[model.model.norm, model.lm_head]],
        "embedding": [[model.model.embed_tokens, model.lm_head]],
    }
    for part in (*parts[where], *model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no mean
            module.set_force_sum_reduction_for_comms(True)
            if "sum" in options:
                module.set_gradient_divide_factor(1)


def loss_of(model, ids, patched):
    if patched:
        return -model(input_ids=ids, labels=ids, token_logprobs=True).log_probs.sum()
    logp = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return -logp.gather(-1, ids[:, 1:, None]).sum()


def gradients(rank, case, mesh, patched):
    where, policy, options = case
    model = make("tied" in options)
    shard(model, where, policy, options, mesh)
    if patched:
        patch_lm_head(model)
    steps = 2 if "twice" in options else 1
    for step in range(steps):
        model.set_requires_gradient_sync("late" not in options or step == steps - 1)
        loss_of(model, batch(rank, step), patched).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    results = {
        name: [gradients(rank, case, mesh, patched) for patched in (False, True)] for name, case in CASES.items()
    }
    refusals = []
    for patched in (False, True):
        try:
            gradients(rank, TIED_UNIT, mesh, patched)
            refusals.append("none")
        except ValueError as error:
            refusals.append(str(error))
    if rank == 0:
        torch.save((results, refusals), folder / "results")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(folder,), nprocs=RANKS)
    return torch.load(folder / "results")


def one_process(options):
    """Returns the gradients of the mean over the ranks (with `sum`: of the sum) of their losses."""
    model = make("tied" in options)
    for rank in range(RANKS):
        for step in range(2 if "twice" in options else 1):
            loss = loss_of(model, batch(rank, step), False)
            (loss if "sum" in options else loss / RANKS).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_unpatched_model(outcome, name):
    plain, patched = outcome[0][name]
    _, policy, options = CASES[name]
    single = one_process(options)
    bound = 1e-5 if policy.param_dtype is None else 0.03
    assert patched.keys() == plain.keys() == single.keys()
    for key, wanted in single.items():
        for kind, grad in (("plain", plain[key]), ("patched", patched[key])):
            error = float((grad - wanted).norm() / wanted.norm())
            assert error < bound, f"{kind} {key}: {error:.1e}"


def test_a_tied_head_as_a_unit_of_its_own_is_refused(outcome):
    for refusal in outcome[1]:
        assert "'lm_head.weight' is shared" in refusal
