"""The experiment as data: one TOML file describes a run completely.

``Recipe.read`` parses, overrides and validates; whatever is wrong becomes one `RecipeError` line that names the key,
the value and what is allowed, before any data or model is touched. ``Recipe.to_toml`` writes the resolved recipe,
defaults included, into the run directory; reading that file gives the same recipe back.

The options of a method live beside its name under ``[method]`` and are checked by the method itself
(`folklora.methods.check_options`), because a recipe cannot know every method.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import reprlib
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from folklora.errors import RecipeError

EMBEDDED_NAMES = frozenset({"banking77", "minilm"})
"""What the package carries: never a path, even where a folder has the same name."""


COLUMNS = ("text", "label", "prompt", "response", "context", "messages", "image", "caption")
"""Keys under ``[data]`` that name a column of what an example is."""

Form = Literal["text", "chat", "image", "caption"]
"""What one example of a source is: a text, a chat, a picture, or a picture with its caption."""


class Section(BaseModel):
    """A table of the recipe: strict types, no unknown keys, immutable once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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
            raise ValueError(f'template = {_short(self.template)}; allowed: a text with one "{{}}" in it')
        if self.bits is not None and self.quantize != "none":
            raise ValueError(f'bits = {self.bits} with quantize = "{self.quantize}"; allowed: one of them')
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
            raise ValueError(f"classes = {_short(list(self.classes))}; allowed: two names or more, each once")
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
    tower: Literal["both", "image", "text"] = Field("both", description='image-text: where "default" puts adapters')
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
            if not _is_plain(value):
                raise ValueError(f"{key} = {_short(value)}; allowed: a string, a finite number, true, false, or a list")
        return self


class TrainSection(Section):
    """Local training at the clients and the rounds around it."""

    rounds: int = Field(10, ge=0, le=100_000)
    local_epochs: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    lr: float = Field(1e-3, gt=0, le=1e6)
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

    kind: Literal["none", "labels", "sign", "noise", "backdoor"] = "none"
    share: float = Field(0.0, ge=0, le=1, description="of the clients")
    scale: float = Field(1.0, gt=0, le=1e6, description="what a liar's update is multiplied by")

    @model_validator(mode="after")
    def _liars_tell_something(self) -> PoisonSection:
        if self.kind == "none" and self.share:
            raise ValueError(f'share = {self.share:g} with kind = "none"; allowed: another kind, or share = 0')
        return self


class FaultsSection(Section):
    """Simulated, in the local engine: the fraction of answers that each fault strikes."""

    offline: float = Field(0.0, ge=0, le=1, description="the client is not connected")
    late: float = Field(0.0, ge=0, le=1, description="it arrives after the deadline, in the next round")
    duplicate: float = Field(0.0, ge=0, le=1, description="it arrives twice")
    corrupt: float = Field(0.0, ge=0, le=1, description="its bytes are damaged on the way")


class TrackSection(Section):
    """Optional experiment trackers beside the run directory."""

    tensorboard: bool = False
    mlflow: str | None = Field(None, description="tracking URI")


class Recipe(Section):
    """A complete description of one run."""

    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    method: MethodSection = MethodSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    message: MessageSection = MessageSection()
    privacy: PrivacySection = PrivacySection()
    secure: SecureSection = SecureSection()
    robust: RobustSection = RobustSection()
    engine: EngineSection = EngineSection()
    poison: PoisonSection = PoisonSection()
    faults: FaultsSection = FaultsSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="before")
    @classmethod
    def _label_says_nothing_new(cls, document: Any) -> Any:
        """Recipes written before ``data.label`` could be left open spell its default; they are the same recipes."""
        if isinstance(document, dict) and isinstance(data := document.get("data"), dict):
            model = document.get("model")
            task = model.get("task", "classification") if isinstance(model, dict) else "classification"
            if task == "classification" and data.get("label") == "label":
                return {**document, "data": {key: value for key, value in data.items() if key != "label"}}
        return document

    @property
    def form(self) -> Form:
        """What one example is."""
        if self.model.task == "causal-lm":
            return "chat"
        if self.data.caption is not None:
            return "caption"
        return "image" if self.data.image is not None or self.model.task == "image-text" else "text"

    @model_validator(mode="after")
    def _data_fit_the_task(self) -> Recipe:
        task, data = self.model.task, self.data
        if data.caption is not None and task != "image-text":
            raise ValueError(f'data.caption with model.task = "{task}"; allowed: model.task = "image-text"')
        if data.messages is not None and task != "causal-lm":
            raise ValueError(f'data.messages with model.task = "{task}"; allowed: model.task = "causal-lm"')
        if data.image is not None and task == "causal-lm":
            raise ValueError('data.image with model.task = "causal-lm"; allowed: a text task, without data.image')
        if data.messages is not None and data.context is not None:
            raise ValueError("data.context with data.messages; allowed: one of them")
        if self.model.template is not None and task == "classification":
            raise ValueError(f'model.template with model.task = "{task}"; allowed: "causal-lm" or "image-text"')
        if self.adapter.tower != "both" and task != "image-text":
            raise ValueError(
                f'adapter.tower = "{self.adapter.tower}" with model.task = "{task}"; allowed: model.task = "image-text"'
            )
        if self.model.pooling != "auto" and task != "classification":
            raise ValueError(
                f'model.pooling = "{self.model.pooling}" with model.task = "{task}"; allowed: "auto", or '
                'model.task = "classification"'
            )
        if self.eval.generate and task != "causal-lm":
            raise ValueError(f'eval.generate with model.task = "{task}"; allowed: model.task = "causal-lm"')
        return self

    @model_validator(mode="after")
    def _one_rank_a_client(self) -> Recipe:
        rank = self.adapter.rank
        if isinstance(rank, list) and self.data.partition != "natural" and len(rank) != self.data.clients:
            raise ValueError(
                f"adapter.rank lists {len(rank)} ranks for data.clients = {self.data.clients}; "
                "allowed: one number, or one rank a client"
            )
        return self

    @model_validator(mode="after")
    def _faults_are_simulated(self) -> Recipe:
        simulated = {f"faults.{name}": share for name, share in self.faults} | {"train.failures": self.train.failures}
        simulated["poison.share"] = self.poison.share
        if self.engine.kind != "local" and (named := [name for name, share in simulated.items() if share]):
            raise ValueError(
                f'{named[0]} = {simulated[named[0]]} with engine.kind = "{self.engine.kind}"; '
                'allowed: faults are simulated, with engine.kind = "local"'
            )
        return self

    @model_validator(mode="after")
    def _liars_have_labels(self) -> Recipe:
        if self.poison.kind in ("labels", "backdoor") and self.form not in ("text", "image"):
            raise ValueError(
                f'poison.kind = "{self.poison.kind}" where examples are learned without labels; '
                'allowed: "sign" or "noise"'
            )
        return self

    @classmethod
    def read(cls, path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
        """Read a recipe file and apply ``key=value`` overrides.

        Relative paths in ``data.source``, ``data.test`` and ``model.name`` become absolute, so that a run directory can
        be resumed from anywhere: those in the file are looked for beside it and then in the working directory, those in
        overrides the other way round. What is in neither stays as it is: it may be a hub id.

        Raises
        ------
        RecipeError
            One line naming the file, the key, the value and what is allowed.
        """
        path = Path(path)
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"{path}: no such recipe file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read as text: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path}: not valid TOML: {error}") from None
        return cls.parse(document, overrides, where=str(path), folder=path.parent)

    @classmethod
    def from_toml(cls, text: str, where: str = "recipe") -> Recipe:
        """What `to_toml` wrote, or somebody says it did: paths stay as they are, and nothing is looked for on the disk.

        Raises
        ------
        RecipeError
            One line naming what is wrong; ``where`` it is from stands before it.
        """
        try:
            document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # also of a number with too many digits
            raise RecipeError(f"{where}: not valid TOML: {error}") from None
        return cls._validated(document, where)

    @classmethod
    def parse(
        cls,
        document: dict[str, Any],
        overrides: typing.Sequence[str] = (),
        *,
        where: str = "recipe",
        folder: Path | None = None,
    ) -> Recipe:
        """Validate a document of nested tables; see `read`."""
        document = copy.deepcopy(document)
        if folder is not None:
            _resolve_paths(document, folder)
        for override in overrides:
            _override(document, override)
        for place in (Path.cwd(), folder):
            if place is not None:
                _resolve_paths(document, place)
        return cls._validated(document, where)

    @classmethod
    def _validated(cls, document: dict[str, Any], where: str) -> Recipe:
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise RecipeError(f"{where}: {describe_validation_error(error, cls)}") from None

    def to_toml(self) -> str:
        """The whole recipe as TOML, defaults included; keys without a value are left out."""
        lines: list[str] = [f"seed = {self.seed}"]
        for name, section in self:
            if isinstance(section, BaseModel):
                lines.append(f"\n[{name}]")
                fields = type(section).model_fields
                for key, value in section.model_dump().items():
                    if value is not None:
                        lines.append(f"{key} = {_toml(value)}")
                    elif fields[key].default is not None:
                        lines.append(f'{key} = "none"')
        return "\n".join(lines) + "\n"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _toml(value: Any) -> str:
    # TOML's finite scalars and flat lists are spelt as JSON spells them, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _short(value: Any) -> str:
    """What a message quotes of a value, however long it is."""
    if isinstance(value, str | bytes):  # before it is spelt out
        value = value[:200]
    shown = repr(value)
    return shown if len(shown) <= 120 else reprlib.repr(value)


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override!r}: allowed: key=value, such as train.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set method.name=fedit
    *tables, last = key.strip().split(".")
    table = document
    for part in tables:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override!r}: {part} is a value, not a table")
        table = inner
    table[last] = value


def _resolve_paths(document: dict[str, Any], folder: Path) -> None:
    for table, key in (("data", "source"), ("data", "test"), ("model", "name")):
        section = document.get(table)
        if not isinstance(section, dict):
            continue
        value = section.get(key)
        if not isinstance(value, str) or not value or value in EMBEDDED_NAMES or Path(value).is_absolute():
            continue
        try:
            if (folder / value).exists():
                section[key] = str((folder / value).resolve())
        except (OSError, ValueError):  # too long, or with a NUL: no path at all
            continue


def describe_validation_error(error: ValidationError, root: type[BaseModel], prefix: str = "") -> str:
    """The first problem of a pydantic error as one sentence: key, value, what is allowed."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if not _is_union_branch(part)]
    key = ".".join([prefix, *where] if prefix else where)
    section, name = _owner(root, where)
    if first["type"] == "extra_forbidden":
        known = sorted(field.alias or key for key, field in section.model_fields.items()) if section else []
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        return f"unknown key `{key}`{hint} (allowed here: {', '.join(known)})"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{key}: {message}" if where else message
    # A union reports every branch it tried: all of them together are what is allowed.
    same = [e for e in error.errors() if [str(p) for p in e["loc"] if not _is_union_branch(p)][:2] == where[:2]]
    allowed = "; or ".join(dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in same))
    allowed = allowed.replace("valid tuple", "valid list")  # what TOML calls it
    return f"{key} = {_short(first['input'])}: {allowed}"


def _is_union_branch(part: int | str) -> bool:
    branches = {"int", "constrained-int", "float", "constrained-float", "str", "none"}
    return isinstance(part, int) or "[" in part or part in branches


def _owner(root: type[BaseModel], where: typing.Sequence[str]) -> tuple[type[BaseModel] | None, str]:
    """The table a location lies in, and the key's own name."""
    if len(where) <= 1:
        return root, where[0] if where else ""
    field = root.model_fields.get(where[0])
    section = field.annotation if field else None
    return (section if isinstance(section, type) and issubclass(section, BaseModel) else None), where[1]
