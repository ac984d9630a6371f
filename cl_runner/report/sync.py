"""`cl-runner sync DIR`: upload to Weights & Biases the runs that it lacks, in whole or in part."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cl_runner.arguments import Parser
from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder, moved_aside
from cl_runner.trackers import sending
from cl_runner.trackers.wandb import out_of_reach

AT_ONCE = 4  # runs


def parser() -> Parser:
    parser = Parser(prog="cl-runner sync", description=__doc__)
    parser.add_argument("dir", metavar="DIR", type=Path, help="a run's folder, or one with runs below it")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be sent")
    return parser


def main(argv: list[str]) -> int:
    """Upload. Exit status: 0 if all runs were sent, 1 if not.

    Raises ConfigError.
    """
    asked = parser().parse_args(argv)
    if not asked.dir.is_dir():
        raise ConfigError("sync", f"expected a folder, got {str(asked.dir)!r}")
    runs = [run for run in kept_runs(asked.dir) if sending.unsent(run)]
    running = [run for run in runs if RunFolder(run).state == "running"]
    for run in running:
        print(f"running  {run} (it will send what it has)")
    waiting = [run for run in runs if run not in running]
    if not waiting:
        print(f"nothing to send below {asked.dir}")
    elif asked.dry_run:
        for run in waiting:
            print(f"to send  {run}")
    else:
        return _send(waiting)
    return 0


def kept_runs(root: Path) -> list[Path]:
    """The runs at or below `root` that were tracked with W&B, without those below it that were moved aside."""
    runs = {log.parents[2] for log in root.glob("**/wandb/*run-*/run-*.wandb")}
    return sorted(run for run in runs if run == root or not moved_aside(run))


def _send(runs: list[Path]) -> int:
    if reason := out_of_reach():
        raise ConfigError(
            "sync", f"expected a W&B server to send {len(runs)} run{'s' * (len(runs) != 1)} to, but {reason}"
        )
    failed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for run, error in zip(runs, pool.map(sending.send, runs), strict=True):
            print(f"failed   {run}: {error}" if error else f"sent     {run}", flush=True)
            failed += error is not None
    if failed:
        print(f"{failed} of {len(runs)} runs were not sent; the same command tries them again")
    return int(failed > 0)
