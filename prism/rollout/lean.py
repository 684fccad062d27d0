"""The forward pass of Qwen3-VL's language model for rollouts: packed prompts first, then one token of each row a step.

P prompts, R rows of the cache, one for each rollout, T packed tokens, H heads, K heads of keys and values, d their
width, C columns of the cache, D hidden width, V vocabulary.

All prompts end at the same column of the cache, so that a step writes one column. Shorter prompts start at a later
column, and the columns before them are masked.
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
# their frequencies do not depend on the length, so that one table serves all steps
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# tokens of one packed pass over prompts; a longer prompt has a pass alone
PREFILL_TOKENS = 16384
# columns for responses in the first cache
FIRST_COLUMNS = 512

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def why_not_lean(model: PreTrainedModel) -> str | None:
    """Returns the reason why a model cannot take this path, or None."""
    if not isinstance(model, MODELS):
        known = " and ".join(kind.__name__ for kind in MODELS)
        return f"the lean step is written for {known}, and this is {type(model).__name__}"
    config: Any = model.config
    rope = config.text_config.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        return f"rope_type {rope!r} changes with the length; the lean step knows {', '.join(ROPE_TYPES)}"
    return None


class _Layer(NamedTuple):
    """The parts of a layer, looked up once: a module's call and its attributes cost as much as a small product."""

    q_proj: Callable[[Tensor], Tensor]
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor]
    o_proj: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    # the norms before attention and MLP
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    # (H + K, d), the weights of the norms of queries and keys, and the epsilon of both
    head_weight: Tensor
    epsilon: float


class LeanBatch:
    """Prompts and their growing responses: each step adds one token of every row to a cache of keys and values.

    The weights must not move in memory until the last step: they are looked up once.

    Args:
        model: a model without an obstacle from `why_not_lean`.
        prompts: P prompts.
        copies: adjacent rows of each prompt: R = P * copies.
        steps: the most tokens that a row gets.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[EncodedPrompt], copies: int, steps: int) -> None:
        self.model, self.text, self.copies = model, model.model.language_model, copies
        config = self.text.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.layers, self.norm = [self._parts(layer) for layer in self.text.layers], _norm(self.text.norm)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        self.rows = len(prompts) * copies
        # the column that the next step writes, the columns of prompts, and those of prompts and responses
        self.column = self.prompt_columns = max(lengths)
        self.end = self.prompt_columns + steps
        device = model.device
        pad = torch.tensor([self.column - length for length in lengths]).repeat_interleave(copies)
        # (R,), columns before each prompt; None if all prompts have one length
        self.pad = pad.to(device) if pad.any() else None
        self.mask: Tensor | None = None
        # one (R, K, C, d) for each layer
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.capacity = min(self.column + FIRST_COLUMNS, self.end)
        # (R,), the position of each row's next token
        self.position = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self.logits = self._prefill(prompts, lengths)
        self._extend_mask(self.logits.dtype)
        longest = int(self.position.max()) + steps
        table = self.text.rotary_emb(self.logits, torch.arange(longest, device=device).expand(3, 1, -1))
        # (positions, d) each; the sine has the signs that `_rotate` needs
        self.cos, self.sin = table[0][0], _signed(table[1][0])

    def step(self, token: Tensor) -> Tensor:
        """Returns the logits (R, V) that follow each row's next token, (R,)."""
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
        """Keeps the rows `order` (fewer than R), in this order; copies only rows whose index changes."""
        rows = len(order)
        target = (order != torch.arange(rows, device=order.device)).nonzero()[:, 0]
        source = order[target]
        for cache in (*self.keys, *self.values):
            cache[target, :, : self.column] = cache[source, :, : self.column]
        self.position = self.position[order]
        if self.pad is not None and self.mask is not None:
            self.pad, self.mask = self.pad[order], self.mask[order]
        self.rows = rows

    def _prefill(self, prompts: Sequence[EncodedPrompt], lengths: Sequence[int]) -> Tensor:
        """Returns the logits (P, V) after the prompts; writes the keys and values of each prompt to its rows."""
        last: list[Tensor] = []
        order: list[int] = []
        for chosen in plan_packs(lengths, PREFILL_TOKENS):
            last.append(self._prefill_pack([prompts[index] for index in chosen], chosen))
            order.extend(chosen)
        packed_index = torch.tensor(order, device=self.model.device).argsort()
        hidden = torch.cat(last).index_select(0, packed_index)
        return self.model.lm_head(self.norm(hidden))

    def _prefill_pack(self, prompts: Sequence[EncodedPrompt], chosen: Sequence[int]) -> Tensor:
        """Returns the hidden states (prompts, D) of the last tokens of one pack's prompts; `chosen`: their indices."""
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
        # (rows, columns), the packed token of each column; the columns before a prompt are masked, so any token serves
        source = columns + (ends - self.column)[:, None]
        source = source.clamp_(min=torch.tensor(starts[:-1])[:, None]).repeat_interleave(self.copies, 0).to(device)
        rows = (torch.tensor(chosen)[:, None] * self.copies + torch.arange(self.copies)).flatten().to(device)
        following = [int(pack.position[:, start:end].max()) + 1 for start, end in pairwise(starts)]
        self.position[rows] = torch.tensor(following, device=device).repeat_interleave(self.copies)
        pack = pack.to(device)

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write_prompts(index, rows, source, k, v)
            return prefix_attention(q, k, v, pack)

        hidden, image_rows, deepstack = self._embed(prompts, pack)
        cos, sin = (x[0][:, None] for x in self.text.rotary_emb(hidden, pack.position[:, None]))
        sin = _signed(sin)
        for index in range(len(self.layers)):
            hidden = self._layer(index, hidden, cos, sin, attend)
            if index < len(deepstack):
                hidden = hidden.index_add(0, image_rows, deepstack[index].to(hidden.dtype))
        return hidden.index_select(0, (ends - 1).to(device))

    def _embed(self, prompts: Sequence[EncodedPrompt], pack: PrefixPack) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Returns the embeddings (T, D) with images, the indices of the image tokens, and DeepStack's features."""
        hidden = self.text.embed_tokens(pack.input_ids)
        pixels, grids = join_images(prompts)
        image_rows = (pack.kind == Kind.IMAGE).nonzero()[:, 0]
        if pixels is None or grids is None:
            return hidden, image_rows, ()
        features = encode_images(self.model.model.visual, pixels.to(hidden.device), grids.to(hidden.device))
        hidden = hidden.index_copy(0, image_rows, features.merged.to(hidden.dtype))
        return hidden, image_rows, features.deepstack

    def _parts(self, layer: Any) -> _Layer:
        attention = layer.self_attn
        head_weights = (
            attention.q_norm.weight.expand(self.heads, -1),
            attention.k_norm.weight.expand(self.kv_heads, -1),
        )
        return _Layer(
            q_proj=_projection(attention.q_proj),
            k_proj=_projection(attention.k_proj),
            v_proj=_projection(attention.v_proj),
            o_proj=_projection(attention.o_proj),
            mlp=_mlp(layer.mlp),
            norms=(_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)),
            head_weight=torch.cat(head_weights),
            epsilon=attention.q_norm.variance_epsilon,
        )

    def _layer(self, index: int, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Returns the layer's output for rows (T, D)."""
        layer = self.layers[index]
        x = layer.norms[0](hidden)
        both = torch.cat((layer.q_proj(x), layer.k_proj(x)), 1).view(len(x), -1, self.width)
        # one norm for the heads of queries and keys, with a weight for each head
        both = rms_norm(both, (self.width,), None, layer.epsilon) * layer.head_weight
        q, k = _rotate(both, cos, sin).split((self.heads, self.kv_heads), 1)
        v = layer.v_proj(x).view(len(x), -1, self.width)
        hidden = hidden + layer.o_proj(attend(index, q, k, v).flatten(1))
        return hidden + layer.mlp(layer.norms[1](hidden))

    def _attend_cache(self, mask: Tensor | None, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[index][: self.rows], self.values[index][: self.rows]
        keys[:, :, self.column] = k
        values[:, :, self.column] = v
        seen = self.column + 1
        # query heads that share a key head are rows of one product, so that no key is repeated
        q = q.unflatten(1, (self.kv_heads, -1))
        out = scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask)
        return out.flatten(1, 2)

    def _write_prompts(self, index: int, rows: Tensor, source: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes keys and values (T, K, d) to a layer's cache: token source[i, c] to column c of row rows[i]."""
        for cache, x in ((self.keys, k), (self.values, v)):
            if index == len(cache):
                cache.append(x.new_zeros(self.rows, self.kv_heads, self.capacity, self.width))
            columns = x.index_select(0, source.flatten()).unflatten(0, source.shape)
            cache[index][:, :, : self.column].index_copy_(0, rows, columns.transpose(1, 2))

    def _grow(self) -> None:
        """Doubles the columns of the responses, layer by layer, and drops the rows that have left."""
        new = min(2 * self.capacity - self.prompt_columns, self.end) - self.capacity
        for caches in (self.keys, self.values):
            for index, cache in enumerate(caches):
                running = cache[: self.rows]
                caches[index] = torch.cat((running, running.new_zeros(self.rows, self.kv_heads, new, self.width)), 2)
        self.capacity += new
        self._extend_mask(self.keys[0].dtype)

    def _extend_mask(self, dtype: torch.dtype) -> None:
        """Sets the mask, (R, 1, 1, C), which is added to the scores: -inf before a row's prompt."""
        if self.pad is not None:
            before = torch.arange(self.capacity, device=self.pad.device) < self.pad[:, None]
            self.mask = before.to(dtype).masked_fill_(before, -torch.inf)[:, None, None]


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    # one call, where transformers' module makes six
    weight, epsilon = norm.weight, norm.variance_epsilon
    return lambda x: rms_norm(x, weight.shape, weight, epsilon)


def _projection(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns a function that does the same as the module; for a plain linear layer, its product alone."""
    if type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks):
        return partial(linear, weight=module.weight, bias=module.bias)
    return module


def _mlp(module: Any) -> Callable[[Tensor], Tensor]:
    """Returns a function that computes an MLP or a Mixture-of-Experts block on rows (T, D)."""
    if isinstance(module, Qwen3VLTextMLP | Qwen3VLMoeTextMLP):
        gate, up, down = map(_projection, (module.gate_proj, module.up_proj, module.down_proj))
        act = module.act_fn
        return lambda x: down(act(gate(x)) * up(x))
    # the block takes a batch
    return lambda x: module(x[None])[0]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x cos + rotate_half(x) sin; the sine carries the signs of rotate_half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _signed(sin: Tensor) -> Tensor:
    lower, upper = sin.chunk(2, -1)
    return torch.cat((-lower, upper), -1)
