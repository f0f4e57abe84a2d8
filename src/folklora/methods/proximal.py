"""FedProx, for any method that combines with it: a pull to the model the round began with. arXiv 1812.06127.

Client k minimises ``F_k(theta) + mu / 2 ||theta - theta_g||^2`` instead of F_k, theta_g being what the server sent
[paper]; ``proximal`` is mu. The pull's gradient is added after clipping: the limit is for the data's gradient [recon].

What is pulled are the tensors that train in this round and travel: the drift that harms an average is theirs. A private
factor or head has no common value to be near to; pulled to where it started, it would only learn more slowly [recon].
A method's other trainings of the round, such as a personal model, are left as they are [recon].

Plain steps of size lr settle only while ``lr * mu < 2``.
"""

from __future__ import annotations

from dataclasses import replace

from folklora.adapters.lowrank import kind
from folklora.methods.base import Method
from folklora.methods.contract import Client
from folklora.methods.work import Work


class Proximal(Method):
    """Stands before the method it is combined with, in one class; see `folklora.methods.build`."""

    def work(self, round: int, client: Client) -> tuple[Work, ...]:
        return tuple(self._pulled(round, each) if each.branch == "" else each for each in super().work(round, client))

    def _pulled(self, round: int, work: Work) -> Work:
        drifting = self.drifting(round)
        anchor = {n: t for n, t in work.tensors.items() if n in work.trained and kind(n) in drifting}
        return replace(work, terms=replace(work.terms, anchor=anchor, proximal=self.options.proximal))
