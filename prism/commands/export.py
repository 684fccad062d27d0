"""`prism export`: writes a run's policy as a Hugging Face folder with a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_model

from prism.config import Config, to_toml
from prism.data.files import DataError
from prism.models.building import plain_policy
from prism.models.tiny import save_processor
from prism.report.run_folder import Row, RunRecord
from prism.runtime import checkpoint
from prism.runtime.disk import delete
from prism.runtime.resuming import state_of

CARD = "README.md"
STAGES = {
    "base": "pretraining of the embedded world's base",
    "sft": "supervised fine-tuning on demonstrations",
    "distill": "fine-tuning on the demonstrations of alignment",
    "warmup": "warm-up of the discriminator; the policy stays as it is",
    "align": "adversarial alignment with the demonstrations, by a discriminator of perception and of reasoning",
    "rlvr": "reinforcement learning with verified rewards",
}
# figures of an evaluation that the card shows, if they are known
FIGURES = ("samples", "accuracy", "format", "length", "perception_error", "reasoning_error")


def write_export(record: RunRecord, to: Path) -> Path:
    """Writes the policy of a finished run, or of the newest checkpoint, to a folder, and returns the folder.

    Args:
        record: the run.
        to: the folder, which does not exist yet.
    """
    aside = to.with_name(f".aside-{to.name}")
    # left by an export that was killed
    delete(aside)
    state = "finished" if record.finished else _write_checkpoint(record, aside)
    if record.finished:
        _copy_policy(record.folder / "policy", aside)
    (aside / CARD).write_text(card(record, state), encoding="utf-8")
    aside.rename(to)
    print(f"{to}: the policy of {record.folder}, {state}; fill in `license:` in {to / CARD} before it is published")
    return to


def card(record: RunRecord, state: str) -> str:
    """Returns the model card of a run's policy.

    Args:
        record: the run.
        state: `finished`, or how far the run is.
    """
    base = record.setting("model.policy")
    tiny = base == "tiny"
    # a local folder means nothing to other people
    hub = not tiny and not Path(base).exists()
    head = ["library_name: transformers", "pipeline_tag: image-text-to-text", "tags:", "- prism"]
    head += [f"base_model: {base}"] if hub else []
    steps = [
        f"| {stage} | {STAGES[stage]} | {len(record.steps.get(stage, ()))} of {record.planned(stage)} |"
        for stage in record.stages
    ]
    purpose = (
        "A tiny model of the embedded world of coloured shapes. It shows the method and knows nothing else.\n\n"
        if tiny
        else ""
    )
    return f"""---
{chr(10).join(head)}
# license: to be filled in, see below
---

# {record.folder.name}

A Qwen3-VL policy, trained by PRISM from `{base}`. The run is {state}.

{purpose}Load it with `AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained` of transformers.

## Licence

Not set. It depends on the licence of the model that training began with, and of the data. Whoever publishes this model
must fill it in, here and as `license:` above.

## Stages

| stage | | steps |
|---|---|---:|
{chr(10).join(steps)}

## Figures

{_figures(record)}

Nothing else was measured: this run does not show how the model performs on other data, or how it can be misused.

## Settings

{_environment(record)}

{_settings(record)}
"""


def _copy_policy(folder: Path, to: Path) -> None:
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder}: expected the policy that a finished run leaves, there is none; run the stages again"
        )
    shutil.copytree(folder, to)


def _write_checkpoint(record: RunRecord, to: Path) -> str:
    """Writes the policy of the newest undamaged checkpoint, and returns the state of the run in words."""
    folder = record.folder / "checkpoints"
    # damaged checkpoints are not renamed here: the run may still be active
    whole = next((path for path in checkpoint.checkpoints(folder) if checkpoint.damage(path) is None), None)
    if whole is None:
        raise DataError(
            f"{record.folder}: expected a finished run or a checkpoint in {folder}, got neither; resume the run"
        )
    state = state_of(checkpoint.read(whole))
    try:
        # with these the weights were trained, whatever is in config.json now
        config = Config.model_validate(state.settings)
    except ValidationError as error:
        raise DataError(f"{whole / checkpoint.STATE}: expected settings that can be used here: {error}") from error
    on_cpu = config.run.model_copy(update={"device": "cpu"})
    model, encoder = plain_policy(config.model_copy(update={"run": on_cpu}))
    load_model(model, str(whole / "policy.safetensors"))
    model.save_pretrained(to)
    save_processor(to, encoder)
    return f"not finished: this is its checkpoint of {state.where}"


def _figures(record: RunRecord) -> str:
    rows: list[tuple[str, str, Row]] = []
    for after, figures in record.evaluations.items():
        rows.append((after, str(figures.get("split", "")), figures))
        rows += [(after, name, inner) for name, inner in figures.items() if name == "test" and isinstance(inner, dict)]
    names = [name for name in FIGURES if any(name in figures for _, _, figures in rows)]
    if not names:
        return "None: the run had no held-out problems."
    lines = [
        f"| after | split | {' | '.join(name.replace('_', ' ') for name in names)} |",
        f"|---|---|{'---:|' * len(names)}",
    ]
    for after, split, figures in rows:
        lines.append(f"| {after} | {split} | {' | '.join(_cell(figures, name) for name in names)} |")
    data = record.setting("data.source")
    problems = "problems of the embedded world" if data == "shapes" else "problems of the run's own files"
    heading = f"On {problems} that nothing was trained on, with standard errors where they are known."
    return "\n".join([heading, "", *lines])


def _cell(figures: Row, name: str) -> str:
    value: Any = figures.get(name)
    if not isinstance(value, (int, float)):
        return ""
    if isinstance(value, int):
        return str(value)
    error = figures.get(f"{name}_se")
    text = f"{value:.1f}" if name == "length" else f"{value:.3f}"
    return f"{text} ± {error:.3f}" if isinstance(error, float) else text


def _environment(record: RunRecord) -> str:
    versions = (record.environment or {}).get("versions", {})
    made = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"Made with {made}." if made else "The versions that it was made with are not known."


def _settings(record: RunRecord) -> str:
    try:
        return f"```toml\n{to_toml(Config.model_validate(record.settings)).strip()}\n```"
    except ValidationError:
        # settings of another version, or with files that are not here: as the run wrote them
        return f"```json\n{json.dumps(record.settings, indent=2)}\n```"
