"""Scores groups of responses: limits, branches cut from texts, packs, and the scores that the discriminator gives.

P samples (groups), N responses of all samples, S branches of a pack.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prism.discriminator.model import Discriminator
from prism.models.prompts import (
    EncodedPrompt,
    Message,
    Picture,
    PromptEncoder,
    chat_messages,
    join_images,
    without_images,
)
from prism_kernels import check
from prism_kernels.grammar import TAGS, ParsedResponse, parse_response
from prism_kernels.packing import Branch, Kind, PrefixGroup, PrefixPack, pack_groups

if TYPE_CHECKING:
    from prism.config import Config
    from prism.data.problem import Problem

NAME = "score_groups"


# the scored channels, in the order of a response's branches
CHANNELS = ("perception", "reasoning")


@dataclass(frozen=True)
class ScoreLimits:
    """Limits in tokens. Nothing is ever cut.

    Args:
        budget: the most tokens of a pack; a larger group is an error.
        prompt_tokens: the most tokens of a prompt with its images; a longer prompt is an error.
        response_tokens: the most tokens of a response of student or teacher.
        too_long: `skip` makes a longer response invalid, with its reason; `raise` makes it an error.
    """

    budget: int = 16384
    prompt_tokens: int = 2048
    response_tokens: int = 6144
    too_long: str = "skip"

    def __post_init__(self) -> None:
        for name in ("budget", "prompt_tokens", "response_tokens"):
            check.positive(NAME, name, getattr(self, name))
        check.one_of(NAME, "too_long", self.too_long, ("skip", "raise"))


def score_limits(config: "Config") -> ScoreLimits:
    """Returns the lengths that the settings allow."""
    return ScoreLimits(config.score_pack_tokens, config.data.prompt_tokens, config.data.response_tokens)


class Segment(NamedTuple):
    """The tokens of a branch and the kind of each."""

    token_ids: list[int]
    kind: list[int]


@dataclass(frozen=True)
class TextBranches:
    """Cuts responses into branches.

    A branch is an opening tag, the stripped text of its segment, and the terminal token, at which it is scored. The
    reasoning branch holds the thinking and the answer. Each segment is tokenised from its text, so that sampled tokens,
    or tokens across a tag, do not tell students from teachers.
    """

    encoder: PromptEncoder
    limits: ScoreLimits

    @property
    def terminal(self) -> int:
        """The token at the end of every branch."""
        if self.encoder.tokenizer.eos_token_id is None:
            check.fail(NAME, "a tokenizer with an end-of-turn token as eos_token", "none")
        return int(self.encoder.tokenizer.eos_token_id)

    def cut(self, texts: Sequence[str], names: Sequence[str]) -> list[tuple[Segment, ...] | str]:
        """Returns each text's branches, one per channel, or the reason why it has none.

        Args:
            texts: S whole responses.
            names: their names in errors.
        """
        # normalised as the tokenizer does it, so that text and tokens have the same tags
        normalizer = self.encoder.tokenizer.backend_tokenizer.normalizer
        texts = [normalizer.normalize_str(text) for text in texts] if normalizer else texts
        parsed = [parse_response(text) for text in texts]
        branches: list[tuple[Segment, ...] | str] = list(self._reasons(texts, parsed, names))
        valid = [s for s, reason in enumerate(branches) if not reason]
        caption, think, answer = (
            self._ids([f"<{tag}>{getattr(parsed[s].sections, tag)}" for s in valid]) for tag in TAGS
        )
        (close,) = self._ids([f"</{TAGS[1]}>"])
        for s, c, t, a in zip(valid, caption, think, answer):
            branches[s] = (
                _segment((c, Kind.PERCEPTION), ([self.terminal], Kind.PERCEPTION)),
                _segment((t + close, Kind.REASONING), ([*a, self.terminal], Kind.ANSWER)),
            )
        return branches

    def _reasons(self, texts: Sequence[str], parsed: Sequence[ParsedResponse], names: Sequence[str]) -> list[str]:
        """Returns why each text is invalid, or ""."""
        reasons: list[str] = []
        limit = self.limits.response_tokens
        for ids, response, name in zip(self._ids(texts), parsed, names):
            if len(ids) > limit:
                if self.limits.too_long == "raise":
                    check.fail(NAME, f"at most {limit} tokens in {name}", len(ids))
                reasons.append(f"too long: {len(ids)} tokens, the limit is {limit}")
            else:
                reasons.append("" if response.sections else response.reason.name.lower().replace("_", " "))
        return reasons

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # special tokens spelled out in a text stay text
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return self.encoder.tokenizer(list(texts), **options)["input_ids"]


def _segment(*parts: tuple[list[int], Kind]) -> Segment:
    ids = [token for part, _ in parts for token in part]
    return Segment(ids, [int(kind) for part, kind in parts for _ in part])


@dataclass(frozen=True)
class Sample:
    """A group: one prompt with the responses to score.

    Args:
        prompt: see `PromptEncoder.encode`; or an encoded prompt with its images.
        responses: the student's whole texts, tags included.
        images: images of the prompt, in order.
        teacher: the teacher's text, with which each response is compared.
        name: name in errors; None: its index.
    """

    prompt: str | Sequence[Message] | EncodedPrompt
    responses: Sequence[str]
    images: Sequence[Picture] = ()
    teacher: str | None = None
    name: str | None = None


def sample_of(
    problem: "Problem", responses: Sequence[str], prompt: EncodedPrompt | None = None, *, teacher: str | None = None
) -> Sample:
    """Returns a problem's responses as a group.

    Args:
        problem: the problem.
        responses: texts of the student.
        prompt: the encoded prompt; None: it is encoded again, as a text-only discriminator needs it.
        teacher: the supervision; None: the problem's own.
    """
    text = problem.teacher if teacher is None else teacher
    return Sample(problem.prompt if prompt is None else prompt, responses, problem.images, text, problem.name)


class ScorePack(NamedTuple):
    """One forward pass, and the places of its scores."""

    pack: PrefixPack
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    # (S,) into the scores of both channels: first all responses, then all teachers
    slots: Tensor


class PreparedGroups(NamedTuple):
    """Samples, tokenised and packed. A group is whole in one pack."""

    packs: tuple[ScorePack, ...]
    # (N,), int64: the sample of each response
    group: Tensor
    # why a response, or a sample's teacher, has no scores; None: it has scores
    reason: tuple[str | None, ...]
    teacher_reason: tuple[str | None, ...]

    @property
    def pairs(self) -> Tensor:
        """Whether a response is compared with a teacher, (N,): both are valid."""
        valid, taught = (torch.tensor([r is None for r in why]) for why in (self.reason, self.teacher_reason))
        return valid & taught[self.group] if len(self.group) else torch.zeros(0, dtype=torch.bool)


class GroupScores(NamedTuple):
    """Raw scores, NaN where there is none, on the discriminator's device, differentiable where autograd is on."""

    # (N,)
    perception: Tensor
    reasoning: Tensor
    # (P,)
    teacher_perception: Tensor
    teacher_reasoning: Tensor
    # (N,), int64
    group: Tensor
    # see `PreparedGroups`
    reason: tuple[str | None, ...]
    teacher_reason: tuple[str | None, ...]


def score_groups(
    model: Discriminator, samples: Sequence[Sample], encoder: PromptEncoder, limits: ScoreLimits | None = None
) -> GroupScores:
    """Returns the scores of all responses and teachers of the samples; an invalid text loses only its own scores.

    The texts of students and teachers are tokenised anew and cut by the strict grammar. Each scored segment ends in the
    same terminal token, at which it is read. A sample's prompt and images go through the model once.

    Args:
        model: the discriminator; call under `torch.no_grad()` if no gradient is wanted.
        samples: samples with any number of responses.
        encoder: tokenizer and image processor of the model.
        limits: lengths and budget.
    """
    return score_prepared(model, prepare_groups(samples, encoder, limits, images=model.images))


def prepare_groups(
    samples: Sequence[Sample],
    encoder: PromptEncoder,
    limits: ScoreLimits | None = None,
    *,
    images: bool = True,
    view: Callable[[Segment], Segment] | None = None,
) -> PreparedGroups:
    """Packs the samples, without a model.

    Args:
        samples: see `score_groups`.
        encoder: see `score_groups`.
        limits: see `score_groups`.
        images: whether the discriminator sees images; otherwise prompts are made without them.
        view: reduces each segment to the part that is scored; None: all of it.
    """
    limits = limits or ScoreLimits()
    cutter = TextBranches(encoder, limits)
    owners = [p for p, sample in enumerate(samples) for _ in sample.responses]
    called = [sample.name or f"sample {p}" for p, sample in enumerate(samples)]
    names = [f"response {r} of {called[p]}" for p, s in enumerate(samples) for r in range(len(s.responses))]
    texts = [text for sample in samples for text in sample.responses]
    taught = [(p, sample.teacher) for p, sample in enumerate(samples) if sample.teacher is not None]
    cut = cutter.cut(
        [*texts, *(text for _, text in taught)], [*names, *(f"the teacher of {called[p]}" for p, _ in taught)]
    )
    students, teachers = cut[: len(texts)], dict(zip((p for p, _ in taught), cut[len(texts) :]))

    groups: list[PrefixGroup] = []
    slots: list[Tensor] = []
    prompts: list[EncodedPrompt] = []
    first = 0
    for p, sample in enumerate(samples):
        prompt = _encode(sample, called[p], encoder, limits, images)
        members = students[first : first + len(sample.responses)]
        branches, items = _branches(members, teachers.get(p), view)
        # an item of the group is the teacher (-1) or one of its responses
        numbers = torch.tensor([len(texts) + p if item < 0 else first + item for item, _ in items], dtype=torch.int64)
        channels = torch.tensor([channel for _, channel in items], dtype=torch.int64)
        slots.append(channels * (len(texts) + len(samples)) + numbers)
        grids = () if prompt.image_grid_thw is None else prompt.image_grid_thw
        groups.append(PrefixGroup(prompt.input_ids, branches, image_grids=grids, name=called[p]))
        prompts.append(prompt)
        first += len(members)
    return PreparedGroups(
        _packs(groups, slots, prompts, encoder, limits.budget),
        torch.tensor(owners, dtype=torch.int64),
        tuple(map(_reason, students)),
        tuple(_reason(teachers.get(p, "no teacher")) for p in range(len(samples))),
    )


def score_prepared(model: Discriminator, prepared: PreparedGroups, packs: Iterable[int] | None = None) -> GroupScores:
    """Returns the scores of prepared groups.

    Args:
        model: see `score_groups`.
        prepared: from `prepare_groups`.
        packs: the packs to run; None: all. The scores of the others are NaN. A training step runs one pack at a time.
    """
    device = model.value_head.weight.device
    responses, samples = len(prepared.reason), len(prepared.teacher_reason)
    chosen = range(len(prepared.packs)) if packs is None else packs
    scores: list[Tensor] = []
    slots: list[Tensor] = []
    for index in chosen:
        part = prepared.packs[index]
        pixels, grids = (None if t is None else t.to(device) for t in (part.pixel_values, part.image_grid_thw))
        scores.append(model(part.pack.to(device), pixels, grids))
        slots.append(part.slots.to(device))
    if not scores:
        scores, slots = [torch.zeros(0, device=device)], [torch.zeros(0, dtype=torch.int64, device=device)]
    found = torch.cat(scores)
    both = found.new_full((len(CHANNELS) * (responses + samples),), torch.nan).index_copy(0, torch.cat(slots), found)
    channels = both.unflatten(0, (len(CHANNELS), responses + samples))
    return GroupScores(
        perception=channels[0, :responses],
        reasoning=channels[1, :responses],
        teacher_perception=channels[0, responses:],
        teacher_reasoning=channels[1, responses:],
        group=prepared.group.to(device),
        reason=prepared.reason,
        teacher_reason=prepared.teacher_reason,
    )


def _branches(
    students: Sequence[tuple[Segment, ...] | str],
    teacher: tuple[Segment, ...] | str | None,
    view: Callable[[Segment], Segment] | None,
) -> tuple[list[Branch], list[tuple[int, int]]]:
    """Returns a group's branches, the teacher's last, and the owner of each: a student's index or -1, and a channel."""
    valid = [(item, cut) for item, cut in enumerate(students) if not isinstance(cut, str)]
    first_teacher = len(CHANNELS) * len(valid)
    taught = isinstance(teacher, tuple)
    if isinstance(teacher, tuple):
        valid.append((-1, teacher))
    branches = []
    for item, cut in valid:
        for channel, segment in enumerate(cut if view is None else map(view, cut)):
            pair = first_teacher + channel if taught and item >= 0 else None
            branches.append(Branch(segment.token_ids, segment.kind, pair=pair))
    return branches, [(item, channel) for item, _ in valid for channel in range(len(CHANNELS))]


def _reason(cut: tuple[Segment, ...] | str) -> str | None:
    return cut if isinstance(cut, str) else None


def _encode(sample: Sample, name: str, encoder: PromptEncoder, limits: ScoreLimits, images: bool) -> EncodedPrompt:
    if isinstance(sample.prompt, EncodedPrompt):
        prompt = sample.prompt
        if prompt.pixel_values is not None and not images:
            check.fail(NAME, f"the prompt of {name} as text, for a text-only discriminator", "patches")
    elif images:
        prompt = encoder.encode(sample.prompt, sample.images, name=name)
    else:
        prompt = encoder.encode(without_images(chat_messages(sample.prompt)), name=name)
    tokens = len(prompt.input_ids)
    if tokens > limits.prompt_tokens:
        check.fail(NAME, f"at most {limits.prompt_tokens} prompt tokens in {name}", tokens)
    return prompt


def _packs(
    groups: Sequence[PrefixGroup],
    slots: Sequence[Tensor],
    prompts: Sequence[EncodedPrompt],
    encoder: PromptEncoder,
    budget: int,
) -> tuple[ScorePack, ...]:
    # a group without a valid text has nothing to score, so its prompt is not computed
    scored = [index for index, group in enumerate(groups) if group.branches]
    packed = pack_groups(
        [groups[index] for index in scored],
        budget,
        image_token_id=encoder.image_token_id,
        spatial_merge_size=encoder.spatial_merge_size,
    )
    parts = []
    for pack, members in packed:
        chosen = [scored[member] for member in members]
        places = torch.cat([slots[index] for index in chosen])
        parts.append(ScorePack(pack, *join_images([prompts[index] for index in chosen]), places))
    return tuple(parts)
