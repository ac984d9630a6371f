import pytest
import torch

from cl_runner.streams.base import Examples, number_of_batches


def examples(rows):
    return Examples(torch.zeros(rows, 1, 1, 1, dtype=torch.uint8), torch.arange(rows), torch.zeros(rows))


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("rows", [3, 16, 17, 20])
def test_batches_from_a_number_on_are_those_that_come_then(rows, drop_last, shuffled):
    def labels(first):
        generator = torch.Generator().manual_seed(1) if shuffled else None
        return [batch.labels.tolist() for batch in examples(rows).batches(8, generator, drop_last, first)]

    everything = labels(0)
    assert len(everything) == (number_of_batches(rows, 8, drop_last) if shuffled else -(-rows // 8))
    for first in range(1, len(everything) + 2):
        assert labels(first) == everything[first:]
