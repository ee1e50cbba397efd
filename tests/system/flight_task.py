"""The failing task, where torch records gloo's collectives: its recorder in the place of NCCL's."""

import torch._C._distributed_c10d as c10d

from tests.system.failing_task import Failing

c10d._dump_nccl_trace = c10d._dump_fr_trace


class Recorded(Failing):
    """As it is."""
