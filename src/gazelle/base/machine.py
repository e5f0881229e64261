"""What a result was measured on: every figure that is kept says so."""

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import psutil

from gazelle import __version__
from gazelle.base.device import default_device, device_name

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def machine_facts() -> dict[str, Any]:
    """Date, device, cores, host memory in GB, Python and package versions, as JSON-able values."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(default_device()),
        "cores": cores,
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"gazelle": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def fact_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """`machine_facts` as lines of a table for people."""
    return [("device", facts["device"]), ("CPU cores", str(facts["cores"])),
            ("host memory", f"{facts['memory_gb']} GB"), ("Python", f"{facts['python']} on {facts['system']}"),
            ("packages", ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))]
