"""Prompts over a latent: expanded they are what they are absorbed, and the cache is the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from paged_runs import PagedRun, RunningRequest, load_tiny, make_worker_config  # noqa: E402
from tiny_models import make_tiny_model  # noqa: E402

from quire.backends.reference import TorchDevice  # noqa: E402
from quire.core.interface import (  # noqa: E402
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    DeviceInfo,
)
from quire.core.models.decoder_spec import LatentSpec  # noqa: E402
from quire.core.models.latent_attention import LatentAttention, LatentWeights  # noqa: E402
from quire.core.models.latent_prompts import (  # noqa: E402
    MixedPlan,
    PromptExpansion,
    expand_prompts,
    is_worth_expanding,
)
from quire.core.models.loading import load_model  # noqa: E402

SIZES = LatentSpec(kv_rank=24, q_rank=None, plain_size=8, rotary_size=4, value_size=6)
HIDDEN, BLOCK_SIZE, NUM_BLOCKS = 20, 8, 64


def make_device(**claims: object) -> TorchDevice:
    """The reference, with rows of its cache written and read apart from attention."""
    capabilities = Capabilities(
        attention_kinds=frozenset({"causal", "mla"}),
        **{"features": frozenset({"moe", "cache_rows"}), **claims},
    )
    return TorchDevice(info=DeviceInfo(index=0, name="host"), capabilities=capabilities)


@dataclass
class _Decoder:
    """What `LatentAttention` reads of a decoder."""

    num_heads: int
    latent: LatentSpec = SIZES
    norm_eps: float = 1e-6
    is_rope_interleaved: bool = False


class Layer:
    """One layer with random weights, and its cache, in one form or in both."""

    def __init__(self, num_heads: int, cache_dtype: str, *, has_both: bool) -> None:
        device = make_device()
        ops, make = device.ops(), torch.Generator().manual_seed(3)
        spec = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=1,
            head_size=SIZES.cached_size,
            v_head_size=SIZES.kv_rank,
            scale=0.3,
            dtype="float32",
            cache_dtype=cache_dtype,
            block_size=BLOCK_SIZE,
            kind="mla",
        )
        self.backend = device.attention(spec)
        if has_both:
            self.backend = expand_prompts(
                self.backend, SIZES, device, max_step_tokens=96, max_model_len=64
            )
        width = SIZES.plain_size + SIZES.value_size
        kv_up = torch.randn((num_heads, width, SIZES.kv_rank), generator=make) / 5
        query_size = num_heads * (SIZES.plain_size + SIZES.rotary_size)
        weights = LatentWeights(
            q_down=None,
            q_norm=None,
            q_up=ops.pack_linear(torch.randn((query_size, HIDDEN), generator=make), None),
            kv_down=ops.pack_linear(torch.randn((SIZES.cached_size, HIDDEN), generator=make), None),
            kv_norm=torch.ones(SIZES.kv_rank),
            key_up=kv_up[:, : SIZES.plain_size].mT.contiguous(),
            value_up=kv_up[:, SIZES.plain_size :].contiguous(),
            heads_up=self._heads_up(kv_up, ops),
        )
        self.attention = LatentAttention(_Decoder(num_heads), weights, ops, self.backend)
        self.num_heads = num_heads
        self.cache = self.backend.allocate(NUM_BLOCKS)
        for tensor in self.cache.tensors.values():
            tensor.zero_()

    def _heads_up(self, kv_up, ops):
        if not isinstance(self.backend, PromptExpansion):
            return ()
        count = self.backend.heads.spec.num_heads
        return tuple(ops.pack_linear(g.flatten(0, 1), None) for g in torch.split(kv_up, count))

    def run(self, batch: AttentionBatch, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """All heads' values, and whether any request was expanded."""
        plan = self.backend.plan(batch)
        angle = torch.arange(len(x)).float().unsqueeze(-1) * torch.tensor([[1.0, 0.1]])
        out = torch.empty((len(x), self.num_heads, SIZES.kv_rank))
        values = self.attention(x, (angle.cos(), angle.sin()), self.cache, plan, out)
        return values, isinstance(plan, MixedPlan)


def make_batch(spans: list[tuple[int, int]], num_padded: int = 0) -> AttentionBatch:
    """Requests that compute tokens [begin, end), each in eight blocks of its own, last ones first."""
    counts = [end - begin for begin, end in spans]
    starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
    blocks = [[NUM_BLOCKS - 1 - 8 * r - block for block in range(8)] for r in range(len(spans))]
    slots = [
        blocks[r][t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE
        for r, span in enumerate(spans)
        for t in range(*span)
    ]
    return AttentionBatch(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([end for _, end in spans], dtype=torch.int32),
        block_table=torch.tensor(blocks, dtype=torch.int32),
        slot_mapping=torch.tensor(slots + [0] * num_padded),
        query_start_loc_host=starts,
        seq_lens_host=[end for _, end in spans],
        num_requests=len(spans),
        num_tokens=starts[-1] + num_padded,
        max_query_len=max(counts),
        max_seq_len=max(end for _, end in spans),
    )


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(
        st.lists(st.integers(1, 60), min_size=1, max_size=3, unique=True).map(sorted),
        min_size=1,
        max_size=5,
    ),
    num_heads=st.sampled_from([1, 3, 16, 34]),
    cache_dtype=st.sampled_from(["float32", "int8"]),
)
def test_expanded_prompts_are_what_absorbed_ones_are(cuts, num_heads, cache_dtype) -> None:
    """Whatever chunks prompts come in, beside whatever others, both forms give the same values."""
    absorbed = Layer(num_heads, cache_dtype, has_both=False)
    mixed = Layer(num_heads, cache_dtype, has_both=True)
    make = torch.Generator().manual_seed(5)
    for index in range(max(len(ends) for ends in cuts)):
        spans = [
            ([0, *ends][index], ends[index]) if index < len(ends) else (ends[-1], ends[-1] + 1)
            for ends in cuts
        ]
        batch = make_batch(spans)
        x = torch.randn((batch.num_tokens, HIDDEN), generator=make)
        wanted, _ = absorbed.run(batch, x.clone())
        found, _ = mixed.run(batch, x.clone())
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)
        for name, tensor in absorbed.cache.tensors.items():
            assert torch.equal(mixed.cache.tensors[name], tensor), name
        cuts = [[*ends, ends[-1] + 1] if index >= len(ends) else ends for ends in cuts]


def test_steps_mix_both_forms_and_leave_padding_alone() -> None:
    """A prompt, a chunk too short, a decoded token and rows of nobody: each is told apart."""
    spans = [(0, 40), (20, 24), (30, 31), (32, 56)]
    absorbed, mixed = (Layer(6, "float32", has_both=both) for both in (False, True))
    before = make_batch([(0, 1), (0, 20), (0, 30), (0, 32)])
    x = torch.randn((before.num_tokens, HIDDEN), generator=torch.Generator().manual_seed(1))
    for layer in (absorbed, mixed):
        layer.run(before, x.clone())
    batch = make_batch(spans, num_padded=3)
    x = torch.randn((batch.num_tokens, HIDDEN), generator=torch.Generator().manual_seed(2))
    plan = mixed.backend.plan(batch)
    assert isinstance(plan, MixedPlan)
    assert plan.absorbed is not None
    assert plan.absorbed.rows.tolist() == [40, 41, 42, 43, 44]
    wanted, _ = absorbed.run(batch, x.clone())
    found, is_mixed = mixed.run(batch, x.clone())
    assert is_mixed
    torch.testing.assert_close(found[:-3], wanted[:-3], rtol=2e-4, atol=2e-4)
    assert not found[-3:].any()


def test_contexts_beyond_the_scratch_stay_with_the_latent() -> None:
    """Keys and values of all heads are never held of more tokens than was said."""
    layer = Layer(4, "float32", has_both=True)
    plan = layer.backend.plan(make_batch([(0, 60), (0, 60)]))
    assert isinstance(plan, MixedPlan)
    assert plan.absorbed is not None
    assert plan.absorbed.rows.tolist() == list(range(60, 120))


def _multiplications(num_new: int, num_before: int, *, is_expanded: bool) -> int:
    """Of one head, pair by pair and token by token."""
    made = SIZES.plain_size + SIZES.value_size
    pairs = sum(num_before + index + 1 for index in range(num_new))
    if is_expanded:
        projected = (num_before + num_new) * SIZES.kv_rank * made
        return projected + pairs * (made + SIZES.rotary_size)
    return num_new * SIZES.kv_rank * made + pairs * (2 * SIZES.kv_rank + SIZES.rotary_size)


@given(num_new=st.integers(16, 300), num_before=st.integers(0, 3000))
def test_prompts_are_expanded_where_that_is_less_work(num_new: int, num_before: int) -> None:
    """The border is where the two forms multiply as often, counted out."""
    expanded = _multiplications(num_new, num_before, is_expanded=True)
    absorbed = _multiplications(num_new, num_before, is_expanded=False)
    assert is_worth_expanding(SIZES, num_new, num_before) == (expanded < absorbed)


def test_decoded_tokens_are_never_expanded() -> None:
    """A step without prompts has the device's own plan, which may be recorded."""
    layer = Layer(4, "float32", has_both=True)
    assert not isinstance(layer.backend.plan(make_batch([(5, 6), (9, 10)])), MixedPlan)


@pytest.mark.parametrize(
    "claims",
    [
        {"features": frozenset({"moe"})},
        {"token_buckets": (64, 128)},
        {"head_sizes": (28,), "features": frozenset({"moe"})},
    ],
    ids=["no-rows", "buckets", "neither"],
)
def test_devices_that_cannot_expand_keep_the_latent(claims) -> None:
    """Without rows of the cache, or with steps of few shapes, prompts are computed as tokens are."""
    device = make_device(**claims)
    spec = replace(Layer(2, "float32", has_both=False).backend.spec)
    latent = device.attention(spec)
    same = expand_prompts(latent, SIZES, device, max_step_tokens=64, max_model_len=64)
    assert same is latent


def test_a_loaded_model_gives_the_logits_of_its_absorbed_self(tmp_path) -> None:
    """A whole model, and one that must be deterministic and so never expands."""
    directory = make_tiny_model("deepseek-v3", tmp_path, with_tokenizer=False)
    config = make_worker_config(directory)
    expanding = load_model(config, make_device())
    plain = load_tiny(directory, deterministic=True)
    assert isinstance(expanding.attention_backends[0], PromptExpansion)
    held = load_model(make_worker_config(directory, deterministic=True), make_device())
    assert not isinstance(held.attention_backends[0], PromptExpansion)
    assert expanding.weight_bytes > held.weight_bytes
    prompts = [[5 + (7 * i) % 90 for i in range(n)] for n in (50, 33)]
    logits = [_logits(model, prompts) for model in (expanding, plain)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def _logits(model, prompts):
    run = PagedRun(model)
    requests = [RunningRequest(list(prompt)) for prompt in prompts]
    with torch.inference_mode():
        return torch.cat(
            [
                run.step([(requests[0], 20)]),
                run.step([(requests[0], 29), (requests[1], 32)]),
                run.step([(requests[0], 1), (requests[1], 1)]),
            ]
        )
