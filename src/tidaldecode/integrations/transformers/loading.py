"""Loads a local model directory: safetensors only, no remote code, no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.attention import HOST

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
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


def load_skeleton(directory: str | Path) -> PreTrainedModel:
    """The decoder that ``directory`` describes, without weights: enough to plan it, at no cost.

    Errors: `TidalError` when the directory does not describe a decoder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = _model_folder(directory)
    try:
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=HOST)
    except Exception as error:
        raise _not_loadable(folder, error) from error
    return model.eval()


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

    folder = _model_folder(directory)
    if dtype != "auto" and dtype not in DTYPES:
        raise TidalError(f"dtype: expected auto or one of {', '.join(DTYPES)}, got {dtype!r}")
    place = resolve_device(device)
    wanted: Any = DTYPES.get(dtype, torch.float32 if place.type == "cpu" else "auto")
    try:
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=wanted,
            attn_implementation=HOST,
            use_safetensors=True,
            output_loading_info=True,
            **_LOCAL,
        )
    except Exception as error:
        raise _not_loadable(folder, error) from error
    if report["missing_keys"]:
        raise TidalError(
            f"model: expected all weights in {folder}, but {len(report['missing_keys'])} are missing, "
            f"among them {sorted(report['missing_keys'])[0]}"
        )
    return model.to(place).eval(), tokenizer


def _model_folder(directory: str | Path) -> Path:
    folder = Path(directory)
    if not folder.is_dir():
        raise TidalError(f"model: expected a local model directory, found none at {folder}")
    if not (folder / "config.json").is_file():
        raise TidalError(f"model: expected a config.json in {folder}, found none")
    return folder


def _not_loadable(folder: Path, error: Exception) -> TidalError:
    """What to say of a foreign directory; transformers raises a dozen types for its faults."""
    lines = str(error).strip().splitlines() or ["no message"]
    return TidalError(
        f"model: expected a decoder that transformers can load from {folder}, got "
        f"{type(error).__name__}: {lines[0]}"
    )
