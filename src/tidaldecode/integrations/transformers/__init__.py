"""Hugging Face transformers: `enable` a model, `generate` as always, `disable`.

Read in this order: `handle.py` (attach and detach), `attention.py` (what a layer does), `support.py`
(what is refused, and why), `settings.py` (which configuration and plan a model gets).
"""

from tidaldecode.integrations.transformers.handle import TidalHandle, disable, enable

__all__ = ["TidalHandle", "disable", "enable"]
