"""`surgery` as one of several processes: python -m tests.train.several [--shard BLOCK] COMMAND…, run by torchrun.

accelerate refuses sharding on CPUs, but fully_shard itself works with gloo: with --shard, accelerate allows it. BLOCK
is the class name of the layers that are sharded separately; none: the whole model.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from surgery.cli import main
from surgery.train import loop

make = loop.accelerator


def sharding(block: str) -> None:
    def made(settings: loop.Settings, *more: object) -> Accelerator:
        found = make(settings, *more)
        wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": [block]}
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, **(wrap if block != "none" else {"auto_wrap_policy": "no_wrap"})
        )
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        assert found.is_fsdp2
        return found

    loop.accelerator = made


if __name__ == "__main__":
    if sys.argv[1] == "--shard":
        sharding(sys.argv[2])
        del sys.argv[1:3]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads now and then abort a process that ends while they run
