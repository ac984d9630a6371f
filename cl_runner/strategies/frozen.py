"""Linear probe: what the pretrained features give without being touched."""

from cl_runner.models.model import Model
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Stream


class Frozen(Strategy):
    """Learn the head alone; the backbone stays as it was, its statistics and its dropout included."""

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        model.backbone.requires_grad_(False)
        model.hold_statistics(model.backbone.modules())
