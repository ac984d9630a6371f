"""The Fisher information: how it is estimated and how it is represented."""

from cl_runner.fisher.batched import Batched
from cl_runner.fisher.estimators import Argmax, Empirical, Estimator, Exact, Probe, Reversed, Sampled
from cl_runner.fisher.hybrid import Hybrid

__all__ = ["Argmax", "Batched", "Empirical", "Estimator", "Exact", "Hybrid", "Probe", "Reversed", "Sampled"]
