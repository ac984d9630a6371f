"""Warn in advance when a Fisher will take long to compute."""

import logging
import time
from collections.abc import Callable

from cl_runner.fisher.estimators import Estimator
from cl_runner.models.model import Classifier
from cl_runner.streams.base import Examples

log = logging.getLogger("cl_runner")

LONG = 100  # backward passes per training image of the task
TRIAL = 8  # samples to time


def announce(
    estimator: Estimator,
    model: Classifier,
    examples: Examples,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Log how long `estimator` will take on these examples, if it makes more than a hundred passes for each."""
    samples = min(estimator.num_samples or len(examples), len(examples))
    passes = estimator.passes(model.head.out_features) * samples
    if passes <= LONG * len(examples):
        return
    estimator(model, examples[:TRIAL])  # warm-up: what is done only once, or once per batch size
    start = clock()
    estimator(model, examples[:TRIAL])
    seconds = (clock() - start) * samples / min(TRIAL, samples)
    log.warning(
        "the %s Fisher makes up to %d backward passes over %d samples: about %.0f s (fisher=probe or a smaller "
        "fisher.pretrained_samples is faster)",
        type(estimator).__name__.lower(),
        passes,
        samples,
        seconds,
    )
