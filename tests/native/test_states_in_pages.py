"""Recurrences in C++ with states in pages: the same bits as with copies, and nothing else written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
kernels = pytest.importorskip("quire.kernels_cpu")

from quire.backends.cpu.ops import CpuOps  # noqa: E402
from quire.core.interface import Sequences, StateSlots  # noqa: E402

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not kernels.HAVE_NATIVE, reason=str(kernels.WHY_NOT_NATIVE)),
]
SETTINGS = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
HEADS, CHANNELS, SIZE, TAPS = 2, 24, 20, 4
SHAPES = {
    "causal_conv1d": (HEADS * CHANNELS, TAPS - 1),
    "selective_scan": (HEADS * CHANNELS, SIZE),
    "ssd_scan": (HEADS, CHANNELS, SIZE),
    "gated_delta_rule": (HEADS, SIZE, CHANNELS),
}


@pytest.fixture(params=kernels.available_isas() if kernels.HAVE_NATIVE else ["none"])
def ops(request):
    """The operators at each level; the best one is put back."""
    kernels.use_isa(request.param)
    yield CpuOps()
    kernels.use_isa(kernels.available_isas()[0])


def run(ops, name, states, where, rng):
    """An operator on made-up rows, always the same ones."""
    total = where.starts_host[-1]
    flat = torch.randn(total, HEADS * CHANNELS, generator=rng)
    heads = flat.view(total, HEADS, CHANNELS)
    b, c = torch.randn(2, total, SIZE, generator=rng)
    times = torch.rand(total, HEADS * CHANNELS, generator=rng)
    a = -torch.rand(HEADS * CHANNELS, SIZE, generator=rng)
    if name == "causal_conv1d":
        weight = torch.randn(HEADS * CHANNELS, TAPS, generator=rng)
        return ops.causal_conv1d(flat, weight, None, states, where, activation="silu")
    if name == "selective_scan":
        return ops.selective_scan(flat, times, a, b, c, None, states, where)
    dt, b, c = times[:, :HEADS], b.unsqueeze(1), c.unsqueeze(1)
    if name == "ssd_scan":
        return ops.ssd_scan(heads, dt, a[:HEADS, 0], b, c, None, states, where)
    return ops.gated_delta_rule(b, c, heads, -dt, dt, states, where)


@pytest.mark.parametrize("name", SHAPES)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    is_new=st.lists(st.booleans(), min_size=4, max_size=4),
    stays=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_states_in_a_page_give_the_bits_of_copies(ops, name, lengths, is_new, stays, seed):
    """New sequences, such that go on in their block, and such that begin another; wide blocks."""
    rng = torch.Generator().manual_seed(seed)
    count, shape = len(lengths), SHAPES[name]
    numel = torch.Size(shape).numel()
    page = torch.randn(12, numel + 5, generator=rng)[:, 2:-3].unflatten(1, shape)
    blocks = torch.randperm(12, generator=rng)
    sources, targets = blocks[:count].clone(), blocks[4 : 4 + count].clone()
    for s in range(count):
        if stays[s]:
            targets[s] = sources[s]
    sources[torch.tensor(is_new[:count])] = -1
    starts = [sum(lengths[:s]) for s in range(count + 1)]
    plain = Sequences(starts=torch.tensor(starts, dtype=torch.int32), starts_host=starts)
    where = replace(plain, slots=StateSlots(sources=sources, targets=targets))
    copies = page[sources.clamp(min=0)].contiguous()
    copies[sources < 0] = 0
    wanted = run(ops, name, copies, plain, torch.Generator().manual_seed(seed))
    before = page.clone()
    got = run(ops, name, page, where, torch.Generator().manual_seed(seed))
    before[targets] = copies
    assert torch.equal(got, wanted)
    assert torch.equal(page, before)


def test_a_block_outside_of_the_page_is_an_error_and_nothing_is_written():
    """Wrong block tables must not reach foreign memory."""
    page = torch.ones(3, *SHAPES["ssd_scan"])
    for source, target in ((3, 0), (0, 3), (0, -1)):
        slots = StateSlots(sources=torch.tensor([source]), targets=torch.tensor([target]))
        starts = torch.tensor([0, 2], dtype=torch.int32)
        where = Sequences(starts=starts, starts_host=[0, 2], slots=slots)
        with pytest.raises(IndexError, match="there are 3"):
            run(CpuOps(), "ssd_scan", page, where, torch.Generator())
    assert torch.equal(page, torch.ones_like(page))
