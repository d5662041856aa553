"""Train a small run in some processes over gloo: two_processes.py COUNT OUT. Run by test_loop.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def work(out: str) -> None:
    """Six steps; the first process writes the weights."""
    import torch
    from safetensors.torch import save_file

    from hydraspec.train import run
    from tests.train.conftest import prepare_small

    torch.set_num_threads(1)
    folder = Path(out)
    process = __import__("os").environ.get("RANK", "0")
    prepared = prepare_small(folder / process, epochs=1)
    trainer = run.make_trainer(prepared)
    trainer.steps = 6
    trainer.run()
    weights = trainer.trained_weights()
    if prepared.accelerator.is_main_process:
        assert prepared.accelerator.num_processes == COUNT
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")


if __name__ == "__main__":
    COUNT = int(sys.argv[1])
    if COUNT == 1:
        work(sys.argv[2])
    else:
        from accelerate import debug_launcher

        debug_launcher(work, (sys.argv[2],), num_processes=COUNT)
