"""Which modules may import which."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cl_runner"
FLOORS = [
    {"errors", "folder", "streams", "metrics", "trackers", "identity", "arguments", "closed_pipe", "lock", "interrupt"}
    | {"", "pulse", "randomness", "progress", "losses", "ranges", "schedulers", "clock", "environment", "logs"},
    {"models", "memory"},
    {"gradients"},
    {"fisher"},
    {"strategies"},
    {"trainer", "checkpoint", "evaluate"},
    {"targets", "complaints", "components", "sources", "config", "run", "state", "learned"},
    {"__main__", "command", "command_line", "overrides", "hydra_keys", "compose", "job", "plan", "rerun", "sweep"}
    | {"launchers", "published", "verify", "report", "listing"},
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}
ONLY_IN = {
    "hydra": {"command", "command_line", "compose", "overrides"},
    "omegaconf": {"command", "compose", "config", "learned"},
    "wandb": {"trackers/wandb"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports {node.module} relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(name: str) -> str:
    """cl_runner.models.model.Model -> models"""
    return name.split(".")[1] if name.count(".") else ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_from_its_own_floor_downwards_only(file):
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    floor = FLOOR["" if own == "__init__" else own]
    upwards = {name for name in imported(file) if name.startswith("cl_runner") and FLOOR.get(part(name), 0) > floor}
    assert not upwards, f"{file.name} reaches up to {upwards}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_hydra_and_wandb_stay_where_they_belong(file):
    own = str(file.relative_to(PACKAGE).with_suffix(""))
    for package, homes in ONLY_IN.items():
        if own not in homes:
            assert not any(name.split(".")[0] == package for name in imported(file))


def test_every_part_of_the_package_has_a_floor():
    parts = {file.relative_to(PACKAGE).with_suffix("").parts[0] for file in FILES} - {"__init__"}
    assert parts <= set(FLOOR)


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("[a-z]*.py")), ids=lambda file: file.name)
def test_the_map_in_contributing_names_every_module(file):
    assert file.name in (PACKAGE.parent / "CONTRIBUTING.md").read_text()
