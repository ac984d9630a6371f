"""What is kept of past tasks for rehearsal."""

from cl_runner.memory.balanced import ClassBalanced
from cl_runner.memory.base import Memory
from cl_runner.memory.herding import Herding
from cl_runner.memory.reservoir import Reservoir

__all__ = ["ClassBalanced", "Herding", "Memory", "Reservoir"]
