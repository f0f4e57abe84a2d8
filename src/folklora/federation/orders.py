"""What a server asks of a member over a network, and what comes back: flat records that any carrier can take along.

An `Order` names the version of the member's private state that the server means (``base``) and carries what is to be
applied to it before the work: whether the upload made in that version was taken, the welcome, a reply. Both are named
by their SHA-256; their bytes are there only where the server does not know that the member has them already. An
`Answer` repeats whom and what it answers. Both are checked for type, size and range wherever they arrive: what came
over a network is nothing but numbers and text until `Order.of` or `Answer.of` has taken it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from folklora.backbones.metric import MOST, Score
from folklora.errors import MessageError
from folklora.federation.codec import LIMIT
from folklora.recipe import describe_validation_error
from folklora.sections import Section

Record = dict[str, Any]
"""Names with a whole number, a float, a truth value, text, bytes, or a list of numbers or of texts each."""

MEMBER = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a member may be called: it becomes a folder's name on either side."""
QUESTIONS = ("train", "validation", "test", "train+reply", "validation+reply", "test+reply")
"""A split, answered by the model as it is, or as it would be after the reply."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Number = Annotated[int, Field(ge=0, lt=2**62)]
Round = Annotated[int, Field(ge=0, lt=2**31)]
Version = Annotated[int, Field(ge=-1, lt=2**31)]
MemberName = Annotated[str, Field(pattern=MEMBER)]
ClassName = Annotated[str, Field(min_length=1, max_length=1000)]
Payload = Annotated[bytes, Field(max_length=LIMIT)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Loss = Annotated[float, Field(ge=-MOST, le=MOST)]
Total = Annotated[float, Field(ge=0, le=MOST)]
Topic = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class _Flat(Section):
    """Strict types, no unknown names, no NaN."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """What a record says.

        Raises
        ------
        MessageError
            Naming the first thing in it that cannot be.
        """
        try:
            return cls.model_validate(dict(record))
        except ValidationError as error:
            # Whoever wrote the record also wrote the names in it.
            raise MessageError(f"{cls.__name__.lower()}: {describe_validation_error(error, cls)[:300]}") from None

    def record(self) -> Record:
        return self.model_dump(exclude_none=True)


class Order(_Flat):
    """One piece of work for one member.

    Attributes
    ----------
    kind
        *hello*: what the run is; *sketch*, which begins the member's state in round 0 and leaves it as it is in any
        other; *train*; *talk*: an exchange beside the training; *score*; *goodbye*: the run is over.
    run, number, round, client
        The run's id, the order's number (no two orders share one), the round it is given in, the member's name.
    base
        The version of the member's state to start from: the round it was made in, 0 after the sketch, -1 none.
    accepted
        Whether the server took the upload made in that version.
    keep, hold
        Versions, and digests of welcomes and replies, that the server may come back to.
    welcome, welcome_data, reply, reply_data
        SHA-256 of what the member is to take in, and the bytes if it is not known to have them.
    questions
        Of a score order: of `QUESTIONS`.
    attached
        What a training needs beside the model.
    topic, part
        Of a talk: what it is about, and this member's part of it.
    recipe, clients, classes, backbone
        Of a hello: the recipe as TOML, all members in their order, the labels, SHA-256 of the backbone.
    """

    kind: Literal["hello", "sketch", "train", "talk", "score", "goodbye"]
    run: RunId
    number: Number
    round: Round
    client: MemberName
    base: Version = -1
    accepted: bool = False
    keep: list[Version] = Field(default=[], max_length=16)
    hold: list[Digest] = Field(default=[], max_length=32)
    welcome: Digest | None = None
    welcome_data: Payload | None = None
    reply: Digest | None = None
    reply_data: Payload | None = None
    questions: list[Literal[QUESTIONS]] = Field(default=[], max_length=8)  # type: ignore[valid-type]
    attached: Payload | None = None
    topic: Topic | None = None
    part: Payload | None = None
    recipe: str | None = Field(None, max_length=1 << 20)
    clients: list[MemberName] | None = Field(None, max_length=100_000)
    classes: list[ClassName] | None = Field(None, min_length=1, max_length=100_000)
    backbone: Digest | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Order:
        told = (self.recipe, self.clients, self.classes, self.backbone)
        if any((field is not None) != (self.kind == "hello") for field in told):
            raise ValueError(f"kind = {self.kind!r} and recipe, clients, classes, backbone; allowed: all in a hello")
        if bool(self.questions) != (self.kind == "score"):
            raise ValueError(f"kind = {self.kind!r} with {len(self.questions)} questions; allowed: in a score order")
        if ((self.topic is None) != (self.part is None)) or (self.topic is not None) != (self.kind == "talk"):
            raise ValueError(f"kind = {self.kind!r} and topic, part; allowed: both in a talk")
        if self.attached is not None and self.kind != "train":
            raise ValueError(f"kind = {self.kind!r} with attached; allowed: in a training")
        if (self.kind == "train") != (self.round > 0) and self.kind in ("train", "hello"):
            raise ValueError(f"kind = {self.kind!r} in round {self.round}; allowed: train from round 1, hello in 0")
        if self.kind == "train" and self.base >= self.round:
            raise ValueError(f"base = {self.base} in round {self.round}; allowed: an earlier version")
        for name in ("welcome", "reply"):
            digest, data = getattr(self, name), getattr(self, f"{name}_data")
            if data is not None and (digest is None or hashlib.sha256(data).hexdigest() != digest):
                raise ValueError(f"{name}_data is not what {name} names; allowed: bytes of that SHA-256")
        return self


class Answer(_Flat):
    """What a member makes of an order.

    Attributes
    ----------
    run, number, round, client
        As in the order.
    status
        *done*; *failed*: the work came to nothing; *resend*: bytes that the order only names are not here; *lost*: the
        version that the order starts from, or the run itself, is not here; *refused*: the order cannot be.
    failure
        Why, in one line, where it is not done.
    data, loss
        Of a sketch, a training, a talk: what travels (nothing, if None), and the training loss.
    totals, units
        Of a score order, one a question: see `folklora.backbones.metric.Score`.
    beside, beside_of, beside_values
        Other metrics of these scores: the name, the place of the question among the order's, the mean.
    steps
        Of a score order: how often the member chose to apply a shared block, if it had the choice.
    examples, backbone
        Of a hello: examples in train, validation and test; SHA-256 of the backbone.
    """

    run: RunId
    number: Number
    round: Round
    client: MemberName
    status: Literal["done", "failed", "resend", "lost", "refused"]
    failure: str = Field("", max_length=1000)
    data: Payload | None = None
    loss: Loss | None = None
    totals: list[Total] = Field(default=[], max_length=8)
    units: list[Count] = Field(default=[], max_length=8)
    beside: list[MetricName] = Field(default=[], max_length=64)
    beside_of: list[Count] = Field(default=[], max_length=64)
    beside_values: list[Total] = Field(default=[], max_length=64)
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    examples: list[Count] | None = Field(None, min_length=3, max_length=3)
    backbone: Digest | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> Answer:
        if len(self.totals) != len(self.units):
            raise ValueError(f"{len(self.totals)} totals, {len(self.units)} units; allowed: one each a score")
        named = list(zip(self.beside_of, self.beside, strict=False))
        if not len(self.beside) == len(self.beside_of) == len(self.beside_values) == len(set(named)):
            raise ValueError("beside, beside_of and beside_values do not belong together; allowed: one each a metric")
        if any(place >= len(self.totals) for place in self.beside_of):
            raise ValueError(f"beside_of = {max(self.beside_of)} of {len(self.totals)} scores; allowed: less")
        if self.status != "done" and not self.failure:
            raise ValueError(f"status = {self.status!r} without a reason; allowed: one line in `failure`")
        return self

    @property
    def scores(self) -> list[Score]:
        """One a question."""
        beside: list[dict[str, float]] = [{} for _ in self.totals]
        for name, place, value in zip(self.beside, self.beside_of, self.beside_values, strict=True):
            beside[place][name] = value
        return [Score(*each, self.steps) for each in zip(self.totals, self.units, beside, strict=True)]

    @classmethod
    def of_scores(cls, order: Order, scores: Sequence[Score]) -> Answer:
        """The answer to a score order: one score a question."""
        beside = [(name, place, value) for place, score in enumerate(scores) for name, value in score.beside.items()]
        names, places, values = zip(*beside, strict=True) if beside else ((), (), ())
        return cls.to(
            order,
            totals=[score.total for score in scores],
            units=[score.units for score in scores],
            beside=list(names),
            beside_of=list(places),
            beside_values=list(values),
            steps=next((score.steps for score in scores), None),
        )

    @classmethod
    def to(cls, order: Order, status: str = "done", failure: str = "", **found: Any) -> Answer:
        """The answer to an order; a reason longer than a line is cut."""
        return cls.model_validate(
            {
                "run": order.run,
                "number": order.number,
                "round": order.round,
                "client": order.client,
                "status": status,
                "failure": failure[:1000],
                **found,
            }
        )
