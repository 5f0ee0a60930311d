"""All settings of the project. Edit the defaults here, choose a preset, or give flags; see README.md.

    python train.py --preset ms1mv3_r50 --batch-size 256 --data.root /sets/ms1mv3

Flags go before the preset, the preset before this file. A script's own section and `common` need no prefix. The
comment above a field is its help text (`python train.py --help`). A run saves the settings it used, and testing,
merging and resuming read them from there. A `~` that begins a path is your home. A setting that was given and has no
effect, beside others or in that program, is named in a warning.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.orders import OrderName
from utils.settings import at_least, between, check_types, positive, require, unless
from utils.training.schedules import OptimizerName, ScheduleName


@dataclass(frozen=True)
class CommonConfig:
    """What every script shares."""

    # Where to compute: auto takes CUDA when there is a card, else the CPU.
    device: str = "auto"
    # Processes that read and decode images, for each card. -1: one per core, 8 at most, and the cores are divided among
    # the cards; 0: none, the main process does it.
    workers: int = -1
    # Folder that holds one folder per training run.
    runs: str = "runs"

    def __post_init__(self) -> None:
        check_types(self, "common")
        at_least(-1, self, "common", "workers")


@dataclass(frozen=True)
class DataConfig:
    """The faces."""

    # Training set: a folder with train.rec and train.idx, a .rec file, or a folder with one folder per identity.
    # Several, comma separated, are joined with their identities kept apart; a path that has a comma itself goes alone.
    root: tuple[str, ...] = ("datasets/ms1mv3",)
    # Verification sets (.bin), comma separated. Empty: every .bin beside the training set; none: no set.
    verification: tuple[str, ...] = ()
    # Height and width of the aligned faces, pixels. 112 is the field's standard.
    image_size: int = 112
    # Scale square training images of another size to image_size; otherwise they count as broken, as others do.
    resize: bool = False
    # Leave out identities with fewer training images.
    min_images: int = 1
    # Order of an epoch: exact shuffles all images; blocks reads runs of neighbours, for spinning or network disks;
    # balanced shows every identity equally often.
    order: OrderName = "exact"
    # Where training JPEGs are decoded: cpu, by the workers, or gpu, on a CUDA card, which needs torchcodec; its pixels
    # differ a little. Tests, merges and verification always decode on the CPU.
    decode: Literal["cpu", "gpu"] = "cpu"
    # Broken training images are left out of the loss; more of them than this, of one process, stop the run with their
    # list, and so do 32 in a row or all of an epoch.
    broken_limit: int = 100
    # Probability that a training face is cropped, black filling the rest. 0: off. AdaFace: 0.2; strong augmentation
    # tends to cost accuracy.
    augment_crop: float = 0.0
    # Probability that a training face is blurred. 0: off.
    augment_blur: float = 0.0
    # Probability that a training face is reduced, to a fifth at most, and enlarged again. 0: off. AdaFace: 0.2.
    augment_low_resolution: float = 0.0
    # Probability that brightness, contrast and saturation of a training face change. 0: off. AdaFace: 0.2.
    augment_colour: float = 0.0
    # Probability that a training face turns grey. 0: off.
    augment_grey: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(bool(self.root), "data.root", "names no training set")
        at_least(16, self, "data", "image_size")
        at_least(1, self, "data", "min_images")
        at_least(0, self, "data", "broken_limit")
        for name in ("crop", "blur", "low_resolution", "colour", "grey"):
            between(0, 1, self, "data", f"augment_{name}")


@dataclass(frozen=True)
class ModelConfig:
    """The network that turns a face into an embedding."""

    # r18, r34, r50, r100, r152, r200 (IResNet), ir50, ir_se50, ... (the same in other layouts), mbf, mbf_large,
    # mobilefacenet, vit_t, vit_s, vit_b, vit_l, edgeface_xs_gamma_06, edgeface_s_gamma_05, ..., timm:NAME for any of
    # timm's networks, or demo (tiny, for trying the program on a CPU). docs/networks.md has them all.
    network: str = "r50"
    # Numbers in an embedding. 512 is the field's standard.
    embedding_size: int = 512
    # Probability that the last block's branch is left out in training (stochastic depth), rising from 0 at the first;
    # for vit_*, edgeface_* and timm:*. Below 0: as published for the network.
    drop_path: float = -1.0
    # Part of the patches that training leaves out of each face; for vit_*. Below 0: as published for the network.
    mask_ratio: float = -1.0
    # Part of what the last linear layer sees that training sets to 0; for r*, ir*, evolve_ir* and timm:*. Below 0: as
    # published for the network.
    dropout: float = -1.0
    # Begin with the weights that timm downloads for the network; for timm:*. A run that goes on needs no download.
    pretrained: bool = False
    # What a foreign net (ONNX, TorchScript, weights) expects of RGB 0..255: auto goes by what the file says or is known
    # of its origin, and by whether an ONNX graph normalises itself; none feeds 0..255, 127.5 (rgb - 127.5) / 127.5, and
    # 128 (rgb - 127.5) / 128.
    normalisation: Literal["auto", "none", "127.5", "128"] = "auto"
    # Order of the colours that a foreign net was trained on: auto goes by what the file says or is known of its origin
    # (AdaFace's checkpoints: bgr), and takes rgb where nothing is.
    colour: Literal["auto", "rgb", "bgr"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "model")
        positive(self, "model", "embedding_size")
        for name in ("drop_path", "mask_ratio", "dropout"):
            value = getattr(self, name)
            require(-1 <= value < 1, f"model.{name}", f"must be from 0 to below 1, or -1 for as published, got {value}")


@dataclass(frozen=True)
class LossConfig:
    """The softmax loss, its margin, and how it is computed over many classes."""

    # arcface adds a margin to the angle, cosface subtracts it from the cosine, combined does both; sphereface and
    # sphereface_r multiply the angle; elastic_arc and elastic_cos draw margins at random; curricularface stresses hard
    # negatives as the training goes on; magface and adaface adapt the margin to the embedding's length, the quality of
    # the face; normface has no margin; softmax is the plain one, without normalisation. models/losses has the formulas.
    name: Literal[
        "softmax", "normface", "sphereface", "sphereface_r", "cosface", "arcface", "combined", "curricularface",
        "magface", "adaface", "elastic_arc", "elastic_cos",
    ] = "arcface"  # fmt: skip
    # The margin m; 0: as published. Radians: arcface, curricularface and elastic_arc 0.5, adaface 0.4. Cosine: cosface
    # and elastic_cos 0.35 (insightface takes 0.4 for cosface). Factor on the angle: sphereface 4, sphereface_r 1.5.
    # combined and magface have settings of their own. Presets have margins, which another loss.name keeps.
    margin: float = 0.0
    # Epochs over which the margin grows from none to the full one, step by step. 0: full from the start, as published.
    # For what does not begin to learn with the full one; not for sphereface, which has an annealing of its own.
    margin_warmup_epochs: float = 0.0
    # Factor on the cosines before the softmax (s); 0: as published, which is 64, for sphereface_r 30. Smaller for a few
    # hundred identities. softmax and sphereface have the embedding's length in its place.
    scale: float = 0.0
    # combined, cos(m1 t + m2) - m3: factor on the angle.
    m1: float = 1.0
    # combined: margin added to the angle, radians.
    m2: float = 0.3
    # combined: margin subtracted from the cosine.
    m3: float = 0.2
    # sphereface: weight of cos t against the margin at first, falling from step to step (lambda).
    lambda_base: float = 1000.0
    # sphereface: how fast lambda falls, to base (1 + gamma step)^-power.
    lambda_gamma: float = 0.12
    # sphereface: the power in how fast lambda falls.
    lambda_power: float = 1.0
    # sphereface: lambda never falls below this. 0, with lambda_base 0: the full margin from the start.
    lambda_min: float = 5.0
    # adaface: how strongly the margin follows the embedding's length; 0: not at all.
    h: float = 0.333
    # magface: embeddings of this length and shorter have margin_low.
    norm_low: float = 10.0
    # magface: embeddings of this length and longer have margin_high.
    norm_high: float = 110.0
    # magface: the smallest margin, radians.
    margin_low: float = 0.45
    # magface: the largest margin, radians.
    margin_high: float = 0.8
    # magface: weight of the term that lengthens the embeddings (lambda_g).
    penalty_weight: float = 35.0
    # elastic_arc, elastic_cos: standard deviation of the margins. 0: as published, 0.05, with plus 0.0175 and 0.025.
    std: float = 0.0
    # elastic_arc, elastic_cos: give the largest margins of a batch to the faces farthest from their centres.
    plus: bool = False
    # Centres of each identity; a face counts with the nearest. More than 1 (3 as published) for noisy labels.
    sub_centers: int = 1
    # Cosines with other classes above this count as 0: the class may be the same person. 0: none does. For sets where
    # people have several classes.
    filter_above: float = 0.0
    # Share of the classes that take part in a step, those of the batch always among them (PartialFC). 1: all; 0.1 to
    # 0.3 as published for millions of identities.
    sample_rate: float = 1.0
    # dense keeps the logits of all classes in memory; blockwise computes them a block at a time, for many identities.
    # auto: blockwise on CUDA, which has kernels for it, and as soon as there is more than one block.
    engine: Literal["auto", "dense", "blockwise"] = "auto"
    # Classes computed at a time by the blockwise engine. 0: as many as suit the kind of device (CPU or CUDA) and the
    # batch_size.
    block: int = 0
    # What the blockwise engine multiplies in: auto is bfloat16 on CUDA where the network computes in it, else float32;
    # sums and what follows are float32 in any case.
    products: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "loss")
        # What multiplies an angle, and what is added to an angle or a cosine.
        least, most = (1.0, 8.0) if self.name.startswith("sphereface") else (0.0, 1.5)
        good = self.margin == 0 or least <= self.margin <= most
        message = f"must be 0 (as published) or from {least:g} to {most:g} for {self.name}, got {self.margin}"
        require(good, "loss.margin", message)
        at_least(0, self, "loss", "scale", "lambda_base", "lambda_gamma", "lambda_power", "lambda_min")
        at_least(0, self, "loss", "margin_warmup_epochs", "penalty_weight", "block")
        at_least(1, self, "loss", "sub_centers")
        require(0 < self.m1 <= 8, "loss.m1", f"must be above 0 and at most 8, got {self.m1}")
        between(0, 1.5, self, "loss", "m2", "m3", "margin_low", "margin_high")
        between(0, 1, self, "loss", "h", "filter_above")
        between(0, 0.2, self, "loss", "std")
        positive(self, "loss", "norm_low")
        message = f"must be above loss.norm_low ({self.norm_low}), got {self.norm_high}"
        require(self.norm_high > self.norm_low, "loss.norm_high", message)
        message = f"must not be below loss.margin_low ({self.margin_low}), got {self.margin_high}"
        require(self.margin_high >= self.margin_low, "loss.margin_high", message)
        require(0 < self.sample_rate <= 1, "loss.sample_rate", f"must be above 0 and at most 1, got {self.sample_rate}")

    def unused(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        name, why = self.name, f"loss.name is {self.name}"
        return {
            **unless(name not in ("softmax", "normface", "combined", "magface"), why, "margin"),
            **unless(name not in ("softmax", "normface", "sphereface"), why, "margin_warmup_epochs"),
            **unless(name not in ("softmax", "sphereface"), why, "scale"),
            **unless(name == "combined", why, "m1", "m2", "m3"),
            **unless(name == "sphereface", why, "lambda_base", "lambda_gamma", "lambda_power", "lambda_min"),
            **unless(name == "adaface", why, "h"),
            **unless(name == "magface", why, "norm_low", "norm_high", "margin_low", "margin_high", "penalty_weight"),
            **unless(name in ("elastic_arc", "elastic_cos"), why, "std", "plus"),
            **unless(self.engine != "dense", "loss.engine is dense", "block"),
        }


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    # Name of the run's folder. Empty: date, time and network, and a number where several start in the same second.
    name: str = ""
    # Run to go on with (its folder): its settings hold, save for flags and preset given. auto: the run called
    # train.name if it is there already, else a new one, so that one command starts a run and goes on with it.
    resume: str = ""
    # Passes over the training set. 20 as published for IResNet on millions of images, 40 for MobileFaceNet.
    epochs: int = 20
    # Images per optimizer step. Published recipes: 1024 and 128.
    batch_size: int = 128
    # Peak learning rate. 0: by rule, from optimizer and batch_size (docs/training.md); with sgd that is 0.1 for 1024
    # images and 0.02 for 128, both as published. With another optimizer or batch than a preset's, its rate stays.
    lr: float = 0.0
    # Epochs over which the learning rate climbs to its peak. The published recipes have none; a loss that stays where
    # it began, or becomes NaN, wants some.
    warmup_epochs: float = 0.0
    # What follows the peak: poly falls along a power of the steps left, cosine along a cosine, step at milestones,
    # constant not at all, wsd (warm-up, stable, decay) as poly, but over decay_epochs at the end.
    schedule: ScheduleName = "poly"
    # poly, wsd: the power. 1 falls linearly, as published.
    schedule_power: float = 1.0
    # step: epochs after which the learning rate falls, comma separated.
    milestones: tuple[int, ...] = ()
    # step: factor on the learning rate at each milestone.
    milestone_factor: float = 0.1
    # wsd: epochs that the fall takes. 0: a fifth of all.
    decay_epochs: float = 0.0
    # poly, cosine, wsd: share of the peak that the learning rate falls to.
    final_lr: float = 0.0
    # sgd (as published for convolutional networks), adamw (as published for transformers) or muon.
    optimizer: OptimizerName = "sgd"
    # Momentum of sgd. The others have their own.
    momentum: float = 0.9
    # Weight decay. sgd: 5e-4 as published, 1e-4 for MobileFaceNet and Glint360K. adamw and muon apply it apart from the
    # gradient and want more: 0.1 as published.
    weight_decay: float = 5e-4
    # Let norms, slopes of PReLUs and biases decay too, as insightface published; else only weights of convolutions and
    # linear layers do.
    decay_all: bool = False
    # Weights to start from: a run's folder, or a file of weights that test.model takes, no .onnx and no TorchScript.
    # Empty: random ones.
    init: str = ""
    # Parts of the network that do not learn, comma separated: conv1,bn1,prelu,layer1 are the first of IResNet.
    frozen: tuple[str, ...] = ()
    # Factor on the learning rate of the network, not on that of the class centres: 0.1, say, with train.init.
    backbone_lr: float = 1.0
    # Verify and keep a moving average of the weights: the decay a step, such as 0.999. 0: the weights themselves.
    ema: float = 0.0
    # Images of one card in a forward pass. auto: as many as fit of its part of batch_size, fewer when memory runs out
    # later on. Gradients of several passes add up to those of the whole batch; batch norm and random margins are each
    # pass's own, and so are those of the sampled classes that its faces belong to.
    micro_batch: str = "auto"
    # Compute the activations of each block anew in the backward pass instead of keeping them: slower, but far smaller.
    activation_checkpointing: bool = False
    # Compile the network (torch.compile), and let the blockwise engine compile its blocks, or use its kernels. auto: on
    # CUDA.
    compile: Literal["auto", "on", "off"] = "auto"
    # Launch the network's kernels as CUDA graphs: for one card whose host is slow at launching them one by one, which
    # small batches and networks feel most. Not where a batch takes several passes, or activations are computed anew.
    # The log's memory leaves out the network's activations then: they lie in memory of the graphs' own.
    cuda_graph: bool = False
    # On several cards: batch norm over the images of all of them.
    sync_bn: bool = False
    # Largest norm of the network's gradient; longer ones are scaled down to it. 5 as published.
    gradient_clip: float = 5.0
    # auto: bfloat16 on CUDA cards that have it, float16 with loss scaling on older ones, float32 on the CPU. fp32 is
    # IEEE's; tf32 rounds the factors of float32 products, the head's too, to 10 bits (Ampere and later).
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    # Seed of everything random: initial weights, image order, flips, augmentations. Same seed, same run.
    seed: int = 0
    # Steps between two lines of the log (screen, TensorBoard, metrics.jsonl).
    log_every: int = 50
    # Steps between two checks on the verification sets. 0: at the end of each epoch.
    verify_every: int = 0
    # Verify the untrained network too: an accuracy far above chance would say that the test set is too easy.
    verify_at_start: bool = False
    # Steps between two checkpoints to resume from. 0: at the end of each epoch.
    checkpoint_every: int = 0
    # Minutes after which a checkpoint is saved in any case, at the next line of the log. 0: never.
    checkpoint_minutes: float = 10.0
    # Checkpoints to keep, the newest ones; the best network is kept besides.
    checkpoints_kept: int = 2
    # A loss above this has exploded, as one that is not a number has. In float16 the network does not move in steps
    # whose gradients overflow, while the loss scale is looked for (the class centres, in float32, do): 20 of them in a
    # row are no explosion.
    loss_limit: float = 1000.0
    # When the loss explodes: stop, keeping the last checkpoint; or skip: go back to it, and on without
    # that batch and the one before.
    on_explosion: Literal["stop", "skip"] = "stop"
    # Steps to record in a trace for chrome://tracing or Perfetto, after the first ten. 0: none.
    profile: int = 0
    # Project at Weights & Biases to log to as well (pip install wandb). Empty: none.
    wandb: str = ""

    def __post_init__(self) -> None:
        check_types(self, "train")
        at_least(1, self, "train", "epochs", "log_every", "checkpoints_kept")
        require(self.batch_size >= 2, "train.batch_size", f"must be 2 or more (batch norm), got {self.batch_size}")
        at_least(0, self, "train", "lr", "warmup_epochs", "decay_epochs", "weight_decay", "profile")
        between(0, 2**53, self, "train", "seed")
        at_least(0, self, "train", "verify_every", "checkpoint_every", "checkpoint_minutes")
        positive(self, "train", "gradient_clip", "schedule_power", "milestone_factor", "backbone_lr", "loss_limit")
        between(0, 1, self, "train", "final_lr")
        for name in ("momentum", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", f"must be in [0, 1), got {value}")
        micro = self.micro_batch
        good = micro == "auto" or (micro.isdecimal() and int(micro) > 1)
        require(good, "train.micro_batch", f"must be auto or a number of images from 2 on (batch norm), got {micro!r}")
        rising = list(self.milestones) == sorted({epoch for epoch in self.milestones if epoch >= 1})
        require(rising, "train.milestones", f"must be epochs from 1 on, rising, got {self.milestones}")
        good = self.schedule != "step" or bool(self.milestones)
        require(
            good, "train.milestones", "must name the epochs after which train.schedule=step lowers the rate, as 10,16"
        )
        require(
            self.warmup_epochs <= self.epochs,
            "train.warmup_epochs",
            f"must not exceed train.epochs ({self.epochs}), got {self.warmup_epochs}",
        )
        left = self.epochs - self.warmup_epochs
        message = f"must not exceed the epochs after warm-up ({left:g}), got {self.decay_epochs}"
        require(self.schedule != "wsd" or self.decay_epochs <= left, "train.decay_epochs", message)

    def unused(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        why = f"train.schedule is {self.schedule}"
        return {
            **unless(self.schedule in ("poly", "wsd"), why, "schedule_power"),
            **unless(self.schedule == "step", why, "milestones", "milestone_factor"),
            **unless(
                self.schedule != "step" or self.milestones[0] < self.epochs,
                f"train.epochs is {self.epochs}",
                *("milestones", "milestone_factor"),
            ),
            **unless(self.schedule == "wsd", why, "decay_epochs"),
            **unless(self.schedule in ("poly", "cosine", "wsd"), why, "final_lr"),
            **unless(self.optimizer == "sgd", f"train.optimizer is {self.optimizer}", "momentum"),
            **unless(self.resume in ("", "auto"), f"train.resume names the run, {self.resume}", "name"),
        }


@dataclass(frozen=True)
class TestConfig:
    """Testing models."""

    # What to test on: .bin files and lists of pairs (10-fold protocol), face sets (all pairs), folders of IJB-B or
    # IJB-C. Empty: the verification sets of `data`.
    sets: tuple[str, ...] = field(default=(), metadata={"positional": True})
    # Models, comma separated: run folders, folders to upload, .safetensors, .pth, .pt, .ckpt or .onnx. Several are
    # compared, each with the first. Empty: the newest run's best.
    model: tuple[str, ...] = ()
    # Folder of the images that a list of pairs (pairs.txt, .csv) names. Empty: `images` beside the list, or its folder.
    images: str = ""
    # Add the embedding of the mirrored image, as published numbers do.
    mirror: bool = True
    # Also identify (1:N): one image of each person of a face set enrolled, the others searched among them.
    identify: bool = False
    # Computing precision of the networks. fp32 is what accuracies are quoted in; the others are compared with it on a
    # sample.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Images per forward pass.
    batch_size: int = 128
    # Keep embeddings and take them from there when the same model meets the same images again.
    cache: bool = True
    # Folder of the kept embeddings. Empty: `embeddings` in common.runs.
    cache_folder: str = ""
    # Draws of the bootstrap behind intervals and comparisons. 0: none.
    draws: int = 1000
    # Look for unaligned faces, swapped channels, and faces and people of the training set in the test sets.
    checks: bool = True
    # Training set that the test sets should share nothing with, comma separated; none: there is none. Empty: the
    # data.root of the tested run.
    training_set: tuple[str, ...] = ()
    # Training images that are embedded in search of people and faces of the test sets; 100 times as many have their
    # bytes compared. 0: neither.
    training_sample: int = 2000
    # Also measure by groups, comma separated: FILE.csv:COLUMN, the column of a table whose first column is `image` or
    # `identity`.
    breakdown: tuple[str, ...] = ()
    # Qualities for error-versus-reject curves, comma separated: norm (the embedding's length) or FILE.csv:COLUMN.
    quality: tuple[str, ...] = ("norm",)
    # Pairs on each contact sheet of the hardest.
    hardest: int = 24
    # Seed of all samples and draws.
    seed: int = 0
    # Folder for report and pictures. Empty: `test` in the run's folder, or `runs/test-NAME` for foreign models and for
    # folders that are to be uploaded.
    output: str = ""

    def __post_init__(self) -> None:
        check_types(self, "test")
        at_least(1, self, "test", "batch_size")
        at_least(0, self, "test", "draws", "training_sample", "hardest", "seed")
        require(self.draws != 1, "test.draws", "must be 0 or from 2 on: one draw has no spread")
        for name in ("breakdown", "quality"):
            for spec in getattr(self, name):
                file, colon, column = spec.rpartition(":")
                good = bool(file and colon and column) or (name == "quality" and spec == "norm")
                forms = "FILE.csv:COLUMN or norm" if name == "quality" else "FILE.csv:COLUMN"
                require(good, f"test.{name}", f"must be {forms}, got {spec!r}")

    def unused(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        return {
            **unless(self.checks, "test.checks is off", "training_set", "training_sample"),
            **unless(self.cache, "test.cache is off", "cache_folder"),
            **unless(self.training_set != ("none",), "test.training_set is none", "training_sample"),
        }


@dataclass(frozen=True)
class MergeConfig:
    """Joining face sets by identity."""

    # The sets, comma separated, the one to keep labels of first: rec sets or folders of identities.
    sets: tuple[str, ...] = field(default=(), metadata={"positional": True, "aliases": ("--merge", "--sets")})
    # Folder for the merged set; it must not exist yet.
    output: str = ""
    # Model that compares the faces, as in `test.model`. Empty: the newest run's best.
    model: str = ""
    # Images per forward pass.
    batch_size: int = 64
    # Cosine from which two identities are the same person. auto: chosen from the sets themselves, see
    # docs/merging_threshold.md.
    t: float | Literal["auto"] = 0.65
    # auto: share of the joins that may be wrong.
    wrong_joins: float = 0.01
    # Add the embedding of the mirrored image.
    mirror: bool = False
    # What an identity is compared by: mean of its embeddings; trimmed and medoid bear wrong images among them.
    centre: Literal["mean", "trimmed", "medoid"] = "mean"
    # Who joins whom: mutual, those who are each other's best match; clusters, all who are linked.
    rule: Literal["mutual", "clusters"] = "mutual"
    # Join identities of one set, too; else those that a set holds apart stay apart.
    within: bool = False
    # A person of several sets: join puts all images under one label, drop keeps those of the set named first,
    # keep-larger those of the set that has most.
    on_match: Literal["join", "drop", "keep-larger"] = "join"
    # What happens to the second copy of an image where identities are joined: near drops it, also when it was encoded
    # anew, resized or cropped a little; bytes drops it only when it is the same to the byte; keep keeps all.
    duplicates: Literal["near", "bytes", "keep"] = "near"
    # Sets whose people are left out, comma separated: .bin files, rec sets or folders of identities.
    exclude: tuple[str, ...] = ()
    # Cosine from which an identity is a person of an excluded set. 0.4, as in insightface, is for large networks: small
    # ones take many strangers for such people there, and want 0.5 or more.
    exclude_t: float = 0.4
    # Images that do not belong to their identity, identities of two people: off does not look, report lists them in
    # cleaning.csv, apply leaves the images out and parts the identities as well.
    clean: Literal["off", "report", "apply"] = "off"
    # Cleaning: an image with a lower cosine to its identity's trimmed mean does not belong.
    clean_outlier: float = 0.25
    # Cleaning: an identity in two clusters is two people when the cosine of their centres is lower.
    clean_mixed: float = 0.35
    # merge.csv of a merge or dry run, edited or not, to apply instead of comparing. Empty: compare.
    decisions: str = ""
    # Do everything but write the set; merge.csv and report.html go to `OUTPUT.dry_run`.
    dry_run: bool = False
    # Folder for the embeddings, which another merge of the same sets by the same model takes from there. Empty:
    # `OUTPUT.embeddings`; it can be removed afterwards.
    cache: str = ""
    # Begin the writing anew where a run was interrupted. Else that is gone on with.
    restart: bool = False

    def __post_init__(self) -> None:
        check_types(self, "merge")
        at_least(1, self, "merge", "batch_size")
        for name in ("t", "exclude_t", "clean_outlier", "clean_mixed"):
            value = getattr(self, name)
            good = value == "auto" or -1 <= value <= 1
            require(good, f"merge.{name}", f"must be a cosine between -1 and 1, got {value}")
        require(0 < self.wrong_joins < 1, "merge.wrong_joins", f"must be between 0 and 1, got {self.wrong_joins}")

    def unused(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        joins = ("t", "wrong_joins", "rule", "on_match")
        alone = "there is one set, and merge.within is off"
        embedded = self.duplicates == "near" or self.clean != "off" or not self.decisions
        return {
            **unless(bool(self.exclude), "merge.exclude names no set", "exclude_t"),
            **unless(self.clean != "off", "merge.clean is off", "clean_outlier", "clean_mixed"),
            **unless(len(self.sets) != 1 or self.within, alone, *joins),
            **unless(len(self.sets) != 1 or self.within or bool(self.exclude), alone, "centre"),
            **unless(not self.decisions, "merge.decisions says who is joined", *joins, "centre", "within"),
            **unless(embedded, "no faces are compared", "model", "batch_size", "mirror"),
            **unless(not self.dry_run, "merge.dry_run writes no set", "restart"),
        }


@dataclass(frozen=True)
class PrepareConfig:
    """Turning a set into folders of images."""

    # The set: a folder with a .rec and .idx file, a .rec file, a folder with one folder per identity, a .lst of
    # face2rec or im2rec, or a CSV. Empty: data.root.
    rec_data_path: str = field(default="", metadata={"aliases": ("--r",)})
    # Where the folders go: OUTPUT/<label>/<key>.jpg for records. Empty: `images` in the folder of a .rec.
    output: str = ""
    # What the paths in a .lst or CSV are relative to. Empty: the folder of the list.
    image_root: str = ""
    # Listed images that are not aligned (face2rec's 0) or have landmarks to align them by: refuse stops with the first,
    # copy takes their bytes as they are. Nothing is aligned here: pack_set.py does that.
    unaligned: Literal["refuse", "copy"] = "refuse"
    # Identities to unpack, comma separated, as the set names them; @FILE: a text file with one a line. Empty: all.
    identities: tuple[str, ...] = ()
    # Identities with fewer images are left out.
    min_images: int = 1
    # Identities to unpack at most, the first ones. 0: all.
    limit: int = 0

    def __post_init__(self) -> None:
        check_types(self, "prepare")
        at_least(0, self, "prepare", "min_images", "limit")

    def unused(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        listed = not self.rec_data_path or _is_list(self.rec_data_path)
        return unless(listed, "prepare.rec_data_path is no list", "image_root", "unaligned")


def _check_detector(section: str, threshold: float, size: int) -> None:
    require(0 < threshold <= 1, f"{section}.detector_threshold", f"must be above 0 and at most 1, got {threshold}")
    good = size > 0 and size % 32 == 0
    require(good, f"{section}.detector_size", f"must be a positive multiple of 32, got {size}")


def _is_list(source: str) -> bool:
    """Whether `source` is a list of images: any file but a `.rec`."""
    return Path(source).is_file() and Path(source).suffix != ".rec"


def _unused_by_packer(section: str, detector: str, other_sizes: str, listed: bool) -> dict[str, str]:
    """What a packer has no use for: of its detector where there is none, and how to encode where nothing is. `listed`
    images may be aligned, or have landmarks, or have neither."""
    none = f"{section}.detector names no file"
    encodes = bool(detector) or listed or other_sizes == "resize"
    return {
        **unless(bool(detector), none, "detector_threshold", "detector_size", "smallest_face", "face"),
        **unless(listed or not detector, f"{section}.detector aligns the faces", "other_sizes"),
        **unless(encodes, "nothing is aligned or resized: images keep their bytes", "quality"),
    }


@dataclass(frozen=True)
class PackConfig:
    """Packing a `.rec` set from images, a list or another set."""

    # What to pack: a folder with one folder per identity, a .rec set, a .lst of face2rec or im2rec, or a CSV.
    source: str = ""
    # Folder for the set; it must not exist yet. An interrupted run leaves `.NAME.partial` beside it.
    output: str = ""
    # Begin anew where a run was interrupted, and discard what it packed. Else that is gone on with.
    restart: bool = False
    # What the paths in a .lst or CSV are relative to. Empty: the folder of the list.
    image_root: str = ""
    # Identities to pack, comma separated, as the source names them; @FILE: a text file with one a line. Empty: all.
    identities: tuple[str, ...] = ()
    # Identities with fewer images are left out.
    min_images: int = 1
    # Identities to pack at most. 0: all.
    limit: int = 0
    # Shuffle the identities, before the limit, and the images of each; else they keep their order.
    shuffle: bool = False
    # Seed of the shuffle.
    seed: int = 0
    # Height and width of the faces in the set, pixels.
    image_size: int = 112
    # Aligned faces of another size: refuse stops with the name of the image, resize makes new JPEGs of them.
    other_sizes: Literal["refuse", "resize"] = "refuse"
    # Images that do not decode or do not fit, and what is no file: refuse stops with the name of the first, skip leaves
    # them out and lists them in left_out.csv.
    bad_images: Literal["refuse", "skip"] = "refuse"
    # JPEG quality of aligned and resized faces, 1 to 100. Other images keep their bytes.
    quality: int = 95
    # SCRFD file (ONNX, with key points) that finds the face of each image that comes without landmarks, to align it by.
    # Empty: such images are aligned faces already.
    detector: str = ""
    # Faces with a lower score of the detector are not seen.
    detector_threshold: float = 0.5
    # Height and width that photos are scaled to for a detector that takes any, pixels. 640 as published.
    detector_size: int = 640
    # Faces that are narrower or lower, in pixels of the photo, are not seen: enlarged, they are blurs. 0: all are.
    smallest_face: int = 0
    # Which of several faces in a photo: the largest, or the one nearest to the centre.
    face: Literal["largest", "central"] = "largest"

    def __post_init__(self) -> None:
        check_types(self, "pack")
        at_least(0, self, "pack", "min_images", "limit", "seed", "smallest_face")
        at_least(16, self, "pack", "image_size")
        between(1, 100, self, "pack", "quality")
        _check_detector("pack", self.detector_threshold, self.detector_size)

    def unused(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        listed = _is_list(self.source)
        return {
            **unless(listed, "pack.source is no list", "image_root"),
            **unless(self.shuffle, "pack.shuffle is off", "seed"),
            **_unused_by_packer("pack", self.detector, self.other_sizes, listed),
        }


@dataclass(frozen=True)
class PackBinConfig:
    """Packing a verification set (`.bin`) from a list of pairs."""

    # The list: LFW's pairs.txt, or a CSV with the header path1,path2,same.
    pairs: str = ""
    # Folder of the images that the list names.
    images: str = ""
    # The .bin to write; beside a training set, training verifies on it.
    output: str = ""
    # Pairs of one person to draw from the folders in images, and as many of two people: the list is then what is
    # written first. 0: none, the list is there.
    draw: int = 0
    # Seed of the drawing.
    seed: int = 0
    # Height and width of the faces, pixels.
    image_size: int = 112
    # Faces of another size: refuse stops with the name of the image, resize makes new JPEGs of them.
    other_sizes: Literal["refuse", "resize"] = "refuse"
    # JPEG quality of aligned and resized faces, 1 to 100. Other images keep their bytes.
    quality: int = 95
    # SCRFD file (ONNX, with key points) that finds the face of each image, to align it by.
    # Empty: the images are aligned faces already.
    detector: str = ""
    # Faces with a lower score of the detector are not seen.
    detector_threshold: float = 0.5
    # Height and width that photos are scaled to for a detector that takes any, pixels. 640 as published.
    detector_size: int = 640
    # Faces that are narrower or lower, in pixels of the photo, are not seen: enlarged, they are blurs. 0: all are.
    smallest_face: int = 0
    # Which of several faces in a photo: the largest, or the one nearest to the centre.
    face: Literal["largest", "central"] = "largest"

    def __post_init__(self) -> None:
        check_types(self, "pack_bin")
        at_least(0, self, "pack_bin", "draw", "seed", "smallest_face")
        at_least(16, self, "pack_bin", "image_size")
        between(1, 100, self, "pack_bin", "quality")
        _check_detector("pack_bin", self.detector_threshold, self.detector_size)

    def unused(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        return {
            **unless(self.draw > 0, "pack_bin.draw is 0", "seed"),
            **_unused_by_packer("pack_bin", self.detector, self.other_sizes, listed=False),
        }


@dataclass(frozen=True)
class ReportConfig:
    """Looking at a face set and checking it."""

    # The set: a folder with a .rec file, a .rec file, or a folder with one folder per identity. Empty: data.root.
    set: tuple[str, ...] = field(default=(), metadata={"positional": True})
    # Decode every image and list the broken ones, and those whose bytes come twice; else only the heads of the records
    # are read.
    check: bool = False
    # Folder for the set without its broken records, found as with --check; it must not exist yet. Empty: none.
    repair: str = ""
    # Folder for the report. Empty: `report-NAME` in the working directory, NAME being the set's.
    output: str = ""
    # Random images that are decoded for their sizes when not all are.
    sample: int = 200
    # Random identities on the sheet of faces, a row each.
    rows: int = 12
    # Seed of the sample and the sheet.
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "report")
        require(len(self.set) <= 1, "report.set", f"must be one set, got {', '.join(self.set)}")
        at_least(1, self, "report", "sample", "rows")
        at_least(0, self, "report", "seed")

    def unused(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        return unless(not (self.check or self.repair), "all images are decoded", "sample")


@dataclass(frozen=True)
class DropNoisyConfig:
    """Leaving out the faces that a run with sub-centers shows to be mislabelled."""

    # Folder of a run that was trained with loss.sub_centers above 1.
    run: str = ""
    # The set that the run was trained on, if it has moved; several, comma separated. Empty: the run's data.root.
    source: tuple[str, ...] = ()
    # Folder for the set without the noise; it must not exist yet.
    output: str = ""
    # Faces farther than this from the dominant sub-center of their identity are noise, degrees. 75 as published.
    angle: float = 75.0
    # Images per forward pass.
    batch_size: int = 64
    # Add the embedding of the mirrored image.
    mirror: bool = False

    def __post_init__(self) -> None:
        check_types(self, "drop_noisy")
        require(0 < self.angle < 180, "drop_noisy.angle", f"must be between 0 and 180 degrees, got {self.angle}")
        at_least(1, self, "drop_noisy", "batch_size")


@dataclass(frozen=True)
class ExportConfig:
    """Writing a model for other programs."""

    # Run folder, or weights of any kind that test.model takes. Empty: the newest run's best.
    model: tuple[str, ...] = field(default=(), metadata={"positional": True, "aliases": ("--model",)})
    # onnx and torchscript hold the network and its weights; safetensors the weights and the settings; hub is a folder
    # to upload: safetensors, config.json and a model card.
    format: Literal["onnx", "safetensors", "torchscript", "hub"] = "onnx"
    # File, or for hub the folder, to write. Empty: in `export` in the run's folder; for weights from elsewhere in
    # `runs/export-NAME`.
    output: str = ""
    # fp16 halves the file. int8 (onnx alone) is calibrated on faces, for CPUs and phones.
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    # Put (rgb - 127.5) / 127.5 into the network, which then takes RGB 0..255 (onnx, torchscript). Else its input is
    # normalised by whoever calls it, as for the networks that insightface publishes.
    fold_normalisation: bool = False
    # Faces on which the export is compared with the model: a .bin or a face set. With fp16 and int8 a .bin named here
    # also tells the accuracy before and after. Empty: those of the run, else faces drawn by a program.
    set: str = ""
    # Faces that are compared, at most.
    images: int = 128
    # Faces that int8 is calibrated on: a .bin or a face set. Empty: the run's training set, else other faces of the set
    # that the export is compared on.
    calibration: str = ""
    # Faces that int8 is calibrated on, at most.
    calibration_images: int = 256
    # Faces per forward pass.
    batch_size: int = 32
    # Largest deviation 1 - cosine from the model that an export may show. 0: 1e-5 for fp32, 1e-3 for fp16, 0.05 for
    # int8.
    limit: float = 0.0
    # Licence of the weights, as Hugging Face names it (mit, cc-by-nc-4.0, ...). Empty: unknown.
    licence: str = ""

    def __post_init__(self) -> None:
        check_types(self, "export")
        require(len(self.model) <= 1, "export.model", f"must be one model, got {', '.join(self.model)}")
        at_least(2, self, "export", "images", "calibration_images", "batch_size")
        require(0 <= self.limit < 1, "export.limit", f"must be from 0 to below 1, got {self.limit}")
        good = self.precision != "int8" or self.format == "onnx"
        require(good, "export.precision", f"int8 is for --format onnx, not for {self.format}")
        good = not self.fold_normalisation or self.format in ("onnx", "torchscript")
        message = f"{self.format} holds weights alone: normalisation can be put into onnx and torchscript"
        require(good, "export.fold_normalisation", message)

    def unused(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        why = f"export.precision is {self.precision}"
        return unless(self.precision == "int8", why, "calibration", "calibration_images")


@dataclass(frozen=True)
class DemoConfig:
    """The embedded set of drawn faces."""

    # Folder for all that `make demo` writes.
    folder: str = "demo"
    # Folder for the training set and demo.bin. Empty: `set` in demo.folder.
    output: str = ""
    # Folder for the second set, to merge with the first. Empty: `more` in demo.folder.
    more: str = ""
    # People in the training set.
    people: int = 400
    # Pictures of each person.
    shots: int = 15
    # People in demo.bin, none of them in a training set.
    test_people: int = 80
    # People in the second set; the first half of them are in the training set too, in other pictures.
    more_people: int = 60
    # Seed of the drawn people: another seed, other people.
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "demo")
        require(2 <= self.people <= 1_000_000, "demo.people", f"must be from 2 to 1,000,000, got {self.people}")
        at_least(2, self, "demo", "shots", "test_people")
        require(
            2 <= self.more_people <= 2 * self.people,
            "demo.more_people",
            f"must be from 2 to twice demo.people ({self.people}), got {self.more_people}",
        )
        at_least(0, self, "demo", "seed")


@dataclass(frozen=True)
class Config:
    """Every section."""

    common: CommonConfig = CommonConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    test: TestConfig = TestConfig()
    merge: MergeConfig = MergeConfig()
    prepare: PrepareConfig = PrepareConfig()
    pack: PackConfig = PackConfig()
    pack_bin: PackBinConfig = PackBinConfig()
    report: ReportConfig = ReportConfig()
    drop_noisy: DropNoisyConfig = DropNoisyConfig()
    export: ExportConfig = ExportConfig()
    demo: DemoConfig = DemoConfig()


#: What describes a network whose file does not.
_MODEL = ("model.network", "model.embedding_size", "model.normalisation", "model.colour", "data.image_size")
#: What training takes of a network: it feeds (rgb - 127.5) / 127.5, whatever others are fed.
_TRAINED = (
    *("model.network", "model.embedding_size", "model.drop_path", "model.mask_ratio", "model.dropout"),
    *("model.pretrained", "model.colour"),
)
#: What each program reads: whole sections, and single fields of others. Of other flags it says that it does not.
READS: dict[str, tuple[str, ...]] = {
    "train": ("train", "common", "data", *_TRAINED, "loss", "test.batch_size", "test.mirror"),
    "test": ("test", "common", "data.root", "data.verification", *_MODEL),
    "merge": ("merge", "common", *_MODEL),
    "prepare": ("prepare", "common.workers", "data.root"),
    "pack": ("pack", "common.workers"),
    "pack_bin": ("pack_bin", "common.workers"),
    "report": ("report", "common.workers", "data.root"),
    "drop_noisy": ("drop_noisy", "common.workers", "common.device"),
    "export": ("export", "common.workers", "common.runs", "test.model", *_MODEL),
    "make_demo_set": ("demo", "common.workers"),
}

# The recipe of insightface's arcface_torch for eight cards of 128 images each; its learning rate, 0.1, is what the rule
# gives for them.
_PUBLISHED = {"train.decay_all": True, "train.batch_size": 1024, "train.weight_decay": 5e-4, "train.epochs": 20}
_MS1MV3 = {**_PUBLISHED, "data.root": ("datasets/ms1mv3",), "loss.name": "arcface", "loss.margin": 0.5}
_GLINT360K = {
    **_PUBLISHED,
    "data.root": ("datasets/glint360k",),
    "loss.name": "cosface",
    "loss.margin": 0.4,
    "train.weight_decay": 1e-4,
}

PRESETS: dict[str, dict[str, Any]] = {
    "ms1mv3_r18": {**_MS1MV3, "model.network": "r18"},
    "ms1mv3_r50": {**_MS1MV3, "model.network": "r50"},
    "ms1mv3_r100": {**_MS1MV3, "model.network": "r100"},
    "ms1mv3_mbf": {**_MS1MV3, "model.network": "mbf", "train.epochs": 40, "train.weight_decay": 1e-4},
    "glint360k_r50": {**_GLINT360K, "model.network": "r50"},
    "glint360k_r100": {**_GLINT360K, "model.network": "r100"},
    # ArcFace paper, section 3.1: 32 k steps of 512 images, from 0.1 where the rule would give 0.058; its LR steps are
    # replaced by the linear fall.
    "casia_r50": {
        **_PUBLISHED,
        "data.root": ("datasets/casia",),
        "loss.name": "arcface",
        "loss.margin": 0.5,
        "model.network": "r50",
        "train.batch_size": 512,
        "train.lr": 0.1,
        "train.epochs": 34,
    },
    # Some ten thousand images, one card: docs/training.md, "Small sets".
    "small": {
        "data.root": ("datasets/mine",),
        "data.min_images": 2,
        "data.augment_low_resolution": 0.2,
        "data.augment_colour": 0.2,
        "model.network": "r18",
        "loss.name": "arcface",
        "loss.margin": 0.5,
        "loss.scale": 32.0,
        "train.batch_size": 128,
        "train.weight_decay": 5e-3,
        "train.epochs": 20,
        "train.compile": "off",  # takes longer than the run
    },
    # The embedded set of `make demo`: minutes on two CPU cores.
    "demo": {
        "data.root": ("demo/set",),
        "model.network": "demo",
        "model.embedding_size": 128,
        "loss.scale": 32.0,
        "loss.margin": 0.4,
        "train.epochs": 10,
        "train.lr": 0.1,
        "train.warmup_epochs": 1.0,
        "train.compile": "off",  # takes longer than the run on a GPU
        "train.log_every": 10,
        "train.verify_at_start": True,
        # The small net knows drawn faces from few people: new ones look more alike to it than real ones to real nets.
        "merge.t": 0.93,
    },
}
