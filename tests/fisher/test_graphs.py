"""Replaying, where there is nothing to replay on; on a device, see `test_gpu.py`."""

import torch

from cl_runner.fisher.graphs import Replayed, side_stream


def test_off_the_device_every_call_has_the_functions_effect_once() -> None:
    total = torch.zeros(2)
    with side_stream(total.device):
        add = Replayed(total.add_, torch.zeros(2))
        for values in torch.arange(8.0).view(4, 2):
            add(values)
    torch.testing.assert_close(total, torch.tensor([12.0, 16.0]))
