"""RAVAN: several small cores side by side: the same bytes reach a higher rank. arXiv 2506.05568 (NeurIPS 2025).

1. ``DW = s sum_i g_i B_i H_i A_i``, i = 1 ... h: *heads* H_i [r, r] between frozen factors [paper; g_i is its s_i,
  because s is alpha / rank in this code].
2. All A_i, B_i are random and orthogonal to each other: Gram-Schmidt over all heads at once [paper]. They come from the
  seed and cost no byte [recon]. H_i = 0 and g_i = 1 at the start, both train [paper]; ``gains = "fixed"`` keeps g_i = 1
  [paper: ablation].
3. Clients send g_i H_i, whose mean is the mean of the updates, exactly [paper]. On receipt H_i is that mean, g_i = 1.
4. h heads of rank r cost h r^2 numbers, as one core of rank r sqrt(h), and reach rank h r [paper].
5. A weak client trains only ``budget`` of its heads, as many in every layer, those that score highest, and each head is
  averaged over those who trained it [paper]; where nobody did it stays as it was [recon]. Indices travel with them.
  Scores [note: the paper has them random, by weight and by gradient; formulas: recon]: ``"weight"`` ||H_i||_F;
  ``"gradient"`` ||B_i^T G A_i^T||_F with G the gradient at the *frozen* backbone under the client's head, if the task
  has one, which is what a method may ask for: exact before any training, later as if no adapter had been trained. Ties
  (all heads at the start, where the task's head is zero too) are broken at random.

In this code A and B hold all heads stacked, [h r, d_in] and [d_out, h r], and C is block-diagonal: masks keep the other
blocks at zero, and they never travel. ``adapter.rank`` is r, the rank of one head; s = alpha / (h r) belongs to the
stacked rank, as for one core in the same frame, and alpha = h r gives the paper's scale. With h = 1 and fixed gains
this is FolkLoRA's mean of cores in the same frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Site, Tensors, kind, orthonormal, select
from folklora.errors import MessageError, MethodError
from folklora.methods.aggregation import weighted_mean
from folklora.methods.base import Method, blank
from folklora.methods.contract import Client, Context, Message, State
from folklora.methods.fedit import FedITOptions
from folklora.methods.options import Options
from folklora.methods.owners import owners_mean
from folklora.methods.work import Terms, Work
from folklora.randomness import torch_generator

HEADS = 4
"""Unless the recipe says otherwise; 4 is what the paper's rank of 110 a head goes with [note]."""


class RavanOptions(FedITOptions):
    heads: int | None = Field(
        None, ge=1, le=4096, description=f"default: {HEADS}, or as many as the smallest layer holds"
    )
    gains: Literal["trained", "fixed"] = "trained"
    budget: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="heads a client trains: one number for all, or a list, one a client; default: all"
    )
    score: Literal["gradient", "weight", "random"] = Field("gradient", description="which heads, where not all")
    score_examples: int = Field(64, ge=1, description="of the client, for the score by gradient")

    @model_validator(mode="after")
    def _budget_fits(self) -> RavanOptions:
        most = max(self.budget, default=0) if isinstance(self.budget, list) else self.budget
        if self.heads is not None and most is not None and most > self.heads:
            raise ValueError(f"budget = {most} exceeds heads = {self.heads}; allowed: 1 to {self.heads}")
        if self.score != "gradient" and "score_examples" in self.model_fields_set:
            raise ValueError(
                f'score_examples = {self.score_examples} with score = "{self.score}" changes nothing; allowed: '
                'score = "gradient"'
            )
        return self


class Ravan(Method):
    """Mean of g_i H_i over those who trained head i; the head of the task travels too [recon]."""

    name = "ravan"
    title = "RAVAN (several cores travel)"
    paper = "arXiv:2506.05568"
    core = True
    has_global_model = True
    trains = frozenset({"C", "gain", "head", "norm"})
    takes_means = False
    travels = frozenset({"H", "norm"})
    combines = frozenset({"proximal", "fedopt"})
    options_type = RavanOptions
    options: RavanOptions

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        (self.head_rank,) = set(context.ranks.values())
        fit = self.adapter.max_rank() // self.head_rank
        self.heads = self.options.heads or min(HEADS, fit)
        if self.heads > fit:
            raise MethodError(
                f"method.heads = {self.heads} of adapter.rank = {self.head_rank} need {self.heads * self.head_rank} "
                f"orthogonal directions, the smallest adapted layer has {self.adapter.max_rank()}; allowed: 1 to {fit}"
            )
        self.budgets = self._budgets()

    def _budgets(self) -> dict[str, int]:
        """Client -> how many heads of each layer it trains."""
        clients, budget = self.context.clients, self.options.budget
        listed = budget if isinstance(budget, list) else [budget or self.heads] * len(clients)
        if len(listed) != len(clients):
            raise MethodError(
                f"method.budget lists {len(listed)} numbers for {len(clients)} clients; "
                "allowed: one number, or one a client"
            )
        if max(listed) > self.heads:
            raise MethodError(f"method.budget = {max(listed)} exceeds the heads there are; allowed: 1 to {self.heads}")
        return dict(zip(clients, listed, strict=True))

    # -- factors -------------------------------------------------------------------------------------------------

    def initial_factors(self, client: str, rank: int) -> Tensors:
        """All heads stacked; ``gain/<site>`` [h] beside A, C and B."""
        factors = {
            name: torch.zeros(shape) if name.startswith("C/") else orthonormal(shape, self.generator(name))
            for name, shape in self.adapter.shapes(self.heads * rank).items()
        }
        return {**factors, **{f"gain/{site.name}": torch.ones(self.heads) for site in self.context.sites}}

    def rank(self, state: State, client: str) -> int:
        return self.heads * self.head_rank

    def _cores(self, tensors: Tensors, site: Site) -> Tensor:
        """``g_i H_i`` of one layer, [h, r, r]."""
        blocks = tensors[f"C/{site.name}"].view(self.heads, self.head_rank, self.heads, self.head_rank)
        cores = torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)
        return tensors[f"gain/{site.name}"][:, None, None] * cores

    def _stacked(self, tensors: Tensors) -> Tensors:
        """Tensors in which ``H/<site>`` has become ``C/<site>`` and ``gain/<site>``."""
        taken = {name: tensor for name, tensor in tensors.items() if not name.startswith("H/")}
        for site in self.context.sites:
            if (cores := tensors.get(f"H/{site.name}")) is not None:
                taken[f"C/{site.name}"] = torch.block_diag(*cores)
                taken[f"gain/{site.name}"] = torch.ones(self.heads)
        return taken

    def origin(self, state: State) -> Tensors:
        whole = (self.heads, self.head_rank, self.head_rank)
        return {**super().origin(state), **{f"global/H/{site.name}": torch.zeros(whole) for site in self.context.sites}}

    # -- which heads train ---------------------------------------------------------------------------------------

    def trained(self, round: int) -> frozenset[str]:
        return self.trains if self.options.gains == "trained" else self.trains - {"gain"}

    def drifting(self, round: int) -> frozenset[str]:
        """What becomes of it travels as one product."""
        return super().drifting(round) | (self.trained(round) & {"C", "gain"})

    def work(self, round: int, client: Client) -> tuple[Work, ...]:
        """Local training of the chosen heads, which are noted for the message: ``index/<site>`` [budget] int32."""
        (work,) = super().work(round, client)
        chosen = self._chosen(round, client)
        if self.budgets[client.id] < self.heads:
            client.notes.update({f"index/{site}": index.int() for site, index in chosen.items()})
        return (Work(work.tensors, work.trained, Terms(masks=self._masks(chosen))),)

    def _masks(self, chosen: Mapping[str, Tensor]) -> Tensors:
        block = torch.ones(self.head_rank, self.head_rank)
        masks: Tensors = {}
        for site, index in chosen.items():
            gain = torch.zeros(self.heads).index_fill_(0, index, 1.0)
            masks[f"gain/{site}"] = gain
            masks[f"C/{site}"] = torch.kron(torch.diag(gain), block)
        return masks

    def _chosen(self, round: int, client: Client) -> dict[str, Tensor]:
        """The heads of each layer that a client trains in this round, [budget] int64, ascending."""
        budget = self.budgets[client.id]
        if budget == self.heads:
            return {site.name: torch.arange(self.heads) for site in self.context.sites}
        random = torch_generator(self.context.seed, "heads", client.id, round)
        chosen = {}
        for site, scores in self._scores(client).items():
            shuffled = torch.randperm(self.heads, generator=random)
            best = torch.argsort(scores[shuffled], descending=True, stable=True)
            chosen[site] = shuffled[best[:budget]].sort().values
        return chosen

    @property
    def beside_training(self) -> tuple[str, str] | None:
        if self.options.score == "gradient" and any(budget < self.heads for budget in self.budgets.values()):
            return 'score = "gradient"', 'score = "weight" or "random"'
        return super().beside_training

    def _scores(self, client: Client) -> dict[str, Tensor]:
        """Site -> [h] float64."""
        sites = self.context.sites
        match self.options.score:
            case "random":
                return {site.name: torch.zeros(self.heads, dtype=torch.float64) for site in sites}
            case "weight":
                return {
                    site.name: torch.linalg.matrix_norm(self._cores(client.tensors, site).double()) for site in sites
                }
        head = select(client.tensors, frozenset({"head"}))
        gradients = client.data.weight_gradients(head, self.options.score_examples)
        scores = {}
        for site in sites:
            a, b = (client.tensors[f"{factor}/{site.name}"].double() for factor in "AB")
            a, b = a.view(self.heads, self.head_rank, -1), b.T.reshape(self.heads, self.head_rank, -1)
            scores[site.name] = torch.linalg.matrix_norm(b @ gradients[f"grad/{site.name}"].double() @ a.mT)
        return scores

    # -- what travels --------------------------------------------------------------------------------------------

    def expected(self, round: int, state: State, client: str) -> Shapes:
        shapes, budget = super().expected(round, state, client), self.budgets[client]
        for site in self.context.sites:
            shapes[f"H/{site.name}"] = (budget, self.head_rank, self.head_rank)
            if budget < self.heads:
                shapes[f"index/{site.name}"] = (budget,)
        return shapes

    def send(self, round: int, client: Client) -> Message:
        tensors = select(client.tensors, self.shared(round))
        for site in self.context.sites:
            cores, index = self._cores(client.tensors, site), client.notes.get(f"index/{site.name}")
            if index is None:
                tensors[f"H/{site.name}"] = cores
            else:
                tensors[f"H/{site.name}"] = cores[index.long()]
                tensors[f"index/{site.name}"] = index.clone()  # a note is the client's own memory
        return Message(tensors, {"examples": client.examples})

    def as_trained(
        self, tensors: Tensors, before: Tensors, optimizer: str = "adamw", travelled: float = 0.0
    ) -> Tensors:
        """Cores on the diagonal, those that rested as they were. Of g_i H_i the gain is divided away as far as a reader
        can find it out, see `gains_of` [recon]."""
        found = {name: tensor for name, tensor in tensors.items() if kind(name) not in {"H", "index"}}
        for site in self.context.sites:
            if (sent := tensors.get(f"H/{site.name}")) is not None:
                cores = self._cores(before, site).float()
                index = tensors.get(f"index/{site.name}", torch.arange(self.heads)).long()
                gains = torch.ones(len(index))
                if self.options.gains == "trained":
                    gains = gains_of(sent.float(), cores[index], optimizer, travelled)
                cores[index] = sent.float() / gains[:, None, None]
                found[f"C/{site.name}"] = torch.block_diag(*cores)
        return found

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        p = self.weights(messages)
        mean = weighted_mean([select(m.tensors, frozenset({"head", "norm"})) for m in messages.values()], p)
        whole = (self.heads, self.head_rank, self.head_rank)
        for site in self.context.sites:
            cores = torch.zeros(len(messages), self.heads, self.head_rank**2, dtype=torch.float64)
            owned = torch.zeros(len(messages), self.heads, dtype=torch.bool)
            for k, message in enumerate(messages.values()):
                index = self._index(message, site)
                cores[k, index] = message.tensors[f"H/{site.name}"].double().flatten(1)
                owned[k, index] = True
            before = state.get(f"global/H/{site.name}", torch.zeros(whole)).flatten(1)
            mean[f"H/{site.name}"] = owners_mean(cores, p, owned, before).view(whole).float()
        return {**state, **{f"global/{name}": tensor for name, tensor in mean.items()}}

    def _index(self, message: Message, site: Site) -> Tensor:
        """The heads that a message holds of one layer, [budget] int64.

        Raises
        ------
        MessageError
            If there is no such head, or one is named twice.
        """
        name = f"index/{site.name}"
        index = message.tensors.get(name, torch.arange(self.heads)).long()
        if not 0 <= int(index.min()) <= int(index.max()) < self.heads:
            raise MessageError(f"{name} = {index.tolist()}; allowed: 0 to {self.heads - 1}")
        if len(index.unique()) < len(index):
            raise MessageError(f"{name} = {index.tolist()} names a head twice; allowed: each once")
        return index

    def known(self, round: int, client: str, told: Tensors, message: Message) -> Tensors:
        """Of the heads both sides know, those the message holds; before any reply they are zero."""
        known = dict(super().known(round, client, told, message))
        for site in self.context.sites:
            name, index = f"H/{site.name}", self._index(message, site)
            whole = known.get(name, torch.zeros(self.heads, self.head_rank, self.head_rank))
            known[name] = whole[index]
        return known

    def check_update(self, round: int, state: State, client: str, message: Message) -> None:
        for site in self.context.sites:
            self._index(message, site)

    def mixing(self, state: State, messages: Mapping[str, Message]) -> Tensor | None:
        """None where clients train some heads only: each head then has weights of its own."""
        every = all(budget == self.heads for budget in self.budgets.values())
        return super().mixing(state, messages) if every else None

    def receive(self, client: Client, message: Message) -> None:
        client.tensors.update(self._stacked(message.tensors))

    def typical_reply(self, round: int, client: str) -> Message:
        """All heads, whatever the client trains."""
        whole = (self.heads, self.head_rank, self.head_rank)
        shapes = super().expected(round, {}, client)
        return Message(blank(shapes | {f"H/{site.name}": whole for site in self.context.sites}))

    def global_model(self, state: State, client: str, tensors: Tensors) -> Tensors | None:
        model = super().global_model(state, client, tensors)
        return None if model is None else self._stacked(model)


def gains_of(sent: Tensor, before: Tensor, optimizer: str, travelled: float) -> Tensor:
    """The gains behind products g_i H_i, where they began as 1 and cores as ``before``; [recon].

    With ``D`` the move of a core, ``sent = (1 - t) (before - D)``. A step of plain gradient descent moves the gain by
    ``t = <D, before>``, since the gradient of H_i is g_i times that of the product and that of g_i its product with
    H_i: a quadratic equation, exact for one step. AdamW moves the gain by about ``travelled`` up, down or not at all,
    and no number of a core by more: what breaks that least is taken.

    Parameters
    ----------
    sent, before
        ``[heads, r, r]``.

    Returns
    -------
    ``[heads]``, all 1 where nothing can be known.
    """
    if optimizer == "sgd":
        size, shared = before.square().sum((1, 2)), (sent * before).sum((1, 2))
        moved = (1 + size - ((1 + size).square() - 4 * (size - shared)).clamp(min=0).sqrt()) / 2
        return (1 - moved).clamp(min=0.1)
    most = min(travelled, 0.9)
    candidates = torch.tensor([1.0, 1 - most, 1 + most])
    excess = ((before - sent / candidates[:, None, None, None]).abs() - most).clamp(min=0).square().sum((2, 3))
    return candidates[excess.argmin(0)]
