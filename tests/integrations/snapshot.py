"""What a model looks like from outside: everything that attaching to it could leave behind."""

from __future__ import annotations

from typing import Any

import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """Configurations, hooks, attributes, methods and weights of a model and all its modules."""
    seen: dict[str, Any] = {}
    configs = {}
    for name, module in model.named_modules():
        seen[f"{name}: attributes"] = sorted(vars(module))
        seen[f"{name}: training"] = module.training
        seen[f"{name}: forward"] = module.forward.__func__
        for kind in _HOOKS:
            seen[f"{name}: {kind}"] = [id(hook) for hook in getattr(module, kind, {}).values()]
        for kind in ("config", "generation_config"):
            if hasattr(module, kind):
                config = getattr(module, kind)
                seen[f"{name}: {kind}"] = id(config)
                configs[id(config)] = config
    for key, config in configs.items():
        seen[f"config {key}"] = {option: repr(value) for option, value in vars(config).items()}
        seen[f"attention {key}"] = getattr(config, "_attn_implementation", None)
    for name, parameter in model.named_parameters():
        seen[f"{name}: weight"] = (parameter.data_ptr(), parameter._version)
    return seen
