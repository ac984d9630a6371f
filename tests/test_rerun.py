"""Runs that are asked for again: their groups, their images, their code."""

import json
import re
import shutil
import signal
import sys
from functools import partial
from itertools import product

import numpy as np
import pytest
from PIL import Image

from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder
from cl_runner.interrupt import Stopped
from cl_runner.job import carry_out
from tests.test_job import at_step, send
from tests.test_resume import experiment

pytestmark = pytest.mark.usefixtures("no_picture")


def test_a_finished_run_becomes_one_of_the_group_of_whoever_asks_for_it_again(tmp_path):
    plain = experiment(tmp_path, "strategy=finetune", "seed=0")
    carry_out(plain)
    fixed = experiment(tmp_path, "strategy=finetune", "seed=0", "stream.seed=0")
    assert (fixed.folder, fixed.group == plain.group) == (plain.folder, False)
    carry_out(fixed)
    carry_out(plain)
    assert RunFolder(plain.folder).status["groups"] == [plain.group, fixed.group]


def test_a_run_does_not_go_on_where_its_images_have_become_others_and_says_so_where_it_is_shown(tmp_path, capsys):
    def laid_out(size):
        for seed, (part, label, number) in enumerate(product(("train", "test"), "abcd", range(3))):
            path = tmp_path / "data" / "marks" / part / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)

    words = ["stream=image_folder", "stream.name=marks", "stream.image_size=8", "stream.num_tasks=2"]
    make = partial(experiment, tmp_path, "strategy=finetune", *words, f"data_root={tmp_path / 'data'}")
    laid_out(8)
    with pytest.raises(Stopped):
        carry_out(at_step(make(), 1, partial(send, signal.SIGINT)))
    laid_out(9)
    with pytest.raises(ConfigError, match=r"was begun with other images than are in .*marks now; go back to those"):
        carry_out(make())
    laid_out(8)
    carry_out(make())
    assert RunFolder(make().folder).done
    carry_out(make())
    assert "other images" not in capsys.readouterr().out
    laid_out(9)
    carry_out(make())
    assert "warning: it was made with other images" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(tmp_path / "data")
    carry_out(make())  # nothing there to compare with: what was measured is shown


def test_a_finished_run_says_that_the_checkpoint_asked_for_was_not_kept(tmp_path, capsys):
    words = ("strategy=finetune", "stream.max_tasks=1")
    carry_out(experiment(tmp_path, *words))
    carry_out(experiment(tmp_path, *words))
    assert "was not kept" not in capsys.readouterr().out
    carry_out(experiment(tmp_path, *words, "trainer.keep_checkpoint=true"))
    assert "warning: its checkpoint was not kept" in capsys.readouterr().out


def test_a_run_says_where_it_is_shown_that_its_method_or_the_commit_has_changed_since(tmp_path, capsys):
    wanted = experiment(tmp_path, "strategy=finetune", "stream.max_tasks=1")
    carry_out(wanted)
    folder = RunFolder(wanted.folder)
    code = folder.status["code"]
    assert {"cl_runner.strategies.finetune", "cl_runner.strategies.base", "cl_runner.trainer"} <= code.keys()
    carry_out(wanted)
    assert "warning" not in capsys.readouterr().out
    folder.update_status(code={**code, "cl_runner.strategies.finetune": "0badc0de"})
    results = folder.results
    results["environment"]["commit"] = "abc"
    (folder.path / "results.json").write_text(json.dumps(results))
    carry_out(wanted)
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: it was made with other code of cl_runner.strategies.finetune than is there now" in said
    assert "warning: it was made with commit abc (now " in said


MINE = """
import signal
from pathlib import Path

from cl_runner.strategies import Finetune


class Mine(Finetune):
    def after_task(self, task):
        if task.index == 1 and Path("broken").exists():
            raise RuntimeError("my own fault")
        if task.index == 1 and Path("stopped").exists():
            signal.raise_signal(signal.SIGINT)
"""
WORDS = ("strategy=finetune", "strategy._target_=my_own_methods.Mine", "plugins=[my_own_methods]")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The file of a method, which fails or is stopped in its second task while `broken` or `stopped` exists."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_methods", raising=False)
    code = tmp_path / "my_own_methods.py"
    code.write_text(MINE)
    return code


def test_a_run_does_not_go_on_with_other_code_of_a_plugin_than_it_was_saved_with(cl_runner, tmp_path, mine):
    (tmp_path / "stopped").touch()
    assert cl_runner(*WORDS)[0] == 130
    (tmp_path / "stopped").unlink()
    mine.write_text(MINE + "MENDED = True\n")
    status, said = cl_runner(*WORDS)
    assert status == 2
    assert "was saved with other code of my_own_methods than is there now; go back to those to resume it" in said
    mine.write_text(MINE)
    assert cl_runner(*WORDS)[0] == 0
    mine.write_text(MINE + "MENDED = True\n")
    assert "warning: it was made with other code of my_own_methods" in cl_runner(*WORDS)[1]
    said = cl_runner("-m", *WORDS)[1]
    assert "1 of 1 jobs were done with other images or code than are there now, such as mine-" in said


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["alone", "in a sweep"])
def test_a_run_that_failed_starts_over_once_its_plugin_is_mended(sweep, cl_runner, tmp_path, mine, the_run):
    (tmp_path / "broken").touch()
    status, said = cl_runner(*sweep, *WORDS)
    assert status == 1
    place = MINE[: MINE.index("raise RuntimeError")].count("\n") + 1
    assert sweep or re.search(rf"my own fault \(my_own_methods.py:{place}\); .*/run.log has the whole of it", said)
    first = the_run()
    (tmp_path / "broken").unlink()
    mine.write_text(MINE + "MENDED = True\n")
    status, said = cl_runner(*sweep, *WORDS)
    assert status == 0
    kept = f"the earlier run is kept in outputs/{first.name}.1; it failed with other code of my_own_methods"
    assert kept in said
    assert (first / "results.json").exists()
    assert json.loads((first.with_name(f"{first.name}.1") / "status.json").read_text())["state"] == "failed"


def test_a_trial_that_failed_starts_over_once_its_plugin_is_mended(cl_runner, tmp_path, mine):
    pytest.importorskip("optuna")
    search = ["-m", "hydra/sweeper=optuna", "stream.validation=0.2", "trainer.epochs=choice(1)", *WORDS]
    (tmp_path / "broken").touch()
    assert cl_runner(*search, "hydra.sweeper.trials=1")[0] == 1
    (tmp_path / "broken").unlink()
    mine.write_text(MINE + "MENDED = True\n")
    status, said = cl_runner(*search, "hydra.sweeper.trials=2")
    assert status == 0, said
    assert "it failed with other code of my_own_methods" in said
