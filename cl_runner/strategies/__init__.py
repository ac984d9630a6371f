"""How a stream is learned: one method a file, each in the hooks in which it differs from plain fine-tuning."""

from cl_runner.strategies.base import Strategy
from cl_runner.strategies.cumulative import Cumulative
from cl_runner.strategies.dropout import Dropout
from cl_runner.strategies.ewc import EWC
from cl_runner.strategies.finetune import Finetune
from cl_runner.strategies.frozen import Frozen
from cl_runner.strategies.independent import Independent
from cl_runner.strategies.joint import Joint
from cl_runner.strategies.l1 import L1
from cl_runner.strategies.l2 import L2
from cl_runner.strategies.lwf import LwF
from cl_runner.strategies.ncm import NCM

__all__ = [
    "EWC",
    "L1",
    "L2",
    "NCM",
    "Cumulative",
    "Dropout",
    "Finetune",
    "Frozen",
    "Independent",
    "Joint",
    "LwF",
    "Strategy",
]
