"""`cl-runner dashboard`: save a workspace to Weights & Biases that compares runs."""

from functools import partial
from typing import Any

from cl_runner.arguments import Parser
from cl_runner.errors import ConfigError, missing_extra
from cl_runner.trackers.wandb import default_entity, out_of_reach

SUMMARY = ("average_accuracy", "average_forgetting", "backward_transfer", "forward_transfer", "learning_accuracy")


def parser() -> Parser:
    parser = Parser(prog="cl-runner dashboard", description=__doc__)
    parser.add_argument("--project", default="cl_runner", help="as tracker.project; cl_runner if not given")
    parser.add_argument("--entity", help="as tracker.entity; your own if not given")
    parser.add_argument("--name", default="Continual learning", help="of the workspace")
    return parser


def main(argv: list[str]) -> int:
    """Save the workspace and print its URL. Exit status: 0.

    Raises ConfigError if W&B cannot be reached or wandb-workspaces is not installed.
    """
    asked = parser().parse_args(argv)
    try:
        from wandb_workspaces import workspaces
    except ImportError:
        raise missing_extra("dashboard", "dashboard") from None
    if reason := out_of_reach():
        raise ConfigError("dashboard", f"expected a W&B server to save it to, but {reason}")
    workspace = workspaces.Workspace(
        entity=asked.entity or default_entity(),
        project=asked.project,
        name=asked.name,
        sections=[
            workspaces.Section(
                name=name,
                panels=panels,
                is_open=True,
                layout_settings=workspaces.SectionLayoutSettings(columns=len(panels), rows=1),
            )
            for name, panels in sections().items()
        ],
        settings=workspaces.WorkspaceSettings(max_runs=100),
    )
    print(workspace.save().url)
    return 0


def sections() -> dict[str, list[Any]]:
    """Title -> panels, from top to bottom. A group's curve is its runs' mean, with a band of one standard deviation."""
    from wandb_workspaces.reports.v2 import BarPlot, LinePlot, MediaBrowser, ParallelCoordinatesPlot

    spread: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    over_tasks, over_steps = partial(LinePlot, x="task", **spread), partial(LinePlot, x="step", **spread)
    return {
        "By strategy": [
            over_tasks(title="Average accuracy", y=["eval/average_accuracy"], groupby="JobType"),
            over_tasks(title="Average forgetting", y=["eval/average_forgetting"], groupby="JobType"),
            over_tasks(title="Accuracy of tasks when learned", y=["eval/learning_accuracy"], groupby="JobType"),
        ],
        "By configuration, over seeds": [
            over_tasks(title="Average accuracy", y=["eval/average_accuracy"], groupby="Group"),
            over_tasks(title="Average forgetting", y=["eval/average_forgetting"], groupby="Group"),
            BarPlot(title="Average accuracy in the end", metrics=["average_accuracy"], groupby="Group", **spread),
        ],
        "Summary": [ParallelCoordinatesPlot(title="What was set and what came of it", columns=_columns())],
        "Matrices": [
            MediaBrowser(title="Accuracy", media_keys=["eval/matrix"], num_columns=3),
            MediaBrowser(title="Forgetting", media_keys=["eval/forgetting_matrix"], num_columns=3),
        ],
        "Training": [
            over_steps(title="Loss", y=["train/loss/total"], groupby="JobType"),
            over_steps(title="Learning rate", y=["train/lr"], groupby="JobType"),
            over_steps(title="Images per second", y=["train/images_per_second"], groupby="JobType"),
        ],
    }


def _columns() -> list[Any]:
    """The axes of the parallel coordinates, from left to right."""
    from wandb_workspaces.reports.v2 import Config, SummaryMetric
    from wandb_workspaces.reports.v2.interface import ParallelCoordinatesPlotColumn as Column

    was_set = {"strategy": "strategy._target_", "strength": "strategy.strength", "lr": "optimizer.lr"}
    return [
        *(Column(metric=Config(key), display_name=name) for name, key in was_set.items()),
        *(Column(metric=SummaryMetric(name), display_name=name) for name in SUMMARY),
        Column(metric=SummaryMetric("seconds/total"), display_name="seconds", log=True),
    ]
