"""The real llama.cpp, for tests: loads, tokenises, decodes and quantises GGUF files through its C API by ctypes.

The libraries are those of the npm package @node-llama-cpp, in the folder `llama` of the virtual environment.
"""

import ctypes
import sys
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(sys.prefix) / "llama"
LOG: list[str] = []  # what llama.cpp said last, for the message of an assertion
_LOGGER = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class ModelParams(Structure):
    _fields_ = [("devices", c_void_p), ("overrides", c_void_p), ("gpu_layers", c_int32), ("split_mode", c_int32),
                ("load_mode", c_int32), ("lazy_mode", c_int32), ("main_gpu", c_int32), ("tensor_split", c_void_p),
                ("callback", c_void_p), ("callback_data", c_void_p), ("kv_overrides", c_void_p), ("flags", c_bool * 6)]


class ContextParams(Structure):
    _fields_ = [("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
                ("unused", c_uint32 * 3), ("threads", c_int32), ("threads_batch", c_int32), ("kinds", c_int32 * 4),
                ("flash_attention", c_int32), ("rope", c_float * 6), ("yarn_orig_ctx", c_uint32),
                ("defrag", c_float), ("eval", c_void_p * 2), ("type_k", c_int32), ("type_v", c_int32),
                ("abort", c_void_p * 2), ("flags", c_bool * 6), ("samplers", c_void_p * 3)]


class QuantizeParams(Structure):
    _fields_ = [("threads", c_int32), ("ftype", c_int32), ("output_type", c_int32), ("embedding_type", c_int32),
                ("flags", c_bool * 6), ("rest", c_void_p * 8)]


class Batch(Structure):
    _fields_ = [("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
                ("n_seq_id", POINTER(c_int32)), ("seq_id", c_void_p), ("logits", POINTER(c_int8))]


_LIBRARY: Any = None


def library() -> Any:
    """The library, loaded once; skips the test where it is missing or its structs are not those above."""
    global _LIBRARY
    if _LIBRARY is not None:
        return _LIBRARY
    found = {stem: sorted(FOLDER.glob(f"{stem}*.so*")) for stem in ("libggml-base", "libggml.", "libllama.")}
    if not all(found.values()):
        pytest.skip(f"the real llama.cpp is not in {FOLDER}")
    base, ggml, llama = (ctypes.CDLL(str(paths[0]), mode=ctypes.RTLD_GLOBAL) for paths in found.values())
    logger = _LOGGER(lambda level, text, _: LOG.append(text.decode(errors="replace")) if level >= 3 else None)
    llama.logger = logger  # ctypes lets go of it otherwise
    base.ggml_log_set(logger, None)
    llama.llama_log_set(logger, None)
    ggml.ggml_backend_load_all_from_path.argtypes = [c_char_p]
    ggml.ggml_backend_load_all_from_path(str(FOLDER).encode())
    pointers = ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory",
                "llama_get_logits_ith", "llama_model_chat_template", "llama_adapter_lora_init")
    for name in pointers:
        getattr(llama, name).restype = c_void_p
    llama.llama_model_default_params.restype = ModelParams
    llama.llama_context_default_params.restype = ContextParams
    llama.llama_model_quantize_default_params.restype = QuantizeParams
    llama.llama_get_logits_ith.restype = POINTER(c_float)
    llama.llama_model_chat_template.restype = c_char_p
    llama.llama_vocab_is_eog.restype = c_bool
    llama.llama_vocab_get_add_bos.restype = c_bool
    llama.llama_batch_init.restype = Batch
    llama.llama_model_quantize.argtypes = [c_char_p, c_char_p, POINTER(QuantizeParams)]
    llama.llama_model_load_from_file.argtypes = [c_char_p, ModelParams]
    llama.llama_init_from_model.argtypes = [c_void_p, ContextParams]
    llama.llama_decode.argtypes = [c_void_p, Batch]
    llama.llama_get_logits_ith.argtypes = [c_void_p, c_int32]
    llama.llama_tokenize.argtypes = [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]
    llama.llama_set_adapters_lora.argtypes = [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]
    llama.llama_adapter_lora_init.argtypes = [c_void_p, c_char_p]
    llama.llama_memory_clear.argtypes = [c_void_p, c_bool]
    for name in ("llama_model_free", "llama_free", "llama_model_get_vocab", "llama_get_memory", "llama_vocab_bos",
                 "llama_vocab_eos", "llama_vocab_eot", "llama_vocab_n_tokens", "llama_vocab_get_add_bos"):
        getattr(llama, name).argtypes = [c_void_p]
    llama.llama_vocab_is_eog.argtypes = [c_void_p, c_int32]
    llama.llama_model_chat_template.argtypes = [c_void_p, c_char_p]
    context, quantize = llama.llama_context_default_params(), llama.llama_model_quantize_default_params()
    known = (context.n_ctx, context.type_k, context.type_v, context.flash_attention, quantize.ftype, quantize.flags[1])
    if known != (512, 1, 1, -1, 7, True):
        pytest.skip(f"llama.cpp's structs are not those this file knows: {known}")
    llama.llama_backend_init()
    _LIBRARY = llama
    return llama


class Llama:
    """A GGUF file in llama.cpp, with everything it computes besides the weights in float32."""

    def __init__(self, path: Path, context: int = 256, lora: Path | None = None) -> None:
        self.c = library()
        LOG.clear()
        parameters = self.c.llama_model_default_params()
        parameters.gpu_layers = 0
        parameters.flags[2] = False  # weights stay as they are instead of being repacked
        self.model = self.c.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, "".join(LOG)
        settings = self.c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.threads = settings.threads_batch = 1
        settings.flash_attention = settings.type_k = settings.type_v = 0
        self.context = self.c.llama_init_from_model(self.model, settings)
        assert self.context, "".join(LOG)
        self.vocabulary = self.c.llama_model_get_vocab(self.model)
        self.size = self.c.llama_vocab_n_tokens(self.vocabulary)
        self.batch = self.c.llama_batch_init(context, 0, 1)
        if lora is not None:
            adapter = self.c.llama_adapter_lora_init(self.model, str(lora).encode())
            assert adapter, "".join(LOG)
            self.c.llama_set_adapters_lora(self.context, (c_void_p * 1)(adapter), 1, (c_float * 1)(1.0))

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self.c.llama_free(self.context)
        self.c.llama_model_free(self.model)

    def tokenize(self, text: str, *, special: bool = False, parse_special: bool = True) -> list[int]:
        data = text.encode()
        ids = (c_int32 * (len(data) + 8))()
        count = self.c.llama_tokenize(self.vocabulary, data, len(data), ids, len(ids), special, parse_special)
        assert count >= 0
        return list(ids[:count])

    def logits(self, ids: list[int], start: int = 0) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """[len(ids), vocabulary] for one row that begins at position `start`; at 0 the cache is cleared."""
        if start == 0:
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        batch = self.batch
        batch.n_tokens = len(ids)
        sequences = ctypes.cast(batch.seq_id, POINTER(POINTER(c_int32)))
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            sequences[i][0] = 0
        assert self.c.llama_decode(self.context, batch) == 0, "".join(LOG)
        return np.stack([np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, i), (self.size,)).copy()
                         for i in range(len(ids))])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        out: list[int] = []
        new, at = ids, 0
        for _ in range(count):
            out.append(int(self.logits(new, at)[-1].argmax()))
            new, at = out[-1:], at + len(new)
        return out

    def ends(self) -> set[int]:
        """All tokens at which llama.cpp stops."""
        return {i for i in range(self.size) if self.c.llama_vocab_is_eog(self.vocabulary, i)}

    def chat_template(self) -> str:
        text = self.c.llama_model_chat_template(self.model, None)
        return text.decode() if text else ""


def quantize(source: Path, target: Path, ftype: int, imatrix: int | None = None) -> None:
    """llama.cpp's own quantisation of a file; `ftype` is a value of `gguf.LlamaFileType`, `imatrix` an address."""
    c = library()
    settings = c.llama_model_quantize_default_params()
    settings.threads, settings.ftype, settings.rest[0] = 1, ftype, imatrix
    LOG.clear()
    assert c.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)) == 0, "".join(LOG)
