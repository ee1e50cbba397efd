"""Words of other launchers beside ours: what an unknown key or option most likely means here.

docs/migrate.md shows the same tables; to add a word, add its line to both.
"""

from __future__ import annotations

from typing import NamedTuple

from launcher.config.keys import KEYS


class Word(NamedTuple):
    """A key or option of another launcher, the key or option that it is here ("" where there is
    none), and what to know of that before a value is carried over, or why there is none."""

    theirs: str
    ours: str
    note: str = ""

    @property
    def told(self) -> tuple[str, str]:
        """What to add to "unknown key", and the hint."""
        if not self.ours:
            return f"; {self.note}", ""
        return "", f"{self.ours}, {self.note}" if self.note else self.ours


_BATCH = (
    "the global batch: the samples of one optimiser step over all ranks, so what was per device, "
    "times devices, times accumulation steps"
)
_ACCUMULATION = (
    "the most samples that a rank puts through the model at once, such as the size per device that "
    "was: accumulation follows from it and TRAIN.BATCH_SIZE, the global batch"
)
_EPOCHS = "with its unit: 20ep"
_STEPS = "with its unit, in optimiser steps: 90000step"
_EVERY = "with its unit: 500step, 1ep or 30min"
_RANKS = "torchrun starts the ranks: torchrun --nproc-per-node=8 -m launcher train ..."
_NODES = "torchrun's --nnodes, --rdzv-backend and --rdzv-endpoint tell it, or srun as it is"
_ALWAYS_DDP = "there is DDP only, as soon as torchrun or srun starts more than one process"
_RESUME = "which finds the newest valid checkpoint of OUTPUT_DIR; --resume-from takes any"
_PRECISION = "one of fp32, tf32, bf16, fp16"
_CLIP = "the largest norm of all gradients together"
_BEST = "with the split's name: val/loss"
_RECORDS = "beside metrics.jsonl, which is always written"
_WORKERS = "where -1 fits them to the CPUs"
_TASK = "the task, whose build_dataset(split) makes the data"
_PATIENCE = "as in ['early_stopping patience=3']"

# fmt: off
WORDS: dict[str, list[Word]] = {
    "detectron2": [
        Word("SOLVER.BASE_LR", "OPTIM.LR"),
        Word("SOLVER.IMS_PER_BATCH", "TRAIN.BATCH_SIZE", "the global batch, there as here"),
        Word("SOLVER.REFERENCE_WORLD_SIZE", "", "not needed: the global batch is what is set"),
        Word("SOLVER.MAX_ITER", "TRAIN.DURATION", _STEPS),
        Word("SOLVER.LR_SCHEDULER_NAME", "OPTIM.SCHEDULE",
             "multistep for WarmupMultiStepLR, cosine for WarmupCosineLR"),
        Word("SOLVER.STEPS", "OPTIM.MILESTONES", "with units: [60000step, 80000step]"),
        Word("SOLVER.GAMMA", "OPTIM.GAMMA"),
        Word("SOLVER.BASE_LR_END", "OPTIM.FINAL_FACTOR", "as a share of OPTIM.LR"),
        Word("SOLVER.WARMUP_ITERS", "OPTIM.WARMUP", _STEPS),
        Word("SOLVER.WARMUP_FACTOR", "", "OPTIM.WARMUP is linear, from nearly 0"),
        Word("SOLVER.MOMENTUM", "OPTIM.MOMENTUM"),
        Word("SOLVER.NESTEROV", "OPTIM.NESTEROV"),
        Word("SOLVER.WEIGHT_DECAY", "OPTIM.WEIGHT_DECAY",
             "of all weights, unless OPTIM.SKIP_NORM_DECAY"),
        Word("SOLVER.WEIGHT_DECAY_NORM", "OPTIM.SKIP_NORM_DECAY",
             "True for 0, the default there; of biases as well"),
        Word("SOLVER.BIAS_LR_FACTOR", "OPTIM.GROUPS", "as in ['*.bias LR_SCALE=2']"),
        Word("SOLVER.AMP.ENABLED", "TRAIN.PRECISION", "fp16 as it was there"),
        Word("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "TRAIN.GRAD_CLIP"),
        Word("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "TRAIN.GRAD_CLIP_BY",
             "value alike; norm is of all gradients together, there of each weight's alone"),
        Word("SOLVER.CHECKPOINT_PERIOD", "CHECKPOINT.EVERY", _EVERY),
        Word("TEST.EVAL_PERIOD", "EVAL.EVERY", _EVERY),
        Word("DATASETS.TRAIN", "TASK.NAME", _TASK),
        Word("DATASETS.TEST", "EVAL.SPLITS", "names, each one for build_dataset"),
        Word("DATALOADER.SAMPLER_TRAIN", "TRAIN.SAMPLER",
             "shuffle for TrainingSampler, weighted for RepeatFactorTrainingSampler"),
        Word("DATALOADER.ASPECT_RATIO_GROUPING", "TRAIN.SAMPLER",
             "grouped, by the `groups` of the data set"),
        Word("MODEL.DEVICE", "DIST.DEVICE"),
        Word("MODEL.BACKBONE.FREEZE_AT", "MODEL.FREEZE", "names or patterns: [backbone.stem]"),
        Word("MODEL_EMA.DECAY", "MODEL.EMA_DECAY"),
        Word("num_gpus", "", _RANKS),
        Word("num_machines", "", _NODES),
        Word("machine_rank", "", _NODES),
        Word("dist_url", "", _NODES),
    ],
    "pycls": [
        Word("OPTIM.BASE_LR", "OPTIM.LR"),
        Word("OPTIM.MAX_EPOCH", "TRAIN.DURATION", _EPOCHS),
        Word("OPTIM.LR_POLICY", "OPTIM.SCHEDULE",
             "cosine for cos, multistep for steps, exponential for exp"),
        Word("OPTIM.STEPS", "OPTIM.MILESTONES", "with units and without the 0: [30ep, 60ep]"),
        Word("OPTIM.LR_MULT", "OPTIM.GAMMA"),
        Word("BN.USE_CUSTOM_WEIGHT_DECAY", "OPTIM.SKIP_NORM_DECAY", "of biases as well"),
        Word("OPTIM.WARMUP_EPOCHS", "OPTIM.WARMUP", "with its unit: 5ep"),
        Word("OPTIM.WARMUP_FACTOR", "", "OPTIM.WARMUP is linear, from nearly 0"),
        Word("TRAIN.DATASET", "TASK.NAME", _TASK),
        Word("TRAIN.SPLIT", "", "a run trains on build_dataset('train')"),
        Word("TEST.SPLIT", "EVAL.SPLITS", "a list: [val]"),
        Word("TEST.BATCH_SIZE", "EVAL.BATCH_SIZE", "of one rank, there of all together"),
        Word("TEST.WEIGHTS", "--checkpoint", "with --eval-only"),
        Word("TRAIN.WEIGHTS", "MODEL.WEIGHTS"),
        Word("TRAIN.AUTO_RESUME", "--resume", _RESUME),
        Word("TRAIN.EVAL_PERIOD", "EVAL.EVERY", "with its unit: 1ep"),
        Word("TRAIN.CHECKPOINT_PERIOD", "CHECKPOINT.EVERY", "with its unit: 1ep"),
        Word("DATA_LOADER.NUM_WORKERS", "DATALOADER.NUM_WORKERS"),
        Word("DATA_LOADER.PIN_MEMORY", "DATALOADER.PIN_MEMORY"),
        Word("NUM_GPUS", "", _RANKS),
        Word("OUT_DIR", "OUTPUT_DIR"),
        Word("RNG_SEED", "SEED"),
        Word("LOG_PERIOD", "LOG.EVERY", "with its unit: 10step"),
        Word("DIST_BACKEND", "DIST.BACKEND"),
        Word("cfg", "--config-file"),
    ],
    "Lightning": [
        Word("max_epochs", "TRAIN.DURATION", _EPOCHS),
        Word("max_steps", "TRAIN.DURATION", _STEPS),
        Word("max_time", "TRAIN.MAX_TIME", "24h; the run stops with a checkpoint, to be resumed"),
        Word("devices", "", _RANKS),
        Word("gpus", "", _RANKS),
        Word("num_nodes", "", _NODES),
        Word("strategy", "", _ALWAYS_DDP),
        Word("accelerator", "DIST.DEVICE", "auto, cuda or cpu"),
        Word("accumulate_grad_batches", "TRAIN.MICRO_BATCH_SIZE", _ACCUMULATION),
        Word("precision", "TRAIN.PRECISION", "bf16 for bf16-mixed, fp16 for 16-mixed"),
        Word("gradient_clip_val", "TRAIN.GRAD_CLIP", _CLIP),
        Word("gradient_clip_algorithm", "TRAIN.GRAD_CLIP_BY"),
        Word("check_val_every_n_epoch", "EVAL.EVERY", "with its unit: 1ep"),
        Word("val_check_interval", "EVAL.EVERY", _EVERY),
        Word("limit_val_batches", "EVAL.SAMPLES", "in samples of each split"),
        Word("limit_train_batches", "TRAIN.DURATION", "in fewer steps: 100step"),
        Word("num_sanity_val_steps", "--dry-run",
             "a step, an evaluation, a save and a load, then exit; EVAL.AT_START evaluates all"),
        Word("fast_dev_run", "--dry-run"),
        Word("overfit_batches", "DEBUG.OVERFIT_BATCHES"),
        Word("detect_anomaly", "DEBUG.DETECT_ANOMALY"),
        Word("profiler", "DEBUG.PROFILE", "how often a step is traced: 100step"),
        Word("log_every_n_steps", "LOG.EVERY", "with its unit: 50step"),
        Word("logger", "LOG.TENSORBOARD", _RECORDS),
        Word("enable_progress_bar", "LOG.PROGRESS_BAR"),
        Word("enable_model_summary", "LOG.MODEL_SUMMARY"),
        Word("enable_checkpointing", "CHECKPOINT.EVERY", 'where "" means only at the end'),
        Word("default_root_dir", "OUTPUT_DIR", "the run's own directory, no lightning_logs below"),
        Word("ckpt_path", "--resume", _RESUME),
        Word("deterministic", "DETERMINISTIC"),
        Word("seed_everything", "SEED"),
        Word("sync_batchnorm", "MODEL.SYNC_BN"),
        Word("auto_lr_find", "", "launcher find-lr is a command of its own"),
        Word("swa_epoch_start", "MODEL.SWA_START", "with its unit: 15ep"),
        Word("use_distributed_sampler", "", "not needed: every sample is dealt once, in one order"),
        Word("monitor", "CHECKPOINT.METRIC", _BEST),
        Word("save_top_k", "CHECKPOINT.KEEP_BEST"),
        Word("save_last", "CHECKPOINT.KEEP_LAST", "how many of the newest"),
        Word("every_n_epochs", "CHECKPOINT.EVERY", "with its unit: 1ep"),
        Word("every_n_train_steps", "CHECKPOINT.EVERY", _STEPS),
        Word("patience", "CALLBACKS", _PATIENCE),
    ],
    "HF Trainer": [
        Word("learning_rate", "OPTIM.LR"),
        Word("per_device_train_batch_size", "TRAIN.BATCH_SIZE", _BATCH),
        Word("per_gpu_train_batch_size", "TRAIN.BATCH_SIZE", _BATCH),
        Word("train_batch_size", "TRAIN.BATCH_SIZE", _BATCH),
        Word("per_device_eval_batch_size", "EVAL.BATCH_SIZE", "of one rank, there as here"),
        Word("per_gpu_eval_batch_size", "EVAL.BATCH_SIZE", "of one rank, there as here"),
        Word("eval_batch_size", "EVAL.BATCH_SIZE", "of one rank"),
        Word("gradient_accumulation_steps", "TRAIN.MICRO_BATCH_SIZE", _ACCUMULATION),
        Word("auto_find_batch_size", "TRAIN.MICRO_BATCH_SIZE", "auto; the global batch stays"),
        Word("num_train_epochs", "TRAIN.DURATION", _EPOCHS),
        Word("max_train_steps", "TRAIN.DURATION", _STEPS),
        Word("weight_decay", "OPTIM.WEIGHT_DECAY",
             "of all weights; as there, without norms and biases, by OPTIM.SKIP_NORM_DECAY"),
        Word("adam_beta1", "OPTIM.BETAS", "both in a list: [0.9, 0.999]"),
        Word("adam_beta2", "OPTIM.BETAS", "both in a list: [0.9, 0.999]"),
        Word("adam_epsilon", "OPTIM.EPS"),
        Word("optim", "OPTIM.NAME", "adamw for adamw_torch"),
        Word("max_grad_norm", "TRAIN.GRAD_CLIP", f"{_CLIP}; by default 1.0 there"),
        Word("lr_scheduler_type", "OPTIM.SCHEDULE", "linear there by default, constant here"),
        Word("warmup_steps", "OPTIM.WARMUP", "with its unit: 500step"),
        Word("num_warmup_steps", "OPTIM.WARMUP", "with its unit: 500step"),
        Word("warmup_ratio", "OPTIM.WARMUP", "as a duration: 1ep or 500step"),
        Word("fp16", "TRAIN.PRECISION", _PRECISION),
        Word("bf16", "TRAIN.PRECISION", _PRECISION),
        Word("tf32", "TRAIN.PRECISION", _PRECISION),
        Word("seed", "SEED"),
        Word("data_seed", "SEED", "one seed for all"),
        Word("full_determinism", "DETERMINISTIC"),
        Word("output_dir", "OUTPUT_DIR"),
        Word("overwrite_output_dir", "--overwrite", "which sets the old run aside"),
        Word("resume_from_checkpoint", "--resume", _RESUME),
        Word("ignore_data_skip", "", "not needed: a resume seeks, whatever the offset"),
        Word("do_train", "", "a run trains; --eval-only evaluates a checkpoint"),
        Word("do_eval", "EVAL.EVERY", 'where "" means never; --eval-only evaluates a checkpoint'),
        Word("eval_strategy", "EVAL.EVERY", _EVERY),
        Word("evaluation_strategy", "EVAL.EVERY", _EVERY),
        Word("eval_steps", "EVAL.EVERY", _EVERY),
        Word("eval_on_start", "EVAL.AT_START"),
        Word("max_eval_samples", "EVAL.SAMPLES"),
        Word("save_strategy", "CHECKPOINT.EVERY", _EVERY),
        Word("save_steps", "CHECKPOINT.EVERY", _EVERY),
        Word("save_total_limit", "CHECKPOINT.KEEP_LAST", "beside the best"),
        Word("metric_for_best_model", "CHECKPOINT.METRIC", _BEST),
        Word("greater_is_better", "CHECKPOINT.MODE", "max or min"),
        Word("load_best_model_at_end", "CALLBACKS", "as in [best_weights]"),
        Word("early_stopping_patience", "CALLBACKS", _PATIENCE),
        Word("logging_steps", "LOG.EVERY", "with its unit: 10step"),
        Word("logging_strategy", "LOG.EVERY", "with its unit: 10step"),
        Word("report_to", "LOG.TENSORBOARD", _RECORDS),
        Word("disable_tqdm", "LOG.PROGRESS_BAR", "the other way round"),
        Word("dataloader_num_workers", "DATALOADER.NUM_WORKERS", _WORKERS),
        Word("dataloader_pin_memory", "DATALOADER.PIN_MEMORY"),
        Word("dataloader_prefetch_factor", "DATALOADER.PREFETCH_FACTOR"),
        Word("dataloader_drop_last", "TRAIN.DROP_LAST", "of global batches, in training alone"),
        Word("group_by_length", "TRAIN.SAMPLER", "grouped, by the `lengths` of the data set"),
        Word("ddp_backend", "DIST.BACKEND"),
        Word("ddp_timeout", "DIST.TRAIN_TIMEOUT", "with its unit: 30min"),
        Word("ddp_find_unused_parameters", "DIST.FIND_UNUSED_PARAMETERS"),
        Word("use_cpu", "DIST.DEVICE", "cpu"),
        Word("model_name_or_path", "MODEL.WEIGHTS", "a file; build_model makes the model"),
        Word("ignore_mismatched_sizes", "MODEL.REINIT", "names or patterns of modules: [head.*]"),
        Word("dataset_name", "TASK.NAME", _TASK),
        Word("gradient_checkpointing", "MODEL.ACTIVATION_CHECKPOINT",
             "names or patterns of modules: [encoder.layer.*]"),
        Word("torch_compile", "MODEL.COMPILE"),
        Word("torch_compile_mode", "MODEL.COMPILE_MODE"),
        Word("ddp_bucket_cap_mb", "DIST.BUCKET_MB"),
    ],
    "accelerate": [
        Word("mixed_precision", "TRAIN.PRECISION", _PRECISION),
        Word("num_processes", "", _RANKS),
        Word("multi_gpu", "", _RANKS),
        Word("main_process_ip", "", _NODES),
        Word("main_process_port", "", _NODES),
        Word("distributed_type", "", _ALWAYS_DDP),
        Word("split_batches", "", "not needed: TRAIN.BATCH_SIZE is the global batch in any case"),
        Word("even_batches", "", "not needed: no sample is repeated, at any number of ranks"),
        Word("project_dir", "OUTPUT_DIR"),
        Word("with_tracking", "LOG.TENSORBOARD", _RECORDS),
        Word("log_with", "LOG.TENSORBOARD", _RECORDS),
        Word("checkpointing_steps", "CHECKPOINT.EVERY", _EVERY),
        Word("total_limit", "CHECKPOINT.KEEP_LAST", "beside the best"),
        Word("find_unused_parameters", "DIST.FIND_UNUSED_PARAMETERS"),
        Word("cpu", "DIST.DEVICE", "cpu"),
        Word("dynamo_backend", "MODEL.COMPILE"),
    ],
    "scripts": [
        Word("batch_size", "TRAIN.BATCH_SIZE", "of all ranks together"),
        Word("val_batch_size", "EVAL.BATCH_SIZE", "of one rank"),
        Word("lr", "OPTIM.LR"),
        Word("opt", "OPTIM.NAME"),
        Word("sched", "OPTIM.SCHEDULE"),
        Word("min_lr", "OPTIM.FLOOR", "as a share of OPTIM.LR"),
        Word("layer_decay", "OPTIM.LAYER_DECAY"),
        Word("epochs", "TRAIN.DURATION", _EPOCHS),
        Word("num_epochs", "TRAIN.DURATION", _EPOCHS),
        Word("warmup_epochs", "OPTIM.WARMUP", "with its unit: 5ep"),
        Word("workers", "DATALOADER.NUM_WORKERS", _WORKERS),
        Word("amp", "TRAIN.PRECISION", _PRECISION),
        Word("clip_grad", "TRAIN.GRAD_CLIP", _CLIP),
        Word("clip_mode", "TRAIN.GRAD_CLIP_BY", "adaptive for agc"),
        Word("torchcompile", "MODEL.COMPILE"),
        Word("channels_last", "MODEL.CHANNELS_LAST"),
        Word("grad_checkpointing", "MODEL.ACTIVATION_CHECKPOINT",
             "names or patterns of modules: [blocks.*]"),
        Word("model_ema_decay", "MODEL.EMA_DECAY"),
        Word("model_ema_warmup", "MODEL.EMA_WARMUP"),
        Word("print_freq", "LOG.EVERY", "with its unit: 10step"),
        Word("evaluate", "--eval-only"),
        Word("pretrained", "MODEL.WEIGHTS", "a file"),
        Word("start_epoch", "--resume", _RESUME),
        Word("world_size", "", _RANKS),
    ],
}
# fmt: on


def foreign(name: str) -> Word | None:
    """The word of another launcher that `name` is: as a whole (SOLVER.BASE_LR, --num-gpus), or by
    its last part (trainer.max_epochs) where none of our keys ends so."""
    plain = name.lstrip("-").replace("-", "_").lower()
    last = plain.rpartition(".")[2]
    known = {word.theirs.lower(): word for words in WORDS.values() for word in words}
    ours = {key.name.rpartition(".")[2].lower() for key in KEYS}
    return known.get(plain) or (None if last in ours else known.get(last))
