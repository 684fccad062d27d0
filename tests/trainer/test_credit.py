"""Token credit gives each token the advantage of the channel whose text it holds, wherever a vocabulary cuts."""

import re

import numpy as np
import pytest
import torch
from discriminator_cases import SIZE
from score_cases import ENCODER, response
from stage_cases import FixedRun

from prism.config import Adam, load_config
from prism.data.problem import Problem
from prism.discriminator.model import Discriminator
from prism.discriminator.score import CHANNELS, GroupScores
from prism.models.prompts import PromptEncoder
from prism.models.tiny import tiny_discriminator_base, train_tokenizer
from prism.rollout.batch import RolloutBatch
from prism.rollout.engine import Rollout
from prism.runtime.optimiser import StageOptimiser
from prism.stages import align as alignment
from prism.stages.align import CHANNEL, token_credit
from prism_kernels import group_advantage
from prism_kernels.segments import TAGS, TokenBytes, token_bytes

TEXTS = (
    "<caption>\n- red star\n</caption>\n<think>\n1. one.\n</think>\n<answer>red</answer>",
    "<caption>\n- a\n</caption>\n<think>\nb\n</think>\n<answer>blue</answer>",
    "no tags",
)


def rollout_of(ids, prompt=0):
    none = torch.zeros(0)
    return Rollout(prompt, 0, ids, none, none, "stop")


def scores():
    nan = float("nan")
    return GroupScores(
        perception=torch.tensor([1.0, 0.0, nan]),
        reasoning=torch.tensor([0.0, 2.0, nan]),
        teacher_perception=torch.zeros(1),
        teacher_reasoning=torch.zeros(1),
        group=torch.zeros(3, dtype=torch.int64),
        reason=(None, None, "missing tag"),
        teacher_reason=(None,),
    )


def channels_of(pieces):
    """Returns the channels whose text each token holds, by brute force."""
    whole = b"".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    texts = [re.search(f"<{tag}>(.*)</{tag}>".encode(), whole, re.DOTALL).span(1) for tag in TAGS]
    return [
        {CHANNEL[i] for i, text in enumerate(texts) if {*range(*text)} & {*range(end - len(piece), end)}}
        for piece, end in zip(pieces, ends)
    ]


def check_credit(responses, table):
    """Compares the credit of three responses, whose scores are those above, with brute force."""
    batch = RolloutBatch([], [], [rollout_of(ids) for ids in responses], list(TEXTS))
    credit = token_credit(scores(), batch, table, torch.tensor([7.0, 8.0, 9.0]))
    better = 2**-0.5
    for row, (perception, reasoning) in enumerate(((better, -better), (-better, better))):
        pieces = [table.data[table.offsets[i] : table.offsets[i + 1]].tobytes() for i in responses[row]]
        wanted = [
            {(0,): perception, (1,): reasoning}.get(tuple(channels), 7.0 + row) for channels in channels_of(pieces)
        ]
        assert credit[row].tolist() == pytest.approx(wanted, rel=1e-4), pieces
    assert (credit[2] == 9.0).all()
    return credit


@pytest.mark.parametrize("merged", [False, True])
def test_tokens_get_the_advantage_of_their_section(merged):
    # in the merged vocabulary an answer shares its token with the end of its tag
    tokenizer = train_tokenizer([*TEXTS] * 50 if merged else ["red blue star one"] * 50)
    responses = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    pieces = [tokenizer.decode([token]) for token in responses[0]]
    credit = check_credit(responses, token_bytes(tokenizer))
    assert (">red" in pieces) is merged
    if merged:
        assert float(credit[0][pieces.index(">red")]) == pytest.approx(-(2**-0.5), rel=1e-4)


def test_a_token_of_both_channels_gets_the_mixture():
    pieces = [b"<caption>a", b" b</caption><think>c", b" d", b"</think><answer>e", b"", b"</answer>", b"no tags"]
    table = TokenBytes(np.frombuffer(b"".join(pieces), dtype=np.uint8), np.cumsum([0] + [len(p) for p in pieces]))
    credit = check_credit([[0, 1, 2, 3, 4, 5], [0, 1, 3, 5], [6]], table)
    better = 2**-0.5
    assert credit[0].tolist() == pytest.approx([better, 7.0, -better, -better, 7.0, 7.0], rel=1e-4)


def test_an_unscored_response_gets_the_mixture_even_if_its_sections_are_found():
    tokenizer = train_tokenizer(["red blue star one"] * 50)
    responses = [tokenizer(text)["input_ids"] for text in (*TEXTS[:2], TEXTS[0])]
    batch = RolloutBatch([], [], [rollout_of(ids) for ids in responses], [*TEXTS[:2], TEXTS[0]])
    given = scores()._replace(reason=(None, None, "too long: 80 tokens, the limit is 70"))
    credit = token_credit(given, batch, token_bytes(tokenizer), torch.tensor([7.0, 8.0, 9.0]))
    assert (credit[2] == 9.0).all() and not (credit[0] == 7.0).all()


def test_alignment_credits_multiple_choice_answers(monkeypatch):
    """A vocabulary with `>B` and `)</`: scored as answers, and credited with the reasoning."""
    texts = [response(f"- a cube ({i})", f"One ({i})", answer).replace("\n</", "</") for i, answer in enumerate("BCBD")]
    tokenizer = train_tokenizer([*texts, "<answer>B</answer>", "<answer>C</answer>", "<answer>D</answer>"] * 50)
    encoder = PromptEncoder(tokenizer, ENCODER.image_processor)
    weight = torch.randn(1, SIZE.hidden_size, generator=torch.Generator().manual_seed(5))
    model = Discriminator(tiny_discriminator_base(SIZE, tokenizer=tokenizer)[0].model, value_weight=weight)
    problems = [Problem("a", "Which?", teacher=texts[0])]
    prompts = [problem.encoded(encoder) for problem in problems]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    pieces = [[tokenizer.decode([token]) for token in one] for one in ids]
    assert all(f">{answer}" in row and ")</" in row for answer, row in zip("BCBD", pieces))
    batch = RolloutBatch(problems, prompts, [rollout_of(one) for one in ids], texts)

    packed, given, columns = [], [], {}
    prepare = alignment.prepare_groups
    monkeypatch.setattr(alignment, "prepare_groups", lambda *a, **k: packed.append(prepare(*a, **k)) or packed[-1])
    monkeypatch.setattr(
        alignment, "policy_update", lambda policy, batch, advantage, *a, **k: given.append(advantage) or {}
    )
    changes = {"algorithm.align.token_credit": True, "algorithm.align.kl_coef": 0.0}
    config = load_config(None, {"memory.score_pack_tokens": "none", **changes})
    optimiser = StageOptimiser(model, Adam(lr=1e-3), 4)
    run = FixedRun(
        config,
        batch,
        policy=None,
        discriminator=model,
        encoder=encoder,
        policy_optimiser=object(),
        discriminator_optimiser=optimiser,
    )
    run.finish = lambda metrics, batch, shown, scored_by: columns.update(shown)
    alignment.align(run)

    # the discriminator sees each answer whole
    (seen,) = (tokenizer.decode(pack.pack.input_ids) for prepared in packed for pack in prepared.packs)
    assert columns["reason"] == (None,) * 4
    assert re.findall(r"</think><answer>(.*?)<\|im_end\|>", seen) == [*"BCBD", "B"]
    # and the policy is credited for it
    perception, reasoning = (group_advantage(torch.tensor(columns[name]), batch.group) for name in CHANNELS)
    assert ((perception - reasoning).abs() > 1e-2).all()
    for row, credit in enumerate(given[0]):
        wanted = {")</": perception, " cube": perception, "One": reasoning, f">{'BCBD'[row]}": reasoning}
        mixture = torch.tensor(columns["advantage"])
        wanted |= dict.fromkeys(("<caption", "</think>", "<answer", "answer"), mixture)
        for piece, advantage in wanted.items():
            assert float(credit[pieces[row].index(piece)]) == pytest.approx(float(advantage[row]), rel=1e-5), piece
