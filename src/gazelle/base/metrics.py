"""What Prometheus can ask any process of ours: memory and use of host and GPUs, looked up when it asks."""

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gazelle.base.log import logger


class Resources(Collector):
    """Memory in bytes, processor time in seconds, and on CUDA each GPU's memory and use.

    Use of a GPU is asked of NVML, which needs the package nvidia-ml-py; without it that metric has no values, nor for
    a GPU of which NVML does not tell, such as a part of one (MIG).
    """

    def __init__(self) -> None:
        psutil.cpu_percent()  # of which the first answer is always 0
        self._silent: set[int] = set()  # GPUs of which it has been said

    def collect(self) -> Iterator[Metric]:
        """Called at every scrape."""
        process, memory = psutil.Process(), psutil.virtual_memory()
        with process.oneshot():
            times, resident = process.cpu_times(), process.memory_info().rss
        yield CounterMetricFamily("gazelle_process_cpu_seconds", "Processor time of this process.",
                                  value=times.user + times.system)
        yield GaugeMetricFamily("gazelle_process_memory_bytes", "Resident memory of this process.", value=resident)
        host = GaugeMetricFamily("gazelle_host_memory_bytes", "Memory of the machine.", labels=["kind"])
        host.add_metric(["total"], memory.total)
        host.add_metric(["available"], memory.available)
        yield host
        yield GaugeMetricFamily("gazelle_host_cpu_utilization_ratio", "Share of all cores in use since the last look.",
                                value=psutil.cpu_percent() / 100)
        yield from self._gpus()

    def _gpus(self) -> Iterator[Metric]:
        held = GaugeMetricFamily("gazelle_gpu_memory_bytes", "Memory of a GPU, in use by anyone, and in all.",
                                 labels=["device", "kind"])
        use = GaugeMetricFamily("gazelle_gpu_utilization_ratio", "Share of time in which a GPU was at work.",
                                labels=["device"])
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            watched = importlib.util.find_spec("pynvml") is not None
            for index in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(index)
                held.add_metric([str(index), "used"], total - free)
                held.add_metric([str(index), "total"], total)
                if watched and (share := self._use(torch, index)) is not None:
                    use.add_metric([str(index)], share)
        yield held
        yield use

    def _use(self, torch: Any, index: int) -> float | None:
        """Of a GPU. All other metrics are told even if NVML will not tell this one."""
        from pynvml import NVMLError

        try:
            return float(torch.cuda.utilization(index) / 100)
        except (NVMLError, RuntimeError, ImportError) as error:
            if index not in self._silent:
                self._silent.add(index)
                logger.warning("The use of GPU %d is not known: %s", index, error)
            return None


def new_registry() -> CollectorRegistry:
    """A registry of its own, so that two servers in one process do not mix, with `Resources` in it."""
    registry = CollectorRegistry()
    registry.register(Resources())
    return registry
