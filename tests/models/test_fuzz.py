"""Headers of GGUF and safetensors files with anything changed in them: read, or refused in words."""

import contextlib
import json
import random
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from gazelle.base.errors import ModelError, UserError
from gazelle.models.checkpoint import check_safetensors
from gazelle.models.gguf_file import read_gguf

MUTATIONS = 5000  # of each kind of file
LARGE = (0, 1, 2, 7, 8, 9, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
SPARE = 1 << 16  # bytes that any reading takes, whatever the file


def gguf_bytes(folder):
    """A file with a setting of every type, a vocabulary and tensors."""
    writer = gguf.GGUFWriter(folder / "base.gguf", "llama")
    kinds = gguf.GGUFValueType
    for kind in (kinds.UINT8, kinds.INT8, kinds.UINT16, kinds.INT16, kinds.UINT32, kinds.INT32, kinds.UINT64,
                 kinds.INT64, kinds.FLOAT32, kinds.FLOAT64, kinds.BOOL):
        value = 1.5 if "FLOAT" in kind.name else 1
        writer.add_key_value(f"llama.{kind.name.lower()}", value, kind)
        writer.add_key_value(f"llama.{kind.name.lower()}s", [value] * 5, kinds.ARRAY, kind)
    writer.add_array("tokenizer.ggml.tokens", [f"tökén {i}" for i in range(40)])
    for name, kind in (("blk.0.attn_q.weight", None), ("blk.0.ffn_up.weight", gguf.GGMLQuantizationType.Q4_0)):
        data = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
        writer.add_tensor(name, data if kind is None else gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "base.gguf").read_bytes()


def safetensors_bytes(folder):
    header = {"__metadata__": {"format": "pt"}} | {
        f"model.layers.{i}.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [i * 128, i * 128 + 128]}
        for i in range(6)}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(6 * 128)


def mutated(data, draw, header):
    """`data` with one to three changes, most of them in the header."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(min(header, len(out)) or 1) if draw.random() < 0.9 else draw.randrange(len(out) or 1)
        kind = draw.randrange(7)
        if kind == 0:
            out[at:at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            size = draw.choice((4, 8))
            out[at:at + size] = (draw.choice(LARGE) % 256**size).to_bytes(size, "little")
        elif kind == 2:
            del out[at:at + draw.choice((1, 4, 8, 100))]
        elif kind == 3:
            out[at:at] = draw.randbytes(draw.choice((1, 4, 8, 100)))
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            start = draw.randrange(len(out) or 1)
            out[at:at] = out[start:start + draw.choice((8, 64, 400))]
        else:
            out[at:at] = draw.choice((b"[" * 5000, b'{"a":' * 2000, b"1" * 5000, b"\xff" * 8, b'"', b"}", b"1e999"))
    return bytes(out)


def read_all(path):
    file = read_gguf(path)
    assert file.get("tokenizer.ggml.tokens", list, []) is not None
    for name in file.tensors:
        with np.errstate(all="ignore"):
            assert file.read(name).shape == file.tensors[name].shape


@pytest.mark.parametrize(("make", "read", "header"), [(gguf_bytes, read_gguf, 2400),
                                                      (safetensors_bytes, check_safetensors, 700)])
def test_changed_headers_are_read_or_refused(make, read, header, tmp_path):
    data, draw, path = make(tmp_path), random.Random(0), tmp_path / "changed"
    path.write_bytes(data)
    read(path)
    refused = []
    start = time.process_time()
    for number in range(MUTATIONS):
        changed = mutated(data, draw, header)
        path.write_bytes(changed)
        if number % 20 == 0:  # watching memory takes more time than reading
            tracemalloc.start()
        try:
            read(path)
        except UserError as error:
            refused.append(error)
        if number % 20 == 0:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= 2 * len(changed) + SPARE, number
    assert time.process_time() - start < 30
    assert all(error.where.startswith(str(path)) and error.fix for error in refused)
    assert 0.3 * MUTATIONS < len(refused) < MUTATIONS  # some changes are harmless, such as one in a name


def test_what_is_read_can_be_used(tmp_path):
    """Tensors of changed files have the shape that the header says, or are refused."""
    data, draw, path = gguf_bytes(tmp_path), random.Random(1), tmp_path / "changed.gguf"
    for _ in range(1000):
        path.write_bytes(mutated(data, draw, 2400))
        with contextlib.suppress(UserError):
            read_all(path)


def one_array(item, count, payload):
    """A file that is one array."""
    key = b"tokenizer.ggml.tokens"
    return (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IIQ", 9, item, count) + payload)


@pytest.mark.parametrize(("item", "count", "payload"), [
    (8, 2**18, bytes(2**21)), (8, 2**17, (struct.pack("<Q", 2) + b"ab") * 2**17), (1, 2**21, bytes(2**21)),
    (4, 2**19, b"\xff" * 2**21), (6, 2**19, b"\x3f" * 2**21), (7, 2**21, b"\1" * 2**21),
], ids=["empty texts", "short texts", "bytes", "whole numbers", "numbers", "truths"])
def test_arrays_take_no_more_memory_than_twice_the_file(item, count, payload, tmp_path):
    path = tmp_path / "array.gguf"
    path.write_bytes(one_array(item, count, payload))
    tracemalloc.start()
    try:
        file = read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(file.metadata["tokenizer.ggml.tokens"]) == count
    assert peak <= 2 * path.stat().st_size + SPARE


@pytest.mark.parametrize(("tensors", "fields", "what"), [(2**17, 0, "tensors"), (0, 2**17, "metadata fields")])
def test_more_things_than_any_model_has(tensors, fields, what, tmp_path):
    path = tmp_path / "many.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + bytes(2**22))
    with pytest.raises(ModelError, match="than any model has") as caught:
        read_gguf(path)
    assert what in caught.value.found


def test_texts_in_an_array(tmp_path):
    path = tmp_path / "base.gguf"
    gguf_bytes(tmp_path)
    tokens = read_gguf(path).metadata["tokenizer.ggml.tokens"]
    want = [f"tökén {i}" for i in range(40)]
    assert list(tokens) == want and tokens[-1] == want[-1] and tokens[3:7] == want[3:7]
    with pytest.raises(IndexError):
        tokens[40]
    assert read_gguf(path).get("llama.int8s", list) == [1] * 5
