"""The suite is itself tested: broken backends are caught, and told what is wrong with them."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from saboteurs import (
    SABOTEURS,
    SoftwareGraphs,
    make_device,
    open_scaled,
    opener_of,
    with_graphs,
)

from quire.conformance.cases import all_cases, extension_cases
from quire.conformance.numerics import TOLERANCES
from quire.conformance.oracles import ORACLES
from quire.conformance.ranks import RankGroups
from quire.conformance.recipes import RECIPES
from quire.conformance.trial import run_case
from quire.core.interface import OP_SPECS

CASES = {case.id: case for case in (*all_cases(), *extension_cases())}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(processes of several ranks, the file that names their communicator)."""
    chosen = tmp_path_factory.mktemp("ranks") / "communicator"
    groups = RankGroups(opener_of(chosen))
    yield groups, chosen
    groups.close()


def run(case_id, device, directory, ranks, seed=11, communicator="GlooCommunicator"):
    groups, chosen = ranks
    chosen.write_text(communicator)
    return run_case(
        CASES[case_id],
        device,
        backend=None,
        seed=seed,
        directory=directory,
        rank_groups=groups,
    )


def honest_device(case_id):
    """The reference, with the claims that the case needs."""
    if "l4_scale" in case_id:
        return open_scaled(0)
    if "graphs" in case_id:
        return with_graphs(SoftwareGraphs)
    return make_device(determinism="none") if "batch" in case_id else make_device()


@pytest.mark.parametrize("saboteur", SABOTEURS, ids=lambda saboteur: saboteur.name)
def test_suite_broken_backend_is_caught_and_told_what_is_wrong(saboteur, directory, ranks):
    """A stranger reads in one message what his backend does wrong."""
    device = saboteur.device()
    outcome = run(saboteur.test, device, directory, ranks, communicator=saboteur.communicator)
    assert outcome.outcome == "failed", (saboteur.name, outcome.worst)
    assert saboteur.words in outcome.reason, outcome.reason


@pytest.mark.parametrize("case_id", sorted({saboteur.test for saboteur in SABOTEURS}))
def test_suite_honest_backend_passes_what_catches_the_others(case_id, directory, ranks):
    """The tests that catch saboteurs do not catch the honest."""
    device = honest_device(case_id)
    for seed in (11, 12):
        outcome = run(case_id, device, directory, ranks, seed)
        assert outcome.outcome in {"passed", "unsupported"}, (outcome.reason, outcome.details)


@pytest.mark.parametrize(
    "spec", [spec for spec in OP_SPECS if not spec.extension], ids=lambda spec: spec.name
)
def test_specification_every_operator_has_an_oracle_a_tolerance_and_a_saboteur(spec):
    """Nobody adds an operator that the suite does not hold."""
    assert spec.oracle in ORACLES
    assert spec.tolerance in TOLERANCES
    assert spec.name in RECIPES or spec.name in {"sample", "paged_attention"}
    assert any(CASES[saboteur.test].op == spec.name for saboteur in SABOTEURS)


def test_manifest_ids_are_unique_and_stable():
    """Ids are what expectations name: the count of each file is a decision, not an accident."""
    ids = [case.id for case in all_cases()]
    assert len(set(ids)) == len(ids)
    assert ids == [case.id for case in all_cases()]
    assert "test_l1_attention.py::test_mixed_batch[gqa2-d128-b16-bfloat16]" in ids
