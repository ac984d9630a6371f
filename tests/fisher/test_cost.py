import pytest
import torch

from cl_runner.fisher.cost import announce
from cl_runner.fisher.estimators import Exact, Probe
from cl_runner.models.model import PretrainedView
from tests.toys import toy_model, toy_stream


def view_of(outputs):
    stream = toy_stream()
    model = toy_model(stream, pretrained=True)
    model.pretrained_head = torch.nn.Linear(8, outputs).requires_grad_(False)
    return PretrainedView(model), stream.tasks[0].train


def test_a_pass_over_very_many_outputs_is_announced_with_its_time(caplog):
    view, examples = view_of(200)
    ticks = iter([0.0, 2.0])
    announce(Exact(), view, examples, clock=lambda: next(ticks))
    (record,) = caplog.records
    assert "exact Fisher makes up to 4776 backward passes over 24 samples: about 6 s" in record.getMessage()


@pytest.mark.parametrize(("estimator", "outputs"), [(Exact(), 50), (Probe(), 1000), (Exact(num_samples=1), 1000)])
def test_an_ordinary_pass_is_not(estimator, outputs, caplog):
    announce(estimator, *view_of(outputs))
    assert not caplog.records
