"""GaLore 2: the subspace of the gradient's leading singular vectors.

Zhao et al., arXiv:2403.03507 (algorithm 2), with the randomised decomposition of GaLore 2, Su et al., arXiv:2504.20437.
With G_t (m, n), m <= n, lying down, every T updates, else P_t = P_{t-1}:

    P_t = U[:, :r],  U S V^T = G_t
    R_t = P_t^T G_t
    M_t = b1 M_{t-1} + (1 - b1) R_t
    V_t = b2 V_{t-1} + (1 - b2) R_t^2
    N_t = (M_t / (1 - b1^t)) / (sqrt(V_t / (1 - b2^t)) + eps)
    W_t = W_{t-1} - lr alpha P_t N_t

As there, moments stay as they are when the basis changes. Oversampling and powers of the randomised decomposition are
ours (`bases.py`). State of a matrix: m r + 2 r n numbers.
"""

from torch import Tensor

from .method import Now, State, SubspaceMethod


class GaLore(SubspaceMethod):
    """See the module."""

    def refresh(self, grad_xsl: Tensor, state: State, now: Now) -> State:
        """The leading directions of this gradient."""
        return {"basis": self.own_basis(self.leading(grad_xsl, now.number))}
