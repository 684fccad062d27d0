"""`prefix_attention` of one group, forward and backward, against other ways to the same values.

The group of the discriminator on a CPU: a prompt of 256 tokens, 17 captions of 40 and 17 reasonings of 160. Separate
sequences have 2.2 million pairs of a query and a key that it sees; the packed form has 1.1 million.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.versus import Duel, Rival, Run, Values, duel_test
from prism_kernels import prefix_attention
from prism_kernels.ops.prefix_attention.reference import prefix_attention_reference, visible
from prism_kernels.ops.prefix_attention.torch import attend_pieces
from prism_kernels.packing import Branch, Kind, PrefixGroup, PrefixPack, build_pack

PROMPT, CAPTION, REASONING, RESPONSES = 256, 40, 160, 17
HEADS, KEPT, WIDTH = 16, 8, 64


class Data(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    pack: PrefixPack


def make() -> Data:
    branches = [Branch(range(CAPTION), Kind.PERCEPTION)] * RESPONSES
    branches += [Branch(range(REASONING), Kind.REASONING)] * RESPONSES
    pack = build_pack([PrefixGroup(range(PROMPT), branches)])
    tokens = pack.input_ids.numel()
    rng = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(tokens, heads, WIDTH, generator=rng) for heads in (HEADS, KEPT, KEPT, HEADS))
    return Data(q, k, v, upstream, pack)


def _values(out: Tensor, leaves: list[Tensor], upstream: Tensor) -> Values:
    return dict(zip(("out", "q", "k", "v"), (out.detach(), *torch.autograd.grad(out, leaves, upstream))))


def exact(data: Data) -> Values:
    leaves = [x.double().requires_grad_() for x in data[:3]]
    return _values(prefix_attention_reference(*leaves, data.pack), leaves, data.upstream.double())


def by(attend):
    def load(data: Data) -> Run:
        leaves = [x.requires_grad_() for x in data[:3]]
        return lambda: _values(attend(*leaves, data.pack), leaves, data.upstream)

    return load


def a_call_a_branch(q: Tensor, k: Tensor, v: Tensor, pack: PrefixPack) -> Tensor:
    return attend_pieces(q, k, v, pack.layout, WIDTH**-0.5)


def dense_mask(data: Data) -> Run:
    mask = visible(data.pack)

    def attend(q: Tensor, k: Tensor, v: Tensor, pack: PrefixPack) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return by(attend)(data)


def separate(q: Tensor, k: Tensor, v: Tensor, pack: PrefixPack) -> Tensor:
    """Each branch behind its own copy of the prompt, those of one length in one call: what unpacked passes do."""
    outputs, begin = [], PROMPT
    for length in (CAPTION, REASONING):
        branch = torch.arange(begin, begin + RESPONSES * length).view(RESPONSES, length)
        rows = torch.cat((torch.arange(PROMPT).expand(RESPONSES, PROMPT), branch), 1)
        heads_first = (x[rows].transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
        if not outputs:
            outputs.append(out[0, :PROMPT])
        outputs.append(out[:, PROMPT:].flatten(0, 1))
        begin += RESPONSES * length
    return torch.cat(outputs)


DUELS = (
    Duel(
        op="prefix_attention",
        label=f"prompt {PROMPT}, {RESPONSES} branches of {CAPTION} and {REASONING}, H={HEADS}/{KEPT}, d={WIDTH}, fp32",
        make=make,
        exact=exact,
        rivals=(
            Rival("ours, torch", by(prefix_attention), ours=True),
            Rival("SDPA, a call for each branch", by(a_call_a_branch)),
            Rival("SDPA, the prompt repeated for each branch", by(separate)),
            Rival("SDPA, a (T, T) mask", dense_mask),
        ),
        tolerance=1e-4,
        memory=True,
    ),
)
test_prefix_attention = duel_test(DUELS, __name__)
