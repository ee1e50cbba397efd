"""Hugging Face's Trainer, without its progress bar."""

import os
from typing import Any

import torch
from common import LOG_EVERY, build_data, build_model, build_optimizer, report, spec
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = build_model()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": cross_entropy(self.net(images), labels)}


def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def main() -> None:
    asked, ranks = spec(), int(os.environ.get("WORLD_SIZE", "1"))
    model = Model()
    optimizer = build_optimizer(model.parameters())
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = TrainingArguments(
        asked.out,
        per_device_train_batch_size=asked.batch // ranks,
        max_steps=asked.steps or -1,
        num_train_epochs=asked.epochs or 1,
        logging_steps=LOG_EVERY,
        report_to=["tensorboard"],
        save_strategy="epoch" if asked.epochs else "no",
        save_total_limit=2,
        dataloader_num_workers=asked.workers,
        dataloader_persistent_workers=asked.workers > 0,
        dataloader_drop_last=True,
        max_grad_norm=0.0,
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    data = build_data(asked.data)
    trainer = Trainer(model, arguments, collate, train_dataset=data, optimizers=(optimizer, rates))
    trainer.train()
    report(asked)


main()
