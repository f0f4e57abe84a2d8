"""The contract of a federated method: tensors in, tensors out, the same object in every engine.

A method states which factors an adapter has, how they start, which kinds of tensors train in a round and which travel,
and how the server turns what arrived into what each client gets back. It knows nothing of files, sockets, engines or
models. In the order data flows::

    initial(client)                     at the client: what it owns before anything happened; costs no byte
    sketch(client)           -> message at the client, once: statistics of its data, or nothing
    check_sketch(message)               at the server: refuse what was not agreed
    begin(sketches)          -> state   at the server, once
    welcome(state, id)       -> message to each client, once, or nothing
    settle(client, message)             at the client, once: take the welcome in
    work(round, client)                 at the client: what local training does; default: moves the kinds that
                                        `trained(round)` names
    learned(round, client, results)     at the client after training: take its results in
    send(round, client)      -> message at the client then; default: the kinds `shared(round)` names
    as_trained(tensors, before)         at whoever reads an upload: its tensors by the names under which they train
    check_update(round, state, client, message)     at the server: refuse what names and shapes cannot tell
    server(round, state, messages) -> state     the aggregation
    reply(state, id)         -> message what the server has for a client now: a pure function of the state
    receive(client, message)            at the client; default: overwrite its tensors; twice the same changes nothing
    validated(round, state, merits) -> state        at the server, where clients were validated after the round
    refresh(round, state, sketches) -> state        at the server, where clients are asked for their sketches again
    newcomer(state, id, sketch) -> welcome, reply   to a client that took part in no round: where it starts
    model(client)                       at the client: the tensors it predicts with; default: those it trains

State is a flat dictionary of tensors, so it checkpoints; a reply is a function of the state, so a run that was killed
between two messages loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from folklora.adapters.lowrank import LowRank, Shapes, Tensors, factor_generator, kaiming, kind, select
from folklora.data.augmentation import sketch as shared_statistics
from folklora.data.augmentation.choose import Augmenter
from folklora.data.statistics import ClassStatistics
from folklora.errors import MessageError, MethodError
from folklora.methods.aggregation import weighted_mean
from folklora.methods.contract import Client, Context, Message, State
from folklora.methods.discriminant import linear_discriminant
from folklora.methods.fitting import fitted_head
from folklora.methods.heads import choose_head
from folklora.methods.options import Options
from folklora.methods.work import Trained, Work

MOST_FEATURE = 1e6
"""No feature of a backbone is larger. What everybody is sent is made of everybody's statistics: one client's must not
make it numbers that the wire cannot carry, or that others cannot compute with."""


class Method:
    """A federated method; subclasses override what they do differently. See the module's text for the contract."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None] = None
    core: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False
    promotes: ClassVar[bool] = False  # whether a client's rank may be raised during a run
    needs_head: ClassVar[bool] = False  # whether it has nothing to do where the task has no head of its own
    has_global_model: ClassVar[bool] = False
    takes_means: ClassVar[bool] = True  # whether its server step takes nothing of the uploads but their mean
    condenses: ClassVar[bool] = False  # whether clients send data that they made, and train no model
    branches: ClassVar[int] = 1  # at most so many trainings of a client in a round
    trains: ClassVar[frozenset[str]] = frozenset({"A", "B", "C", "head", "norm"})
    travels: ClassVar[frozenset[str]] = frozenset()
    combines: ClassVar[frozenset[str]] = frozenset()  # which options of `folklora.methods.EXTENSIONS`
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options, context: Context) -> None:
        if self.needs_head and not context.head:
            does = "condenses by label" if self.condenses else "makes a head and nothing else"
            raise MethodError(
                f"method.name = {self.name!r} {does}, and the task has none of its own; "
                "allowed: a method that trains, such as 'folklora'"
            )
        if context.head_rate != 1 and not context.head:
            raise MethodError("train.head_lr is set, and the task has no head of its own; allowed: to leave it out")
        self.options = options if context.head else options.without_head(self.name)
        self.context = context
        if context.head_rate != 1 and (self.condenses or not self.rounds()):
            raise MethodError(
                f"train.head_lr is set, and method.name = {self.name!r} trains no head at its clients; allowed: to "
                "leave it out"
            )
        self.adapter = LowRank(context.sites, self.core, context.alpha, context.dropout)
        ranks = set(context.ranks.values())
        if len(ranks) > 1 and not self.mixed_ranks:
            raise MethodError(
                f"method.name = {self.name!r} averages factors of one rank, adapter.rank has {sorted(ranks)}; "
                "allowed: one rank for all, or a method that mixes ranks"
            )
        if context.promote is not None and not self.promotes:
            raise MethodError(
                f"method.name = {self.name!r} keeps the ranks it starts with, adapter.promote = {context.promote}; "
                "allowed: a method whose ranks may grow, such as 'replication'"
            )
        most = self.adapter.max_rank()
        for key, rank in (("rank", max(ranks)), ("promote", context.promote or 1)):
            if rank > most:
                raise MethodError(f"adapter.{key} = {rank} exceeds the smallest adapted layer; allowed: 1 to {most}")

    # -- at the client, before the first round -------------------------------------------------------------------

    def initial_factors(self, client: str, rank: int) -> Tensors:
        """LoRA's start: A random and common to all clients (it costs no byte), B = 0 [arXiv 2106.09685]."""
        return {
            name: torch.zeros(shape) if name.startswith("B/") else kaiming(shape, self.generator(name))
            for name, shape in self.adapter.shapes(rank).items()
        }

    def generator(self, name: str) -> torch.Generator:
        """The generator of a starting value that all clients share."""
        return factor_generator(self.context.seed, name)

    def initial(self, client: str) -> Tensors:
        """Everything a client owns before anything happened: factors, a zero head if any, the backbone's norms."""
        c = self.context
        norms = {name: tensor.clone() for name, tensor in c.norms.items()}
        return {**self.initial_factors(client, c.ranks[client]), **blank(c.head), **norms}

    def sketch(self, client: Client) -> Message | None:
        """One-off upload; by default class statistics if the head starts from them."""
        if not self.options.head_statistics:
            return None
        return Message(statistics_tensors(self.statistics(client)))

    def statistics(self, client: Client) -> ClassStatistics:
        features, labels = client.data.features("train")
        return ClassStatistics.of(features, labels, self.context.classes)

    # -- at the server, before the first round -------------------------------------------------------------------

    def begin(self, sketches: Mapping[str, Message]) -> State:
        """The server's first state; by default what heads start from, made of the pooled class statistics."""
        if not self.options.head_statistics:
            return {}
        if not sketches:
            raise MethodError("no client sent class statistics, and a sketched head is made of nothing else")
        pooled = ClassStatistics.merge([self.read_statistics(message) for message in sketches.values()])
        state = self.starting(pooled)
        if self.options.head_travels:
            # Copies: a checkpoint refuses tensors that share memory.
            state |= {f"global/{name.removeprefix('start/')}": tensor.clone() for name, tensor in state.items()}
        if self.context.newcomers:  # whose statistics will be added to these
            state |= {f"pooled/{name}": tensor for name, tensor in statistics_tensors(pooled).items()}
        return state

    def starting(self, pooled: ClassStatistics) -> State:
        """What heads start from: the linear discriminant, or the statistics, where clients make features of them."""
        if self.options.shares_statistics:
            return {f"start/{name}": tensor for name, tensor in shared_statistics.packed(pooled).items()}
        weight, bias = linear_discriminant(pooled)
        return {"start/head/weight": weight, "start/head/bias": bias}

    def sketch_numbers(self) -> int:
        """At most so many numbers are in a sketch; what is longer is refused before it is read."""
        classes, width = self.context.classes, self.context.width
        return classes * (width + 1) + width * width + 1 if self.sends_statistics else 0

    @property
    def sends_statistics(self) -> bool:
        """Whether a sketch holds class statistics."""
        return self.options.head_statistics

    def check_sketch(self, message: Message) -> None:
        """Refuse a sketch that is not what was agreed, so that it fails its client and nobody else.

        Raises
        ------
        MessageError
            Naming the tensor and what is allowed.
        """
        refuse_other_prefixes(message, {"statistics/"} if self.options.head_statistics else set())
        if self.options.head_statistics:
            self.read_statistics(message)

    def read_statistics(self, message: Message) -> ClassStatistics:
        prefix = "statistics/"
        own = {name.removeprefix(prefix): t for name, t in message.tensors.items() if name.startswith(prefix)}
        found = ClassStatistics.from_tensors(own, self.context.classes, self.context.width)
        for name, value in (("means", found.means), ("scatter", found.scatter.abs().sqrt())):
            if float(value.abs().max()) > MOST_FEATURE:
                raise MessageError(
                    f"tensor {prefix + name!r} is of features above {MOST_FEATURE:g}; allowed: at most that"
                )
        return found

    def welcome(self, state: State, client: str) -> Message | None:
        """One-off download; by default what the head starts from. An empty one tells a client to fit its head."""
        start = {name.removeprefix("start/"): tensor for name, tensor in state.items() if name.startswith("start/")}
        return Message(start) if start or self.options.start == "fitted" else None

    def settle(self, client: Client, message: Message) -> None:
        """Take the welcome in: the head starts sketched, or as the client's validation split says, or is fitted."""
        if self.options.start == "fitted":
            client.tensors.update(self.fitted(client, message))
        elif self.options.start == "auto":
            client.tensors.update(
                choose_head(
                    message.tensors["head/weight"],
                    message.tensors["head/bias"],
                    client.data.features("train"),
                    client.data.features("validation"),
                    steps_lr=self.context.learning_rate * self.context.head_rate,
                    batch_size=self.context.batch_size,
                    epochs=self.rounds() * self.context.local_epochs,
                    seed=self.context.seed,
                    client=client.id,
                )
            )
        else:
            client.tensors.update(message.tensors)

    def fitted(self, client: Client, message: Message) -> Tensors:
        """The head that a client fits to its own features, and to those that are added to them."""
        c, augment = self.context, self.options.augment
        shares = self.options.shares_statistics
        shared = shared_statistics.unpacked(message.tensors, c.classes, c.width) if shares else None
        own = client.data.features("train")
        _, head = fitted_head(Augmenter(own, c.classes, c.seed, client.id, shared), augment)
        return head

    # -- the round -----------------------------------------------------------------------------------------------

    def rounds(self) -> int:
        """How many rounds the method wants of the recipe's."""
        return self.context.rounds

    def trained(self, round: int) -> frozenset[str]:
        """Kinds that local training moves in this round."""
        return self.trains

    def work(self, round: int, client: Client) -> tuple[Work, ...]:
        """The client's local trainings in this round."""
        kinds = self.trained(round)
        return (Work(client.tensors, frozenset(name for name in client.tensors if kind(name) in kinds)),)

    def learned(self, round: int, client: Client, results: Mapping[str, Trained]) -> None:
        """Take in what became of each work, by its branch."""
        client.tensors = results[""].tensors

    def shared(self, round: int) -> frozenset[str]:
        """Kinds that travel up after this round's training."""
        return self.travels | ({"head"} if self.options.head_travels else frozenset())

    def drifting(self, round: int) -> frozenset[str]:
        """Kinds that train in this round and reach the server: what clients can drift apart in."""
        return self.trained(round) & self.shared(round)

    def rank(self, state: State, client: str) -> int:
        """The rank that a client has now, as far as the server knows."""
        return self.context.ranks[client]

    def expected(self, round: int, state: State, client: str) -> Shapes:
        """Names and shapes of the message a client sends in this round; anything else is refused.

        Tensors of kind ``index`` are int32, all others floating point.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self.context.norms.items()}
        shapes |= self.context.head
        shapes |= self.adapter.shapes(self.rank(state, client))
        kinds = self.shared(round)
        return {name: shape for name, shape in shapes.items() if name.partition("/")[0] in kinds}

    def send(self, round: int, client: Client) -> Message | None:
        """What a client says after training, or nothing (then no byte travels)."""
        if not self.shared(round):
            return None
        return Message(select(client.tensors, self.shared(round)), {"examples": client.examples})

    def as_trained(
        self, tensors: Tensors, before: Tensors, optimizer: str = "adamw", travelled: float = 0.0
    ) -> Tensors:
        """The tensors of an upload by the names under which clients train them: what its reader can compare with a
        gradient. Differs from the upload where a method sends them in another form.

        Parameters
        ----------
        before
            The client's tensors when its training began, as the reader knows them.
        optimizer, travelled
            Of that training, and the sum of its learning rates; 0: not known.
        """
        return tensors

    def known(self, round: int, client: str, told: Tensors, message: Message) -> Tensors:
        """What both sides know of an upload before it is sent, so that compression may send the difference to it.

        By default what the client was ``told``, and where it was told nothing, what it started with. Names and shapes
        that are not here count from zero; a method whose upload does not continue what it sent or received returns
        nothing, and zeros for what it sends as increments.

        Parameters
        ----------
        told
            The welcome and the last reply, as they arrived.
        message
            What is sent: its names, its shapes and its integers only, since both sides must come to the same.
        """
        new = any(name not in told or told[name].shape != t.shape for name, t in message.tensors.items())
        return {**self.initial(client), **told} if new else told

    def repays(self, name: str) -> bool:
        """Whether what compression lost of a tensor may be added to the client's next upload of that name."""
        return True

    def check_update(self, round: int, state: State, client: str, message: Message) -> None:
        """Refuse a message of the expected names and shapes whose values cannot be, such as an index out of range, so
        that it fails its client and nobody else.

        Raises
        ------
        MessageError
            Naming the tensor and what is allowed.
        """

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        """Aggregate; by default the mean of all that arrived, weighted by examples (FedAvg, arXiv 1602.05629)."""
        mean = weighted_mean([m.tensors for m in messages.values()], self.weights(messages))
        return {**state, **{f"global/{name}": tensor for name, tensor in mean.items()}}

    @property
    def averages(self) -> bool:
        """Whether the server's step takes nothing of the uploads but their weighted mean.

        Given that mean as the one message of any client that took part, it then does what it does with all of them: a
        server may be kept from reading single uploads, noise may be added to their sum, and another centre may stand in
        the mean's place.
        """
        return self.takes_means and bool(self.shared(1)) and len(set(self.context.ranks.values())) == 1

    def origin(self, state: State) -> Tensors:
        """The clients' common model as it was before the first round, by its names in the state."""
        initial = self.initial(self.context.clients[0])
        return {f"global/{name}": state.get(f"start/{name}", tensor) for name, tensor in initial.items()}

    def weights(self, messages: Mapping[str, Message]) -> Tensor:
        """p_k = n_k / sum n, [K] float64."""
        n = torch.tensor([message.numbers["examples"] for message in messages.values()], dtype=torch.float64)
        return n / n.sum()

    @property
    def counts_examples(self) -> bool:
        """Whether how many examples a client says it has changes what the server makes of uploads."""
        return self.rounds() > 0 and bool(self.shared(1) or self.shared(2))

    def mixing(self, state: State, messages: Mapping[str, Message]) -> Tensor | None:
        """[K, K]: the weight of client j's update in what client i was meant to get; None where nothing is mixed."""
        return self.weights(messages).expand(len(messages), -1) if self.travels else None

    @property
    def must_read(self) -> tuple[str, str] | None:
        """What makes its server read uploads, and what is allowed instead; None: `blind_mixing` says all it does."""
        if self.options.scaffold:
            return "method.scaffold = true", "scaffold = false"
        if self.options.fedopt != "none":
            return f'method.fedopt = "{self.options.fedopt}"', 'fedopt = "none"'
        plain = type(self).server is Method.server and type(self).reply is Method.reply
        if self.averages and plain:
            return None
        others = "a method that averages, such as 'fedit', or mixes cores, such as 'folklora'"
        return f'method.name = "{self.name}"', others

    def blind_mixing(self, state: State, clients: Sequence[str], weights: Tensor) -> Tensor:
        """Who gets how much of whom, where the server cannot read what it mixes (`must_read` is None).

        It is about the tensors that `travels` names; a shared head follows ``weights``.

        Parameters
        ----------
        clients
            Those who took part.
        weights
            [K]: by examples.

        Returns
        -------
        Tensor
            [K]: one mix for all, those who were away too; [K, K]: rows of those who took part, the others keep theirs.
        """
        return weights

    def reply(self, state: State, client: str) -> Message | None:
        """What the server has for a client now, or nothing."""
        common = {name.removeprefix("global/"): t for name, t in state.items() if name.startswith("global/")}
        return Message(common) if common else None

    def receive(self, client: Client, message: Message) -> None:
        client.tensors.update(message.tensors)

    def validated(self, round: int, state: State, merits: Mapping[str, float]) -> State:
        """What the server makes of how clients do on their validation splits, more is better; default: nothing."""
        return state

    def refreshes(self, round: int) -> bool:
        """Whether clients are asked for their sketches again before this round."""
        return False

    def refresh(self, round: int, state: State, sketches: Mapping[str, Message]) -> State:
        """Take in the sketches of clients whose data may have changed; default: nothing follows from them."""
        return state

    def newcomer(self, state: State, client: str, sketch: Message | None) -> tuple[Message | None, Message | None]:
        """What the server has for a client that took part in no round, by its sketch alone: its welcome and its reply.

        By default what all get: the common model, and the sketched head, into which the newcomer's own statistics go.
        It is asked of a method whose context has the newcomers behind all others, of whom the state knows nothing.
        """
        return self.welcome({**state, **self.head_with(state, sketch)}, client), self.reply(state, client)

    def head_with(self, state: State, sketch: Message | None) -> State:
        """What heads start from, of everybody's class statistics and these."""
        prefix = "pooled/statistics/"
        kept = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if sketch is None or not kept:
            return {}
        pooled = ClassStatistics.from_tensors(kept, self.context.classes, self.context.width)
        return self.starting(ClassStatistics.merge([pooled, self.read_statistics(sketch)]))

    @property
    def asks_newcomers(self) -> bool:
        """Whether a newcomer's sketch says anything that its start is made of; if not, it is not asked for one."""
        return self.options.head_statistics

    @property
    def newcomer_lacks(self) -> str | None:
        """What a newcomer would need before it can predict, and has from nobody, in words; None: nothing."""
        if self.context.head and not self.options.head_travels and self.options.start == "zero":
            return "a head: those of the others stay home, and its own starts at zero"
        return None

    def model(self, client: Client) -> Tensors:
        """What the client predicts with."""
        return client.tensors

    def typical_upload(self, round: int, client: str, counts: Tensor | None = None) -> Message | None:
        """A message of the size that a client sends in this round, for predicting traffic.

        ``counts`` [classes] are its training examples of each class; None: not known, and then none is larger.
        """
        shapes = self.expected(round, {}, client)
        return Message(blank(shapes), {"examples": 1.0}) if shapes else None

    def typical_reply(self, round: int, client: str) -> Message | None:
        """A message of the size that a client gets after this round; where factors alternate, all the server has."""
        shapes: Shapes = {}
        for earlier in range(1, min(round, 2) + 1):
            shapes |= self.expected(earlier, {}, client)
        return Message(blank(shapes)) if shapes else None

    def typical_sketch(self, client: str, counts: Tensor) -> Message | None:
        """A message of the size of a client's sketch; ``counts`` [classes] are its training examples of each class."""
        if not self.sends_statistics:
            return None
        classes, width = self.context.classes, self.context.width
        return Message(
            statistics_tensors(ClassStatistics(counts.double(), torch.zeros(classes, width), torch.zeros(width, width)))
        )

    def typical_welcome(self, client: str) -> Message | None:
        """A message of the size of a client's welcome."""
        if self.options.start == "fitted":
            shapes = shared_statistics.shapes(self.context.classes, self.context.width)
            counted = {f"{shared_statistics.PREFIX}counts": torch.zeros(self.context.classes, dtype=torch.int32)}
            return Message({**blank(shapes), **counted} if self.options.shares_statistics else {})
        return None if self.options.start == "zero" else Message(blank(self.context.head))

    @property
    def once(self) -> str | None:
        """What clients send once, in words."""
        return "class statistics" if self.options.head_statistics else None

    # -- what differential privacy of training must know ---------------------------------------------------------

    @property
    def beside_training(self) -> tuple[str, str] | None:
        """What it makes of training examples in the clear beside local training, and what is allowed in its place."""
        start = self.options.start
        return None if start == "zero" else (f'head_start = "{start}"', 'head_start = "zero", head = "private"')

    @property
    def private_release(self) -> tuple[float, float] | None:
        """(epsilon, delta) of what a client releases once with noise of its own; None: nothing."""
        return None

    # -- what can be shown ---------------------------------------------------------------------------------------

    @property
    def common_head(self) -> bool:
        """Whether clients differ in no head: it is averaged, or there is none."""
        return self.options.head_travels or not self.context.head

    def global_model(self, state: State, client: str, tensors: Tensors) -> Tensors | None:
        """The one model of all clients, if the method has one and clients have no heads of their own.

        ``tensors`` are those of any one client: what they all share is taken from the state, the rest is common anyway.
        """
        if not (self.has_global_model and self.common_head):
            return None
        reply = self.reply(state, client)
        return {**tensors, **(reply.tensors if reply else {})}

    def insight(self, state: State) -> Tensors:
        """[N, N] matrices worth a picture, rows and columns in the order of ``context.clients``."""
        return {}


def refuse_other_prefixes(message: Message, allowed: set[str]) -> None:
    """Raise MessageError for a tensor whose name begins with nothing that was agreed, and for any number."""
    for name in (*message.tensors, *message.numbers):
        if not any(name.startswith(prefix) for prefix in allowed):
            raise MessageError(f"unknown {name!r} in a sketch; allowed: {', '.join(sorted(allowed)) or 'nothing'}")


def blank(shapes: Shapes) -> Tensors:
    """Zeros of these shapes, of the dtypes that their kinds travel as."""
    dtypes = {name: torch.int32 if kind(name) == "index" else torch.float32 for name in shapes}
    return {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in shapes.items()}


def statistics_tensors(statistics: ClassStatistics) -> Tensors:
    return {f"statistics/{name}": tensor for name, tensor in statistics.to_tensors().items()}
