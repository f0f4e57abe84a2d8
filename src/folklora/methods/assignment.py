"""Who holds which experts: every expert at exactly h clients, every client with a number of experts within bounds.

The assignment of the highest total score is a transportation problem: experts send h units each, clients take between
``least`` and ``most``, at most one unit travels between an expert and a client. Its constraint matrix is totally
unimodular, so every vertex of the relaxed problem is whole, and a linear program's simplex solution is exact.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import identity, kron, vstack
from torch import Tensor

from folklora.errors import MethodError


def assign(scores: Tensor, holders: int, least: int, most: int) -> Tensor:
    """[E, N] bool: the feasible assignment with the highest sum of scores.

    Parameters
    ----------
    scores
        [E, N], finite.
    holders
        Clients of each expert.
    least, most
        Experts of each client; see `refuse_infeasible`.
    """
    experts, clients = scores.shape
    ones_of_experts = kron(identity(experts), np.ones((1, clients)), format="csr")
    ones_of_clients = kron(np.ones((1, experts)), identity(clients), format="csr")
    found = linprog(
        -scores.double().numpy().ravel(),
        A_ub=vstack([ones_of_clients, -ones_of_clients]),
        b_ub=np.concatenate([np.full(clients, most), np.full(clients, -least)]),
        A_eq=ones_of_experts,
        b_eq=np.full(experts, holders),
        bounds=(0, 1),
        method="highs-ds",  # simplex: it ends at a vertex
    )
    if found.x is None or np.abs(found.x - found.x.round()).max() > 1e-6:
        raise MethodError(f"no assignment of {experts} experts to {clients} clients was found: {found.message}")
    return torch.from_numpy(found.x.round().astype(bool).reshape(experts, clients))


def dealt(experts: int, clients: int, holders: int, generator: torch.Generator) -> Tensor:
    """[E, N] bool: an assignment by chance in which no client has two experts more than another.

    One expert after the other goes to the clients with the most room left, chance decides among equals: dealing to the
    largest remainder first never gets stuck (Gale 1957, Ryser 1957).
    """
    room, extra = divmod(experts * holders, clients)
    left = torch.full((clients,), room)
    left[torch.randperm(clients, generator=generator)[:extra]] += 1
    held = torch.zeros(experts, clients, dtype=torch.bool)
    for expert in range(experts):
        shuffled = torch.randperm(clients, generator=generator)
        chosen = shuffled[torch.argsort(left[shuffled], descending=True, stable=True)[:holders]]
        held[expert, chosen] = True
        left[chosen] -= 1
    return held


def refuse_infeasible(experts: int, clients: int, holders: int, least: int, most: int) -> None:
    """Whether any assignment exists; the bounds are sufficient as well as necessary (see `dealt`).

    Raises
    ------
    MethodError
        Naming the options of `folklora.methods.fedamole`, and what is allowed.
    """
    if holders > clients:
        raise MethodError(f"method.holders = {holders} of {clients} clients; allowed: 1 to {clients}")
    places = experts * holders
    fewest, highest = math.ceil(least * clients / holders), most * clients // holders
    if fewest <= experts <= highest:
        return
    bound, each = ("min_experts", least) if experts < fewest else ("max_experts", most)
    allowed = f"method.domain_experts = {fewest} to {highest}, or " if fewest <= highest else ""
    raise MethodError(
        f"method.domain_experts = {experts} at {holders} clients each are {places} places, and {clients} clients with "
        f"{'at least' if experts < fewest else 'at most'} method.{bound} = {each} have {each * clients}; allowed: "
        f"{allowed}another {bound} or holders"
    )
