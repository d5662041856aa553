"""Train a small run in some processes over gloo: two_processes.py COUNT OUT [sharded]. Run by test_loop.py."""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from accelerate import Accelerator

from hydraspec.train.loop import Trainer

STEPS = 6


class Sharding(Accelerator):
    """Does what accelerate's FSDP does to a module, which it refuses to do on CPUs."""

    def prepare(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        names = {parameter: name for name, parameter in module.named_parameters()}
        groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        fully_shard(module, mesh=init_device_mesh("cpu", (self.num_processes,)))
        sharded = dict(module.named_parameters())
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [sharded[name] for name in own]
        return module, optimizer

    def no_sync(self, model: torch.nn.Module) -> Any:
        return nullcontext()

    def clip_grad_norm_(self, parameters: Any, norm: float, norm_type: int = 2) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, norm).full_tensor()


def train(folder: Path, accelerator: Accelerator, until: int = STEPS, resumed: Any = None) -> Trainer:
    """So many of the steps, from the beginning or from what another trainer captured."""
    from hydraspec.train import prepare
    from tests.train.conftest import prepare_small

    prepared = prepare_small(folder / str(accelerator.process_index), epochs=1, ema=0.5)
    trainer = prepare.make_trainer(dataclasses.replace(prepared, accelerator=accelerator))
    trainer.steps = STEPS
    if resumed is not None:
        trainer.restore(resumed)
    trainer.run(stopped=lambda: trainer.step == until)
    return trainer


def work(out: str, count: int, is_sharded: bool) -> None:
    """Six steps, at once and with a break; the first process writes the weights."""
    from safetensors.torch import save_file

    from hydraspec.train.checkpoint import Checkpoint

    torch.set_num_threads(1)
    accelerator = (Sharding if is_sharded else Accelerator)(cpu=True)
    assert accelerator.num_processes == count
    weights = train(Path(out, "whole"), accelerator).trained_weights()
    tensors, facts = train(Path(out, "begun"), accelerator, until=3).capture()
    box = [Checkpoint(3, tensors, facts)]
    if count > 1:
        dist.broadcast_object_list(box)  # as all processes read the first one's file
    resumed = train(Path(out, "resumed"), accelerator, resumed=box[0]).trained_weights()
    if accelerator.is_main_process:
        assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, Path(out, "weights.safetensors"))


if __name__ == "__main__":
    arguments = (sys.argv[2], int(sys.argv[1]), "sharded" in sys.argv)
    os.makedirs(sys.argv[2], exist_ok=True)
    if arguments[1] == 1:
        work(*arguments)
    else:
        from accelerate import debug_launcher

        debug_launcher(work, arguments, num_processes=arguments[1])
