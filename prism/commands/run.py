"""`prism run`: the stages of a run one after the other."""

from prism.commands.doctor import check_inputs
from prism.config import Config
from prism.runtime.runtime import InterruptedRunError, Runtime
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
    with Runtime(config) as rt:
        if compared is not None:
            rt.log.note(compared)
        try:
            run_stages(rt)
        except InterruptedRunError:
            rt.log.note(f"stopped with a checkpoint; rerun the same command to resume ({rt.folder})")
            return 130
    return 0


def run_stages(rt: Runtime) -> None:
    """Runs the stages that are left."""
    rt.restore()
    with rt.interruptible():
        rt.start()
        for name in rt.config.run.stages:
            if name not in rt.done:
                LOOPS[name](rt)
                rt.finish_stage(name)
    rt.finish()
