"""Data sets made into tasks."""

from cl_runner.streams.base import Examples, Stream, Task
from cl_runner.streams.permuted import Permuted
from cl_runner.streams.recipe import Recipe
from cl_runner.streams.rotated import Rotated
from cl_runner.streams.split import Split

__all__ = ["Examples", "Permuted", "Recipe", "Rotated", "Split", "Stream", "Task"]
