"""Helpers for measurements: limit and measure memory, and describe the machine."""

import ctypes
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
USABLE = 0.7  # fraction of the memory that is free at the start


def described(device: torch.device) -> str:
    """Hardware, versions and commit, in one line."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    threads = torch.get_num_threads()
    where = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, beside {where}"
    return f"{where}, Python {platform.python_version()}, torch {torch.__version__}, commit {commit or 'unknown'}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({os.cpu_count()} cores)"


def limit_memory() -> None:
    """Let allocations that exceed the free memory fail, instead of getting the process killed; Linux only."""
    if not STATUS.exists():
        return
    import resource

    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024
    ceiling = _kilobytes(STATUS, "VmData") * 1024 + int(USABLE * free)
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that `call` allocates beyond what was allocated before it, or None if that cannot be measured.

    On the CPU, by the process's peak resident size. Memory that earlier work has freed is first returned to the kernel;
    the call would otherwise reuse it unnoticed.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if CLEAR.exists() else None  # glibc's
    if trim is None:
        return None
    trim(0)
    CLEAR.write_text("5")  # resets the peak: proc(5)
    before = _kilobytes(STATUS, "VmRSS")
    call()
    return max(0, _kilobytes(STATUS, "VmHWM") - before) * 1024


def _kilobytes(path: Path, key: str) -> int:
    (line,) = [line for line in path.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1])
