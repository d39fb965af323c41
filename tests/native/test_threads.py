"""The pool of threads: idle when there is nothing to do, and bound to CPUs on request alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

kernels = pytest.importorskip("quire.kernels_cpu")

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not kernels.HAVE_NATIVE, reason=str(kernels.WHY_NOT_NATIVE)),
]
IDLE = """
import os, json, threading, time
from quire.backends.cpu.openmp import prefer_short_waits
prefer_short_waits(os.environ)
import torch
from quire import kernels_cpu
torch.set_num_threads(2)
packed = kernels_cpu.pack_dense(torch.randn(4096, 512), None)
x, out = torch.randn(4, 512), torch.empty(4, 4096)
packed.multiply(x, out)
tasks = len(os.listdir("/proc/self/task"))
before = time.process_time()
threading.Event().wait(0.5)  # idle: this is what is measured
print(json.dumps([time.process_time() - before, tasks]))
"""
PIN = """
import os, json
import torch
from quire import kernels_cpu
cpus = sorted(os.sched_getaffinity(0))
torch.set_num_threads(len(cpus))
assert kernels_cpu.pin_threads(cpus)
tasks = [sorted(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")]
print(json.dumps([cpus, tasks]))
"""
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def run(program):
    """What a process of its own prints: threads and how they wait are the process's."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_PROC_BIND")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_linux
def test_pool_between_two_products_uses_no_processor_time():
    """Threads that spun for half a second would take as much from whoever wants the cores."""
    seconds, num_tasks = run(IDLE)
    assert num_tasks > 1
    assert seconds < 0.1


@needs_linux
def test_pin_threads_binds_every_thread_of_the_pool_to_one_cpu():
    """Each CPU has a thread that stays there."""
    cpus, tasks = run(PIN)
    assert {cpu for task in tasks if len(task) == 1 for cpu in task} == set(cpus)


def test_pin_threads_to_a_cpu_that_is_not_usable_is_refused():
    """A wrong number is an error, not threads that stay where they were."""
    with pytest.raises(ValueError, match="usable"):
        kernels.pin_threads([10**6])
    with pytest.raises(ValueError, match="usable"):
        kernels.pin_threads([])
