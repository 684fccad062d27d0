"""The forward pass of Qwen3-VL's language model for rollouts alone: packed prompts, then one token a row.

P prompts, R rows of the cache, one for each rollout, T packed tokens, H heads, K heads of keys and values, d their
width, C columns of the cache, D hidden width, V vocabulary. Prompts end at the same column in all rows: shorter ones
begin later, and what is before them is masked. So each step writes one column.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextMLP

from prism.models.packed import encode_images
from prism.models.prompts import EncodedPrompt, join_images
from prism_kernels.ops.prefix_attention import prefix_attention
from prism_kernels.packing import Kind, PrefixGroup, PrefixPack, build_pack, plan_packs

MODELS = (Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration)
# their frequencies are the same for all lengths, so that one table serves all steps
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# tokens of one packed pass over prompts, unless one prompt alone is longer
PREFILL_TOKENS = 16384
# columns for tokens to come that the cache has at first
FIRST_COLUMNS = 512

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def why_not_lean(model: PreTrainedModel) -> str | None:
    """Returns why a model cannot take this path, or None where it can."""
    if not isinstance(model, MODELS):
        known = " and ".join(kind.__name__ for kind in MODELS)
        return f"the lean step is written for {known}, and this is {type(model).__name__}"
    config: Any = model.config
    rope = config.text_config.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        return f"rope_type {rope!r} changes with the length; the lean step knows {', '.join(ROPE_TYPES)}"
    return None


class _Layer(NamedTuple):
    """A layer's parts, looked up once: calling a module and finding its parts take as long as a small product."""

    q_proj: Callable[[Tensor], Tensor]
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor]
    o_proj: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    # the norms before attention and MLP
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    # (H + K, d): the weights of the heads' norms, and what both add to the mean square
    head_weight: Tensor
    epsilon: float


class LeanBatch:
    """Prompts and their growing responses: a cache of keys and values that one step extends by a token a row.

    It takes the model's weights where they are at that moment; they are to stay there until the last step.

    Args:
        model: one that `why_not_lean` has nothing against.
        prompts: P of them.
        copies: rows for each prompt, next to each other: R = P * copies.
        steps: how many tokens a row will get at most.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[EncodedPrompt], copies: int, steps: int) -> None:
        self.model, self.text, self.copies = model, model.model.language_model, copies
        config = self.text.config
        self.heads, self.kept, self.width = config.num_attention_heads, config.num_key_value_heads, self._width(config)
        self.layers, self.norm = [self._found(layer) for layer in self.text.layers], _norm(self.text.norm)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        # the next column, and where the prompts end and the longest response may
        self.rows, self.column, self.prompt = len(prompts) * copies, max(lengths), max(lengths)
        self.end = self.prompt + steps
        device = model.device
        pad = torch.tensor([self.column - length for length in lengths]).repeat_interleave(copies)
        # (R,), tokens before each prompt; None: all prompts are of one length
        self.pad = pad.to(device) if pad.any() else None
        self.mask: Tensor | None = None
        # of each layer (R, K, C, d)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.capacity = min(self.column + FIRST_COLUMNS, self.end)
        # (R,), the position of the token to come
        self.position = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self.logits = self._prefill(prompts, lengths)
        self._extend_mask(self.logits.dtype)
        longest = int(self.position.max()) + steps
        table = self.text.rotary_emb(self.logits, torch.arange(longest, device=device).expand(3, 1, -1))
        # each (positions, d); the sine signed as `_rotate` takes it
        self.cos, self.sin = table[0][0], _signed(table[1][0])

    def step(self, token: Tensor) -> Tensor:
        """Returns the logits (R, V) behind each row's next token (R,)."""
        if self.column == self.capacity:
            self._grow()
        cos, sin = (table.index_select(0, self.position)[:, None] for table in (self.cos, self.sin))
        mask = None if self.mask is None else self.mask[:, :, :, : self.column + 1]
        hidden = self.text.embed_tokens(token)
        for index in range(len(self.layers)):
            hidden = self._layer(index, hidden, cos, sin, lambda *qkv: self._attend_cache(mask, *qkv))
        self.column += 1
        self.position += 1
        return self.model.lm_head(self.norm(hidden))

    def keep(self, order: Tensor) -> None:
        """Leaves the rows `order` (fewer than R), in this order; those that stay at their place are not moved."""
        rows = len(order)
        here = torch.arange(rows, device=order.device)
        to = (order != here).nonzero()[:, 0]
        source = order[to]
        for cache in (*self.keys, *self.values):
            cache[to, :, : self.column] = cache[source, :, : self.column]
        self.position = self.position[order]
        if self.pad is not None and self.mask is not None:
            self.pad, self.mask = self.pad[order], self.mask[order]
        self.rows = rows

    def _prefill(self, prompts: Sequence[EncodedPrompt], lengths: Sequence[int]) -> Tensor:
        """Returns the logits (P, V) at the prompts' ends; writes keys and values of each prompt to its rows."""
        last: list[Tensor] = []
        order: list[int] = []
        for chosen in plan_packs(lengths, PREFILL_TOKENS):
            last.append(self._prefill_pack([prompts[index] for index in chosen], chosen))
            order.extend(chosen)
        place = torch.tensor(order, device=self.model.device).argsort()
        hidden = torch.cat(last).index_select(0, place)
        return self.model.lm_head(self.norm(hidden))

    def _prefill_pack(self, prompts: Sequence[EncodedPrompt], chosen: Sequence[int]) -> Tensor:
        device, config = self.model.device, self.model.config
        groups = [
            PrefixGroup(p.input_ids, (), () if p.image_grid_thw is None else p.image_grid_thw, name=f"prompt {index}")
            for index, p in zip(chosen, prompts)
        ]
        merge = config.vision_config.spatial_merge_size
        pack = build_pack(groups, image_token_id=config.image_token_id, spatial_merge_size=merge)
        starts = [0, *accumulate(pack.layout.prefix)]
        ends = torch.tensor(starts[1:])
        columns = torch.arange(self.column)
        # where in T each column of each prompt's rows is read; in front of a prompt any finite value does
        source = columns + (ends - self.column)[:, None]
        source = source.clamp_(min=torch.tensor(starts[:-1])[:, None]).repeat_interleave(self.copies, 0).to(device)
        rows = (torch.tensor(chosen)[:, None] * self.copies + torch.arange(self.copies)).flatten().to(device)
        first = [int(pack.position[:, start:end].max()) + 1 for start, end in pairwise(starts)]
        self.position[rows] = torch.tensor(first, device=device).repeat_interleave(self.copies)
        pack = pack.to(device)

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write_prompts(index, rows, source, k, v)
            return prefix_attention(q, k, v, pack)

        hidden, places, deepstack = self._embed(prompts, pack)
        cos, sin = (x[0][:, None] for x in self.text.rotary_emb(hidden, pack.position[:, None]))
        sin = _signed(sin)
        for index in range(len(self.layers)):
            hidden = self._layer(index, hidden, cos, sin, attend)
            if index < len(deepstack):
                hidden = hidden.index_add(0, places, deepstack[index].to(hidden.dtype))
        return hidden.index_select(0, (ends - 1).to(device))

    def _embed(self, prompts: Sequence[EncodedPrompt], pack: PrefixPack) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Returns the embeddings (T, D) with the images in them, the images' places, and DeepStack's features."""
        hidden = self.text.embed_tokens(pack.input_ids)
        pixels, grids = join_images(prompts)
        places = (pack.kind == Kind.IMAGE).nonzero()[:, 0]
        if pixels is None or grids is None:
            return hidden, places, ()
        features = encode_images(self.model.model.visual, pixels.to(hidden.device), grids.to(hidden.device))
        return hidden.index_copy(0, places, features.merged.to(hidden.dtype)), places, features.deepstack

    def _found(self, layer: Any) -> _Layer:
        part = layer.self_attn
        heads = part.q_norm.weight.expand(self.heads, -1), part.k_norm.weight.expand(self.kept, -1)
        norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        return _Layer(
            _projection(part.q_proj),
            _projection(part.k_proj),
            _projection(part.v_proj),
            _projection(part.o_proj),
            _mlp(layer.mlp),
            norms,
            torch.cat(heads),
            part.q_norm.variance_epsilon,
        )

    def _layer(self, index: int, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Returns the layer's output for rows (T, D)."""
        layer = self.layers[index]
        x = layer.norms[0](hidden)
        both = torch.cat((layer.q_proj(x), layer.k_proj(x)), 1).view(len(x), -1, self.width)
        # the heads of queries and keys at once, each with its own weight
        both = rms_norm(both, (self.width,), None, layer.epsilon) * layer.head_weight
        q, k = _rotate(both, cos, sin).split((self.heads, self.kept), 1)
        v = layer.v_proj(x).view(len(x), -1, self.width)
        hidden = hidden + layer.o_proj(attend(index, q, k, v).flatten(1))
        return hidden + layer.mlp(layer.norms[1](hidden))

    def _attend_cache(self, mask: Tensor | None, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[index][: self.rows], self.values[index][: self.rows]
        keys[:, :, self.column] = k
        values[:, :, self.column] = v
        seen = self.column + 1
        # the heads that share a key are its queries: no key is repeated
        q = q.unflatten(1, (self.kept, -1))
        out = scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask)
        return out.flatten(1, 2)

    def _write_prompts(self, index: int, rows: Tensor, source: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes (T, K, d) to the cache of a layer: column c of row rows[i] reads token source[i, c]."""
        for cache, x in ((self.keys, k), (self.values, v)):
            if index == len(cache):
                cache.append(x.new_zeros(self.rows, self.kept, self.capacity, self.width))
            taken = x.index_select(0, source.flatten()).unflatten(0, source.shape)
            cache[index][:, :, : self.column].index_copy_(0, rows, taken.transpose(1, 2))

    def _grow(self) -> None:
        """Doubles the columns of the responses, layer by layer, for the rows that are left."""
        new = min(2 * self.capacity - self.prompt, self.end) - self.capacity
        for caches in (self.keys, self.values):
            for index, cache in enumerate(caches):
                left = cache[: self.rows]
                caches[index] = torch.cat((left, left.new_zeros(self.rows, self.kept, new, self.width)), 2)
        self.capacity += new
        self._extend_mask(self.keys[0].dtype)

    def _extend_mask(self, dtype: torch.dtype) -> None:
        """Sets what is added to the products, (R, 1, 1, C): -inf in front of a row's prompt."""
        if self.pad is not None:
            before = torch.arange(self.capacity, device=self.pad.device) < self.pad[:, None]
            self.mask = before.to(dtype).masked_fill_(before, -torch.inf)[:, None, None]

    @staticmethod
    def _width(config: Any) -> int:
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    # transformers' module takes six calls for it
    weight, epsilon = norm.weight, norm.variance_epsilon
    return lambda x: rms_norm(x, weight.shape, weight, epsilon)


def _projection(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns what calls the module; a plain linear layer's product itself."""
    if type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks):
        return partial(linear, weight=module.weight, bias=module.bias)
    return module


def _mlp(module: Any) -> Callable[[Tensor], Tensor]:
    """Returns what calls an MLP or a Mixture-of-Experts block on rows (T, D)."""
    if isinstance(module, Qwen3VLTextMLP | Qwen3VLMoeTextMLP):
        gate, up, down = map(_projection, (module.gate_proj, module.up_proj, module.down_proj))
        act = module.act_fn
        return lambda x: down(act(gate(x)) * up(x))
    # it wants a batch
    return lambda x: module(x[None])[0]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x cos + rotate_half(x) sin, with the sign of rotate_half in the sine."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _signed(sin: Tensor) -> Tensor:
    lower, upper = sin.chunk(2, -1)
    return torch.cat((-lower, upper), -1)
