"""LoRA-XS, federated: only a small core between frozen singular vectors trains. arXiv 2405.17604 (Balazy et al.).

1. ``W0 = U Sigma V^T``; ``A = Sigma_r V_r^T`` and ``B = U_r`` never train [code: Sigma stands on the input's side].
2. ``y = W0 x + s B C A x``; C starts as N(0, 1e-5^2) [paper, code], common to all clients from the seed [recon].
3. C travels and is averaged; A and B are the same everywhere, so the mean is exact [recon: the paper is not federated].
4. The head trains beside C [paper] and is averaged too [recon].

Clients find A and B each on its own machine. Where two singular values of W0 all but coincide, different linear algebra
libraries may disagree about their vectors, and with them about what C means.
"""

from __future__ import annotations

from pydantic import Field

from folklora.adapters.lowrank import Tensors, gaussian
from folklora.methods.base import Method
from folklora.methods.contract import Context
from folklora.methods.fedit import FedITOptions
from folklora.methods.options import Options
from folklora.methods.svd import Principal


class LoRAXSOptions(FedITOptions):
    init_std: float = Field(1e-5, ge=0, description="of C [code]")


class LoRAXS(Method):
    """Mean of the cores between W0's own singular vectors."""

    name = "loraxs"
    title = "LoRA-XS, federated (core C travels)"
    paper = "arXiv:2405.17604"
    core = True
    has_global_model = True
    trains = frozenset({"C", "head", "norm"})
    travels = frozenset({"C", "norm"})
    combines = frozenset({"proximal", "scaffold", "fedopt"})
    options_type = LoRAXSOptions
    options: LoRAXSOptions

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        self.principal = Principal(context.weight, max(context.ranks.values()))

    def initial_factors(self, client: str, rank: int) -> Tensors:
        factors: Tensors = {}
        for site in self.context.sites:
            u, sigma, vt = self.principal(site.name)
            core = f"C/{site.name}"
            factors[f"A/{site.name}"] = (sigma[:, None] * vt).float()
            factors[core] = gaussian((rank, rank), self.generator(core), self.options.init_std)
            factors[f"B/{site.name}"] = u.float().contiguous()
        return factors
