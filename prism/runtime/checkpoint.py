"""Checkpoints: written aside, then renamed; verified by checksums; the newest few are kept.

A folder of checkpoints holds `step-00000040/` with `<model>.safetensors`, `training.pt` (optimisers, schedulers, random
generators; read with weights_only=True), `state.json`, and `checksums.json`, which is written last.
"""

import hashlib
import json
import logging
import os
import pickle
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from prism.runtime.disk import ASIDE, NotSavedError, delete

LOG = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
STATE, TRAINING, CHECKSUMS = "state.json", "training.pt", "checksums.json"
# version of the checkpoint format; 1 named optimisers by number, 2 had neither settings nor checksums of data files
FORMAT = 3


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
    # names of the models
    models: tuple[str, ...] = ()


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
    try:
        _write(aside, step, models, training, extra)
        aside.rename(final)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        delete(aside)
        raise NotSavedError(
            f"{final}: this checkpoint could not be written: {error}; earlier ones are intact: make room, and rerun "
            "the same command to resume"
        ) from error
    for old in list(checkpoints(folder))[keep:]:
        _remove(old)
    return final


def _write(
    aside: Path, step: int, models: Mapping[str, nn.Module], training: Mapping[str, Stateful], extra: Mapping[str, Any]
) -> None:
    aside.mkdir()
    for name, model in models.items():
        save_model(model, str(aside / f"{name}.safetensors"))
    states = {name: one.state_dict() for name, one in training.items()}
    _torch_save({"training": states, "random": _random_states()}, aside / TRAINING)
    names = {"models": sorted(models), "training": sorted(training)}
    state = {"format": FORMAT, "step": step, **names, "extra": dict(extra)}
    (aside / STATE).write_text(json.dumps(state))
    sums = {path.name: _checksum(path) for path in sorted(aside.iterdir())}
    (aside / CHECKSUMS).write_text(json.dumps(sums, indent=2))
    for path in (*aside.iterdir(), aside):
        _to_disk(path)


def _torch_save(value: dict[str, Any], path: Path) -> None:
    try:
        torch.save(value, path)
    except RuntimeError as error:
        # the writer has no error of its own for a full disk; its messages name its source file
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(f"{path.name}: torch's writer failed, as on a full disk: {error}") from error


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
        load_from(last.path, models, training, tell=tell)
    return last


def newest(folder: str | Path, *, tell: Callable[[str], object] = LOG.warning) -> Restored | None:
    """Returns the newest intact checkpoint without loading it; None if there is none.

    A damaged checkpoint is renamed to `damaged-step-…`, and the one before it is used. If all are damaged, or the
    newest is of another format, it raises.

    Args:
        folder: folder of all checkpoints.
        tell: called with a message for each damaged checkpoint.
    """
    folder = Path(folder)
    paths = list(checkpoints(folder))
    for path in paths:
        _check_format(path)
        problem = damage(path)
        if problem is None:
            return read(path)
        kept = path.with_name(f"damaged-{path.name}")
        delete(kept)
        path.rename(kept)
        tell(f"{path} is damaged: {problem}; it was renamed to {kept.name}, and the checkpoint before it is used")
    if paths:
        raise CheckpointError(
            f"{folder}: expected an intact checkpoint, but all {len(paths)} are damaged; use another folder"
        )
    return None


def read(path: Path) -> Restored:
    """Returns an intact checkpoint without loading it; raises if it is of another format."""
    _check_format(path)
    state = _state(path)
    return Restored(state["step"], state["extra"], path, tuple(state["models"]))


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
        sums = _table(path / CHECKSUMS)
        for name, expected in sums.items():
            if _checksum(path / name) != expected:
                return f"{name} differs from what was written"
        state = _state(path)
        files = {STATE, TRAINING, *(f"{name}.safetensors" for name in state["models"])}
        if missing := sorted(files - sums.keys()):
            return f"{CHECKSUMS}: expected a checksum of {', '.join(missing)}, got none"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        # other errors of the system, such as a lack of rights, say nothing about the content
        return str(error)
    return None


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: expected JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path.name}: expected a table, got {type(table).__name__}")
    return table


def _state(path: Path) -> dict[str, Any]:
    state = _table(path / STATE)
    kinds = {"step": int, "models": list, "training": list, "extra": dict}
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"{STATE}: expected {key} of type {kind.__name__}, got {type(state.get(key)).__name__}")
    return state


def _check_format(path: Path) -> None:
    try:
        state = _table(path / STATE)
    except (OSError, ValueError):
        # damaged: `damage` says how
        return
    saved = state.get("format", 1)
    # a table without a step is no format's
    if saved != FORMAT and "step" in state:
        advice = "finish the run with the version that began it, or take another run.folder"
        raise CheckpointError(f"{path}: expected a checkpoint of format {FORMAT}, got format {saved}; {advice}")


def load_from(
    path: Path,
    models: Mapping[str, nn.Module],
    training: Mapping[str, Stateful],
    *,
    tell: Callable[[str], object] = LOG.warning,
) -> None:
    """Loads a checkpoint that `newest` has returned; see `load`."""
    state = _state(path)
    for kind, ours in (("models", models), ("training", training)):
        if state[kind] != sorted(ours):
            wanted, got = (", ".join(names) or "none" for names in (sorted(ours), state[kind]))
            raise CheckpointError(f"{path}: expected {kind} {wanted}, got {got}")
    for name, model in models.items():
        try:
            load_model(model, str(path / f"{name}.safetensors"))
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{path}: expected weights that fit the model {name!r}: {error}") from None
    try:
        saved = torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path / TRAINING}: expected a file that torch.save wrote: {error}") from None
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
    delete(aside)


def _clean(folder: Path) -> None:
    """Deletes unfinished checkpoints that a killed run left."""
    for path in folder.glob(f"{ASIDE}*"):
        delete(path)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
