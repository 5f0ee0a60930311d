"""All settings of the project. Edit the defaults here, choose a preset, or give flags; see README.md.

    python train.py --preset ms1mv3_r50 --batch-size 256 --data.root /sets/ms1mv3

Flags go before the preset, the preset before this file. A script's own section and `common` need no prefix. The
comment above a field is its help text (`python train.py --help`). A run saves the settings it used, and testing,
merging and resuming read them from there.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from data.orders import OrderName
from utils.settings import check_types, require


@dataclass(frozen=True)
class CommonConfig:
    """What every script shares."""

    # Where to compute: auto takes CUDA when there is a card, else the CPU.
    device: str = "auto"
    # Processes that read and decode images. -1: one per core, 8 at most; 0: none, the main process does it.
    workers: int = -1
    # Folder that holds one folder per training run.
    runs: str = "runs"

    def __post_init__(self) -> None:
        check_types(self, "common")
        require(self.workers >= -1, "common.workers", f"must be -1 or more, got {self.workers}")


@dataclass(frozen=True)
class DataConfig:
    """The faces."""

    # Training set: a folder with train.rec and train.idx, a .rec file, or a folder with one folder per identity.
    # Several, comma separated, are joined with their identities kept apart.
    root: tuple[str, ...] = ("datasets/ms1mv3",)
    # Verification sets (.bin), comma separated. Empty: every .bin beside the training set.
    verification: tuple[str, ...] = ()
    # Height and width of the aligned faces, pixels. 112 is the field's standard.
    image_size: int = 112
    # Scale training images of another size to image_size; otherwise they count as broken.
    resize: bool = False
    # Leave out identities with fewer training images.
    min_images: int = 1
    # Order of an epoch: exact shuffles all images; blocks reads runs of neighbours, for spinning or network disks;
    # balanced shows every identity equally often.
    order: OrderName = "exact"
    # Broken training images are left out of the loss; more of them than this stop the run with their list.
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
        require(self.image_size >= 16, "data.image_size", f"must be 16 or more, got {self.image_size}")
        require(self.min_images >= 1, "data.min_images", f"must be 1 or more, got {self.min_images}")
        require(self.broken_limit >= 0, "data.broken_limit", f"must be 0 or more, got {self.broken_limit}")
        for name in ("crop", "blur", "low_resolution", "colour", "grey"):
            value = getattr(self, f"augment_{name}")
            require(0 <= value <= 1, f"data.augment_{name}", f"must be from 0 to 1, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """The network that turns a face into an embedding."""

    # r18, r34, r50, r100, r200 (IResNet), mbf (MobileFaceNet) or demo (tiny, for trying the program on a CPU).
    network: str = "r50"
    # Numbers in an embedding. 512 is the field's standard.
    embedding_size: int = 512
    # What a foreign net (ONNX) expects of RGB 0..255: auto looks whether it normalises itself; none feeds 0..255;
    # 127.5 feeds (rgb - 127.5) / 127.5; 128 feeds (rgb - 127.5) / 128.
    normalisation: Literal["auto", "none", "127.5", "128"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "model")
        require(self.embedding_size > 0, "model.embedding_size", f"must be positive, got {self.embedding_size}")


@dataclass(frozen=True)
class LossConfig:
    """The margin-based softmax loss."""

    # arcface adds the margin to the angle, cosface subtracts it from the cosine, softmax has none.
    name: Literal["arcface", "cosface", "softmax"] = "arcface"
    # arcface: radians, 0.5 as published; cosface: cosine, 0.4 as published; softmax ignores it.
    margin: float = 0.5
    # Factor on the cosines before the softmax (s). 64 as published; smaller for a few hundred identities.
    scale: float = 64.0

    def __post_init__(self) -> None:
        check_types(self, "loss")
        require(0 <= self.margin <= 1.5, "loss.margin", f"must be between 0 and 1.5, got {self.margin}")
        require(self.scale > 0, "loss.scale", f"must be positive, got {self.scale}")


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    # Name of the run's folder. Empty: date, time and network.
    run: str = ""
    # Run to go on with (its folder): its settings hold, save for the flags given.
    resume: str = ""
    # Passes over the training set. 20 as published for IResNet on millions of images, 40 for MobileFaceNet.
    epochs: int = 20
    # Images per optimizer step. Published recipes: 1024 with lr 0.1, or 128 with lr 0.02.
    batch_size: int = 128
    # Peak learning rate; it falls linearly to 0 at the last step. Change it with batch_size.
    lr: float = 0.02
    # Epochs over which the learning rate climbs to its peak. The published recipe has none; small sets gain from some.
    warmup_epochs: float = 0.0
    # Momentum of SGD.
    momentum: float = 0.9
    # Weight decay of SGD: 5e-4 as published, 1e-4 for MobileFaceNet and Glint360K.
    weight_decay: float = 5e-4
    # Largest norm of the network's gradient; longer ones are scaled down to it. 5 as published.
    gradient_clip: float = 5.0
    # auto: bfloat16 on CUDA cards that have it, float16 with loss scaling on older ones, float32 on the CPU.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
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

    def __post_init__(self) -> None:
        check_types(self, "train")
        for name in ("epochs", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name}", f"must be 1 or more, got {value}")
        require(self.batch_size >= 2, "train.batch_size", f"must be 2 or more (batch norm), got {self.batch_size}")
        for name in ("verify_every", "checkpoint_every", "warmup_epochs", "weight_decay", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", f"must be 0 or more, got {value}")
        for name in ("lr", "gradient_clip"):
            value = getattr(self, name)
            require(value > 0, f"train.{name}", f"must be positive, got {value}")
        require(0 <= self.momentum < 1, "train.momentum", f"must be in [0, 1), got {self.momentum}")
        require(
            self.warmup_epochs <= self.epochs,
            "train.warmup_epochs",
            f"must not exceed train.epochs ({self.epochs}), got {self.warmup_epochs}",
        )


@dataclass(frozen=True)
class TestConfig:
    """Testing a model."""

    # What to test on: .bin files (10-fold protocol), face sets (all pairs). Empty: the verification sets of `data`.
    sets: tuple[str, ...] = field(default=(), metadata={"positional": True})
    # Run folder, .safetensors, .pth (a state dict of model.network) or .onnx. Empty: the newest run's best.
    model: str = ""
    # Add the embedding of the mirrored image, as published numbers do.
    mirror: bool = True
    # Images per forward pass.
    batch_size: int = 64
    # Folder for pictures and JSON. Empty: `test` in the run's folder, or `runs/test-NAME` for foreign models.
    output: str = ""

    def __post_init__(self) -> None:
        check_types(self, "test")
        require(self.batch_size >= 1, "test.batch_size", f"must be 1 or more, got {self.batch_size}")


@dataclass(frozen=True)
class MergeConfig:
    """Joining face sets by identity."""

    # The sets, comma separated, the one to keep labels of first: rec sets or folders of identities.
    sets: tuple[str, ...] = field(default=(), metadata={"aliases": ("--merge",)})
    # Folder for the merged set; it must not exist yet.
    output: str = ""
    # Model that compares the faces, as in `test.model`. Empty: the newest run's best.
    model: str = ""
    # Images per forward pass.
    batch_size: int = 64
    # Cosine from which two identities are the same person.
    t: float = 0.65
    # Add the embedding of the mirrored image.
    mirror: bool = False

    def __post_init__(self) -> None:
        check_types(self, "merge")
        require(self.batch_size >= 1, "merge.batch_size", f"must be 1 or more, got {self.batch_size}")
        require(-1 <= self.t <= 1, "merge.t", f"must be a cosine between -1 and 1, got {self.t}")


@dataclass(frozen=True)
class PrepareConfig:
    """Turning a `.rec` set into folders of images."""

    # The set: a folder with a .rec and .idx file, or the .rec file. Empty: data.root.
    rec_data_path: str = field(default="", metadata={"aliases": ("--r",)})
    # Where the folders go: OUTPUT/<label>/<key>.jpg. Empty: `images` in the set's folder.
    output: str = ""
    # Identities to unpack, comma separated, by their labels in the set; @FILE: a text file with one a line. Empty: all.
    identities: tuple[str, ...] = ()
    # Identities with fewer images are left out.
    min_images: int = 1
    # Identities to unpack at most, those with the lowest labels. 0: all.
    limit: int = 0

    def __post_init__(self) -> None:
        check_types(self, "prepare")
        for name in ("min_images", "limit"):
            value = getattr(self, name)
            require(value >= 0, f"prepare.{name}", f"must be 0 or more, got {value}")


@dataclass(frozen=True)
class PackConfig:
    """Packing a `.rec` set from images, a list or another set."""

    # What to pack: a folder with one folder per identity, a .rec set, a .lst of face2rec or im2rec, or a CSV.
    source: str = ""
    # Folder for the set; it must not exist yet.
    output: str = ""
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
    # JPEG quality of aligned and resized faces, 1 to 100. Other images keep their bytes.
    quality: int = 95

    def __post_init__(self) -> None:
        check_types(self, "pack")
        for name in ("min_images", "limit", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"pack.{name}", f"must be 0 or more, got {value}")
        require(self.image_size >= 16, "pack.image_size", f"must be 16 or more, got {self.image_size}")
        require(1 <= self.quality <= 100, "pack.quality", f"must be from 1 to 100, got {self.quality}")


@dataclass(frozen=True)
class PackBinConfig:
    """Packing a verification set (`.bin`) from a list of pairs."""

    # The list: LFW's pairs.txt, or a CSV with the header path1,path2,same.
    pairs: str = ""
    # Folder of the images that the list names.
    images: str = ""
    # The .bin to write; beside a training set, training verifies on it.
    output: str = ""
    # Height and width of the faces, pixels.
    image_size: int = 112
    # Faces of another size: refuse stops with the name of the image, resize makes new JPEGs of them.
    other_sizes: Literal["refuse", "resize"] = "refuse"
    # JPEG quality of resized faces, 1 to 100. Other images keep their bytes.
    quality: int = 95

    def __post_init__(self) -> None:
        check_types(self, "pack_bin")
        require(self.image_size >= 16, "pack_bin.image_size", f"must be 16 or more, got {self.image_size}")
        require(1 <= self.quality <= 100, "pack_bin.quality", f"must be from 1 to 100, got {self.quality}")


@dataclass(frozen=True)
class ReportConfig:
    """Looking at a face set and checking it."""

    # The set: a folder with a .rec file, a .rec file, or a folder with one folder per identity. Empty: data.root.
    set: tuple[str, ...] = field(default=(), metadata={"positional": True})
    # Decode every image and list the broken ones; else only the heads of the records are read.
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
        for name in ("sample", "rows"):
            value = getattr(self, name)
            require(value >= 1, f"report.{name}", f"must be 1 or more, got {value}")
        require(self.seed >= 0, "report.seed", f"must be 0 or more, got {self.seed}")


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
        require(self.shots >= 2, "demo.shots", f"must be 2 or more, got {self.shots}")
        require(self.test_people >= 2, "demo.test_people", f"must be 2 or more, got {self.test_people}")
        require(
            2 <= self.more_people <= 2 * self.people,
            "demo.more_people",
            f"must be from 2 to twice demo.people ({self.people}), got {self.more_people}",
        )
        require(self.seed >= 0, "demo.seed", f"must be 0 or more, got {self.seed}")


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
    demo: DemoConfig = DemoConfig()


# The recipe of insightface's arcface_torch for eight cards of 128 images each.
_PUBLISHED = {"train.batch_size": 1024, "train.lr": 0.1, "train.weight_decay": 5e-4, "train.epochs": 20}
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
    # ArcFace paper, section 3.1: 32 k steps of 512 images; its LR steps are replaced by the linear fall.
    "casia_r50": {
        **_PUBLISHED,
        "data.root": ("datasets/casia",),
        "loss.name": "arcface",
        "loss.margin": 0.5,
        "model.network": "r50",
        "train.batch_size": 512,
        "train.epochs": 34,
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
        "train.log_every": 10,
        "train.verify_at_start": True,
        # The small net knows drawn faces from few people: new ones look more alike to it than real ones to real nets.
        "merge.t": 0.93,
    },
}
