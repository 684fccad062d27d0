"""`prism run`: the stages of a run one after the other."""

from pathlib import Path

from prism.commands.doctor import check_inputs
from prism.config import Config
from prism.runtime.disk import system_errors
from prism.runtime.lock import locked
from prism.runtime.runtime import Runtime
from prism.runtime.signals import InterruptedRunError, stop_signals
from prism.runtime.stalls import StallWatch
from prism.stages.align import align
from prism.stages.distill import distill
from prism.stages.rlvr import rlvr
from prism.stages.sft import base, sft
from prism.stages.warmup import warmup

LOOPS = {"base": base, "sft": sft, "distill": distill, "warmup": warmup, "align": align, "rlvr": rlvr}


def run(config: Config) -> int:
    """Runs all stages and returns the exit status."""
    # before the weights are read
    compared = check_inputs(config)
    folder = Path(config.run.folder)
    with system_errors(folder), locked(folder), Runtime(config) as rt:
        if compared is not None:
            rt.log.note(compared)
        try:
            with StallWatch(config.log.stall_seconds, rt.log.note):
                run_stages(rt)
        except InterruptedRunError as stop:
            rt.log.note(f"stopped; rerun the same command to resume ({rt.folder})")
            # as a shell reports a process that a signal has ended
            return 128 + stop.number
    return 0


def run_stages(rt: Runtime) -> None:
    """Runs the stages that are left."""
    rt.restore()
    with stop_signals(rt.ask_to_stop):
        rt.start()
        for name in rt.config.run.stages:
            if name not in rt.done:
                LOOPS[name](rt)
                rt.finish_stage(name)
    rt.finish()
