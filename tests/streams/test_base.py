import pytest
import torch

from cl_runner.errors import ConfigError
from cl_runner.streams.base import Examples, Task, number_of_batches


def examples(rows):
    return Examples(torch.zeros(rows, 1, 1, 1, dtype=torch.uint8), torch.arange(rows), torch.zeros(rows))


def test_batches_in_order_hold_every_row_once():
    assert [batch.labels.tolist() for batch in examples(5).batches(2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("rows", [3, 16, 17, 20])
def test_shuffled_batches_from_a_number_on_are_those_that_come_then(rows, drop_last):
    def labels(first):
        generator = torch.Generator().manual_seed(1)
        return [batch.labels.tolist() for batch in examples(rows).shuffled(8, generator, drop_last, first)]

    everything = labels(0)
    assert len(everything) == number_of_batches(rows, 8, drop_last)
    for first in range(1, len(everything) + 2):
        assert labels(first) == everything[first:]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_label_that_is_not_among_a_tasks_classes_is_refused(split):
    task = Task(1, (0, 2), lambda _: examples(4))
    with pytest.raises(
        ConfigError, match=rf"expected {split} labels of task 1 among its classes \[0, 2\], got \[1, 3\]"
    ):
        getattr(task, split)


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("meta", False)])
def test_a_copy_to_the_cpu_is_waited_for(device, waits, monkeypatch):
    asked = []
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, where, non_blocking: (asked.append(non_blocking), to(self, where))[1]
    )
    rows = examples(3).to(device)
    assert rows.images.device.type == device
    assert asked == [not waits] * 3
