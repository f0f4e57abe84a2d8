"""What a server knows of its members: their names, and how many examples each has. Two files of the run directory.

``federation.json`` has the run's id and the members; ``partition.json`` the labels and, of each member that has said
hello, the sizes of its splits. There are no indices and no label counts: the rows are at home.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, ValidationError

from folklora.errors import RunError
from folklora.federation.orders import ClassName, MemberName, RunId
from folklora.federation.rundir import RunDirectory
from folklora.sections import Section

SPLITS = ("train", "validation", "test")
FEDERATION = "federation.json"


class _Sizes(Section):
    train: int = Field(0, ge=0)
    validation: int = Field(0, ge=0)
    test: int = Field(0, ge=0)


class _Partition(Section):
    classes: Annotated[list[ClassName], Field(min_length=1)]
    clients: Annotated[dict[MemberName, _Sizes], Field(min_length=1)]


class _Federation(Section):
    run: RunId
    members: Annotated[list[MemberName], Field(min_length=1)]


class Roster:
    """The members of one run, in their order.

    Attributes
    ----------
    run
        The run's id, which every order names.
    sizes
        Of those that said hello: examples in train, validation and test.
    """

    def __init__(self, directory: RunDirectory, run: str, classes: Sequence[str], members: Sequence[str]) -> None:
        self.directory = directory
        self.run = run
        self.classes = list(classes)
        self.members = list(members)
        self.sizes: dict[str, list[int]] = {}

    @classmethod
    def new(cls, directory: RunDirectory, classes: Sequence[str], members: Sequence[str]) -> Roster:
        """Of a run that is about to begin; nothing is written."""
        return cls(directory, uuid.uuid4().hex, classes, members)

    @classmethod
    def open(cls, directory: RunDirectory) -> Roster:
        """The roster of a run that was begun.

        Raises
        ------
        RunError
            If the directory holds none, or its files are damaged.
        """
        name = FEDERATION
        try:
            federation = _Federation.model_validate_json((directory.path / name).read_bytes())
            name = "partition.json"
            partition = _Partition.model_validate_json((directory.path / name).read_bytes())
        except FileNotFoundError:
            raise RunError(f"{directory.path / name}: missing; allowed: a run that `folklora serve` began") from None
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise RunError(f"{directory.path / name}: cannot be read: {reason}") from None
        roster = cls(directory, federation.run, partition.classes, federation.members)
        for client, sizes in partition.clients.items():
            if sizes.train:
                roster.sizes[client] = [sizes.train, sizes.validation, sizes.test]
        return roster

    def met(self, client: str, sizes: Sequence[int]) -> None:
        """Note what a member said of itself.

        Raises
        ------
        RunError
            If it said something else before.
        """
        known = self.sizes.get(client)
        if known is None:
            self.sizes[client] = list(sizes)
            self.directory.write("partition.json", self.partition().encode())
        elif known != list(sizes):
            raise RunError(f"it has {list(sizes)} examples to train on, validate and test; it began with {known}")

    def federation(self) -> str:
        """``federation.json``."""
        return json.dumps({"run": self.run, "members": self.members})

    def partition(self) -> str:
        """``partition.json``; of whom nothing is known yet, zeros."""
        clients = {c: dict(zip(SPLITS, self.sizes.get(c, [0, 0, 0]), strict=True)) for c in self.members}
        return json.dumps({"classes": self.classes, "clients": clients}, ensure_ascii=False) + "\n"
