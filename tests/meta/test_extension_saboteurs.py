"""Extensions are held as the levels are: oracles against other people's, broken backends caught."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from extension_saboteurs import CLAIMS, EXTENSION_SABOTEURS
from saboteurs import make_device

from quire.conformance.cases import extension_cases
from quire.conformance.extension_recipes import EXTENSION_RECIPES
from quire.conformance.oracles import experts, recurrence
from quire.conformance.trial import run_case
from quire.core.interface import OP_SPECS, RoutingSpec

CASES = {case.id: case for case in extension_cases()}


def run(case_id, device, directory, seed=11):
    return run_case(CASES[case_id], device, backend=None, seed=seed, directory=directory)


@pytest.mark.parametrize("saboteur", EXTENSION_SABOTEURS, ids=lambda saboteur: saboteur.name)
def test_extension_broken_backend_is_caught_and_told_what_is_wrong(saboteur, tmp_path):
    """A stranger reads in one message what his backend does wrong; the honest one passes."""
    outcome = run(saboteur.test, saboteur.device(), tmp_path)
    assert outcome.outcome == "failed", (saboteur.name, outcome.worst)
    assert saboteur.words in outcome.reason, outcome.reason
    for seed in (11, 12):
        honest = run(saboteur.test, make_device(**CLAIMS), tmp_path, seed)
        assert honest.outcome == "passed", (honest.reason, honest.details)


def test_every_operator_of_an_extension_has_a_recipe_and_a_saboteur():
    """Nobody adds an operator to an extension that the suite does not hold."""
    names = {
        spec.name
        for spec in OP_SPECS
        if spec.extension in {"lora", "mla", "moe", "recurrent", "quantization"}
    }
    assert names == set(EXTENSION_RECIPES)
    assert names <= {CASES[saboteur.test].op for saboteur in EXTENSION_SABOTEURS}


def test_route_equals_deepseek_of_transformers():
    """Groups, bias, renormalisation and scale, in the order of the report."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=8, n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2
    )
    router = DeepseekV3TopkRouter(config).double()
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.2)
    x = torch.randn(11, 8, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        logits, weights, ids = router(x)
    spec = RoutingSpec(
        num_experts=16,
        num_chosen=3,
        score="sigmoid",
        is_renormalised=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        num_groups=4,
        num_kept_groups=2,
        group_score="top2",
    )
    ours = experts.route(logits.double().numpy(), spec, router.e_score_correction_bias.numpy())
    theirs = torch.zeros(11, 16).double().scatter(-1, ids, weights.double())
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-7)


def test_experts_equal_gpt_oss_of_transformers():
    """The clamped activation, its biases and its weights."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    module = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=4))
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 8).double()
    ids = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2], [3, 1]])
    weights = torch.rand(5, 2).double()
    with torch.no_grad():
        theirs = module(x, ids, weights)
    # Theirs lie transposed, with gate and up in turn.
    gate_up = module.gate_up_proj.detach().mT
    gate_up = torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), dim=1).numpy()
    bias = module.gate_up_proj_bias.detach()
    bias = torch.cat((bias[:, ::2], bias[:, 1::2]), dim=1).numpy()
    ours = experts.experts(
        x.numpy(),
        gate_up,
        module.down_proj.detach().mT.numpy(),
        (bias, module.down_proj_bias.detach().numpy()),
        weights.numpy(),
        ids.numpy(),
        experts.gated("clamped_swiglu"),
        lambda y: y,
        weighs_input=False,
    )
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-8)


def test_delta_rule_equals_transformers():
    """Decay, recall, write, and the state after the last token."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    rng = np.random.default_rng(2)
    q, k = (rng.standard_normal((9, 2, 8)) * 0.3 for _ in range(2))
    v = rng.standard_normal((9, 4, 6))
    decay, beta = -rng.uniform(0.1, 1, (9, 4)), rng.uniform(0.1, 1, (9, 4))
    before = rng.standard_normal((1, 4, 8, 6))
    batched = [torch.from_numpy(x).float()[None] for x in (q, k, v, decay, beta)]
    theirs, after = torch_chunk_gated_delta_rule(
        *batched, initial_state=torch.from_numpy(before).float(), output_final_state=True
    )
    ours, states = recurrence.gated_delta_rule(q * 8**-0.5, k, v, decay, beta, before, (0, 9))
    np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(states, after.numpy(), rtol=1e-4, atol=1e-5)
