"""A sweep: its jobs and their states. `sweep.json` in its output_root records it."""

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder, read_json, write_atomically

FILE = "sweep.json"
LOGS = ".jobs"  # in output_root: the output of jobs in processes of their own, one folder per job
SCHEMA = 1
STATES = ("done", "running", "pending", "failed", "killed")


@dataclass
class Job:
    """One configuration of a sweep: the overrides that select it, and its run's folder below output_root."""

    overrides: list[str]
    folder: str
    hash: str
    state: str | None = None  # when the sweep last ended
    error: str | None = None  # what went wrong outside of its run; the run's status says what went wrong inside


@dataclass
class Sweep:
    """The jobs of one command. Their runs' folders are the truth about their states.

    grows: whether it is a search, which adds jobs as it goes.
    """

    root: Path
    command: str
    jobs: list[Job] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    finished: float | None = None
    grows: bool = False

    def write(self) -> None:
        """Write the sweep to `sweep.json`, in place of an earlier entry of the same command."""
        self.root.mkdir(parents=True, exist_ok=True)
        entry = {
            "command": self.command,
            "started": self.started,
            "finished": self.finished,
            "grows": self.grows,
            "jobs": [{key: value for key, value in asdict(job).items() if value is not None} for job in self.jobs],
        }
        with FileLock(self.root / f".{FILE}.lock"):
            entries = {other["command"]: other for other in _entries(self.root)}
            entries[self.command] = entry  # in its old place: the first sweep with a run is the one that made it
            content = {"schema": SCHEMA, "sweeps": list(entries.values())}
            write_atomically(self.root / FILE, json.dumps(content, indent=1))

    def outcome(self, job: Job) -> tuple[str, str]:
        return outcome(RunFolder(self.root / job.folder), job.error)

    def differing(self) -> dict[str, str]:
        """By folder: the job's overrides, without those that all jobs of the sweep share."""
        own = not_shared([job.overrides for job in self.jobs])
        return {job.folder: " ".join(words) for job, words in zip(self.jobs, own, strict=True)}

    def close(self) -> None:
        """Record that the sweep has ended, and the states of its jobs."""
        for job in self.jobs:
            job.state = self.outcome(job)[0]
        self.finished = time.time()
        self.write()

    def summary(self, done_before: int = 0, afresh: Collection[str] = ()) -> list[str]:
        """Lines for people: how many jobs are in each state, then each job that is not done, with the reason.

        `afresh`: the folders of jobs that are to start over; they are pending, whatever is there of them.
        """
        outcomes = [self._anew(job) if job.folder in afresh else self.outcome(job) for job in self.jobs]
        counts, differing = Counter(state for state, _ in outcomes), self.differing()
        parts = [f"{counts[state]} {state}" for state in STATES if counts[state]]
        if done_before:
            parts[0] += f" ({done_before} of them before)"
        lines = [f"{len(self.jobs)} job{'s' * (len(self.jobs) != 1)}: {', '.join(parts)}" if parts else "no jobs"]
        for job, (state, why) in zip(self.jobs, outcomes, strict=True):
            if state != "done":
                lines.append("  ".join(filter(None, [f"  {state:<8} {job.folder}", differing[job.folder], why])))
        return lines

    def _anew(self, job: Job) -> tuple[str, str]:
        there = (self.root / job.folder).exists()
        return "pending", "starts over; what is there now is kept in a folder beside it" if there else ""

    def counts(self) -> Counter[str]:
        return Counter(self.outcome(job)[0] for job in self.jobs)


def not_shared(commands: Sequence[Sequence[str]]) -> list[list[str]]:
    """The words of each command, without those that all of them share."""
    shared = set.intersection(*map(set, commands)) if commands else set()
    return [[word for word in words if word not in shared] for words in commands]


def sweeps(root: Path) -> list[Sweep]:
    """Every sweep whose jobs lie in `root`."""
    return [
        Sweep(
            root,
            entry["command"],
            [Job(**{name: job[name] for name in Job.__dataclass_fields__ if name in job}) for job in entry["jobs"]],
            entry["started"],
            entry.get("finished"),
            entry.get("grows", False),
        )
        for entry in _entries(root)
    ]


def this_command() -> str:
    """The command line of this process, quoted for a shell."""
    return shlex.join(["cl-runner", *sys.argv[1:]])


def of_this_command(root: Path) -> Sweep:
    """The sweep that was planned for this command."""
    return next(sweep for sweep in sweeps(root) if sweep.command == this_command())


def place_of(folder: Path) -> str:
    """A run's number among the jobs of this command's sweep: `3/16`, or `3` in a search; empty if it is alone."""
    try:
        entry = next((entry for entry in _entries(folder.parent) if entry["command"] == this_command()), {"jobs": []})
        names = [job["folder"] for job in entry["jobs"]]
    except (ConfigError, KeyError, TypeError):  # a damaged plan must not stop its runs
        return ""
    if folder.name not in names:
        return ""
    number = names.index(folder.name) + 1
    if entry.get("grows"):
        return str(number)
    return f"{number}/{len(names)}" if len(names) > 1 else ""


def outcome(run: RunFolder, error: str | None = None) -> tuple[str, str]:
    """A job's state, one of STATES, and a line with the reason for it, if there is one.

    The run's folder decides; `error`, what went wrong outside of the run, counts only while the run is pending.
    """
    state = run.state
    return ("failed", error) if error and state == "pending" else (state, _reason(run, state))


def _reason(run: RunFolder, state: str) -> str:
    status = run.status
    if state == "failed":
        return str(status.get("error") or "").partition("\n")[0]
    if state == "killed":
        return "its process died without a word"
    if state == "running":
        holder = run.held or status
        return f"in process {holder.get('pid')} on {holder.get('host')}"
    if state == "pending" and status.get("state") == "done":
        return "its results.json is missing"
    return f"stopped by {status['stopped']}" if state == "pending" and status.get("stopped") else ""


def _entries(root: Path) -> list[dict[str, Any]]:
    return read_json(root / FILE).get("sweeps", [])
