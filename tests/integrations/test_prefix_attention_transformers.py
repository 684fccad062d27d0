"""A packed forward of an unmodified tiny Qwen3-VL-MoE equals separate forwards: images, M-RoPE, DeepStack."""

import re

import pytest
import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

from prism_kernels.integrations.transformers.attention import NAME, use_prefix_attention
from prism_kernels.packing import Branch, Kind, PrefixGroup, build_pack

IMAGE, VISION_START, VISION_END, VOCABULARY = 90, 91, 92, 100
HIDDEN = 64


class InDouble:
    """The torch module, with float64 in place of float32."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def make_model(dtype):
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "out_hidden_size": HIDDEN,
        },
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        # grouped matrix products do not support float64
        experts_implementation="eager",
    )
    model = Qwen3VLMoeForConditionalGeneration(config).to(dtype)
    # with the small default initialisation the layers would hardly change the residual stream
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.8 / parameter.shape[-1] ** 0.5)
    return model.train()


def image_ids(grid):
    return [VISION_START, *[IMAGE] * (grid[1] * grid[2] // 4), VISION_END]


def make_groups():
    rng = torch.Generator().manual_seed(1)

    def text(n):
        return torch.randint(0, 80, (n,), generator=rng).tolist()

    grids = [[(1, 4, 6), (1, 2, 4)], [(1, 6, 4)]]
    prompts = [text(3) + image_ids(grids[0][0]) + text(2) + image_ids(grids[0][1]) + text(4), image_ids(grids[1][0])]
    lengths = [(5, 1, 7, 5), (3, 6)]
    return [
        PrefixGroup(prompt, [Branch(text(n), Kind.PERCEPTION) for n in sizes], image_grids)
        for prompt, sizes, image_grids in zip(prompts, lengths, grids)
    ]


def pixels(groups, dtype):
    """Returns the flat patches of each group's images."""
    rng = torch.Generator().manual_seed(2)
    counts = [sum(h * w for _, h, w in group.image_grids) for group in groups]
    return [torch.randn(n, 3 * 2 * 4 * 4, generator=rng).to(dtype) for n in counts]


def separate(model, groups, patches):
    """Returns the last hidden state of each branch, computed after its own copy of prompt and images."""
    hidden = []
    for group, values in zip(groups, patches):
        for branch in group.branches:
            ids = torch.tensor([*group.prompt_ids, *branch.token_ids])[None]
            model.model.rope_deltas = None
            out = model.model(
                input_ids=ids,
                pixel_values=values,
                image_grid_thw=torch.tensor(group.image_grids),
                mm_token_type_ids=(ids == IMAGE).int(),
                use_cache=False,
            )
            hidden.append(out.last_hidden_state[0, -1])
    return torch.stack(hidden)


def packed(model, groups, patches, **options):
    pack = build_pack(groups, image_token_id=IMAGE, spatial_merge_size=2)
    arguments = {
        "input_ids": pack.input_ids[None],
        "position_ids": pack.position[:, None],
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor([grid for group in groups for grid in group.image_grids]),
        "prefix_pack": pack,
        "use_cache": False,
        **options,
    }
    return model.model(**arguments).last_hidden_state[0, pack.last_index]


def test_positions_equal_those_of_transformers():
    model, groups = make_model(torch.float32), make_groups()
    pack = build_pack(groups, image_token_id=IMAGE)
    for s, (g, branch) in enumerate((g, branch) for g, group in enumerate(groups) for branch in group.branches):
        ids = torch.tensor([*groups[g].prompt_ids, *branch.token_ids])[None]
        grids = torch.tensor(groups[g].image_grids)
        wanted, _ = model.model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=grids)
        prefix = len(groups[g].prompt_ids)
        first = int(pack.cu_prefix[g]) + int(pack.cu_branch[int((pack.branch_group < g).sum())])
        assert torch.equal(pack.position[:, first : first + prefix], wanted[:, 0, :prefix])
        assert torch.equal(pack.position[:, pack.branch == s], wanted[:, 0, prefix:])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_packed_equals_separate_forwards(dtype, tolerance, monkeypatch):
    if dtype == torch.float64:
        # the model always computes norms, rotations and routing in fp32
        monkeypatch.setattr(modeling_qwen3_vl_moe, "torch", InDouble())
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, groups = make_model(dtype), make_groups()
    patches = pixels(groups, dtype)
    upstream = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
    names, parameters = zip(*((n, p) for n, p in model.model.named_parameters()))

    def run(forward):
        hidden = forward(model, groups, patches)
        grads = torch.autograd.grad(hidden, parameters, upstream, allow_unused=True)
        return hidden.detach(), grads

    wanted, wanted_grads = run(separate)
    use_prefix_attention(model)
    assert model.model.language_model.config._attn_implementation == NAME
    assert model.model.visual.config._attn_implementation == "sdpa"
    hidden, grads = run(packed)
    assert float((hidden - wanted).norm() / wanted.norm()) < tolerance
    used = 0
    for name, grad, other in zip(names, grads, wanted_grads):
        assert (grad is None) == (other is None), name
        if grad is not None and other.norm() > 0:
            used += 1
            assert float((grad - other).norm() / other.norm()) < tolerance, name
    # parameters of embeddings, three layers, routers, experts, and the vision tower with its DeepStack merger
    assert used > 50


def test_other_branches_and_groups_change_nothing():
    model, groups = make_model(torch.float32), make_groups()
    use_prefix_attention(model)
    patches = pixels(groups, torch.float32)
    together = packed(model, groups, patches)
    alone = packed(model, groups[1:], patches[1:])
    torch.testing.assert_close(together[4:], alone, rtol=1e-4, atol=1e-5)
    # with plain causal attention over the row the branches would differ
    model.set_attn_implementation("sdpa")
    leaking = packed(model, groups, patches)
    assert float((leaking[1:] - together[1:]).detach().norm() / together.detach().norm()) > 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefix_pack": None}, "expected prefix_pack=pack, a prism_kernels.packing.PrefixPack, in the call of"),
        ({"attention_mask": torch.ones(1, 66, dtype=torch.int64)}, "expected attention_mask=None: a pack has no"),
        ({"attention_mask": torch.ones(1, 1, 66, 66, dtype=torch.bool)}, "expected attention_mask=None: a pack has"),
    ],
)
def test_a_wrong_call_says_what_to_pass(options, message):
    model, groups = make_model(torch.float32), make_groups()
    use_prefix_attention(model)
    with pytest.raises(ValueError, match=re.escape(f"{NAME}: {message}")):
        packed(model, groups, pixels(groups, torch.float32), **options)


def test_a_vision_tower_and_a_batch_are_refused():
    model, groups = make_model(torch.float32), make_groups()
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="prism_prefix: expected a causal language model; set it with"):
        packed(model, groups, pixels(groups, torch.float32))
    use_prefix_attention(model)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    pack = build_pack([PrefixGroup(ids[0], [])])
    with pytest.raises(ValueError, match=r"expected a batch of one row, the pack: .*, got 2 rows"):
        model.model.language_model(input_ids=ids, prefix_pack=pack, use_cache=False)


def test_checkpointing_keeps_the_gradients():
    model, groups = make_model(torch.float32), make_groups()
    use_prefix_attention(model)
    patches = pixels(groups, torch.float32)
    parameters = [p for n, p in model.model.language_model.named_parameters() if "embed" not in n]

    def grads():
        return torch.autograd.grad(packed(model, groups, patches).square().sum(), parameters)

    wanted = grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.model.language_model.layers[0].gradient_checkpointing
    for ours, exact in zip(grads(), wanted):
        torch.testing.assert_close(ours, exact)


def test_autocast():
    model, groups = make_model(torch.float32), make_groups()
    use_prefix_attention(model)
    patches = pixels(groups, torch.float32)
    with torch.no_grad():
        exact = packed(model, groups, patches)
        with torch.autocast("cpu", torch.bfloat16):
            lowered = packed(model, groups, patches)
    assert float((lowered - exact).norm() / exact.norm()) < 0.2
