"""Jobs in processes of their own."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from cl_runner import CONF
from cl_runner.launchers import Slurm, Worker, carry_out, slots
from cl_runner.report import status
from cl_runner.targets import imported
from hydra_plugins.cl_runner.launchers import Local

PRESETS = sorted(CONF.glob("hydra/*/*.yaml"))


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_setting_stands_in_its_preset_with_its_default(file):
    node = yaml.safe_load(file.read_text())
    parameters = inspect.signature(imported(node.pop("_target_"))).parameters
    assert {key: value or None for key, value in node.items()} == {
        name: parameter.default or None for name, parameter in parameters.items()
    }
    assert file.read_text().startswith("# ")


SIGNALS = {
    "ctrl-c": signal.SIGINT,
    "sigterm": signal.SIGTERM,
    "sighup": signal.SIGHUP,
}  # the signal sent in the middle of a job of that name


class Toy:
    """A pool whose jobs end when they are told to."""

    outlives = False

    def __init__(self) -> None:
        self.submitted: list[tuple[str, int]] = []
        self.most = self.running = 0
        self.stopped: list[str] = []

    def submit(self, worker, slot):
        self.submitted.append((worker.folder.name, slot))
        self.running += 1
        self.most = max(self.most, self.running)
        return worker

    def over(self, job):
        if job.folder.name in SIGNALS and not self.stopped:
            signal.raise_signal(SIGNALS[job.folder.name])
        self.running -= 1
        return True

    def result(self, job):
        return "it failed" if job.folder.name == "fails" else None

    def stop(self, job):
        self.stopped.append(job.folder.name)


def workers(*names):
    return [Worker([], Path(name)) for name in names]


def test_no_more_jobs_than_allowed_run_at_once_and_all_are_run(monkeypatch):
    monkeypatch.setattr("cl_runner.launchers.POLL", 0)
    pool = Toy()
    assert carry_out(workers("a", "fails", "c", "d", "e"), pool, at_once=2) == [None, "it failed", None, None, None]
    assert [name for name, _ in pool.submitted] == ["a", "fails", "c", "d", "e"]
    assert {slot for _, slot in pool.submitted} == {0, 1}
    assert pool.most == 2


@pytest.mark.parametrize("name", SIGNALS)
def test_ctrl_c_sigterm_and_sighup_stop_the_jobs_that_run_and_begin_no_other(name, monkeypatch):
    monkeypatch.setattr("cl_runner.launchers.POLL", 0)
    pool = Toy()
    with pytest.raises(KeyboardInterrupt):
        carry_out(workers(name, "b", "c"), pool, at_once=2)
    assert pool.stopped == [name, "b"]
    assert len(pool.submitted) == 2


@pytest.mark.parametrize(
    ("gpus", "at_once", "per_gpu", "expected"),
    [
        ([], 8, 1, [("", "1")] * 8),
        ([], 2, 1, [("", "4")] * 2),
        (["0", "1"], 2, 1, [("0", "4"), ("1", "4")]),
        (["3", "7"], 4, 2, [("3", "2"), ("7", "2"), ("3", "2"), ("7", "2")]),
        (["0", "1"], 3, 2, [("0", "2"), ("1", "2"), ("0", "2")]),
        (["0"], 9, 2, [("0", "4"), ("0", "4")]),
    ],
)
def test_gpus_are_handed_out_in_turn_and_cores_are_shared_out(gpus, at_once, per_gpu, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = slots(gpus, 8, at_once, per_gpu, threads=None)
    assert [(slot["CUDA_VISIBLE_DEVICES"], slot["OMP_NUM_THREADS"]) for slot in given] == expected


def test_the_cores_are_shared_out_among_the_jobs_that_there_are(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr("hydra_plugins.cl_runner.launchers._cores", lambda: 64)
    launcher = Local()
    launcher.config = OmegaConf.create({"device": "cpu"})
    pool, at_once = launcher.pool(3)
    assert (at_once, [slot["OMP_NUM_THREADS"] for slot in pool._environments]) == (3, ["21"] * 3)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """SLURM's commands as scripts: `sbatch` records its input, `squeue` prints the file `queue`."""
    pytest.importorskip("submitit")
    (tmp_path / "bin").mkdir()
    scripts = {
        "sbatch": 'cp "$1" "$STUB/script"; echo "Submitted batch job 7"',
        "squeue": 'cat "$STUB/queue"',
        "srun": "",
        "scancel": "",
    }
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "queue").touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STUB", str(tmp_path))
    return tmp_path / "queue"


def test_what_slurm_is_given_has_it_requeue_the_job(queue, tmp_path):
    settings = yaml.safe_load((CONF / "hydra/launcher/slurm.yaml").read_text())
    launcher = imported(settings.pop("_target_"))(**{**settings, "partition": "gpu"})
    (pool, at_once) = launcher.pool(3)
    pool.submit(Worker([], tmp_path / "runs" / "a-run"), 0)
    script = (tmp_path / "script").read_text()
    for line in ("requeue", "signal=USR2@120", "time=240", "partition=gpu", "job-name=a-run", "open-mode=append"):
        assert f"#SBATCH --{line}\n" in script
    assert at_once == 3


def test_a_job_that_is_in_the_queue_already_is_not_submitted_again(queue, tmp_path):
    pool = Slurm(max_num_timeout=100, poll_s=0, parameters={})
    queue.write_text(f"5|another|{tmp_path}/runs\n6|a-run|{tmp_path}/runs\n")
    job = pool.submit(Worker([], tmp_path / "runs" / "a-run"), 0)
    assert job.job_id == "6"
    assert not (tmp_path / "script").exists()
    assert not pool.over(job)
    queue.write_text("")
    assert pool.over(job)


SMALL = ["stream=split_digits", "stream.max_tasks=2", "model=mlp", "model.widths=[8]", "trainer.epochs=1"]
HERE = ["output_root=runs", "tracker=local", "device=cpu"]

# A method whose second task begins when a file is there.
PATIENT = """
import time
from pathlib import Path
from cl_runner.strategies import Finetune

class Patient(Finetune):
    '''Fine-tuning that waits.'''

    def before_task(self, task):
        while task.index == 1 and not Path("go").exists():
            time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """A sweep of two jobs: one is killed, the other is told by USR2 that it is preempted."""
    pytest.importorskip("submitit")
    folder = tmp_path_factory.mktemp("local")
    (folder / "patient.py").write_text(PATIENT)
    method = ["strategy=finetune", "strategy._target_=patient.Patient", "plugins=[patient]"]
    launcher = ["hydra/launcher=local", "hydra.launcher.at_once=2"]
    command = [sys.executable, "-m", "cl_runner", "-m", *launcher, *SMALL, *HERE, *method, "seed=0,1"]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    sweep = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for seed, sign in ((0, signal.SIGKILL), (1, signal.SIGUSR2)):
        os.kill(pid_that_waits(folder, seed, sweep), sign)
    (folder / "go").touch()
    said, _ = sweep.communicate(timeout=300)
    return folder, sweep.returncode, said


def pid_that_waits(folder, seed, sweep):
    """The process of a run, once its first task is saved."""
    deadline = time.monotonic() + 200
    while not list(folder.glob(f"runs/*-s{seed}-*/checkpoint/last.pt")):
        assert time.monotonic() < deadline
        assert sweep.poll() is None, sweep.stdout.read()
        time.sleep(0.02)
    return json.loads((the_run(folder, seed) / "status.json").read_text())["pid"]


def the_run(folder, seed):
    (found,) = folder.glob(f"runs/*-s{seed}-*")
    return found


def test_a_job_that_is_killed_stops_no_other_and_is_named(eventful):
    folder, returned, said = eventful
    assert returned == 1, said
    assert said.strip().splitlines()[-2:] == [
        "2 jobs: 1 done, 1 killed",
        f"  killed   {the_run(folder, 0).name}  seed=0  its process died without a word",
    ]


def test_a_preempted_job_is_started_again_and_goes_on(eventful):
    folder, _, said = eventful
    run = the_run(folder, 1)
    assert json.loads((run / "status.json").read_text())["state"] == "done", said
    assert "going on at task" in (run / "run.log").read_text()
    (log,) = folder.glob(f"runs/.jobs/{run.name}/*_log.out")
    assert "Requeued job" in log.read_text()


def test_status_tells_of_a_killed_run(eventful, capsys):
    folder, _, _ = eventful
    assert status.main([str(folder / "runs")]) == 1
    said = capsys.readouterr().out
    assert "2 runs: 1 done, 1 killed" in said
    assert the_run(folder, 0).name in said


def test_a_ray_cluster_carries_out_jobs(tmp_path):
    pytest.importorskip("ray")
    words = ["hydra/launcher=ray", *SMALL, *HERE, "strategy=finetune", "seed=0,1"]
    command = [sys.executable, "-m", "cl_runner", "-m", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == "2 jobs: 2 done"
