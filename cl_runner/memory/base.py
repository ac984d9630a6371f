"""The memory of past tasks: examples, chosen by rank within groups that share its capacity."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cl_runner.streams.base import Examples, Stream

log = logging.getLogger("cl_runner")

Features = Callable[[Tensor], Tensor]  # images [B, C, H, W] uint8 -> [B, D], by the model as it is when called
Share = Literal["class", "task", "task_class"]  # task_class: each class within each task
Per = Literal["all", "class", "task", "task_class"]
GROUPS = {"class": "classes", "task": "tasks", "task_class": "classes, counted in each task"}  # for people


class Memory(ABC):
    """Examples stored as they are: uint8 images, labels, task ids and extras (such as logits [N, K]).

    Every row belongs to a group (its class, its task, or one for all) and has a rank in it; the lowest ranks stay.
    Memories differ in how they rank: at random, by age, or in herding's order. A group that has shrunk to make room
    for others holds the same rows as if it had never been larger.

    Only `sample` and random ranks draw random numbers, from PyTorch's global CPU generator.
    """

    streaming: ClassVar[bool] = True  # accepts rows batch by batch (`add`), not only task by task (`add_task`)

    def __init__(self, size: int, per: Per, share: Share | None) -> None:
        """`size`: maximum number of rows, in all or `per` group; `share`: with a total size, the groups that share it
        equally (what one does not fill goes to the others); None: all rows are one group."""
        self.size, self.per = size, per
        self._group_by = share if per == "all" else per
        self._rows: Examples | None = None  # the first len(self) are valid; the rest is spare room
        self._groups = torch.zeros(0, dtype=torch.int64)  # [N], of each row; on the CPU, like the ranks
        self._ranks = torch.zeros(0, dtype=torch.float64)  # [N]

    def __len__(self) -> int:
        return len(self._ranks)

    @property
    def examples(self) -> Examples:
        """All rows, in no particular order: a view, which later additions change.

        Raises LookupError if there are none yet: an empty memory does not know an image's shape.
        """
        if self._rows is None:
            raise LookupError("the memory is empty: ask for its length first")
        return self._rows[: len(self)]

    def warn_of_lack(self, stream: Stream, each_class: bool = False) -> None:
        """Warn if some of the groups that share the memory will have no row in it; `each_class`: or some class, for
        methods that rely on rows of each."""
        sizes = [len(task.classes) for task in stream.tasks]
        classes = len(set().union(*(task.classes for task in stream.tasks)))
        wanted = {}
        if self.per == "all" and self._group_by is not None:
            numbers = {"class": classes, "task": len(sizes), "task_class": sum(sizes)}
            wanted[GROUPS[self._group_by]] = numbers[self._group_by]
        if each_class:
            wanted[GROUPS["class"]] = {"all": classes, "task": max(sizes)}.get(self.per, 1)
        each = " for each task" if self.per == "task" else ""
        for what, number in wanted.items():
            if self.size < number:
                log.warning("memory.size: %d rows%s for %d %s: not all will have one", self.size, each, number, what)

    def sample(self, count: int) -> Examples:
        """`count` rows drawn without replacement, or all of them in random order if there are fewer.

        Raises LookupError if there are none yet.
        """
        chosen = torch.randperm(len(self))[:count]
        return self.examples[chosen.to(self.examples.labels.device, non_blocking=True)]

    def add(self, batch: Examples) -> None:
        """Offer the fresh rows of a batch that has just been learned.

        Rows are kept on the device of the first batch. Every batch must have the same extras. Memories that group by
        class or task read the labels, and so wait for the device.
        """
        self._admit(batch, self.rank(batch))

    def add_task(self, examples: Examples, features: Features) -> None:
        """Offer all examples of a task at its end; `features` is called only by memories that choose by them."""
        self.add(examples)

    @abstractmethod
    def rank(self, rows: Examples) -> Tensor:
        """[N] float64 on the CPU: lower ranks stay longer. The rows are newer than all held ones."""

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything held, which `load_state_dict` restores bit for bit."""
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
        """Store the rows whose ranks are low enough, in place of those that must leave for them."""
        held = len(self)
        groups, ranks = torch.cat([self._groups, self._groups_of(rows)]), torch.cat([self._ranks, ranks])
        kept = self._kept(groups.numpy(), ranks.numpy())
        freed, entering = np.flatnonzero(~kept[:held]), held + np.flatnonzero(kept[held:])
        if not len(entering):
            return
        # A row leaves only when another enters.
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
        """[N] bool: which rows stay. Within a group, ties go to the row that comes first."""
        rows = np.arange(len(ranks))
        order = np.lexsort((ranks, groups))  # by group, then by rank
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        place = np.empty_like(rows)
        place[order] = rows - np.repeat(starts, np.diff(starts, append=len(rows)))  # 0: its group's lowest rank
        if self.per != "all":
            return place < self.size
        kept = np.zeros(len(rows), dtype=bool)
        # Each group's first, then each group's second, …; the last round goes by group, so that how many rows a group
        # keeps depends on the groups' sizes alone, and which on ranks alone.
        kept[np.lexsort((groups, place))[: self.size]] = True
        return kept

    def _put(self, slots: Tensor, rows: Examples) -> None:
        """Write rows into their slots, growing the storage if these exceed it."""
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
