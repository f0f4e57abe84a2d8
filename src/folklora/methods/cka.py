"""Model similarity of CE-LoRA: linear centred kernel alignment (CKA) between clients' cores.

Linear CKA is Kornblith et al. (arXiv 1905.00414); that CE-LoRA (arXiv 2503.23869) compares clients' C matrices by it is
[paper]; rows of C as the "examples", the mean over layers and the rule for degenerate cores are [recon].
"""

from __future__ import annotations

import torch
from torch import Tensor

# A centred core this small beside the core itself is float64 rounding of equal rows, not a representation.
_DEGENERATE = 1e-12


def linear_cka(cores: Tensor) -> Tensor:
    """Mean over layers of the linear CKA between every two clients' cores.

    For one layer ``CKA_ij = <K_i, K_j>_F / (||K_i||_F ||K_j||_F)`` with ``K = H C C' H`` the centred Gram matrix of the
    rows of C and ``H = I - 11'/r``. It does not change when C is scaled or its columns are rotated. With each K
    flattened and normalised, all pairs and layers are one matrix product.

    A core with equal rows (C = 0 among them, and every core of rank 1) has K = 0 and CKA 0/0. Rule [recon]: such
    a core is like another such core (1) and unlike any other (0); so clients that all start at C = 0 count as equal.

    Parameters
    ----------
    cores
        ``[N, L, r, r]``: clients, layers, C. One rank for all clients.

    Returns
    -------
    Tensor
        ``[N, N]`` float64 in [0, 1], symmetric, ones on the diagonal.
    """
    if cores.ndim != 4 or cores.shape[2] != cores.shape[3]:
        raise ValueError(f"cores have shape {tuple(cores.shape)}, expected [clients, layers, r, r]")
    c = cores.detach().double()
    centred = c - c.mean(dim=2, keepdim=True)
    size = centred.flatten(2).norm(dim=2)
    degenerate = (size <= _DEGENERATE * c.flatten(2).norm(dim=2)).unsqueeze(2)  # [N, L, 1]
    gram = (centred @ centred.transpose(2, 3)).flatten(2)
    gram = torch.where(degenerate, 0.0, gram / gram.norm(dim=2, keepdim=True))
    # One more coordinate, 1 for degenerate cores, makes the rule above part of the inner product.
    rows = torch.cat([gram, degenerate.double()], dim=2).flatten(1)
    similarity = (rows @ rows.T / cores.shape[1]).clamp_(0.0, 1.0)
    similarity.fill_diagonal_(1.0)
    return similarity
