"""The real folder and its runs, made once: two run side by side, each on one core."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from real_data import write_data
from real_folder import STEPS, make_folder
from real_runs import Place, Single, Stopped, Used, run_single, run_stopped, run_whole, use_run


@dataclass(frozen=True)
class Runs:
    """All runs, which the tests wait for."""

    whole: "Future[Path]"
    stopped: "Future[Stopped]"
    single: "Future[Single]"
    used: "Future[Used]"


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    """The models and the data."""
    folder = tmp_path_factory.mktemp("real")
    make_folder(folder / "policy", steps=STEPS)
    # of another size, as Qwen3-VL-2B beside 4B
    make_folder(folder / "base", width=48, layers=4)
    return Place(folder, write_data(folder / "data"))


@pytest.fixture(scope="session")
def runs(place) -> Iterator[Runs]:
    """All runs, started at once."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        whole, stopped, single = (pool.submit(run, place) for run in (run_whole, run_stopped, run_single))
        yield Runs(whole, stopped, single, pool.submit(lambda: use_run(place, whole.result())))


@pytest.fixture(scope="session")
def whole(runs) -> Path:
    """The folder of the uninterrupted run."""
    return runs.whole.result()


@pytest.fixture(scope="session")
def stopped(runs) -> Stopped:
    """The run that was stopped and resumed."""
    return runs.stopped.result()


@pytest.fixture(scope="session")
def single(runs) -> Single:
    """The stages as single commands."""
    return runs.single.result()


@pytest.fixture(scope="session")
def used(runs) -> Used:
    """What the commands that read the uninterrupted run printed and wrote."""
    return runs.used.result()
