"""What counts as other code."""

import importlib
import itertools

import pytest

from cl_runner.sources import changed, code_of

CODE = '''
"""Twice."""


def double(x):
    """Twice x."""
    return 2 * x  # plainly
'''
numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The file of a module of its own, and its name."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"doubling_{next(numbers)}"
    file = tmp_path / f"{name}.py"
    file.write_text(CODE)
    importlib.invalidate_caches()
    return file, name


def config(**strategy):
    return {"model": {}, "stream": {}, "trainer": {}, "plugins": [], "strategy": strategy}


def test_comments_docstrings_and_layout_are_no_change(module):
    file, name = module
    code = code_of({**config(), "plugins": [name]})
    file.write_text("def double(x):\n    return (2 *\n            x)\n")
    assert changed(code) == []
    file.write_text(CODE.replace("2 * x", "3 * x"))
    assert changed(code) == [name]


def test_a_module_that_is_gone_has_changed(module):
    file, name = module
    code = code_of({**config(), "plugins": [name]})
    file.unlink()
    importlib.invalidate_caches()
    assert changed({**code, "no_such_package.module": "0badc0de"}) == [name, "no_such_package.module"]


def test_a_package_counts_with_all_of_its_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "methods_of_mine"
    (package / "deeper").mkdir(parents=True)
    (package / "deeper" / "loss.py").write_text("STRENGTH = 1\n")
    (package / "template.py").write_text("class {{ name }}:\n")
    code = code_of({**config(), "plugins": ["methods_of_mine"]})
    assert changed(code) == []
    (package / "deeper" / "loss.py").write_text("STRENGTH = 2\n")
    assert changed(code) == ["methods_of_mine"]


def test_the_modules_of_nested_components_and_of_their_bases_count_and_no_others():
    part = {"_target_": "cl_runner.strategies.er.ER", "memory": {"_target_": "cl_runner.memory.reservoir.Reservoir"}}
    unused = {"_target_": "cl_runner.fisher.estimators.Exact"}
    optimizer = {"_target_": "torch.optim.SGD"}
    tracker = {"_target_": "cl_runner.trackers.wandb.Wandb"}
    settings = {**config(parts={"er": part}), "fisher": unused, "optimizer": optimizer, "tracker": tracker}
    assert code_of(settings).keys() == {
        "cl_runner.memory.base",
        "cl_runner.memory.reservoir",
        "cl_runner.strategies.base",
        "cl_runner.strategies.er",
        "cl_runner.strategies.rehearsal",
    }


def test_a_module_that_was_edited_after_it_was_loaded_counts_as_it_was(module):
    file, name = module
    importlib.import_module(name)
    code = code_of({**config(), "plugins": [name]})
    file.write_text(CODE.replace("2 * x", "3 * x"))
    assert code_of({**config(), "plugins": [name]}) == code
    assert changed(code) == [name]
    file.unlink()
    assert changed(code) == [name]
