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
import tomllib
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from folklora.errors import RecipeError
from folklora.sections import (
    EMBEDDED_NAMES,
    AdapterSection,
    AuditSection,
    DataSection,
    DepthSection,
    DriftSection,
    EngineSection,
    EvalSection,
    FaultsSection,
    Form,
    MessageSection,
    MethodSection,
    ModelSection,
    NewcomersSection,
    PoisonSection,
    PrivacySection,
    RobustSection,
    Section,
    SecureSection,
    TrackSection,
    TrainSection,
    short,
)


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
    newcomers: NewcomersSection = NewcomersSection()
    drift: DriftSection = DriftSection()
    depth: DepthSection = DepthSection()
    audit: AuditSection = AuditSection()
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
    def _promotion_comes_before_the_end(self) -> Recipe:
        if self.adapter.promote is not None and self.train.rounds <= self.train.evaluate_every:
            raise ValueError(
                f"adapter.promote with train.rounds = {self.train.rounds} and evaluate_every = "
                f"{self.train.evaluate_every}; allowed: rounds after the first validation"
            )
        return self

    @model_validator(mode="after")
    def _faults_are_simulated(self) -> Recipe:
        simulated = {f"faults.{name}": share for name, share in self.faults} | {"train.failures": self.train.failures}
        simulated["poison.share"] = self.poison.share
        simulated["drift.share"] = self.drift.share if self.drift.kind != "none" else 0.0
        if self.engine.kind != "local" and (named := [name for name, share in simulated.items() if share]):
            raise ValueError(
                f'{named[0]} = {simulated[named[0]]} with engine.kind = "{self.engine.kind}"; '
                'allowed: faults are simulated, with engine.kind = "local"'
            )
        return self

    @model_validator(mode="after")
    def _drift_can_be_told(self) -> Recipe:
        if self.drift.kind == "none":
            return self
        here, partition = f'drift.kind = "{self.drift.kind}"', self.data.partition
        if self.drift.kind == "labels" and partition in ("iid", "natural"):
            raise ValueError(
                f'{here} with data.partition = "{partition}", which skews no labels; allowed: partition = "dirichlet", '
                '"pathological" or "shards", or drift.kind = "classes"'
            )
        others = (
            (self.train.patience is not None, "train.patience: scores before and after do not compare", "no patience"),
            (self.privacy.unit == "example", 'privacy.unit = "example", counted for one set of examples', "another"),
            (self.poison.kind != "none", f'poison.kind = "{self.poison.kind}"', "one of the two"),
        )
        for there, what, allowed in others:
            if there:
                raise ValueError(f"{here} with {what}; allowed: {allowed}")
        return self

    @model_validator(mode="after")
    def _shots_last(self) -> Recipe:
        if self.data.shots is not None and self.drift.kind != "none":
            raise ValueError(
                f'data.shots = {self.data.shots} with drift.kind = "{self.drift.kind}"; allowed: one of them'
            )
        if self.data.train_share != 1 and self.drift.kind != "none":
            raise ValueError(
                f'data.train_share = {self.data.train_share:g} with drift.kind = "{self.drift.kind}"; '
                "allowed: one of them"
            )
        return self

    @model_validator(mode="after")
    def _liars_have_labels(self) -> Recipe:
        if self.poison.kind in ("labels", "backdoor") and self.form not in ("text", "image"):
            raise ValueError(
                f'poison.kind = "{self.poison.kind}" where examples are learned without labels; '
                'allowed: "sign" or "noise"'
            )
        if self.poison.kind == "scramble" and self.form != "text":
            raise ValueError('poison.kind = "scramble" where examples are no texts; allowed: "duplicate"')
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


def _toml(value: Any) -> str:
    # TOML's finite scalars and flat lists are spelt as JSON spells them, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


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
    return f"{key} = {short(first['input'])}: {allowed}"


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
