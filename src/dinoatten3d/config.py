"""The configuration: frozen dataclasses that are at once the options, their help and the record of a run.

A recipe is a TOML file with the tables `slices`, `patches`, `model`, `loss`, `training` and `lora`; three of them ship
with the package (`default`, `paper`, `published`). Evaluation is never part of a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dinoatten3d.errors import ConfigError

Plane = Literal["axial", "coronal", "sagittal"]
Covariate = Literal["age", "sex", "site", "head-size"]


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """Which slices are taken from a volume, and how they become pixels."""

    planes: tuple[Plane, ...] = ("axial",)
    """Anatomical planes of the slices, one or several."""
    count: int = 24
    """Slices a plane, > 0."""
    centre: Literal["brain", "array"] = "brain"
    """Centre the slices on the brain's extent or on the array."""
    spacing_mm: float | Literal["native", "brain"] = "brain"
    """Distance between slices: a number in mm, 'native' (neighbouring voxels) or 'brain' (spread over its extent)."""
    window: Literal["volume", "slice"] = "volume"
    """Grey window: the volume's 0.5-99.5 % of brain intensities, or each slice from minimum to maximum."""
    fit: Literal["brain", "array", "published"] = "brain"
    """What fills the picture: the brain's box, the whole array, or the published resize-and-centre-crop."""
    size_px: int = 224
    """Side of the square picture in pixels, a multiple of the backbone's patch."""

    def __post_init__(self) -> None:
        known = get_args(Plane)
        if isinstance(self.planes, str) or not self.planes or not set(self.planes) <= set(known):
            raise ConfigError(f"slices.planes is {_shown(self.planes)}; wanted one or several of {', '.join(known)}")
        if len(set(self.planes)) < len(self.planes):
            raise ConfigError(f"slices.planes is {_shown(self.planes)}; name each plane once")
        _at_least("slices.count", self.count, 1)
        _at_least("slices.size_px", self.size_px, 14)
        if not isinstance(self.spacing_mm, str) and not 0 < self.spacing_mm < 100:
            raise ConfigError(f"slices.spacing_mm is {self.spacing_mm}; it must lie between 0 and 100 mm")
        if self.fit == "published" and self.window != "slice":
            raise ConfigError("slices.fit 'published' goes with slices.window 'slice', as in the published code")


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Patch tokens that are kept beside the CLS token, for the deviation from healthy scans."""

    layers: tuple[int, ...] = (9,)
    """Layers whose patch tokens are kept, 1 being the first; empty: none. One pass serves them all."""
    blemished: int = 8
    """Slices a plane that are embedded once more with a painted blemish, which teaches what 'abnormal' looks like."""
    pca: int = 0
    """Components that the tokens of each layer are reduced to (features/reduce.py), 0: none."""

    def __post_init__(self) -> None:
        layers = self.layers
        if not isinstance(layers, tuple) or len(set(layers)) < len(layers) or any(layer < 1 for layer in layers):
            raise ConfigError(f"patches.layers is {_shown(layers)}; wanted different layers, each 1 or more, or none")
        _at_least("patches.blemished", self.blemished, 0)
        _at_least("patches.pca", self.pca, 0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The slice attention and the head on top of it."""

    pooling: Literal["deviation", "attention"] = "deviation"
    """Attend by how a slice deviates from the first class (closed form), or with a trained scorer as in the paper."""
    layers: tuple[int, ...] = ()
    """Which of the kept layers are looked at (patches.layers of the features); empty: all of them."""
    slice_features: Literal["cls", "mean", "cls+mean"] = "cls"
    """What a slice is to the trained attention: its CLS token, the mean of its tissue patches, or both."""
    standardise: bool = True
    """Centre and scale each feature by the mean-pooled training scans: by how people differ, not by how slices do."""
    attention_width: int = 64
    """Width of the hidden layer that scores a slice."""
    attention_start: Literal["uniform", "random"] = "uniform"
    """Start from equal weights (last layer zero) or from a random scorer."""
    hidden: tuple[int, ...] = ()
    """Widths of the embedding head's layers; empty: the pooled feature is the embedding."""
    relu_embedding: bool = False
    """End the embedding in a ReLU, as the published code does (cosines are then never below 0)."""
    dropout: float = 0.3
    """Dropout on the pooled feature, 0 to below 1."""
    slice_dropout: float = 0.1
    """Chance that a slice is left out of a training bag, 0 to below 1."""

    def __post_init__(self) -> None:
        _at_least("model.attention_width", self.attention_width, 1)
        for name in ("dropout", "slice_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be 0 or more and below 1")
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"model.hidden is {self.hidden}; every width must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and variants of the composite loss."""

    supcon: float = 0.0
    """Weight of the supervised contrastive term (cross-entropy has weight 1)."""
    temperature: float = 0.07
    """SupCon temperature, > 0."""
    lonely_anchors: Literal["drop", "zero"] = "drop"
    """An anchor without another scan of its class is left out of the mean, or counted as zero (published)."""
    variance: float = 0.0
    """Weight of the within-class variance of the embedding."""
    variance_scale: Literal["sum", "mean"] = "sum"
    """Sum the variance over embedding dimensions, or average it (published; too small to act)."""
    class_weights: bool = True
    """Weigh classes by their inverse frequency in cross-entropy."""
    classification: Literal["cross_entropy", "focal", "logit_adjusted"] = "cross_entropy"
    """Cross-entropy; focal loss; or cross-entropy on logits shifted by the classes' frequency, in place of weights."""
    focal_gamma: float = 2.0
    """How much focal loss plays down scans that are told already; 0 is cross-entropy."""

    def __post_init__(self) -> None:
        if self.focal_gamma < 0:
            raise ConfigError(f"loss.focal_gamma is {self.focal_gamma}; it must be 0 or more")
        if self.temperature <= 0:
            raise ConfigError(f"loss.temperature is {self.temperature}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the model is fitted inside one outer fold."""

    members: int = 5
    """Models trained side by side on different inner folds and averaged."""
    inner_folds: int = 5
    """Inner folds; one of them is the validation set that chooses the epoch."""
    epochs: int = 150
    """Passes over the inner training scans at most."""
    patience: int = 40
    """Stop after this many epochs without a better validation score; 0: never."""
    batch_size: int = 16
    """Bags in a step."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """Every scan once an epoch, or scans drawn so that each class comes as often (then no class is weighted)."""
    learning_rate: float = 1e-3
    """Adam learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay (AdamW)."""
    checkpoint: Literal["loss", "accuracy"] = "loss"
    """The inner-validation figure that chooses the epoch."""
    trained: Literal["all", "embedding"] = "all"
    """Train everything, or only the embedding head while attention and classifier stay random (published)."""

    def __post_init__(self) -> None:
        for name in ("members", "epochs", "batch_size"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        _at_least("training.inner_folds", self.inner_folds, 2)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank matrices beside the linear layers of the backbone's last blocks, trained with attention and head."""

    blocks: int = 2
    """Last blocks that are adapted; those below stay frozen and are run once a scan."""
    rank: int = 8
    """Rank of the matrices, > 0."""
    alpha: int = 16
    """The low-rank product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the low-rank product, 0 to below 1."""
    learning_rate: float = 3e-4
    """AdamW learning rate of the matrices (attention and head have training.learning_rate)."""
    epochs: int = 10
    """Passes over the inner training scans at most; before the first, attention and head learn on the frozen tokens."""
    patience: int = 3
    """Stop after this many epochs without a better validation score; 0: never."""
    batch_size: int = 8
    """Scans in a step, on each device."""
    accumulation: int = 1
    """Parts in which a batch passes the blocks, which saves memory; the loss and its gradient are the same."""
    slices: int = 0
    """Slices of a scan in a step, drawn anew each time; 0: all."""

    def __post_init__(self) -> None:
        for name in ("blocks", "rank", "epochs", "batch_size", "accumulation"):
            _at_least(f"lora.{name}", getattr(self, name), 1)
        for name in ("patience", "slices"):
            _at_least(f"lora.{name}", getattr(self, name), 0)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must be 0 or more and below 1")


@dataclass(frozen=True, kw_only=True)
class AdjustConfig:
    """Covariates taken out of the features, with what the training scans of each fold teach (learning/adjust.py)."""

    covariates: tuple[Covariate, ...] = ()
    """What the features are adjusted for; none: they stay as they are. With combat: site, and what is preserved."""
    method: Literal["residual", "combat"] = "residual"
    """Subtract the linear effect of the covariates, or bring sites to one location and scale (ComBat)."""

    def __post_init__(self) -> None:
        names, known = self.covariates, get_args(Covariate)
        if not isinstance(names, tuple) or not set(names) <= set(known) or len(set(names)) < len(names):
            raise ConfigError(f"adjust.covariates is {_shown(names)}; wanted some of {', '.join(known)}, each once")
        if self.method not in ("residual", "combat"):
            raise ConfigError(f"adjust.method is '{self.method}'; it must be residual or combat")
        if self.method == "combat" and "site" not in names:
            raise ConfigError("adjust.method 'combat' harmonises sites; add --adjust.covariates site")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that makes a model except the data, the folds and the seed."""

    slices: SliceConfig = field(default_factory=SliceConfig)
    """Slices and pixels (used by `extract`)."""
    patches: PatchConfig = field(default_factory=PatchConfig)
    """Patch tokens (used by `extract`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Attention and head; under pooling 'deviation' its other settings, the loss and the training have no part."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Composite loss."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Optimisation."""
    adapt: Literal["none", "lora"] = "none"
    """Leave the backbone as it is, or adapt its last blocks inside each outer fold (without shuffled labels)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """How, with adapt 'lora'."""
    adjust: AdjustConfig = field(default_factory=AdjustConfig)
    """Covariates taken out of the features within each fold."""

    def __post_init__(self) -> None:
        if self.adapt not in ("none", "lora"):
            raise ConfigError(f"adapt is '{self.adapt}'; it must be none or lora")
        if self.adapt == "lora" and self.model.pooling == "deviation":
            raise ConfigError(
                "adapt 'lora' trains through the slice attention, and pooling 'deviation' has nothing to train; "
                "add --model.pooling attention"
            )
        if self.adapt == "lora" and self.model.slice_features != "cls":
            raise ConfigError(
                f"adapt 'lora' goes through the CLS token, and model.slice_features is '{self.model.slice_features}'; "
                "leave it at cls"
            )
        if self.adapt == "lora" and self.adjust.covariates:
            raise ConfigError(
                "adapt 'lora' sees the scans and not the features, so nothing can be adjusted; use one of them"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a recipe is judged; the same for every recipe."""

    split: Literal["folds", "site", "column"] = "folds"
    """Hold out k folds of subjects, one site at a time, or what the table's `split` column says."""
    folds: int = 5
    """Outer folds, grouped by subject and stratified by class (with split 'folds')."""
    repeats: int = 1
    """Partitions into folds; a scan's answer is the mean over them (with split 'folds')."""
    seed: int = 0
    """Seed of splits, initial weights, shuffles and bootstrap."""
    bootstrap: int = 1000
    """Subject-level bootstrap replicates for the 95 % intervals."""
    shuffles: int = 20
    """Runs of the whole pipeline on shuffled labels, whose AUROCs say what chance looks like here; 0: none."""
    sensitivity: float = 0.0
    """Sensitivity wanted of the decision threshold; 0: the largest sum of sensitivity and specificity (Youden)."""
    alpha: float = 0.1
    """Share of each class that may fall outside its conformal prediction sets."""
    learning_curve: bool = False
    """Train on growing shares of the subjects too, and extrapolate to larger cohorts (about four runs more)."""
    wanted_half_width: float = 0.05
    """Half the width of the AUROC's 95 % interval that the next cohort should reach, above 0 and below 0.5."""

    def __post_init__(self) -> None:
        _at_least("evaluation.folds", self.folds, 2)
        _at_least("evaluation.repeats", self.repeats, 1)
        _at_least("evaluation.bootstrap", self.bootstrap, 100)
        _at_least("evaluation.shuffles", self.shuffles, 0)
        if not 0 <= self.sensitivity <= 1:
            raise ConfigError(f"evaluation.sensitivity is {self.sensitivity}; it must lie between 0 and 1")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"evaluation.alpha is {self.alpha}; it must lie between 0 and 1")
        if not 0 < self.wanted_half_width < 0.5:
            raise ConfigError(
                f"evaluation.wanted_half_width is {self.wanted_half_width}; it must be above 0 and below 0.5"
            )
        if self.split != "folds" and self.repeats > 1:
            raise ConfigError(f"evaluation.repeats is {self.repeats}, but split '{self.split}' has one partition only")


def _shown(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, tuple) and values else repr(values)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}; it must be {least} or more")
