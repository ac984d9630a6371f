"""Sweeps, carried out within this process by Hydra's own launcher."""

import copy
import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from cl_runner.command import run_submitted
from cl_runner.command_line import in_order
from cl_runner.compose import compose_jobs, parse
from cl_runner.errors import ConfigError
from cl_runner.folder import CannotWriteError, RunFolder
from cl_runner.job import carry_out
from cl_runner.report.groups import group_runs
from cl_runner.report.runs import read
from cl_runner.report.status import Board
from cl_runner.sweep import Job, Sweep, sweeps
from hydra_plugins.cl_runner.sweepers import ComposedOnce
from tests.report import samples

MLP = ["model=mlp"]
SEARCHED = ["hydra/sweeper=optuna", "stream.validation=0.2"]
TINY = ["trainer.epochs=1", "strategy=finetune", "model.widths=[4]", "stream.max_tasks=2"]

# A process that holds a run's folder until it is told to end.
HOLD = """
import sys
from cl_runner.folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("here", flush=True)
    sys.stdin.read()
"""

# A method controlled by files in the working directory.
FRAGILE = """
import signal
from pathlib import Path
from cl_runner.strategies import Finetune

class Fragile(Finetune):
    '''Fine-tuning that fails while `break.<width>` exists.'''

    def __init__(self, *, width: int = 0) -> None:
        self.width = width

    def setup(self, model, stream):
        super().setup(model, stream)
        Path("planned.json").write_text(Path("outputs/sweep.json").read_text())
        if Path(f"break.{self.width}").exists():
            raise RuntimeError("it broke\\nin two lines")
        if Path(f"interrupt.{self.width}").exists():
            signal.raise_signal(signal.SIGINT)
        if Path("edit").exists():
            Path("conf/strategy/fragile.yaml").write_text("_target_: fragile.Fragile\\nwidth: 7\\n")
"""
FRAGILE_JOBS = ["--config-dir", "conf", "-m", "strategy=fragile", "plugins=[fragile]", "stream.max_tasks=1"]


@pytest.fixture
def fragile(cl_runner, tmp_path, monkeypatch):
    """A sweep over a strategy that fails on demand: overrides -> (exit status, what it printed)."""
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "fragile.yaml").write_text("_target_: fragile.Fragile\nwidth: 0\n")
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fragile", raising=False)
    return lambda *overrides: cl_runner(*FRAGILE_JOBS, *(overrides or ("strategy.width=0,1,2",)))


def plan(tmp_path, place=0):
    return json.loads((tmp_path / "outputs" / "sweep.json").read_text())["sweeps"][place]


def states(tmp_path):
    folders = [tmp_path / "outputs" / job["folder"] for job in plan(tmp_path)["jobs"]]
    return [json.loads(file.read_text())["state"] for path in folders if (file := path / "status.json").exists()]


def test_the_plan_is_there_before_the_first_job_starts(fragile, tmp_path):
    status, said = fragile()
    assert status == 0, said
    (before,) = json.loads((tmp_path / "planned.json").read_text())["sweeps"]
    assert before["finished"] is None
    assert [job["overrides"][-1] for job in before["jobs"]] == [f"strategy.width={width}" for width in range(3)]
    after = plan(tmp_path)
    assert after["finished"] >= after["started"]
    for job in after["jobs"]:
        assert job["folder"].endswith(job["hash"])
        assert (tmp_path / "outputs" / job["folder"] / "results.json").exists()


def test_every_job_says_which_of_how_many_it_is(fragile):
    said = fragile()[1]
    assert [line.rpartition("   ")[2] for line in said.splitlines() if "   job " in line] == [
        f"job {number}/3" for number in (1, 2, 3)
    ]


def test_a_dry_run_says_what_is_left_to_do_and_leaves_everything_as_it_is(fragile, tmp_path):
    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}

    before = files()
    status, said = fragile("strategy.width=0,1", "--dry-run")
    assert (status, files()) == (0, before)
    assert [line.split()[::2] for line in said.splitlines()[1:]] == [
        ["pending", "strategy.width=0"],
        ["pending", "strategy.width=1"],
    ]
    (tmp_path / "break.1").touch()
    fragile("strategy.width=0,1")
    before = files()
    said = fragile("--dry-run", "strategy.width=0,1,1,2", "rerun=true")[1]
    first, counts, *jobs = said.splitlines()
    assert first == "1 of 4 jobs compute what another one computes: they are run once"
    assert counts == "3 jobs: 3 pending"
    kept = "  starts over; what is there now is kept in a folder beside it"
    ends = [job.partition("strategy.width=")[2] for job in jobs]
    assert ends == [f"0{kept}", f"1{kept}", "2"]
    said = fragile("--dry", "strategy.width=0,1,2")[1]
    assert said.splitlines()[0] == "3 jobs: 1 done, 1 pending, 1 failed"
    assert "strategy.width=1  RuntimeError: it broke" in said
    assert files() == before


def test_a_dry_run_says_what_was_made_with_other_code_and_what_starts_over_for_that(fragile, tmp_path):
    (tmp_path / "break.1").touch()
    fragile("strategy.width=0,1")
    for job in plan(tmp_path)["jobs"]:
        RunFolder(tmp_path / "outputs" / job["folder"]).update_status(code={"fragile": "other"})
    first, counts, job = fragile("strategy.width=0,1", "--dry-run")[1].splitlines()
    assert first.startswith("1 of 2 jobs were done with other images or code than are there now, such as fragile-")
    assert counts == "2 jobs: 1 done, 1 pending"
    assert job.endswith("strategy.width=1  starts over; what is there now is kept in a folder beside it")


@pytest.mark.parametrize("words", [("rerun=true", "-m", "seed=0,1"), ("seed=0",)], ids=" ".join)
def test_a_dry_run_refuses_a_run_in_progress_as_the_command_would(words, cl_runner, tmp_path):
    folder = tmp_path / "outputs" / cl_runner("--dry-run", *MLP, *TINY, "seed=0")[1].split()[-1]
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=-1, stdout=-1, text=True) as holder:
        holder.stdout.readline()
        for dry in ([], ["--dry-run"]):
            status, said = cl_runner(*words, *dry, *MLP, *TINY)
            assert status == 2
            assert f"is being run by process {holder.pid}" in said
        assert "1 running, 1 pending" in cl_runner("-m", "seed=0,1", "--dry-run", *MLP, *TINY)[1]
        holder.stdin.close()


def test_a_dry_run_says_that_a_grid_needs_m(cl_runner, tmp_path):
    (tmp_path / "my" / "experiment").mkdir(parents=True)
    grid = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 0,1\n"
    (tmp_path / "my" / "experiment" / "grid.yaml").write_text(grid)
    said = cl_runner("--config-dir", "my", "experiment=grid", "--dry-run", *MLP, *TINY)[1]
    assert said.startswith("this experiment holds a grid: -m runs every job")


def test_a_dry_run_refuses_what_the_command_would(fragile):
    status, said = fragile("strategy.width=0,x", "--dry-run")
    assert status == 2
    assert "strategy.width: expected" in said


def test_a_dry_run_of_a_search_knows_no_jobs(cl_runner, tmp_path):
    status, said = cl_runner("-m", *SEARCHED, "strategy=ewc,lwf", "--dry-run")
    assert (status, said) == (0, "a search, whose jobs are chosen as it goes\n")
    assert not (tmp_path / "outputs").exists()


def test_a_dry_run_of_one_run_says_what_state_it_is_in(cl_runner):
    said = cl_runner("--dry-run", *MLP, *TINY)[1]
    first, second = said.splitlines()
    assert first == "1 job: 1 pending"
    assert second.startswith("  pending  finetune-split_digits-mlp-s0-")
    cl_runner(*MLP, *TINY)
    assert cl_runner("--dry-run", *MLP, *TINY)[1] == "1 job: 1 done\n"


@pytest.mark.parametrize("content", ["{torn", '{"sweeps": [{"command": "x"}]}', '{"sweeps": [{}]}'])
def test_a_damaged_plan_stops_no_run_beside_it(content, cl_runner, tmp_path):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "sweep.json").write_text(content)
    status, said = cl_runner("strategy=finetune", "stream.max_tasks=1")
    assert status == 0, said


def test_nothing_is_moved_aside_where_another_job_is_refused(fragile, tmp_path):
    (tmp_path / "break.0").touch()
    (tmp_path / "interrupt.1").touch()
    assert fragile()[0] == 130
    (tmp_path / "break.0").unlink()
    (tmp_path / "interrupt.1").unlink()
    names = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    stopped = tmp_path / "outputs" / plan(tmp_path)["jobs"][1]["folder"]
    (stopped / "checkpoint").mkdir(exist_ok=True)
    (tmp_path / "fragile.py").write_text(FRAGILE + "MENDED = True\n")
    status, said = fragile()
    assert status == 2
    assert "was saved with other code of fragile than is there now" in said
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == names


def test_a_job_that_fails_stops_no_other_and_is_named_at_the_end(fragile, tmp_path):
    (tmp_path / "break.1").touch()
    status, said = fragile()
    assert status == 1
    assert states(tmp_path) == ["done", "failed", "done"]
    failed = plan(tmp_path)["jobs"][1]["folder"]
    assert said.strip().splitlines()[-2:] == [
        "3 jobs: 2 done, 1 failed",
        f"  failed   {failed}  strategy.width=1  RuntimeError: it broke",
    ]


def test_the_same_command_again_retries_what_failed_and_leaves_alone_what_is_done(fragile, tmp_path):
    (tmp_path / "break.1").touch()
    fragile()
    done = [tmp_path / "outputs" / job["folder"] for job in plan(tmp_path)["jobs"] if job["state"] == "done"]
    before = {path: path.stat().st_mtime_ns for folder in done for path in (folder, *folder.rglob("*"))}
    (tmp_path / "break.1").unlink()
    status, said = fragile()
    assert status == 0, said
    assert said.strip().splitlines()[-1] == "3 jobs: 3 done (2 of them before)"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(json.loads((tmp_path / "outputs" / "sweep.json").read_text())["sweeps"]) == 1


def test_ctrl_c_stops_the_sweep_and_the_same_command_goes_on(fragile, tmp_path):
    (tmp_path / "interrupt.1").touch()
    status, said = fragile()
    assert status == 130
    assert "the same command goes on" in said
    assert not (tmp_path / "outputs" / plan(tmp_path)["jobs"][2]["folder"]).exists()
    (tmp_path / "interrupt.1").unlink()
    status, said = fragile()
    assert status == 0, said
    assert "3 done (1 of them before)" in said


@pytest.mark.parametrize(
    ("number", "status", "late"),
    [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)],
)
def test_a_signal_between_two_jobs_stops_the_sweep_even_where_an_exception_would_be_lost(
    number, status, late, fragile, tmp_path, monkeypatch
):
    """`late`: when Hydra has made the second job's folder."""

    class Dropped:
        def __del__(self):
            signal.raise_signal(number)

    def surrounded(experiment, command):
        if late and experiment.config["strategy"]["width"] == 1:
            Dropped()
        outcome = carry_out(experiment, command)
        if not late:
            Dropped()
        return outcome

    monkeypatch.setattr("cl_runner.job.carry_out", surrounded)
    returned, said = fragile()
    assert returned == status, said
    assert "3 jobs: 1 done, 2 pending" in said
    assert "cl-runner: stopped; the same command goes on" in said
    assert [job["state"] for job in plan(tmp_path)["jobs"]] == ["done", "pending", "pending"]
    assert (tmp_path / "outputs" / plan(tmp_path)["jobs"][1]["folder"]).exists() == late


def test_a_job_that_another_process_is_at_is_left_to_it(fragile, tmp_path):
    fragile()
    _, second, third = [tmp_path / "outputs" / job["folder"] for job in plan(tmp_path)["jobs"]]
    for folder in (second, third):
        (folder / "status.json").write_text('{"state": "pending"}')
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(second)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    status, said = fragile()
    other.communicate(b"")
    assert status == 1
    assert f"  running  {second.name}  strategy.width=1  in process {other.pid} on" in said
    assert "3 jobs: 2 done (1 of them before), 1 running" in said


def test_a_job_whose_configuration_has_changed_since_is_refused(fragile, tmp_path):
    (tmp_path / "edit").touch()
    status, said = fragile("seed=0,1")
    assert status == 1
    assert states(tmp_path) == ["done"]
    assert "conf: changed since submission" in said
    assert plan(tmp_path)["jobs"][1]["error"].startswith("conf: changed since submission")
    assert len([path for path in (tmp_path / "outputs").iterdir() if path.is_dir()]) == 1


def test_a_job_is_composed_once_to_be_checked_and_run(fragile, monkeypatch):
    composed, load = [], ConfigLoaderImpl.load_sweep_config

    def counted(loader, config, overrides):
        composed.append(overrides[-1])
        return load(loader, config, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    assert fragile()[0] == 0
    assert composed == [f"strategy.width={width}" for width in range(3)]


def test_a_submitted_job_whose_configuration_has_changed_since_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="changed since submission"):
        run_submitted([*MLP, "tracker=local", "device=cpu"], tmp_path / "outputs" / "ewc-of-old-s0-01234567")
    assert not (tmp_path / "outputs").exists()


def test_a_submitted_job_that_is_done_by_now_is_not_run_again(cl_runner, tmp_path, monkeypatch):
    words = ["strategy=finetune", "stream.max_tasks=1"]
    assert cl_runner(*words)[0] == 0
    (results,) = (tmp_path / "outputs").glob("*/results.json")
    before = results.stat().st_mtime_ns
    overrides = yaml.safe_load((results.parent / ".hydra" / "overrides.yaml").read_text())
    monkeypatch.setattr("cl_runner.command.hydra_main", lambda: pytest.fail("it was run again"))
    run_submitted(overrides, results.parent)
    assert results.stat().st_mtime_ns == before


def test_sweeps_that_are_planned_at_once_in_one_folder_all_keep_their_plans(tmp_path):
    def plan_again_and_again(number):
        for _ in range(20):
            Sweep(tmp_path, f"cl-runner -m seed={number}", [Job([f"seed={number}"], f"s{number}", "0")]).write()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(plan_again_and_again, range(8)))
    assert {sweep.command for sweep in sweeps(tmp_path)} == {f"cl-runner -m seed={number}" for number in range(8)}


def test_a_sweep_whose_plan_cannot_be_written_runs_nothing_and_says_why_in_a_line(cl_runner, tmp_path, monkeypatch):
    def full(*_):
        raise CannotWriteError(errno.ENOSPC, "No space left on device", str(tmp_path / "outputs" / "sweep.json"))

    monkeypatch.setattr("cl_runner.sweep.write_atomically", full)
    status, said = cl_runner("-m", "strategy=finetune", "seed=0,1")
    assert status == 1
    (line,) = said.splitlines()
    assert "sweep.json" in line
    assert "No space left on device" in line
    assert not list((tmp_path / "outputs").glob("finetune-*"))


def test_jobs_that_compute_the_same_are_run_once(cl_runner, tmp_path):
    status, said = cl_runner("-m", *TINY, "optimizer.lr=0.1,1e-1", "fisher=exact,probe")
    assert status == 0, said
    assert "3 of 4 jobs compute what another one computes" in said
    assert len(plan(tmp_path)["jobs"]) == 1


def test_a_run_that_stands_for_several_jobs_is_one_of_each_ones_row(cl_runner, tmp_path):
    status, said = cl_runner("-m", *TINY, "strategy=finetune", "stream.seed=0,${seed}", "seed=0,1")
    assert status == 0, said
    assert "1 of 4 jobs compute what another one computes" in said
    assert sorted(len(group.runs) for group in group_runs(read(tmp_path / "outputs").runs, [])) == [2, 2]


def test_every_command_into_one_folder_keeps_its_plan(cl_runner, tmp_path):
    for strategy in ("finetune", "joint"):
        status, said = cl_runner("-m", *TINY, f"strategy={strategy}")
        assert status == 0, said
    assert [len(sweep.jobs) for sweep in sweeps(tmp_path / "outputs")] == [1, 1]
    assert "strategy=joint" in plan(tmp_path, 1)["command"]


def test_a_key_that_the_default_choice_lacks_may_be_set_beside_a_sweep_over_choices(cl_runner, tmp_path):
    status, said = cl_runner("-m", *TINY, "strategy=lwf,lwf", "strategy.temperature=3")
    assert status == 0, said
    (job,) = plan(tmp_path)["jobs"]
    assert "strategy.temperature=3" in job["overrides"]


GRID = """# @package _global_
# A grid
defaults:
  - override /strategy: lwf
hydra:
  sweeper:
    params:
      strategy.strength: 1,2
      seed: range(0,3)
"""


@pytest.mark.parametrize("how", [[], [*SEARCHED, "hydra.sweeper.trials=2", "hydra.sweeper.sampler=qmc"]])
@pytest.mark.parametrize("word", ["optimizer.amsgrad=true,false", "trainer.first_task.epochs=1,2"])
def test_an_argument_that_its_yaml_does_not_list_may_be_swept_over(word, how, cl_runner):
    if how:
        pytest.importorskip("optuna")
    status, said = cl_runner("-m", *TINY, *how, word)
    assert (status, "2 jobs: 2 done" in said) == (0, True), said


@pytest.fixture
def with_grid(tmp_path):
    """A command line that knows two experiments with grids."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    for name in ("one", "other"):
        (tmp_path / "conf" / "experiment" / f"{name}.yaml").write_text(GRID)
    return lambda *words: in_order(["--config-dir", str(tmp_path / "conf"), "-m", *MLP, *words])


def test_an_experiment_may_hold_a_grid(with_grid):
    jobs = compose_jobs(with_grid("experiment=one"))
    assert [(job.strategy.strength, job.seed) for job in jobs] == [(s, seed) for s in (1, 2) for seed in range(3)]


def test_the_command_line_replaces_what_a_grid_says_of_the_same_key(with_grid):
    jobs = compose_jobs(with_grid("experiment=one", "seed=7", "optimizer.lr=0.1,0.2"))
    assert [(job.strategy.strength, job.seed, job.optimizer.lr) for job in jobs] == [
        (1, 7, 0.1),
        (1, 7, 0.2),
        (2, 7, 0.1),
        (2, 7, 0.2),
    ]


def test_a_sweep_over_experiments_that_hold_grids_is_refused(with_grid):
    with pytest.raises(ConfigError, match="experiment: one holds a grid of its own .* one output_root"):
        compose_jobs(with_grid("experiment=one,other"))


def test_the_command_line_replaces_what_a_search_says_of_the_same_key(cl_runner, tmp_path, with_grid):
    pytest.importorskip("optuna")
    unlisted = "optimizer.amsgrad=true"  # Hydra takes it, and then every value beside it, with a ++ alone
    words = ["experiment=one", "strategy.strength=5", unlisted, *SEARCHED, "hydra.sweeper.trials=1"]
    status, said = cl_runner(*with_grid(*words, *TINY[:1], "stream.max_tasks=1"))
    assert status == 0, said
    (results,) = (tmp_path / "outputs").glob("*/results.json")
    assert json.loads(results.read_text())["config"]["strategy"]["strength"] == 5
    assert "++" not in said.partition("best of")[2].partition("\n")[0]


def test_a_job_composed_once_can_be_copied():
    assert copy.copy(ComposedOnce({1: 2})).items() == {1: 2}.items()


def test_hydras_callbacks_may_be_chosen():
    callback = "hydra.experimental.callbacks.LogJobReturnCallback"
    request = parse([*MLP, f"+hydra.callbacks.log._target_={callback}"])
    assert f"+hydra.callbacks.log._target_={callback}" in request.argv


def test_hydra_runs_the_grid_that_was_checked(cl_runner, tmp_path, with_grid):
    words = with_grid("experiment=one", "seed=0", *TINY[:1], "stream.max_tasks=1")
    status, said = cl_runner(*words)
    assert status == 0, said
    assert [job["overrides"][:2] for job in plan(tmp_path)["jobs"]] == [
        ["strategy.strength=1", "seed=0"],
        ["strategy.strength=2", "seed=0"],
    ]
    assert states(tmp_path) == ["done", "done"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "output_root=a,b"], "output_root: expected one value"),
        (["-m", "hydra.launcher.at_once=1,2", "hydra/launcher=local"], "hydra.launcher.at_once: expected one value"),
        (["hydra/launcher=local"], "hydra/launcher: expected -m"),
        (["hydra/sweeper=optuna"], "hydra/sweeper: expected -m"),
        (["hydra.mode=MULTIRUN"], "hydra.mode: expected -m"),
        (["hydra.searchpath=[file://conf]"], "hydra.searchpath: expected --config-dir DIR"),
        (["hydra.verbose=true"], "hydra.verbose: it cannot be set"),
        (["hydra/job_logging=default"], "hydra/job_logging: it cannot be set"),
        (["+hydra.job_logging.version=1"], "hydra.job_logging.version: it cannot be set"),
        (["hydra.output_subdir=null"], "hydra.output_subdir: it cannot be set"),
        (["hydra.job.chdir=true"], "hydra.job.chdir: it cannot be set"),
        (["-m", "trainer.epochs=interval(1,3)"], "trainer.epochs: expected values to take in turn"),
        (["-m", "hydra/launcher=nothing"], "hydra/launcher: expected one of basic, local"),
    ],
)
def test_what_makes_no_sweep_is_refused(words, message):
    with pytest.raises(ConfigError) as error:
        parse(in_order([*MLP, *words]))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra/sweeper=basic"], "hydra/sweeper: expected grid or optuna"),
        (["hydra/launcher=local", "hydra.launcher.at_once=0"], "hydra.launcher.at_once: expected at least 1, got 0"),
        (["hydra/launcher=local", "+hydra.launcher.at_one=2"], "hydra.launcher.at_one: unknown key; did you mean"),
        (["hydra/sweeper=optuna"], "stream.validation: expected a share above 0"),
        ([*SEARCHED], "hydra/sweeper: optuna expected something to search"),
        ([*SEARCHED, "optimizer.lr=interval(1e-1,1e-4)"], "optimizer.lr: expected an interval from a lower number"),
        ([*SEARCHED, "optimizer.lr=tag(log,interval(0,1e-4))"], "optimizer.lr: expected a logarithmic interval"),
        ([*SEARCHED, "trainer.epochs=interval(1,4)"], "trainer.epochs: expected int, got 1.0"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_there_is_a_folder(cl_runner, tmp_path, words, message):
    pytest.importorskip("optuna" if "optuna" in words[0] else "submitit")
    status, said = cl_runner("-m", *words)
    assert status == 2, said
    assert said.startswith(f"cl-runner: {message}")
    assert len(said.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(cl_runner, monkeypatch):
    for package, words in (("submitit", ["hydra/launcher=local"]), ("optuna", ["hydra/sweeper=optuna"])):
        monkeypatch.setitem(sys.modules, package, None)
        status, said = cl_runner("-m", "stream.validation=0.1", *words)
        assert status == 2
        assert f"pip install '.[{words[0].partition('=')[2]}]'" in said


SEARCH = ["-m", *TINY[1:], *SEARCHED, "optimizer.lr=tag(log,interval(1e-3,1.0))"]


def test_a_search_goes_on_and_finds_the_best_validation_accuracy(cl_runner, tmp_path):
    pytest.importorskip("optuna")
    said = ""
    for trials in (2, 4):
        status, said = cl_runner(*SEARCH, "trainer.epochs=int(interval(1,2))", f"hydra.sweeper.trials={trials}")
        assert status == 0, said
    results = [json.loads(path.read_text()) for path in (tmp_path / "outputs").glob("*/results.json")]
    best = max(results, key=lambda each: each["metrics"]["validation_accuracy"])
    assert len(results) == 4
    assert f"validation accuracy {100 * best['metrics']['validation_accuracy']:.2f} %" in said
    assert f"optimizer.lr={best['config']['optimizer']['lr']}" in said
    assert {each["config"]["trainer"]["epochs"] for each in results} <= {1, 2}
    assert [len(sweep.jobs) for sweep in sweeps(tmp_path / "outputs")] == [2, 4]


def test_a_trial_that_failed_is_final_and_counted_apart(fragile, tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "break.1").touch()
    search = [*SEARCHED, "hydra.sweeper.sampler=random", "hydra.sweeper.trials=4", "strategy.width=1,2"]
    for _ in range(2):
        status, said = fragile(*search)
        assert status == 1, said
        assert "best of 3 completed trials (1 failed): validation accuracy" in said
        (tmp_path / "break.1").unlink(missing_ok=True)


def test_what_a_job_said_before_it_had_a_folder_is_not_lost(tmp_path):
    sweep = Sweep(tmp_path, "cl-runner -m", [Job(["seed=0"], "gone", "01234567", error="conf: changed")])
    sweep.close()
    (again,) = sweeps(tmp_path)
    assert again.outcome(again.jobs[0]) == ("failed", "conf: changed")
    assert Path(tmp_path / ".sweep.json.lock").exists() or os.name != "posix"


@pytest.mark.parametrize(
    ("status", "error", "state"),
    [
        (None, None, "pending"),
        (None, "conf: changed", "failed"),
        ({"state": "pending"}, "conf: changed", "failed"),
        ({"state": "pending"}, None, "pending"),
        ({"state": "running"}, "conf: changed", "killed"),
        ({"state": "failed", "error": "it broke"}, "conf: changed", "failed"),
    ],
)
def test_a_jobs_state_is_the_same_wherever_it_is_shown(tmp_path, status, error, state):
    samples.write(tmp_path, samples.config(), name="done")  # a report wants a finished run
    if status is not None:
        samples.unfinished(tmp_path, "job", **status)
    sweep = Sweep(tmp_path, "cl-runner -m", [Job(["seed=0"], "job", "01234567", error=error)])
    sweep.write()
    (left_out,) = read(tmp_path).left_out
    shown = {row.name: (row.state, row.reason) for row in Board(tmp_path).rows()}
    assert sweep.outcome(sweep.jobs[0]) == (left_out.state, left_out.why) == shown["job"]
    assert left_out.state == state
