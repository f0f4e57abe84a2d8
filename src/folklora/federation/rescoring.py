"""The scores of the models that a run ended with, computed again as they are served: in one go, in either precision.

What is served in bfloat16 is not quite what a run evaluated in float32; here is by how much. Nothing is chosen by these
scores. The test split is for finished runs alone, which have read it: in float32 it says again what their summary says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from folklora.errors import RunError
from folklora.federation.answers import Precision, pool_of
from folklora.federation.folder import MemberFolder
from folklora.federation.run import client_models, clients_of, read_summary, recipe_of
from folklora.federation.rundir import RunDirectory
from folklora.federation.scores import bounded, summarise
from folklora.federation.setup import joining_late
from folklora.training.serving import Asked


def evaluate(
    path: str | Path, split: Literal["validation", "test"] = "validation", *, precision: Precision = "float32"
) -> dict[str, Any]:
    """How the clients of a run do with the models that they ended with; newcomers are not among them.

    Returns
    -------
    dict
        As `folklora.federation.scores.summarise`, with ``split``, ``precision`` and, of a finished run's test split, as
        ``run`` the mean that its summary has.

    Raises
    ------
    RunError
        If the run is another's, has nothing committed, or is asked for its test split before it is finished.
    """
    if MemberFolder(Path(path)).brief() is not None:
        raise RunError(f"{path}: a member's folder has no rows to evaluate on; allowed: a run directory")
    everybody, directory = clients_of(path), RunDirectory.open(path)
    if split == "test" and not directory.finished:
        raise RunError(f"{path}: the test split is read when all rounds are over; allowed: --split validation")
    late = joining_late(recipe_of(path), everybody)
    models = client_models(path, [client for client in everybody if client not in late])
    setup = next(iter(models.values())).setup
    checkpoint = directory.checkpoint()
    assert checkpoint is not None  # there are models
    asked: list[Asked] = []
    owned = {}
    for client in models:
        examples, labels = setup.examples(getattr(setup.split(client, checkpoint.round + 1), split))
        owned[client] = slice(len(asked), len(asked) + len(examples)), labels
        asked += [(client, example) for example in examples]
    answers = pool_of(models, precision).answers(asked)
    scores = {client: bounded(setup.task.score(answers[own], labels)) for client, (own, labels) in owned.items()}
    found = {"split": split, "precision": precision, **summarise(scores, setup.task.metric)}
    if split == "test":
        name = f"{setup.task.metric.name}_mean"
        try:
            found["run"] = read_summary(directory)["row"][name]
        except (KeyError, TypeError):
            raise RunError(f"{directory.path / 'summary.json'}: row: no {name}, which a run ends with") from None
    return found
