"""Run by torchrun in tests/test_distributed.py: twenty steps on fixed batches; then every rank saves its state."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.tiny_runs import flat_plan, random_batch, tiny_config  # noqa: E402
from solov2 import distributed  # noqa: E402
from solov2.build import build_criterion, construct  # noqa: E402
from solov2.compute import Compute  # noqa: E402
from solov2.training.epochs import train_one_epoch  # noqa: E402
from solov2.training.guard import NonFiniteGuard  # noqa: E402
from solov2.training.run import wrap  # noqa: E402
from solov2.training.signals import StopSignal  # noqa: E402

STEPS = 20
RATE = 0.02


def batches_of(rank: int) -> list[dict]:
    """Rank 1 sees only empty images in every third step."""
    config = tiny_config()
    return [
        random_batch(config, seed=2 * step + rank, instances=0 if rank == 1 and step % 3 == 0 else 3)
        for step in range(STEPS)
    ]


def fresh_model() -> torch.nn.Module:
    """The same weights on every rank and in the test."""
    torch.manual_seed(0)
    return construct(tiny_config().model, ["a", "b", "c", "d"])


def main(folder: str) -> None:
    device = torch.device("cpu")
    with distributed.process_group(device):
        rank = distributed.rank()
        config, model = tiny_config(), fresh_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, fused=True)
        plan = flat_plan(STEPS, RATE, log_every=STEPS, clip_norm=1.0)
        compute, guard = Compute(device), NonFiniteGuard(Path(folder))
        criterion, batches = build_criterion(config.model), batches_of(rank)
        list(
            train_one_epoch(
                wrap(model, device), criterion, batches, optimizer, compute.scaler(), compute, plan, guard, epoch=0
            )
        )
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        distributed.broadcast_buffers(model)
        torch.save(
            {
                "state": model.state_dict(),
                "buffers_before": before,
                "gathered": distributed.all_gather_objects(rank),
                "gathered_by_main": distributed.gather_objects(rank),
                "status": StopSignal(60, Path(folder), deadline=math.inf if rank else 0.0).poll(),
                "broadcast": distributed.broadcast_object(f"from {rank}"),
            },
            Path(folder) / f"rank{rank}.pth",
        )


if __name__ == "__main__":
    main(sys.argv[1])
