"""Loads a local model directory: safetensors only, no remote code, no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.attention import HOST

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> torch.device:
    """``auto`` (CUDA if there is one, else CPU) or a torch device. Errors: `TidalError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TidalError(f"device: expected auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TidalError(f"device: expected an available device, got {name!r} without a CUDA GPU")
    return device


def load_model(
    directory: str | Path, *, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The decoder and tokenizer in ``directory``, in eval mode.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the checkpoint's on a GPU, float32
            on a CPU, where half precision is slow.

    Errors: `TidalError` when the directory is not a readable decoder with its tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(directory)
    if not folder.is_dir():
        raise TidalError(f"model: expected a local model directory, found none at {folder}")
    if not (folder / "config.json").is_file():
        raise TidalError(f"model: expected a config.json in {folder}, found none")
    if dtype != "auto" and dtype not in DTYPES:
        raise TidalError(f"dtype: expected auto or one of {', '.join(DTYPES)}, got {dtype!r}")
    place = resolve_device(device)
    wanted: Any = DTYPES.get(dtype, torch.float32 if place.type == "cpu" else "auto")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=wanted,
            attn_implementation=HOST,
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
    except Exception as error:
        # Every fault of a foreign directory ends here; transformers raises a dozen types for them.
        raise TidalError(
            f"model: expected a decoder that transformers can load from {folder}, got "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    if report["missing_keys"]:
        raise TidalError(
            f"model: expected all weights in {folder}, but {len(report['missing_keys'])} are missing, "
            f"among them {sorted(report['missing_keys'])[0]}"
        )
    return model.to(place).eval(), tokenizer


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
