"""The schemas of rows, as pydantic models: what files may say, before images are opened."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from prism.data.errors import RowError, shown
from prism_kernels.grammar import Sections, split_response

# what the schemas write where an image goes
PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

Role = Literal["system", "user", "assistant"]


def _flat(content: Any) -> Any:
    """Returns a content of text and image items as one text with placeholders."""
    if not isinstance(content, list):
        return content
    return "".join(_flat_item(item) for item in content)


def _flat_item(item: Any) -> str:
    if isinstance(item, Mapping):
        # parquet gives every item every key, with None for those it has not
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


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, BeforeValidator(_filled)]
Answer = Annotated[str, BeforeValidator(_filled), BeforeValidator(_number_as_text)]


class _Row(BaseModel):
    # other columns are the user's own
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Message(_Row):
    """A turn of a chat, in either spelling."""

    role: Annotated[Role, BeforeValidator(_role)] = Field(validation_alias=AliasChoices("role", "from"))
    content: Annotated[Text, BeforeValidator(_flat)] = Field(validation_alias=AliasChoices("content", "value"))


Messages = Annotated[tuple[Message, ...], BeforeValidator(_tuple)]
Images = Annotated[tuple[Any, ...], BeforeValidator(_tuple)]


def _check_chat(messages: tuple[Message, ...], last: Role) -> None:
    roles = [message.role for message in messages]
    if not roles:
        raise PydanticCustomError("empty text", "expected at least one message")
    if "system" in roles[1:]:
        raise PydanticCustomError("order of messages", "expected the system's message first")
    if "user" not in roles:
        raise PydanticCustomError("order of messages", "expected a user's message")
    if roles[-1] != last:
        raise PydanticCustomError("order of messages", f"expected the last message to be of {last}")


def _check_places(messages: tuple[Message, ...], images: int) -> None:
    places = sum(message.content.count(PLACEHOLDER) for message in messages)
    if places != images:
        raise _wrong_count(places, images)


def _wrong_count(places: int, images: int) -> PydanticCustomError:
    numbers = {"places": places, "images": images}
    return PydanticCustomError("image count", "expected an image for each of {places} places, got {images}", numbers)


class ChatSchema(_Row):
    """LLaMA-Factory's sharegpt-multimodal (`messages` or `conversations`, `images`), or a plain chat."""

    messages: Messages = Field(validation_alias=AliasChoices("messages", "conversations"))
    images: Images = ()
    system: str | None = None
    videos: Any = None
    audios: Any = None
    id: Any = None

    @model_validator(mode="after")
    def _whole(self) -> "ChatSchema":
        for name in ("videos", "audios"):
            if getattr(self, name):
                raise PydanticCustomError(
                    "unsupported field", "expected no {name}: only images are read", {"name": name}
                )
        _check_chat(self.messages, "assistant")
        _check_places(self.messages, len(self.images))
        return self

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages, with the system's prompt where it is a field of its own."""
        if not self.system or self.messages[0].role == "system":
            return self.messages
        return (Message(role="system", content=self.system), *self.messages)


class WarmupSchema(_Row):
    """A question with a teacher's and a student's description and reasoning.

    Each text falls back to the part of `teacher_response` or `student_response` that it is, `question` to `prompt`.
    """

    id: Any = None
    image: Any = None
    images: Images = ()
    question: Text = Field(validation_alias=AliasChoices("question", "prompt"))
    teacher_caption: Text | None = None
    teacher_cot: Text | None = None
    student_caption: Text | None = None
    student_cot: Text | None = None
    teacher_response: Text | None = None
    student_response: Text | None = None

    @model_validator(mode="after")
    def _whole(self) -> "WarmupSchema":
        if self.image is not None and self.images:
            raise PydanticCustomError("image count", "expected image or images, got both")
        places, images = self.question.count(PLACEHOLDER), len(self.pictures)
        # a question without a place has its image first
        if places not in (0, images):
            raise _wrong_count(places, images)
        return self

    @property
    def pictures(self) -> tuple[Any, ...]:
        """The images of either field."""
        return self.images if self.image is None else (self.image,)

    def sections(self, who: Literal["teacher", "student"]) -> Sections:
        """Returns the whole response of teacher or student; without an answer of its own, `answer` is empty."""
        caption, cot = getattr(self, f"{who}_caption"), getattr(self, f"{who}_cot")
        response = getattr(self, f"{who}_response")
        if caption is not None and cot is not None:
            return join_sections(caption, cot, who)
        if response is None:
            gone = f"{who}_caption" if caption is None else f"{who}_cot"
            raise RowError("missing field", gone, f"expected it, or {who}_response")
        whole = split_response(response)
        if whole is None:
            problem = "expected <caption>…</caption><think>…</think><answer>…</answer>"
            raise RowError("response form", f"{who}_response", f"{problem}, got {shown(response)}")
        if caption is None and cot is None:
            return whole
        own = join_sections(caption or whole.caption, cot if cot is not None else whole.think, who)
        return own if cot is not None else Sections(own.caption, whole.think, whole.answer)


def join_sections(caption: str, cot: str, who: str) -> Sections:
    """Returns the sections of separate texts, which may or may not carry their tags; without an answer it is empty."""
    head = caption.strip()
    if not head.startswith("<caption>"):
        head = f"<caption>{head}</caption>"
    tail = cot.strip()
    if not tail.startswith("<think>"):
        # `thinking</think><answer>…` and `thinking<answer>…` occur
        body, opened, answer = tail.partition("<answer>")
        tail = f"<think>{body.strip().removesuffix('</think>')}</think>{opened}{answer}"
    answered = "<answer>" in tail
    whole = split_response(head + tail if answered else f"{head}{tail}<answer>-</answer>")
    if whole is None:
        problem = "expected a description and a reasoning whose tags are in order"
        raise RowError("response form", f"{who}_cot", f"{problem}, got {shown(tail)}")
    return whole if answered else Sections(whole.caption, whole.think, "")


class RewardModel(_Row):
    """What a verifier needs."""

    ground_truth: Answer
    style: str = "rule"
    equivalent_answers: tuple[Answer, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            # parquet has None where a row has no list
            kept = {key: part for key, part in value.items() if part is not None or key == "ground_truth"}
            others = kept.get("equivalent_answers")
            return {**kept, "equivalent_answers": tuple(others)} if isinstance(others, list) else kept
        return value


class ProblemSchema(_Row):
    """A problem for alignment and RLVR, with a teacher's response where there is one."""

    data_source: Text
    prompt: Messages
    reward_model: RewardModel
    images: Images = ()
    teacher_caption: str | None = None
    teacher_cot: str | None = None
    teacher_response: Text | None = None
    answer: Answer | None = None
    extra_info: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ProblemSchema":
        _check_chat(self.prompt, "user")
        _check_places(self.prompt, len(self.images))
        return self


Schema = TypeVar("Schema", bound=_Row)

_CAUSES = {"missing": "missing field", "literal_error": "wrong type", "extra_forbidden": "wrong type"}


def validate(schema: type[Schema], row: Any) -> Schema:
    """Returns the row as its schema's model, or raises `RowError` for the first thing that is wrong."""
    if isinstance(row, Mapping):
        # a field that is null is one that is not there: parquet has every column in every row
        row = {key: value for key, value in row.items() if value is not None}
    try:
        return schema.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    kind, problem = first["type"], first["msg"]
    field = ".".join(map(str, first["loc"]))
    if kind == "missing":
        raise RowError("missing field", field, "expected this field, it is not there")
    # our own types are causes in words, pydantic's have underscores
    cause = kind if " " in kind else _CAUSES.get(kind, "wrong type")
    problem = problem if problem.startswith("expected") else f"expected another type: {problem}"
    raise RowError(cause, field, problem if not field else f"{problem}, got {shown(first['input'])}")
