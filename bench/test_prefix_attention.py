"""`prefix_attention` of one group, forward and backward, against other ways to compute the same values.

The group is the discriminator's. On a CPU it has a prompt of 256 tokens, 17 captions of 40 and 17 reasoning branches
of 160; separate sequences have 2.2 million visible pairs of query and key, the packed form has 1.1 million. On a GPU it
has its true lengths, in bf16.
"""

from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.versus import Duel, Goal, Rival, Run, Values, duel_test
from prism_kernels import prefix_attention
from prism_kernels.ops.prefix_attention.eager import attend_pieces
from prism_kernels.ops.prefix_attention.reference import prefix_attention_reference, visible
from prism_kernels.packing import Branch, Kind, PrefixGroup, PrefixPack, build_pack


class Shape(NamedTuple):
    """The lengths of a group in tokens, and the sizes of the attention."""

    prompt: int
    caption: int
    reasoning: int
    responses: int
    heads: int
    kept: int
    width: int
    dtype: torch.dtype

    def label(self) -> str:
        lengths = f"prompt {self.prompt}, {self.responses} branches of {self.caption} and {self.reasoning}"
        dtype = "fp32" if self.dtype == torch.float32 else "bf16"
        return f"{lengths}, H={self.heads}/{self.kept}, d={self.width}, {dtype}"


CPU_SHAPE = Shape(256, 40, 160, 17, 16, 8, 64, torch.float32)
CUDA_SHAPE = Shape(1024, 150, 600, 17, 16, 8, 128, torch.bfloat16)


class Data(NamedTuple):
    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    pack: PrefixPack

    def branches(self) -> list[tuple[int, int]]:
        """Returns the first token and the length of each branch."""
        begin, spans = self.shape.prompt, []
        for length in (self.shape.caption, self.shape.reasoning):
            for _ in range(self.shape.responses):
                spans.append((begin, length))
                begin += length
        return spans

    def sequence(self, begin: int, length: int) -> Tensor:
        """Returns the indices of a branch after those of its prompt."""
        return torch.cat((torch.arange(self.shape.prompt), torch.arange(begin, begin + length))).to(self.q.device)


def make(shape: Shape, device: str = "cpu") -> Data:
    branches = [Branch(range(shape.caption), Kind.PERCEPTION)] * shape.responses
    branches += [Branch(range(shape.reasoning), Kind.REASONING)] * shape.responses
    pack = build_pack([PrefixGroup(range(shape.prompt), branches)]).to(device)
    tokens = pack.input_ids.numel()
    rng = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kept, shape.kept, shape.heads)
    tensors = [torch.randn(tokens, n, shape.width, generator=rng).to(device, shape.dtype) for n in heads]
    return Data(shape, *tensors, pack)


def _values(out: Tensor, leaves: list[Tensor], upstream: Tensor) -> Values:
    return dict(zip(("out", "q", "k", "v"), (out.detach(), *torch.autograd.grad(out, leaves, upstream))))


def _leaves(data: Data) -> list[Tensor]:
    return [x.requires_grad_() for x in (data.q, data.k, data.v)]


def exact(data: Data) -> Values:
    leaves = [x.detach().double().requires_grad_() for x in (data.q, data.k, data.v)]
    return _values(prefix_attention_reference(*leaves, data.pack), leaves, data.upstream.double())


def exact_by_branch(data: Data) -> Values:
    """The same where (H, T, T) scores do not fit: each branch is a separate sequence, one after the other."""
    q, k, v = leaves = [x.detach().double().requires_grad_() for x in (data.q, data.k, data.v)]
    out = torch.empty_like(q)
    for begin, length in [(0, 0), *data.branches()]:
        rows = data.sequence(begin, length)
        own = rows[-length:] if length else rows
        heads_first = (x[rows].transpose(0, 1)[None] for x in (q, k, v))
        part = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        part = part[-len(own) :]
        part.backward(data.upstream[own].double())
        out[own] = part.detach()
    return dict(zip(("out", "q", "k", "v"), (out, *(leaf.grad for leaf in leaves))))


def by(attend):
    def load(data: Data) -> Run:
        leaves = _leaves(data)
        return lambda: _values(attend(*leaves, data.pack), leaves, data.upstream)

    return load


def a_call_a_branch(q: Tensor, k: Tensor, v: Tensor, pack: PrefixPack) -> Tensor:
    return attend_pieces(q, k, v, pack.layout, q.shape[2] ** -0.5)


def dense_mask(data: Data) -> Run:
    mask = visible(data.pack)

    def attend(q: Tensor, k: Tensor, v: Tensor, pack: PrefixPack) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return by(attend)(data)


def separate(data: Data) -> Run:
    """Each branch after its own copy of the prompt, branches of one length in one call, as in unpacked passes."""
    prompt, count = data.shape.prompt, data.shape.responses

    def attend(q: Tensor, k: Tensor, v: Tensor, pack: PrefixPack) -> Tensor:
        outputs, branches = [], data.branches()
        for group in (branches[:count], branches[count:]):
            rows = torch.stack([data.sequence(*branch) for branch in group])
            heads_first = (x[rows].transpose(1, 2) for x in (q, k, v))
            out = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
            if not outputs:
                outputs.append(out[0, :prompt])
            outputs.append(out[:, prompt:].flatten(0, 1))
        return torch.cat(outputs)

    return by(attend)(data)


def varlen_repeated(data: Data) -> Run:
    """One call over all sequences, each with its own copy of the prompt's q, k and v, as in unpacked passes.

    The copies are made before the call. The prompt's gradients belong to its copies, so they are not compared.
    """
    from torch.nn.attention.varlen import varlen_attn

    prompt, branches = data.shape.prompt, data.branches()
    rows = torch.cat([data.sequence(*branch) for branch in branches])
    leaves = [x.detach()[rows].requires_grad_() for x in (data.q, data.k, data.v)]
    lengths = torch.tensor([0, *(prompt + length for _, length in branches)])
    ends = lengths.cumsum(0)
    cu_seqlens, longest = ends.to(rows.device, torch.int32), int(lengths.max())
    # the prompt of the first sequence, then each sequence's own tokens
    own = [torch.arange(prompt), *(torch.arange(e - n, e) for e, (_, n) in zip(ends[1:].tolist(), branches))]
    chosen = torch.cat(own).to(rows.device)
    upstream = torch.zeros_like(leaves[0])
    upstream[chosen] = data.upstream
    gqa = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def run() -> Values:
        out = varlen_attn(*leaves, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), **gqa)
        torch.autograd.grad(out, leaves, upstream)
        return {"out": out.detach()[chosen]}

    return run


CALLS, REPEATED = "SDPA, a call for each branch", "SDPA, the prompt repeated for each branch"


def cuda_duel(shape: Shape = CUDA_SHAPE, device: str = "cuda") -> Duel:
    return Duel(
        op="prefix_attention",
        label=shape.label(),
        make=lambda: make(shape, device),
        exact=exact_by_branch,
        rivals=(
            Rival("ours, varlen", by(prefix_attention), ours=True),
            Rival("varlen, the prompt repeated for each branch", varlen_repeated),
            Rival(CALLS, by(a_call_a_branch)),
            Rival(REPEATED, separate),
        ),
        tolerance=2e-2,
        memory=True,
        limit_s=1.5,
        device=device,
        goals=(Goal("host syncs", "syncs", "<=", 0),),
    )


DUELS = (
    Duel(
        op="prefix_attention",
        label=CPU_SHAPE.label(),
        make=lambda: make(CPU_SHAPE),
        exact=exact,
        rivals=(
            Rival("ours, torch", by(prefix_attention), ours=True),
            Rival(CALLS, by(a_call_a_branch)),
            Rival(REPEATED, separate),
            Rival("SDPA, a (T, T) mask", dense_mask),
        ),
        tolerance=1e-4,
        memory=True,
    ),
)
CUDA_DUELS = (cuda_duel(),)
test_prefix_attention = duel_test(DUELS, __name__)
