"""A process that ends its groups has no thread left that would still need the interpreter."""

from __future__ import annotations

import subprocess
import sys

# Each group is referred to as DeepSpeed's modules do it, so that destroying it joins nothing. With
# destroy_process_group alone a tensor outlives about one group in twenty-five.
GROUPS = """
import sys, weakref
import torch
from torch import distributed
from llava.process_group import end_process_group

held = []
for number in range(100):
    store = distributed.FileStore(f"{sys.argv[1]}/{number}", 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    held = [*held[-3:], distributed.group.WORLD]
    tensors = []
    for _ in range(20):
        tensor = torch.ones(100)
        tensors.append(weakref.ref(tensor))
        distributed.all_reduce(tensor)
        del tensor
    end_process_group()
    assert not distributed.is_initialized()
    left = sum(tensor() is not None for tensor in tensors)
    assert left == 0, f"group {number}: {left} tensors are still held"
end_process_group()
"""


def test_no_tensor_outlives_the_groups(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", GROUPS, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
