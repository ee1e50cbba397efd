"""PyTorch-Ignite: an engine around a step of one's own."""

from typing import Any

import ignite.distributed as idist
import torch
from common import LOG_EVERY, build_data, build_model, build_optimizer, loader_options, report, spec
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.handlers.tensorboard_logger import TensorboardLogger
from torch.nn.functional import cross_entropy


def train(local_rank: int, asked: Any) -> None:
    loader = idist.auto_dataloader(
        build_data(asked.data),
        batch_size=asked.batch,
        shuffle=True,
        **loader_options(asked),
    )
    model = idist.auto_model(build_model())
    optimizer = build_optimizer(model.parameters())
    optimizer = idist.auto_optim(optimizer)

    def step(engine: Engine, batch: Any) -> torch.Tensor:
        images, labels = batch
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    trainer = Engine(step)
    board = None
    if idist.get_rank() == 0:
        board = TensorboardLogger(log_dir=asked.out)
        board.attach_output_handler(
            trainer,
            Events.ITERATION_COMPLETED(every=LOG_EVERY),
            tag="train",
            output_transform=lambda loss: {"loss": loss.item()},
        )
    if asked.epochs:
        kept = {"model": model, "optimizer": optimizer, "trainer": trainer}
        saver = Checkpoint(kept, DiskSaver(asked.out, require_empty=False), n_saved=2)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    else:
        ends = Events.ITERATION_COMPLETED(once=asked.steps)
        trainer.add_event_handler(ends, lambda engine: engine.terminate())
    trainer.run(loader, max_epochs=asked.epochs or 10**6)
    if board is not None:
        board.close()


def main() -> None:
    asked = spec()
    with idist.Parallel(backend="gloo" if idist.has_native_dist_support else None) as parallel:
        parallel.run(train, asked)
    report(asked)


main()
