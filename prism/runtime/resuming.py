"""What may have changed in the settings of a run that goes on.

A run goes on with the settings that it began with. Free are those that say how it is computed, kept and told: `log`,
`checkpoint`, `memory`, `run.folder`, `run.device`, `rollout.engine` and `rollout.cache_tokens` (results then differ by
rounding, if at all), and the tables of a stage that has not begun: `optimiser.STAGE` and the like.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prism.config import STAGES, Config, ConfigError
from prism.runtime import checkpoint

FREE = ("log", "checkpoint", "memory", "run.folder", "run.device", "rollout.engine", "rollout.cache_tokens")
RULE = (
    f"take another run.folder, or the old values; what may differ: {', '.join(FREE)}, and the tables of stages that "
    "have not begun"
)


def check_settings(config: Config) -> None:
    """Raises `ConfigError` where the folder's run, from whose checkpoint this one would go on, had other settings."""
    folder = Path(config.run.folder)
    if not (folder / "config.json").is_file():
        return
    before = json.loads((folder / "config.json").read_text())
    changed = list(_changed(before, config.model_dump(mode="json"), Config().model_dump(mode="json")))
    newest = checkpoint.newest(folder / "checkpoints") if changed else None
    if newest is None:
        # nothing, or nothing to go on from: a run that was killed at its start begins anew
        return
    begun = [*newest.extra["done"], *([newest.extra["stage"]] if newest.extra["stage"] else [])]
    lines = [
        f"{key}: expected {json.dumps(old)}, with which the run in {str(folder)!r} began, got {json.dumps(new)}"
        for key, old, new in changed
        if not _free(key, begun)
    ]
    if lines:
        raise ConfigError("\n".join([*lines, RULE]))


def _changed(
    before: Mapping[str, Any], now: Mapping[str, Any], default: Mapping[str, Any], parents: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Yields keys with their old and new values; what an older version did not know had its default."""
    for name, new in now.items():
        usual = default.get(name, new)
        old = before.get(name, usual)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changed(old, new, usual if isinstance(usual, dict) else {}, (*parents, name))
        elif old != new:
            yield ".".join((*parents, name)), old, new


def _free(key: str, begun: Sequence[str]) -> bool:
    if any(key == free or key.startswith(f"{free}.") for free in FREE):
        return True
    # warm-up and distillation read alignment's tables; the discriminator's optimiser is alignment's
    taken = {*begun, *(["align"] if {"warmup", "distill"} & set(begun) else [])}
    parts = key.replace("optimiser.discriminator", "optimiser.align").split(".")
    return any(stage in parts for stage in STAGES if stage not in taken)
