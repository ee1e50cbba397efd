"""The loop that a good engineer would write by hand: nothing in it that the task does not need."""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import LOG_EVERY, build_data, build_model, build_optimizer, loader_options, report, spec
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torch.utils.tensorboard import SummaryWriter


def main() -> None:
    asked, rank, ranks = spec(), 0, int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("nccl" if asked.device == "cuda" else "gloo")
        rank = dist.get_rank()
    torch.manual_seed(rank)
    data = build_data(asked.data)
    sampler = DistributedSampler(data, drop_last=True) if ranks > 1 else None
    loader = DataLoader(
        data,
        asked.batch // ranks,
        shuffle=sampler is None,
        sampler=sampler,
        **loader_options(asked),
    )
    plain = build_model().to(asked.device)
    model = DistributedDataParallel(plain, gradient_as_bucket_view=True) if ranks > 1 else plain
    optimizer = build_optimizer(model.parameters())
    out = Path(asked.out)
    lines = (out / "metrics.jsonl").open("a") if rank == 0 else None
    board = SummaryWriter(str(out / "tensorboard")) if rank == 0 else None
    step = epoch = 0
    if asked.epochs and (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt")
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch = state["epoch"]
    while epoch < asked.epochs or step < asked.steps:
        if sampler is not None:
            sampler.set_epoch(epoch)
        for images, labels in loader:
            if asked.device != "cpu":
                images = images.to(asked.device, non_blocking=True)
                labels = labels.to(asked.device, non_blocking=True)
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % LOG_EVERY == 0 and lines is not None and board is not None:
                value = loss.item()
                lines.write(json.dumps({"step": step, "time": time.time(), "loss": value}) + "\n")
                lines.flush()
                board.add_scalar("train/loss", value, step)
            if step == asked.steps:
                break
        epoch += 1
        if asked.epochs and rank == 0:
            state = {
                "model": plain.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch,
            }
            torch.save(state, out / "new.pt")
            os.replace(out / "new.pt", out / "checkpoint.pt")
    if board is not None:
        board.close()
    report(asked)
    if ranks > 1:
        dist.destroy_process_group()


main()
