"""Lightning Fabric: the loop is one's own, the set-up is not."""

import os
from pathlib import Path

from common import LOG_EVERY, build_data, build_model, build_optimizer, loader_options, report, spec
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader


def main() -> None:
    asked, ranks = spec(), int(os.environ.get("WORLD_SIZE", "1"))
    board = TensorBoardLogger(asked.out)
    fabric = Fabric(
        accelerator="cpu",
        devices=ranks,
        loggers=board,
        strategy="ddp" if ranks > 1 else "auto",
    )
    fabric.launch()
    model = build_model()
    optimizer = build_optimizer(model.parameters())
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(
        DataLoader(
            build_data(asked.data),
            asked.batch // ranks,
            shuffle=True,
            **loader_options(asked),
        )
    )
    step = epoch = 0
    while epoch < asked.epochs or step < asked.steps:
        for images, labels in loader:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            step += 1
            if step % LOG_EVERY == 0:
                fabric.log("train/loss", loss.item(), step)
            if step == asked.steps:
                break
        epoch += 1
        if asked.epochs:
            state = {"model": model, "optimizer": optimizer, "epoch": epoch}
            fabric.save(Path(asked.out, "checkpoint.pt"), state)
    report(asked)


main()
