"""How a calibration shows its result: a table, a heatmap, `tidal_config.json` and all figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tidaldecode.calibrate.run import Outcome
from tidaldecode.config import CONFIG_FILE
from tidaldecode.eval.plots import plot_calibration
from tidaldecode.record import run_record, write_json

FIGURES_FILE = "calibration.json"
HEATMAP_FILE = "calibration.png"


def show(console: Console, found: Outcome) -> None:
    """Print the best plans of every size, the default's cost and what the cheap signal says."""
    table = Table(title="Selection layers by KL to full attention", box=SIMPLE_HEAD, padding=0)
    for header in ("layers", "KL\n(nats/token)", "decode passes"):
        table.add_column(header, justify="left" if header == "layers" else "right")
    for size, layers in found.search.best.items():
        loss = found.search.loss(layers)
        table.add_row(_name(layers), f"{loss:.4f}", str(found.search.passes[size]))
    console.print(table)
    chosen = found.config.select_layers
    assert chosen != "auto"
    console.print(
        f"chosen   {_name(chosen)} with budget {found.config.budget:,}, KL "
        f"{found.search.loss(chosen):.4f} nats a token; {found.passes} decode passes, "
        f"{found.seconds:.0f} s"
    )
    console.print(
        f"default  {_name(found.default)} ({found.default_reason}) would have cost "
        f"{found.search.loss(found.default):.4f} nats a token",
        soft_wrap=True,
    )
    console.print(
        f"signal   shared softmax mass alone would have chosen {_name(found.signal_best)} (KL "
        f"{found.search.loss(found.signal_best):.4f}); its ranking of pairs correlates "
        f"{found.signal_correlation:+.2f} with the KL",
        soft_wrap=True,
    )


def write(found: Outcome, folder: Path, *, plot: bool) -> list[Path]:
    """Write the configuration, all figures and, with ``plot``, the heatmap; return their paths."""
    record = run_record(task="calibration", seed=found.request.seed, **_details(found))
    chosen = found.config.select_layers
    assert chosen != "auto"
    paths = [
        write_json(
            folder / CONFIG_FILE,
            {
                **found.config.to_dict(),
                "model": {
                    "model_type": found.model_type,
                    "num_layers": found.shape.num_layers,
                },
                "calibration": {"kl_nats": found.search.loss(chosen), "record": record},
            },
        ),
        write_json(
            folder / FIGURES_FILE,
            {
                "record": record,
                "chosen": chosen,
                "kl_nats": {_name(layers): loss for layers, loss in found.search.losses.items()},
                "best": {size: _name(layers) for size, layers in found.search.best.items()},
                "decode_passes": found.search.passes,
                "default": {"layers": found.default, "reason": found.default_reason},
                "shared_mass": found.shared_mass,
                "signal": {
                    "best": found.signal_best,
                    "rank_correlation": found.signal_correlation,
                },
                "seconds": found.seconds,
            },
        ),
    ]
    if plot:
        rounds = _rounds(found)
        paths.append(
            plot_calibration(rounds, found.shared_mass, folder / HEATMAP_FILE, chosen, record)
        )
    return paths


def _rounds(found: Outcome) -> dict[str, dict[int, float]]:
    """For every set that was grown: the KL with each further layer added."""
    rounds: dict[str, dict[int, float]] = {}
    bases = [found.search.best[size] for size in sorted(found.search.best)]
    for base in bases:
        grown = {
            next(iter(set(layers) - set(base))): loss
            for layers, loss in found.search.losses.items()
            if len(layers) == len(base) + 1 and set(base) < set(layers)
        }
        if len(grown) > 1:
            rounds[_name(base)] = grown
    return rounds


def _details(found: Outcome) -> dict[str, Any]:
    return {"request": asdict(found.request)}


def _name(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
