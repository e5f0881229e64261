"""The memory plan of a model of 8 billion weights, from its outline alone: what it chooses, and that it fits."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from gazelle.engine.footprint import footprint
from gazelle.engine.keep import ALL, AWAY, CHOICES, KEEP, MLP, OFFLOAD, OUTPUT, OUTPUT_AWAY, Keep
from gazelle.engine.outline import Batch, LayerOutline, Outline
from gazelle.engine.plan import (
    CHUNKS,
    Plan,
    Rates,
    TooSmallError,
    _Draft,
    by_operations,
    choices,
    make_plan,
)
from gazelle.engine.spec import DecoderSpec

SPEC = DecoderSpec(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, eps=1e-5,
                   attention_scale=128**-0.5)
R = 64
RATES = Rates(forward=4e-3, backward=8e-3, attention=1.2e-3, qkv=0.8e-3, mlp=2e-3, head=2e-2, link=5e10)
BATCH = Batch(tokens=8192, labelled=8192, longest=4096)
PLENTY = 10**13


def layer(storage: str = "nf4", intermediate: int = 14336) -> LayerOutline:
    spec = replace(SPEC, intermediate=intermediate)
    shapes = [(spec.qkv_size, 4096), (4096, spec.q_size), (2 * intermediate, 4096), (4096, intermediate)]
    bordered = [2 * (N + R) * (K + R) for N, K in shapes]
    weights = sum(N * K // 2 + N * K // 64 for N, K in shapes) if storage == "nf4" else sum(bordered)
    scratch = bordered if storage == "nf4" else [0] * 4
    gradients = 4 * 16 * sum(N + K for N, K in shapes)
    return LayerOutline(spec, (R, R, R, R), weights, (scratch[0], scratch[1], scratch[2], scratch[3]), gradients,
                        storage)


def model(layers: int = 32, storage: str = "nf4", *, two_kinds: bool = False, moves: bool = True) -> Outline:
    """Llama-3.1-8B with LoRA of rank 16 and an 8-bit optimizer; of two kinds, every other MLP is twice as wide."""
    kinds = [layer(storage), layer(storage, 28672 if two_kinds else 14336)]
    table = 2 * 128256 * 4096
    return Outline(layers=tuple(kinds[number % 2] for number in range(layers)), hidden=4096, vocabulary=128256,
                   itemsize=2, embedding=table, embedding_moves=moves, head=table, head_trains=False,
                   others=70_000_000, trained=layers * 10_500_000, optimizer=layers * 2_600_000)


def smallest(outline: Outline, **options: object) -> int:
    with pytest.raises(TooSmallError) as caught:
        make_plan(outline, BATCH, 1, RATES, **options)  # type: ignore[arg-type]
    return caught.value.smallest


def budgets(outline: Outline, count: int, **options: object) -> list[int]:
    """From the least that will do to a little more than anybody needs."""
    low = smallest(outline, **options)
    high = make_plan(outline, BATCH, PLENTY, RATES, **options).peak  # type: ignore[arg-type]
    return [low + int((1.1 * high - low) * number / (count - 1)) for number in range(count)]


def draft(outline: Outline, *, chunk: int | None = None, host: bool = False, streamed: int = 0,
          rates: Rates = RATES) -> _Draft:
    options = choices(host=True, parts=rates.qkv < rates.attention / 2, chunk=chunk)
    return _Draft(outline, BATCH, rates, options, embedding_on_host=host, streamed=streamed)


def uniform_plan(outline: Outline, keep: Keep, rates: Rates | None = RATES) -> Plan:
    """Every layer makes the same choice, and no budget limits it."""
    return make_plan(outline, BATCH, PLENTY, rates, allowed=lambda option: option == keep)


def is_last_resort(plan: Plan) -> bool:
    return bool(plan.streamed) or any(keep.chunk is not None for keep in plan.keeps)


def level(keep: Keep) -> int:
    """How many halves a layer keeps."""
    return int(keep.attention) + int(keep.mlp)


MODELS = pytest.mark.parametrize(
    "outline", [model(), model(storage="dense"), model(two_kinds=True), model(moves=False)],
    ids=["nf4", "dense", "two kinds", "embedding stays"])


@MODELS
@pytest.mark.parametrize("options", [{}, {"streams": False}, {"host": False}], ids=["all", "no streams", "no host"])
def test_the_peak_never_exceeds_the_budget(outline: Outline, options: dict[str, bool]) -> None:
    for budget in budgets(outline, 25, **options):
        plan = make_plan(outline, BATCH, budget, RATES, **options)
        assert plan.peak == sum(plan.parts.values()) <= budget == plan.budget
        assert len(plan.keeps) == len(outline.layers)
        assert all(size >= 0 for size in plan.parts.values())


@pytest.mark.parametrize("rates", [RATES, replace(RATES, link=5e9), replace(RATES, attention=3e-3, mlp=1e-3)],
                         ids=["usual", "slow link", "long rows"])
@pytest.mark.parametrize("two_kinds", [False, True], ids=["one kind", "two kinds"])
def test_more_memory_never_takes_longer(rates: Rates, two_kinds: bool) -> None:
    outline = model(two_kinds=two_kinds)
    before: Plan | None = None
    for budget in budgets(outline, 60):
        plan = make_plan(outline, BATCH, budget, rates)
        assert plan.seconds is not None
        # The prediction counts nothing for chunks and little for streaming, which are left as soon as possible.
        if before is not None and before.seconds is not None and not is_last_resort(before):
            assert plan.seconds <= before.seconds, (before.describe(), plan.describe())
        before = plan


@MODELS
def test_everything_is_kept_where_it_fits(outline: Outline) -> None:
    whole = uniform_plan(outline, KEEP)
    plan = make_plan(outline, BATCH, whole.peak, RATES)
    assert set(plan.keeps) == {KEEP}
    assert not plan.streamed and not plan.embedding_on_host
    assert plan == replace(whole, budget=whole.peak)
    assert make_plan(outline, BATCH, PLENTY, RATES) == replace(plan, budget=PLENTY)
    less = make_plan(outline, BATCH, whole.peak - 1, RATES)
    assert set(less.keeps) != {KEEP} or less.embedding_on_host


def test_what_is_bought_first() -> None:
    """The attention halves, which cost fewest bytes for their time; then gate and up; then inputs leave the host."""
    outline = model(moves=False)
    seen = set()
    for budget in budgets(outline, 80, streams=False):
        plan = make_plan(outline, BATCH, budget, RATES, streams=False)
        if is_last_resort(plan):
            continue
        attention, mlp, here = (sum(column) for column in zip(
            *((keep.attention, keep.mlp, not keep.host) for keep in plan.keeps), strict=True))
        assert attention >= 30 or mlp <= 3, plan.describe()
        assert mlp >= 26 or here <= 6, plan.describe()
        seen |= {(attention // 8, mlp // 8, here // 8)}
    assert {(0, 0, 0), (4, 0, 0), (4, 4, 0), (4, 4, 4)} <= seen
    assert smallest(outline, streams=False) < uniform_plan(outline, OFFLOAD).peak


def test_small_layers_are_bought_before_large_ones() -> None:
    outline = model(two_kinds=True, moves=False)
    mixed = 0
    for budget in budgets(outline, 30, streams=False):
        keeps = make_plan(outline, BATCH, budget, RATES, streams=False).keeps
        small, large = (sum(keep.mlp for keep in keeps[first::2]) for first in (0, 1))
        assert small >= large - 1  # the very last layer may be large, and keeps almost for nothing
        mixed += small == 16 and 1 < large < 16
    assert mixed


@MODELS
@pytest.mark.parametrize("options", [
    {}, {"streams": False}, {"host": False}, {"allowed": lambda keep: keep == ALL, "streams": False},
    {"allowed": lambda keep: keep == KEEP, "host": False},
], ids=["all", "no streams", "no host", "everything again", "everything kept"])
def test_the_smallest_budget_is_enough_and_less_is_not(outline: Outline, options: dict[str, object]) -> None:
    low = smallest(outline, **options)
    assert make_plan(outline, BATCH, low, RATES, **options).peak == low  # type: ignore[arg-type]
    for budget in (low - 1, int(low * 0.99), low // 2):
        with pytest.raises(TooSmallError) as caught:
            make_plan(outline, BATCH, budget, RATES, **options)  # type: ignore[arg-type]
        assert caught.value.smallest == low


def test_chunks_and_streaming_come_last() -> None:
    outline = model()
    without = min(draft(outline, host=moved).smallest() or 0 for moved in (False, True))
    in_chunks = smallest(outline, streams=False)
    low = smallest(outline)
    assert low < in_chunks < without
    seen = []
    for budget in [*budgets(outline, 60), in_chunks - 1, in_chunks, without - 1, without]:
        plan = make_plan(outline, BATCH, budget, RATES)
        chunks = {keep.chunk for keep in plan.keeps if not keep.mlp}
        assert bool(plan.streamed) == (budget < in_chunks)
        if budget >= without:
            assert chunks <= {None}
        elif budget >= in_chunks:
            assert len(chunks) == 1 and chunks <= set(CHUNKS)
            seen.append((budget, chunks.pop()))
        if plan.streamed or is_last_resort(plan):
            assert plan.embedding_on_host
    assert len({chunk for _, chunk in seen}) > 1
    sizes = [chunk for _, chunk in sorted(seen)]
    assert sizes == sorted(sizes)  # a smaller budget takes smaller pieces
    assert max(sizes) < BATCH.tokens


def test_more_layers_stream_only_where_that_is_faster() -> None:
    outline = model(storage="dense")
    low, enough = smallest(outline), smallest(outline, streams=False)
    counts = []
    for number in range(12):
        plan = make_plan(outline, BATCH, low + (enough - low) * number // 12, RATES)
        fewest = next(found for count in range(1, 33) for chunk in (None, CHUNKS[-1])
                      if (found := draft(outline, chunk=chunk, host=True, streamed=count).plan(plan.budget)))
        assert plan.seconds is not None and fewest.seconds is not None
        assert plan.streamed == fewest.streamed or plan.seconds < fewest.seconds
        counts.append(fewest.streamed)
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0]
    assert make_plan(outline, BATCH, enough, RATES).streamed == 0
    # Two layers' weights are on the device at any time, and nothing of the others'.
    sizes = [outline.layers[0].weights * count for count in (32, 2 + 32 - counts[0])]
    assert make_plan(outline, BATCH, PLENTY, RATES).parts["weights of the layers"] == sizes[0]
    assert make_plan(outline, BATCH, low, RATES).parts["weights of the layers"] == sizes[1]


LONG = Batch(65536, 65536, 65536)
LONG_RATES = Rates(forward=0.107, backward=0.225, attention=0.060, qkv=0.003, mlp=0.022, head=0.22, link=5e10)


def test_long_rows_do_not_make_their_attention_again() -> None:
    """Weights that stream, or host memory, make room for it; where both are short, its output alone is kept."""
    budget = 12 * 2**30
    free = make_plan(model(), LONG, budget, LONG_RATES)
    assert free.streamed and all(keep.attention for keep in free.keeps)
    less = 40 * 10**9
    short = make_plan(model(), LONG, budget, LONG_RATES, host_memory=less)
    assert sum(keep.attention and not keep.qkv for keep in short.keeps) >= 28
    none = make_plan(model(), LONG, budget, replace(LONG_RATES, qkv=LONG_RATES.attention), host_memory=less)
    assert free.seconds is not None and short.seconds is not None and none.seconds is not None
    assert free.seconds <= short.seconds < free.seconds + 32 * 0.006 < none.seconds - 1


@pytest.mark.parametrize("gigabytes", [0, 1, 3, 8, 30])
def test_host_memory_is_not_overdrawn(gigabytes: int) -> None:
    outline, limit = model(), gigabytes * 10**9

    def used(plan: Plan) -> int:
        parked = sum(footprint(one, keep, BATCH.tokens, 2).parked
                     for one, keep in zip(outline.layers, plan.keeps, strict=True))
        return parked + plan.streamed * outline.layers[0].weights + plan.embedding_on_host * outline.embedding

    low = smallest(outline, host_memory=limit)
    assert used(make_plan(outline, BATCH, low, RATES, host_memory=limit)) <= limit
    for budget in range(low, 40 * 10**9, 6 * 10**9):
        assert used(make_plan(outline, BATCH, budget, RATES, host_memory=limit)) <= limit


def test_chunks_are_smaller_than_the_batch() -> None:
    outline, batch = model(two_kinds=True), Batch(2000, 2000, 2000)  # some MLPs need more than the head
    with pytest.raises(TooSmallError) as caught:
        make_plan(outline, batch, 1, RATES, streams=False)
    plan = make_plan(outline, batch, caught.value.smallest, RATES, streams=False)
    assert {keep.chunk for keep in plan.keeps} == {1024}
    tiny = Batch(500, 500, 500)
    with pytest.raises(TooSmallError) as caught:
        make_plan(outline, tiny, 1, RATES, streams=False)
    plan = make_plan(outline, tiny, caught.value.smallest, RATES, streams=False)
    assert {keep.chunk for keep in plan.keeps} == {None}


def test_without_host_memory_nothing_moves_there() -> None:
    outline = model()
    for budget in budgets(outline, 20, host=False):
        plan = make_plan(outline, BATCH, budget, RATES, host=False)
        assert not any(keep.host for keep in plan.keeps)
        assert not plan.streamed and not plan.embedding_on_host
    assert smallest(outline, host=False) > smallest(outline, streams=False)


@pytest.mark.parametrize("keep", CHOICES.values(), ids=CHOICES)
def test_a_choice_that_is_asked_for_is_made(keep: Keep) -> None:
    def allowed(option: Keep) -> bool:
        return option == keep

    outline = model()
    for budget in budgets(outline, 10, allowed=allowed):
        plan = make_plan(outline, BATCH, budget, RATES, allowed=allowed)
        assert {replace(found, chunk=None) for found in plan.keeps} == {keep}
    whole = make_plan(outline, BATCH, PLENTY, RATES, allowed=allowed)
    assert set(whole.keeps) == {keep}
    assert whole == uniform_plan(outline, keep)


def test_allowed_leaves_a_choice() -> None:
    outline = model()
    seen: set[Keep] = set()
    for budget in budgets(outline, 20, allowed=lambda keep: not keep.host, streams=False):
        seen |= set(make_plan(outline, BATCH, budget, RATES, allowed=lambda keep: not keep.host, streams=False).keeps)
    assert not any(keep.host for keep in seen)
    assert {KEEP, MLP, ALL} <= seen


def test_the_embedding_moves_only_if_it_may_and_if_that_helps() -> None:
    stays, moves = model(moves=False), model()
    for budget in budgets(stays, 20):
        plan = make_plan(stays, BATCH, budget, RATES)
        assert not plan.embedding_on_host
        assert plan.parts["embedding and head"] == stays.embedding + stays.head
    seen = set()
    for budget in budgets(moves, 20):
        plan = make_plan(moves, BATCH, budget, RATES)
        seen.add(plan.embedding_on_host)
        assert plan.parts["embedding and head"] == moves.head + (not plan.embedding_on_host) * moves.embedding
        if plan.embedding_on_host and not is_last_resort(plan):
            other = make_plan(stays, BATCH, budget, RATES)
            if is_last_resort(other):
                continue
            assert plan.seconds is not None and other.seconds is not None and plan.seconds < other.seconds
    assert seen == {False, True}


def test_parts() -> None:
    outline = model()
    plan = make_plan(outline, BATCH, PLENTY, RATES)
    scratch = [max(sizes) for sizes in zip(*(kind.scratch for kind in outline.layers), strict=True)]
    assert plan.parts == {
        "weights of the layers": 32 * outline.layers[0].weights, "embedding and head": 4 * 128256 * 4096,
        "dequantised weights": sum(scratch), "trained parameters and gradients": 32 * 10_500_000,
        "optimizer": 32 * 2_600_000, "norms, positions and the rest": 70_000_000 + 4 * 8192 * 128 * 2,
        "activations": plan.parts["activations"],
    }
    kept = footprint(outline.layers[0], KEEP, 8192, 2)
    assert 32 * kept.kept < plan.parts["activations"] < 33 * kept.kept + 10**9
    dense = make_plan(model(storage="dense"), BATCH, PLENTY, RATES)
    assert dense.parts["dequantised weights"] == 0
    two = model(two_kinds=True)
    largest = max(kind.scratch[2] for kind in two.layers)
    assert make_plan(two, BATCH, PLENTY, RATES).parts["dequantised weights"] > largest


def test_lines_are_ranked_and_add_up() -> None:
    plan = make_plan(model(storage="dense"), BATCH, PLENTY, RATES)
    lines = plan.lines()
    sizes = [plan.parts[name] for name, _ in lines[:-1]]
    assert sizes == sorted(sizes, reverse=True) and 0 not in sizes and sum(sizes) == plan.peak
    assert lines[-1] == ("peak", f"{plan.peak / 1e9:.2f} GB")
    assert all(text == f"{plan.parts[name] / 1e9:.2f} GB" for name, text in lines[:-1])


@pytest.mark.parametrize(("keeps", "options", "said"), [
    ([KEEP] * 3, {}, "3 layers keep everything"),
    ([KEEP], {}, "1 layer keeps everything"),
    ([MLP] * 2 + [KEEP], {}, "2 layers make gate and up again, 1 layer keeps everything"),
    ([ALL, Keep(attention=False), KEEP, ALL], {},
     "2 layers make everything again, 1 layer makes the attention again, 1 layer keeps everything"),
    ([OFFLOAD] * 4, {"embedding_on_host": True},
     "4 layers make everything again from inputs in host memory, the embedding lies in host memory"),
    ([AWAY, replace(AWAY, mlp=False)], {},
     ("1 layer keeps everything with inputs and attention in host memory, 1 layer makes gate and up again with inputs "
      "and attention in host memory")),
    ([OUTPUT, replace(OUTPUT, mlp=False), OUTPUT_AWAY], {},
     ("1 layer makes queries, keys and values again, 1 layer keeps the attention's output alone, 1 layer makes "
      "queries, keys and values again with inputs and attention in host memory")),
    ([replace(ALL, chunk=4096)], {}, "1 layer makes everything again (4096 tokens at a time)"),
    ([replace(OFFLOAD, chunk=1024)] * 2, {"streamed": 2, "embedding_on_host": True},
     ("2 layers make everything again (1024 tokens at a time) from inputs in host memory, "
      "the weights of 2 stream from host memory, the embedding lies in host memory")),
])
def test_it_says_what_it_does(keeps: list[Keep], options: dict[str, int], said: str) -> None:
    whole = Plan(tuple(keeps), 0, False, {"activations": 5}, 5, None, 10)
    assert replace(whole, **options).describe() == said  # type: ignore[arg-type]


def test_without_measured_times() -> None:
    """Floating-point operations stand in for them: the same kind of plan, without a prediction of time."""
    outline = model()
    for budget in budgets(outline, 12):
        plan = make_plan(outline, BATCH, budget, None)
        assert plan.seconds is None
        assert plan.peak <= budget
    assert set(make_plan(outline, BATCH, PLENTY, None).keeps) == {KEEP}
    assert uniform_plan(outline, ALL, None).seconds is None
    assert smallest(outline) == min(_smallest_without_rates(outline), smallest(outline))
    rates = by_operations(outline, BATCH)
    assert rates.backward == 2 * rates.forward > 2 * rates.mlp > 2 * rates.attention > 0


def _smallest_without_rates(outline: Outline) -> int:
    with pytest.raises(TooSmallError) as caught:
        make_plan(outline, BATCH, 1, None)
    return caught.value.smallest


def test_predicted_time() -> None:
    outline = model(layers=4)
    passes = 4 * (RATES.forward + RATES.backward) + RATES.head
    assert uniform_plan(outline, KEEP).seconds == pytest.approx(passes)
    assert uniform_plan(outline, KEEP, replace(RATES, rest=0.5)).seconds == pytest.approx(passes + 0.5)
    again = uniform_plan(outline, ALL).seconds
    assert again == pytest.approx(passes + 4 * (RATES.attention + RATES.mlp))
    # Inputs of 67 MB cross a fast link beside the computation, almost for nothing; a slow one has to be waited for.
    fast = uniform_plan(outline, OFFLOAD).seconds
    slow = uniform_plan(outline, OFFLOAD, replace(RATES, link=1e9)).seconds
    assert fast is not None and slow is not None and again is not None
    assert again < fast < again * 1.01
    stream = 8192 * 4096 * 2 / 1e9
    waited = 2 * stream - RATES.forward - RATES.backward - RATES.attention - RATES.mlp
    assert slow == pytest.approx(again + 4 * (waited + 0.02 * stream))
    assert RATES.scaled(2).forward == 2 * RATES.forward and RATES.scaled(2).link == RATES.link


def test_streaming_that_cannot_hide_is_waited_for() -> None:
    outline = model(layers=4, storage="dense")
    low = smallest(outline)
    fast, slow = (make_plan(outline, BATCH, low, replace(RATES, link=link)) for link in (1e12, 1e10))
    assert fast.streamed == slow.streamed > 0
    moved = fast.streamed * outline.layers[0].weights
    assert fast.seconds is not None and slow.seconds is not None
    waited = 2 * moved / 1e10 - fast.streamed * (RATES.forward + RATES.backward)
    assert slow.seconds - fast.seconds == pytest.approx(waited, rel=0.05)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("two_kinds", [False, True], ids=["one kind", "two kinds"])
@pytest.mark.parametrize("rates", [RATES, replace(RATES, link=5e9), replace(RATES, attention=3e-3, mlp=1e-3)],
                         ids=["usual", "slow link", "long rows"])
def test_no_other_choice_is_faster(layers: int, two_kinds: bool, rates: Rates) -> None:
    """Against all choices of every layer, wherever the embedding lies."""
    outline = model(layers, two_kinds=two_kinds)
    every: list[tuple[float, int]] = []
    for moved in (False, True):
        one = draft(outline, host=moved, rates=rates)
        static = sum(one.static.values())
        every += [(one.seconds(keeps), static + one.activations(keeps))
                  for keeps in itertools.product(choices(host=True, parts=rates.qkv < rates.attention / 2),
                                                 repeat=layers)]
    every.sort()
    low = min(peak for _, peak in every)
    high = max(peak for _, peak in every)
    for number in range(30):
        budget = low + (high - low) * number // 29
        best = next(seconds for seconds, peak in every if peak <= budget)
        plan = make_plan(outline, BATCH, budget, rates)
        assert plan.seconds == pytest.approx(best, rel=1e-9)
        assert not is_last_resort(plan)
    assert low == min(draft(outline, host=moved, rates=rates).smallest() or 0 for moved in (False, True))


@pytest.mark.parametrize("host", [True, False])
def test_choices(host: bool) -> None:
    found = choices(host=host, chunk=2048)
    assert len(found) == len(set(found)) == (14 if host else 4)
    assert all((keep.chunk == 2048) == (not keep.mlp) for keep in found)
    assert host or not any(keep.host for keep in found)


def test_the_last_layer_keeps_for_nothing() -> None:
    """Its backward pass comes first: what it does not keep would be made again while the others keep theirs."""
    outline = model(moves=False)
    low = draft(outline).smallest()
    assert low is not None
    plan = make_plan(outline, BATCH, low, RATES)
    before: Callable[[Keep], int] = level
    assert before(plan.keeps[-1]) > before(plan.keeps[0])


def test_attention_leaves_only_where_its_kernel_lets_it() -> None:
    """With soft-caps it is compiled, and nothing else differs."""
    outline = model(storage="dense")
    capped = replace(outline, layers=tuple(replace(layer, spec=replace(layer.spec, softcap=50.0))
                                           for layer in outline.layers))
    rates = replace(RATES, link=1e11)
    for each, leaves in ((outline, True), (capped, False)):
        assert any(keep.attention_host for keep in make_plan(each, BATCH, 20 * 10**9, rates).keeps) == leaves
