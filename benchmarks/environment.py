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


def machine(records: list[dict]) -> str:
    """What records are of, in a line: device, versions and dates."""
    env = records[0]["env"]
    smi = env.get("nvidia_smi", {})
    details = [f"driver {smi['driver_version']}"] if "driver_version" in smi else []
    # What it may go up to: a GPU that has nothing to do yet, as when it is asked, goes slower.
    details += [f"SM clock up to {smi['clocks.max.sm']}"] if "clocks.max.sm" in smi else []
    details += [f"copies at {env['copy_gb_per_s']:.0f} GB/s"] if "copy_gb_per_s" in env else []
    about = [f"{device_name(env)} ({', '.join(details)})" if details else device_name(env)]
    about += [] if env["gpu"] else [f"{env['threads']} threads"]
    about += [f"{n} {env[n]}" for n in ("torch", "transformers", "triton", "commit") if n in env]
    dates = sorted({record["ts"][:10] for record in records})
    return ", ".join([*about, dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"])


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _nvidia_smi(gpu: str) -> dict[str, str]:
    """Driver, clocks and power limit as nvidia-smi tells them; empty where it cannot."""
    fields = ",".join(_NVIDIA_SMI)
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_NVIDIA_SMI, line.stdout.strip().split(", ")))
