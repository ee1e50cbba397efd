"""Lightning's Trainer, without its progress bar and its table of the model."""

import os
from typing import Any

import lightning
import torch
from common import LOG_EVERY, build_data, build_model, build_optimizer, loader_options, report, spec
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build_model()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.parameters())


def main() -> None:
    asked, ranks = spec(), int(os.environ.get("WORLD_SIZE", "1"))
    loader = DataLoader(
        build_data(asked.data),
        asked.batch // ranks,
        shuffle=True,
        **loader_options(asked),
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=asked.steps or -1,
        max_epochs=asked.epochs or -1,
        log_every_n_steps=LOG_EVERY,
        logger=TensorBoardLogger(asked.out),
        callbacks=[ModelCheckpoint(asked.out)] if asked.epochs else [],
        enable_checkpointing=asked.epochs > 0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader)
    report(asked)


main()
