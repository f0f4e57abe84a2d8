"""The member's end of a network run: one order in, one answer out, and all that must last in the member's own folder.

An order names the version of the private state to start from. What comes after it is a function of that version and of
the order, so an order that comes again, after a crash on either side, is answered with the same bytes; and a version is
on the disk before the answer leaves. Nothing that a server says ends this object: what cannot be is answered in one
line, and the state stays as it was. Answers hold no path and no traceback; those are in the member's own log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from folklora.backbones.metric import Score
from folklora.data.sources import fingerprint
from folklora.errors import FolkLoraError, MessageError, MethodError, RecipeError, RunError
from folklora.federation.depths import choose
from folklora.federation.folder import Brief, MemberFolder
from folklora.federation.member import Member
from folklora.federation.orders import Answer, Order, Record
from folklora.federation.parties import Own, member_setup
from folklora.federation.sampling import by_chance, sampled
from folklora.federation.scores import bounded, written_for
from folklora.federation.setup import Setup
from folklora.recipe import Recipe
from folklora.training.cohort import CohortTrainer
from folklora.training.evaluation import evaluate

log = logging.getLogger(__name__)


class Lost(RunError):
    """What an order starts from is not in the member's folder."""


class Resend(RunError):
    """Bytes that an order only names are not in the member's folder."""


class Refused(FolkLoraError):
    """An order that this member does not carry out."""


STATUS: dict[type[Exception], str] = {Lost: "lost", Resend: "resend", Refused: "refused"}


class Resident:
    """One member, at work for one run at a time.

    Parameters
    ----------
    client
        The member's name; orders for any other are refused.
    home
        The member's folder; each run has one of its own under ``runs/``.
    own
        Its rows and its backbone.
    """

    def __init__(self, client: str, home: Path, own: Own) -> None:
        self.client = client
        self.home = home
        self.own = own
        self.over = False  # whether the last run said goodbye
        self.run: str | None = None
        self.setup: Setup | None = None
        self.member: Member | None = None
        self.version: int | None = None  # which one is in memory; None: it must be read again

    # -- orders --------------------------------------------------------------------------------------------------

    def answer(self, record: Mapping[str, Any]) -> Record:
        """The answer to an order, both as flat records.

        Raises
        ------
        MessageError
            If the record is no order, so that there is nobody to answer.
        """
        return self.carry_out(Order.of(record)).record()

    def carry_out(self, order: Order) -> Answer:
        """Do what an order says; whatever goes wrong is an answer too."""
        try:
            if order.client != self.client:
                raise Refused(f"this is member {self.client!r}, not {order.client!r}")
            work: dict[str, Callable[[Order], Answer]] = {
                "hello": self._hello,
                "sketch": self._sketch,
                "train": self._train,
                "talk": self._talk,
                "score": self._score,
                "goodbye": self._goodbye,
            }
            return work[order.kind](order)
        except Exception as error:
            self.version = None
            status = STATUS.get(type(error), "failed")
            if isinstance(error, FolkLoraError):
                log.warning("%s: %s", _what(order), error)
            else:  # a fault of ours, or something that no check of ours foresaw; neither may end the member's work
                log.exception("%s: failed", _what(order))
            return Answer.to(order, status, _told(error))

    # -- what a run is -------------------------------------------------------------------------------------------

    def _hello(self, order: Order) -> Answer:
        text, clients, classes = order.recipe or "", order.clients or [], order.classes or []  # a hello has them all
        recipe = Recipe.from_toml(text, "the server's recipe")
        setup = member_setup(recipe, self.client, clients, classes, self.own)
        digest, theirs = setup.task.backbone.digest, order.backbone or ""
        if digest != theirs:
            raise Refused(f"the backbone here (SHA-256 {digest[:12]}...) is not the server's ({theirs[:12]}...)")
        brief = Brief(
            run=order.run,
            client=self.client,
            recipe=text,
            clients=clients,
            classes=classes,
            model=setup.recipe.model.name,
            fingerprint=fingerprint(setup.data.table),
            backbone=digest,
        )
        folder = self._folder(order.run)
        self._refuse_key(recipe, folder)
        known = folder.brief()
        if known is None:
            folder.begin(brief, self.own.key)
        # A version of this program before or after this one may write the same recipe with other defaults spelt out.
        elif (
            Recipe.from_toml(known.recipe) != recipe
            or known.model_copy(update={"model": brief.model, "recipe": text}) != brief
        ):
            raise Refused("this run began with another recipe, other members or other data of this member")
        self._open(order.run, setup)
        self.over = False
        parts = setup.data.splits[self.client]
        sizes = [len(parts.train), len(parts.validation), len(parts.test)]
        log.info("run %s: method %s, %d members; own examples: %d to train on, %d to validate, %d to test",
                 order.run[:8], recipe.method.name, len(clients), *sizes)  # fmt: skip
        return Answer.to(order, examples=sizes, backbone=digest)

    def _refuse_key(self, recipe: Recipe, folder: MemberFolder) -> None:
        """A member encrypts, or exchanges the keys of its masks, under the key that it was given, or not at all."""
        encrypts, given, kept = recipe.secure.kind == "ckks", self.own.key, folder.key()
        if given is not None and recipe.secure.kind == "none":
            raise Refused("this member has a key (--key), and the run does not encrypt what it sends")
        if given is not None and kept is None and folder.brief() is not None:
            raise Refused("this run began without the key that this member has now (--key)")
        if encrypts and given is None and kept is None:
            raise Refused('secure.kind = "ckks" and no key here; allowed: --key FILE, as `folklora keys` wrote it')
        if given is not None and kept is not None and given.id != kept.id:
            raise Refused(f"this run began with the key {kept.id}, not with {given.id}")

    def _goodbye(self, order: Order) -> Answer:
        log.info("run %s is over", order.run[:8])
        self.run = self.setup = self.member = self.version = None
        self.over = True
        return Answer.to(order)

    def _folder(self, run: str) -> MemberFolder:
        return MemberFolder(self.home / "runs" / run)

    def _known(self, order: Order) -> Setup:
        """The setup of the order's run, from the member's folder where this process has not met it yet."""
        if self.run == order.run and self.setup is not None:
            return self.setup
        brief = self._folder(order.run).brief()
        if brief is None:
            raise Lost("this member's folder knows of no such run")
        recipe = Recipe.from_toml(brief.recipe)
        self._refuse_key(recipe, self._folder(order.run))
        setup = member_setup(recipe, self.client, brief.clients, brief.classes, self.own)
        if fingerprint(setup.data.table) != brief.fingerprint:
            raise Refused("this member's data is not what the run began with")
        if setup.task.backbone.digest != brief.backbone:
            raise Refused("this member's backbone is not what the run began with")
        self._open(order.run, setup)
        return setup

    def _open(self, run: str, setup: Setup) -> None:
        if self.run != run or self.setup is None:
            self.run, self.setup, self.member, self.version = run, setup, None, None

    # -- work ----------------------------------------------------------------------------------------------------

    def _sketch(self, order: Order) -> Answer:
        member = self._member(order)
        log.info("sketch of %d examples", member.client.examples)
        data = member.sketch()
        if not order.round:
            self._save(order, 0, member)
        else:  # asked for again: nothing about this member is another after it
            self.version = order.base
        log.info("sketch: %d bytes sent", len(data or b""))
        return Answer.to(order, data=data)

    def _train(self, order: Order) -> Answer:
        member = self._member(order)
        self._refuse_unplanned(order, member.setup)
        self._take_in(order, member)
        member.outlet.attached = order.attached
        jobs = member.jobs(order.round)
        log.info("%s: at work on %d examples", _what(order), member.client.examples)
        setup = member.setup
        trainer = CohortTrainer(setup.task, setup.method.adapter, setup.recipe.train, setup.recipe.seed)
        fitted = {each.branch: each for each in trainer.fit(jobs)}
        results = [fitted[job.branch] for job in jobs]
        data = member.finish(order.round, results)
        self._save(order, order.round, member)
        loss = results[0].loss if results else None
        told = "nothing was trained" if loss is None else f"loss {loss:.4f}"
        log.info("%s: %s; %d bytes sent", _what(order), told, len(data or b""))
        if loss is not None and not setup.recipe.privacy.tells_losses:
            loss = 0.0  # what examples are protected from is not told in this way either
        return Answer.to(order, data=data, loss=loss)

    def _refuse_unplanned(self, order: Order, setup: Setup) -> None:
        """What protects this member was counted for the rounds that it is drawn in: it trains in no others."""
        recipe, rounds = setup.recipe, setup.method.rounds()
        if recipe.privacy.unit == "none":
            return
        if order.round > rounds:
            raise Refused(f"a training in round {order.round} of a private run; allowed: rounds 1 to {rounds}")
        drawn = by_chance(recipe) or self.client in sampled(recipe, setup.method.context.clients, order.round, 0)
        if not drawn:
            raise Refused(f"a training in round {order.round} of a private run; allowed: rounds that it is drawn in")

    def _talk(self, order: Order) -> Answer:
        member = self._member(order)
        return Answer.to(order, data=member.outlet.talk(order.round, order.topic or "", order.part or b""))

    def _score(self, order: Order) -> Answer:
        member = self._member(order)
        if order.welcome is not None:
            self.version = None  # what is taken in here is for this order alone
            member.settle(self._part(order, "welcome"))
        reply = None if order.reply is None else self._part(order, "reply")
        written = written_for([question.removesuffix("+reply") for question in order.questions])
        steps = None if written is None else self._chosen(member, order.questions[written], reply)
        scores = [self._one_score(member, q, reply, steps, written=i == written) for i, q in enumerate(order.questions)]
        folder = self._folder(order.run)
        is_version = order.welcome is None and order.base in folder.state().versions
        folder.stand(order.base, None if is_version else member.record(), order.reply, steps)
        metric = member.setup.task.metric
        shown = (f"{q} {metric.named(score.value)}" for q, score in zip(order.questions, scores, strict=True))
        log.info("%s: %s", _what(order), ", ".join(shown))
        return Answer.of_scores(order, scores)

    def _chosen(self, member: Member, question: str, reply: bytes | None) -> int | None:
        """How often this member chooses to apply a shared block, with the model that the question is about."""
        setup, client = member.setup, self.client
        if setup.depths is None or not setup.depths.auto:
            return None
        asked = member.question("validation", reply if question.endswith("+reply") else None)
        labels = {client: member.labels("validation")}
        steps = choose(setup.task, member.method.adapter, setup.depths, [asked], labels)[client]
        log.info("depth: %d of at most %d steps", steps, setup.depths.most[client])
        return steps

    def _one_score(
        self, member: Member, question: str, reply: bytes | None, steps: int | None, *, written: bool
    ) -> Score:
        split: Any = question.removesuffix("+reply")
        if split == "train" and member.setup.recipe.privacy.unit == "example":
            raise Refused("a score on training examples, which are private; allowed: validation, test")
        if question != split and reply is None:
            raise Refused(f"the question {question!r} comes without a reply")
        asked = member.question(split, reply if question != split else None, steps)
        labels = {self.client: member.labels(split)}
        chats = {self.client: member.inputs(split)} if written else None
        task, adapter, section = member.setup.task, member.method.adapter, member.setup.recipe.eval
        score = evaluate(task, adapter, [asked], labels, generate=section, chats=chats)[self.client]
        return replace(bounded(score), steps=steps)

    # -- private state -------------------------------------------------------------------------------------------

    def _member(self, order: Order) -> Member:
        """This member as the version that the order starts from left it."""
        setup, folder = self._known(order), self._folder(order.run)
        if self.member is None or self.version != order.base:
            self.member, self.version = Member(setup, self.client, self._secret(folder), folder.key()), None
            self.member.outlet.noted = folder
            if order.base >= 0:
                record = folder.load(order.base)
                if record is None:
                    raise Lost(f"this member's folder has no sound copy of its state of round {order.base}")
                self.member.restore(record)
        self.version = None  # until the work is done, or the order has changed nothing
        if order.kind in ("score", "talk"):
            self.version = order.base
        return self.member

    def _secret(self, folder: MemberFolder) -> int | None:
        """Of a rehearsal, the simulation's: it is to give the simulation's numbers."""
        return None if self.own.data is None else folder.secret()

    def _take_in(self, order: Order, member: Member) -> None:
        if order.accepted:
            member.accepted()
        if order.welcome is not None:
            member.settle(self._part(order, "welcome"))
        if order.reply is not None:
            member.receive(self._part(order, "reply"))

    def _part(self, order: Order, name: str) -> bytes:
        """The bytes of a welcome or a reply: they came along, or are here from before."""
        digest, data = getattr(order, name), getattr(order, f"{name}_data")
        folder = self._folder(order.run)
        if data is not None:
            if len(data) > self._most():
                raise MessageError(f"the {name} has {len(data)} bytes; allowed: at most {self._most()}")
            folder.hold(digest, data)
            return bytes(data)
        data = folder.part(digest)
        if data is None:
            raise Resend(f"the {name} that the server means is not here any more")
        return data

    def _most(self) -> int:
        assert self.member is not None
        return self.member.most

    def _save(self, order: Order, version: int, member: Member) -> None:
        hold = {*order.hold, *(digest for digest in (order.welcome, order.reply) if digest is not None)}
        self._folder(order.run).save(version, member.record(), {*order.keep, order.base}, hold)
        self.version = version


def _what(order: Order) -> str:
    return f"round {order.round}" if order.kind == "train" else f"round {order.round}, {order.kind}"


def _told(error: Exception) -> str:
    """What the server is told of an error: nothing that may hold a path of this machine."""
    if isinstance(error, Lost | Resend | Refused | MessageError | MethodError | RecipeError):
        return str(error)
    return f"{type(error).__name__} at the member; its own log says more"
