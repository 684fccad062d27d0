"""The three sections of a response, and the two numbers whose distributions show how far a policy has drifted."""

import re
from dataclasses import dataclass

TAGS = ("caption", "think", "answer")

# white space of the grammar is ASCII's
_SECTIONS = re.compile(r"[ \t\n\r\v\f]*".join(rf"<{tag}>(?P<{tag}>.*?)</{tag}>" for tag in TAGS), re.DOTALL)
_SPACE = " \t\n\r\v\f"
_BULLET = re.compile(r"^[ \t]*(?:[-*•–]|\d+[.)])[ \t]+\S", re.MULTILINE)
_STEP = re.compile(r"^[ \t]*(?:step[ \t]*)?\d+[.):][ \t]*\S", re.MULTILINE | re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Sections:
    """What a response says it sees, how it reasons, and its answer, without white space at the ends."""

    caption: str
    think: str
    answer: str

    @property
    def text(self) -> str:
        """The response."""
        return f"<caption>\n{self.caption}\n</caption>\n<think>\n{self.think}\n</think>\n<answer>{self.answer}</answer>"


def split_response(text: str) -> Sections | None:
    """Returns the sections of a response, or None where it breaks the grammar.

    The grammar is that of `prism_kernels.segments`: each tag once, in order, no section empty, nothing around them.
    """
    if any(text.count(mark) != 1 for tag in TAGS for mark in (f"<{tag}>", f"</{tag}>")):
        return None
    found = _SECTIONS.fullmatch(text.strip(_SPACE))
    parts = [part.strip(_SPACE) for part in found.groups()] if found else []
    return Sections(*parts) if parts and all(parts) else None


def caption_items(caption: str) -> int:
    """Returns how many items a caption has: its bullets; without any, its lines that are not empty."""
    return len(_BULLET.findall(caption)) or sum(bool(line.strip()) for line in caption.splitlines())


def reasoning_steps(think: str) -> int:
    """Returns how many steps a reasoning has: its numbered lines; without any, its sentences."""
    return len(_STEP.findall(think)) or sum(bool(part.strip()) for part in _SENTENCE_END.split(think))
