"""Condensed inversion: what do made-up examples say of the real ones that they were made from? Ours [recon].

A client that condenses (`folklora.methods.condensed`) sends no gradient and no model. The attacker has the round's
upload, the class counts that were sent once, and the backbone. Four questions:

1. *Nearest public example*: of the examples that no split of the victim holds, the one whose frozen features lie
  nearest to each made-up one. It is what the attacker shows; its words are held against the victim's texts.
2. *Identification*: are the victim's examples, among public ones, the nearest candidates (``hit``; ``single_hit`` of
  the classes that have one example; ``rank_quantile``)? Of embeddings the frozen backbone makes features first.
3. *Subset*: a class's made-up mean is its real mean as well as it was matched; times the count it is a sum of features,
  and a pursuit looks for the candidates in it, as in `folklora.privacy.attacks.mixture`.
4. Of embeddings also the *nearest tokens*, by cosine, and how near they are (``token_cosine``): are they words, and the
  victim's?

The control is the upload of another client, asked the same about the victim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.lowrank import Tensors
from folklora.errors import MessageError
from folklora.federation.intake import intake_of
from folklora.methods.condensation import class_means
from folklora.methods.condensed import INPUTS, Condensed
from folklora.methods.contract import Network
from folklora.privacy.attacks.inference import Findings, Inference, Stage
from folklora.privacy.attacks.metrics import Texts, Values, text_metrics
from folklora.privacy.attacks.mixture import SHOWN, Means, bare_texts, closest, identified, nearest_of, summed
from folklora.privacy.attacks.result import texts_of
from folklora.privacy.attacks.witness import Alone


@dataclass(frozen=True)
class Upload:
    """What one client sent in the round: made-up inputs [S, ...], what they stand for [S], and its class counts [C]."""

    tensors: Tensors
    labels: Tensor
    counts: Tensor
    bytes: int

    @property
    def inputs(self) -> Tensor:
        return self.tensors[INPUTS].float()


class CondensedInversion(Inference):
    """What condensed data says of the examples behind it."""

    name = "condensed"
    title = "condensed inversion (nearest, identified, summed, tokens)"
    paper = None

    def infer(self, stage: Stage) -> Findings:
        findings = Findings()
        setup = stage.warm.setup
        if not isinstance(setup.method, Condensed):
            findings.notes.append(f"method {setup.recipe.method.name!r} sends no condensed data")
            return findings
        for client in stage.clients:
            own, control = (upload_of(stage, each) for each in (client, stage.another(client, self.name)))
            if own is None or control is None:
                findings.notes.append(f"client {client}: it, or the control, sent nothing that is read")
                continue
            findings.sent = {name: list(tensor.shape) for name, tensor in own.tensors.items()}
            findings.bytes = own.bytes
            told = [self._asked(stage, client, upload) for upload in (own, control)]
            findings.values.append(told[0][0])
            findings.controls.append(told[1][0])
            findings.victims.append({"client": client, **told[0][1], "control": told[1][1]["recovered"]})
        return findings

    def _asked(self, stage: Stage, client: str, upload: Upload) -> tuple[Values, dict[str, Any]]:
        setup, replica = stage.warm.setup, stage.lens.replica
        features, labels = setup.frozen_features(), setup.data.table.labels
        rows, public = setup.split(client, stage.warm.round + 1).train, stage.public(client)
        seen = seen_by_the_backbone(stage, client, upload)
        points = Means(upload.labels.numpy(), seen, upload.counts[upload.labels].double().numpy())
        candidates = np.concatenate([rows, public])
        values = identified(points, features[torch.from_numpy(candidates)], len(rows))
        present = upload.labels.unique()
        whole = Means(
            present.numpy(),
            class_means(seen, upload.labels, len(upload.counts))[present],
            upload.counts[present].double().numpy(),
        )
        values |= summed(whole, features, labels, candidates, set(rows.tolist()))
        nearest, cosine = nearest_of(seen, features[torch.from_numpy(public)])
        values["public_cosine"] = float(cosine.mean())
        if replica.form == "image":
            return values, {"original": [], "recovered": []}
        original = bare_texts(replica, setup.encoded, closest(points, features, rows))
        recovered = bare_texts(replica, setup.encoded, public[nearest.numpy()])
        if upload.inputs.dim() == 3:
            recovered, values["token_cosine"] = nearest_tokens(replica, upload.inputs)
        values |= text_metrics(original, recovered)
        return values, {"original": original.texts[:SHOWN], "recovered": recovered.texts[:SHOWN]}


def upload_of(stage: Stage, client: str) -> Upload | None:
    """What a client sends in the round after the warm state, as the server reads it; None if it reads nothing."""
    warm, setup, method = stage.warm, stage.warm.setup, stage.warm.setup.method
    assert isinstance(method, Condensed)
    engine, number = Alone(setup, client), warm.round + 1
    engine.restore({client: warm.record(client)})
    engine.present(number, [client], 1)
    intake = intake_of(setup, engine)
    reply = intake.reply(warm.state, client) if number > 1 else None
    if reply is not None:
        engine.receive(client, reply)
    (upload,) = engine.train(number, [client])
    if upload.failure is not None or upload.data is None:
        return None
    said = (method.welcome(warm.state, client), method.reply(warm.state, client) if number > 1 else None)
    try:
        message = intake.read(number, warm.state, client, upload.data, said)
    except MessageError:
        return None
    counts = method.counts(warm.state, client)
    return Upload(dict(message.tensors), method.labels(counts), counts, len(upload.data))


def seen_by_the_backbone(stage: Stage, client: str, upload: Upload) -> Tensor:
    """[S, width]: frozen features of made-up inputs, or the inputs themselves where they are features."""
    inputs = upload.inputs
    if inputs.dim() == 2:
        return inputs
    method = stage.warm.setup.method
    assert method.context.network is not None
    network: Network = method.context.network(method.adapter)
    plain = method.initial(client)
    with torch.no_grad():
        parts = [network.features(plain, some, [some.shape[1]] * len(some)) for some in inputs.split(64)]
    return torch.cat(parts)


def nearest_tokens(replica: Any, inputs: Tensor) -> tuple[Texts, float]:
    """The texts of the tokens that lie nearest to made-up embeddings [S, L, d], and the mean cosine to them."""
    vectors = F.normalize(replica.vectors.cpu(), dim=1)
    best = [(F.normalize(text, dim=1) @ vectors.T).max(1) for text in inputs]
    cosine = torch.stack([found.values for found in best]).mean()
    return texts_of(replica, [found.indices.tolist() for found in best]), float(cosine)
