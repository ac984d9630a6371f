"""Plain fine-tuning: the lower bound of most tables."""

from cl_runner.strategies.base import Strategy


class Finetune(Strategy):
    """Learn each task as it comes, with nothing done against forgetting."""
