"""The communicator of accelerators, in two processes that meet over gloo."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from quire.backends.torch_accelerator.communicator import join_group
from quire.core.interface import UnsupportedError

RANK = """
import json, sys
import torch
from quire.backends.torch_accelerator.communicator import join_group
torch.set_num_threads(1)
rank, address = int(sys.argv[1]), sys.argv[2]
group = join_group([3, 5], rank=rank, address=address, backend="gloo", torch_device="cpu", limit=2)
number = group.rank
x = torch.full((2, 2), float(number + 1))
answers = {
    "rank": number,
    "size": group.world_size,
    "sum": group.all_reduce(x.clone()).tolist(),
    "rows": group.all_gather(x, dim=0).tolist(),
    "columns": group.all_gather(x.T, dim=1).tolist(),
    "first": group.broadcast(x.clone(), source=0).tolist(),
}
group.barrier()
group.close()
print(json.dumps(answers))
"""


def test_two_processes_reduce_gather_and_broadcast(tmp_path):
    """Ranks are numbered within their group, and every rank gets the same answers."""
    command = [sys.executable, "-c", RANK]
    started = [
        subprocess.Popen(
            [*command, str(rank), f"file://{tmp_path}/meet"], stdout=subprocess.PIPE, text=True
        )
        for rank in (3, 5)
    ]
    answers = [json.loads(process.communicate()[0]) for process in started]
    assert [answer.pop("rank") for answer in answers] == [0, 1]
    assert answers[0] == answers[1]
    assert answers[0]["size"] == 2
    assert answers[0]["sum"] == [[3, 3], [3, 3]]
    assert answers[0]["rows"] == [[1, 1], [1, 1], [2, 2], [2, 2]]
    assert answers[0]["columns"] == [[1, 1, 2, 2], [1, 1, 2, 2]]
    assert answers[0]["first"] == [[1, 1], [1, 1]]


def test_group_larger_than_the_machine_is_refused_with_the_number():
    """More devices than there are is a reason, before anybody waits for the others."""
    with pytest.raises(UnsupportedError, match="group of 3 devices"):
        join_group(
            [0, 1, 2], rank=0, address="file:///x", backend="gloo", torch_device="cpu", limit=2
        )
