"""Where results come from, and in what state a GPU was when they were taken."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader of the results must know of where they come from."""
    versions = {}
    for package in ("torch", "triton", "trl", "liger-kernel", "transformers", "peft", "flash-attn", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "gpu_memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda, "driver": _driver(),
        }  # fmt: skip
    return {"date": date.today().isoformat(), **found, "python": platform.python_version(), "versions": versions}


def _driver() -> str | None:
    return (_asked(["driver_version"]) or {}).get("driver_version")


STATE = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu")  # MHz, MHz, W, °C, %
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # a bit mask; renamed by newer drivers


def gpu_state() -> dict[str, str]:
    """The clocks, power, temperature and throttle reasons of the first GPU as nvidia-smi gives them; empty without."""
    for reasons in (*([reason] for reason in REASONS), []):
        found = _asked([*STATE, *reasons])
        if found:
            return found
    return {}


def _asked(fields: list[str]) -> dict[str, str] | None:
    """nvidia-smi's answer, which only reads; None where there is none or a field is unknown to it."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in ran.stdout.strip().splitlines()[0].split(",")] if ran.stdout.strip() else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    except OSError:
        pass
    return platform.processor() or platform.machine()
