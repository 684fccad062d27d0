"""Packed batches that store each prompt once: prefix groups, M-RoPE positions, token kinds and weights, budgets.

T packed tokens, P groups (one prefix each), S branches, L tokens of one piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property
from itertools import accumulate
from operator import lt, sub
from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels import check

NAME = "packing"

Ints = Sequence[int] | Tensor
Floats = Sequence[float] | Tensor


class Kind(IntEnum):
    """The kind of a token: the first two are a prefix's, the last three a branch's."""

    PROMPT = 0
    IMAGE = 1
    PERCEPTION = 2
    REASONING = 3
    ANSWER = 4


BRANCH_KINDS = (Kind.PERCEPTION, Kind.REASONING, Kind.ANSWER)


@dataclass(frozen=True, eq=False)
class Branch:
    """One continuation of a prompt: a scored segment, or a whole response.

    Args:
        token_ids: (L,), at least one.
        kind: one `Kind` for all tokens, or (L,); perception, reasoning or answer.
        weight: one weight for all tokens, or (L,).
        pair: the index, within the group, of the branch that this one is compared with: the teacher's branch of the
            same channel. None: there is none.
    """

    token_ids: Ints
    kind: int | Ints
    weight: float | Floats = 1.0
    pair: int | None = None


@dataclass(frozen=True, eq=False)
class PrefixGroup:
    """One prompt, stored once, and its branches.

    Args:
        prompt_ids: (L,), with `image_token_id` once for each merged patch of each image.
        branches: the continuations; there may be none.
        image_grids: (images, 3), patches in time, height and width of each image in order, before merging: the
            `image_grid_thw` of a Qwen-VL processor.
        weight: the weight of the prompt's tokens.
        name: the group's name in errors; None: its index.
    """

    prompt_ids: Ints
    branches: Sequence[Branch]
    image_grids: Sequence[Sequence[int]] | Tensor = ()
    weight: float = 1.0
    name: str | None = None

    @property
    def tokens(self) -> int:
        """The number of the group's tokens in a pack."""
        return len(self.prompt_ids) + sum(len(branch.token_ids) for branch in self.branches)


class Layout(NamedTuple):
    """The lengths of a pack as Python integers, so that a launch reads no device."""

    # [P] lengths of the prefixes; [S] lengths of the branches; [P] numbers of branches of the groups
    prefix: tuple[int, ...]
    branch: tuple[int, ...]
    branches: tuple[int, ...]


# what `layout_of` takes
LENGTHS = ("cu_prefix", "cu_branch", "branch_group", "last_index")


def layout_of(
    cu_prefix: Tensor, cu_branch: Tensor, branch_group: Tensor, last_index: Tensor, tokens: int, op: str = NAME
) -> Layout:
    """Returns the layout of a pack from its tensors, whose values it reads and checks.

    Args:
        cu_prefix: see `PrefixPack`.
        cu_branch: see `PrefixPack`.
        branch_group: see `PrefixPack`.
        last_index: see `PrefixPack`; it tells a branch that is in the wrong group.
        tokens: T.
        op: the name of the caller in errors.
    """
    named = dict(zip(LENGTHS, (cu_prefix, cu_branch, branch_group, last_index)))
    for name, value in named.items():
        check.tensor(op, name, value)
        check.memory(op, name, value)
        check.dtype(op, name, value, (torch.int32, torch.int64))
        check.shape(op, name, value, ("N + 1",) if name.startswith("cu_") else ("S",))
    ends, branch_ends, group, last = (x.tolist() for x in named.values())
    for name, bounds in (("cu_prefix", ends), ("cu_branch", branch_ends)):
        if bounds[:1] != [0] or any(map(lt, bounds[1:], bounds)):
            check.fail(op, f"{name} to begin with 0 and not to decrease", _shortened(bounds))
    total = ends[-1] + branch_ends[-1]
    if total != tokens:
        check.fail(op, f"cu_prefix and cu_branch to cover the pack's {tokens} tokens", total)
    groups = len(ends) - 1
    check.shape(op, "branch_group", branch_group, (len(branch_ends) - 1,))
    check.shape(op, "last_index", last_index, (len(branch_ends) - 1,))
    if group and (group[0] < 0 or group[-1] >= groups or any(map(lt, group[1:], group))):
        check.fail(op, f"branch_group in [0, {groups}) and not to decrease", _shortened(group))
    expected = [ends[g + 1] + end - 1 for g, end in zip(group, branch_ends[1:])]
    if last != expected:
        s = next(s for s, (a, b) in enumerate(zip(last, expected)) if a != b)
        check.fail(op, f"last_index {expected[s]} of branch {s}, by the lengths and branch_group", last[s])
    counts = [0] * groups
    for g in group:
        counts[g] += 1
    return Layout(tuple(map(sub, ends[1:], ends)), tuple(map(sub, branch_ends[1:], branch_ends)), tuple(counts))


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 16 else f"{values[:16]} and {len(values) - 16} more"


@dataclass(frozen=True, eq=False)
class PrefixPack:
    """Tokens of one forward pass, group by group: the prefix, then its branches. There is no padding.

    Prefixes and branches alternate, so the cumulative lengths are not offsets by themselves: branch s begins at
    `cu_prefix[branch_group[s] + 1] + cu_branch[s]`.
    """

    # [T], int64
    input_ids: Tensor
    # [T], int64: the index of the token's branch in the pack; -1: prefix
    branch: Tensor
    # [T], int64: `Kind`
    kind: Tensor
    # [3, T], int64: time, height, width; every branch begins one past the greatest position of its prefix
    position: Tensor
    # [P + 1], int32: cumulative lengths of the prefixes
    cu_prefix: Tensor
    # [S + 1], int32: cumulative lengths of the branches
    cu_branch: Tensor
    # [S], int64: the index in T of each branch's last token
    last_index: Tensor
    # [S], int64: the group of each branch; it does not decrease
    branch_group: Tensor
    # [S], int64: the branch of this pack that each branch is compared with; -1: none
    pair: Tensor
    # [T], float32
    token_weight: Tensor

    @cached_property
    def layout(self) -> Layout:
        """The lengths on the host. Packs that are made here have them from the start and read no device."""
        return layout_of(*self.lengths, self.input_ids.shape[0])

    @property
    def lengths(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors of `LENGTHS`."""
        return self.cu_prefix, self.cu_branch, self.branch_group, self.last_index

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PrefixPack":
        """Returns the pack on a device."""
        layout = self.layout
        moved = PrefixPack(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))
        # sets the cached property, so that it is not read from the device again
        moved.__dict__["layout"] = layout
        return moved


class Packed(NamedTuple):
    """A pack, and the indices of its groups, in the order of their tokens and of their images."""

    pack: PrefixPack
    groups: tuple[int, ...]


def pack_groups(
    groups: Sequence[PrefixGroup],
    budget: int,
    *,
    image_token_id: int | None = None,
    spatial_merge_size: int = 2,
) -> list[Packed]:
    """Returns packs of at most `budget` tokens that hold each group whole, once.

    Deterministic: groups go, the largest first, into the first pack that has room. The packs are in the order of their
    first groups, the groups of a pack in their given order.

    Args:
        groups: any number; a group over the budget is an error.
        budget: the most tokens of a pack.
        image_token_id: the placeholder of a merged patch; None: the prompts have no images.
        spatial_merge_size: patches along one side of a merged patch.
    """
    budget = check.integer(NAME, "budget", budget, 1, expected="budget > 0")
    sizes = [group.tokens for group in groups]
    for index, (group, size) in enumerate(zip(groups, sizes)):
        if size > budget:
            check.fail(
                NAME,
                f"{_group_name(group, index)} to have at most {budget} tokens, the budget",
                f"{size}; raise the budget or drop branches",
            )
    return [
        Packed(
            _build([groups[i] for i in chosen], chosen, image_token_id, spatial_merge_size),
            chosen,
        )
        for chosen in plan_packs(sizes, budget)
    ]


def build_pack(
    groups: Sequence[PrefixGroup], *, image_token_id: int | None = None, spatial_merge_size: int = 2
) -> PrefixPack:
    """Returns one pack of any size with all groups in their order."""
    return _build(groups, range(len(groups)), image_token_id, spatial_merge_size)


def plan_packs(sizes: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """Returns the groups of each pack of `pack_groups` from the groups' sizes in tokens."""
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        pack = next((p for p, free in enumerate(room) if free >= sizes[index]), len(packs))
        if pack == len(packs):
            packs.append([])
            room.append(budget)
        packs[pack].append(index)
        room[pack] -= sizes[index]
    return sorted(tuple(sorted(chosen)) for chosen in packs)


class TokenPlan(NamedTuple):
    """The tokens that each scheme runs through the language model for one group."""

    # four forwards for each response: caption and reasoning of the student and of the teacher
    published: int
    # the published second pass, which scores the students for the rewards
    published_scoring: int
    # the teacher's two forwards once for each group
    teacher_once: int
    # the prompt once for each response, shared by its two segments
    prefix_per_response: int
    # the prompt once for each group
    packed: int


def plan_tokens(prompt: int, students: Sequence[tuple[int, int]], teacher: tuple[int, int]) -> TokenPlan:
    """Returns the tokens that each scheme computes for one group, from lengths alone.

    Args:
        prompt: tokens of the prompt, with the image's.
        students: for each response the tokens of its caption and of its reasoning.
        teacher: the same for the teacher's response.
    """
    repeated = [2 * prompt + caption + reasoning for caption, reasoning in students]
    teacher_repeated = 2 * prompt + sum(teacher)
    texts = sum(map(sum, students)) + sum(teacher)
    return TokenPlan(
        published=sum(repeated) + len(students) * teacher_repeated,
        published_scoring=sum(repeated),
        teacher_once=sum(repeated) + teacher_repeated,
        prefix_per_response=(len(students) + 1) * prompt + texts,
        packed=prompt + texts,
    )


def prompt_positions(
    prompt_ids: Tensor,
    image_grids: Sequence[Sequence[int]] | Tensor,
    *,
    image_token_id: int | None,
    spatial_merge_size: int,
    name: str = "the prompt",
) -> Tensor:
    """Returns the M-RoPE positions (3, L) of a prompt (L,), equal to transformers' `get_rope_index` for Qwen3-VL.

    Text advances all three by one for each token. An image's tokens take the time, row and column of their merged
    patch, and the text after it continues past the image's longer side.
    """
    grids = [tuple(int(n) for n in grid) for grid in image_grids]
    is_image = torch.zeros_like(prompt_ids, dtype=torch.bool)
    if image_token_id is not None:
        is_image = prompt_ids == image_token_id
    elif grids:
        check.fail(NAME, f"image_token_id, since {name} has images", None)
    placeholders = is_image.nonzero()[:, 0].tolist()
    parts: list[Tensor] = []
    # the tokens and the placeholders that have positions, and the next position
    done = used = following = 0
    for index, grid in enumerate(grids):
        image = f"image {index} of {name}"
        rows, columns = _merged(image, grid, spatial_merge_size)
        size = rows * columns
        start = placeholders[used] if used < len(placeholders) else len(prompt_ids)
        count = int(is_image[start : start + size].sum())
        if count < size:
            check.fail(NAME, f"{size} placeholders in a row for {image}, of grid {grid}", count)
        text = start - done
        parts.append(torch.arange(following, following + text).expand(3, text))
        following += text
        row = torch.arange(rows).repeat_interleave(columns)
        column = torch.arange(columns).repeat(rows)
        parts.append(torch.stack((torch.zeros_like(row), row, column)) + following)
        following += max(rows, columns)
        done, used = start + size, used + size
    if used < len(placeholders):
        check.fail(NAME, f"{used} image placeholders in {name}, for {len(grids)} images", len(placeholders))
    text = len(prompt_ids) - done
    parts.append(torch.arange(following, following + text).expand(3, text))
    return torch.cat(parts, 1)


def _merged(image: str, grid: tuple[int, ...], merge: int) -> tuple[int, int]:
    if len(grid) != 3 or grid[0] != 1 or any(n <= 0 or n % merge for n in grid[1:]):
        check.fail(NAME, f"{image} to have a grid (1, h, w) with h and w multiples of {merge}", grid)
    return grid[1] // merge, grid[2] // merge


def _group_name(group: PrefixGroup, index: int) -> str:
    return f"group {index}" if group.name is None else f"group {index} ({group.name})"


def _vector(name: str, values: int | float | Ints | Floats, size: int | None, dtype: torch.dtype) -> Tensor:
    """Returns values as a vector on the CPU; one number stands for `size` of them."""
    vector = torch.as_tensor(values).detach().cpu()
    if vector.numel() and not dtype.is_floating_point and (vector.is_floating_point() or vector.dtype == torch.bool):
        check.fail(NAME, f"{name} to be integers", str(vector.dtype).removeprefix("torch."), TypeError)
    vector = vector.to(dtype)
    if vector.dim() == 0 and size is not None:
        return vector.repeat(size)
    check.shape(NAME, name, vector, ("L" if size is None else size,))
    return vector


def _build(
    groups: Sequence[PrefixGroup], indices: Sequence[int], image_token_id: int | None, spatial_merge_size: int
) -> PrefixPack:
    pieces = [
        piece
        for index, group in zip(indices, groups)
        for piece in _pieces(group, _group_name(group, index), image_token_id, spatial_merge_size)
    ]
    counts = tuple(len(group.branches) for group in groups)
    first = [0, *accumulate(counts)]
    branch_group = torch.arange(len(groups)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    # pieces are in the order of the groups, each prefix before its branches
    is_prefix = torch.zeros(len(pieces), dtype=torch.bool)
    is_prefix[torch.arange(len(groups)) + torch.tensor(first[:-1], dtype=torch.int64)] = True
    lengths = torch.tensor([len(piece.ids) for piece in pieces], dtype=torch.int64)
    ends = lengths.cumsum(0)
    numbers = torch.where(is_prefix, -1, (~is_prefix).cumsum(0) - 1)
    pairs = [
        -1 if branch.pair is None else first[g] + branch.pair
        for g, group in enumerate(groups)
        for branch in group.branches
    ]
    # gives a pack without groups its dtypes
    empty = _Piece(torch.empty(0).long(), torch.empty(0).long(), torch.empty(3, 0).long(), torch.empty(0))
    joined = [*pieces, empty]
    pack = PrefixPack(
        input_ids=torch.cat([piece.ids for piece in joined]),
        branch=numbers.repeat_interleave(lengths),
        kind=torch.cat([piece.kind for piece in joined]),
        position=torch.cat([piece.position for piece in joined], 1),
        cu_prefix=_cumulative(lengths[is_prefix]),
        cu_branch=_cumulative(lengths[~is_prefix]),
        last_index=ends[~is_prefix] - 1,
        branch_group=branch_group,
        pair=torch.tensor(pairs, dtype=torch.int64),
        token_weight=torch.cat([piece.weight for piece in joined]),
    )
    assert len(pack.layout.prefix) == len(groups)
    return pack


class _Piece(NamedTuple):
    ids: Tensor
    kind: Tensor
    position: Tensor
    weight: Tensor


def _pieces(group: PrefixGroup, name: str, image_token_id: int | None, spatial_merge_size: int) -> list[_Piece]:
    """Returns a group's prefix and branches."""
    prompt = _vector(f"prompt_ids of {name}", group.prompt_ids, None, torch.int64)
    position = prompt_positions(
        prompt, group.image_grids, image_token_id=image_token_id, spatial_merge_size=spatial_merge_size, name=name
    )
    kind = torch.full_like(prompt, Kind.PROMPT)
    if image_token_id is not None:
        kind[prompt == image_token_id] = Kind.IMAGE
    pieces = [_Piece(prompt, kind, position, torch.full((len(prompt),), float(group.weight)))]
    start = int(position.max()) + 1 if position.numel() else 0
    for index, branch in enumerate(group.branches):
        branch_name = f"branch {index} of {name}"
        ids = _vector(f"token_ids of {branch_name}", branch.token_ids, None, torch.int64)
        size = len(ids)
        if size == 0:
            check.fail(NAME, f"{branch_name} to have at least one token", "none")
        if image_token_id is not None and (ids == image_token_id).any():
            first = int((ids == image_token_id).nonzero()[0, 0])
            expected = f"no image placeholder in {branch_name}; ban token {image_token_id} when sampling"
            check.fail(NAME, expected, f"one at {first}")
        kind = _vector(f"kind of {branch_name}", branch.kind, size, torch.int64)
        wrong = (kind < min(BRANCH_KINDS)) | (kind > max(BRANCH_KINDS))
        if wrong.any():
            known = ", ".join(f"{k.value} ({k.name.lower()})" for k in BRANCH_KINDS)
            first = int(wrong.nonzero()[0, 0])
            check.fail(NAME, f"kinds of {branch_name} to be {known}", f"{int(kind[first])} at {first}")
        weight = _vector(f"weight of {branch_name}", branch.weight, size, torch.float32)
        if branch.pair is not None and (branch.pair == index or not 0 <= branch.pair < len(group.branches)):
            expected = f"pair of {branch_name} to be another branch of its group, in [0, {len(group.branches)})"
            check.fail(NAME, expected, branch.pair)
        pieces.append(_Piece(ids, kind, torch.arange(start, start + size).expand(3, size), weight))
    return pieces


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)
