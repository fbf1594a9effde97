"""What every layer does in a decode step. Pure Python: it can be printed, tested and recorded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from tidaldecode.errors import TidalError


class Role(Enum):
    """Role of a layer in a decode step; its value is how a plan prints it."""

    DENSE = "D"
    """Full attention."""
    SELECT = "S"
    """Full attention, and picks the tokens for the layers after it."""
    SPARSE = "."
    """Attends to the last selection only."""
    ESTIMATE = "E"
    """Picks its own tokens by the bounds of its pages and attends to those (Quest)."""
    HOST = "-"
    """Not planned: a layer without full attention (sliding window, linear), left to the host."""


@dataclass(frozen=True)
class LayerPlan:
    """The role of every layer; prints as ``DDS..........S..................``."""

    roles: tuple[Role, ...]
    preselected: bool = False
    """Whether a step starts with a selection: sinks and recents, known before the first layer."""

    def __post_init__(self) -> None:
        selected = self.preselected
        for layer, role in enumerate(self.roles):
            selected = selected or role is Role.SELECT
            if role is Role.SPARSE and not selected:
                raise TidalError(
                    f"plan {self}: expected a selection layer before the first sparse layer, "
                    f"found none before layer {layer}; make layer {layer} a selection layer or "
                    "raise dense_layers"
                )

    @classmethod
    def build(
        cls,
        num_layers: int,
        *,
        dense_layers: int,
        select_layers: Sequence[int],
        full_attention: Sequence[bool] | None = None,
        estimate: bool = False,
    ) -> LayerPlan:
        """Plan ``num_layers`` layers.

        Args:
            dense_layers: how many leading full-attention layers stay dense.
            select_layers: layer numbers, counted over all layers of the model; if there are none,
                the plan is ``preselected``.
            full_attention: for every layer, whether it has full attention; all of them by default.
            estimate: every layer after the dense ones picks its own tokens; ``select_layers`` is ().

        Errors: `TidalError` for a layer that does not exist, is not full attention or is already
        dense, for a sparse layer without a selection before it, and for a plan with no sparse layer.
        """
        if dense_layers < 0:
            raise TidalError(f"dense_layers: expected a number from 0 up, got {dense_layers}")
        if full_attention is not None and len(full_attention) != num_layers:
            raise TidalError(
                f"full_attention: expected one value for each of {num_layers} layers, got "
                f"{len(full_attention)}"
            )
        planned = list(full_attention) if full_attention is not None else [True] * num_layers
        full = [layer for layer, is_full in enumerate(planned) if is_full]
        dense = set(full[:dense_layers])
        for layer in select_layers:
            if not 0 <= layer < num_layers:
                raise TidalError(
                    f"select_layers: expected layer numbers from 0 to {num_layers - 1}, got {layer}"
                )
            if not planned[layer]:
                raise TidalError(
                    f"select_layers: expected layers with full attention "
                    f"({', '.join(map(str, full)) or 'this model has none'}), got layer {layer}, "
                    "which has a sliding window or no attention"
                )
            if layer in dense:
                raise TidalError(
                    f"select_layers: expected layers after the {dense_layers} dense ones, got layer "
                    f"{layer}; lower dense_layers or choose a later layer"
                )
        chosen = set(select_layers)
        roles = [
            Role.HOST
            if not planned[layer]
            else Role.DENSE
            if layer in dense
            else Role.SELECT
            if layer in chosen
            else Role.ESTIMATE
            if estimate
            else Role.SPARSE
            for layer in range(num_layers)
        ]
        plan = cls(tuple(roles), preselected=not chosen and not estimate)
        if not {Role.SPARSE, Role.ESTIMATE}.intersection(roles):
            raise TidalError(
                f"plan {plan}: expected at least one sparse layer, found none among "
                f"{len(full)} full-attention layers; this model is too shallow for "
                f"dense_layers={dense_layers} and select_layers={tuple(select_layers)}"
            )
        return plan

    def for_stage(self, layers: Collection[int]) -> LayerPlan:
        """The plan of a host that runs these layers only, one stage of a pipeline.

        A selection does not travel between stages, so a stage whose first sparse layer has no
        selection layer before it there lets that layer select. Other roles, and all of the layers
        that run elsewhere, stay as they are.
        """
        if self.preselected:
            return self
        for layer in sorted(layers):
            if self[layer] is Role.SELECT:
                break
            if self[layer] is Role.SPARSE:
                roles = list(self.roles)
                roles[layer] = Role.SELECT
                return LayerPlan(tuple(roles))
        return self

    def __getitem__(self, layer: int) -> Role:
        if not 0 <= layer < len(self.roles):
            raise TidalError(
                f"layer {layer}: expected a layer of the plan, from 0 to {len(self.roles) - 1}"
            )
        return self.roles[layer]

    def __len__(self) -> int:
        return len(self.roles)

    def __iter__(self) -> Iterator[Role]:
        return iter(self.roles)

    def __str__(self) -> str:
        return "".join(role.value for role in self.roles)

    def layers(self, role: Role) -> tuple[int, ...]:
        """Numbers of the layers with this role."""
        return tuple(layer for layer, found in enumerate(self.roles) if found is role)


def default_select_layers(full_attention: Sequence[bool], dense_layers: int) -> tuple[int, ...]:
    """Uncalibrated selection layers: the first after the dense ones, and one near 0.4 x depth.

    The paper selects at layer 2 and at 13 of 32 (0.41 of the depth) for Llama-3-8B; published
    re-selection layers of other models lie between 0.22 and 0.56, which is why calibration exists.

    Errors: `TidalError` when fewer than ``dense_layers + 3`` layers have full attention.
    """
    full = [layer for layer, is_full in enumerate(full_attention) if is_full]
    needed = dense_layers + 3
    if len(full) < needed:
        raise TidalError(
            f"model: expected at least {needed} layers with full attention ({dense_layers} dense, 2 "
            f"that select, 1 sparse), found {len(full)} of {len(full_attention)}; this model is too "
            "shallow or mostly sliding-window or linear attention, where there is little to gain"
        )
    first, *later = full[dense_layers:-1]
    target = 0.4 * len(full_attention)
    second = min(later, key=lambda layer: abs(layer - target))
    return (first, second)
