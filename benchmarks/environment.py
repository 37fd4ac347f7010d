"""What the figures were measured on."""

import platform
import re
import subprocess
from pathlib import Path

import torch

_NVIDIA_SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def describe(device: torch.device) -> dict:
    """The ``env`` field of a record: the fields of kernels-benchmarks, then ours."""
    env = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpu": "",
        "sm": "",
        "py": platform.python_version(),
        "plat": platform.platform(),
        "device": device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        env["gpu"] = properties.name
        env["sm"] = f"{properties.major}.{properties.minor}"
        env["nvidia_smi"] = _nvidia_smi(f"GPU-{properties.uuid}")
    return env


def device_name(env: dict) -> str:
    return env["gpu"] or env["cpu"]


def slug(env: dict) -> str:
    """The device's name as part of a file name, such as ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(env).lower()).strip("-")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def _nvidia_smi(gpu: str) -> dict[str, str]:
    """Driver, clocks and power limit as nvidia-smi tells them; empty where it cannot."""
    fields = ",".join(_NVIDIA_SMI)
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_NVIDIA_SMI, line.stdout.strip().split(", ")))
