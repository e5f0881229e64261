"""llama.cpp as a consumer: a GGUF file through the C API of a built library, by ctypes.

Only the heads of llama.cpp's structs are named here: they have been what they are since 2024, while their tails differ
from build to build. The structs are therefore longer than any build's, and what lies behind the heads is llama.cpp's
own default, passed back to it unread.
"""

import ctypes
import importlib.util
import shutil
import sys
import time
from ctypes import POINTER, Structure, c_bool, c_char, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from gazelle.base.device import peak_memory
from gazelle.base.errors import MissingDependencyError, ModelError, OptionError
from gazelle.export.consumers.rows import judged

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_LOGGER = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_ERROR = 4  # of ggml's levels of messages: 2 information, 3 warning, 4 error, 5 more of the last
_SPARE = 1024  # bytes behind the heads; the longest struct so far has about 200


class _ModelParams(Structure):
    _fields_ = [("all", c_char * _SPARE)]


class _ContextParams(Structure):
    _fields_ = [("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("rest", c_char * _SPARE)]


class _Batch(Structure):
    _fields_ = [("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
                ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8))]


def find_library(place: str | None = None) -> Path | None:
    """The library libllama: in `place`, of llama-cpp-python, or beside a llama.cpp program on the PATH; or None.

    Args:
        place: the library itself, or a folder with it: an unpacked release, a build folder, an installation's prefix.

    Raises:
        OptionError: `place` is given and holds none.
    """
    name = f"llama{_SUFFIX}" if sys.platform == "win32" else f"libllama{_SUFFIX}"
    if place is not None:
        path = Path(place).expanduser()
        found = path if path.is_file() else _inside(path, name)
        if found is None:
            raise OptionError("llama.cpp is not there", where="--llama", found=place, expected=f"a folder with {name}",
                              fix="name the folder of an unpacked release of llama.cpp, or of your build")
        return found.resolve()
    package = importlib.util.find_spec("llama_cpp")
    folders = [Path(next(iter(package.submodule_search_locations or []), ""))] if package is not None else []
    for program in ("llama-cli", "llama-server"):
        if on_path := shutil.which(program):
            folders += [Path(on_path).parent, Path(on_path).resolve().parent, Path(on_path).resolve().parent.parent]
    return next((found.resolve() for folder in folders if (found := _inside(folder, name)) is not None), None)


def _inside(folder: Path, name: str) -> Path | None:
    """The library in `folder` or where builds put it; some number their files: libllama.so.0, libllama.0.dylib."""
    stem, suffix = name.split(".")
    patterns = (name, f"{name}.*", f"{stem}.*.{suffix}")
    return next((path for part in (".", "lib", "bin", "build/bin") for pattern in patterns
                 for path in sorted((folder / part).glob(pattern)) if path.is_file()), None)


class Llama:
    """A GGUF file in llama.cpp, in rows of up to `longest` tokens, as its programs load one by default."""

    def __init__(self, path: Path, library: Path, longest: int, threads: int) -> None:
        self._said: list[str] = []
        self.c = _load(library, self._said)
        self.model = self.c.llama_model_load_from_file(str(path).encode(), self.c.llama_model_default_params())
        if not self.model:
            raise self.refused("llama.cpp cannot load the file", path)
        settings = self.c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = longest
        self.context = self.c.llama_init_from_model(self.model, settings)
        if not self.context:
            raise self.refused("llama.cpp cannot run the model", path)
        self.c.llama_set_n_threads(self.context, threads, threads)
        self._path = path
        self._vocabulary = self.c.llama_model_get_vocab(self.model)
        self.size: int = self.c.llama_vocab_n_tokens(self._vocabulary)
        self._batch = self.c.llama_batch_init(longest, 0, 1)
        self._at = 0

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it included and none added."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 8))()
        count = self.c.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), False, True)
        if count < 0:
            raise self.refused("llama.cpp cannot tokenise a text", self._path)
        return list(ids[:count])

    def ends(self) -> list[int]:
        """All ids at which it stops by itself."""
        return [token for token in range(self.size) if self.c.llama_vocab_is_eog(self._vocabulary, token)]

    def clear(self) -> None:
        """Begin a new row."""
        self._at = 0
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def feed(self, ids: list[int], wanted: list[int]) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Go on with the row by `ids`; the logits [wanted, vocabulary] behind those at the indices `wanted`."""
        batch = self._batch
        batch.n_tokens = len(ids)
        chosen = set(wanted)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self._at + i, 1, i in chosen
            batch.seq_id[i][0] = 0
        if self.c.llama_decode(self.context, batch) != 0:
            raise self.refused("llama.cpp cannot compute a row", self._path)
        self._at += len(ids)
        rows = [np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, i), (self.size,)) for i in wanted]
        return np.stack(rows) if rows else np.empty((0, self.size), np.float32)

    def refused(self, what: str, path: Path) -> ModelError:
        """An error with what llama.cpp said last."""
        return ModelError(what, where=str(path), found="".join(self._said[-6:]) or "no reason given",
                          expected="a file that this llama.cpp reads", fix="try a newer llama.cpp with --llama")


def answer(request: dict[str, Any], library: Path) -> tuple[dict[str, Any], "np.ndarray[Any, Any] | None"]:
    """Answer a request, as the package describes it; `chats` holds texts here, rendered with the file's template."""
    longest = max([len(row["ids"]) for row in request["rows"]]
                  + [len(prompt) + request["tokens"] for prompt in request["prompts"]], default=1)
    llama = Llama(Path(request["path"]), library, longest, request["threads"])
    if "lora" in request:
        _put_adapter(llama, Path(request["lora"]))
    logprobs, likeliest, kept = [], [], []
    room = request["kept"]
    for row in request["rows"]:
        llama.clear()
        logits = llama.feed(row["ids"], row["at"])
        kept.append(logits[:room])
        room -= len(kept[-1])
        said, chosen = judged(row, logits)
        logprobs.append(said)
        likeliest.append(chosen)
    ends = llama.ends()
    stops = set(ends if request["stops"] is None else request["stops"])
    answers, seconds = [], []
    for prompt in request["prompts"]:
        ids, took = _greedy(llama, prompt, request["tokens"], stops)
        answers.append(ids)
        seconds.append(took)
    given = {"consumer": f"llama.cpp ({library})", "texts": [llama.tokenize(text) for text in request["texts"]],
             "chats": [llama.tokenize(text) for text in request["chats"]], "ends": ends, "answers": answers,
             "seconds": seconds, "memory": peak_memory("cpu"), "logprobs": logprobs, "likeliest": likeliest}
    return given, np.concatenate(kept) if kept else None


def _put_adapter(llama: Llama, path: Path) -> None:
    adapter = llama.c.llama_adapter_lora_init(llama.model, str(path).encode())
    if not adapter:
        raise llama.refused("llama.cpp cannot load the adapter", path)
    if hasattr(llama.c, "llama_set_adapters_lora"):
        llama.c.llama_set_adapters_lora(llama.context, (c_void_p * 1)(adapter), 1, (c_float * 1)(1.0))
    else:  # before 2026
        llama.c.llama_set_adapter_lora(llama.context, adapter, 1.0)


def _greedy(llama: Llama, prompt: list[int], tokens: int, stops: set[int]) -> tuple[list[int], tuple[float, float]]:
    """Ids of an answer, and the seconds until its first token and its end."""
    llama.clear()
    out: list[int] = []
    new, began, first = prompt, time.perf_counter(), 0.0
    while len(out) < tokens and not (out and out[-1] in stops):
        out.append(int(llama.feed(new, [len(new) - 1])[0].argmax()))
        new = out[-1:]
        first = first or time.perf_counter() - began
    return out, (first, time.perf_counter() - began)


def _load(path: Path, said: list[str]) -> Any:
    """The library with the types of what is called here; ggml's backends are loaded from beside it.

    Raises:
        MissingDependencyError: a build whose structs or names are not those known here.
    """
    parts = [entry for stem in ("ggml-base", "ggml-cpu", "ggml") for entry in _siblings(path, stem)]
    loaded = {entry.name: ctypes.CDLL(str(entry), mode=ctypes.RTLD_GLOBAL) for entry in parts}
    c: Any = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    logger = _LOGGER(lambda level, text, _: said.append(text.decode(errors="replace")) if level >= _ERROR else None)
    c.logger = logger  # ctypes lets go of it otherwise
    try:
        for library in (*loaded.values(), c):
            for setter in ("ggml_log_set", "llama_log_set"):
                if hasattr(library, setter):
                    getattr(library, setter)(logger, None)
        for library in loaded.values():
            if hasattr(library, "ggml_backend_load_all_from_path"):
                library.ggml_backend_load_all_from_path.argtypes = [c_char_p]
                library.ggml_backend_load_all_from_path(str(path.parent).encode())
        _declare(c)
    except AttributeError as error:
        raise _unknown(path, str(error)) from error
    context = c.llama_context_default_params()
    if (context.n_ctx, context.n_batch, context.n_ubatch) != (512, 2048, 512):
        raise _unknown(path, f"defaults {context.n_ctx}, {context.n_batch}, {context.n_ubatch}")
    c.llama_backend_init()
    return c


def _siblings(path: Path, stem: str) -> list[Path]:
    """The plainest file of a library that may stand beside libllama: some builds have it all in one."""
    prefix = "" if sys.platform == "win32" else "lib"
    plain, numbered = f"{prefix}{stem}{_SUFFIX}*", f"{prefix}{stem}.*{_SUFFIX}"
    return (sorted(path.parent.glob(plain)) or sorted(path.parent.glob(numbered)))[:1]


def _unknown(path: Path, found: str) -> MissingDependencyError:
    return MissingDependencyError("this build of llama.cpp has another interface than the one known here",
                                  where=str(path), found=found, expected="llama.cpp of the middle of 2025 or later",
                                  fix="install a newer llama.cpp, and name it with --llama")


def _declare(c: Any) -> None:
    c.llama_model_default_params.restype = _ModelParams
    c.llama_context_default_params.restype = _ContextParams
    c.llama_batch_init.restype = _Batch
    c.llama_get_logits_ith.restype = POINTER(c_float)
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory"):
        getattr(c, name).restype = c_void_p
    c.llama_vocab_is_eog.restype = c_bool
    c.llama_model_load_from_file.argtypes = [c_char_p, _ModelParams]
    c.llama_init_from_model.argtypes = [c_void_p, _ContextParams]
    c.llama_set_n_threads.argtypes = [c_void_p, c_int32, c_int32]
    c.llama_set_n_threads.restype = None
    c.llama_decode.argtypes = [c_void_p, _Batch]
    c.llama_get_logits_ith.argtypes = [c_void_p, c_int32]
    c.llama_tokenize.argtypes = [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]
    c.llama_memory_clear.argtypes = [c_void_p, c_bool]
    c.llama_vocab_is_eog.argtypes = [c_void_p, c_int32]
    c.llama_adapter_lora_init.restype = c_void_p
    c.llama_adapter_lora_init.argtypes = [c_void_p, c_char_p]
    if hasattr(c, "llama_set_adapters_lora"):
        c.llama_set_adapters_lora.argtypes = [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]
    else:
        c.llama_set_adapter_lora.argtypes = [c_void_p, c_void_p, c_float]
    for name in ("llama_model_get_vocab", "llama_get_memory", "llama_vocab_n_tokens"):
        getattr(c, name).argtypes = [c_void_p]
