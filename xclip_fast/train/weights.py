"""The tensors of a run in full, out of and into whatever engine holds them, and their moving average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xclip_fast.errors import InputError

Tensors = dict[str, Tensor]


class MovingAverage:
    """An exponential moving average of the trainable parameters, in their own dtype and sharding.

    Args:
        module: whose parameters are averaged, from where they are now.
        decay: share of the average that stays at each step.

    Example:
        >>> import torch
        >>> from xclip_fast.train.weights import MovingAverage
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> average = MovingAverage(layer, decay=0.75)
        >>> before = layer.weight.item()
        >>> with torch.no_grad():
        ...     _ = layer.weight.add_(4)
        >>> average.update()
        >>> round(average.values["weight"].item() - before, 4)
        1.0
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = dict(_trainable(module))
        self.values = {name: parameter.detach().clone() for name, parameter in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take one step of the average towards the parameters."""
        averages = [local(value) for value in self.values.values()]
        torch._foreach_lerp_(averages, [local(value) for value in self.live.values()], 1 - self.decay)


def model_tensors(model: nn.Module, average: MovingAverage | None = None) -> Tensors:
    """A model's state dict in full on the CPU; its averages in the place of the parameters, where they are given."""
    values = {} if average is None else {name.removeprefix("model."): value for name, value in average.values.items()}
    return {name: whole(values.get(name, value)) for name, value in model.state_dict().items()}


def trainer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None) -> Tensors:
    """What a run has beside its model: optimizer state, averages, and parameters that the loss adds."""
    found = {name: whole(value) for name, value in _extra(module)}
    for name, parameter in _trainable(module):
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer/{key}/{name}"] = whole(value)
    for name, value in average.values.items() if average is not None else ():
        found[f"average/{name}"] = whole(value)
    return found


@torch.no_grad()
def restore(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None,
    model: Tensors,
    trainer: Tensors,
    where: str,
) -> None:
    """Put back what ``model_tensors`` and ``trainer_tensors`` gave.

    Raises:
        InputError: the tensors are not those of this run.
    """
    live = {f"model.{name}": value for name, value in module.get_submodule("model").state_dict().items()}
    given = {f"model.{name}": value for name, value in model.items()}
    extra = dict(_extra(module))
    live, given = {**live, **extra}, {**given, **{name: trainer[name] for name in extra if name in trainer}}
    if wrong := sorted(name for name in {**live, **given} if _shape(live, name) != _shape(given, name)):
        raise InputError(f"{where} is of another model: {wrong[0]} differs: give the configuration of that run")
    for name, value in live.items():
        value.copy_(like(given[name], value))
    for name, parameter in _trainable(module):
        state = optimizer.state[parameter]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (kept := trainer.get(f"optimizer/{key}/{name}")) is not None:
                state[key] = kept if key == "step" else like(kept, parameter)
    for name, value in average.values.items() if average is not None else ():
        value.copy_(like(trainer[f"average/{name}"], value))


def whole(value: Any) -> Tensor:
    """A tensor in full on the CPU; every process of a sharded one must ask."""
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    # contiguous, and no view of what training goes on to change
    copied: Tensor = full.detach().to("cpu", copy=True).contiguous()
    return copied


def like(full: Tensor, value: Any) -> Any:
    """A tensor in full as ``value`` holds its own: on its device, and sharded alike."""
    if not hasattr(value, "device_mesh"):
        return full.to(value.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(value.device), value.device_mesh, value.placements)


def local(value: Any) -> Tensor:
    """The part of a tensor that this process holds."""
    part: Tensor = value.detach().to_local() if hasattr(value, "to_local") else value.detach()
    return part


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _extra(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if not name.startswith("model."))


def _shape(tensors: Tensors, name: str) -> Any:
    return tensors[name].shape if name in tensors else None
