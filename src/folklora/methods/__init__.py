"""Federated methods: one file each, held next to its paper. `METHODS` is the one place that names them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import ValidationError

from folklora.errors import MethodError, RecipeError, no_such
from folklora.methods.apfl import APFL
from folklora.methods.base import Method
from folklora.methods.celora import CELoRA
from folklora.methods.contract import Context
from folklora.methods.ditto import Ditto
from folklora.methods.fedaf import FedAF
from folklora.methods.fedamole import FedAMoLE
from folklora.methods.fedawa import FedAWA
from folklora.methods.feddm import FedDM
from folklora.methods.federa import FeDeRA
from folklora.methods.fedex import FedExLoRA
from folklora.methods.fedit import FedIT
from folklora.methods.fedlpp import FedLPP
from folklora.methods.fedsa import FedSALoRA
from folklora.methods.fedsb import FedSB
from folklora.methods.ffa import FFALoRA
from folklora.methods.flora import FLoRA
from folklora.methods.folklora import FolkLoRA
from folklora.methods.hafl import HAFL
from folklora.methods.haflq import HAFLQ
from folklora.methods.hetlora import HetLoRA
from folklora.methods.local import Local
from folklora.methods.lorafair import LoRAFAIR
from folklora.methods.loraxs import LoRAXS
from folklora.methods.options import Options
from folklora.methods.padding import Replication, ZeroPadding
from folklora.methods.proximal import Proximal
from folklora.methods.ravan import Ravan
from folklora.methods.rolora import RoLoRA
from folklora.methods.scaffold import Scaffold
from folklora.methods.server_optimizer import ServerOptimizer
from folklora.methods.sketch import Sketch
from folklora.recipe import describe_validation_error

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Local,
        Sketch,
        FedIT,
        FFALoRA,
        FedSALoRA,
        RoLoRA,
        FLoRA,
        FedExLoRA,
        FeDeRA,
        LoRAXS,
        FedSB,
        Ravan,
        FedAWA,
        FedLPP,
        Ditto,
        APFL,
        LoRAFAIR,
        ZeroPadding,
        Replication,
        HetLoRA,
        HAFL,
        HAFLQ,
        FedAMoLE,
        FedDM,
        FedAF,
        CELoRA,
        FolkLoRA,
    )
}

EXTENSIONS: dict[str, type[Method]] = {"proximal": Proximal, "scaffold": Scaffold, "fedopt": ServerOptimizer}
"""Option -> what it adds to every method that names it in `Method.combines`."""


def find(name: str) -> type[Method]:
    """The method class of that name.

    Raises
    ------
    MethodError
        Naming the methods there are, the nearest first.
    """
    if name not in METHODS:
        raise MethodError(f"method.name = {name!r}: {no_such('method', name, METHODS)}")
    return METHODS[name]


def check_options(name: str, options: dict[str, Any]) -> Options:
    """A method's options, validated; what is unknown or out of range is one line: key, value, what is allowed."""
    method = find(name)
    try:
        checked = method.options_type.model_validate(options)
    except ValidationError as error:
        raise RecipeError(
            f"method {name!r}: {describe_validation_error(error, method.options_type, 'method')}"
        ) from None
    for option in _extended_by(checked):
        if option not in method.combines:
            default = Options.model_fields[option].default
            taking = [name for name, other in METHODS.items() if option in other.combines]
            raise RecipeError(
                f"method {name!r}: method.{option} = {getattr(checked, option)!r} does not combine with it; "
                f"allowed: {default!r}, or one of the methods {', '.join(taking)}"
            )
    return checked


def describe_options(name: str) -> list[dict[str, str]]:
    """The options of a method that make sense with it: key, what is allowed, default, description, all as text."""
    method = find(name)
    described = []
    for key, field in method.options_type.model_fields.items():
        option = next((known for known in EXTENSIONS if key.startswith(known)), None)
        if option is not None and option not in method.combines:
            continue
        common = Options.model_fields.get(key, field)
        described.append(
            {
                "key": f"method.{field.alias or key}",
                "allowed": _allowed(field.annotation, field.metadata),
                "default": "" if field.default is None else json.dumps(field.default, default=str),
                "description": field.description or common.description or "",
            }
        )
    return described


def _allowed(annotation: Any, bounds: Sequence[Any]) -> str:
    """A type and its bounds in words: ``number, >= 0, < 1``."""
    if get_origin(annotation) is Literal:
        return " | ".join(json.dumps(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_allowed(part, bounds) for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is list:
        return f"list of {_allowed(get_args(annotation)[0], bounds)}"
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        found = [m for each in own for m in getattr(each, "metadata", [each])]
        return _allowed(inner, found)
    words = {float: "number", int: "whole number", bool: "true | false", str: "text"}
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {getattr(b, name):g}" for b in bounds for name, sign in signs.items() if hasattr(b, name)]
    return ", ".join([words.get(annotation, str(annotation)), *limits])


def _extended_by(options: Options) -> list[str]:
    return [option for option in EXTENSIONS if getattr(options, option) != Options.model_fields[option].default]


def build(name: str, options: dict[str, Any], context: Context) -> Method:
    """The method a recipe asks for, ready for either engine.

    What its options add stands before it in one class, so that each sees what the next one makes of a message.
    """
    method, checked = find(name), check_options(name, options)
    if extensions := [EXTENSIONS[option] for option in _extended_by(checked)]:
        method = cast(type[Method], type(method.__name__, (*extensions, method), {}))
    return method(checked, context)
