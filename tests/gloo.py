"""CPU processes that accelerate takes for accelerators, so that its own FSDP2 path runs without one: gloo in place of nccl."""

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def present_as_accelerators():
    """Let accelerate shard models over the processes of `torchrun`; it leaves FSDP off where it sees CPUs."""
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_XPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
