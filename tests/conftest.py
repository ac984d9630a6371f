import gc
import logging
import os
import signal
import sys

import pytest
import torch

from cl_runner.__main__ import main

torch.set_num_threads(1)  # the suite runs in several processes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and starts others, and threads that wait for a core spin
# Shells start background processes with Ctrl-C ignored, and nohup with the terminal's hang-up ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_passed_over():
    """A collection, with which every run begins, need not look at what the imports have made."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # what is still frozen at the end, Triton's bindings take for leaks


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


SMALL = [
    "stream=split_digits",
    "model=mlp",
    "model.widths=[16]",
    "optimizer.lr=0.01",
    "trainer.epochs=2",
    "tracker=local",
    "device=cpu",
]


@pytest.fixture
def cl_runner(tmp_path, monkeypatch, capsys, no_picture):
    """Call the command line in an empty folder: overrides -> (exit status, what it printed)."""
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])  # Hydra's own help leaves some behind
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CL_RUNNER_DATA", raising=False)

    def call(*overrides: str, small: bool = True) -> tuple[int, str]:
        words = [*SMALL, *overrides] if small else list(overrides)
        monkeypatch.setattr(sys, "argv", ["cl-runner", *words])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


@pytest.fixture
def no_picture(monkeypatch):
    """Draw no accuracy.png: that takes longer than the rest of a small run."""
    monkeypatch.setattr("cl_runner.trackers.journal.draw_accuracy", lambda *_: None)


@pytest.fixture
def the_run(tmp_path):
    """The one run's folder below `outputs`."""

    def find():
        (folder,) = [path for path in (tmp_path / "outputs").iterdir() if path.is_dir()]
        return folder

    return find
