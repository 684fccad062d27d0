"""Rows as the stages read them: immutable, validated, with their images opened."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from prism.data.errors import RowError
from prism.data.images import ImageLimits, open_image
from prism.data.schemas import ChatSchema, Message, ProblemSchema, WarmupSchema, join_sections, validate
from prism_kernels.grammar import Sections, split_response

Images = tuple[Image.Image, ...]


@dataclass(frozen=True)
class RowLimits:
    """How long texts may be; a row past a limit is not used, and nothing is ever cut. None: no limit.

    Args:
        prompt: of everything before the response; images are not counted.
        response: of a response, the student's or the teacher's.
        total: of both together.
        length: what is counted: characters, or for a tokenizer `lambda text: len(tokenizer(text)["input_ids"])`.
        images: see `ImageLimits`.
    """

    prompt: int | None = None
    response: int | None = None
    total: int | None = None
    length: Callable[[str], int] = len
    images: ImageLimits = field(default_factory=ImageLimits)


@dataclass(frozen=True)
class ChatRow:
    """A chat that ends with the assistant's turn: what SFT imitates."""

    id: str
    # role and text, `<image>` where an image goes
    messages: tuple[tuple[str, str], ...]
    images: Images


@dataclass(frozen=True)
class Pair:
    """A better and a worse text for one channel of the discriminator."""

    id: str
    channel: str
    question: str
    images: Images
    teacher: str
    student: str


@dataclass(frozen=True)
class WarmupRow:
    """A question with a teacher's and a student's response; `answer` of both is empty where the row has none."""

    id: str
    question: str
    images: Images
    teacher: Sections
    student: Sections

    @property
    def pairs(self) -> tuple[Pair, Pair]:
        """The pair of descriptions and the pair of reasonings."""
        teacher, student = (f"{s.think}\n{s.answer}".strip() for s in (self.teacher, self.student))
        return (
            Pair(self.id, "perception", self.question, self.images, self.teacher.caption, self.student.caption),
            Pair(self.id, "reasoning", self.question, self.images, teacher, student),
        )


@dataclass(frozen=True)
class ProblemRow:
    """A problem for alignment and RLVR."""

    id: str
    # role and text, `<image>` where an image goes
    prompt: tuple[tuple[str, str], ...]
    images: Images
    data_source: str
    ground_truth: str
    style: str
    equivalent_answers: tuple[str, ...]
    # a whole response in the three-part form, where the row has one
    teacher: str | None
    extra_info: Mapping[str, Any]


def read_chat(raw: Mapping[str, Any], name: str, root: Path, limits: RowLimits) -> ChatRow:
    """Returns a row of SFT: sharegpt with images, or a plain chat."""
    row = validate(ChatSchema, raw)
    *context, last = row.turns
    _check_lengths(limits, {"messages": _joined(context)}, {f"messages.{len(row.messages) - 1}": last.content})
    return ChatRow(_id(row.id, name), _pairs(row.turns), _open(row.images, "images", root, limits))


def read_warmup(raw: Mapping[str, Any], name: str, root: Path, limits: RowLimits) -> WarmupRow:
    """Returns a row of the discriminator's warm-up."""
    row = validate(WarmupSchema, raw)
    teacher, student = row.sections("teacher"), row.sections("student")
    if bool(teacher.answer) != bool(student.answer):
        # that alone would tell them apart
        gone = "student_cot" if teacher.answer else "teacher_cot"
        raise RowError("response form", gone, "expected an answer in both responses or in neither, it has none")
    responses = {"teacher_response": teacher.text, "student_response": student.text}
    _check_lengths(limits, {"question": row.question}, responses)
    images = _open(row.pictures, "image" if row.image is not None else "images", root, limits)
    return WarmupRow(_id(row.id, name), row.question, images, teacher, student)


def read_problem(raw: Mapping[str, Any], name: str, root: Path, limits: RowLimits) -> ProblemRow:
    """Returns a row of alignment and RLVR."""
    row = validate(ProblemSchema, raw)
    teacher = _teacher(row)
    _check_lengths(limits, {"prompt": _joined(row.prompt)}, {"teacher_response": teacher} if teacher else {})
    extra = {key: value for key, value in (row.extra_info or {}).items() if value is not None}
    return ProblemRow(
        _id(extra.get("id", extra.get("index")), name),
        _pairs(row.prompt),
        _open(row.images, "images", root, limits),
        row.data_source,
        row.reward_model.ground_truth,
        row.reward_model.style,
        row.reward_model.equivalent_answers,
        teacher,
        MappingProxyType(extra),
    )


READERS: dict[str, Callable[[Mapping[str, Any], str, Path, RowLimits], Any]] = {
    "chat": read_chat,
    "warmup": read_warmup,
    "problem": read_problem,
}


def _teacher(row: ProblemSchema) -> str | None:
    """Returns the teacher's whole response, put together from its parts where it is not given."""
    if row.teacher_response is None:
        if not row.teacher_caption or not row.teacher_cot:
            return None
        both = join_sections(row.teacher_caption, row.teacher_cot, "teacher")
        answer = both.answer or row.answer or row.reward_model.ground_truth
        return Sections(both.caption, both.think, answer).text
    if split_response(row.teacher_response) is None:
        problem = "expected <caption>…</caption><think>…</think><answer>…</answer>, each once and none empty"
        raise RowError("response form", "teacher_response", problem)
    return row.teacher_response


def _check_lengths(limits: RowLimits, prompt: Mapping[str, str], responses: Mapping[str, str]) -> None:
    """Raises `RowError` for the first text that is longer than its limit."""
    if limits.prompt is limits.response is limits.total is None:
        return
    ((prompt_field, prompt_text),) = prompt.items()
    before = limits.length(prompt_text)
    _check_length(prompt_field, before, limits.prompt)
    for name, text in responses.items():
        length = limits.length(text)
        _check_length(name, length, limits.response)
        _check_length(name, before + length, limits.total, " together with its prompt")


def _check_length(name: str, length: int, limit: int | None, what: str = "") -> None:
    if limit is not None and length > limit:
        raise RowError("too long", name, f"expected a length of at most {limit}{what}, got {length}")


def _open(sources: Iterable[Any], name: str, root: Path, limits: RowLimits) -> Images:
    one = name == "image"
    return tuple(
        open_image(source, name if one else f"{name}.{i}", root, limits.images) for i, source in enumerate(sources)
    )


def _joined(messages: Iterable[Message]) -> str:
    return "\n".join(message.content for message in messages)


def _pairs(messages: Iterable[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, message.content) for message in messages)


def _id(given: Any, name: str) -> str:
    return name if given is None or given == "" else str(given)
