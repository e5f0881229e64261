"""Streamed weights: every layer computes with its own, in whatever order layers come."""

import pytest
import torch
from tests.quantize.test_storage import four_bits
from torch import Tensor, nn

from gazelle.engine.linear import Adapter, Linear, Projection
from gazelle.engine.scratch import Scratch
from gazelle.engine.stream import BUFFERS, WeightStream
from gazelle.quantize.storage import Dense, storage_of

pytestmark = pytest.mark.usefixtures("one_thread")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
KINDS = pytest.mark.parametrize("kind", ["dense", "nf4", "nf4 plain"])
K, R = 128, 4

Layers = list[tuple[Projection, ...]]


def linear(kind: str, N: int, seed: int, device: str) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    a, b, values = (torch.randn(shape, generator=generator) for shape in ((R, K), (N, R), (N, K)))
    adapter = Adapter(a.to(device).requires_grad_(), b.to(device).requires_grad_(), 1.5)
    if kind == "dense":
        return Linear(Dense(nn.Parameter(values, requires_grad=False).to(device)), adapter=adapter)
    module = four_bits(nested=kind == "nf4", shape=(N, K))
    module.weight.data.copy_(torch.randint(0, 256, module.weight.shape, generator=generator, dtype=torch.uint8))
    return Linear(storage_of(module.to(device)), adapter=adapter)


def layers_of(kind: str, count: int, device: str = "cpu") -> Layers:
    """Layers of a projection with two parts and one with a single part, each layer larger than the one before."""
    scratch = Scratch()
    made = []
    for number in range(count):
        sizes = ((16 + 8 * number, 24), (32,))
        made.append(tuple(
            Projection([linear(kind, N, 100 * number + 10 * slot + part, device) for part, N in enumerate(parts)],
                       scratch, slot, torch.float32) for slot, parts in enumerate(sizes)))
    return made


def matrices(layer: tuple[Projection, ...]) -> list[Tensor]:
    """What is read of each bordered matrix: all but the corner beside both borders, which is not defined."""
    found = [(projection.matrix().whole, projection) for projection in layer]
    return [part.clone() for whole, projection in found for part in (whole[: projection.N], whole[:, : projection.K])]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@DEVICES
@KINDS
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_layer_has_its_own_weights(count: int, kind: str, device: str) -> None:
    layers = layers_of(kind, count, device)
    wanted = [matrices(layer) for layer in layers]
    stream = WeightStream(layers)
    whole = [(number, True) for number in range(count)] + [(number, False) for number in reversed(range(count))]
    half = [(number, True) for number in range(-(-count // 2))]  # a pass that an error ended
    again = [(number, True) for number in range(count) for _ in range(2)]
    for number, forward in [*whole, *whole, *half, *whole, *half, *reversed(whole), *again, *half, *whole[count:]]:
        stream.arrive(number, forward=forward)
        assert same(matrices(layers[number]), wanted[number])


@DEVICES
@KINDS
def test_what_the_weights_were_read_from_is_not_read_any_more(kind: str, device: str) -> None:
    layers = layers_of(kind, 3, device)
    wanted = [matrices(layer) for layer in layers]
    sources = [[tensor for projection in layer for part in projection.parts
                for tensor in part.weight.tensors().values()] for layer in layers]
    copies = [[tensor.clone() for tensor in tensors] for tensors in sources]
    stream = WeightStream(layers)
    for tensors in sources:
        for tensor in tensors:
            tensor.zero_()
    for number in range(3):
        stream.arrive(number, forward=True)
        assert same(matrices(layers[number]), wanted[number])
        hosts = stream.host_tensors(number)
        assert [(host.dtype, host.device.type) for host in hosts] == [(copy.dtype, "cpu") for copy in copies[number]]
        assert all(torch.equal(host, copy.cpu()) for host, copy in zip(hosts, copies[number], strict=True))
        assert all(host.is_pinned() == (device == "cuda") for host in hosts)


@DEVICES
@KINDS
def test_two_buffers_take_turns(kind: str, device: str) -> None:
    layers = layers_of(kind, 5, device)
    sizes = [sum(part.weight.nbytes for projection in layer for part in projection.parts) for layer in layers]
    WeightStream(layers)
    read = [[tensor for projection in layer for part in projection.parts for tensor in part.weight.tensors().values()]
            for layer in layers]
    storages = [{tensor.untyped_storage().data_ptr() for tensor in tensors} for tensors in read]
    assert all(len(places) == 1 for places in storages)
    assert storages[0] == storages[2] == storages[4] != storages[1] == storages[3]
    buffers = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensors in read
               for tensor in tensors}
    assert len(buffers) == BUFFERS
    # Tensors begin on boundaries that kernels like, which costs little.
    assert all(max(sizes) <= size < max(sizes) + 512 * len(read[0]) for size in buffers.values())
    assert all(tensor.storage_offset() * tensor.element_size() % 512 == 0 for tensors in read for tensor in tensors)


@DEVICES
def test_adapters_do_not_stream(device: str) -> None:
    """They are read anew at each use, as they are then."""
    layers = layers_of("dense", 2, device)
    stream = WeightStream(layers)
    stream.arrive(1, forward=True)
    projection = layers[1][1]
    adapter = projection.parts[0].adapter
    assert adapter is not None
    with torch.no_grad():
        adapter.a.add_(1)
        adapter.b.mul_(2)
    found = projection.matrix()
    assert torch.equal(found.a[:R], adapter.a)
    torch.testing.assert_close(found.b[:, :R], adapter.scale * adapter.b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_layer_is_not_overwritten_while_it_computes() -> None:
    """Copies are sent for while products that read the other buffer are still queued."""
    size = 4096
    layers: Layers = []
    for number in range(6):
        weight = torch.full((size, size), float(number + 1), device="cuda")
        layers.append((Projection([Linear(Dense(weight))], Scratch(), 0, torch.float32),))
    stream = WeightStream(layers)
    x = torch.eye(size, device="cuda")
    found = []
    for number, forward in [(number, True) for number in range(6)] + [(number, False) for number in reversed(range(6))]:
        stream.arrive(number, forward=forward)
        weight = layers[number][0].parts[0].weight.tensors()["weight"]
        for _ in range(8):
            y = x @ weight
        found.append((number, y.amin(), y.amax()))
    assert all(low.item() == high.item() == number + 1 for number, low, high in found)
