"""The tables of a recipe: what may stand in each, its type, its bounds, its default."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

EMBEDDED_NAMES = frozenset({"banking77", "minilm"})
"""What the package carries: never a path, even where a folder has the same name."""


COLUMNS = ("text", "label", "prompt", "response", "context", "messages", "image", "caption")
"""Keys under ``[data]`` that name a column of what an example is."""

Form = Literal["text", "chat", "image", "caption"]
"""What one example of a source is: a text, a chat, a picture, or a picture with its caption."""


class Section(BaseModel):
    """A table of the recipe: strict types, no unknown keys, immutable once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _refuse_idle(section: BaseModel, keys: Iterable[str], idle: bool, why: str, allowed: str) -> None:
    """Refuse what was set and changes nothing: whoever set it believes that it does."""
    for key in keys if idle else ():
        if (value := getattr(section, key)) != type(section).model_fields[key].default:
            raise ValueError(f"{key} = {value} {why} changes nothing; allowed: {allowed}, or to leave it out")


class ModelSection(Section):
    """The frozen backbone and what it is asked to do."""

    name: str = Field("minilm", min_length=1, description="embedded name, folder, or hub id of a Hugging Face model")
    task: Literal["classification", "causal-lm", "image-text"] = "classification"
    pooling: Literal["auto", "mean", "cls", "last"] = Field("auto", description="token states -> one feature")
    template: str | None = Field(
        None,
        description='what stands around a prompt (not the chat template), or around a class name; "{}" is its place',
    )
    max_length: int = Field(128, ge=2, le=8192, description="tokens; longer texts are cut")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="training compute; evaluation is float32")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    checkpointing: bool = Field(False, description="gradient checkpointing: less memory, a second forward pass")
    quantize: Literal["none", "bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8", "torchao-int4"] = Field(
        "none", description="keep the backbone so in memory, by that library"
    )
    bits: Literal[8, 4, 3, 2] | None = Field(None, description="of the frozen weights; default: as they come")
    salient: float = Field(0.1, ge=0, le=1, description="bits: share of each matrix's blocks that keeps 8")
    block: int = Field(64, ge=1, le=65535, description="bits: weights that share a scale")

    @model_validator(mode="after")
    def _template_has_a_place(self) -> ModelSection:
        if self.template is not None and self.template.count("{}") != 1:
            raise ValueError(f'template = {short(self.template)}; allowed: a text with one "{{}}" in it')
        if self.bits is not None and self.quantize != "none":
            raise ValueError(f'bits = {self.bits} with quantize = "{self.quantize}"; allowed: one of them')
        _refuse_idle(self, ("salient", "block"), self.bits is None, "without bits", "to set bits")
        return self


ClassNames = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    # TOML has lists; sections are keys of caches, and lists cannot be.
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


class DataSection(Section):
    """Where the examples come from and how clients share them."""

    source: str = Field("banking77", min_length=1, description="embedded name, file, or dataset folder")
    test: str | None = Field(None, description="a file with the common test set; default: the source's own, if any")
    text: str = Field("text", min_length=1)
    label: str | None = Field(None, min_length=1, description='default: "label" where the task needs one')
    prompt: str = Field("prompt", min_length=1, description="causal-lm: what is asked")
    response: str = Field("response", min_length=1, description="causal-lm: what is learned")
    context: str | None = Field(None, min_length=1, description="causal-lm: stands behind the prompt where not empty")
    messages: str | None = Field(
        None, min_length=1, description="causal-lm: a column with a chat, in place of prompt and response"
    )
    image: str | None = Field(None, min_length=1, description="a column (or array) with pictures")
    caption: str | None = Field(None, min_length=1, description="image-text: a column with captions, learned as pairs")
    classes: ClassNames | None = Field(None, description="all labels there are, in order; default: those found, sorted")
    limit: int | None = Field(None, ge=2, description="use at most this many examples (stratified, seeded)")
    test_limit: int | None = Field(None, ge=2, description="likewise, of the common test set")
    clients: int = Field(10, ge=1, le=1_000_000)
    partition: Literal["iid", "dirichlet", "pathological", "natural", "shards"] = "dirichlet"
    alpha: float = Field(0.5, gt=0, description="dirichlet: concentration; small = skewed")
    by: str | None = Field(
        None,
        description="natural: the column whose values are the clients; else the column that is skewed, not the label",
    )
    classes_per_client: int = Field(2, ge=1, description="pathological")
    shards_per_client: int = Field(2, ge=1, description="shards")
    min_examples: int = Field(10, ge=3, description="every client has at least this many examples")
    shots: int | None = Field(
        None, ge=1, description="a client trains on at most so many examples of each class; its others are left alone"
    )
    train_share: float = Field(
        1.0, gt=0, le=1, description="fraction of its training examples that a client trains on; others are left alone"
    )
    validation: float = Field(0.1, gt=0, lt=1, description="fraction of each client's examples")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="fraction of each client's examples")

    @model_validator(mode="after")
    def _can_be_shared_out(self) -> DataSection:
        if self.validation + self.test_fraction >= 1:
            raise ValueError(
                f"validation + test_fraction = {self.validation + self.test_fraction:g} leaves nothing to train on; "
                "allowed: a sum below 1"
            )
        if self.classes is not None and len(set(self.classes)) != max(2, len(self.classes)):
            raise ValueError(f"classes = {short(list(self.classes))}; allowed: two names or more, each once")
        if self.partition == "natural" and not self.by:
            raise ValueError('partition = "natural" needs `by = "column"`, the column whose values are the clients')
        return self


Rank = Annotated[int, Field(ge=1, le=4096)]


class AdapterSection(Section):
    """The low-rank adapter of each client."""

    rank: Rank | list[Rank] = Field(8, description="one rank for all, or a list, one a client")
    device_ranks: list[Rank] | None = Field(
        None, min_length=1, description="one rank a class of devices, in place of rank; clients are dealt by the seed"
    )
    device_shares: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="of the clients in each class; default: equal shares"
    )
    promote: Rank | None = Field(None, description="the rank that the best of the clients first validated rise to")
    promote_share: float = Field(0.1, gt=0, le=1, description="of the clients first validated")
    alpha: float = Field(16.0, gt=0, description="scaling s = alpha / rank")
    targets: str = Field("default", min_length=1, description='"default", or a regex over module names')
    tower: Literal["both", "image", "text"] = Field("both", description="image-text: where adapters sit")
    dropout: float = Field(0.0, ge=0, lt=1)
    norm: bool = Field(False, description="also train the LayerNorms")

    @model_validator(mode="after")
    def _ranks_follow_one_rule(self) -> AdapterSection:
        if self.device_ranks and isinstance(self.rank, list):
            raise ValueError("device_ranks with a list of ranks; allowed: one of them")
        if self.device_shares is not None:
            classes = len(self.device_ranks or [])
            if len(self.device_shares) != classes:
                raise ValueError(
                    f"device_shares lists {len(self.device_shares)} shares for {classes} device_ranks; "
                    "allowed: one a class"
                )
            if abs(sum(self.device_shares) - 1) > 1e-6:
                raise ValueError(f"device_shares sum to {sum(self.device_shares):g}; allowed: a sum of 1")
        if self.promote is not None and (self.device_ranks or isinstance(self.rank, list) or self.promote <= self.rank):
            start = f"device_ranks = {self.device_ranks}" if self.device_ranks else f"rank = {self.rank}"
            raise ValueError(f"promote = {self.promote} with {start}; allowed: one rank for all, below promote")
        _refuse_idle(self, ("promote_share",), self.promote is None, "without promote", "to set promote")
        return self


class MethodSection(BaseModel):
    """The federated method; its own options stand beside the name."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = Field("celora", min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _options_can_be_written(self) -> MethodSection:
        for key, value in self.options.items():
            if not is_plain(value):
                raise ValueError(f"{key} = {short(value)}; allowed: a string, a finite number, true, false, or a list")
        return self


class TrainSection(Section):
    """Local training at the clients and the rounds around it."""

    rounds: int = Field(10, ge=0, le=100_000)
    local_epochs: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    lr: float = Field(1e-3, gt=0, le=1e6)
    head_lr: float | None = Field(None, gt=0, le=1e6, description="of the task's own head; default: lr")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    optimizer_state: Literal["fresh", "kept"] = Field("fresh", description="moments across rounds")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd")
    weight_decay: float = Field(0.0, ge=0)
    # TOML has no null, and here "no value" is not the default.
    clip: Annotated[
        Annotated[float, Field(gt=0)] | None, BeforeValidator(lambda value: None if value == "none" else value)
    ] = Field(1.0, description='gradient norm of one client; "none": not clipped')
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of the client's steps in the whole run")
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    participation: float = Field(1.0, gt=0, le=1, description="fraction of clients sampled each round")
    failures: float = Field(0.0, ge=0, lt=1, description="simulated: fraction of the sampled clients that drop out")
    evaluate_every: int = Field(1, ge=1, description="rounds between validations")
    patience: int | None = Field(None, ge=1, description="early stopping: validations without improvement")
    cohort: int | Literal["auto"] = Field("auto", description="clients trained side by side")
    tokens: int = Field(2048, ge=1, description='tokens a step aims at when cohort = "auto"')
    packed: Literal["auto", "always", "never"] = Field("auto", description="pack texts into rows without padding")

    @model_validator(mode="after")
    def _cohort_is_positive(self) -> TrainSection:
        if self.cohort != "auto" and self.cohort < 1:
            raise ValueError(f'cohort = {self.cohort}; allowed: "auto" or a number >= 1')
        return self

    @model_validator(mode="after")
    def _rates_are_of_one_kind(self) -> TrainSection:
        _refuse_idle(self, ("momentum",), self.optimizer == "adamw", 'with optimizer = "adamw"', 'optimizer = "sgd"')
        if not 1e-6 <= self.head_rate <= 1e6:
            raise ValueError(
                f"head_lr = {self.head_lr:g} with lr = {self.lr:g}; allowed: at most a million times apart"
            )
        return self

    @property
    def head_rate(self) -> float:
        """Multiplies the learning rate where the task's own head is trained."""
        return 1.0 if self.head_lr is None else self.head_lr / self.lr

    def sampled(self, clients: int) -> int:
        """How many of so many clients take part in a round: the fraction, rounded half up, and never nobody."""
        return max(1, math.floor(self.participation * clients + 0.5))


class EvalSection(Section):
    """What is measured once, at the end, on the test splits, beside the task's own metric."""

    generate: tuple[Literal["rouge_l", "exact_match"], ...] = Field(
        (), description="causal-lm: of answers that are generated"
    )
    max_new_tokens: int = Field(64, ge=1, le=8192)
    examples: int = Field(64, ge=1, description="at most so many of a client's")

    @field_validator("generate", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class MessageSection(Section):
    """What travels."""

    dtype: Literal["float32", "float16", "bfloat16", "int8", "int4"] = "float32"
    top_k: float = Field(1.0, gt=0, le=1, description="fraction of each tensor's update that is sent up")
    error_feedback: bool = Field(False, description="what an upload lost is added to the client's next")


class EngineSection(Section):
    """Where the round runs, and how long it waits for whom."""

    kind: Literal["local", "flower"] = "local"
    min_clients: int = Field(0, ge=0, description="fewer in a round: it is not committed, and the run stops")
    wait: float = Field(600.0, ge=0, le=1e6, description="seconds to wait for clients that are not connected")
    deadline: float = Field(600.0, gt=0, le=1e6, description="seconds for an answer; later ones do not count")


class PrivacySection(Section):
    """Differential privacy of training: whose presence cannot be told, and at which price."""

    unit: Literal["none", "client", "example"] = Field("none", description="whose presence is hidden")
    clip: float = Field(1.0, gt=0, le=1e6, description="L2: of a client's update, or of one example's gradient")
    noise: float | None = Field(
        None, ge=1e-12, le=1e6, description="multiplier: sd per unit of sensitivity; default: as epsilon wants it"
    )
    epsilon: float | None = Field(None, gt=0, le=1e6, description="budget; with noise, the run stops before it is over")
    delta: float = Field(1e-5, gt=0, lt=1)
    placement: Literal["server", "shares", "client"] = Field(
        "server", description="client unit: who adds the noise: the server, each client a share, each client all of it"
    )
    accountant: Literal["pld", "rdp"] = "pld"

    @model_validator(mode="after")
    def _noise_is_known(self) -> PrivacySection:
        if self.unit != "none" and self.noise is None and self.epsilon is None:
            raise ValueError(f'unit = "{self.unit}" without noise; allowed: noise, epsilon, or both')
        return self

    @property
    def tells_losses(self) -> bool:
        """Whether clients tell their exact training losses: not where their words alone must not tell who they are."""
        return self.unit == "none" or (self.unit == "client" and self.placement == "server")


class SecureSection(Section):
    """What the server is kept from reading."""

    kind: Literal["none", "masks", "ckks"] = Field(
        "none", description="masks: it reads sums alone (secure aggregation); ckks: it mixes cores it cannot read"
    )
    threshold: float = Field(0.5, gt=0, le=1, description="masks: share of a round's clients that opens the sum")
    range: float = Field(8.0, gt=0, le=1e6, description="masks: numbers are clipped to plus or minus this")


class RobustSection(Section):
    """What the server takes in place of the mean, against clients that lie."""

    rule: Literal["mean", "clip", "median", "trimmed", "krum", "multikrum", "geometric"] = "mean"
    byzantine: float = Field(0.2, ge=0, lt=0.5, description="share of liars to withstand: trimmed, krum, multikrum")
    norm: float | None = Field(None, gt=0, description="clip: L2 of an update; default: the round's median")


class PoisonSection(Section):
    """Simulated, in the local engine: clients that lie."""

    kind: Literal["none", "labels", "sign", "noise", "backdoor", "scramble", "duplicate"] = "none"
    share: float = Field(0.0, ge=0, le=1, description="of the clients")
    scale: float = Field(1.0, gt=0, le=1e6, description="what a liar's update is multiplied by")
    rows: float = Field(1.0, gt=0, le=1, description="scramble, duplicate: of a liar's training examples")

    @model_validator(mode="after")
    def _liars_tell_something(self) -> PoisonSection:
        if self.kind == "none" and self.share:
            raise ValueError(f'share = {self.share:g} with kind = "none"; allowed: another kind, or share = 0')
        if self.rows != 1 and self.kind not in ("scramble", "duplicate"):
            raise ValueError(f'rows = {self.rows:g} with kind = "{self.kind}"; allowed: kind = "scramble", "duplicate"')
        return self


class FaultsSection(Section):
    """Simulated, in the local engine: the fraction of answers that each fault strikes."""

    offline: float = Field(0.0, ge=0, le=1, description="the client is not connected")
    late: float = Field(0.0, ge=0, le=1, description="it arrives after the deadline, in the next round")
    duplicate: float = Field(0.0, ge=0, le=1, description="it arrives twice")
    corrupt: float = Field(0.0, ge=0, le=1, description="its bytes are damaged on the way")


class NewcomersSection(Section):
    """Simulated: clients that join when all rounds are over, and start from what the server makes of their sketch."""

    share: float = Field(0.0, ge=0, lt=1, description="of the clients; who they are follows from the seed")


class DriftSection(Section):
    """Simulated, in the local engine: clients whose data change in mid-run."""

    kind: Literal["none", "labels", "classes"] = Field(
        "none", description="labels: shared out anew, as at first; classes: some that a client did not have join in"
    )
    round: int = Field(2, ge=2, le=100_000, description="the first with the new data")
    share: float = Field(1.0, gt=0, le=1, description="of the clients; who they are follows from the seed")


Steps = Annotated[int, Field(ge=1, le=1000)]


class DepthSection(Section):
    """How often a backbone with one shared block applies it (ALBERT and its kin)."""

    steps: Steps | Literal["full", "auto"] = Field(
        "full", description="of validation, test and serving; auto: each client's own choice, when all rounds are over"
    )
    train: tuple[Steps, ...] = Field((), description="each minibatch draws one of these; default: always `steps`")
    device_steps: tuple[Steps, ...] = Field(
        (), description="the most steps of a class of devices, in place of steps; clients are dealt by the seed"
    )
    device_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (), description="of the clients in each class; default: equal shares"
    )
    tolerance: float = Field(0.01, ge=0, le=1, description="auto: what the validation score may lose by fewer steps")

    @field_validator("train", "device_steps", "device_shares", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _steps_follow_one_rule(self) -> DepthSection:
        for name, values in (("train", self.train), ("device_steps", self.device_steps)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} = {list(values)}; allowed: numbers of steps, each once")
        if self.device_steps and isinstance(self.steps, int):
            raise ValueError(f'device_steps with steps = {self.steps}; allowed: steps = "full" or "auto"')
        if self.device_shares and len(self.device_shares) != len(self.device_steps):
            raise ValueError(
                f"device_shares lists {len(self.device_shares)} shares for {len(self.device_steps)} device_steps; "
                "allowed: one a class"
            )
        if self.device_shares and abs(sum(self.device_shares) - 1) > 1e-6:
            raise ValueError(f"device_shares sum to {sum(self.device_shares):g}; allowed: a sum of 1")
        if self.steps == "auto" and not self.train:
            raise ValueError('steps = "auto" without train; allowed: train, the numbers of steps to choose from')
        fewest = min(self.device_steps, default=None)
        if fewest is not None and self.train and min(self.train) > fewest:
            raise ValueError(
                f"train = {list(self.train)}, and a class of devices takes {fewest} steps at most; "
                f"allowed: at least one of train up to {fewest}"
            )
        return self

    @property
    def said(self) -> bool:
        """Whether anything is asked of a shared block."""
        return self.steps != "full" or bool(self.train or self.device_steps)


class AuditSection(Section):
    """What a client's audit of its own data is used for."""

    weights: Literal["none", "duplicates", "regularity", "both"] = Field(
        "none", description="what makes an example count less in an average"
    )


class TrackSection(Section):
    """Optional experiment trackers beside the run directory."""

    tensorboard: bool = False
    mlflow: str | None = Field(None, description="tracking URI")


def is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def short(value: Any) -> str:
    """What a message quotes of a value, however long it is."""
    if isinstance(value, str | bytes):  # before it is spelt out
        value = value[:200]
    shown = repr(value)
    return shown if len(shown) <= 120 else reprlib.repr(value)
