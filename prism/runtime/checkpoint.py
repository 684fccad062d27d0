"""Checkpoints: written aside, then renamed; verified by checksums; the newest few are kept.

A folder of checkpoints holds `step-00000040/` with `<model>.safetensors`, `training.pt` (optimisers, schedulers, random
generators; read with weights_only=True), `state.json`, and `checksums.json`, which is written last.

A run resumes with the settings that it began with. Only those of FREE, which do not change what is learnt, and the
tables of stages that have not begun (`optimiser.STAGE` and the like) may differ.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from prism.config import STAGES, Config, ConfigError

LOG = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
CHECKSUMS = "checksums.json"
# prefix of folders that are not yet, or no longer, checkpoints
ASIDE = ".aside-"
# version of the checkpoint format; version 1 named optimisers by number
FORMAT = 2

# settings that may change on resume: they do not change what is learnt, but for rounding
FREE = ("log", "checkpoint", "memory", "run.folder", "run.device", "rollout.engine", "rollout.cache_tokens")
RULE = (
    f"take another run.folder, or the old values; what may differ: {', '.join(FREE)}, and the tables of stages that "
    "have not begun"
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


class Stateful(Protocol):
    """An optimiser or a scheduler, whose state is tensors and plain Python values."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Restores a state."""


class Restored(NamedTuple):
    """The part of a checkpoint that is not loaded into models and optimisers."""

    step: int
    # as given to `save`
    extra: dict[str, Any]
    path: Path


def save(
    folder: str | Path,
    step: int,
    models: Mapping[str, nn.Module],
    training: Mapping[str, Stateful],
    extra: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Writes a checkpoint and returns its folder; a kill at any moment leaves earlier checkpoints intact.

    Args:
        folder: folder of all checkpoints.
        step: number of finished steps; a second checkpoint of one step replaces the first only once it is complete.
        models: weights and buffers, by name.
        training: optimisers and schedulers, by name.
        extra: JSON values: the stage, positions in data and metrics, counts. The random states of torch, its devices,
            numpy and Python are always saved.
        keep: number of newest checkpoints to keep.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"save: expected keep >= 1 and step >= 0, got {keep} and {step}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    final = _unused(folder, step)
    aside = folder / f"{ASIDE}{final.name}"
    aside.mkdir()
    for name, model in models.items():
        save_model(model, str(aside / f"{name}.safetensors"))
    states = {name: one.state_dict() for name, one in training.items()}
    torch.save({"training": states, "random": _random_states()}, aside / "training.pt")
    names = {"models": sorted(models), "training": sorted(training)}
    state = {"format": FORMAT, "step": step, **names, "extra": dict(extra)}
    (aside / "state.json").write_text(json.dumps(state))
    sums = {path.name: _checksum(path) for path in sorted(aside.iterdir())}
    (aside / CHECKSUMS).write_text(json.dumps(sums, indent=2))
    for path in (*aside.iterdir(), aside):
        _to_disk(path)
    aside.rename(final)
    _to_disk(folder)
    for old in list(checkpoints(folder))[keep:]:
        _remove(old)
    return final


def load(
    folder: str | Path,
    models: Mapping[str, nn.Module],
    training: Mapping[str, Stateful],
    *,
    tell: Callable[[str], object] = LOG.warning,
) -> Restored | None:
    """Loads the newest intact checkpoint (see `newest`) into the objects; returns None if there is none.

    It also restores the random states.

    Args:
        folder: folder of all checkpoints.
        models: as given to `save`, of the same shapes.
        training: as given to `save`.
        tell: called with a message for each damaged checkpoint.
    """
    last = newest(folder, tell=tell)
    if last is not None:
        _load(last.path, models, training, tell)
    return last


def newest(folder: str | Path, *, tell: Callable[[str], object] = LOG.warning) -> Restored | None:
    """Returns the newest intact checkpoint without loading it; None if there is none.

    A damaged checkpoint is renamed to `damaged-step-…`, and the one before it is used. If all are damaged, it raises.

    Args:
        folder: folder of all checkpoints.
        tell: called with a message for each damaged checkpoint.
    """
    folder = Path(folder)
    paths = list(checkpoints(folder))
    for path in paths:
        problem = damage(path)
        if problem is None:
            state = json.loads((path / "state.json").read_text())
            return Restored(state["step"], state["extra"], path)
        kept = path.with_name(f"damaged-{path.name}")
        if kept.exists():
            shutil.rmtree(kept)
        path.rename(kept)
        tell(f"{path} is damaged: {problem}; it was renamed to {kept.name}, and the checkpoint before it is used")
    if paths:
        raise CheckpointError(
            f"{folder}: expected an intact checkpoint, but all {len(paths)} are damaged; use another folder"
        )
    return None


def checkpoints(folder: str | Path) -> Iterator[Path]:
    """Yields the folders of the checkpoints, newest first, damaged ones included."""
    found = []
    for path in Path(folder).glob("step-*"):
        if match := NAME.fullmatch(path.name):
            found.append((int(match[1]), int(match[2] or 0), path))
    yield from (path for _, _, path in sorted(found, reverse=True))


def damage(path: Path) -> str | None:
    """Returns why a checkpoint is damaged; None if its files are as they were written."""
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        for name, expected in sums.items():
            if _checksum(path / name) != expected:
                return f"{name} differs from what was written"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _check_format(path: Path) -> None:
    try:
        saved = json.loads((path / "state.json").read_text()).get("format", 1)
    except (OSError, ValueError):
        # damaged: `newest` finds that out
        return
    if saved != FORMAT:
        advice = "finish the run with the version that began it, or take another run.folder"
        raise CheckpointError(f"{path}: expected a checkpoint of format {FORMAT}, got format {saved}; {advice}")


def _load(
    path: Path, models: Mapping[str, nn.Module], training: Mapping[str, Stateful], tell: Callable[[str], object]
) -> None:
    _check_format(path)
    state = json.loads((path / "state.json").read_text())
    for kind, ours in (("models", models), ("training", training)):
        if state[kind] != sorted(ours):
            wanted, got = (", ".join(names) or "none" for names in (sorted(ours), state[kind]))
            raise CheckpointError(f"{path}: expected {kind} {wanted}, got {got}")
    for name, model in models.items():
        try:
            load_model(model, str(path / f"{name}.safetensors"))
        except RuntimeError as error:
            raise CheckpointError(f"{path}: expected weights that fit the model {name!r}: {error}") from None
    saved = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
    for name, one in training.items():
        one.load_state_dict(saved["training"][name])
    devices, now = len(saved["random"]["cuda"]), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices != now:
        tell(f"{path} was saved with {devices} GPUs, this machine has {now}: numbers drawn on GPUs will differ")
    _set_random_states(saved["random"])


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        # torch.load with weights_only reads tensors but no numpy arrays
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"]):
            torch.cuda.set_rng_state(state, device)
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def _unused(folder: Path, step: int) -> Path:
    """Returns a new folder, which sorts after other checkpoints of the same step."""
    path, again = folder / f"step-{step:08d}", 0
    while path.exists():
        again += 1
        path = folder / f"step-{step:08d}.{again}"
    return path


def _remove(path: Path) -> None:
    """Deletes a checkpoint; it is renamed first, so that no reader sees it half deleted."""
    aside = path.with_name(f"{ASIDE}{path.name}.old")
    path.rename(aside)
    shutil.rmtree(aside)


def _clean(folder: Path) -> None:
    """Deletes unfinished checkpoints that a killed run left."""
    for path in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(path)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def check_settings(config: Config) -> None:
    """Raises where the run in this folder cannot be resumed: another checkpoint format, or other settings."""
    folder = Path(config.run.folder)
    if not (folder / "config.json").is_file():
        return
    for path in islice(checkpoints(folder / "checkpoints"), 1):
        _check_format(path)
    before = json.loads((folder / "config.json").read_text())
    changed = list(_changed(before, config.model_dump(mode="json"), Config().model_dump(mode="json")))
    last = newest(folder / "checkpoints") if changed else None
    if last is None:
        # no changes, or no checkpoint to resume from
        return
    begun = [*last.extra["done"], *([last.extra["stage"]] if last.extra["stage"] else [])]
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
    """Yields keys with their old and new values; a key that an older version did not have had its default."""
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
