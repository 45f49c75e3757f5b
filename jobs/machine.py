"""What figures were measured on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from jobs import devices


def machine() -> str:
    """Cores, processor, system, Python, and the GPU where the work is done on one."""
    python = f"Python {platform.python_version()}"
    words = [f"{os.cpu_count()} cores", *_processor(), platform.machine(), platform.system(), python]
    if devices.device() == "cuda":
        import torch

        words.append(f"one {torch.cuda.get_device_name()}")
    return ", ".join(words)


def _processor() -> list[str]:
    """What the processor calls itself, where the system says so in a file (Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return [name for name in names if name][:1]
