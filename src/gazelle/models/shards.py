"""Writes a checkpoint's tensors as they come, into as many safetensors files as their size asks for."""

import json
import os
import re
from pathlib import Path

from torch import Tensor

from gazelle.base.files import make_readable


class ShardWriter:
    """Collects tensors up to `limit` bytes, writes them, and lets go of them. `close` gives the files their names."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._shard: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._files: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor on the CPU. One larger than the limit gets a file to itself."""
        if self._shard and self._size + tensor.nbytes > self.limit:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def close(self) -> None:
        """Write the rest, and the index if there is more than one file."""
        self._flush()
        count = len(self._files)
        index: dict[str, str] = {}
        for number, (path, names) in enumerate(self._files, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            path.rename(self.folder / final)
            index |= dict.fromkeys(names, final)
        if count > 1:
            text = json.dumps({"metadata": {"total_size": self._total}, "weight_map": index}, indent=2)
            (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.folder / f"shard-{len(self._files)}"
        try:
            save_file(self._shard, path, metadata={"format": "pt"})
        except SafetensorError as error:
            if found := re.search(r"\(os error (\d+)\)", str(error)):  # so that a full disk is told as such
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
            raise
        make_readable(path)
        self._files.append((path, list(self._shard)))
        self._shard, self._size = {}, 0
