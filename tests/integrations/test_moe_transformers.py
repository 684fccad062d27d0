"""transformers' Qwen3-MoE and Qwen3-VL-MoE with our experts, with their router and ours, against eager."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, load_balancing_loss_func

from prism_kernels import moe_route
from prism_kernels.integrations.transformers import experts as integration
from prism_kernels.integrations.transformers.moe_block import (
    MoeBlock,
    checkpoint_contexts,
    collect_routing,
    token_kinds,
    use_moe_blocks,
)
from prism_kernels.testing import relative_error

V, E, K, LAYERS = 64, 4, 2, 2
TEXT = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": E,
    "num_experts_per_tok": K,
    "max_position_embeddings": 128,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def build(which, seed=0, **changes):
    torch.manual_seed(seed)
    if which == "qwen3_moe":
        config = Qwen3MoeConfig(**TEXT, norm_topk_prob=True, use_cache=False, **changes)
        model = Qwen3MoeForCausalLM(config)
    else:
        rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 1e4}
        text = {**TEXT, "rope_parameters": rope, "use_cache": False, **changes}
        model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=VISION))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # larger weights than at initialisation, so that the router prefers experts and their outputs matter
            if name.endswith("gate.weight"):
                parameter.normal_()
            elif ".experts." in name:
                parameter.normal_(std=0.1)
    return model


def tokens(B=2, L=13, seed=1):
    return torch.randint(5, V - 5, (B, L), generator=torch.Generator().manual_seed(seed))


def results(model, ids):
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), grads


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    assert sum(".experts." in name or "gate.weight" in name for name in theirs[1]) == 3 * LAYERS
    for name, grad in theirs[1].items():
        assert relative_error(ours[1][name], grad) < 1e-5, name


@pytest.mark.parametrize("which", ["qwen3_moe", "qwen3_vl_moe"])
def test_our_experts_with_their_router(which):
    model, ids = build(which), tokens()
    model.set_experts_implementation("eager")
    theirs = results(model, ids)
    calls = []
    model.set_experts_implementation("prism")
    original = integration.moe_experts
    integration.moe_experts = lambda *args: calls.append(1) or original(*args)
    try:
        assert_same(results(model, ids), theirs)
    finally:
        integration.moe_experts = original
    assert len(calls) == LAYERS


@pytest.mark.parametrize("which", ["qwen3_moe", "qwen3_vl_moe"])
def test_our_experts_with_our_router(which):
    model, ids = build(which), tokens()
    model.set_experts_implementation("eager")
    theirs = results(model, ids)
    names = list(model.state_dict())
    blocks = use_moe_blocks(model)
    assert len(blocks) == LAYERS and list(model.state_dict()) == names
    assert_same(results(model, ids), theirs)
    with collect_routing(model) as routings:
        model(input_ids=ids)
    assert [r.index.shape for r in routings] == [(26, K)] * LAYERS


@pytest.mark.parametrize("renormalize", [True, False])
def test_our_router_equals_theirs(renormalize):
    config = Qwen3MoeConfig(**TEXT, norm_topk_prob=renormalize)
    gate = Qwen3MoeSparseMoeBlock(config).gate
    torch.nn.init.normal_(gate.weight)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits, weight, index = gate(x)
    ours = moe_route(x, gate.weight, K, renormalize=renormalize)
    assert torch.equal(ours.index, index)
    torch.testing.assert_close(ours.weight, weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.aux_loss, load_balancing_loss_func((logits,), E, K), rtol=1e-5, atol=0)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    leaves = (x, gate.weight)
    for a, b in zip(torch.autograd.grad(ours.weight, leaves, upstream), torch.autograd.grad(weight, leaves, upstream)):
        assert relative_error(a, b) < 1e-5


def test_opposite_imbalances_of_layers_cancel_in_their_loss_and_not_in_ours():
    away = torch.tensor([9.0, 9.0, -9.0, -9.0])
    layers = [away.expand(20, E), -away.expand(20, E)]
    assert load_balancing_loss_func(tuple(layers), E, K) == pytest.approx(K, rel=1e-4)
    each = [moe_route(torch.ones(20, 1), layer[0][:, None], K).aux_loss for layer in layers]
    assert all(float(loss) == pytest.approx(2 * K, rel=1e-4) for loss in each)


def test_twenty_steps_give_the_same_losses():
    losses = {}
    for implementation in ("eager", "prism"):
        model = build("qwen3_moe")
        model.set_experts_implementation(implementation)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[implementation] = []
        for step in range(20):
            ids = tokens(4, 16, seed=step % 5)
            loss = model(input_ids=ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[implementation].append(float(loss.detach()))
    assert losses["prism"] == pytest.approx(losses["eager"], abs=1e-5)
    assert losses["prism"][-1] < losses["prism"][0] - 0.1


def kept_bytes(module, x, index, weight):
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    # `out` keeps the storages alive: a freed one could give its address to the next
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x, index, weight)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_experts_save_at_most_half_of_the_memory_that_grouped_mm_saves(dtype):
    """With the discriminator's proportions: I = 3 D, 2 of 4 experts."""
    config = Qwen3MoeConfig(**{**TEXT, "hidden_size": 64, "moe_intermediate_size": 192})
    experts = Qwen3MoeSparseMoeBlock(config).experts.to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    T = 256
    x = torch.randn(T, 64).to(dtype).requires_grad_()
    weight, index = torch.rand(T, E).topk(K)
    weight = weight.requires_grad_()
    used = {}
    for implementation in ("grouped_mm", "prism"):
        config._experts_implementation = implementation
        used[implementation] = kept_bytes(experts, x, index, weight.to(dtype))
    assert used["prism"] <= 0.5 * used["grouped_mm"], used


def aux(model, ids, kind, weight=None):
    with token_kinds(kind, weight), collect_routing(model) as routings:
        logits = model(input_ids=ids).logits
    assert len(routings) == LAYERS
    return logits, routings


def kinds_of(ids, seed=3):
    return torch.randint(0, 5, ids.shape, generator=torch.Generator().manual_seed(seed))


def with_kinds(**checkpointing):
    model = build("qwen3_vl_moe").train()
    for block in use_moe_blocks(model, kinds=5):
        torch.nn.init.normal_(block.kind_bias, generator=torch.Generator().manual_seed(7))
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    return model


def router_gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if n.endswith(("gate.weight", "kind_bias"))}


def test_auxiliary_gradients_survive_checkpointing_without_reentry():
    """Under reentrant checkpointing the layer first runs without gradients, so its auxiliary losses have none."""
    ids = tokens()
    found = {}
    for name, options in {
        "kept": {},
        "recomputed": {"use_reentrant": False, "context_fn": checkpoint_contexts},
    }.items():
        model = with_kinds(**options)
        with token_kinds(kinds_of(ids)), collect_routing(model) as routings:
            model(input_ids=ids)
            sum(r.aux_loss + 0.1 * r.z_loss for r in routings).backward()
        assert len(routings) == LAYERS, "the recomputation must not be collected again"
        found[name] = router_gradients(model)
    assert len(found["kept"]) == 2 * LAYERS
    for name, grad in found["kept"].items():
        assert grad.abs().max() > 0, name
        assert torch.equal(found["recomputed"][name], grad), name
    reentrant = with_kinds(use_reentrant=True)
    logits, routings = aux(reentrant, ids, kinds_of(ids))
    assert logits.requires_grad
    assert not any(r.aux_loss.requires_grad or r.z_loss.requires_grad for r in routings)


def test_two_packs_and_one_backward_in_another_thread():
    """Each pack is recomputed with its own kinds, in a thread without the forward's context."""
    first, second = tokens(seed=1), tokens(seed=2)
    found = []
    for options in ({}, {"use_reentrant": False, "context_fn": checkpoint_contexts}):
        model = with_kinds(**options)
        total = 0
        for i, ids in enumerate((first, second)):
            weight = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(i)) < 0.7).float()
            logits, routings = aux(model, ids, kinds_of(ids, seed=10 + i), weight)
            total = total + logits.square().mean() + sum(r.aux_loss for r in routings)
        thread = threading.Thread(target=total.backward)
        thread.start()
        thread.join()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(router_gradients(model)) == 2 * LAYERS
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name


def test_a_recomputation_without_its_kinds_is_an_error():
    model, ids = with_kinds(use_reentrant=False), tokens()
    logits, _ = aux(model, ids, kinds_of(ids))
    with pytest.raises(RuntimeError, match="MoeBlock: expected the tokens' kinds"):
        logits.sum().backward()


def test_the_kind_bias_sends_kinds_to_different_experts():
    model, ids = with_kinds(), tokens()
    kind = kinds_of(ids) % 2
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, MoeBlock):
                block.kind_bias.zero_()
                block.kind_bias[0, :K] = block.kind_bias[1, K:] = 1e3
    _, routings = aux(model, ids, kind)
    for routing in routings:
        assert routing.counts.shape == (5, E)
        assert routing.counts[0, K:].sum() == routing.counts[1, :K].sum() == 0
        assert routing.counts.sum() == K * ids.numel()
        assert ((routing.index < K) == (kind.reshape(-1, 1) == 0)).all()


def test_collections_and_contexts_nest():
    outer, inner, ids = with_kinds(), build("qwen3_moe"), tokens()
    use_moe_blocks(inner)
    with token_kinds(kinds_of(ids)), collect_routing(outer) as theirs:
        outer(input_ids=ids)
        with token_kinds(None), collect_routing(inner) as others:
            inner(input_ids=ids)
            assert others[0].counts.shape == (1, E)
        outer(input_ids=ids)
    assert len(theirs) == 2 * LAYERS and len(others) == LAYERS
    with pytest.raises(RuntimeError, match="MoeBlock: expected the tokens' kinds"):
        outer(input_ids=ids)
    with (
        pytest.raises(ValueError, match="collect_routing: expected a model with MoeBlock"),
        collect_routing(build("qwen3_moe")),
    ):
        raise AssertionError("entered")


def test_kinds_of_another_batch_are_refused():
    model, ids = with_kinds(), tokens()
    with (
        token_kinds(kinds_of(ids)[:1]),
        pytest.raises(ValueError, match=r"expected kind of shape \(26,\), got \(13,\)"),
    ):
        model(input_ids=ids)


def test_checkpointing_a_block_alone():
    block = MoeBlock(build("qwen3_moe").model.layers[0].mlp, kinds=2)
    x = torch.randn(1, 9, 32, requires_grad=True)
    with token_kinds(torch.arange(9) % 2):
        again = checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts)
        once = block(x)
    assert torch.equal(again, once)
    leaves = [x, *block.parameters()]
    wanted = torch.autograd.grad(once.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again.square().sum(), leaves), wanted))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act_fn": torch.nn.GELU()}, "expected the activation SiLU .*, got GELU in Qwen3MoeExperts"),
        ({"is_transposed": True}, r"expected weights \(E, 2I, D\) and \(E, D, I\), not transposed"),
        ({"is_concatenated": False}, "expected gate and up rows one after the other, not interleaved"),
        ({"has_bias": True}, "expected experts without bias"),
        ({"has_gate": False}, "expected gated experts"),
        ({"_is_expert_parallel": True}, "expected experts that are all on this rank"),
    ],
)
def test_other_experts_are_refused(change, message):
    model = build("qwen3_moe", experts_implementation="prism")
    experts = model.model.layers[0].mlp.experts
    for name, value in change.items():
        setattr(experts, name, value)
    with pytest.raises(NotImplementedError, match='experts_implementation="prism": ' + message):
        model(input_ids=tokens())
    with pytest.raises(NotImplementedError, match=message):
        MoeBlock(model.model.layers[0].mlp)


def test_other_blocks_are_refused():
    with pytest.raises(TypeError, match="MoeBlock: expected a block with the modules gate and experts, got Linear"):
        MoeBlock(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="use_moe_blocks: expected a model with Qwen3 MoE blocks, got Linear"):
        use_moe_blocks(torch.nn.Linear(2, 2))
