"""Train a small model for three steps under DeepSpeed ZeRO-3; ``nvme`` puts its states on disk through memopt.

``pipelined`` does so with DeepSpeed's swapper that reads the next group and writes the last one beside the step.
"""

from __future__ import annotations

import os
import sys

os.environ.update(
    DS_ACCELERATOR="cpu",
    RANK="0",
    WORLD_SIZE="1",
    LOCAL_RANK="0",
    MASTER_ADDR="127.0.0.1",
    MASTER_PORT="29517",
)
import torch

directory, how = sys.argv[1:]
zero: dict = {"stage": 3, "sub_group_size": 1_000_000}
handles = []
if how != "none":
    from deepspeed.ops.op_builder.builder import OpBuilder

    from memopt.integrations.deepspeed_aio import LockedTensors, op_modules

    async_io, pin_memory = op_modules(LockedTensors(2 << 30, register=False))
    make = async_io.aio_handle

    def remember(*args, **kwargs):
        handles.append(make(*args, **kwargs))
        return handles[-1]

    async_io.aio_handle = remember
    OpBuilder._loaded_ops["async_io"] = async_io
    OpBuilder._loaded_ops["pin_memory"] = pin_memory
    sys._deepspeed_pin_memory_op_module = pin_memory
    nvme = {"device": "nvme", "nvme_path": directory, "pin_memory": False}
    zero["offload_optimizer"] = {**nvme, "buffer_count": 5}
    if how == "pipelined":
        zero["offload_optimizer"] |= {
            "buffer_count": 15,
            "pipeline_read": True,
            "pipeline_write": True,
        }
    zero["offload_param"] = {**nvme, "buffer_size": 2_000_000, "max_in_cpu": 0}

import deepspeed  # noqa: E402

torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(3)])
config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": zero,
    "bf16": {"enabled": True},  # DeepSpeed's parameter swapper knows half precision only
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "aio": {"block_size": 1 << 20, "queue_depth": 8, "intra_op_parallelism": 1},
}
engine, *_ = deepspeed.initialize(
    model=model, config=config, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
)
losses = []
for step in range(3):
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(step)).bfloat16()
    loss = engine(x).float().pow(2).mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item().hex())
print("losses", *losses)
print("swapper", type(getattr(engine.optimizer, "optimizer_swapper", None)).__name__)
print("written", sum(handle.engine.stats().written_bytes for handle in handles), flush=True)
os._exit(0)
