"""The three kinds of rows: their schemas as pydantic models, and the validated rows, with images, that the stages read.

Of each kind there is a schema, which is what a file may say, a row, and a function that makes the row of what the file
says.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from PIL import Image
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from prism.data.files import RowError, shown
from prism.data.images import ImageLimits, StoredImage, decode, read_images
from prism.models.vocabulary import PLACEHOLDER, special_token
from prism_kernels.grammar import Sections, split_response

# columns of videos and sound, whose rows are refused
MEDIA = ("videos", "video", "audios", "audio")
# stands in a text where a video goes
VIDEO_PLACEHOLDER = "<video>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

Role = Literal["system", "user", "assistant"]
Images = tuple[Image.Image, ...]
Stored = tuple[StoredImage, ...]


def _flat(content: Any) -> Any:
    """Returns a list of text and image items as one text with placeholders."""
    if not isinstance(content, list):
        return content
    return "".join(_flat_item(item) for item in content)


def _flat_item(item: Any) -> str:
    if isinstance(item, Mapping):
        # in parquet every item has every key, some of them None
        if isinstance(item.get("text"), str) and item.get("type", "text") == "text":
            return str(item["text"])
        if item.get("type") in ("image", "image_url"):
            return PLACEHOLDER
    raise PydanticCustomError("wrong type", "expected text and image items")


def _role(value: Any) -> Any:
    if isinstance(value, str) and value in ROLES:
        return ROLES[value]
    raise PydanticCustomError("unknown role", "expected one of human, gpt, user, assistant, system")


def _filled(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("empty text", "expected a text that is not empty")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, str) and (token := special_token(value)) is not None:
        advice = f"remove it, or write {PLACEHOLDER} where an image goes"
        raise PydanticCustomError(
            "special token", "expected text without {token}, which steers the model; " + advice, {"token": token}
        )
    return value


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, BeforeValidator(_filled)]
# text that a model reads or learns
Said = Annotated[str, BeforeValidator(_plain), BeforeValidator(_filled)]
Answer = Annotated[str, BeforeValidator(_filled), BeforeValidator(_number_as_text)]


class _Schema(BaseModel):
    # further columns are the user's business
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Turn(_Schema):
    """A turn of a chat, as `role` and `content` or as `from` and `value`."""

    role: Annotated[Role, BeforeValidator(_role)] = Field(validation_alias=AliasChoices("role", "from"))
    content: Annotated[Said, BeforeValidator(_flat)] = Field(validation_alias=AliasChoices("content", "value"))


# the first error says enough, and a row may have a million
Turns = Annotated[tuple[Turn, ...], FailFast(), BeforeValidator(_tuple)]
System = Annotated[str | None, BeforeValidator(_plain)]
ImageSources = Annotated[tuple[Any, ...], BeforeValidator(_tuple)]


def _check_chat(turns: tuple[Turn, ...], last: Role) -> None:
    roles = [turn.role for turn in turns]
    if not roles:
        raise PydanticCustomError("empty text", "expected at least one message")
    if "system" in roles[1:]:
        raise PydanticCustomError("order of messages", "expected the system's message first")
    if "user" not in roles:
        raise PydanticCustomError("order of messages", "expected a user's message")
    if roles[-1] != last:
        raise PydanticCustomError("order of messages", f"expected the last message to be of {last}")


def _led(system: str | None, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Returns the messages, led by the field `system` where it is set and they have no system's message."""
    if not system or not system.strip() or turns[0].role == "system":
        return turns
    return (Turn(role="system", content=system), *turns)


def _check_placeholders(turns: tuple[Turn, ...], images: int) -> None:
    placeholders = sum(turn.content.count(PLACEHOLDER) for turn in turns)
    if placeholders != images:
        raise _wrong_count(placeholders, images)


def _wrong_count(placeholders: int, images: int) -> PydanticCustomError:
    numbers = {"places": placeholders, "images": images}
    return PydanticCustomError("image count", "expected an image for each of {places} places, got {images}", numbers)


class ChatSchema(_Schema):
    """LLaMA-Factory's sharegpt-multimodal (`messages` or `conversations`, `images`), or a plain chat."""

    messages: Turns = Field(validation_alias=AliasChoices("messages", "conversations"))
    images: ImageSources = ()
    system: System = None
    id: Any = None

    @model_validator(mode="after")
    def _whole(self) -> "ChatSchema":
        _check_chat(self.messages, "assistant")
        _check_placeholders(_led(self.system, self.messages), len(self.images))
        return self


@dataclass(frozen=True)
class ChatRow:
    """A chat that ends with the assistant's turn, which SFT imitates."""

    id: str
    # role and text, with a placeholder where an image goes
    messages: tuple[tuple[str, str], ...]
    images: Images
    # the images as their files have them
    stored: Stored


def read_chat(raw: Mapping[str, Any], name: str, root: Path, limits: ImageLimits) -> ChatRow:
    """Returns a row for SFT.

    Args:
        raw: the row as the file has it.
        name: the row's id, if it has none itself.
        root: the folder to which paths of images are relative.
        limits: which images are accepted.
    """
    row = validate(ChatSchema, raw)
    images = _open(row.images, "images", root, limits)
    return ChatRow(_id("id", row.id, name), _pairs(_led(row.system, row.messages)), *images)


def _asked(value: Any) -> Any:
    """Returns a question as a chat."""
    return [{"role": "user", "content": _plain(_filled(value))}] if isinstance(value, str) else value


class WarmupSchema(_Schema):
    """A question with a caption and a reasoning by a teacher and by a student.

    A missing caption or reasoning is taken from `teacher_response` or `student_response`, a missing `question` from
    `prompt`. Either may be a chat.
    """

    id: Any = None
    image: Any = None
    images: ImageSources = ()
    system: System = None
    question: Annotated[Turns, BeforeValidator(_asked)] = Field(validation_alias=AliasChoices("question", "prompt"))
    teacher_caption: Said | None = None
    teacher_cot: Said | None = None
    student_caption: Said | None = None
    student_cot: Said | None = None
    teacher_response: Said | None = None
    student_response: Said | None = None

    @model_validator(mode="after")
    def _whole(self) -> "WarmupSchema":
        if self.image is not None and self.images:
            raise PydanticCustomError("image count", "expected image or images, got both")
        _check_chat(self.question, "user")
        _check_placeholders(self.turns, len(self.pictures))
        return self

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The question as messages; without a placeholder, the images come before the first text of the user."""
        turns = _led(self.system, self.question)
        if any(PLACEHOLDER in turn.content for turn in turns):
            return turns
        first = [turn.role for turn in turns].index("user")
        led = PLACEHOLDER * len(self.pictures) + turns[first].content
        return (*turns[:first], Turn(role="user", content=led), *turns[first + 1 :])

    @property
    def pictures(self) -> tuple[Any, ...]:
        """The images of either field."""
        return self.images if self.image is None else (self.image,)

    def sections(self, who: Literal["teacher", "student"]) -> Sections:
        """Returns the response of the teacher or the student; `answer` is empty where it has none."""
        caption, cot = getattr(self, f"{who}_caption"), getattr(self, f"{who}_cot")
        response = getattr(self, f"{who}_response")
        if caption is not None and cot is not None:
            return join_sections(caption, cot, who)
        if response is None:
            missing = f"{who}_caption" if caption is None else f"{who}_cot"
            raise RowError("missing field", missing, f"expected it, or {who}_response")
        whole = split_response(response)
        if whole is None:
            problem = "expected <caption>…</caption><think>…</think><answer>…</answer>"
            raise RowError("response form", f"{who}_response", f"{problem}, got {shown(response)}")
        if caption is None and cot is None:
            return whole
        joined = join_sections(caption or whole.caption, cot if cot is not None else whole.think, who)
        return joined if cot is not None else Sections(joined.caption, whole.think, whole.answer)


@dataclass(frozen=True)
class WarmupRow:
    """A question with a teacher's and a student's response; without answers in the row, both have an empty one."""

    id: str
    # role and text, with a placeholder where an image goes
    prompt: tuple[tuple[str, str], ...]
    images: Images
    stored: Stored
    teacher: Sections
    student: Sections


def read_warmup(raw: Mapping[str, Any], name: str, root: Path, limits: ImageLimits) -> WarmupRow:
    """Returns a row for the discriminator's warm-up; for the arguments see `read_chat`."""
    row = validate(WarmupSchema, raw)
    teacher, student = row.sections("teacher"), row.sections("student")
    if bool(teacher.answer) != bool(student.answer):
        # the discriminator would tell them apart by the answer alone
        unanswered = "student_cot" if teacher.answer else "teacher_cot"
        raise RowError("response form", unanswered, "expected an answer in both responses or in neither, it has none")
    images = _open(row.pictures, "image" if row.image is not None else "images", root, limits)
    return WarmupRow(_id("id", row.id, name), _pairs(row.turns), *images, teacher, student)


def join_sections(caption: str, cot: str, who: str) -> Sections:
    """Returns the sections of a caption and a reasoning, with or without their tags; a missing answer is empty."""
    head = caption.strip()
    if not head.startswith("<caption>"):
        head = f"<caption>{head}</caption>"
    tail = cot.strip()
    if not tail.startswith("<think>"):
        # `thinking</think><answer>…` and `thinking<answer>…` occur in real data
        body, opened, answer = tail.partition("<answer>")
        tail = f"<think>{body.strip().removesuffix('</think>')}</think>{opened}{answer}"
    answered = "<answer>" in tail
    whole = split_response(head + tail if answered else f"{head}{tail}<answer>-</answer>")
    if whole is None:
        problem = "expected a description and a reasoning whose tags are in order"
        raise RowError("response form", f"{who}_cot", f"{problem}, got {shown(tail)}")
    return whole if answered else Sections(whole.caption, whole.think, "")


class RewardModel(_Schema):
    """What the verifier of answers needs."""

    ground_truth: Answer
    style: str = "rule"
    equivalent_answers: Annotated[tuple[Answer, ...], FailFast()] = ()

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            # parquet has None where a row has no list
            kept = {key: part for key, part in value.items() if part is not None or key == "ground_truth"}
            others = kept.get("equivalent_answers")
            return {**kept, "equivalent_answers": tuple(others)} if isinstance(others, list) else kept
        return value


class ProblemSchema(_Schema):
    """A problem for alignment and RLVR; the teacher's response is optional."""

    data_source: Text
    system: System = None
    prompt: Turns
    reward_model: RewardModel
    images: ImageSources = ()
    teacher_caption: Annotated[str | None, BeforeValidator(_plain)] = None
    teacher_cot: Annotated[str | None, BeforeValidator(_plain)] = None
    teacher_response: Said | None = None
    answer: Answer | None = None
    extra_info: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ProblemSchema":
        _check_chat(self.prompt, "user")
        _check_placeholders(_led(self.system, self.prompt), len(self.images))
        return self

    @property
    def teacher(self) -> str | None:
        """The teacher's whole response, made of its parts where the row gives only those; None without either."""
        if self.teacher_response is None:
            if not self.teacher_caption or not self.teacher_cot:
                return None
            joined = join_sections(self.teacher_caption, self.teacher_cot, "teacher")
            answer = joined.answer or self.answer or self.reward_model.ground_truth
            return Sections(joined.caption, joined.think, answer).text
        if split_response(self.teacher_response) is None:
            problem = "expected <caption>…</caption><think>…</think><answer>…</answer>, each once and none empty"
            raise RowError("response form", "teacher_response", problem)
        return self.teacher_response


@dataclass(frozen=True)
class ProblemRow:
    """A problem for alignment and RLVR."""

    id: str
    # role and text, with a placeholder where an image goes
    prompt: tuple[tuple[str, str], ...]
    images: Images
    stored: Stored
    data_source: str
    ground_truth: str
    equivalent_answers: tuple[str, ...]
    # a whole response of three sections
    teacher: str | None


def read_problem(raw: Mapping[str, Any], name: str, root: Path, limits: ImageLimits) -> ProblemRow:
    """Returns a row for alignment and RLVR; for the arguments see `read_chat`."""
    row = validate(ProblemSchema, raw)
    teacher = row.teacher
    extra = {key: value for key, value in (row.extra_info or {}).items() if value is not None}
    return ProblemRow(
        _id("extra_info.id", extra.get("id", extra.get("index")), name),
        _pairs(_led(row.system, row.prompt)),
        *_open(row.images, "images", root, limits),
        row.data_source,
        row.reward_model.ground_truth,
        row.reward_model.equivalent_answers,
        teacher,
    )


READERS: dict[str, Callable[[Mapping[str, Any], str, Path, ImageLimits], Any]] = {
    "chat": read_chat,
    "warmup": read_warmup,
    "problem": read_problem,
}


def _columns(schema: type[_Schema]) -> frozenset[str]:
    aliases = [field.validation_alias for field in schema.model_fields.values()]
    choices = [str(name) for alias in aliases if isinstance(alias, AliasChoices) for name in alias.choices]
    return frozenset([*schema.model_fields, *choices, *MEDIA])


# the columns that are looked at in the rows of each schema
COLUMNS = {
    "chat": _columns(ChatSchema),
    "warmup": _columns(WarmupSchema),
    "problem": _columns(ProblemSchema),
}

Schema = TypeVar("Schema", bound=_Schema)

_CAUSES = {"missing": "missing field", "literal_error": "wrong type", "extra_forbidden": "wrong type"}


def validate(schema: type[Schema], row: Any) -> Schema:
    """Returns the row as its schema's model, or raises `RowError` for the first defect."""
    if isinstance(row, Mapping):
        # a null field is a missing field: in parquet every row has every column
        row = {key: value for key, value in row.items() if value is not None}
        _check_media(row)
    try:
        return schema.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    kind, problem = first["type"], first["msg"]
    field = ".".join(map(str, first["loc"]))
    if kind == "missing":
        raise RowError("missing field", field, "expected this field, it is not there")
    # the types of our errors are causes, in words; pydantic's have underscores
    cause = kind if " " in kind else _CAUSES.get(kind, "wrong type")
    problem = problem if problem.startswith("expected") else f"expected another type: {problem}"
    raise RowError(cause, field, problem if not field else f"{problem}, got {shown(first['input'])}")


def _open(sources: Sequence[Any], field: str, root: Path, limits: ImageLimits) -> tuple[Images, Stored]:
    """Returns images, and the images as their files have them."""
    fields = [field if field == "image" else f"{field}.{i}" for i in range(len(sources))]
    stored = read_images(sources, fields, root, limits)
    return tuple(map(decode, stored, fields)), tuple(stored)


def _check_media(row: Mapping[str, Any]) -> None:
    """Raises `RowError` for videos and sound, in a column of their own or inside a prompt."""
    for field in MEDIA:
        if row.get(field):
            raise _unsupported(field, field)
    for field in ("messages", "conversations", "prompt", "question"):
        turns = row.get(field)
        for turn in turns if isinstance(turns, list) else [turns]:
            content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else turn
            for item in content if isinstance(content, list) else [content]:
                kind, text = (item.get("type"), item.get("text")) if isinstance(item, Mapping) else (None, item)
                if isinstance(kind, str) and kind.startswith(("video", "audio")):
                    raise _unsupported(field, kind)
                if isinstance(text, str) and VIDEO_PLACEHOLDER in text:
                    raise _unsupported(field, "video")


def _unsupported(field: str, kind: str) -> RowError:
    return RowError("unsupported field", field, f"expected no {kind[:5]}s, got some; only images are read")


def _pairs(turns: Iterable[Turn]) -> tuple[tuple[str, str], ...]:
    return tuple((turn.role, turn.content) for turn in turns)


def _id(field: str, given: Any, name: str) -> str:
    if isinstance(given, (list, dict)):
        raise RowError("wrong type", field, f"expected a text or a number, got {shown(given)}")
    return name if given is None or given == "" else str(given)
