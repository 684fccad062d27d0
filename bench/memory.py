"""Measures peak extra memory on the CPU in a child process, because a process has only one resident set.

The parent keeps a `MemoryChild` for each case and asks it about one contender and pass at a time. A question is one
line of JSON, and so is its answer.
"""

import json
import os
import select
import subprocess
import sys
from dataclasses import asdict

import torch

from bench.cases import Case
from bench.registry import Call, Contender, contenders
from bench.results import memory_environment
from bench.stage import Stage

ANSWER_LIMIT_S = 180


class MemoryChild:
    """A process with the inputs of one case; the first question starts it, and the next one restarts it if it died."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._process: subprocess.Popen[str] | None = None

    def peak_extra(self, contender: Contender, pass_: str) -> int:
        """Returns the peak extra memory in bytes, measured in the child process."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        child = self._process
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps({"contender": contender.name, "pass": pass_}) + "\n")
        child.stdin.flush()
        if not select.select([child.stdout], [], [], ANSWER_LIMIT_S)[0]:
            self.close()
            raise RuntimeError(f"the memory measurement gave no answer in {ANSWER_LIMIT_S} s")
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"the memory measurement's process ended with exit code {child.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the memory measurement failed: {answer['error']}")
        return answer["peak_extra_bytes"]

    def _start(self) -> "subprocess.Popen[str]":
        spec = json.dumps({"case": asdict(self.case), "threads": torch.get_num_threads()})
        return subprocess.Popen(
            [sys.executable, "-m", "bench.memory", spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=memory_environment() | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        )

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main(spec: str) -> None:
    """Answers questions until the parent closes the pipe."""
    wanted = json.loads(spec)
    torch.set_num_threads(wanted["threads"])
    # libraries may print to stdout; that must not look like an answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    stage = Stage(Case(**wanted["case"]), "cpu")
    known = {c.name: c for c in contenders(stage.case.op, "cpu")}
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            contender = known[question["contender"]]
            if contender.name not in calls:
                calls[contender.name] = contender.load()
            peak = stage.peak_extra(calls[contender.name], contender.destroys, question["pass"])
            answer = {"peak_extra_bytes": peak}
        except Exception as error:
            # a peer may fail in any way; the next question may be about another contender
            stage.setup(True)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
