"""Small runs that were stopped, and their folders."""

import json
from contextlib import suppress

from test_run import SMALL

from prism.commands.run import run_stages
from prism.config import load_config
from prism.runtime import checkpoint
from prism.runtime.runtime import Runtime
from prism.runtime.signals import InterruptedRunError

CHANGES = {**SMALL, "run.stages": ["sft", "rlvr"], "optimiser.sft.steps": 2, "optimiser.rlvr.steps": 2}


def flags(folder, **changes):
    given = {**CHANGES, "run.folder": str(folder), **changes}
    lists = {key: ",".join(value) if isinstance(value, list) else str(value) for key, value in given.items()}
    return [part for key, value in lists.items() for part in (f"--{key}", value)]


def stop_in(folder, stage, step, **changes):
    """Runs as far as a step of a stage, or to the end if it never comes, and returns the run."""
    config = load_config(None, {**CHANGES, "run.folder": str(folder), **changes})
    with Runtime(config) as one:
        write = one.log.step

        def stop_there(number, metrics, shown=None):
            write(number, metrics, shown)
            if (one.log._stage, number) == (stage, step):
                one.ask_to_stop()

        one.log.step = stop_there
        with suppress(InterruptedRunError):
            run_stages(one)
    return one


def snapshot(folder, without=""):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != without}


def rewritten(path, state):
    """Writes a checkpoint's state, and its checksum."""
    (path / "state.json").write_text(json.dumps(state))
    sums = json.loads((path / "checksums.json").read_text())
    (path / "checksums.json").write_text(json.dumps({**sums, "state.json": checkpoint._checksum(path / "state.json")}))
