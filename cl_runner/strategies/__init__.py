"""How a stream is learned: one method per file, as the hooks in which it differs from plain fine-tuning."""

from cl_runner.strategies.agem import AGEM
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.bic import BiC
from cl_runner.strategies.coda_prompt import CODAPrompt
from cl_runner.strategies.combined import Combined
from cl_runner.strategies.cumulative import Cumulative
from cl_runner.strategies.der import DER
from cl_runner.strategies.derpp import DERpp
from cl_runner.strategies.dropout import Dropout
from cl_runner.strategies.dualprompt import DualPrompt
from cl_runner.strategies.ease import EASE
from cl_runner.strategies.er import ER
from cl_runner.strategies.er_ace import ERACE
from cl_runner.strategies.ewc import EWC
from cl_runner.strategies.fecam import FeCAM
from cl_runner.strategies.finetune import Finetune
from cl_runner.strategies.frozen import Frozen
from cl_runner.strategies.gdumb import GDumb
from cl_runner.strategies.gem import GEM
from cl_runner.strategies.icarl import ICaRL
from cl_runner.strategies.independent import Independent
from cl_runner.strategies.joint import Joint
from cl_runner.strategies.l1 import L1
from cl_runner.strategies.l2 import L2
from cl_runner.strategies.l2p import L2P
from cl_runner.strategies.lfl import LFL
from cl_runner.strategies.lora import LoRA
from cl_runner.strategies.lucir import LUCIR
from cl_runner.strategies.lwf import LwF
from cl_runner.strategies.mas import MAS
from cl_runner.strategies.mir import MIR
from cl_runner.strategies.ncm import NCM
from cl_runner.strategies.ranpac import RanPAC
from cl_runner.strategies.rwalk import RWalk
from cl_runner.strategies.si import SI
from cl_runner.strategies.slca import SLCA
from cl_runner.strategies.slda import SLDA

__all__ = [
    "AGEM",
    "DER",
    "EASE",
    "ER",
    "ERACE",
    "EWC",
    "GEM",
    "L1",
    "L2",
    "L2P",
    "LFL",
    "LUCIR",
    "MAS",
    "MIR",
    "NCM",
    "SI",
    "SLCA",
    "SLDA",
    "BiC",
    "CODAPrompt",
    "Combined",
    "Cumulative",
    "DERpp",
    "Dropout",
    "DualPrompt",
    "FeCAM",
    "Finetune",
    "Frozen",
    "GDumb",
    "ICaRL",
    "Independent",
    "Joint",
    "LoRA",
    "LwF",
    "RWalk",
    "RanPAC",
    "Strategy",
]
