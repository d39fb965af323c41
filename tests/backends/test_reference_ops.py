"""The reference operators against their definitions in float64, one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.backends.reference import ReferenceOps
from quire.core.interface import OP_SPECS, Ops, SamplingTensors

EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
DTYPES = list(EPSILON)


@pytest.fixture
def ops() -> ReferenceOps:
    return ReferenceOps()


def assert_rounds(got: torch.Tensor, wanted: torch.Tensor, ulps: float = 1.0) -> None:
    """`got` is the float64 `wanted`, rounded once (and a little float32 arithmetic)."""
    epsilon = EPSILON[got.dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=ulps * epsilon, atol=ulps * 1e-6)


def test_every_operator_of_the_table_has_a_reference(ops):
    """A vendor may override nothing and still serve."""
    layers_and_logits = [spec.name for spec in OP_SPECS if spec.name != "paged_attention"]
    assert all(callable(getattr(ops, name)) for name in layers_and_logits)
    assert {ops.provider(name) for name in layers_and_logits} == {"reference"}
    assert issubclass(ReferenceOps, Ops)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_matches_definition(ops, dtype, torch_rng):
    """Computed in float32, weight included, and rounded once."""
    x = torch.randn(3, 2, 33, generator=torch_rng).to(dtype)
    weight = torch.randn(33, generator=torch_rng).to(dtype)
    wide = x.double()
    wanted = wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert_rounds(ops.rms_norm(x, weight, 1e-5), wanted, ulps=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_mutates_residual_alone(ops, dtype, torch_rng):
    """The sum is rounded into the residual before it is normalised; x stays."""
    x, residual = (torch.randn(5, 16, generator=torch_rng).to(dtype) for _ in range(2))
    weight = torch.randn(16, generator=torch_rng).to(dtype)
    x_before, wanted_sum = x.clone(), (x.double() + residual.double()).to(dtype)
    got = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(x, x_before)
    assert torch.equal(residual, wanted_sum)
    assert torch.equal(got, ops.rms_norm(wanted_sum, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated_activation_matches_definition(ops, kind, dtype, torch_rng):
    """Each kind by its formula; x is left as it was."""
    x = torch.randn(4, 14, generator=torch_rng).to(dtype)
    before = x.clone()
    gate, up = x.double()[:, :7], x.double()[:, 7:]
    activated = {
        "silu": gate / (1 + torch.exp(-gate)),
        "gelu": gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))),
        "gelu_tanh": gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))),
    }[kind]  # fmt: skip
    assert_rounds(ops.gated_activation(x, kind), activated * up, ulps=4)
    assert torch.equal(x, before)


def test_gated_activation_of_unknown_kind_names_the_known_ones(ops):
    """A misspelt activation is an error, not a silent identity."""
    with pytest.raises(ValueError, match="gelu_tanh"):
        ops.gated_activation(torch.zeros(1, 2), "swish")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_rotary_turns_pairs_and_leaves_the_rest(ops, is_interleaved, dtype, torch_rng):
    """Complex rotation of each pair; features past 2F and other columns of a fused tensor stay."""
    F, D = 3, 8
    fused = torch.randn(4, 5, D, generator=torch_rng).to(dtype)
    before = fused.clone()
    angles = torch.rand(4, F, generator=torch_rng) * 6
    q, k = fused[:, :3], fused[:, 3:4]
    ops.rotary(q, k, angles.cos(), angles.sin(), is_interleaved=is_interleaved)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)
    for t in range(4):
        for h in range(4):
            for i in range(F):
                a, b = (2 * i, 2 * i + 1) if is_interleaved else (i, i + F)
                z = complex(before[t, h, a], before[t, h, b]) * complex(turn[t, i])
                got = torch.stack((fused[t, h, a], fused[t, h, b]))
                assert_rounds(got, torch.tensor([z.real, z.imag], dtype=torch.float64), ulps=4)
    assert torch.equal(fused[..., 2 * F :], before[..., 2 * F :])
    assert torch.equal(fused[:, 4], before[:, 4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_and_embedding_match_definition(ops, dtype, torch_rng):
    """Products accumulate in float32 and round once."""
    x, weight, bias = (
        torch.randn(*s, generator=torch_rng).to(dtype) for s in ((5, 64), (7, 64), (7,))
    )
    packed = ops.pack_linear(weight, bias)
    assert (packed.num_inputs, packed.num_outputs, packed.dtype) == (64, 7, str(dtype)[6:])
    wanted = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(
        ops.linear(x, packed).double(), wanted, rtol=EPSILON[dtype], atol=64 * 2.0**-20
    )
    ids = torch.tensor([6, 0, 6])
    assert torch.equal(ops.embedding(ids, weight), weight[[6, 0, 6]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap_stays_inside_the_cap(ops, dtype, torch_rng):
    """The value is cap * tanh(x / cap), in place."""
    x = (torch.randn(3, 9, generator=torch_rng) * 40).to(dtype)
    wanted = 30 * torch.tanh(x.double() / 30)
    ops.soft_cap(x, 30.0)
    assert_rounds(x, wanted, ulps=2)


def test_apply_penalties_follows_the_order_of_the_contract(ops):
    """Repetition by sign, then frequency by count, then presence of output alone."""
    logits = torch.tensor([[2.0, -2.0, 1.0], [4.0, 0.0, 3.0]])
    rows, ids = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    counts = torch.tensor([3.0, 0.0, 1.0])
    options = torch.tensor([[2.0, 0.25, 0.5], [1.5, 0.0, 1.0]])
    ops.apply_penalties(logits, rows, ids, counts, options)
    assert logits.tolist() == [[2 / 2 - 0.75 - 0.5, -4.0, 1.0], [4.0, 0.0, 1.0]]


def test_add_bias_and_keep_only_touch_only_their_entries(ops):
    """A bias adds, minus infinity forbids, keep_only leaves the listed tokens of its rows."""
    logits = torch.arange(12.0).view(3, 4)
    ops.add_bias(logits, torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([5.0, -math.inf]))
    assert logits[0].tolist() == [0, 6, 2, 3]
    ops.keep_only(logits, torch.tensor([2, 0]), torch.tensor([2, 2, 0]), torch.tensor([0, 1, 3]))
    inf = math.inf
    assert logits.tolist() == [[-inf, -inf, -inf, 3], [4, 5, 6, 7], [8, 9, -inf, -inf]]


# --- sampling -------------------------------------------------------------------------------------


def settings_of(rows: list[dict], vocab_size: int) -> SamplingTensors:
    """Sampling settings, one dict a row; what is missing is off."""

    def column(name: str, default: float, dtype=torch.float32) -> torch.Tensor:
        return torch.tensor([row.get(name, default) for row in rows], dtype=dtype)

    return SamplingTensors(
        temperature=column("temperature", 1.0),
        top_k=column("top_k", vocab_size, torch.int64),
        top_p=column("top_p", 1.0),
        min_p=column("min_p", 0.0),
        uniform=column("uniform", 0.5),
        is_all_greedy=all(row.get("temperature", 1.0) == 0 for row in rows),
        needs_filter=any(name in row for row in rows for name in ("top_k", "top_p", "min_p")),
    )


def kept_by_definition(logits: list[float], row: dict) -> dict[int, float]:
    """What may be sampled and its probability, by the docstring of the contract, in float64."""
    temperature = row.get("temperature", 1.0)
    top = max(logits)
    p = [math.exp((x - top) / temperature) for x in logits]
    p = [x / sum(p) for x in p]
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    k = min(row.get("top_k", len(p)), len(p))
    kept = [i for i in order if logits[i] >= logits[order[k - 1]]]
    mass, nucleus = sum(p[i] for i in kept), []
    running = 0.0
    for i in kept:
        if running < row.get("top_p", 1.0) * mass or row.get("top_p", 1.0) >= 1:
            nucleus.append(i)
        running += p[i]
    return {i: p[i] for i in sorted(nucleus) if p[i] >= row.get("min_p", 0.0) * p[order[0]]}


def sampled_by_definition(logits: list[float], row: dict) -> int:
    if row.get("temperature", 1.0) == 0:
        return logits.index(max(logits))
    kept = kept_by_definition(logits, row)
    total, running = sum(kept.values()), 0.0
    for i, p in kept.items():
        running += p
        if running > row.get("uniform", 0.5) * total:
            return i
    return max(i for i, p in kept.items() if p > 0)


ROWS = st.fixed_dictionaries(
    {"uniform": st.sampled_from([0.0, 0.013, 0.31, 0.573, 0.87, 0.9993])},
    optional={
        "temperature": st.sampled_from([0.0, 0.37, 1.0, 1.9]),
        "top_k": st.sampled_from([1, 2, 5, 40]),
        "top_p": st.sampled_from([0.07, 0.513, 0.9171]),
        "min_p": st.sampled_from([0.0513, 0.317]),
    },
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=6), seed=st.integers(0, 99), grid=st.booleans())
def test_sample_matches_the_docstring_in_float64(rows, seed, grid):
    """Mixed rows, with ties and with forbidden tokens, draw what the definition draws."""
    vocab_size = 300
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), vocab_size, generator=rng) * 2
    if grid:  # Many ties.
        logits = logits.round()
    logits[:, ::7] = -math.inf
    wanted = [sampled_by_definition(row.tolist(), r) for row, r in zip(logits, rows, strict=True)]
    got = ReferenceOps().sample(logits.clone(), settings_of(rows, vocab_size))
    assert got.dtype == torch.int64
    assert got.tolist() == wanted


def test_sample_greedy_tie_takes_lowest_id(ops):
    """On ties the lowest id, wherever the vector lanes and threads of the reduction end."""
    logits = torch.zeros(4, 70_001)
    for row, ids in enumerate(([69_999, 70_000], [31, 32, 33], [15, 50_000], [0, 70_000])):
        logits[row, ids] = 1.0
    wanted = [69_999, 31, 15, 0]
    assert (
        ops.sample(logits.clone(), settings_of([{"temperature": 0.0}] * 4, 70_001)).tolist()
        == wanted
    )
    mixed = settings_of([{"temperature": 0.0}] * 3 + [{"top_k": 1, "uniform": 0.0}], 70_001)
    assert ops.sample(logits.clone(), mixed).tolist() == wanted


def test_sample_does_not_depend_on_the_rest_of_the_batch(ops, torch_rng):
    """A row draws the same token alone and among others."""
    logits = torch.randn(8, 5000, generator=torch_rng)
    rows = [{"uniform": i / 8, "top_p": 0.9, "temperature": 0.2 + i} for i in range(8)]
    together = ops.sample(logits.clone(), settings_of(rows, 5000)).tolist()
    alone = [
        ops.sample(logits[i : i + 1].clone(), settings_of([rows[i]], 5000)).item() for i in range(8)
    ]
    assert together == alone


def test_sample_over_a_large_vocabulary_follows_the_distribution(ops):
    """A uniform grid of numbers meets each of equally likely tokens in the order of ids."""
    vocab_size, num_rows = 100_003, 16
    uniform = (torch.arange(num_rows) + 0.5) / num_rows
    rows = [{"uniform": u} for u in uniform.tolist()]
    got = ops.sample(torch.zeros(num_rows, vocab_size), settings_of(rows, vocab_size))
    assert (got - (uniform.double() * vocab_size).floor()).abs().max() <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), grid=st.booleans(), num_top=st.sampled_from([0, 1, 5, 80]))
def test_logprobs_match_a_full_sort(seed, grid, num_top):
    """Values by log_softmax in float64, ranks shared by ties, the best by lowest id; logits stay."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 80, generator=rng)
    if grid:
        logits = logits.round()
    ids = torch.randint(80, (3,), generator=rng)
    before = logits.clone()
    got = ReferenceOps().logprobs(logits, ids, num_top)
    assert torch.equal(logits, before)
    reference = logits.double().log_softmax(-1)
    for r in range(3):
        row = logits[r].tolist()
        order = sorted(range(80), key=lambda i: (-row[i], i))[:num_top]
        assert got.top_ids[r].tolist() == order
        torch.testing.assert_close(
            got.top_logprobs[r].double(), reference[r, order], rtol=1e-5, atol=1e-5
        )
        assert got.ranks[r] == 1 + sum(x > row[ids[r]] for x in row)
        torch.testing.assert_close(
            got.selected[r].double(), reference[r, ids[r]], rtol=1e-5, atol=1e-5
        )
