"""Problems, which stages learn from: a prompt with images, an answer, a teacher's response; made of rows of data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from prism.config import STAGES, DataSettings
from prism.data.files import RowError
from prism.data.rows import PLACEHOLDER, ChatRow, ProblemRow, WarmupRow
from prism.models.policy import response_ids
from prism.models.prompts import IMAGE_TOKEN, VIDEO_TOKEN, EncodedPrompt, Message, PromptEncoder, chat_messages

if TYPE_CHECKING:
    from prism.worlds.shapes.world import ShapesSample

# stages that need a teacher's response
TAUGHT = ("distill", "warmup", "align")


@dataclass(frozen=True, eq=False)
class Problem:
    """One prompt with all that is known of it; unknown parts are None."""

    name: str
    prompt: str | Sequence[Message]
    images: tuple[Image.Image, ...] = ()
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


def problem_reader(use: str, encoder: PromptEncoder, data: DataSettings) -> Callable[[Any], Problem]:
    """Returns a function that makes a problem of a row, or raises `RowError`.

    Args:
        use: the stage, or the held-out split.
        encoder: encodes prompts for the policy.
        data: settings with the longest prompt and response.
    """

    def read(row: Any) -> Problem:
        if isinstance(row, ProblemRow):
            problem, responses = _problem(row, use)
        else:
            problem, responses = _chat(row) if isinstance(row, ChatRow) else _pair(row)
        _check_text(problem)
        encoding = problem.encoded(encoder)
        _check_length("prompt", len(encoding.input_ids), data.prompt_tokens, "prompt_tokens")
        for field, ids in zip(responses, response_ids(list(responses.values()), encoder) if responses else ()):
            _check_length(field, len(ids), data.response_tokens, "response_tokens")
        # with its encoding, so that images are cut into patches once
        return replace(problem, encoding=encoding)

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
    problem = Problem(row.id, row.question, row.images, teacher=row.teacher.text, student=row.student.text)
    return problem, {"teacher_response": row.teacher.text, "student_response": row.student.text}


def _prompt(turns: Sequence[tuple[str, str]]) -> str | tuple[Message, ...]:
    """Returns a chat, or only the text if the user's turn is the only one."""
    if [role for role, _ in turns] == ["user"]:
        return turns[0][1]
    return tuple({"role": role, "content": text} for role, text in turns)


def _check_text(problem: Problem) -> None:
    """Raises `RowError` if a text spells a token that stands for part of an image."""
    for message in chat_messages(problem.prompt, len(problem.images)):
        for item in message["content"]:
            for token in (IMAGE_TOKEN, VIDEO_TOKEN):
                if token in item.get("text", ""):
                    raise RowError("vision token", "prompt", f"expected {PLACEHOLDER} where an image goes, got {token}")


def _check_length(field: str, tokens: int, limit: int, key: str) -> None:
    if tokens > limit:
        raise RowError("too long", field, f"expected at most data.{key} = {limit} tokens, got {tokens}")
