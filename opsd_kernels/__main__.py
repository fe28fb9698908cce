"""`python -m opsd_kernels`: which backend runs on this machine and why, the versions, and a self-check."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import backends, native


def main() -> None:
    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in ("opsd", "torch", "triton", "transformers", "flash-attn"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package}: not installed")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.insert(0, torch.device("cuda", torch.cuda.current_device()))
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        print(f"\n{device} ({name}): backend {backends.chosen('auto', device, torch.float32)}")
        for backend in (*backends.candidates(device), *(backends.BY_NAME_ONLY if device.type == "cuda" else ())):
            reason = backends.unfit(backend, device, torch.float32)
            verdict = reason or f"works, self-check within {backends.self_check(backend, device):.1e} of float64"
            by_name_only = backends.BY_NAME_ONLY.get(backend)
            print(f"  {backend}: {verdict}" + (f"; only by name, for {by_name_only}" if by_name_only else ""))
        if device.type == "cpu":
            own, why = native.outruns_torch()
            print(f"  products: {'csrc/gemm_cpu.cpp with the native backend' if own else 'torch'} ({why})")
    if len(devices) == 1:
        for backend, why in backends.BY_NAME_ONLY.items():
            print(f"\n{backend}: {backends.unfit(backend, devices[0], torch.float32)}; only by name, for {why}")
    print("\nfloat64 inputs and process groups always use the torch backend.")


if __name__ == "__main__":
    main()
