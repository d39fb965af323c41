"""Mixers in one call: what their operators give one by one, in the same pages, however a text is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
kernels = pytest.importorskip("quire.kernels_cpu")

from quire.backends.cpu.ops import CpuOps  # noqa: E402
from quire.core.interface import LayerCache, Sequences, StatePieces, StateSlots  # noqa: E402
from quire.core.models.state_space.delta_mixer import DeltaMixer, DeltaWeights  # noqa: E402
from quire.core.models.state_space.delta_spec import DeltaSpec  # noqa: E402
from quire.core.models.state_space.mixers import MixerWeights, make_mixer  # noqa: E402
from quire.core.models.state_space.rounds import Round  # noqa: E402
from quire.core.models.state_space.spec import CONV, STATE, StateSpaceSpec  # noqa: E402

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not kernels.HAVE_NATIVE, reason=str(kernels.WHY_NOT_NATIVE)),
]
FLOATS = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
HIDDEN, INNER, SIZE, TAPS, RANK, BLOCKS = 40, 72, 12, 4, 5, 9
FIRST = StateSpaceSpec(
    architecture="", vocab_size=1, hidden_size=HIDDEN, inner_size=INNER, state_size=SIZE,
    conv_width=TAPS, num_layers=1, norm_eps=1e-5, num_heads=None, num_groups=1, rank=RANK,
    has_bias=True, has_conv_bias=True, has_tied_embeddings=False, keeps_residual_in_float32=False,
)  # fmt: skip
SECOND = replace(FIRST, num_heads=6, num_groups=2, rank=0)
DELTA = DeltaSpec(
    hidden_size=HIDDEN, num_key_heads=2, num_value_heads=4, key_size=SIZE, value_size=18,
    conv_width=TAPS, norm_eps=1e-6, is_grouped=False,
)  # fmt: skip
KINDS = {
    "delta": DELTA,
    "delta-whole-vectors": replace(DELTA, key_size=32, value_size=64, num_key_heads=1),
    "mamba": FIRST,
    "mamba-inner-norms": replace(FIRST, has_inner_norms=True),
    "mamba2": SECOND,
    "mamba2-norm-first": replace(SECOND, is_norm_before_gate=True),
    "mamba2-without-norm": replace(SECOND, has_gated_norm=False),
}


@pytest.fixture(params=kernels.available_isas() if kernels.HAVE_NATIVE else ["none"])
def ops(request):
    """The operators at each level; the best one is put back."""
    kernels.use_isa(request.param)
    yield CpuOps()
    kernels.use_isa(kernels.available_isas()[0])


def weights_of(spec, dtype, rng):
    """Made-up weights of a mixer, dense."""

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng) * scale).to(dtype)

    def linear(outputs, inputs):
        return CpuOps().pack_linear(draw(outputs, inputs, scale=inputs**-0.5), draw(outputs))

    if isinstance(spec, DeltaSpec):
        heads = spec.num_value_heads
        return DeltaWeights(
            in_proj=linear(spec.projected_size, HIDDEN),
            conv=draw(spec.conv_size, TAPS),
            conv_bias=None,
            out_proj=linear(HIDDEN, spec.values_size),
            a=-torch.rand(heads, generator=rng),
            dt_bias=torch.randn(heads, generator=rng),
            norm=1 + 0.1 * torch.randn(spec.value_size, generator=rng),
        )
    is_first = spec.num_heads is None
    width = INNER if is_first else spec.num_heads
    rates = (INNER, SIZE) if is_first else (width,)
    norms = [1 + draw(size, scale=0.1) for size in (RANK, SIZE, SIZE)]
    return MixerWeights(
        in_proj=linear(spec.projected_size, HIDDEN),
        conv=draw(spec.conv_size, TAPS),
        conv_bias=draw(spec.conv_size),
        out_proj=linear(HIDDEN, INNER),
        a=-torch.rand(rates, generator=rng),
        d=torch.randn(width, generator=rng),
        dt_bias=torch.randn(width, generator=rng),
        x_proj=linear(RANK + 2 * SIZE, INNER) if is_first else None,
        dt_proj=linear(INNER, RANK) if is_first else None,
        norm=None if is_first or not spec.has_gated_norm else 1 + draw(INNER, scale=0.1),
        inner_norms=tuple(norms) if spec.has_inner_norms else None,
    )


def mixer_of(spec, weights, ops, *, scans_in_pages):
    """The mixer of either kind."""
    make = DeltaMixer if isinstance(spec, DeltaSpec) else make_mixer
    return make(spec, weights, ops, scans_in_pages=scans_in_pages)


def cache_of(spec, dtype, rng):
    """Pages full of somebody's states."""
    conv, state = (page.shape for page in spec.pages)
    conv = torch.randn(BLOCKS, *conv, generator=rng).to(dtype)
    states = torch.randn(BLOCKS, *state, generator=rng)
    return LayerCache(tensors={CONV: conv, STATE: states}, block_size=16)


def round_of(pieces, num_rows):
    """pieces: (begin, end, source, target)."""
    begins, ends, sources, targets = zip(*pieces, strict=True)
    starts = [0]
    for begin, end in zip(begins, ends, strict=True):
        starts.append(starts[-1] + end - begin)
    rows = [row for begin, end in zip(begins, ends, strict=True) for row in range(begin, end)]
    slots = StateSlots(sources=torch.tensor(sources), targets=torch.tensor(targets))
    return Round(
        rows=None if rows == list(range(num_rows)) else torch.tensor(rows),
        sequences=Sequences(
            starts=torch.tensor(starts, dtype=torch.int32), starts_host=starts, slots=slots
        ),
        pieces=StatePieces(
            begins=torch.tensor(begins, dtype=torch.int32),
            ends=torch.tensor(ends, dtype=torch.int32),
            slots=slots,
        ),
    )


STEPS = {
    "decode": [[(0, 1, 3, 3), (1, 2, -1, 5), (2, 3, 2, 8)]],
    "prompts": [[(0, 7, -1, 1), (7, 8, 2, 2), (8, 40, 4, 6)]],
    "cut": [[(0, 7, -1, 1), (20, 23, 4, 6)], [(7, 15, 1, 2), (23, 24, 6, 7)], [(15, 20, 2, 3)]],
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_one_call_gives_what_the_operators_give(ops, kind, step, dtype):
    """Results, and the blocks that were written, others untouched."""
    spec, rng = KINDS[kind], torch.Generator().manual_seed(3)
    weights, cache = weights_of(spec, dtype, rng), cache_of(spec, dtype, rng)
    num_rows = max(end for pieces in STEPS[step] for _, end, *_ in pieces)
    x = torch.randn(num_rows, HIDDEN, generator=rng).to(dtype)
    rounds = [round_of(pieces, num_rows) for pieces in STEPS[step]]
    pages = {name: page.clone() for name, page in cache.tensors.items()}
    other = replace(cache, tensors=pages)
    fused = mixer_of(spec, weights, ops, scans_in_pages=True)
    assert fused._fused is not None
    got = fused(x, cache, rounds)
    want = mixer_of(spec, weights, ops, scans_in_pages=False)(x, other, rounds)
    limit = TOLERANCE[dtype] * float(want.float().abs().max())
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=limit)
    assert torch.equal(cache.tensors[CONV], other.tensors[CONV])
    states, wanted = cache.tensors[STATE], other.tensors[STATE]
    torch.testing.assert_close(states, wanted, rtol=0, atol=TOLERANCE[dtype] * float(wanted.max()))
    written = {target for pieces in STEPS[step] for *_, target in pieces}
    for block in set(range(BLOCKS)) - written:
        assert torch.equal(states[block], wanted[block])


@pytest.mark.parametrize("kind", KINDS)
def test_text_cut_anywhere_gives_the_same_bits(ops, kind):
    """A chunked prompt, alone or among others, gives what the whole prompt gives."""
    spec, rng = KINDS[kind], torch.Generator().manual_seed(4)
    weights, cache = weights_of(spec, torch.bfloat16, rng), cache_of(spec, torch.bfloat16, rng)
    mixer = mixer_of(spec, weights, ops, scans_in_pages=True)
    x = torch.randn(30, HIDDEN, generator=rng).bfloat16()
    whole = mixer(x, cache, [round_of([(0, 30, -1, 1)], 30)])
    parts, source = [], -1
    for target, (begin, end) in enumerate([(0, 7), (7, 8), (8, 30)], start=2):
        two = torch.cat((x[begin:end], x[:3]))
        pieces = [(0, end - begin, source, target), (end - begin, end - begin + 3, -1, 8)]
        parts.append(mixer(two, cache, [round_of(pieces, len(two))])[: end - begin])
        source = target
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(cache.tensors[STATE][1], cache.tensors[STATE][4])


@pytest.mark.parametrize("piece", [(0, 4, -1, 1), (-1, 2, -1, 1), (2, 1, -1, 1), (0, 3, 9, 1), (0, 3, 0, 9), (0, 3, 0, -1)])  # fmt: skip
def test_piece_outside_of_the_step_or_the_page_is_an_error_and_nothing_is_written(piece):
    """Wrong tables must not reach foreign memory."""
    rng = torch.Generator().manual_seed(5)
    weights, cache = weights_of(SECOND, torch.bfloat16, rng), cache_of(SECOND, torch.bfloat16, rng)
    before = {name: page.clone() for name, page in cache.tensors.items()}
    begin, end, source, target = piece
    slots = StateSlots(sources=torch.tensor([source]), targets=torch.tensor([target]))
    bounds = torch.tensor([[begin], [end]], dtype=torch.int32)
    pieces = StatePieces(begins=bounds[0], ends=bounds[1], slots=slots)
    where = Sequences(starts=torch.tensor([0, 3], dtype=torch.int32), starts_host=[0, 3])
    mixer = mixer_of(SECOND, weights, CpuOps(), scans_in_pages=True)
    x = torch.randn(3, HIDDEN).bfloat16()
    with pytest.raises(IndexError, match="there are"):
        mixer(x, cache, [Round(rows=None, sequences=where, pieces=pieces)])
    assert all(torch.equal(page, before[name]) for name, page in cache.tensors.items())


def test_float32_mixer_is_not_fused():
    """Its products are another library's, which one call cannot reach."""
    weights = weights_of(SECOND, torch.float32, torch.Generator().manual_seed(6))
    assert mixer_of(SECOND, weights, CpuOps(), scans_in_pages=True)._fused is None
