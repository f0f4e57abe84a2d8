"""Options that every method has: where the head lives and starts, and what is added to training and averaging."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from folklora.errors import MethodError

FEDOPT: dict[str, dict[str, float]] = {
    "momentum": {"lr": 1.0, "beta1": 0.9},
    "adagrad": {"lr": 0.01, "beta1": 0.0, "tau": 1e-3},
    "adam": {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "yogi": {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
}
"""What each of `Options.fedopt` reads, and its default: betas and tau as in arXiv 2003.00295; the paper tunes the
learning rate for every task, between 1e-3 and 1."""


class Options(BaseModel):
    """Options every method has; a method's own stand in a subclass.

    ``head``: *private* stays home, *shared* travels and is averaged, *sketched* is private and starts from the linear
    discriminant that the server builds from all clients' class statistics. ``head_start`` says the start alone, so
    that a shared head may start sketched too, *auto* lets each client choose on its validation split, and *fitted* is
    fitted by each client to its own features before the first round (`folklora.methods.fitting`). Where the task has no
    head of its own, all are as `of_a_head` says.

    ``augment`` says which features are added to the client's own where its head is fitted
    (`folklora.data.augmentation`): *gaussian* and *gan* are made of its own examples, *sketch* of everybody's class
    statistics, and *auto* is what the client's cross-validation says, none included.

    ``proximal``, ``scaffold`` and ``fedopt`` add something to the methods that say so in `Method.combines`; see
    `folklora.methods.proximal`, `folklora.methods.scaffold` and `folklora.methods.server_optimizer`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)
    of_a_head: ClassVar[dict[str, Any]] = {"head": "private", "head_start": "zero", "augment": "none"}
    head: Literal["private", "shared", "sketched"] = Field(
        "private", description="stays home, travels, or starts sketched; for tasks with a head of their own"
    )
    head_start: Literal["zero", "sketched", "auto", "fitted"] | None = Field(
        None, description="default: as `head` and `augment` say"
    )
    augment: Literal["none", "gaussian", "sketch", "gan", "auto"] = Field(
        "none", description="features that are added where a client's head is fitted to its own"
    )
    proximal: float = Field(0.0, ge=0, description="FedProx's mu: the pull to where a client started the round")
    scaffold: bool = Field(False, description="control variates against the drift of local steps")
    fedopt: Literal["none", "momentum", "adagrad", "adam", "yogi"] = Field("none", description="server optimiser")
    fedopt_lr: float | None = Field(None, gt=0, le=1e6)
    fedopt_beta1: float | None = Field(None, ge=0, lt=1)
    fedopt_beta2: float | None = Field(None, ge=0, lt=1)
    fedopt_tau: float | None = Field(None, gt=0, le=1e6)

    @property
    def start(self) -> Literal["zero", "sketched", "auto", "fitted"]:
        if self.head_start is not None:
            return self.head_start
        return "sketched" if self.head == "sketched" else "zero" if self.augment == "none" else "fitted"

    @property
    def shares_statistics(self) -> bool:
        """Whether clients get everybody's class statistics, to make features of them."""
        return self.start == "fitted" and self.augment in {"sketch", "auto"}

    @property
    def head_statistics(self) -> bool:
        """Whether heads start from anything that is made of everybody's class statistics."""
        return self.start in {"sketched", "auto"} or self.shares_statistics

    @property
    def head_travels(self) -> bool:
        return self.head == "shared"

    def without_head(self, method: str) -> Self:
        """These options for a task without a head of its own: nothing of one is sketched, sent or kept.

        Raises
        ------
        MethodError
            For an option that was given and speaks of a head; defaults that do are passed over.
        """
        for key, value in self.of_a_head.items():
            given = getattr(self, key)
            if key in self.model_fields_set and given not in {None, value}:
                raise MethodError(
                    f"method {method!r}: method.{key} = {json.dumps(given)}, and the task has no head of its own; "
                    f"allowed: {json.dumps(value)}, or to leave it out"
                )
        return self.model_copy(update=self.of_a_head)

    @model_validator(mode="after")
    def _start_fits(self) -> Options:
        if self.head == "shared" and self.start in {"auto", "fitted"}:
            key = f'head_start = "{self.start}"' if self.augment == "none" else f'augment = "{self.augment}"'
            raise ValueError(f'{key} needs a head that stays home; allowed: head = "private" or "sketched"')
        if self.augment != "none" and self.start != "fitted":
            raise ValueError(
                f'augment = "{self.augment}" with head_start = "{self.start}": features are added to a head that is '
                'fitted; allowed: head_start = "fitted"'
            )
        if self.head == "sketched" and self.head_start == "zero":
            raise ValueError('head = "sketched" with head_start = "zero" is head = "private"')
        return self

    @property
    def fedopt_settings(self) -> dict[str, float]:
        """``lr``, ``beta1`` and so on of the server optimiser: as given, or its default."""
        defaults = FEDOPT[self.fedopt]
        given = {name: getattr(self, f"fedopt_{name}") for name in defaults}
        return {name: default if given[name] is None else given[name] for name, default in defaults.items()}

    @model_validator(mode="after")
    def _fedopt_reads_its_settings(self) -> Options:
        for name in ("lr", "beta1", "beta2", "tau"):
            readers = [rule for rule, defaults in FEDOPT.items() if name in defaults]
            value = getattr(self, f"fedopt_{name}")
            if value is not None and self.fedopt not in readers:
                raise ValueError(
                    f'fedopt_{name} = {value:g} with fedopt = "{self.fedopt}"; allowed: fedopt = {", ".join(readers)}'
                )
        return self
