# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What this machine is called, and how much of its memory a call takes."""

import ctypes
import gc
import platform
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(run: Callable, device: str) -> int | None:
    """The most memory that a call holds beyond what is there before it; None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else a call would find memory that an earlier one left
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
    before = resident_kib("VmHWM")
    run()
    return (resident_kib("VmHWM") - before) * 1024


def peak_resident_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not tell."""
    return resident_kib("VmHWM") * 1024 if Path("/proc/self/status").exists() else None


def resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def settle_allocator() -> None:
    """Makes glibc keep what it has, instead of fetching it from the system again in every step, page by page: it does
    so by itself once a process has freed a block of nearly 32 MiB, which a small model never does."""
    torch.empty(31 * 2**20, dtype=torch.uint8)


def hardware_name(device: torch.device) -> str:
    """What computes: the name of a GPU, or the kind of processor, and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def processor_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
