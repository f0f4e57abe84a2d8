"""iDLG: DLG with labels that are read off the head's gradient. arXiv 2001.02610 (Zhao, Mopuri, Bilen 2020).

1. Of a single example the gradient of the head's bias is negative for its label alone [paper]; of a batch labels are
  counted off (`folklora.privacy.attacks.labels`) [recon].
2. With labels fixed the inputs are found as in DLG [paper].

Where no head is sent there is nothing to read: labels are those that the attacker is told, or are guessed as in DLG.
"""

from __future__ import annotations

from folklora.privacy.attacks.dlg import DLG


class IDLG(DLG):
    """DLG, labels from the head's gradient."""

    name = "idlg"
    title = "iDLG (labels from the head's gradient)"
    paper = "arXiv:2001.02610"
    own_labels = True
