"""``tidaldecode lm-eval``."""

from __future__ import annotations

import importlib.util

import typer

from tidaldecode.errors import TidalError


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness, which knows the model tidaldecode here; its own options follow."""
    if importlib.util.find_spec("lm_eval") is None:
        raise TidalError(
            "lm_eval: expected EleutherAI's lm-evaluation-harness to be installed, found none; "
            "pip install 'tidaldecode[lm-eval]'"
        )
    from tidaldecode.integrations.lm_eval import run_harness

    if code := run_harness(context.args):
        raise typer.Exit(code)
