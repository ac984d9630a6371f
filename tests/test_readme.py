"""The commands and code in the documents work."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from cl_runner.__main__ import COMMANDS
from cl_runner.command_line import in_order
from cl_runner.compose import compose_jobs
from cl_runner.config import validated
from cl_runner.listing import choices
from cl_runner.published import chosen, published

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md", "benchmarks/PUBLISHED.md"]
PAGES += [f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page: str) -> list[str]:
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r" *cl-runner( |$)", line) and "$" not in line]


def of_experiments() -> list[tuple[str, str]]:
    """The commands in the header comments of the experiments' files."""
    files = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines() if line.startswith("#")]
    return [
        (name, line[line.index("cl-runner ") :]) for name, line in lines if re.match(r"# +(Command +)?cl-runner ", line)
    ]


TYPED = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), [*TYPED, *of_experiments()])
def test_every_command_is_one_that_the_program_takes(page, command):
    words = shlex.split(command, comments=True)[1:]
    if "-sc" in words or "--config-dir" in words:
        return
    if words and words[0] in COMMANDS:
        asked = import_module(COMMANDS[words[0]]).parser().parse_intermixed_args(words[1:])
        assert set(getattr(asked, "groups", [])) <= choices().keys()
        chosen(published(), [word for word in getattr(asked, "words", []) if "=" not in word], None)
        return
    # Of a list of seeds the first will do: they compose alike.
    words = [word for word in words if word not in ("--cfg", "job", "--dry-run")]
    words = [re.sub(r"^seed=(?:range\()?(\d+),.*", r"seed=\1", word) for word in words]
    for cfg in compose_jobs(in_order(words)):
        validated(cfg)


def test_the_experiment_that_the_readme_shows_composes_as_it_stands(tmp_path):
    (content,) = blocks("README.md", "yaml")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(content)
    (cfg,) = compose_jobs(in_order(["--config-dir", str(tmp_path), "experiment=mine"]))
    assert validated(cfg)["strategy"]["_target_"].endswith("LwF")
    assert cfg.trainer.epochs == 10


def test_the_readme_names_every_choice():
    text = (ROOT / "README.md").read_text()
    for group in ("stream", "model", "strategy", "fisher", "optimizer", "scheduler", "tracker"):
        for choice in choices()[group]:
            assert f"`{choice}`" in text


def test_every_figure_of_the_readme_stands_in_the_results_too():
    readme, results = (ROOT / "README.md").read_text(), (ROOT / "benchmarks" / "RESULTS.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("|") and "±" in line]
    assert rows
    assert all(row in results for row in rows)


def test_the_method_that_contributing_shows_works_as_it_stands(cl_runner, tmp_path, monkeypatch):
    (code,), (config,) = blocks("CONTRIBUTING.md", "python"), blocks("CONTRIBUTING.md", "yaml")
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "coma.yaml").write_text(config.replace("cl_runner.strategies.coma", "my_coma"))
    (tmp_path / "my_coma.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    status, said = cl_runner("--config-dir", str(tmp_path / "conf"), "strategy=coma", "plugins=[my_coma]")
    assert status == 0, said
    assert any("forgetting" in line for line in said.splitlines())


def test_what_is_shown_of_ones_own_network_stream_and_tracker_works_as_it_stands(cl_runner, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "extend.md").read_text()
    files = re.findall(r"`(my_\S+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL)
    assert len(files) == 6
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    (command,) = commands("docs/extend.md")
    status, said = cl_runner(*shlex.split(command)[1:], small=False)
    assert status == 0, said
    assert "learned 2" in said
    (folder,) = Path("outputs").glob("er-shifted_digits-strided-s0-*")
    assert (folder / "results.json").exists()


def test_what_is_shown_of_python_works_as_it_stands(cl_runner, capsys):
    for command in commands("docs/python.md"):
        status, said = cl_runner(*shlex.split(command)[1:], small=False)
        assert status == 0, said
    (learned,) = Path("outputs").glob("ewc-*")
    exec("".join(blocks("docs/python.md", "python")), {})
    said = capsys.readouterr().out
    last = json.loads((learned / "results.json").read_text())["accuracy"]["class"][-1]
    answers = [line.rpartition(" ")[2] for line in said.splitlines() if re.match(r"\(\d, \d\) ", line)]
    assert [float(answer) for answer in answers] == pytest.approx(last, abs=1e-6)
