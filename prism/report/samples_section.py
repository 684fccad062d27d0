"""The section of sample rollouts: images, responses in coloured sections, scores and verdicts."""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from PIL import Image

from prism.report.run_folder import Row, RunProblems, RunRecord, number, read_rollouts
from prism.report.summary import CHANNELS
from prism.worlds.shapes.counters import PerceptionError, judge
from prism.worlds.shapes.world import ShapesSample
from prism_kernels.grammar import TAGS

# problems of a step whose responses are shown
_PROBLEMS = 2
_TAG = re.compile(rf"(</?(?:{'|'.join(TAGS)})>)")
_LABELS = {"caption": "caption", "think": "thinking", "answer": "answer"}
# labels of the recorded columns, in the order of the page
_COLUMNS = {
    "perception": "score, perception",
    "reasoning": "score, reasoning",
    "reward": "reward",
    "advantage": "advantage",
}
# reasons that do not make a response invalid
_VERDICTS = ("right", "wrong")


def samples_section(record: RunRecord, world: RunProblems) -> str:
    """Returns some responses of the first and the last recorded step of alignment and of RLVR."""
    parts = []
    for stage in ("align", "rlvr"):
        files = record.rollouts.get(stage, [])
        if not files:
            if stage in record.stages:
                parts.append(f"<h3>{escape(stage)}</h3><p>Not measured: no rollouts of this stage were recorded.</p>")
            continue
        for step, path in files[:1] + files[1:][-1:]:
            parts.append(f"<h3>{escape(stage)}, step {step} of {record.planned(stage)}</h3>{_step(path, world)}")
    if not parts:
        return "<p>Not measured: the run has no stage with rollouts.</p>"
    key = "".join(f'<span class="seg {name}"><b>{label}</b></span>' for name, label in _LABELS.items())
    return (
        f'<p class="legend">{key}<span class="seg outside"><b>outside the grammar</b></span></p>'
        f'<p class="note">For each step: the best and the worst response to the {_PROBLEMS} problems whose responses '
        "differ most in advantage, and one invalid response, if there was any. Scores are the discriminator's and have "
        "no unit; advantages are relative to the group.</p>" + "".join(parts)
    )


def segments(text: str) -> str:
    """Returns a response as HTML with its sections marked, and also the text that the grammar does not allow."""
    parts: list[str] = []
    opened: str | None = None
    text_so_far = ""
    for piece in _TAG.split(text):
        name = piece.strip("</>") if _TAG.fullmatch(piece) else None
        if name is None:
            text_so_far += piece
        elif not piece.startswith("</"):
            parts.append(_segment(opened, text_so_far, closed=False))
            opened, text_so_far = name, ""
        elif name == opened:
            parts.append(_segment(opened, text_so_far, closed=True))
            opened, text_so_far = None, ""
        else:
            # a closing tag without its opening tag is plain text
            text_so_far += piece
    return "".join([*parts, _segment(opened, text_so_far, closed=False)])


def _segment(name: str | None, text: str, closed: bool) -> str:
    if name is None:
        return f'<div class="seg outside"><b>outside</b>{escape(text.strip())}</div>' if text.strip() else ""
    label = _LABELS[name] + ("" if closed else ", not closed")
    return f'<div class="seg {name}"><b>{label}</b>{escape(text.strip())}</div>'


def _step(path: Path, world: RunProblems) -> str:
    rows = read_rollouts(path)
    if not rows:
        return "<p>No response was recorded.</p>"
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.get("problem"))]
    groups.sort(key=_spread, reverse=True)
    shown = [(group[0], _best_and_worst(group)) for group in groups[:_PROBLEMS]]
    if invalid := next((row for row in rows if not _valid(row)), None):
        shown.append((invalid, [("invalid", invalid)]))
    return _versions(rows[0]) + "".join(_card(row, responses, world) for row, responses in shown)


def _versions(row: Row) -> str:
    """Returns which policy sampled a step's responses, and which discriminator scored them."""
    if "record" not in row:
        return ""
    versions = {"policy": row["policy"], "discriminator": row["scored_by"].get(CHANNELS[0])}
    texts = [
        f"{name}: {version.get('model')}, after {version.get('step')} steps of {version.get('stage')}"
        for name, version in versions.items()
        if version is not None
    ]
    return f'<p class="note">{escape("; ".join(texts))}</p>'


def _advantage(row: Row) -> float:
    advantage = number(row.get("advantage"))
    return 0.0 if advantage is None else advantage


def _valid(row: Row) -> bool:
    return row.get("reason") is None or row["reason"] in _VERDICTS


def _spread(group: Sequence[Row]) -> float:
    advantages = [_advantage(row) for row in group if _valid(row)]
    return max(advantages) - min(advantages) if advantages else -1.0


def _best_and_worst(group: Sequence[Row]) -> list[tuple[str, Row]]:
    valid = sorted((row for row in group if _valid(row)), key=_advantage) or list(group)
    if len(valid) < 2:
        return [("the only valid one", valid[0])]
    return [(f"best of {len(group)}", valid[-1]), (f"worst of {len(group)}", valid[0])]


def _card(row: Row, responses: Sequence[tuple[str, Row]], world: RunProblems) -> str:
    sample = world.problem(row)
    picture = '<p class="note">image: not drawn, this problem is not of the embedded world</p>'
    teacher = ""
    if sample is not None:
        alt = "; ".join(f"{item.colour} {item.kind} {item.place}" for item in sample.scene.items)
        picture = f'<img src="{inline_png(sample)}" width="144" height="144" alt="{escape(alt)}">'
        teacher = f"<details><summary>the teacher's response</summary>{segments(sample.response.text)}</details>"
    name, question, answer = (escape(str(row.get(key))) for key in ("problem", "question", "answer"))
    shown = "".join(_response(title, one, sample) for title, one in responses)
    return (
        f'<article><div class="problem">{picture}<p><strong>{question}</strong></p><p>right answer: {answer}</p>'
        f'<p class="note">{name}</p>{teacher}</div><div class="responses">{shown}</div></article>'
    )


def _response(title: str, row: Row, sample: ShapesSample | None) -> str:
    cells = []
    for key, label in _COLUMNS.items():
        if key in row:
            value = number(row[key])
            cells.append((label, "not measured" if value is None else f"{value:.3f}"))
    reason = row.get("reason")
    cells.append(("verdict", "valid" if reason is None else reason if _valid(row) else f"invalid: {reason}"))
    if row.get("finish") == "length":
        cells.append(("ended by", "the limit of tokens"))
    if sample is not None:
        cells += _truth(str(row.get("response")), sample)
    lines = "".join(f"<tr><th>{escape(label)}</th><td>{escape(str(value))}</td></tr>" for label, value in cells)
    body = segments(str(row.get("response")))
    return f'<section class="response"><h4>{escape(title)}</h4>{body}<table>{lines}</table></section>'


def _truth(response: str, sample: ShapesSample) -> list[tuple[str, str]]:
    """Returns the verdicts of the embedded world's exact counters."""
    judgement = judge(response, sample.scene, sample.question)
    if not judgement.valid:
        return []
    follows = "does not follow from the caption" if judgement.reasoning.wrong else "follows from the caption"
    if judgement.reasoning.unreadable:
        follows = f"cannot be judged: {judgement.reasoning.unreadable}"
    return [
        ("caption against the scene", _errors(judgement.perception)),
        ("answer against the caption", follows),
        ("answer against the scene", "right" if judgement.correct else "wrong"),
    ]


def _errors(error: PerceptionError) -> str:
    if error.unreadable:
        return f"unreadable: {error.unreadable}"
    counts = {
        "missing": error.missing,
        "invented": error.invented,
        "of a wrong colour": error.wrong_colour,
        "of a wrong kind": error.wrong_kind,
        "at a wrong place": error.wrong_place,
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "right"


def inline_png(sample: ShapesSample) -> str:
    """Returns a sample's image as a data URL."""
    file = io.BytesIO()
    Image.fromarray(sample.image).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
