"""Every built-in key: its name, its default, what it means and which values it takes.

To add a key, add one line to KEYS. A rule about several keys at once goes into checks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

STEPS = ("ep", "step")
TIME = ("s",)
OPTIMIZERS = (
    *("sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adafactor", "muon"),
)


@dataclass(frozen=True)
class Key:
    """A config key. Bounds and choices hold for a list's items where the default is a list.

    `unit` makes the value a duration and names the units it takes; `never` allows "" for none.
    `not_time` is what to say of a time where only epochs and steps make sense.
    `element` is an example of an item where an empty default list shows none.
    `own` where a class by its place, module:Class, is as good as one of the choices.
    `word` is one more value that is taken, whatever the type.
    `path` where a value may be the path of a file: `~` and `$VARIABLES` in it are expanded.
    """

    name: str
    default: Any
    comment: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    unit: tuple[str, ...] = ()
    never: bool = False
    not_time: str = "a time makes no sense here"
    length: int | None = None
    element: Any = None
    own: bool = False
    path: bool = False
    word: str = ""


# fmt: off
KEYS: list[Key] = [
    Key("OUTPUT_DIR", "", 'Run directory; "" means runs/<config file\'s stem>', path=True),
    # numpy's seeds end at 2**32 - 1.
    Key("SEED", 0, "Seed of everything random: order, weights, augmentation",
        at_least=0, at_most=2**32 - 1),
    Key("DETERMINISTIC", False, "Use deterministic algorithms only; slower on CUDA"),
    Key("TASK.NAME", "",
        'What to train: a built-in name, "package.module:Class" or "path/to/file.py:Class"',
        path=True),
    Key("MODEL.WEIGHTS", "",
        'Weights to start from: a checkpoint, .safetensors or a state_dict file; "" means none',
        path=True),
    Key("MODEL.WEIGHTS_STRICT", True, "Whether WEIGHTS must fit the model in every name and shape"),
    Key("MODEL.INIT", [],
        "How torch.nn.init fills weights at the start, by type of module or pattern of names, the "
        'last one counts: "Linear: xavier_uniform", "*.bias: zeros"',
        element=""),
    Key("MODEL.REINIT", [],
        "Modules that begin afresh, by their own reset_parameters, whatever WEIGHTS hold: head.*",
        element=""),
    Key("MODEL.FREEZE", [],
        "Weights that do not train: names, modules that hold them, or patterns (backbone.*)",
        element=""),
    Key("MODEL.THAW", [],
        "What of it trains later, and from when: backbone.layer4@5ep, or head.*@300step",
        element=""),
    Key("MODEL.EMA_DECAY", 0.0, "Decay a step of the moving average of the weights; 0: no average",
        at_least=0, below=1),
    Key("MODEL.EMA_WARMUP", False,
        "Average over fewer steps at first: a decay of at most (1 + n) / (10 + n) after n steps"),
    Key("MODEL.SWA_START", "",
        'Average the weights (SWA), each counting the same, from then on; "": not',
        unit=STEPS, never=True),
    Key("MODEL.SWA_EVERY", "",
        'How often weights are taken into that average; "": every epoch', unit=STEPS, never=True),
    Key("MODEL.SWA_BN_BATCHES", 200,
        "Global batches of training data that give the average's batch-norm its statistics; "
        "0: it has the model's own", at_least=0),
    Key("MODEL.COMPILE", False, "Compile the model (torch.compile); the first steps take long"),
    Key("MODEL.COMPILE_MODE", "default",
        "What torch.compile optimises for; a max-autotune chooses by time, so a resume may round "
        "otherwise",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")),
    Key("MODEL.COMPILE_DYNAMIC", False,
        "Compile once for all shapes of a batch, rather than for each; for lengths that vary"),
    Key("MODEL.CHANNELS_LAST", False,
        "Keep images and convolutions' weights as (N, H, W, C) in memory, for tensor cores"),
    Key("MODEL.ACTIVATION_CHECKPOINT", [],
        "Modules that keep their inputs alone and compute the rest again in the backward pass, for "
        "memory: names or patterns (blocks.*)",
        element=""),
    Key("MODEL.SYNC_BN", False, "Batch-norm over the samples of all ranks (CUDA)"),
    Key("DATALOADER.NUM_WORKERS", -1, "Loader worker processes per rank; -1: from the CPU budget",
        at_least=-1),
    Key("DATALOADER.PREFETCH_FACTOR", 2, "Batches each loader worker prepares ahead", at_least=1),
    Key("DATALOADER.PIN_MEMORY", "auto",
        "Page-locked batches, for faster copies to CUDA; auto: where memory is plentiful",
        choices=("auto", "true", "false", "True", "False")),
    Key("DATALOADER.SEED_SAMPLES", True,
        "Seed for every sample the generators that the data set draws from"),
    Key("DATALOADER.ON_BAD_SAMPLE", "error",
        "A sample that raises: end the run, or take the next one in its place and warn",
        choices=("error", "skip")),
    Key("TRAIN.BATCH_SIZE", 64, "Samples in one optimiser step over all ranks", at_least=1),
    Key("TRAIN.MICRO_BATCH_SIZE", 0,
        "Most samples one rank puts through the model at once; 0: no limit; auto: as many as the "
        "GPU's memory takes", at_least=0, word="auto"),
    Key("TRAIN.SAMPLER", "shuffle",
        "Order of the samples; some go by what the data set has: weighted by its `weights`, "
        "grouped by its `groups` or `lengths`, dataset by its `order`",
        choices=("shuffle", "sequential", "replacement", "weighted", "grouped", "dataset")),
    Key("TRAIN.DROP_LAST", False, "Leave out an epoch's last, smaller global batch"),
    Key("TRAIN.SHARDS", 0,
        "Parts of a global batch that go through the model one by one and are summed in one order: "
        "the same bits on any number of ranks that divides it; 0: as fast as can be", at_least=0),
    Key("TRAIN.DURATION", "10ep", "How long to train, in epochs or steps", unit=STEPS,
        not_time="a time limit is not the duration of a schedule"),
    Key("TRAIN.MAX_TIME", "",
        'Stop, with a checkpoint, when a process has run for so long; "" means no limit',
        unit=TIME, never=True),
    Key("TRAIN.PRECISION", "fp32", "Number format of the forward and backward pass",
        choices=("fp32", "tf32", "bf16", "fp16")),
    Key("TRAIN.GRAD_CLIP", 0.0, "Bound of the gradient, by GRAD_CLIP_BY; 0: no clipping",
        at_least=0),
    Key("TRAIN.GRAD_CLIP_BY", "norm",
        "What GRAD_CLIP bounds: the norm of the gradient, the size of each of its numbers (value), "
        "or its norm for each output unit as a share of the weights' (adaptive, such as 0.01)",
        choices=("norm", "value", "adaptive")),
    Key("TRAIN.GRAD_CLIP_SKIP", [],
        "Weights that value and adaptive leave alone: names or patterns (head.*)", element=""),
    Key("EVAL.BATCH_SIZE", 256, "Samples one rank evaluates at once", at_least=1),
    Key("EVAL.EVERY", "1ep", 'How often to evaluate; "" means never',
        unit=STEPS + TIME, never=True),
    Key("EVAL.SPLITS", ["val"],
        "What is evaluated, each a name for build_dataset; train is recorded as train_eval"),
    Key("EVAL.SAMPLES", 0, "Most samples of each split that are evaluated, its first ones; 0: all",
        at_least=0),
    Key("EVAL.AT_START", False, "Evaluate before the first step, too"),
    Key("EVAL.RAW", False,
        "Evaluate the raw weights beside the averaged ones, as <split>_raw"),
    Key("OPTIM.NAME", "sgd",
        'Optimiser, or a class of your own: "package.module:Class" or "path/to/file.py:Class"',
        choices=OPTIMIZERS, own=True, path=True),
    Key("OPTIM.ARGS", [], "More arguments for the optimiser's class, such as [amsgrad=true]",
        element=""),
    Key("OPTIM.LR", 0.1, "Learning rate before warm-up and schedule", above=0),
    Key("OPTIM.ADAMW_LR", 3e-4, "Learning rate of the weights that muon leaves to adamw", above=0),
    Key("OPTIM.LR_SCALING", "",
        'How the rates grow with TRAIN.BATCH_SIZE / LR_BATCH; "": not at all',
        choices=("", "linear", "sqrt")),
    Key("OPTIM.LR_BATCH", 0, "The global batch that the rates are given for (LR_SCALING)",
        at_least=0),
    Key("OPTIM.WEIGHT_DECAY", 0.0, "Weight decay", at_least=0),
    Key("OPTIM.SKIP_NORM_DECAY", False,
        "No weight decay for norms, biases and other weights of at most one dimension"),
    Key("OPTIM.MOMENTUM", 0.9, "Momentum (sgd, rmsprop, muon)", at_least=0, below=1),
    Key("OPTIM.NESTEROV", False, "Nesterov momentum (sgd, muon)"),
    Key("OPTIM.BETAS", [0.9, 0.999],
        "Decay of the averages of the gradient and of its square (adam, adamw, nadam, radam; what "
        "muon leaves to adamw)",
        at_least=0, below=1, length=2),
    Key("OPTIM.EPS", 1e-8,
        "Term added to the denominator for stability (as BETAS; rmsprop, adagrad)", above=0),
    Key("OPTIM.GROUPS", [],
        "Weights with values of their own, the last one wins: [backbone.* LR_SCALE=0.1, "
        "head LR=0.01 WEIGHT_DECAY=0]", element=""),
    Key("OPTIM.LAYER_DECAY", 1.0, "Factor of the rate for each layer away from the head; 1: none",
        above=0, at_most=1),
    Key("OPTIM.SCHEDULE", "constant", "Course of the learning rate after warm-up",
        choices=("constant", "cosine", "linear", "step", "multistep", "exponential", "polynomial",
                 "onecycle", "invsqrt", "wsd")),
    Key("OPTIM.WARMUP", "", 'Linear warm-up at the start; "" means none', unit=STEPS, never=True),
    Key("OPTIM.HORIZON", "",
        'When the schedule ends, and its last value begins to stay; "": with TRAIN.DURATION',
        unit=STEPS, never=True),
    Key("OPTIM.FINAL_FACTOR", 0.0,
        "Share of LR left at the end (cosine, linear, polynomial, onecycle, wsd)",
        at_least=0, at_most=1),
    Key("OPTIM.FLOOR", 0.0, "Least share of LR that any schedule goes down to", at_least=0,
        at_most=1),
    Key("OPTIM.MILESTONES", [],
        "When LR is multiplied by GAMMA, such as [5ep, 8ep] (multistep, step)",
        unit=STEPS, element=""),
    Key("OPTIM.PERIOD", "",
        "From one GAMMA to the next (step, exponential); the first cycle up to a restart (cosine); "
        "what the rate falls from, else WARMUP (invsqrt)", unit=STEPS, never=True),
    Key("OPTIM.PERIOD_GROWTH", 1.0, "Length of each cycle by that of the one before (cosine)",
        at_least=1),
    Key("OPTIM.GAMMA", 0.1, "Factor of LR at each milestone (multistep, step), in each PERIOD",
        above=0),
    Key("OPTIM.POWER", 1.0, "Power of what is left of the way (polynomial)", above=0),
    Key("OPTIM.PEAK", 0.3, "Share of the way at which LR is reached (onecycle)", above=0, below=1),
    Key("OPTIM.START_FACTOR", 0.04, "Share of LR at the start (onecycle)", at_least=0, at_most=1),
    Key("OPTIM.DECAY", "", "How long before the end the decay begins (wsd)", unit=STEPS,
        never=True),
    Key("OPTIM.DECAY_SHAPE", "linear", "Course of that decay; sqrt: 1 - the root of its share done",
        choices=("linear", "cosine", "sqrt")),
    Key("OPTIM.MOMENTUM_SCHEDULE", "constant",
        "Course of the momentum (or of the first of BETAS), beside that of the rate",
        choices=("constant", "linear", "cosine", "onecycle")),
    Key("OPTIM.MOMENTUM_FACTOR", 1.0,
        "Share of the momentum at the end, of onecycle at PEAK; may be above 1", above=0),
    Key("OPTIM.WEIGHT_DECAY_SCHEDULE", "constant",
        "Course of the weight decay, beside that of the rate",
        choices=("constant", "linear", "cosine")),
    Key("OPTIM.WEIGHT_DECAY_FACTOR", 1.0, "Share of the weight decay at the end; may be above 1",
        at_least=0),
    Key("CALLBACKS", [],
        'Callbacks: a name, "package.module:Class" or "file.py:Class", then key=value arguments',
        element="", path=True),
    Key("CHECKPOINT.EVERY", "1ep", 'How often to save; "" means only at the end',
        unit=STEPS + TIME, never=True),
    Key("CHECKPOINT.KEEP_LAST", 2, "Newest checkpoints to keep", at_least=1),
    Key("CHECKPOINT.KEEP_BEST", 1, "Best checkpoints to keep, by METRIC", at_least=0),
    Key("CHECKPOINT.KEEP_EVERY", "",
        'Keep one checkpoint per such period for good; "" means none', unit=STEPS, never=True),
    Key("CHECKPOINT.METRIC", "val/loss", "Recorded value that says which checkpoint is best"),
    Key("CHECKPOINT.MODE", "min", "Whether the smallest or the largest METRIC is best",
        choices=("min", "max")),
    Key("LOG.EVERY", "10step", "How often to record training values", unit=STEPS + TIME),
    Key("LOG.DIGEST", "",
        "How often to record the digest of all weights, beside evaluations and checkpoints; "
        '"": only there', unit=STEPS, never=True),
    Key("LOG.LEVEL", "INFO", "Least level of log lines on the console",
        choices=("DEBUG", "INFO", "WARNING", "ERROR")),
    Key("LOG.FORMAT", "text", "Lines of the log files: for people, or an object of JSON each",
        choices=("text", "json")),
    Key("LOG.FILE_MB", 10.0, "Size in MiB at which a rank's log file is rotated; 0: never",
        at_least=0),
    Key("LOG.FILES_KEPT", 3, "Rotated log files that each rank keeps", at_least=1),
    Key("LOG.TENSORBOARD", True, "Write TensorBoard event files"),
    Key("LOG.PROGRESS_BAR", True, "Show how far the run is where stderr is a terminal"),
    Key("LOG.HISTOGRAMS", "",
        'How often to show histograms of weights and gradients in TensorBoard; "" means never',
        unit=STEPS, never=True),
    Key("LOG.COUNT_FLOPS", False,
        "Count the FLOPs of each attempt's first step, where the task does not tell its FLOPs"),
    Key("LOG.MODEL_SUMMARY", True,
        "Tell at the start what the model consists of; its FLOPs and activations by COUNT_FLOPS"),
    Key("LOG.PEAK_TFLOPS", 0.0,
        "Peak TFLOP/s of one device, for perf/mfu; 0: from a table of known GPUs", at_least=0),
    Key("DEBUG.NONFINITE", "",
        "What to do where a loss or gradient is not finite on any rank: stop all at that step, or "
        'warn; "": not looked for', choices=("", "stop", "warn")),
    Key("DEBUG.DETECT_ANOMALY", False,
        "Have autograd name the operation whose gradient is not a number; slow"),
    Key("DEBUG.OVERFIT_BATCHES", 0,
        "Train on the same so many global batches again and again, and evaluate on them; 0: no",
        at_least=0),
    Key("DEBUG.BREAK_RANK", -1,
        "The rank that waits for a debugger before its first step, the others for it; -1: none",
        at_least=-1),
    Key("DEBUG.PROFILE", "",
        'Trace the step that ends each such period, and tell where its time goes; "" means never',
        unit=STEPS, never=True),
    Key("DEBUG.PROFILE_STEPS", 3, "Most steps that an attempt traces", at_least=1),
    Key("DEBUG.MEMORY", False,
        "Record what takes CUDA memory, and write it down where that runs out; slower"),
    Key("DIST.DEVICE", "auto", "Device to train on; auto: CUDA where there is a GPU",
        choices=("auto", "cuda", "cpu")),
    Key("DIST.BACKEND", "", 'Backend of the process group; "" means nccl on CUDA, else gloo',
        choices=("", "nccl", "gloo")),
    Key("DIST.FIND_UNUSED_PARAMETERS", False,
        "For models whose steps use only some of the weights; costs a walk over the graph a step"),
    Key("DIST.STATIC_GRAPH", False,
        "Promise DDP that every step uses the same weights in the same order, which saves it work"),
    Key("DIST.BUCKET_MB", 0.0,
        "Size in MiB of the gradients that are exchanged at once; 0: torch's own, 25 after 1 first",
        at_least=0),
    Key("DIST.GRADIENT_COMPRESSION", "",
        'Exchange gradients as 16-bit numbers, half as many bytes; "": as they are',
        choices=("", "bf16")),
    Key("DIST.INIT_TIMEOUT", "10min", "Longest wait for all ranks at the start", unit=TIME),
    Key("DIST.TRAIN_TIMEOUT", "5min", "Longest time without a training step or evaluation batch",
        unit=TIME),
    Key("DIST.SAVE_TIMEOUT", "30min", "Longest wait for a checkpoint to be written", unit=TIME),
]
# fmt: on


def defaults() -> CfgNode:
    """A new, unfrozen tree of all built-in keys with their defaults."""
    tree = CfgNode()
    for key in KEYS:
        put(tree, key.name, key.default)
    return tree


def put(tree: CfgNode, dotted: str, value: object) -> None:
    """Set a dotted key, making its sections; a list is copied."""
    *sections, last = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, CfgNode())
    tree[last] = list(value) if isinstance(value, list) else value


def flatten(node: CfgNode) -> dict[str, Any]:
    """All values below a node by dotted key, in the order of declaration."""
    return dict(_flat(node, ""))


def _flat(node: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
