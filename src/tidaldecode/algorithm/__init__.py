"""TidalDecode in five lines (arXiv 2410.05076, Algorithm 1); read `attention.py` first.

For every new token, layer by layer: the first layers are DENSE. A SELECT layer does full attention
and keeps the N tokens with the highest scores. A SPARSE layer attends only to the tokens that the
last SELECT layer kept: positions persist across layers. Every step selects afresh. Prefill is dense.
The dimension legend is in `tidaldecode.kernels`.
"""

from tidaldecode.algorithm.attention import DecodeState, decode_attention
from tidaldecode.algorithm.held import HeldSelections
from tidaldecode.algorithm.plan import LayerPlan, Role, default_select_layers

__all__ = [
    "DecodeState",
    "HeldSelections",
    "LayerPlan",
    "Role",
    "decode_attention",
    "default_select_layers",
]
