"""What figures were measured on, in words."""

from __future__ import annotations

import os
import platform

from jobs import devices


def machine() -> str:
    """Cores, processor, system, Python, and the GPU where the work is done on one."""
    words = [f"{os.cpu_count()} cores", platform.machine(), platform.system(), f"Python {platform.python_version()}"]
    if devices.device() == "cuda":
        import torch

        words.append(f"one {torch.cuda.get_device_name()}")
    return ", ".join(words)
