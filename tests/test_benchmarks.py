"""The benchmarks, on small inputs."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cl_runner.fisher.estimators import Exact, Probe
from cl_runner.fisher.hybrid import Hybrid
from cl_runner.models.mlp import MLP


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    module = importlib.import_module("fisher_speed")
    monkeypatch.setattr(module, "SOON", 0.001)
    return module


def test_a_row_has_its_time_its_error_and_what_it_is_of(speed: ModuleType) -> None:
    subject = speed.Subject("tiny", MLP(widths=[4]), (1, 2, 2), batch_size=8)
    rows = ["probe: cl_runner", "empirical: loop", "empirical: cl_runner"]
    settings = speed.Settings(torch.device("cpu"), rounds=2, batches=2, limit=10.0, rows=rows)
    lines = speed.measured(subject, 3, settings, only_exact=False)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert [row[:2] for row in cells] == [
        ["probe", "cl_runner"],
        ["empirical", "cl_runner"],
        ["", "loop, one sample at a time"],
    ]
    assert all(float(row[2]) > 0 for row in cells)
    assert all(float(row[-1]) < 1e-5 for row in cells[1:])


def test_a_peer_that_fails_is_shown_to(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(network: torch.nn.Module) -> None:
        raise NotImplementedError("no such layer")

    monkeypatch.setattr(speed, "PEERS", (speed.Peer("refusal", None, "exact", (refuse,)),))
    subject = speed.Subject("tiny", MLP(widths=[4]), (1, 2, 2), batch_size=8)
    settings = speed.Settings(torch.device("cpu"), rounds=1, batches=1, limit=10.0, rows=["refusal"])
    line = speed.measured(subject, 3, settings, only_exact=True)[-1]
    assert line == "| exact | refusal | - | - | - | fails: NotImplementedError: no such layer |"


def test_the_quality_of_what_draws_is_that_of_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    quality, nets = importlib.import_module("fisher_quality"), importlib.import_module("nets")
    subject = nets.Subject("tiny", MLP(widths=[4]), (1, 2, 2))
    model, examples = subject.build(3, torch.device("cpu")), subject.examples(8, 3, torch.device("cpu"))
    truth = Exact()(model, examples).diagonal()
    drawn = quality.row("probe, 2", "probe", Probe(draws=2), model, examples, truth)
    assert drawn.passes == 2
    assert len(set(drawn.errors)) == len(set(drawn.reported)) == len(quality.SEEDS)
    whole = quality.row("hybrid, budget 2", "hybrid", Hybrid(budget=2), model, examples, truth)
    assert whole.errors == pytest.approx([0], abs=1e-6)
    assert whole.share == pytest.approx(1)
    assert whole.reported == []


def test_lines_of_code_are_neither_blank_nor_comments_nor_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    lines = importlib.import_module("lines")
    source = """'''What it is,
at length.'''

# why
def f(x):  # here
    '''Doc.'''
    text = '''two
lines'''
    return x, text
"""
    assert lines.lines_of_code(source) == 4
    assert all((lines.OURS / f"{name}.py").is_file() for name in lines.PEERS)
