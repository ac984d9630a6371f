"""The wheel, as users without a checkout get it."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(*words: str | Path, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CL_RUNNER_DATA")}
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel in an environment of its own, which borrows the dependencies but not the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # pip is the parent environment's. A .pth found through a .pth is not read, so the checkout stays out.
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_it_runs_from_another_folder_with_its_own_configuration(installed, tmp_path):
    where = call(installed / "env/bin/python", "-c", "from cl_runner import CONF; print(CONF)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    words = ["model=mlp", "model.widths=[4]", "trainer.epochs=1", "tracker=local", "device=cpu"]
    call(installed / "env/bin/cl-runner", *words, cwd=tmp_path)
    (folder,) = (tmp_path / "outputs").iterdir()
    assert json.loads((folder / "status.json").read_text())["state"] == "done"


def test_every_yaml_of_the_checkout_is_in_it(installed):
    (conf,) = (installed / "env" / "lib").glob("python*/site-packages/cl_runner/conf")
    mine = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert mine == {path.relative_to(conf) for path in conf.rglob("*.yaml")}
