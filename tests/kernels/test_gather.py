"""Rows of a table in host memory, bit for bit what indexing gives."""

import pytest
import torch

from gazelle.kernels import gather, gather_triton

CUDA = torch.cuda.is_available()
WAYS = [pytest.param(gather, "cpu", id="reference"),
        pytest.param(gather_triton, "cpu", id="interpreted", marks=pytest.mark.skipif(CUDA, reason="compiled")),
        pytest.param(gather, "cuda", id="native", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])]


def table(V, H, dtype, device):
    """In host memory, where `device` can read it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(V, H, generator=generator).to(dtype)
    return rows.pin_memory() if device == "cuda" else rows


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("V", "H", "T"), [(50, 576, 9), (7, 5000, 3), (3, 1, 20), (1, 33, 4), (9, 16, 0)])
def test_any_shape(op, device, dtype, V, H, T):
    """Rows asked for more than once; wider than a program; one column; one row; none asked for."""
    rows = table(V, H, dtype, device)
    ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))
    ids[:2] = V - 1
    got = op.gather_rows(rows, ids.to(device))
    assert got.device.type == device and got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got.cpu(), rows[ids])


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_size(op, device, dtype):
    rows = table(50, 64, torch.float32, device)
    ids = torch.tensor([49, 0, 7, 7, 0], dtype=dtype)
    assert torch.equal(op.gather_rows(rows, ids.to(device)).cpu(), rows[ids.long()])


@pytest.mark.parametrize(("op", "device"), WAYS)
def test_the_table_of_a_model(op, device):
    """As functional.embedding, and neither the table nor the ids change."""
    rows, ids = table(50, 64, torch.bfloat16, device), torch.arange(0, 50, 3, device=device)
    before = rows.clone()
    got = op.gather_rows(rows, ids)
    assert torch.equal(got.cpu(), torch.nn.functional.embedding(ids.cpu(), before)) and torch.equal(rows, before)
    got.zero_()
    assert torch.equal(rows, before) and torch.equal(ids.cpu(), torch.arange(0, 50, 3))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])])
def test_pinned_is_a_copy_in_host_memory(device):
    rows = torch.randn(20, 8, device=device)
    kept = gather.pinned(rows)
    assert kept.device.type == "cpu" and kept.is_pinned() == (device == "cuda") and torch.equal(kept, rows.cpu())
    rows.zero_()
    assert kept.any()
    ids = torch.tensor([3, 3, 19], device=device)
    assert torch.equal(gather.gather_rows(kept, ids).cpu(), kept[[3, 3, 19]])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_long_table_natively():
    """Rows that lie more than 2³¹ elements behind the first."""
    rows = torch.empty(2**20 + 3, 2056, dtype=torch.uint8, pin_memory=True)
    ids = torch.tensor([2**20 + 2, 0, 2**20])
    rows[ids] = torch.randint(256, (3, 2056), dtype=torch.uint8)
    assert rows.numel() > 2**31 and torch.equal(gather.gather_rows(rows, ids.cuda()).cpu(), rows[ids])
