"""`make reproduce`: runs the arms and writes their figures, pictures and the page. Rerun to resume."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from bench.reproduce.arms import chosen
from bench.reproduce.figures import collect, line, seed_figures, summarise
from bench.reproduce.jobs import Experiment, Job, JobError
from bench.reproduce.page import PAGE, RESULTS, block, insert, load_all
from bench.reproduce.scheduler import run_all
from prism.config import ConfigError, RlvrAlgorithm, parse_overrides

ALGORITHMS = get_args(RlvrAlgorithm.model_fields["name"].annotation)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if an arm failed, 2 for wrong settings or folders, 130 after Ctrl-C."""
    parsed, flags = _parser().parse_known_args(arguments)
    try:
        experiment = Experiment(parsed.config, parse_overrides(flags), parsed.algorithm, parsed.out, parsed.replace)
        wanted = chosen(experiment.arms, parsed.arms)
        jobs = [Job(seed, arm) for seed in dict.fromkeys(parsed.seeds) for arm in wanted.values()]
        for job in jobs:
            experiment.settings(job, planned=True)
        complete = parsed.collect or run_all(
            experiment,
            jobs,
            at_once=parsed.jobs,
            tell=partial(print, flush=True),
            figures=lambda job: line(seed_figures(experiment, job)),
        )
        write(experiment, parsed.seeds, parsed.jobs, parsed.results)
    except (ConfigError, JobError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; rerun the same command to resume", file=sys.stderr)
        return 130
    return 0 if complete else 1


def write(experiment: Experiment, seeds: Sequence[int], at_once: int, folder: Path) -> None:
    """Writes the results file of the finished arms, its pictures and, in the repository's own folder, the page.

    Args:
        experiment: the experiment.
        seeds: the seeds that count.
        at_once: the number of arms that ran at a time.
        folder: the folder of the results.
    """
    # imported here, so that bad flags are reported at once
    from bench.reproduce.plots import draw_all
    from bench.results import header
    from bench.results import write as write_json

    measured = collect(experiment, seeds, print)
    if not measured["arms"]:
        raise JobError(f"{experiment.out}: expected a finished arm, got none")
    content = {**header("reproduce", "cpu"), "at_once": at_once, **summarise(measured)}
    path = folder / f"{experiment.algorithm}.json"
    write_json(path, content)
    made = [path, *draw_all(content, path.with_suffix(""))]
    if folder.resolve() == RESULTS.resolve():
        PAGE.write_text(insert(PAGE.read_text(), block(load_all(folder))))
        made.append(PAGE)
    print(f"wrote {', '.join(map(str, made))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench.reproduce",
        description=__doc__,
        allow_abbrev=False,
        epilog="--section.key VALUE changes any other setting",
    )
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.toml"), help="the base settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of runs and world")
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="arms to run, with the arms that they need; default: all but the ablations",
    )
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="grpo", help="algorithm of RLVR")
    parser.add_argument("--out", type=Path, default=Path("out/reproduce"), help="folder of the arms")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time; if several, each has one thread")
    parser.add_argument(
        "--replace", action="store_true", help="remove and rerun arms that were made with other settings"
    )
    parser.add_argument("--collect", action="store_true", help="run nothing; write the figures of the finished arms")
    return parser


if __name__ == "__main__":
    sys.exit(main())
