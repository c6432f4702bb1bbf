"""Trains a tiny adapted llama for a few steps and prints the losses; torchrun runs it for test_sharded.py.

`python -m tests.live.sharded MODE OUT`: MODE is alone, ddp or fsdp2; surgery.save_ writes to OUT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

import surgery
from surgery.common.errors import PassError

STEPS, ROWS = 6, 8


def accelerator(mode: str) -> Accelerator:
    """accelerate refuses sharding on CPUs, but fully_shard itself works with gloo."""
    made = Accelerator(cpu=True)
    if mode == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        assert made.is_fsdp2
    return made


def main(mode: str, out: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(out.parent / "base")
    passes = surgery.Lora(target="attn.*", rank=4), surgery.Full(target="input_layernorm")
    program = surgery.apply_(model, *passes, freeze_base=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    trained = accelerator(mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = trained.prepare(model, optimizer)
    data = torch.randint(3, 100, (ROWS, 9), generator=torch.Generator().manual_seed(3))
    share = ROWS // trained.num_processes
    own = data[trained.process_index * share :][:share]
    losses = []
    for _ in range(STEPS):
        loss = prepared(input_ids=own, labels=own).loss
        trained.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(trained.gather(loss.detach().reshape(1)).mean()))
    live = trained.unwrap_model(prepared)
    shards = sum(hasattr(p, "full_tensor") for p in live.parameters())
    refused = ""
    if mode == "fsdp2":
        try:
            surgery.remove_(live)
        except PassError as error:
            refused = str(error)
    if mode == "fsdp2" or trained.is_main_process:
        surgery.save_(live, out)
    if trained.is_main_process:
        print(json.dumps({"losses": losses, "shards": shards, "refused": refused}))
    trained.wait_for_everyone()
    trained.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that ends while they run


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
