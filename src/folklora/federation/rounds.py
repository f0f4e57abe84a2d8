"""The round loop: who takes part, what travels, what is counted, what is kept. One loop for every engine and method."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import safetensors.torch

from folklora.adapters.lowrank import Tensors
from folklora.backbones.metric import Score
from folklora.errors import FolkLoraError, MessageError, RunError
from folklora.federation.budget import AWAY, Budget
from folklora.federation.codec import decode, encode
from folklora.federation.depths import tell
from folklora.federation.engine import Asked, Engine
from folklora.federation.intake import intake_of
from folklora.federation.ledger import Ledger, round_to
from folklora.federation.newcomers import introduce, row_of, told
from folklora.federation.rundir import Checkpoint, RunDirectory
from folklora.federation.sampling import sampled, simulated_secret
from folklora.federation.scores import bounded, summarise
from folklora.federation.setup import Setup
from folklora.federation.summary import Final, summary
from folklora.methods.contract import Message, State
from folklora.randomness import derive

SKETCH_NAMES = 1 << 16
"""Bytes of a sketch beside its numbers: names, shapes, scales."""


class Progress(Protocol):
    """Told what goes on; the command line draws it."""

    def run(self, name: str) -> None: ...
    def phase(self, name: str, total: int) -> None: ...
    def advance(self) -> None: ...
    def line(self, metrics: Mapping[str, Any]) -> None: ...


class Silent:
    """No progress shown."""

    def run(self, name: str) -> None: ...
    def phase(self, name: str, total: int) -> None: ...
    def advance(self) -> None: ...
    def line(self, metrics: Mapping[str, Any]) -> None: ...


class Rounds:
    """Runs a method over an engine, committing every round to the run directory; starts where the directory stands."""

    def __init__(
        self,
        setup: Setup,
        run: RunDirectory,
        engine: Engine,
        clients: Sequence[str],
        progress: Progress,
        examples: Callable[[str], dict[str, int]] | None = None,
    ) -> None:
        self.recipe = setup.recipe
        self.method = setup.method
        self.metric = setup.task.metric
        self.run = run
        self.engine = engine
        private, of_clients = self.recipe.privacy.unit != "none", self.recipe.privacy.unit == "client"
        real = of_clients and self.recipe.engine.kind != "local"
        self.secret = run.secret() if real else simulated_secret(self.recipe)
        self.intake = intake_of(setup, engine, self.secret)
        self.budget = Budget(self.recipe, self.method, examples or setup.sizes) if private else None
        self.history: list[Mapping[str, Any]] = []  # all committed lines
        self.halted: str | None = None  # why no more rounds are played, in words
        self.setup = setup
        self.clients = [client for client in clients if setup.method_of(client) is setup.method]
        self.later = frozenset(setup.data.later)
        self.least = max(self.recipe.engine.min_clients, self.intake.least)
        self.needed = max(1, self.least)
        self.progress = progress
        self.state: State = {}
        self.delivered: dict[str, str] = {}  # client -> which reply it has
        self.last_reply = b""
        self.checkpoint: Checkpoint | None = None
        self.writing = 0.0

    def play(self) -> dict[str, Any]:
        """All rounds that are not committed yet, then the final evaluation; returns the summary."""
        self.checkpoint = self.run.checkpoint()
        if self.checkpoint is None:
            self.begin()
        else:
            self.load(self.checkpoint)
        assert self.checkpoint is not None
        last = self.method.rounds()
        while self.checkpoint.round < last and not self.stopped():
            self.round(self.checkpoint.round + 1)
        return self.finish()

    def affordable(self, round: int, sampled: Sequence[str], failed: Mapping[str, str]) -> bool:
        """Whether the privacy budget has room for a round of these clients; where not, the run halts here."""
        if self.budget is not None:
            taking_part = [client for client in sampled if client not in failed]
            next = {"round": round, "participants": taking_part, "failed": failed}
            self.halted = self.budget.refusal(self.history, next)
        return self.halted is None

    def stopped(self) -> bool:
        """Early stopping: the last `patience` validations brought nothing better; or the privacy budget is spent."""
        if self.halted is not None:
            return True
        patience = self.recipe.train.patience
        return patience is not None and self.checkpoint is not None and self.checkpoint.stale >= patience

    def load(self, checkpoint: Checkpoint) -> None:
        """Be where a checkpoint was."""
        self.history = list(self.run.metrics())  # a damaged one is found now rather than after the last round
        records = {client: self.run.tensors(checkpoint, name) for client, name in checkpoint.clients.items()}
        self.state = self.run.tensors(checkpoint, checkpoint.server)
        self.delivered = dict(checkpoint.delivered)
        self.checkpoint = checkpoint
        self._restore(records)

    def _restore(self, records: Mapping[str, Tensors]) -> None:
        for client in self.engine.restore(records):
            welcome = self._welcome(client)
            if welcome is not None:
                self.engine.settle(client, welcome)

    def _present(self, round: int, clients: Sequence[str], least: int) -> list[str]:
        """Who of them is there.

        Raises
        ------
        RunError
            If those are too few, however long the engine waited.
        """
        if not clients:
            return []  # chance may draw nobody
        there = set(self.engine.present(round, clients, least))
        found = [client for client in clients if client in there]
        if len(found) < self.needed:
            self._too_few(round, f"{len(found)} of {len(clients)} clients are connected")
        return found

    def _too_few(self, round: int, found: str) -> NoReturn:
        kept = f"the run stands as round {self._committed()} left it" if self.checkpoint else "nothing is committed yet"
        raise RunError(f"round {round}: {found}, {self.needed} needed ({self.intake.needs}); {kept}; it can be resumed")

    # -- once, before the first round ----------------------------------------------------------------------------

    def begin(self) -> None:
        ledger = Ledger()
        there = self._present(0, self.clients, len(self.clients))
        sketches, failed = self._sketches(0, there, ledger)
        self._enough(0, there, failed)
        with ledger.timed("aggregate"):
            self.state = self.method.begin(sketches)
        with ledger.timed("sketch"):
            for client in self.clients:
                welcome = self._welcome(client)
                if welcome is not None:
                    ledger.down[client] += len(welcome)
                    self.engine.settle(client, welcome)
        line = ledger.line(self.clients, 0, [], failed, None, None, None)
        if self.budget is not None and (spent := self.budget.spent([line]))["epsilon"]:  # of a private sketch
            line["privacy"] = spent
        self.commit(0, self.clients, line)
        if "privacy" in line:
            self.progress.line(line)

    def _sketches(
        self, round: int, there: Sequence[str], ledger: Ledger, *, asked: bool = True
    ) -> tuple[dict[str, Message], dict[str, str]]:
        """The sketches of those who are there, in their order, not that of arrival; and who sent none, and why.

        Where they are not ``asked`` for one, who answers with nothing has answered.
        """
        most = 8 * self.method.sketch_numbers() + SKETCH_NAMES if asked and self.method.sketch_numbers() else 0
        arrived: dict[str, Message] = {}
        silent = set(there)
        failed = dict.fromkeys(set(self.clients) - silent, AWAY)
        self.progress.phase("sketch", len(there))
        with ledger.timed("sketch"):
            for client, data in self.engine.sketches(there, round):
                if client not in silent:
                    ledger.ignored["duplicate" if client in there else "unasked"] += 1
                    continue
                silent.discard(client)
                ledger.up[client] += len(data or b"")
                try:
                    if data is not None:
                        # Eight bytes a number, and names, is more than any form of it weighs.
                        message = decode(data, most)
                        self.method.check_sketch(message)
                        arrived[client] = message
                    elif most:
                        raise MessageError("it sent no sketch; allowed: what the method asks for")
                except FolkLoraError as error:
                    failed[client] = str(error)
                self.progress.advance()
        failed |= dict.fromkeys(silent, "did not answer")
        return {client: arrived[client] for client in there if client in arrived}, failed

    # -- one round -----------------------------------------------------------------------------------------------

    def _refresh(self, round: int, ledger: Ledger) -> dict[str, Any]:
        """Ask everybody who is there for a sketch again, before anything else is sent in the round.

        Who sent none, and why, is no failure: its old one is kept, and it takes part in the round as ever.
        """
        sketches, failed = self._sketches(round, self._present(round, self.clients, self.needed), ledger)
        with ledger.timed("aggregate"):
            self.state = self.method.refresh(round, self.state, sketches)
        return {
            "kept": {client: failed[client] for client in self.clients if client in failed},
            "bytes_up_clients": {client: ledger.up[client] for client in self.clients if ledger.up[client]},
        }

    def sampled(self, round: int) -> list[str]:
        """The round's clients; see `folklora.federation.sampling`."""
        return sampled(self.recipe, self.clients, round, self.secret)

    def drops_out(self, round: int, client: str) -> bool:
        """Simulated failure: the client trains and is gone before it answers."""
        return derive(self.recipe.seed, "failure", client, round) < self.recipe.train.failures * 2**63

    def round(self, round: int) -> None:
        assert self.checkpoint is not None
        ledger = Ledger()
        sampled = self.sampled(round)
        if not self.affordable(round, sampled, {}):
            return
        before = self.state
        change = self._change(round)
        if self.method.refreshes(round):
            change["refresh"] = self._refresh(round, ledger)
        there = self._present(round, sampled, self.needed)
        failed = dict.fromkeys(set(sampled) - set(there), AWAY)
        failed |= self.intake.prepare(round, there, ledger)
        # They are gone when it is their turn to answer, whatever they said before.
        failed |= {client: "dropped out (simulated)" for client in there if self.drops_out(round, client)}
        working = [client for client in there if client not in failed]
        with ledger.timed("aggregate"):
            sent = {client: self._deliver(client, ledger, lost=client in failed) for client in there}
        uploads, losses, heard = self._train(round, working, failed, ledger)
        # In the clients' order: the checkpoint's bytes follow it.
        self.delivered |= {c: digest for c in working if c in heard and (digest := sent[c]) is not None}
        took_part = list(losses)
        self._enough(round, there, failed)
        if not self.affordable(round, sampled, failed):  # noise is missing where clients are
            self._take_back(working)
            self.state = before
            return
        self._take_back([client for client in working if client not in losses])
        error = None
        if uploads or self.intake.alone:
            with ledger.timed("aggregate"):
                self.state = self.intake.server(round, self.state, uploads, ledger)
            if (messages := self.intake.messages(uploads)) is not None:
                with ledger.timed("measure"):
                    error = self._aggregation_error(messages)
        validation = None
        if took_part and (round % self.recipe.train.evaluate_every == 0 or round == self.method.rounds()):
            validation = self._validate(took_part, ledger)
        if validation is not None:
            merits = {client: self.metric.merit(value) for client, value in validation["clients"].items()}
            self.state = self.method.validated(round, self.state, merits)
        # Training losses are exact, and no noise covers them.
        told = self.recipe.privacy.tells_losses
        told = told and bool(self.method.trained(round))
        loss = sum(losses.values()) / len(losses) if losses and told else None
        line = {**ledger.line(self.clients, round, sampled, failed, loss, validation, error), **change}
        if self.budget is not None:
            line["privacy"] = self.budget.spent([*self.history, line])
        # Whoever failed is as it was; but the engine may have something to note of it.
        self.commit(round, working, line, validation)
        self.progress.line(line)

    def _change(self, round: int) -> dict[str, Any]:
        """Whose data are other ones from this round on; what the method made of them before is kept to be shown."""
        if not self.later or round != self.recipe.drift.round:
            return {}
        if insight := self.method.insight(self.state):
            self.run.write("insight-before.safetensors", safetensors.torch.save(insight))
        return {"drift": [client for client in self.clients if client in self.later]}

    def _train(
        self, round: int, working: list[str], failed: dict[str, str], ledger: Ledger
    ) -> tuple[dict[str, Any], dict[str, float], set[str]]:
        """Local training; what arrives malformed, or not at all, fails its client for this round and nobody else.

        Uploads and losses of those that took part, in the clients' order (uploads arrive as they are done, and nothing
        may depend on that), and who answered at all. The first answer of a client to this round counts.
        """
        arrived: dict[str, Any] = {}
        losses: dict[str, float] = {}
        heard: set[str] = set()
        asked = frozenset(working)
        trains = bool(self.method.trained(round))
        self.progress.phase(f"round {round}", len(working))
        with ledger.timed("train"):
            for upload in self.engine.train(round, working):
                client = upload.client
                ledger.up[client] += len(upload.data or b"")
                if upload.round != round or client in heard or client not in asked:
                    reason = "late" if upload.round != round else "duplicate" if client in heard else "unasked"
                    ledger.ignored[reason] += 1
                    continue
                heard.add(client)
                self.progress.advance()
                try:
                    if upload.failure is not None:
                        raise RunError(upload.failure)
                    if trains and not math.isfinite(upload.loss):
                        raise RunError(f"training loss = {upload.loss}; allowed: a finite number")
                    read = self.intake.read(round, self.state, client, upload.data, self._said(client))
                    if read is not None:
                        arrived[client] = read
                    losses[client] = upload.loss
                except FolkLoraError as error:
                    failed[client] = str(error)
        failed |= {client: "did not answer" for client in working if client not in heard}
        self.engine.accepted([client for client in working if client in arrived])
        return (
            {client: arrived[client] for client in working if client in arrived},
            {client: losses[client] for client in working if client in losses},
            heard,
        )

    def _enough(self, round: int, there: Sequence[str], failed: Mapping[str, str]) -> None:
        """Raises RunError if fewer took part than ``engine.min_clients``, or than the server can do anything with."""
        missing = [client for client in there if client in failed]
        if len(there) - len(missing) < self.least:
            reasons = f"client {missing[0]!r}: {failed[missing[0]]}" if missing else "no more are sampled"
            self._too_few(round, f"{len(there) - len(missing)} of {len(there)} clients took part ({reasons})")

    def _take_back(self, clients: Sequence[str]) -> None:
        """Whoever failed has not taken part, whatever became of its upload: it is as the last committed round left it,
        and so it would be after a resume."""
        assert self.checkpoint is not None
        names = self.checkpoint.clients
        self._restore({client: self.run.tensors(self.checkpoint, names[client]) for client in clients})

    def _welcome(self, client: str) -> bytes | None:
        message = self.method.welcome(self.state, client)
        return None if message is None else encode(message, self.recipe.message.dtype)

    def _reply(self, client: str) -> bytes | None:
        data = self.intake.reply(self.state, client)
        if data is None:
            return None
        # Where all get the same, it is in memory once.
        if data != self.last_reply:
            self.last_reply = data
        return self.last_reply

    def _said(self, client: str) -> Iterator[Message | None]:
        """What a client was sent before it trained: its welcome, and the reply it got at the start of the round."""
        yield self.method.welcome(self.state, client)
        yield self.method.reply(self.state, client) if self._committed() else None

    def _deliver(self, client: str, ledger: Ledger, *, lost: bool = False) -> str | None:
        """Bring a client up to the server's state, before the first round its welcome was that; what it was sent."""
        reply = self._reply(client) if self._committed() else None
        if reply is None:
            return None
        if not lost:
            self.engine.receive(client, reply)
        return self._count(client, reply, ledger)

    def _count(self, client: str, reply: bytes, ledger: Ledger) -> str:
        """Bytes down count once: a client that is known to have this very reply is not sent it again."""
        digest = hashlib.sha256(reply).hexdigest()
        if self.delivered.get(client) != digest:
            ledger.down[client] += len(reply)
        return digest

    def _committed(self) -> int:
        return self.checkpoint.round if self.checkpoint else 0

    def _validate(self, clients: list[str], ledger: Ledger) -> dict[str, Any] | None:
        replies = {client: self._reply(client) for client in clients}
        with ledger.timed("evaluate"):
            (scores,) = self._scores(clients, [("validation", replies)], ledger)
        return summarise(scores, self.metric) if scores else None

    def _scores(self, clients: Sequence[str], questions: Sequence[Asked], ledger: Ledger) -> list[dict[str, Score]]:
        """One exchange, its answers in the clients' order; who answered has the reply that was part of a question."""
        found = self.engine.scores(clients, questions)
        told = {client: reply for _, replies in questions for client, reply in replies.items() if reply is not None}
        for client, reply in told.items():
            digest = self._count(client, reply, ledger)
            if any(client in scores for scores in found):
                self.delivered[client] = digest
        return [{client: bounded(scores[client]) for client in clients if client in scores} for scores in found]

    def _aggregation_error(self, messages: Mapping[str, Message]) -> float | None:
        mixing = self.method.mixing(self.state, messages)
        if mixing is None:
            return None
        replies = {client: self._reply(client) for client in messages}
        error = self.engine.aggregation_error(list(messages), replies, mixing)
        return error if error is not None and math.isfinite(error) else None

    def commit(
        self, round: int, changed: Sequence[str], line: dict[str, Any], validation: Mapping[str, Any] | None = None
    ) -> None:
        """Write the round; early stopping's tally is part of it."""
        best, stale = (self.checkpoint.best_round, self.checkpoint.stale) if self.checkpoint else (None, 0)
        if validation is not None and self.recipe.train.patience is not None:
            merit = self.metric.merit
            earlier = [merit(m["validation"]["mean"]) for m in self.run.metrics() if m["validation"]]
            better = merit(validation["mean"]) > max(earlier, default=-math.inf)
            best, stale = (round, 0) if better else (best, stale + 1)
        # A line cannot hold how long its own writing took: it holds the commit's before it.
        line["seconds"]["checkpoint"] = round_to(self.writing, 4)
        started = time.perf_counter()
        self.checkpoint = self.run.commit(
            self.checkpoint,
            round,
            self.engine.records(changed),
            self.state,
            line,
            delivered=self.delivered,
            best_round=best,
            stale=stale,
        )
        self.history.append(line)
        self.writing = time.perf_counter() - started

    # -- at the end ----------------------------------------------------------------------------------------------

    def replies(self, clients: Sequence[str]) -> dict[str, bytes | None]:
        """What the server has for each of them at the end."""
        return {client: self._reply(client) if self._committed() else None for client in clients}

    def finish(self) -> dict[str, Any]:
        """The final delivery, the one reading of the test data, and the summary."""
        stopped_early = self._committed() < self.method.rounds()
        if self.recipe.train.patience is not None and (best := self.run.checkpoint(best=True)) is not None:
            self.load(best)
        ledger = Ledger()
        there = self._present(self._committed() + 1, self.clients, len(self.clients))
        self.progress.phase("test", 1)
        with ledger.timed("evaluate"):
            replies = self.replies(there)
            questions: list[Asked] = [("test", {}), ("validation", {})]
            if any(reply is not None for reply in replies.values()):
                questions += [("test", replies), ("validation", replies)]
            found = self._scores(there, questions, ledger)
            answered = [client for client in there if all(client in scores for scores in found)]
            if not answered:
                self._too_few(self._committed(), f"none of {len(there)} clients answered the last question")
            # Where nobody has a reply, the models are the same before and after it.
            tuned, tuned_validation, received, received_validation = (
                {client: scores[client] for client in answered} for scores in (found + found)[:4]
            )
            final = Final(self.metric, tuned, tuned_validation, received, received_validation, self._global_score())
            self.progress.advance()
        written = summary(self.recipe, self.clients, self._committed(), self.run.metrics(), final, ledger)
        if self.setup.depths is not None:
            tell(written, self.setup.depths, final.received)
        if self.setup.newcomers:
            written["newcomers"] = self._newcomers()
            written["row"] |= row_of(written["newcomers"], self.metric.name)
        if self.budget is not None:
            written["privacy"] = self.budget.account(self.history)
            written["row"]["epsilon"] = written["privacy"]["epsilon"]
        return {**written, "stopped_early": stopped_early, **({"stopped": self.halted} if self.halted else {})}

    def _newcomers(self) -> dict[str, Any]:
        """Newcomers send their sketches, are told what the server makes of those, and are scored with it."""
        ledger, newcomers = Ledger(), self.setup.newcomers
        present = set(self.engine.present(self._committed() + 1, newcomers, len(newcomers)))
        there = [client for client in newcomers if client in present]
        joining = self.setup.joining
        asked = joining is not None and joining.asks_newcomers
        sketches, silent = self._sketches(0, there, ledger, asked=asked)
        failed = {c: silent.get(c, AWAY) for c in newcomers if c in silent or c not in present}
        replies: dict[str, bytes | None] = {}
        for client in (each for each in there if each not in failed):
            try:
                welcome, reply = introduce(self.setup, self.state, client, sketches.get(client), self._committed())
                if welcome is not None:
                    ledger.down[client] += len(welcome)
                    self.engine.settle(client, welcome)
            except FolkLoraError as error:
                failed[client] = str(error)
            else:
                replies[client] = reply
        self.progress.phase("newcomers", len(replies))
        (scores,) = self._scores(list(replies), [("test", replies)], ledger) if replies else ({},)
        failed |= {client: "did not answer" for client in replies if client not in scores}
        return told(self.setup, scores, failed, ledger)

    def _global_score(self) -> Score | None:
        """Of the global model, as a client that never trained would have it: no one's private tensors are asked for.

        None also where the server cannot read it.
        """
        if not self.intake.reads:
            return None
        client, welcome = self.clients[0], self._welcome(self.clients[0])
        fresh = {**self.method.initial(client), **(decode(welcome).tensors if welcome is not None else {})}
        model = self.method.global_model(self.state, client, fresh)
        score = None if model is None else self.engine.global_score(model)
        return None if score is None else bounded(score)
