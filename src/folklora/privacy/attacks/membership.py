"""Membership inference: was this example among those that the client trained on?

Two scores, of the same models:

1. *Loss*: members have smaller losses, arXiv 1709.01604 (Yeom et al., CSF 2018).
2. *LiRA*, arXiv 2112.03570 (`folklora.privacy.attacks.lira`), online and offline, with shadow clients
  (`folklora.privacy.attacks.shadows`) that each train on a part of the pool.

The pool are a client's own training and test examples: both were drawn from the same share, so nothing but training
tells them apart (the rows of other clients would give away which labels a client has, and are none). Validation
examples are left out, since a head may have been chosen by them.

Whose model? The server plugs what the client sent into what else it can know. Tensors that never travel it takes from
its own shadows, as the mean of theirs [recon]: the same for the victim and for every shadow, so what is compared is
what travelled. With ``bases`` it has the victim's whole model, as somebody does who gets hold of a released adapter.

The control is a shadow in the victim's place, asked about the victim's examples: its membership has nothing to do with
theirs. What everybody was told of the victim before, such as a head made of class statistics, is in the control as
well: where its loss tells members from others, the sketch has given them away, not the round.

Rates at 0.1 % and 1 % false alarms are read off all victims together, and only where there are enough non-members for
one false alarm not to be too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from folklora.adapters.lowrank import Tensors
from folklora.backbones.causal import CausalLM
from folklora.errors import AttackError
from folklora.privacy.attacks import lira
from folklora.privacy.attacks.inference import Findings, Inference, Stage
from folklora.privacy.attacks.roc import FALSE_POSITIVES, Curve, curve
from folklora.privacy.attacks.shadows import Cast, shadows, victim, windows
from folklora.privacy.attacks.warm import Warm
from folklora.randomness import numpy_generator
from folklora.training.prediction import Question, predict

LEAST = 4
"""Shadows without which no likelihood is estimated."""


@dataclass(frozen=True)
class Scored:
    """One target's scores by attack, larger for members, and who is one."""

    scores: dict[str, np.ndarray]
    members: np.ndarray

    def curve(self, name: str) -> Curve:
        return curve(self.scores[name], self.members)


class Membership(Inference):
    """Loss threshold and LiRA."""

    name = "membership"
    title = "membership inference (loss, LiRA)"
    paper = "arXiv:2112.03570"
    casts = True

    def infer(self, stage: Stage) -> Findings:
        if stage.budget < LEAST:
            raise AttackError(f"--budget {stage.budget}: shadow clients of a victim; allowed: at least {LEAST}")
        findings = Findings()
        asked: list[tuple[Scored, Scored]] = []
        for client in stage.clients:
            target = victim(stage.warm, client)
            findings.sent = {name: list(tensor.shape) for name, tensor in target.sent.items()}
            findings.bytes = target.bytes
            own, control = self._scores(stage, client, target)
            asked.append((own, control))
            findings.values.append(_values(own))
            findings.controls.append(_values(control))
            members = int(own.members.sum())
            findings.victims.append({"client": client, "members": members, "others": len(own.members) - members})
        _pool(findings, asked)
        return findings

    def _scores(self, stage: Stage, client: str, target: Cast) -> tuple[Scored, Scored]:
        warm = stage.warm
        pool = np.sort(np.concatenate([target.rows, warm.setup.data.splits[client].test]))
        draw = numpy_generator(stage.seed, "membership", client)
        chosen = windows(pool, len(target.rows), stage.budget + 1, draw)
        cast = shadows(warm, client, chosen, stage.seed, stage.advance)
        models = [target.model, *(each.model for each in cast)]
        if not stage.lens.knowledge.bases:
            models = assumed([target, *cast])
        phi = confidences(warm, models, pool)
        seen = np.stack([np.isin(pool, each.rows) for each in cast])
        members = np.isin(pool, target.rows)
        # The last shadow is the control, and judges nobody.
        scored = [
            Scored(
                {
                    "loss": own,
                    "lira_online": lira.online(own, phi[1:-1], seen[:-1]),
                    "lira_offline": lira.offline(own, phi[1:-1], seen[:-1]),
                },
                members,
            )
            for own in (phi[0], phi[-1])
        ]
        return scored[0], scored[1]


def assumed(cast: Sequence[Cast]) -> list[Tensors]:
    """Each one's model as the server can know it: what it sent, and the shadows' mean of what nobody sent.

    The first is the victim, whose own private tensors play no part.
    """
    private = [name for name in cast[0].model if name not in cast[0].sent]
    others = cast[1:]
    common = {
        name: torch.stack([each.model[name].float() for each in others]).mean(0)
        for name in private
        if all(name in each.model and each.model[name].shape == others[0].model[name].shape for each in others)
    }
    return [
        {n: each.sent[n].float() if n in each.sent else common.get(n, each.model[n]) for n in each.model}
        for each in cast
    ]


def confidences(warm: Warm, models: Sequence[Tensors], rows: np.ndarray) -> np.ndarray:
    """[models, rows]: ``log p - log (1 - p)`` of the true label; of a language model minus the mean nats of a token."""
    setup = warm.setup
    adapter = setup.method.adapter
    examples, labels = setup.examples(rows)
    asked = [Question(str(i), adapter.rank(model), model, examples) for i, model in enumerate(models)]
    answers = predict(setup.task, adapter, asked)
    return np.stack([_phi(answers[str(i)], labels, setup.task) for i in range(len(models))])


def _phi(answers: np.ndarray, labels: np.ndarray, task: object) -> np.ndarray:
    if isinstance(task, CausalLM):
        nats: np.ndarray = -answers[:, 0] / np.maximum(answers[:, 1], 1)
        return nats
    logs = torch.from_numpy(answers).double().log_softmax(1)
    own = torch.nn.functional.one_hot(torch.from_numpy(labels), logs.shape[1]).bool()
    others = logs.masked_fill(own, -torch.inf).logsumexp(1)
    return lira.scaled(logs[own].numpy(), others.numpy())


def _values(scored: Scored) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in scored.scores:
        one = scored.curve(name)
        found |= {f"auc_{name}": one.auc, f"balanced_accuracy_{name}": one.balanced_accuracy}
    return found


def _pool(findings: Findings, asked: Sequence[tuple[Scored, Scored]]) -> None:
    """Rates at few false alarms, of all victims together; a score's size is compared between them as it is."""
    for name in asked[0][0].scores:
        own, control = (
            curve(
                np.concatenate([pair[i].scores[name] for pair in asked]),
                np.concatenate([pair[i].members for pair in asked]),
            )
            for i in (0, 1)
        )
        findings.pooled[f"auc_pooled_{name}"] = own.auc, control.auc
        for rate in FALSE_POSITIVES:
            if own.measurable(rate):
                findings.pooled[f"tpr_at_{rate:g}_{name}"] = own.tpr_at(rate), control.tpr_at(rate)
    for rate in FALSE_POSITIVES:
        if not own.measurable(rate):
            findings.notes.append(
                f"the rate at {100 * rate:g} % false alarms is not measured: {own.negatives} non-members, and it "
                f"needs {round(1 / rate)}; more victims, more examples or a larger data.test_fraction give them"
            )
    findings.notes.append(f"{own.positives} members and {own.negatives} non-members in all")
