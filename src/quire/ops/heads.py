"""What happens to queries, keys and values between their projection and attention: the op `heads`.

Owns: its meaning, head norm, rotation and KV write in one. Knows no layers and no block accounting.
Facts of its `Case`: head_dim, rotary_dim (0: not turned here), head_norm.

Shape legend: T tokens, L table rows (positions), H query heads, K KV heads, E head size, F = rotary_dim / 2, N blocks,
B tokens of a block.
"""

from __future__ import annotations

from torch import Tensor

from quire.ops import native, triton
from quire.ops.cache import write_kv
from quire.ops.dispatch import REGISTRY
from quire.ops.norm import rms_norm
from quire.ops.rotary import rotary


def heads(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    kv: Tensor,
    slots_T: Tensor,
    positions_T: Tensor | None = None,
    table_2LF: Tensor | None = None,
    q_norm_E: Tensor | None = None,
    k_norm_E: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """RMSNorm (`ops.norm`) of each head where there are weights, rotation (`ops.rotary`) where there is a table; writes
    keys and values into the pages `kv` (2, N, B, K, E) at their slots (`ops.cache.write_kv`) and returns the queries
    (T, H, E).

    q, k and v may be views of one wider tensor. In a step every write of a layer comes before any read of it.
    """
    if q_norm_E is not None:
        q_THE, _ = rms_norm(q_THE, None, q_norm_E, eps)
    if k_norm_E is not None:
        k_TKE, _ = rms_norm(k_TKE, None, k_norm_E, eps)
    if table_2LF is not None:
        assert positions_T is not None
        q_THE, k_TKE = rotary(q_THE, k_TKE, table_2LF, positions_T)
    write_kv(k_TKE, v_TKE, kv, slots_T)
    return q_THE


HEADS = REGISTRY.op("heads", heads)
native.register(HEADS)
triton.register(HEADS, "heads:heads")
