"""Prompts for a frozen vision transformer of timm, chosen by the transformer's own features of the image.

They are attached by forward hooks, not registered in the backbone: its weights keep their names, and files of weights
hold it without them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_runner.errors import ConfigError

if TYPE_CHECKING:  # timm takes a second to import, and few runs need it
    from timm.models.vision_transformer import VisionTransformer


def vision_transformer(backbone: nn.Module, method: str) -> VisionTransformer:
    """`backbone`, if prompts and adapters can be attached to it.

    Raises ConfigError that names the `method`.
    """
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(backbone, VisionTransformer) or not all(_plain(block) for block in backbone.blocks):
        names = "such as model=timm model.name=vit_base_patch16_224.augreg_in21k"
        got = type(backbone).__name__
        raise ConfigError("strategy", f"expected a plain vision transformer of timm ({names}) for {method}, got {got}")
    return backbone


def _plain(block: nn.Module) -> bool:
    """Whether one layer computes queries, keys and values, and an MLP follows."""
    projection = getattr(getattr(block, "attn", None), "qkv", None)
    return isinstance(projection, nn.Linear) and isinstance(getattr(block, "mlp", None), nn.Module)


class Prompts(nn.Module, ABC):
    """Every pass through the transformer is preceded by one without prompts, whose features are the query [B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False  # if off, the transformer is unchanged
        self._asking = False
        self.loss: Tensor | None = None  # of the last pass, if the method has one: a scalar

    @abstractmethod
    def choose(self, query: Tensor) -> None:
        """Set the prompts of the pass that follows, given the query [B, D]."""

    def begin(self, task: int) -> None:
        """Called before `task` is learned."""

    def keep(self, task: int) -> None:
        """Called when `task` has been learned."""

    def enter(self, backbone: VisionTransformer) -> None:
        """Attach to `backbone`, which from now on is prompted whenever prompts are on."""
        backbone.register_forward_pre_hook(self._ask)

    def _ask(self, backbone: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self.on or self._asking:
            return
        self._asking = True
        try:
            with torch.no_grad():
                query = backbone(*inputs)
        finally:
            self._asking = False
        with torch.autocast(query.device.type, enabled=False):  # the same choice in every precision
            self.choose(query.float())


class Pool(Prompts):
    """Prompts with keys; those with the keys nearest to the query become additional tokens (L2P)."""

    def __init__(self, backbone: VisionTransformer, size: int, length: int, top: int) -> None:
        super().__init__()
        self.top = top
        self.keys = nn.Parameter(0.02 * torch.randn(size, backbone.embed_dim))
        self.prompts = nn.Parameter(0.02 * torch.randn(size, length, backbone.embed_dim))
        self._tokens: Tensor | None = None  # [B, P, D] for the current pass

    def choose(self, query: Tensor) -> None:
        similarity = F.normalize(query) @ F.normalize(self.keys).T  # [B, M]
        nearest = similarity.topk(self.top)
        self.loss = (1 - nearest.values).sum(1).mean()
        self._tokens = self.prompts[nearest.indices].flatten(1, 2)

    def enter(self, backbone: VisionTransformer) -> None:
        super().enter(backbone)
        backbone.blocks.register_forward_pre_hook(self._prepend)
        backbone.norm.register_forward_hook(self._average)

    def _prepend(self, blocks: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self._tokens is None else (torch.cat([self._tokens, inputs[0]], 1), *inputs[1:])

    def _average(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Replace all of the transformer's own tokens by the prompts' mean, whichever of them it pools."""
        if self._tokens is None:
            return None
        count = self._tokens.shape[1]
        self._tokens = None
        return output[:, :count].mean(1, keepdim=True).expand(-1, output.shape[1] - count, -1)


class Prefix:
    """Additional keys and values for one attention layer (prefix tuning: Li & Liang, 2021, arXiv 2101.00190).

    They are inserted after the layer's own projection. Zero tokens make room for them; their outputs are dropped.
    """

    def __init__(self) -> None:
        self.pair: Tensor | None = None  # [B, 2, L, D] or [1, 2, L, D], keys and values, for the current pass

    def enter(self, attention: nn.Module) -> None:
        attention.register_forward_pre_hook(self._lengthen)
        attention.get_submodule("qkv").register_forward_hook(self._fill)
        attention.register_forward_hook(self._shorten)

    def _lengthen(self, attention: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self.pair is None else (F.pad(inputs[0], (0, 0, 0, self.pair.shape[2])), *inputs[1:])

    def _fill(self, projection: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.pair is None:
            return None
        keys, values = self.pair.to(output.dtype).unbind(1)
        extra = torch.cat([torch.zeros_like(keys), keys, values], 2)  # [., L, 3 D]: queries, keys, values
        return torch.cat([output[:, : -extra.shape[1]], extra.expand(len(output), -1, -1)], 1)

    def _shorten(self, attention: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.pair is None:
            return None
        count = self.pair.shape[2]
        self.pair = None
        return output[:, :-count]


def prefixes(backbone: VisionTransformer, blocks: Sequence[int], field: str) -> dict[int, Prefix]:
    """A prefix for each of the `blocks`, by the block's index.

    Raises ConfigError for a block that does not exist.
    """
    wrong = [block for block in blocks if not 0 <= block < len(backbone.blocks)]
    if wrong:
        raise ConfigError(field, f"expected numbers of blocks, 0 to {len(backbone.blocks) - 1}, got {wrong[0]}")
    return {block: Prefix() for block in blocks}


class Experts(Prompts):
    """Prefixes shared by all tasks, and one set for each task, chosen by its key (DualPrompt)."""

    past_experts: Tensor  # [T, blocks, 2, L, D]
    past_keys: Tensor  # [T, D]
    learned: Tensor  # [T] bool

    def __init__(
        self,
        backbone: VisionTransformer,
        num_tasks: int,
        general_blocks: Sequence[int],
        expert_blocks: Sequence[int],
        general_length: int,
        expert_length: int,
    ) -> None:
        super().__init__()
        self.general_prefixes = prefixes(backbone, general_blocks, "strategy.general_blocks")
        self.expert_prefixes = prefixes(backbone, expert_blocks, "strategy.expert_blocks")
        if twice := self.general_prefixes.keys() & self.expert_prefixes.keys():
            given = f"expected blocks without general prompts, got {min(twice)}"
            raise ConfigError("strategy.expert_blocks", given)
        size = backbone.embed_dim
        self.general = nn.Parameter(0.02 * torch.randn(len(general_blocks), 2, general_length, size))
        self.expert = nn.Parameter(torch.empty(len(expert_blocks), 2, expert_length, size))
        self.key = nn.Parameter(torch.empty(size))
        self.register_buffer("past_experts", torch.zeros(num_tasks, *self.expert.shape))
        self.register_buffer("past_keys", torch.zeros(num_tasks, size))
        self.register_buffer("learned", torch.zeros(num_tasks, dtype=torch.bool))
        self.begin(0)

    @torch.no_grad()
    def begin(self, task: int) -> None:
        """Draw a new key; the prompts continue from the previous task's."""
        for parameter in (self.expert, self.key) if task == 0 else (self.key,):
            parameter.copy_(0.02 * torch.randn(parameter.shape))

    @torch.no_grad()
    def keep(self, task: int) -> None:
        self.past_experts[task], self.past_keys[task], self.learned[task] = self.expert, self.key, True

    def choose(self, query: Tensor) -> None:
        """In training, the current task's; otherwise those of the learned task with the nearest key."""
        if self.training:
            self.loss = (1 - F.cosine_similarity(query, self.key[None])).mean()
            experts = self.expert[None]
        else:
            similarity = F.normalize(query) @ F.normalize(self.past_keys).T  # [B, T]
            experts = self.past_experts[similarity.masked_fill(~self.learned, -torch.inf).argmax(1)]
        for number, prefix in enumerate(self.general_prefixes.values()):
            prefix.pair = self.general[None, number]
        for number, prefix in enumerate(self.expert_prefixes.values()):
            prefix.pair = experts[:, number]

    def enter(self, backbone: VisionTransformer) -> None:
        super().enter(backbone)
        for block, prefix in {**self.general_prefixes, **self.expert_prefixes}.items():
            prefix.enter(backbone.blocks[block].get_submodule("attn"))


class Components(Prompts):
    """Prefixes that are sums of components, each weighted by how its key matches the attended query (CODA-Prompt).

    Every task adds components, initialised orthogonal to the frozen ones of earlier tasks.
    """

    def __init__(
        self, backbone: VisionTransformer, num_tasks: int, blocks: Sequence[int], components: int, length: int
    ) -> None:
        """`components`: per task; `length`: of a prompt, half keys and half values."""
        super().__init__()
        self.prefixes, self.components = prefixes(backbone, blocks, "strategy.blocks"), components
        size = backbone.embed_dim
        if components * num_tasks > size:
            most = f"expected at most {size // num_tasks} (orthogonal over {num_tasks} tasks in {size} dimensions)"
            raise ConfigError("strategy.components", f"{most}, got {components}")
        for name, shape in {"prompts": (2, length // 2, size), "keys": (size,), "attention": (size,)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(len(blocks), components, *shape)))
            self.register_buffer(f"past_{name}", torch.zeros(len(blocks), components * num_tasks, *shape))

    @property
    def banks(self) -> list[tuple[Tensor, Tensor]]:
        """Prompts, keys and attention vectors [blocks, M, ...]: the trainable ones, and those of earlier tasks.

        Components that no task has filled yet are zero, and so are their weights.
        """
        names = ("prompts", "keys", "attention")  # getattr: plain tensors may replace the parameters
        return [(getattr(self, name), getattr(self, f"past_{name}")) for name in names]

    @torch.no_grad()
    def begin(self, task: int) -> None:
        used = task * self.components
        for current, past in self.banks:
            for live, known in zip(current, past[:, :used], strict=True):
                live.copy_(orthonormal(self.components, known.flatten(1)).view_as(live))

    @torch.no_grad()
    def keep(self, task: int) -> None:
        for current, past in self.banks:
            past[:, task * self.components : (task + 1) * self.components] = current
            current.zero_()  # or they would count twice

    def choose(self, query: Tensor) -> None:
        current, past = zip(*self.banks, strict=True)
        for number, prefix in enumerate(self.prefixes.values()):
            parts = [_weighted(query, *(bank[number] for bank in banks)) for banks in (current, past)]
            prefix.pair = parts[0] + parts[1]

    def dependence(self) -> Tensor:
        """|B B' - I|^2 over all banks B, without the constant part; a scalar, zero if rows are orthonormal."""
        total = torch.zeros((), device=self.banks[0][0].device)
        with torch.autocast(total.device.type, enabled=False):
            for current, past in self.banks:
                live, known = current.flatten(2), past.flatten(2)
                own = live @ live.mT - torch.eye(self.components, device=live.device)
                total = total + own.square().sum() + 2 * (live @ known.mT).square().sum()
        return total

    def enter(self, backbone: VisionTransformer) -> None:
        super().enter(backbone)
        for block, prefix in self.prefixes.items():
            prefix.enter(backbone.blocks[block].get_submodule("attn"))


def _weighted(query: Tensor, prompts: Tensor, keys: Tensor, attention: Tensor) -> Tensor:
    """sum_m cos(query * attention_m, keys_m) prompts_m: [B, D], [M, 2, L, D], [M, D], [M, D] -> [B, 2, L, D]."""
    product = query @ (attention * F.normalize(keys)).T  # [B, M]
    length = (query.square() @ attention.square().T).clamp(min=1e-12).sqrt()
    return torch.einsum("bm,mtld->btld", product / length, prompts)


def orthonormal(count: int, known: Tensor) -> Tensor:
    """`count` random orthonormal rows, also orthogonal to the rows `known` [N, D]; on the CPU."""
    known = known.cpu()
    rows = torch.randn(count, known.shape[1])
    basis = torch.linalg.qr(known.T)[0]  # [D, N]
    for _ in range(2):  # the second removes rounding errors
        rows = rows - rows @ basis @ basis.T
    return torch.linalg.qr(rows.T)[0].T
