"""Libraries of attention, stood in for by their documented calls, against the reference.

The stand-ins compute slowly from nothing but the arguments that each library documents, and refuse
any other: what is shown is that the libraries are called rightly, not that they are right. None has
run on hardware here.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from quire.backends.reference import ReferenceAttention
from quire.backends.torch_accelerator.providers import PROVIDERS
from quire.core.interface import AttentionBatch, AttentionSpec, Reason, WorkerConfig

MIX = [(1, 37), (5, 5), (1, 1), (17, 40), (1, 60)]
"""(new tokens, context with them)."""


def attend(q, k, v, *, scale, left, cap=0.0, slopes=None):
    """Queries [n, H, D] are the last of the keys [m, Hk, D]; float32, by rows."""
    num_new, length = len(q), len(k)
    group = q.shape[1] // k.shape[1]
    keys, values = (part.float().repeat_interleave(group, 1) for part in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    place = torch.arange(length - num_new, length).unsqueeze(1)
    seen = torch.arange(length)
    if slopes is not None:
        scores = scores - slopes.view(-1, 1, 1) * (place - seen)
    visible = seen <= place
    if left >= 0:
        visible &= seen >= place - left
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)


def attend_pages(q, k_cache, v_cache, starts, lengths, table, **settings):
    """Request by request; every entry of `table` must name a page that is there."""
    assert int(table.min()) >= 0
    assert int(table.max()) < len(k_cache)
    out = torch.empty_like(q)
    for r, length in enumerate(lengths):
        k, v = (cache[table[r].long()].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        rows = slice(int(starts[r]), int(starts[r + 1]))
        out[rows] = attend(q[rows], k, v, **settings)
    return out


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """The signature of FlashAttention 2.8."""
    assert causal
    assert k.shape[1] % 256 == 0, "pages are multiples of 256"
    lengths = torch.diff(cu_seqlens_k).tolist()
    assert max(lengths) <= max_seqlen_k
    assert int(torch.diff(cu_seqlens_q).max()) <= max_seqlen_q
    return attend_pages(
        q, k, v, cu_seqlens_q, lengths, block_table, scale=softmax_scale, left=window_size[0],
        cap=softcap, slopes=alibi_slopes,
    )  # fmt: skip


def aiter_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, min_seqlen_q=0,
    dropout_p=0.0, softmax_scale=None, logits_soft_cap=0.0, causal=False, window_size=(-1, -1),
    bias=None, alibi_slopes=None, deterministic=False, return_lse=False, return_attn_probs=False,
    block_table=None, out=None,
):  # fmt: skip
    """AITER's, which names its soft cap otherwise and asks for no pages of 256."""
    assert causal
    return attend_pages(
        q, k, v, cu_seqlens_q, torch.diff(cu_seqlens_k).tolist(), block_table,
        scale=softmax_scale, left=window_size[0], cap=logits_soft_cap, slopes=alibi_slopes,
    )  # fmt: skip


class PagedWrapper:
    """FlashInfer's wrapper: `plan` for a step, `run` for its layers."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert kv_layout == "NHD"
        assert float_workspace_buffer.dtype == torch.uint8

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, *, causal=False, sm_scale=None, window_left=-1,
        logits_soft_cap=0.0, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert causal
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        pages = torch.diff(paged_kv_indptr)
        assert len(paged_kv_indices) == int(pages.sum())
        self.lengths = ((pages - 1) * page_size + paged_kv_last_page_len).tolist()
        self.starts, self.begins, self.pages = qo_indptr, paged_kv_indptr, paged_kv_indices
        self.settings = {"scale": sm_scale, "left": window_left, "cap": logits_soft_cap}

    def run(self, q, paged_kv_cache, *, out=None):
        k_cache, v_cache = paged_kv_cache
        assert (q.shape[1], k_cache.shape[2], q.shape[2], k_cache.shape[1]) == self.shape
        for r, length in enumerate(self.lengths):
            ids = self.pages[int(self.begins[r]) : int(self.begins[r + 1])].long()
            k, v = (cache[ids].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
            rows = slice(int(self.starts[r]), int(self.starts[r + 1]))
            out[rows] = attend(q[rows], k, v, **self.settings)
        return out


def ipex_varlen(
    output, query, k_cache, v_cache, cu_seq_lens_q, cu_seq_lens_kv, max_seq_len_q, max_seq_len_kv,
    scale, is_causal, block_table, alibi_slopes,
):  # fmt: skip
    assert is_causal
    assert alibi_slopes is None
    lengths = torch.diff(cu_seq_lens_kv).tolist()
    output.copy_(
        attend_pages(
            query, k_cache, v_cache, cu_seq_lens_q, lengths, block_table, scale=scale, left=-1
        )
    )


def ipex_rms_norm(hidden_states, weight, eps):
    assert hidden_states.dtype == weight.dtype
    wide = hidden_states.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(hidden_states.dtype)


def ipex_add_rms_norm(add, x, weight, bias, eps, add_back):
    assert bias is None
    total = add + x
    if add_back:
        add.copy_(total)
    return ipex_rms_norm(total, weight, eps)


def ipex_silu_mul(x, y, out=None):
    return out.copy_(torch.nn.functional.silu(x.float()) * y.float())


def ipex_gelu_mul(x, y, out=None, approximate="none"):
    return out.copy_(torch.nn.functional.gelu(x.float(), approximate=approximate) * y.float())


@pytest.fixture
def libraries(monkeypatch):
    """All four, as far as they are called."""

    def stand_in(name, **members):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    stand_in("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    stand_in("aiter", flash_attn_varlen_func=aiter_varlen)
    stand_in("flashinfer", BatchPrefillWithPagedKVCacheWrapper=PagedWrapper)
    paged = SimpleNamespace(flash_attn_varlen_func=ipex_varlen)
    functional = SimpleNamespace(
        rms_norm=ipex_rms_norm,
        add_rms_norm=ipex_add_rms_norm,
        silu_mul=ipex_silu_mul,
        gelu_mul=ipex_gelu_mul,
    )
    llm = SimpleNamespace(modules=SimpleNamespace(PagedAttention=paged), functional=functional)
    stand_in("intel_extension_for_pytorch", llm=llm)


def make_spec(block_size, **changes):
    settings = {
        "num_heads": 4, "num_kv_heads": 2, "head_size": 32, "v_head_size": 32, "scale": 0.2,
        "dtype": "bfloat16", "cache_dtype": "bfloat16", "block_size": block_size, **changes,
    }  # fmt: skip
    return AttentionSpec(**settings)


def make_batch(spec, num_rows):
    """MIX, with undefined entries behind every request's blocks; rows past the last are padding."""
    size, at, table = spec.block_size, 1, []
    for _, length in MIX:
        count = -(-length // size)
        table.append([*range(at, at + count), *[99999] * (8 - count)])
        at += count
    starts, slots = [0], []
    for (new, length), blocks in zip(MIX, table, strict=True):
        starts.append(starts[-1] + new)
        slots += [blocks[t // size] * size + t % size for t in range(length - new, length)]
    slots += [0] * (num_rows - len(slots))
    lengths = [length for _, length in MIX]
    batch = AttentionBatch(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.tensor(table, dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        query_start_loc_host=starts,
        seq_lens_host=lengths,
        num_requests=len(MIX),
        num_tokens=starts[-1],
        max_query_len=max(new for new, _ in MIX),
        max_seq_len=max(lengths),
    )
    return batch, at


CASES = [
    *((provider.name, {}) for provider in PROVIDERS),
    *((name, {"kind": "sliding_window", "window": 9}) for name in ("flash_attn", "flashinfer")),
    ("aiter", {"kind": "sliding_window", "window": 20}),
    *((name, {"soft_cap": 3.0}) for name in ("flash_attn", "flashinfer", "aiter")),
    *((name, {"has_alibi": True}) for name in ("flash_attn", "aiter")),
]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_provider_gives_what_the_reference_gives(launcher, libraries, name, changes):
    """Decoding, chunks and fresh prompts in one step, in blocks that hold other things too."""
    chosen = next(provider for provider in PROVIDERS if provider.name == name).load()
    spec = make_spec(max(chosen.block_step, 16), **changes)
    assert chosen.reasons_against(spec) == []
    backend, oracle = chosen(spec, "cpu", launcher), ReferenceAttention(spec)
    num_rows = sum(new for new, _ in MIX) + 3
    batch, num_blocks = make_batch(spec, num_rows)
    torch.manual_seed(3)
    past = torch.randn(num_blocks, spec.block_size, 2, 64)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05]) if spec.has_alibi else None
    q = torch.randn(num_rows, 4, 32).bfloat16()
    k, v = (torch.randn(num_rows, 2, 32).bfloat16() for _ in range(2))
    answers = []
    for attention in (backend, oracle):
        cache = attention.allocate(num_blocks)
        attention.import_blocks(cache, range(num_blocks), past)
        out = torch.full((num_rows, 4, 32), float("nan"), dtype=torch.bfloat16)
        plan = attention.plan(batch)
        answers.append(attention.forward(q, k, v, cache, plan, out, alibi_slopes=slopes))
    assert backend.provider() == name
    torch.testing.assert_close(answers[0].float(), answers[1].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"has_sinks": True}, "sinks"),
        ({"cache_dtype": "int8"}, "int8"),
        ({"head_size": 36, "v_head_size": 36}, "36"),
        ({"kind": "chunked", "window": 32}, "chunked"),
        ({"dtype": "float32", "cache_dtype": "float32"}, "float32"),
    ],
)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_provider_says_what_it_cannot_do(libraries, provider, changes, word):
    """What a library lacks is refused with a way out, never computed wrongly."""
    chosen = provider.load()
    reasons = chosen.reasons_against(make_spec(max(chosen.block_step, 16), **changes))
    assert any(word in reason.need for reason in reasons)
    assert all(reason.remedy for reason in reasons)


def test_asked_for_and_not_there_is_refused_with_the_way_to_get_it(monkeypatch):
    """Nobody runs for a week on another attention than he asked for."""
    from quire.backends.torch_accelerator.providers import catalog

    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    missing = catalog.find_provider("cuda", "flashinfer")
    assert isinstance(missing, Reason)
    assert "pip install flashinfer-python" in missing.remedy
    strange = catalog.find_provider("xpu", "flash_attn")
    assert isinstance(strange, Reason)
    assert strange.have == "triton, ipex"


def worker_config(options):
    return WorkerConfig(
        model="m", dtype="bfloat16", cache_dtype="bfloat16", block_size=16, max_model_len=64,
        max_num_seqs=2, max_num_batched_tokens=64, device_memory_fraction=0.5, options=options,
    )  # fmt: skip


def test_device_takes_the_attention_that_was_asked_for(libraries):
    """The option reaches the layers, and steps are then not recorded: libraries plan on the host."""
    from quire.backends.cuda import CudaBackend

    device = CudaBackend().open(0)
    assert device.attention(make_spec(16)).provider().startswith("triton:")
    assert device.graphs() is not None
    config = worker_config({"cuda.attention": "flashinfer"})
    assert list(device.reasons_against(config)) == []
    assert device.make_worker(config) is None
    assert device.attention(make_spec(16)).provider() == "flashinfer"
    assert device.graphs() is None


def test_fused_operators_give_what_the_reference_gives(launcher, libraries):
    """Of the library where it takes the tensors, of ours where it does not: nobody sees which."""
    from quire.backends.reference import ReferenceOps
    from quire.backends.torch_accelerator.providers.ipex_ops import IpexOps

    ops, oracle = IpexOps(launcher, ""), ReferenceOps()
    torch.manual_seed(5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, weight, gates = torch.randn(5, 64), torch.randn(64), torch.randn(5, 128)
        x, weight, gates = x.to(dtype), weight.to(dtype), gates.to(dtype)
        pairs = [(each.rms_norm(x, weight, 1e-5)) for each in (ops, oracle)]
        torch.testing.assert_close(*pairs, rtol=2e-2, atol=2e-2)
        residuals = [torch.ones_like(x) for _ in range(2)]
        pairs = [
            each.add_rms_norm(x, residual, weight, 1e-5)
            for each, residual in zip((ops, oracle), residuals, strict=True)
        ]
        torch.testing.assert_close(*pairs, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(*residuals)
        for kind in ("silu", "gelu", "gelu_tanh"):
            pairs = [each.gated_activation(gates, kind) for each in (ops, oracle)]
            torch.testing.assert_close(*pairs, rtol=2e-2, atol=2e-2)
    assert ops.provider("add_rms_norm") == "ipex"
    assert ops.provider("rotary").startswith("triton:")


def test_device_takes_the_operators_that_were_asked_for(libraries):
    """By an option of their own; devices of other vendors have none to offer."""
    from quire.backends.cuda import CudaBackend
    from quire.backends.xpu import XpuBackend

    device = XpuBackend().open(0)
    assert device.ops().provider("rms_norm").startswith("triton:")
    device.make_worker(worker_config({"xpu.ops": "ipex"}))
    assert device.ops().provider("rms_norm") == "ipex"
    assert device.attention(make_spec(16)).provider().startswith("triton:")
    (reason,) = CudaBackend().open(0).reasons_against(worker_config({"cuda.ops": "ipex"}))
    assert (reason.code, reason.have) == ("options.cuda.ops", "triton")
