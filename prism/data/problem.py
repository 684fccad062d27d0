"""Problems, which stages learn from: a prompt with images, an answer, a teacher's response; made of rows of data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from prism.config import STAGES, DataSettings
from prism.data.files import RowError
from prism.data.rows import ChatRow, ProblemRow, WarmupRow
from prism.models.policy import response_ids
from prism.models.prompts import EncodedPrompt, ImageSizeError, Message, Picture, PromptEncoder
from prism.models.vocabulary import PLACEHOLDER

if TYPE_CHECKING:
    from prism.worlds.shapes.world import ShapesSample

# stages that need a teacher's response
TAUGHT = ("distill", "warmup", "align")


@dataclass(frozen=True, eq=False)
class Problem:
    """One prompt with all that is known of it; unknown parts are None."""

    name: str
    prompt: str | Sequence[Message]
    images: tuple[Picture, ...] = ()
    answer: str | None = None
    equivalent_answers: tuple[str, ...] = ()
    teacher: str | None = None
    # the response to compare with the teacher's; None: the policy generates one
    student: str | None = None
    # the result of `encoded`, once it is known
    encoding: EncodedPrompt | None = None
    # the beginning of the assistant's turn, which the response continues
    prefix: str | None = None
    # the sample of the embedded world, whose errors can be counted exactly
    shape: "ShapesSample | None" = None
    # the row's, for custom rewards
    data_source: str = ""

    @property
    def question(self) -> str:
        """The prompt as one text; of a chat all messages, as lines `role: text`."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)

    def encoded(self, encoder: PromptEncoder) -> EncodedPrompt:
        """Returns the prompt as tokens and patches."""
        if self.encoding is not None:
            return self.encoding
        prompt = encoder.encode(self.prompt, self.images, name=self.name)
        return prompt if self.prefix is None else encoder.answered(prompt, self.prefix)


def step_random(seed: int, stage: str, step: int) -> np.random.Generator:
    """Returns the random generator of a step. It depends on the arguments only, so a resumed run draws the same."""
    return np.random.default_rng([seed, STAGES.index(stage), step])


def problem_reader(
    use: str, encoder: PromptEncoder, data: DataSettings, *, patches: bool = True
) -> Callable[[Any], Problem]:
    """Returns a function that makes a problem of a row, or raises `RowError`.

    Args:
        use: the stage, or the held-out split.
        encoder: encodes prompts for the policy.
        data: settings with the longest prompt and response.
        patches: whether the images are cut into patches; a row that is only checked needs none.
    """

    def read(row: Any) -> Problem:
        if isinstance(row, ProblemRow):
            problem, responses = _problem(row, use)
        else:
            problem, responses = _chat(row) if isinstance(row, ChatRow) else _pair(row)
        texts = [("prompt", text) for text in _texts(problem.prompt)] + list(responses.items())
        whole = {"prompt": "".join(_texts(problem.prompt)), **responses}
        for field, text in whole.items():
            key = "prompt_tokens" if field == "prompt" else "response_tokens"
            # a text of megabytes would be tokenised for minutes
            if encoder.is_longer(text, limit := getattr(data, key)):
                raise _too_long(field, key, limit, f"{len(text)} characters")
        for field, text in texts:
            _check_text(field, text, encoder)
        try:
            ids = encoder.token_ids(problem.prompt, [image.size for image in problem.images], name=problem.name)
        except ImageSizeError as error:
            raise RowError("image size", "images", str(error)) from None
        if len(ids) > data.prompt_tokens:
            raise _too_long("prompt", "prompt_tokens", data.prompt_tokens, len(ids))
        for field, tokens in zip(responses, response_ids(list(responses.values()), encoder) if responses else ()):
            if len(tokens) > data.response_tokens:
                raise _too_long(field, "response_tokens", data.response_tokens, len(tokens))
        encoding = encoder.with_patches(ids, problem.images if patches else ())
        # with its encoding, so that images are cut into patches once; the decoded images are as large as the patches
        return replace(problem, encoding=encoding, images=row.stored)

    return read


# a problem, and by field the responses whose lengths are checked
WithResponses = tuple[Problem, Mapping[str, str]]


def problem_of_row(row: ProblemRow) -> Problem:
    """Returns the problem of a row."""
    return Problem(
        row.id,
        _prompt(row.prompt),
        row.images,
        row.ground_truth,
        row.equivalent_answers,
        row.teacher,
        data_source=row.data_source,
    )


def _problem(row: ProblemRow, use: str) -> WithResponses:
    if use not in TAUGHT:
        return problem_of_row(row), {}
    if row.teacher is None:
        needed = f"expected it, or teacher_caption and teacher_cot: {use} needs the teacher's response"
        raise RowError("missing field", "teacher_response", needed)
    return problem_of_row(row), {"teacher_response": row.teacher}


def _chat(row: ChatRow) -> WithResponses:
    *context, (_, response) = row.messages
    field = f"messages.{len(context)}"
    if PLACEHOLDER in response:
        raise RowError("image count", field, "expected images before the last message, which is learnt, got one in it")
    return Problem(row.id, _prompt(context), row.images, teacher=response), {field: response}


def _pair(row: WarmupRow) -> WithResponses:
    if not row.teacher.answer:
        needed = "expected <answer>…</answer> in both responses, with which reasoning is scored in alignment too"
        raise RowError("response form", "teacher_cot", needed)
    problem = Problem(row.id, _prompt(row.prompt), row.images, teacher=row.teacher.text, student=row.student.text)
    return problem, {"teacher_response": row.teacher.text, "student_response": row.student.text}


def _prompt(turns: Sequence[tuple[str, str]]) -> str | tuple[Message, ...]:
    """Returns a chat, or only the text if the user's turn is the only one."""
    if [role for role, _ in turns] == ["user"]:
        return turns[0][1]
    return tuple({"role": role, "content": text} for role, text in turns)


def _texts(prompt: str | Sequence[Message]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def _check_text(field: str, text: str, encoder: PromptEncoder) -> None:
    """Raises `RowError` if a text spells a special token of the tokenizer, with its images or without them."""
    for form in (text, text.replace(PLACEHOLDER, "")):
        if (token := encoder.special_token(form)) is not None:
            raise RowError("special token", field, f"expected text without {token}, which steers the model; remove it")


def _too_long(field: str, key: str, limit: int, got: object) -> RowError:
    return RowError("too long", field, f"expected at most data.{key} = {limit} tokens, got {got}")
