import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from cl_runner import __version__
from cl_runner.__main__ import COMMANDS
from cl_runner.folder import RunFolder
from cl_runner.trackers.journal import draw_accuracy

QUIET = {**os.environ, "WANDB_SILENT": "true"}
TOO_LONG = 300 * "a"


def test_a_run_leaves_everything_in_its_folder(cl_runner, the_run, monkeypatch):
    monkeypatch.setattr("cl_runner.trackers.journal.draw_accuracy", draw_accuracy)
    status, said = cl_runner()
    assert status == 0, said
    folder = the_run()
    present = {path.name for path in folder.iterdir()}
    assert present == {
        ".hydra",
        "config.yaml",
        "status.json",
        "results.json",
        "accuracy.csv",
        "accuracy.png",
        "steps.jsonl",
        "run.log",
        "model.safetensors",
    }
    assert folder.name in said.replace("\n", "")

    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    made, measured = ["environment", "earlier_environments"], ["metrics", "accuracy", "validation", "zero_shot"]
    assert list(results) == ["schema", "config", *made, *measured, "seconds", "peak_memory"]
    assert results["earlier_environments"] == []
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == results["config"]

    matrix = results["accuracy"]["task"]
    assert [[value is None for value in row] for row in matrix] == [[j > i for j in range(5)] for i in range(5)]
    rows = list(csv.DictReader((folder / "accuracy.csv").open()))
    assert {(row["scenario"], int(row["after_task"]), int(row["task"])): float(row["accuracy"]) for row in rows} == {
        (scenario, i, j): value
        for scenario, matrix in results["accuracy"].items()
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
        if value is not None
    }
    journal = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [row["seq"] for row in journal] == list(range(len(journal)))
    assert [row["task"] for row in journal if row["kind"] == "task"] == list(range(5))
    assert results["metrics"]["average_accuracy"] == pytest.approx(sum(matrix[-1]) / 5)


def test_the_weights_of_a_run_are_another_runs_pretrained_weights(cl_runner, tmp_path, the_run):
    cl_runner("strategy=finetune")
    weights = the_run() / "model.safetensors"
    status, said = cl_runner(
        "strategy=ewc", "strategy.anchor=both", f"model.pretrained={weights}", "output_root=second"
    )
    assert status == 0, said
    (second,) = (tmp_path / "second").iterdir()
    metrics = json.loads((second / "results.json").read_text())["metrics"]
    assert 0 < metrics["drift_agreement"] <= 1
    with safe_open(weights, "pt") as file:
        assert "visible" not in " ".join(file.keys())


def test_the_same_command_again_shows_the_finished_run(cl_runner, the_run):
    cl_runner()
    folder = the_run()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, said = cl_runner()
    assert status == 0
    assert "This run is done" in said
    assert "average_accuracy" in said.replace(" ", "_")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_finished_run_is_shown_without_its_data(cl_runner, monkeypatch):
    cl_runner("trainer.epochs=1")
    monkeypatch.setattr("cl_runner.streams.recipe.Recipe.prepare", lambda *_: pytest.fail("the data were looked for"))
    status, said = cl_runner("trainer.epochs=1")
    assert status == 0, said
    assert "This run is done" in said


def test_it_warns_when_other_versions_are_installed_now(cl_runner, the_run):
    cl_runner()
    results = json.loads((the_run() / "results.json").read_text())
    results["environment"]["torch"] = "0.4.1"
    (the_run() / "results.json").write_text(json.dumps(results))
    _, said = cl_runner()
    assert "warning: it was made with torch 0.4.1" in said
    assert torch.__version__ in said


def test_rerun_moves_the_old_folder_aside_first(cl_runner, tmp_path):
    cl_runner()
    status, said = cl_runner("rerun=true")
    assert status == 0, said
    names = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert len(names) == 2
    assert names[1] == names[0] + ".1"
    first, second = (json.loads((tmp_path / "outputs" / name / "results.json").read_text()) for name in names)
    assert first["accuracy"] == second["accuracy"]


def test_weights_of_another_shape_are_refused_before_there_is_a_folder(cl_runner, tmp_path, the_run):
    cl_runner("strategy=finetune", "trainer.epochs=1")
    weights = the_run() / "model.safetensors"
    status, said = cl_runner(f"model.pretrained={weights}", "model.widths=[17]", "output_root=second")
    assert status == 2, said
    assert "wrong shape" in said
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    "words", [["model=nope"], ["strategy=null"], ["-m", "model=mlp,cnn"]], ids=lambda words: words[-1]
)
def test_asking_for_a_configuration_that_is_none_shows_no_traceback(words, tmp_path):
    command = [sys.executable, "-m", "cl_runner", "--cfg=job", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=QUIET)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_run_that_failed_and_then_succeeds_says_nothing_of_the_failure(cl_runner, the_run):
    cl_runner("trainer.epochs=1")
    folder = the_run()
    for file in ("results.json", "status.json"):
        (folder / file).unlink()
    (folder / "status.json").write_text(json.dumps({"state": "failed", "error": "it broke", "traceback": "here"}))
    status, said = cl_runner("trainer.epochs=1")
    assert status == 0, said
    state = json.loads((folder / "status.json").read_text())
    assert state["state"] == "done"
    assert not {"error", "traceback"} & set(state)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.epochs=0",
        "strategy.strenght=1",
        "strategy=nothing",
        "stream=split_mnist",
        "model.pretrained=nowhere.pt",
    ],
)
def test_bad_input_is_one_line_and_status_2_and_makes_no_folder(cl_runner, tmp_path, override):
    status, said = cl_runner(override, "stream.download=false")
    assert status == 2
    assert len(said.strip().splitlines()) == 1
    assert said.startswith(f"cl-runner: {override.partition('=')[0]}") or "data_root" in said
    assert list(tmp_path.iterdir()) == []


def test_one_bad_job_of_a_multirun_is_refused_before_the_first_starts(cl_runner, tmp_path):
    status, said = cl_runner("-m", "strategy.strength=1,-1")
    assert status == 2
    assert "strategy.strength" in said
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_with_a_grid_says_so_where_one_job_is_run(cl_runner, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    grid = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 0,1\n"
    (tmp_path / "conf" / "experiment" / "grid.yaml").write_text(grid)
    status, said = cl_runner("--config-dir", "conf", "experiment=grid", "trainer.epochs=1")
    assert status == 0, said
    assert "-m runs every job" in said


def test_a_multirun_makes_a_folder_a_job(cl_runner, tmp_path):
    status, said = cl_runner("-m", "strategy=finetune,lwf", "seed=0,1", "trainer.epochs=1")
    assert status == 0, said
    folders = [path for path in (tmp_path / "outputs").iterdir() if path.is_dir()]
    assert len(folders) == 4
    assert all(json.loads((path / "status.json").read_text())["state"] == "done" for path in folders)


def test_a_run_that_fails_says_why_in_one_line_and_leaves_the_traceback(cl_runner, the_run):
    status, said = cl_runner("optimizer=sgd", "optimizer.lr=1e30", "trainer.log_every=1")
    assert status == 1
    (line,) = [line for line in said.splitlines() if "rror" in line]  # Hydra's own is left out
    assert line.startswith("cl-runner: NonFiniteLossError: the loss is not finite in task 0")
    assert "Traceback" not in said
    state = json.loads((the_run() / "status.json").read_text())
    assert state["state"] == "failed"
    assert "NonFiniteLossError" in state["traceback"]
    assert "Traceback" in (the_run() / "run.log").read_text()


INTERRUPTED = """
import importlib.abc, signal, sys

class Interrupted(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "{}":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("half of it was imported")

sys.meta_path.insert(0, Interrupted())
from cl_runner.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [("hydra", []), ("torch", ["stream=split_digits", "tracker=local"]), ("numpy", ["report", "outputs"])],
    ids=["hydra", "torch", "a subcommand's"],
)
def test_ctrl_c_while_a_library_is_imported_ends_at_once(name, words, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED.format(name), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "cl-runner: stopped\n")


def test_ctrl_c_before_there_is_a_run_shows_no_traceback(cl_runner, monkeypatch):
    monkeypatch.setattr("cl_runner.command.check", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert cl_runner() == (130, "cl-runner: stopped\n")


def test_list_names_every_choice(cl_runner):
    status, said = cl_runner("list", small=False)
    assert status == 0
    for word in ("split_digits", "efficientnet_lite0", "ewc", "lwf", "exact", "adam", "wandb", "vandeven_fisher_mnist"):
        assert word in said


def test_list_shows_one_choice_with_what_its_keys_mean(cl_runner):
    status, said = cl_runner("list", "strategy=ewc", "memory", small=False)
    assert status == 0
    assert "strategy=ewc\n# Elastic" in said
    assert re.search("strength: .*# ", said)
    assert "reservoir" in said
    assert "lwf" not in said
    status, said = cl_runner("list", "hydra/launcher=basic", small=False)
    assert (status, said.count("\n")) == (0, 2)
    assert "One job after another" in said


def test_list_names_the_choices_of_a_folder_of_ones_own_too(cl_runner, tmp_path):
    (tmp_path / "mine" / "strategy").mkdir(parents=True)
    (tmp_path / "mine" / "strategy" / "coma.yaml").write_text("# Averages of weights\n_target_: coma.CoMA\n")
    (tmp_path / "mine" / "strategy" / "ewc.yaml").write_text("# Never reached: conf/ has one of this name\n")
    status, said = cl_runner("list", "strategy", "--config-dir", "mine", small=False)
    assert status == 0
    assert re.search("coma +Averages of weights", said)
    assert re.search("ewc +Elastic", said)
    assert "Never reached" not in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("# @package _global_\ndefaults:\n  - strategy: lwf\n", "defaults to say `override /strategy: lwf`, got"),
        ("# @package _global_\ndefaults:\n  - override strategy: lwf\n", "`override /strategy: …`, with the slash"),
        ("defaults:\n  - override /strategy: lwf\n", "has `# @package _global_` as its first line"),
        ("trainer:\n  epochs: 3\n", "has `# @package _global_` as its first line"),
    ],
)
def test_what_an_experiments_file_gets_wrong_is_said_in_a_line(content, says, cl_runner, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(content)
    status, said = cl_runner("--config-dir", "mine", "experiment=own", small=False)
    assert status == 2
    (line,) = said.splitlines()
    assert line.startswith("cl-runner: experiment")
    assert says in line


@pytest.fixture
def started(cl_runner, monkeypatch):
    """Call the command line up to where its run would start: overrides -> what it printed."""
    monkeypatch.setattr("cl_runner.command.run_alone", lambda *_: None)

    def call(*words):
        status, said = cl_runner(*words)
        assert status == 0, said
        return said

    return call


@pytest.mark.parametrize(
    ("words", "whose"),
    [
        (["strategy=ncm"], "ncm"),
        (["strategy=finetune", "model.freeze=['*']"], "model.freeze"),
        (["strategy=combined", "strategy@strategy.parts.ewc=slca"], "combined"),
        (["strategy=finetune"], None),
    ],
)
def test_random_features_are_said_where_a_method_builds_on_pretrained_ones(words, whose, started):
    said = started(*words)
    lines = [line for line in said.splitlines() if "random weights" in line]
    assert [line.rpartition(" is meant for ")[2] for line in lines] == ([whose] if whose else [])


def test_data_lie_where_the_environment_says_unless_the_command_line_does(cl_runner, monkeypatch):
    monkeypatch.setenv("CL_RUNNER_DATA", "/of/all")
    assert "data_root: /of/all\n" in cl_runner("--cfg", "job", "--resolve")[1]
    assert "data_root: /mine\n" in cl_runner("--cfg", "job", "--resolve", "data_root=/mine")[1]


def test_hydras_own_help_is_shown_whatever_is_beside_it(cl_runner):
    status, said = cl_runner("--hydra-help", "strategy=ewc", small=False)
    assert status == 0
    assert "--config-dir" in said


@pytest.mark.parametrize("words", [["optimizer.amsgrad=true"], ["trainer.first_task.epochs=3"]])
def test_arguments_that_a_yaml_does_not_list_are_shown_as_they_are_run(words, cl_runner):
    key = words[0].partition("=")[0].rpartition(".")[2]
    status, said = cl_runner(*words, "--cfg", "job")
    assert (status, f"{key}: {words[0].partition('=')[2]}\n" in said) == (0, True)
    status, said = cl_runner("--help", *words)
    assert status == 0, said


def test_what_a_command_cannot_do_is_one_line_and_status_2(cl_runner):
    status, said = cl_runner("status", "nothing", small=False)
    assert status == 2
    assert said == "cl-runner: status: expected a folder, got 'nothing'\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["statsu"], "command line: expected KEY=VALUE or a command, got 'statsu'; did you mean status?"),
        (["seed=1", "status"], "command line: expected KEY=VALUE, or a command as the first word, got 'status'"),
        (["seed=1", "--eval-every", "3"], "command line: expected eval_every=…, without dashes, got --eval-every"),
        (["-seed=3", "model=mlp"], "command line: expected seed=3, without dashes, got -seed=3"),
        (["--rerun"], "command line: expected rerun=…, without dashes, got --rerun"),
        (["dry_run=true"], "dry_run: expected the option --dry-run"),
        (["-m", "--seed=1,2"], "command line: expected seed=1,2, without dashes, got --seed=1,2"),
        *[
            ([f"--{word}"], f"command line: expected {word}, without dashes, got --{word}")
            for word in (
                "strategy=lwf",
                "stream=split_mnist",
                "model=mlp",
                "optimizer=sgd",
                "optimizer.lr=1",
                "scheduler=step",
                "trainer.epochs=2",
                "tracker=local",
                "fisher=exact",
                "memory=herding",
                "experiment=mine",
                "device=cpu",
                "data_root=/data",
                "output_root=runs",
                "rerun=true",
                "hydra/launcher=local",
            )
        ],
        (["--confi-dir=conf"], "command line: unrecognized arguments: --confi-dir=conf; did you mean --config-dir"),
        (["--dryrun"], "did you mean --dry-run?"),
        (["--cfg", "job", "--dry-run"], "command line: expected --dry-run beside what is to be run, "),
        (["--help", "--dry-run"], "command line: expected --dry-run beside what is to be run, "),
        (
            ["fisher=exactt"],
            "fisher: expected one of argmax, batched, empirical, exact, hybrid, probe, reversed, ",
        ),
        (["fisher=exactt"], "got 'exactt'; did you mean exact?"),
        (["hydra.foo=3"], "hydra.foo: unknown key; known: "),
        (["+hydra.job.chdri=true"], "hydra.job.chdri: unknown key; did you mean chdir?"),
        (["hydra.sweeper.trials=3"], "unknown key; did you mean trials of hydra/sweeper=optuna?"),
        (
            ["-m", "hydra/sweeper=optuna", "++hydra.sweeper.n_trials=3"],
            "hydra.sweeper.n_trials: unknown key; did you mean trials?",
        ),
        (["-m", "hydra.launcher.at_once=3"], "unknown key; did you mean at_once of hydra/launcher=local or slurm?"),
        (["=3"], "command line: expected KEY=VALUE, or a command as the first word, got '=3'"),
        (["-m", "strategy=[ewc,l2],lwf"], "strategy: expected one of agem, "),
        (["lr=0.1"], "lr: unknown key; did you mean optimizer.lr?"),
        (["strategy=combined", "strategy.strength=1"], "unknown key; did you mean strategy.parts.ewc.strength?"),
        (["strategy=combined", "strategy.parts.si.strength=1"], "+strategy@strategy.parts.si=CHOICE adds one"),
        (["strategy=combined", "strategy.parts.er=der"], "got 'der'; strategy@strategy.parts.er=der chooses one"),
        (["strategy=combined", "strategy.parts.er=null"], "got None; ~strategy@strategy.parts.er removes it"),
        (
            ["strategy=combined", "strategy.parts.ew.strength=1"],
            "strategy.parts.ew: there is no such part; did you mean ewc?",
        ),
        (["strategy=finetune", "strategy.parts.ewc.strength=1"], "strategy.parts: unknown key; combined has it"),
        (["--cfg", "job", "strategy.strenght=1"], "strategy.strenght: unknown key; did you mean strength?"),
        (
            ["strategy=combined", "strategy@strategy.parts.si=si"],
            "To append to your default list use +strategy@strategy.parts.si=si",
        ),
        (["--multirn"], "command line: unrecognized arguments: --multirn; did you mean --multirun?"),
        (["stream=split_digits", "stream.name=minst"], "got 'minst'; did you mean mnist?"),
        (["epoch=1"], "epoch: unknown key; did you mean trainer.epochs?"),
        (["--help", "strategy=lwff"], "strategy: expected one of agem, "),
        (["--help", "-m", "seed=0,1"], "command line: expected no -m (--multirun) where one configuration is shown"),
        (["--help", "strategy"], "command line: expected KEY=VALUE, or a command as the first word, got 'strategy'"),
        (["--cfg", "job", "lr=0.1"], "lr: unknown key; did you mean optimizer.lr?"),
        (
            ["strategy=finetune", "strategy.strength=1"],
            "strategy.strength: unknown key; coda_prompt, dualprompt, ewc, l1",
        ),
        (["list", "--config-dir", "nowhere"], "--config-dir: expected a folder, got 'nowhere'"),
        (
            ["model.freeze=[a.*,b.[0-5].*]"],
            """such a value needs quotes of its own: "model.freeze=['a.*','b.[0-5].*']\"""",
        ),
        (["tracker.notes=it (works)"], """such a value needs quotes of its own: "tracker.notes='it (works)'\""""),
        (["seed=range(0,5"], "no viable alternative at input 'range(0,5'"),
        (["experiment=mine/foo"], "experiment/mine: expected one of buzzega_rotated_mnist, "),
        (["list", "colours"], "list: expected a group, got 'colours'; known: "),
        (["list", "strategy=ewcc"], "list: expected a choice of strategy, got 'ewcc'; did you mean "),
    ],
)
def test_what_is_mistyped_is_one_line_that_names_what_may_be_meant(words, says, cl_runner):
    status, said = cl_runner(*words, small=False)
    assert status == 2
    (line,) = said.splitlines()
    assert line.startswith("cl-runner: ")
    assert says in line


@pytest.mark.parametrize(
    ("words", "said_of"),
    [
        (["strategy=finetune", "memory.size=3"], "memory"),
        (["strategy=lwf", "fisher=exact"], "fisher"),
        (["strategy=ewc", "fisher=exact"], ""),
        (["strategy=combined", "memory.size=30"], ""),
    ],
)
def test_a_component_that_no_strategy_takes_is_said_to_change_nothing(words, said_of, started):
    said = started(*words)
    assert [line for line in said.splitlines() if "changes nothing" in line] == [
        f"cl-runner: {name}: this strategy takes none; it changes nothing" for name in [said_of] if name
    ]


@pytest.mark.parametrize(
    ("strategy", "is_said"), [("frozen", True), ("lora", True), ("ncm", True), ("finetune", False)]
)
def test_adapting_statistics_that_a_strategy_keeps_are_said_to_change_nothing(strategy, is_said, started):
    said = started(f"strategy={strategy}", "model.norm_stats=adapt")
    assert ("model.norm_stats: this strategy keeps the backbone's; it changes nothing" in said) == is_said


@pytest.mark.parametrize(("strategy", "is_said"), [("ncm", True), ("frozen", False), ("finetune", False)])
def test_evaluating_within_tasks_of_a_strategy_without_steps_is_said_to_change_nothing(strategy, is_said, started):
    said = started(f"strategy={strategy}", "trainer.eval_every=5")
    assert ("trainer.eval_every: this strategy takes no steps; it changes nothing" in said) == is_said


@pytest.mark.parametrize(("words", "is_said"), [(["trainer.iterations=2"], True), ([], False)])
def test_epochs_beside_iterations_are_said_to_change_nothing(words, is_said, started):
    said = started(*words)
    assert ("trainer.epochs: trainer.iterations is given; it changes nothing" in said) == is_said


def test_a_run_that_another_process_is_at_is_refused(cl_runner, the_run):
    cl_runner("trainer.epochs=1")
    folder = the_run()
    (folder / "status.json").write_text('{"state": "pending"}')
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with RunFolder(folder).locked():
        status, said = cl_runner("trainer.epochs=1")
    assert status == 2
    assert "is being run by process" in said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_does_not_know_is_said_in_one_line(command, cl_runner):
    status, said = cl_runner(command, "DIR", "--unheard-of", small=False)
    assert status == 2
    (line,) = said.splitlines()
    assert line.startswith(f"cl-runner: {command}: unrecognized arguments: ")
    assert line.endswith("--unheard-of")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--cfg", "job"], ["list"], ["--version"], *([command, "--help"] for command in COMMANDS)],
    ids=lambda words: words[0],
)
def test_asking_about_the_configuration_imports_no_torch(words, tmp_path):
    script = (
        "import sys; from cl_runner.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'wandb', 'torchvision', 'timm'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=QUIET)
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_projects_own(cl_runner):
    assert cl_runner("--version") == (0, f"cl-runner {__version__}\n")


def test_shell_completion_imports_no_torch(tmp_path):
    script = "import sys; from cl_runner.__main__ import main; main()\nassert not {'torch', 'wandb'} & set(sys.modules)"
    env = {**QUIET, "COMP_LINE": "cl-runner strategy=e", "COMP_POINT": "20"}
    command = [sys.executable, "-c", script, "-sc", "query=bash"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "strategy=ewc" in done.stdout


TINY = ["stream=split_digits", "model=mlp", "model.widths=[4]", "trainer.epochs=1", "tracker=local"]


def test_python_m_is_the_same_and_a_run_that_is_tracked_locally_imports_no_wandb(tmp_path):
    script = """
import runpy, sys
sys.argv[0] = "cl_runner"
runpy.run_module("cl_runner", run_name="__main__", alter_sys=True)
assert "wandb" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *TINY], cwd=tmp_path, capture_output=True, text=True, env=QUIET
    )
    assert done.returncode == 0, done.stderr
    assert "wandb" not in done.stdout
    assert len(list(Path(tmp_path, "outputs").iterdir())) == 1


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, cl_runner):
    words = [*TINY, "trainer.epochs=10", "strategy.strength=10"]
    command = [sys.executable, "-m", "cl_runner", *words, "output_root=killed"]
    killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, env=QUIET)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/*/checkpoint/last.pt")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    (folder,) = (tmp_path / "killed").iterdir()
    assert not (folder / "results.json").exists()
    for root in ("killed", "whole"):
        status, said = cl_runner(*words, f"output_root={root}", small=False)
        assert status == 0, said
    one, other = (load_file(tmp_path / root / folder.name / "model.safetensors") for root in ("killed", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "going on at task" in (folder / "run.log").read_text()


@pytest.mark.parametrize("ends", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_a_run_that_nobody_reads_any_more_goes_on(ends, tmp_path):
    reader, writer = ends()
    run = subprocess.Popen(
        [sys.executable, "-m", "cl_runner", *TINY], cwd=tmp_path, stdout=writer, stderr=writer, env=QUIET
    )
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    assert run.wait() == 0
    (status,) = (tmp_path / "outputs").glob("*/status.json")
    assert json.loads(status.read_text())["state"] == "done"


def test_a_command_that_nobody_reads_ends_without_a_traceback(tmp_path):
    command = [sys.executable, "-u", "-m", "cl_runner", "list"]
    told = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET)
    assert told.stdout is not None
    told.stdout.close()  # before the first line: Python has not started yet
    _, said = told.communicate()
    assert (told.returncode, said) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ["status", TOO_LONG],
        ["report", TOO_LONG],
        ["stream=split_mnist", f"data_root={TOO_LONG}"],
        [f"output_root={TOO_LONG}"],
    ],
)
def test_a_path_that_no_file_can_have_is_said_in_a_line(words, cl_runner):
    status, said = cl_runner(*words, small=False)
    assert (status, said.count("\n")) == (2, 1)
    assert TOO_LONG in said
    assert said.endswith(": File name too long\n")
