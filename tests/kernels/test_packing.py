"""Packs: their fields one by one, budgets, errors that name the sample, and the planner's figures."""

import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels.packing import (
    Branch,
    Kind,
    PrefixGroup,
    PrefixPack,
    build_pack,
    pack_groups,
    plan_packs,
    plan_tokens,
    prompt_positions,
)

IMAGE = 99


def simple(prompt, *lengths, **options):
    return PrefixGroup(range(prompt), [Branch([1] * n, Kind.REASONING) for n in lengths], **options)


def test_fields_of_a_pack_with_an_image():
    first = PrefixGroup(
        [5, IMAGE, IMAGE, 6],
        [
            Branch([10, 11], Kind.PERCEPTION, pair=2),
            Branch([12, 13, 14], [Kind.REASONING, Kind.REASONING, Kind.ANSWER], weight=[1.0, 0.5, 2.0], pair=None),
            Branch(torch.tensor([15]), Kind.PERCEPTION, weight=3.0),
        ],
        [(1, 2, 4)],
        weight=0.25,
    )
    second = PrefixGroup(np.array([7]), [])
    third = PrefixGroup([8, 9], [Branch([16], Kind.ANSWER), Branch([17, 18], Kind.ANSWER, pair=0)])
    pack = build_pack([first, second, third], image_token_id=IMAGE)
    wanted = {
        "input_ids": [5, IMAGE, IMAGE, 6, 10, 11, 12, 13, 14, 15, 7, 8, 9, 16, 17, 18],
        "branch": [-1, -1, -1, -1, 0, 0, 1, 1, 1, 2, -1, -1, -1, 3, 4, 4],
        "kind": [0, 1, 1, 0, 2, 2, 3, 3, 4, 2, 0, 0, 0, 4, 4, 4],
        "position": [
            [0, 1, 1, 3, 4, 5, 4, 5, 6, 4, 0, 0, 1, 2, 2, 3],
            [0, 1, 1, 3, 4, 5, 4, 5, 6, 4, 0, 0, 1, 2, 2, 3],
            [0, 1, 2, 3, 4, 5, 4, 5, 6, 4, 0, 0, 1, 2, 2, 3],
        ],
        "cu_prefix": [0, 4, 5, 7],
        "cu_branch": [0, 2, 5, 6, 7, 9],
        "last_index": [5, 8, 9, 13, 15],
        "branch_group": [0, 0, 0, 2, 2],
        "pair": [2, -1, -1, -1, 3],
        "token_weight": [0.25] * 4 + [1, 1, 1, 0.5, 2, 3] + [1.0] * 6,
    }
    assert [f.name for f in fields(PrefixPack)] == list(wanted)
    for name, values in wanted.items():
        assert getattr(pack, name).tolist() == values, name
    dtypes = {"cu_prefix": torch.int32, "cu_branch": torch.int32, "token_weight": torch.float32}
    assert all(getattr(pack, name).dtype == dtypes.get(name, torch.int64) for name in wanted)
    assert pack.layout == ((4, 1, 2), (2, 3, 1, 1, 2), (3, 0, 2))
    starts = pack.cu_prefix[pack.branch_group + 1] + pack.cu_branch[:-1]
    assert starts.tolist() == [4, 6, 9, 13, 14]


def test_the_policys_pack_has_kinds_by_token():
    """A prompt once, 16 responses as branches, each with its caption, its reasoning and its answer."""
    kinds = [Kind.PERCEPTION] * 3 + [Kind.REASONING] * 4 + [Kind.ANSWER]
    group = PrefixGroup(range(20), [Branch(range(8), kinds) for _ in range(16)])
    pack = build_pack([group])
    assert pack.input_ids.numel() == 20 + 16 * 8 == group.tokens
    assert pack.kind[20:].view(16, 8).eq(torch.tensor(kinds)).all()
    assert pack.position[0, 20:].view(16, 8).eq(torch.arange(20, 28)).all()


def test_positions_of_several_images():
    ids = torch.tensor([1, *[IMAGE] * 6, *[IMAGE] * 2, 2, 3, *[IMAGE] * 1])
    grids = [(1, 4, 6), (1, 2, 4), (1, 2, 2)]
    position = prompt_positions(ids, torch.tensor(grids), image_token_id=IMAGE, spatial_merge_size=2)
    assert position.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 4, 6, 7, 8],
        [0, 1, 1, 1, 2, 2, 2, 4, 4, 6, 7, 8],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8],
    ]
    merged = prompt_positions(torch.tensor([IMAGE] * 6), [(1, 2, 3)], image_token_id=IMAGE, spatial_merge_size=1)
    assert merged.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]


def test_a_pack_of_nothing():
    pack = build_pack([])
    assert pack.input_ids.shape == (0,) and pack.position.shape == (3, 0)
    assert pack.cu_prefix.tolist() == pack.cu_branch.tolist() == [0]
    assert pack_groups([], 10) == []
    empty = build_pack([PrefixGroup([], [Branch([4, 5], Kind.ANSWER)])])
    assert empty.position.tolist() == [[0, 1]] * 3 and empty.cu_prefix.tolist() == [0, 0]


def test_the_planner_has_the_figures_of_the_published_and_the_packed_scheme():
    """Prompt 1024, caption 150, reasoning 600, 16 responses: what the design promises."""
    plan = plan_tokens(1024, [(150, 600)] * 16, (150, 600))
    assert plan.published == 89_536
    assert plan.published_scoring == 44_768
    assert plan.teacher_once == 47_566
    assert plan.prefix_per_response == 30_158
    assert plan.packed == 13_774
    assert round(plan.published / plan.packed, 1) == 6.5
    assert round((plan.published + plan.published_scoring) / plan.packed, 2) == 9.75


def test_the_planner_counts_what_is_built():
    students, teacher = [(3, 10), (5, 2), (1, 1)], (4, 9)
    plan = plan_tokens(7, students, teacher)
    texts = [Branch(range(n), kind) for pair in (*students, teacher) for n, kind in zip(pair, (2, 3))]
    assert build_pack([PrefixGroup(range(7), texts)]).input_ids.numel() == plan.packed
    repeated = [[PrefixGroup(range(7), [b]) for b in texts[2 * i : 2 * i + 2]] for i in range(4)]
    count = [build_pack(groups).input_ids.numel() for groups in repeated]
    assert sum(count) == plan.teacher_once and sum(count[:3]) == plan.published_scoring
    assert sum(count[:3]) + 3 * count[3] == plan.published
    per_response = [PrefixGroup(range(7), texts[2 * i : 2 * i + 2]) for i in range(4)]
    assert build_pack(per_response).input_ids.numel() == plan.prefix_per_response


def test_packs_hold_each_group_whole_and_once():
    groups = [simple(2, 3), simple(3), simple(4, 4, 1), simple(1), simple(1, 1), simple(5, 3)]
    packs = pack_groups(groups, 10)
    assert [packed.groups for packed in packs] == [(0, 1), (2, 3), (4, 5)]
    for packed in packs:
        alone = build_pack([groups[i] for i in packed.groups])
        assert all(torch.equal(getattr(packed.pack, f.name), getattr(alone, f.name)) for f in fields(PrefixPack))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=25), st.integers(20, 50))
def test_bin_packing(sizes, budget):
    packs = plan_packs(sizes, budget)
    assert sorted(i for chosen in packs for i in chosen) == list(range(len(sizes)))
    assert packs == sorted(packs) and all(list(chosen) == sorted(chosen) for chosen in packs)
    loads = [sum(sizes[i] for i in chosen) for chosen in packs]
    assert all(load <= budget for load in loads)
    # at most one pack is half empty: two such would have been one
    assert sum(2 * load <= budget for load in loads) <= 1
    assert packs == plan_packs(sizes, budget)


def test_moves_to_a_device():
    pack = build_pack([simple(2, 3)])
    moved = pack.to("meta")
    assert all(getattr(moved, f.name).device.type == "meta" for f in fields(PrefixPack))
    assert moved.layout == pack.layout
    assert torch.equal(pack.to("cpu").input_ids, pack.input_ids)


def branch_of(**changes):
    return PrefixGroup([1], [Branch(**{"token_ids": [2, 3], "kind": Kind.ANSWER, **changes})], name="q17")


IMAGE_GROUP = [1, *[IMAGE] * 4, 2]
BAD = [
    (
        PrefixGroup(IMAGE_GROUP, [], [(1, 4, 6)]),
        "6 placeholders in a row for image 0 of group 1, of grid (1, 4, 6), got 4",
    ),
    (
        PrefixGroup([*IMAGE_GROUP, IMAGE, 5, IMAGE], [], [(1, 4, 4), (1, 2, 4)], name="q17"),
        "2 placeholders in a row for image 1 of group 1 (q17), of grid (1, 2, 4), got 1",
    ),
    (PrefixGroup(IMAGE_GROUP, [], [(1, 4, 4), (1, 2, 2)]), "1 placeholders in a row for image 1 of group 1, of grid"),
    (PrefixGroup(IMAGE_GROUP, [], [(1, 2, 4)]), "2 image placeholders in group 1, for 1 images, got 4"),
    (PrefixGroup(IMAGE_GROUP, [], []), "0 image placeholders in group 1, for 0 images, got 4"),
    (
        PrefixGroup(IMAGE_GROUP, [], [(1, 3, 4)]),
        "image 0 of group 1 to have a grid (1, h, w) with h and w multiples of 2",
    ),
    (
        PrefixGroup(IMAGE_GROUP, [], [(2, 2, 4)]),
        "image 0 of group 1 to have a grid (1, h, w) with h and w multiples of 2",
    ),
    (branch_of(token_ids=[]), "branch 0 of group 1 (q17) to have at least one token, got none"),
    (
        branch_of(token_ids=[2, IMAGE]),
        "no image placeholder in branch 0 of group 1 (q17); ban token 99 when sampling, got",
    ),
    (
        branch_of(kind=5),
        "kinds of branch 0 of group 1 (q17) to be 2 (perception), 3 (reasoning), 4 (answer), got 5 at 0",
    ),
    (
        branch_of(kind=[2, 1]),
        "kinds of branch 0 of group 1 (q17) to be 2 (perception), 3 (reasoning), 4 (answer), got 1",
    ),
    (branch_of(kind=[2]), "kind of branch 0 of group 1 (q17) of shape (2,), got (1,)"),
    (branch_of(weight=[1.0, 2.0, 3.0]), "weight of branch 0 of group 1 (q17) of shape (2,), got (3,)"),
    (branch_of(pair=0), "pair of branch 0 of group 1 (q17) to be another branch of its group, in [0, 1), got 0"),
    (branch_of(pair=1), "pair of branch 0 of group 1 (q17) to be another branch of its group, in [0, 1), got 1"),
    (branch_of(token_ids=[[1]]), "token_ids of branch 0 of group 1 (q17) of shape (L,), got (1, 1)"),
    (simple(8, 9, 5), "group 1 to have at most 20 tokens, the budget, got 22; raise the budget or drop branches"),
]


@pytest.mark.parametrize("group, message", BAD, ids=[m[:50] for _, m in BAD])
def test_names_the_bad_sample(group, message):
    with pytest.raises(ValueError, match=re.escape(f"packing: expected {message}")):
        pack_groups([simple(1, 1), group], 20, image_token_id=IMAGE)


def test_names_other_bad_arguments():
    with pytest.raises(
        TypeError, match=r"packing: expected token_ids of branch 0 of group 1 .* to be integers, got floa"
    ):
        pack_groups([simple(1), branch_of(token_ids=[1.5])], 20)
    with pytest.raises(ValueError, match="packing: expected image_token_id, since group 0 has images, got None"):
        build_pack([PrefixGroup([1], [], [(1, 2, 2)])])
    with pytest.raises(ValueError, match="packing: expected budget > 0, got 0"):
        pack_groups([], 0)
