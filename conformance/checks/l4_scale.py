"""Level 4: collectives between real processes, each with its own opened device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.conformance import collectives
from quire.conformance.cases import Function, check, dtypes, product
from quire.conformance.ranks import RankAnswer, free_address
from quire.conformance.trial import Finding, Trial
from quire.core.interface import Capabilities

Array = npt.NDArray[Any]
_WORLDS = {f"world{n}": {"world": n} for n in (2, 3)}
_NUMBERS = {**dtypes("float32", "float16", "bfloat16"), "int64": {"number": "int64"}}
_SHAPES = ((1,), (7,), (33, 17), (1031,))


def _needs(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    limit = claims.max_tensor_parallel
    if arguments["world"] > limit:
        return f"max_tensor_parallel is {limit}: a group of {arguments['world']} is not claimed"
    return ""


def _scale(over: Mapping[str, Mapping[str, Any]]) -> Callable[[Function], Function]:
    return check(level=4, op="communicator", over=over, needs=_needs, on_torch=True)


def _answers(
    trial: Trial,
    size: int,
    function: Callable[..., object],
    arguments: Sequence[Mapping[str, Any]] | None = None,
    **common: Any,
) -> list[Any]:
    """What each rank answered. Raises: Finding if one raised, died or hung."""
    answers = _call(trial, size, function, arguments, **common)
    for rank, answer in enumerate(answers):
        if answer.error:
            raise Finding(
                f"{function.__name__} in a group of {size}: rank {rank} failed: {answer.error}. "
                "Every rank called the same collectives in the same order"
            )
    return [answer.value for answer in answers]


def _call(
    trial: Trial,
    size: int,
    function: Callable[..., object],
    arguments: Sequence[Mapping[str, Any]] | None,
    **common: Any,
) -> list[RankAnswer]:
    each = arguments or [{}] * size
    return trial.ranks.of_size(size).call(function, [{**one, **common} for one in each])


def _number_name(arguments: Mapping[str, Any]) -> str:
    return str(arguments.get("dtype") or arguments["number"])


def _values(trial: Trial, shape: tuple[int, ...], name: str) -> Array:
    """Random numbers that a dtype holds exactly; of one sign, so that no order of a sum cancels."""
    if name == "int64":
        return trial.rng.integers(-(1 << 40), 1 << 40, shape)
    values = torch.from_numpy(0.5 + np.abs(trial.rng.standard_normal(shape)))
    return np.asarray(values.to(getattr(torch, name)).double().numpy())


@_scale(_WORLDS)
def knows_its_place(trial: Trial, *, world: int) -> None:
    """Each rank knows its number and the size of its group."""
    places = _answers(trial, world, collectives.who_am_i, address=free_address(), world=world)
    expected = [(rank, world) for rank in range(world)]
    trial.require(places == expected, f"(rank, world_size) are {places}, not {expected}")


@_scale(product(_WORLDS, _NUMBERS))
def all_reduce(trial: Trial, *, world: int, **number: str) -> None:
    """The sum over all ranks, of odd sizes too, with the same bits on each rank."""
    name = _number_name(number)
    inputs = [[_values(trial, shape, name) for shape in _SHAPES] for _ in range(world)]
    sums = _answers(
        trial,
        world,
        collectives.all_reduce,
        [{"inputs": own} for own in inputs],
        address=free_address(),
        world=world,
        dtype=name,
    )
    for index, shape in enumerate(_SHAPES):
        own = [inputs[rank][index] for rank in range(world)]
        for rank in range(world):
            _hold_sum(trial, f"all_reduce of {shape} on rank {rank}", sums[rank][index], own, name)
            trial.require(
                np.array_equal(sums[rank][index], sums[0][index]),
                f"all_reduce of {shape} gave other bits on rank {rank} than on rank 0: ranks that "
                "round differently choose different tokens",
            )


def _hold_sum(trial: Trial, what: str, got: Array, parts: Sequence[Array], name: str) -> None:
    ref = sum(parts[1:], start=parts[0])
    if name == "int64":
        trial.require(np.array_equal(got, ref), f"{what} is not the exact sum over the ranks")
        return
    base = sum((part.astype(np.float32) for part in parts), start=np.float32(0))
    out = torch.from_numpy(got).to(getattr(torch, name))
    hint = "It is the sum over all ranks, each counted once"
    trial.measure(what, out, ref, np.asarray(base), tolerance="reduction", hint=hint)


@_scale(product(_WORLDS, _NUMBERS))
def all_gather(trial: Trial, *, world: int, **number: str) -> None:
    """The ranks' tensors joined along any dimension, in the order of the ranks."""
    name = _number_name(number)
    inputs = [_values(trial, (3, 5, 1), name) for _ in range(world)]
    gathered = _answers(
        trial,
        world,
        collectives.all_gather,
        [{"x": own} for own in inputs],
        address=free_address(),
        world=world,
        dtype=name,
    )
    for rank in range(world):
        for dim, got in zip((0, 1, 2, -1), gathered[rank], strict=True):
            trial.require(
                np.array_equal(got, np.concatenate(inputs, axis=dim)),
                f"all_gather along {dim} on rank {rank} (shape {got.shape}) is not the ranks' "
                "tensors joined bit for bit in the order of the ranks",
            )


@_scale(product(_WORLDS, _NUMBERS))
def broadcast(trial: Trial, *, world: int, **number: str) -> None:
    """Every rank gets the source's tensor, written into its own, from each source."""
    name = _number_name(number)
    inputs = [np.full((5, 3), 8.0 * rank) for rank in range(world)]
    inputs = [x.astype(np.int64) if name == "int64" else x for x in inputs]
    answers = _answers(
        trial,
        world,
        collectives.broadcast,
        [{"x": own} for own in inputs],
        address=free_address(),
        world=world,
        dtype=name,
    )
    for rank in range(world):
        for source, (written, returned) in enumerate(answers[rank]):
            expected = inputs[source] + source
            trial.require(
                np.array_equal(returned, expected),
                f"broadcast from rank {source} brought {returned.flat[0]} to rank {rank}; rank "
                f"{source} sent {expected.flat[0]}",
            )
            trial.require(
                np.array_equal(written, expected),
                f"broadcast from rank {source} returned the right tensor on rank {rank} and did "
                "not write it into x",
            )


@_scale(_WORLDS)
def strided_inputs(trial: Trial, *, world: int) -> None:
    """Views that are not contiguous are read and written where they lie and nowhere else."""
    wholes = [trial.rng.integers(-9, 9, (4, 10)).astype(np.float64) for _ in range(world)]
    answers = _answers(
        trial,
        world,
        collectives.strided,
        [{"whole": own} for own in wholes],
        address=free_address(),
        world=world,
    )
    views = [whole[:, ::2] for whole in wholes]
    for rank, (reduced, gathered, sent, after) in enumerate(answers):
        what = f"of every other column on rank {rank}"
        trial.require(np.array_equal(reduced, sum(views)), f"all_reduce {what} is wrong")
        joined = np.concatenate(views, axis=1)
        trial.require(np.array_equal(gathered, joined), f"all_gather {what} is wrong")
        trial.require(np.array_equal(sent, views[-1]), f"broadcast {what} is wrong")
        expected = wholes[rank].copy()
        expected[:, ::2] = views[-1]
        trial.require(np.array_equal(after, expected), f"broadcast {what} changed other columns")


@_scale(_WORLDS)
def barrier(trial: Trial, *, world: int) -> None:
    """Nobody passes before everybody has come, whoever is late."""
    folder = tempfile.mkdtemp(prefix="barrier-", dir=trial.directory)
    seen = _answers(
        trial,
        world,
        collectives.barrier,
        address=free_address(),
        world=world,
        folder=str(folder),
    )
    for rank, counts in enumerate(seen):
        trial.require(
            set(counts) == {world},
            f"rank {rank} passed barriers when {counts} of {world} ranks had come",
        )


@_scale(_WORLDS)
def ordered_in_the_queue(trial: Trial, *, world: int) -> None:
    """A collective takes its place between the work queued before and after it."""
    inputs = [trial.rng.integers(-9, 9, 501).astype(np.float32) for _ in range(world)]
    answers = _answers(
        trial,
        world,
        collectives.in_the_queue,
        [{"x": own} for own in inputs],
        address=free_address(),
        world=world,
    )
    for rank, got in enumerate(answers):
        trial.require(
            np.array_equal(got, 2 * sum(inputs) + 1),
            f"upload, double, all_reduce, add one, download on rank {rank} came out of order: a "
            "collective ran before what was queued before it, or was read before it was done",
        )


@_scale(_WORLDS)
def groups_side_by_side(trial: Trial, *, world: int) -> None:
    """Two groups of one process keep apart, also where a rank has another number in each."""
    groups = [list(range(world)), list(range(world))[1:] if world > 2 else [1, 0]]
    addresses = [free_address() for _ in groups]
    inputs = [np.full((2,), float(rank)) for rank in range(world)]
    answers = _answers(
        trial,
        world,
        collectives.two_groups,
        [{"x": own} for own in inputs],
        addresses=addresses,
        groups=groups,
    )
    for rank in range(world):
        for number, ranks in enumerate(groups):
            if rank not in ranks:
                continue
            expected = np.concatenate([inputs[r] for r in ranks])
            got = answers[rank][number]
            trial.require(
                np.array_equal(got, expected),
                f"the group of ranks {ranks} gathered {got} on rank {rank}, not {expected}, while "
                f"the group {groups[1 - number]} was open in the same processes",
            )


@_scale(_WORLDS)
def lost_rank_is_an_error(trial: Trial, *, world: int) -> None:
    """A rank that dies is a typed error at the others, in bounded time, not a hang."""
    answers = _call(
        trial,
        world,
        collectives.lost_rank,
        None,
        address=free_address(),
        world=world,
        x=np.ones(5),
    )
    for rank, answer in enumerate(answers[:-1]):
        trial.require(
            answer.error, f"rank {rank} got a sum from a group of which the last rank had died"
        )
        trial.require(
            answer.is_typed,
            f"when another rank died, rank {rank} got {answer.error}; it must get a DeviceError "
            "(DeviceLost), so that the engine ends with a reason",
        )


@_scale(_WORLDS)
def closes_and_meets_again(trial: Trial, *, world: int) -> None:
    """Closing twice is harmless, and the same ranks can form another group."""
    addresses = [free_address() for _ in range(2)]
    answers = _answers(trial, world, collectives.closes_twice, addresses=addresses, world=world)
    for rank, sums in enumerate(answers):
        trial.require(
            all(np.array_equal(got, np.full(3, float(world))) for got in sums),
            f"rank {rank} got {sums} from groups of {world} that followed each other",
        )
