"""What is kept of past tasks: examples, chosen by rank within groups that share the room."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cl_runner.streams.base import Examples, Stream

log = logging.getLogger("cl_runner")

Features = Callable[[Tensor], Tensor]  # images [B, C, H, W] uint8 -> [B, D], of the model as it is when it is called
Share = Literal["class", "task", "task_class"]  # task_class: each class of each task apart, where tasks share classes
Per = Literal["all", "class", "task", "task_class"]


class Memory(ABC):
    """Examples kept as they came: uint8 images, labels, task ids and extras (stored logits [N, K], say).

    Every row belongs to a group (its class, its task, or one for all) and has a rank in it; those of the lowest rank
    stay. What sets memories apart is how they rank: at random, by age, by what herding picks first. A group that has
    shrunk for others holds what it would have held, had it never been larger.

    Nothing but `sample` and random ranks draws random numbers, from PyTorch's global CPU generator.
    """

    streaming: ClassVar[bool] = True  # rows may come batch by batch (`add`), not only task by task (`add_task`)

    def __init__(self, size: int, per: Per, share: Share | None) -> None:
        """`size`: rows at most, in all or `per` group; `share`: the groups among which rows in all are shared equally
        (room that one does not fill goes to the others); None: all rows are one."""
        self.size, self.per = size, per
        self._group_by = share if per == "all" else per
        self._rows: Examples | None = None  # the first len(self) of them count; the rest is room to grow
        self._groups = torch.zeros(0, dtype=torch.int64)  # [N], of each row; on the CPU, as are the ranks
        self._ranks = torch.zeros(0, dtype=torch.float64)  # [N]

    def __len__(self) -> int:
        return len(self._ranks)

    @property
    def examples(self) -> Examples:
        """All rows, in no particular order: a view, which later additions change.

        Raises LookupError where there are none yet: an empty memory does not know the shape of an image.
        """
        if self._rows is None:
            raise LookupError("the memory is empty: ask for its length first")
        return self._rows[: len(self)]

    def warn_of_lack(self, stream: Stream) -> None:
        """Say so where not every class will have a row here, for methods that answer from the rows of each."""
        groups = [task.classes for task in stream.tasks]
        wanted = {"all": len(set().union(*groups)), "task": max(len(group) for group in groups)}.get(self.per, 1)
        if self.size < wanted:
            each = " for each task" if self.per == "task" else ""
            log.warning("memory.size: %d rows%s for %d classes: some are never kept", self.size, each, wanted)

    def sample(self, count: int) -> Examples:
        """`count` rows drawn without replacement, or all, in random order, where there are not so many.

        Raises LookupError where there are none yet.
        """
        chosen = torch.randperm(len(self))[:count]
        return self.examples[chosen.to(self.examples.labels.device, non_blocking=True)]

    def add(self, batch: Examples) -> None:
        """Offer rows as they stream by: a batch that has just been learned, without what was replayed in it.

        They lie where the first batch lay (on the computing device, if that did). Every batch must have the same
        extras. Memories that group by class or task read the labels, and so wait for the device.
        """
        self._admit(batch, self.rank(batch))

    def add_task(self, examples: Examples, features: Features) -> None:
        """Offer all examples of a task at its end; `features` is asked only by memories that choose by them."""
        self.add(examples)

    @abstractmethod
    def rank(self, rows: Examples) -> Tensor:
        """[N] float64 on the CPU: lower stays longer. The rows are newer than all that are held."""

    def state_dict(self) -> dict[str, Any]:
        """All that it holds, as copies; `load_state_dict` brings it back bit for bit."""
        if self._rows is None:
            return {}
        rows = self.examples
        return {
            "images": rows.images.clone(),
            "labels": rows.labels.clone(),
            "task_ids": rows.task_ids.clone(),
            "extras": {name: values.clone() for name, values in rows.extras.items()},
            "groups": self._groups.clone(),
            "ranks": self._ranks.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows = None
        self._groups, self._ranks = self._groups[:0], self._ranks[:0]
        if state:
            images, labels, task_ids = (state[name].clone() for name in ("images", "labels", "task_ids"))
            extras = {name: values.clone() for name, values in state["extras"].items()}
            self._rows = Examples(images, labels, task_ids, extras)
            self._groups, self._ranks = state["groups"].cpu().clone(), state["ranks"].cpu().clone()

    def _admit(self, rows: Examples, ranks: Tensor) -> None:
        """Let in the rows whose ranks are low enough, in the places of those that must leave for them."""
        held = len(self)
        groups, ranks = torch.cat([self._groups, self._groups_of(rows)]), torch.cat([self._ranks, ranks])
        kept = self._kept(groups.numpy(), ranks.numpy())
        freed, entering = np.flatnonzero(~kept[:held]), held + np.flatnonzero(kept[held:])
        if not len(entering):
            return
        # Neither a group nor their sum ever shrinks without a row coming in for each that leaves.
        slots = torch.from_numpy(np.concatenate([freed, np.arange(held, held + len(entering) - len(freed))]))
        chosen = torch.from_numpy(entering)
        self._put(slots, rows[(chosen - held).to(rows.labels.device, non_blocking=True)])
        groups[slots], ranks[slots] = groups[chosen], ranks[chosen]
        size = held + len(entering) - len(freed)
        self._groups, self._ranks = groups[:size].clone(), ranks[:size].clone()

    def _groups_of(self, rows: Examples) -> Tensor:
        """[N] int64 on the CPU."""
        if self._group_by is None:
            return torch.zeros(len(rows), dtype=torch.int64)
        labels, tasks = rows.labels, rows.task_ids
        return {"class": labels, "task": tasks, "task_class": tasks * 2**32 + labels}[self._group_by].cpu()

    def _kept(self, groups: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """[N] bool: which rows stay. Of equal ranks in a group, the row that came first."""
        rows = np.arange(len(ranks))
        order = np.lexsort((ranks, groups))  # by group, and by rank in it
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        place = np.empty_like(rows)
        place[order] = rows - np.repeat(starts, np.diff(starts, append=len(rows)))  # 0: the lowest rank of its group
        if self.per != "all":
            return place < self.size
        kept = np.zeros(len(rows), dtype=bool)
        # All groups' firsts, then all their seconds, …; the last round goes by group, so that how many rows a group
        # keeps depends on the groups' sizes alone, and which on ranks alone.
        kept[np.lexsort((groups, place))[: self.size]] = True
        return kept

    def _put(self, slots: Tensor, rows: Examples) -> None:
        """Write rows into their places, making room for them where they come to lie behind the last."""
        own = self._rows if self._rows is not None else rows[:0]
        if own.extras.keys() != rows.extras.keys():
            raise ValueError(f"the memory's rows have the extras {sorted(own.extras)}, got {sorted(rows.extras)}")
        missing = int(slots.max()) + 1 - len(own)
        if missing > 0:
            spare = max(missing, min(len(own), self.size - len(own)) if self.per == "all" else len(own))
            own = own + rows[torch.zeros(spare, dtype=torch.int64, device=rows.labels.device)].to(own.labels.device)
        slots = slots.to(own.labels.device, non_blocking=True)
        for held, new in zip(_tensors(own), _tensors(rows), strict=True):
            held[slots] = new.to(held.device)
        self._rows = own


def _tensors(examples: Examples) -> list[Tensor]:
    extras = (examples.extras[name] for name in sorted(examples.extras))
    return [examples.images, examples.labels, examples.task_ids, *extras]
