import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from cl_runner.errors import ConfigError
from cl_runner.report import dashboard
from tests.trackers.loopback import ENTITY, Loopback, reached
from tests.trackers.samples import results

pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    with reached() as server:
        yield server


@pytest.fixture(scope="module")
def view(server: Loopback) -> dict[str, Any]:
    """The view that the server was asked to save."""
    assert dashboard.main(["--project", "forgetting", "--name", "Methods"]) == 0
    return server.views[-1]


def panels(view: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"] if panel["viewType"] == kind]


def test_a_workspace_is_saved_under_its_name(view: dict[str, Any]) -> None:
    assert (view["entityName"], view["projectName"], view["displayName"]) == (ENTITY, "forgetting", "Methods")


def test_its_address_is_printed(server: Loopback, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.main(["--entity", "a-team"])
    said = capsys.readouterr().out
    assert said.startswith(f"{server.url}/a-team/cl_runner?nw=")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("groups", ["jobType", "group"])
def test_accuracy_over_tasks_is_a_mean_in_a_band_of_one_deviation(view: dict[str, Any], groups: str) -> None:
    curves = [
        (panel["xAxis"], panel["groupAgg"], panel["groupArea"])
        for panel in panels(view, "Run History Line Plot")
        if panel["metrics"] == ["eval/average_accuracy"] and panel["groupBy"] == groups
    ]
    assert curves == [("task", "mean", "stddev")]


def test_parallel_coordinates_run_over_what_a_summary_has(view: dict[str, Any]) -> None:
    (panel,) = panels(view, "Parallel Coordinates Plot")
    axes = [column["accessor"] for column in panel["columns"]]
    summary = {axis.removeprefix("summary:") for axis in axes if axis.startswith("summary:")}
    sent = results()["metrics"].keys() | {"seconds/total"}
    assert len(summary) >= 5
    assert summary <= sent


def test_matrices_stand_side_by_side(view: dict[str, Any]) -> None:
    shown = [(panel["mediaKeys"], panel["columnCount"]) for panel in panels(view, "Media Browser")]
    assert shown == [(["eval/matrix"], 3), (["eval/forgetting_matrix"], 3)]


def test_without_its_package_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ConfigError, match=r"needs the extra of that name: pip install '.\[dashboard\]'"):
        dashboard.main([])


def test_without_a_server_there_is_one_line(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "gone", True)
    with pytest.raises(ConfigError, match=f"but {server.url} does not answer"):
        dashboard.main([])
