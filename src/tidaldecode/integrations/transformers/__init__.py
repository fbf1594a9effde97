"""Hugging Face transformers: `enable` a model, `generate` as always, `disable`.

Read in this order: `handle.py` (attach and detach), `attention.py` (what a layer does), `support.py`
(what is refused, and why), `settings.py` (which configuration and plan a model gets); then
`decode_step.py` (a whole step on the device, over `static_cache.py`) and `graph_generate.py` (the loop);
`lossless.py` (drafts and verifications) and `correction.py`, both over `rewrite_cache.py`;
`lossless_graph.py` (the same on the device, over `captured_rounds.py` and `verify_step.py`).
"""

from tidaldecode.integrations.transformers.graph_generate import graph_generate
from tidaldecode.integrations.transformers.handle import TidalHandle, disable, enable

__all__ = ["TidalHandle", "disable", "enable", "graph_generate"]
