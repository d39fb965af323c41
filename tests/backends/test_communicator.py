"""The communicator over gloo: what the suite's level 4 does not ask of every device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

from quire.backends.reference import TorchDevice  # noqa: E402
from quire.backends.reference.communicator import GlooCommunicator  # noqa: E402
from quire.conformance.ranks import free_address  # noqa: E402
from quire.core.errors import ConfigError, DeviceError, UnsupportedError  # noqa: E402
from quire.core.interface import Capabilities, DeviceInfo  # noqa: E402

INFO = DeviceInfo(index=0, name="host")


def run_ranks(work, ranks=(0, 1)):
    """`work(communicator)` on each rank, every rank in a thread of this process."""
    address = free_address()

    def one(rank):
        group = GlooCommunicator(ranks, rank=rank, address=address, timeout_s=100)
        try:
            return work(group)
        finally:
            group.close()

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "tcp://host", "udp://host:1", ""])
def test_address_of_another_form_is_refused(address):
    """The message says which form is meant."""
    with pytest.raises(ConfigError, match="tcp://host:port"):
        GlooCommunicator([0, 1], rank=0, address=address)


@pytest.mark.parametrize(("ranks", "rank"), [([0, 1], 2), ([0, 0], 0)])
def test_rank_that_is_not_in_the_group_is_refused(ranks, rank):
    """Before anything is opened."""
    with pytest.raises(ConfigError, match="cannot join"):
        GlooCommunicator(ranks, rank=rank, address=free_address())


def test_others_that_do_not_come_are_an_error_in_bounded_time():
    """A rank that never starts does not keep the others for ever."""
    with pytest.raises(DeviceError, match="could not meet the others"):
        GlooCommunicator([0, 1], rank=0, address=free_address(), timeout_s=0.5)


def test_group_of_a_device_is_within_its_claim():
    """Alone needs nobody; beyond the claim is refused with the number that is claimed."""
    device = TorchDevice(info=INFO, capabilities=Capabilities(max_tensor_parallel=2))
    assert device.communicator([3], rank=3, address="").world_size == 1
    with pytest.raises(UnsupportedError, match="at most 2"):
        device.communicator(range(3), rank=0, address=free_address())


def test_number_in_the_group_is_the_place_among_its_ranks():
    """Groups of some of the ranks count anew."""
    places = run_ranks(lambda group: (group.rank, group.world_size), ranks=(5, 2))
    assert places == [(0, 2), (1, 2)]


def test_half_precision_is_summed_in_float32():
    """A sum that float16 cannot hold on the way is rounded once, at the end."""
    values = {0: 2048.0, 1: 1.0, 2: 1.0}
    sums = run_ranks(
        lambda group: group.all_reduce(torch.tensor([values[group.rank]], dtype=torch.float16)),
        ranks=(0, 1, 2),
    )
    assert [float(s) for s in sums] == [2050.0] * 3


def test_closed_communicator_says_that_it_is_closed():
    """Not an attribute error of whatever is gone."""

    def work(group):
        group.barrier()
        group.close()
        group.close()
        with pytest.raises(DeviceError, match="after the communicator was closed"):
            group.barrier()

    run_ranks(work)


def test_broadcast_from_nobody_is_refused():
    """On each rank, before anybody waits."""

    def work(group):
        with pytest.raises(ConfigError, match="rank 2 of 2"):
            group.broadcast(torch.zeros(1), source=2)

    run_ranks(work)
