"""Packs of random text with images, and the separate transformers forwards that they must equal."""

import copy

import torch
from transformers.models.qwen3_vl import modeling_qwen3_vl as dense_module
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as moe_module

from prism.discriminator.model import Discriminator
from prism.models.sizes import TinyMoeSize
from prism.models.tiny import tiny_discriminator_base, tiny_policy, train_tokenizer
from prism_kernels.packing import Branch, Kind, PrefixGroup, build_pack

TOKENIZER = train_tokenizer()
IMAGE = TOKENIZER.convert_tokens_to_ids("<|image_pad|>")
SIZE = TinyMoeSize(hidden_size=64, layers=3, intermediate_size=96, expert_intermediate_size=48)

# prompt tokens before and after the images, the images' grids in patches, and the lengths of the branches
GROUPS = (
    (5, [(1, 4, 6)], 3, (4, 1, 9, 4)),
    (3, [], 4, (2, 7)),
    (1, [(1, 2, 2), (1, 8, 4)], 2, (1,)),
    (6, [(1, 4, 6)], 1, (3, 3, 1, 6, 2)),
)
TEXT_GROUPS = tuple((before, [], after, branches) for before, _, after, branches in GROUPS)


def make_groups(shapes=GROUPS, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(0, 250, (length,), generator=rng).tolist()

    groups = []
    for before, grids, after, lengths in shapes:
        prompt = text(before)
        for _, h, w in grids:
            prompt += [IMAGE] * (h * w // 4) + text(2)
        kinds = (Kind.PERCEPTION, Kind.REASONING)
        branches = [Branch(text(n), kinds[i % 2]) for i, n in enumerate(lengths)]
        groups.append(PrefixGroup(prompt + text(after), branches, image_grids=grids))
    return groups


def make_images(groups, dtype, seed=1):
    grids = torch.tensor([grid for group in groups for grid in group.image_grids], dtype=torch.int64).reshape(-1, 3)
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randn(int(grids.prod(-1).sum()), 1536, generator=rng, dtype=torch.float64).to(dtype)
    return (pixels, grids) if len(grids) else (None, None)


def pack_of(groups):
    return build_pack(groups, image_token_id=IMAGE)


def make_backbone(dense=False, dtype=torch.float32, size=SIZE, seed=0):
    build = tiny_policy if dense else tiny_discriminator_base
    model, _ = build(size, tokenizer=TOKENIZER, seed=seed)
    # larger weights than at initialisation, so that every part of the model changes the score
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(3.0)
    # the default implementation has no float64
    model.set_experts_implementation("eager")
    return model.model.to(dtype)


def make_pair(**options):
    """Returns a stock transformers backbone and a discriminator with the same weights."""
    stock = make_backbone(**options)
    weight = torch.randn(1, stock.config.text_config.hidden_size, generator=torch.Generator().manual_seed(5))
    return stock, Discriminator(copy.deepcopy(stock), value_weight=weight)


def separate_scores(stock, value_weight, groups, pixels, grids):
    """Returns the score of each branch by transformers' forward over a copy of its prompt and images."""
    scores = []
    patches = images = 0
    for group in groups:
        group_grids = torch.tensor(group.image_grids, dtype=torch.int64).reshape(-1, 3)
        count = int(group_grids.prod(-1).sum())
        inputs = {}
        if len(group_grids):
            inputs = {
                "pixel_values": pixels[patches : patches + count],
                "image_grid_thw": grids[images : images + len(group_grids)],
            }
        patches, images = patches + count, images + len(group_grids)
        for branch in group.branches:
            ids = torch.tensor([[*group.prompt_ids, *branch.token_ids]])
            stock.rope_deltas = None
            out = stock(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == IMAGE).int(),
                use_cache=False,
                **inputs,
            )
            scores.append(out.last_hidden_state[0, -1] @ value_weight[0].to(out.last_hidden_state.dtype))
    return torch.stack(scores)


def widen(monkeypatch):
    """Makes transformers compute in float64 where it casts to float32, so that float64 results can be compared."""

    def rms_norm(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotate(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2).to(q), sin.unsqueeze(-2).to(q)
        return q * cos + moe_module.rotate_half(q) * sin, k * cos + moe_module.rotate_half(k) * sin

    def route(self, hidden):
        logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        weight, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, weight / weight.sum(-1, keepdim=True), index

    monkeypatch.setattr(moe_module.Qwen3VLMoeTextRMSNorm, "forward", rms_norm)
    monkeypatch.setattr(moe_module.Qwen3VLMoeTextTopKRouter, "forward", route)
    monkeypatch.setattr(dense_module.Qwen3VLTextRMSNorm, "forward", rms_norm)
    for module in (moe_module, dense_module):
        monkeypatch.setattr(module, "apply_rotary_pos_emb_vision", rotate)
