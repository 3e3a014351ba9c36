"""The choice of device and dtype, and a memory setting that makes training on CPU faster."""

import ctypes
import sys

import torch

from minprefix.system.errors import InputError


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory: on CPU, returning it to the system and allocating it again is 20% of a step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)  # musl lacks mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: never allocate with mmap, whose memory is returned when it is freed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def pick_device(name: str) -> str:
    """The device for an option's value; "auto" is CUDA, else Apple's MPS, else the CPU. InputError if unavailable."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in available if available[device])
    if not available[name]:
        raise InputError(f"--device {name}: this machine, or this build of torch, has none; try --device cpu")
    return name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """The dtype for an option's value; "auto" is bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        native = cpu.get("amx_bf16", False) or cpu.get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32
