"""Plain fine-tuning: the lower bound of most tables."""

from cl_runner.strategies.base import Strategy


class Finetune(Strategy):
    """Learn each task as it comes, doing nothing against forgetting."""
