"""Attacks on what is sent: what an honest but curious server can reconstruct. `ATTACKS` is the one place with all."""

from __future__ import annotations

from folklora.errors import AttackError, no_such
from folklora.privacy.attacks.condensed import CondensedInversion
from folklora.privacy.attacks.dlg import DLG
from folklora.privacy.attacks.first_gradient import FirstGradient
from folklora.privacy.attacks.guess import Attack
from folklora.privacy.attacks.idlg import IDLG
from folklora.privacy.attacks.inverting import Inverting
from folklora.privacy.attacks.label_distribution import LabelDistribution
from folklora.privacy.attacks.lamp import LAMP
from folklora.privacy.attacks.membership import Membership
from folklora.privacy.attacks.mixture import MixtureInversion
from folklora.privacy.attacks.span import Span
from folklora.privacy.attacks.tag import TAG

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        DLG,
        IDLG,
        Inverting,
        TAG,
        LAMP,
        Span,
        FirstGradient,
        MixtureInversion,
        CondensedInversion,
        Membership,
        LabelDistribution,
    )
}


def find(name: str) -> type[Attack]:
    """The attack of that name.

    Raises
    ------
    AttackError
        Naming the attacks there are, the nearest first.
    """
    if name not in ATTACKS:
        raise AttackError(f"--attack {name!r}: {no_such('attack', name, ATTACKS)}")
    return ATTACKS[name]


def describe() -> list[dict[str, str]]:
    """Name, title, paper and form of every attack."""
    return [
        {"name": a.name, "title": a.title, "paper": a.paper or "ours", "forms": ", ".join(sorted(a.forms))}
        for a in ATTACKS.values()
    ]
