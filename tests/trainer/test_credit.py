"""Token credit gives each token the advantage of its channel, even where a token crosses a tag."""

import pytest
import torch

from prism.discriminator.score import GroupScores
from prism.models.tiny import train_tokenizer
from prism.rollout.batch import RolloutBatch
from prism.rollout.engine import Rollout
from prism.stages.align import token_credit
from prism_kernels.segments import token_bytes

TEXTS = (
    "<caption>\n- red star\n</caption>\n<think>\n1. one.\n</think>\n<answer>red</answer>",
    "<caption>\n- a\n</caption>\n<think>\nb\n</think>\n<answer>blue</answer>",
    "no tags",
)


def answered(tokenizer):
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    none = torch.zeros(0)
    return RolloutBatch([], [], [Rollout(0, 0, one, none, none, "stop") for one in ids], list(TEXTS))


def scores(tokenizer):
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


@pytest.mark.parametrize("merged", [False, True])
def test_tokens_get_the_advantage_of_their_section(merged):
    # in the merged vocabulary an answer shares its token with the end of its tag
    tokenizer = train_tokenizer([*TEXTS] * 50 if merged else ["red blue star one"] * 50)
    batch = answered(tokenizer)
    pieces = [[tokenizer.decode([token]) for token in rollout.token_ids] for rollout in batch.rollouts]
    assert any(">red" in piece for piece in pieces[0]) is merged
    mixed = torch.tensor([7.0, 8.0, 9.0])
    credit = token_credit(scores(tokenizer), batch, token_bytes(tokenizer), mixed)
    better = 2**-0.5
    for row, (perception, reasoning) in enumerate(((better, -better), (-better, better))):
        found = credit[row]
        before = [len("".join(pieces[row][:i]).encode()) for i in range(len(found))]
        text = TEXTS[row]
        for value, place in zip(found.tolist(), before):
            # whitespace at the ends of a section belongs to it, because it lies between the tags
            caption = text.index("<caption>") + 9 <= place < text.index("</caption>")
            think = text.index("<think>") + 7 <= place < text.index("</think>")
            answer = text.index("<answer>") + 8 <= place < text.index("</answer>")
            wanted = perception if caption else reasoning if think or answer else 7.0 + row
            assert value == pytest.approx(wanted, rel=1e-4)
    assert (credit[2] == 9.0).all()
