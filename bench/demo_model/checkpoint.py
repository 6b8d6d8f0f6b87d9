"""Training state on disk: weights, their moving average and the optimisers' moments as safetensors, counts as JSON."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass
class TrainState:
    """What one stage trains: named modules, their averaged weights, the optimisers, and how far it has come."""

    modules: nn.ModuleDict
    optimisers: list[torch.optim.Optimizer]
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.average:
            self.reset_average()

    def reset_average(self) -> None:
        """Let the average start at the present weights."""
        self.average = {name: p.detach().clone() for name, p in self.modules.state_dict().items()}

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average towards the weights; early steps move it faster, or it would remember the initialisation."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        live = self.modules.state_dict()
        for name, value in self.average.items():
            value.lerp_(live[name], 1 - decay) if value.is_floating_point() else value.copy_(live[name])

    def averaged(self) -> nn.ModuleDict:
        """A copy of the modules with the averaged weights, in eval mode."""
        modules = copy.deepcopy(self.modules)
        modules.load_state_dict(self.average)
        return modules.eval().requires_grad_(False)


def save_state(state: TrainState, folder: Path) -> None:
    """Write the state; a reader sees either the old files or the new ones, never half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    moments = {}
    for o, optimiser in enumerate(state.optimisers):
        for i, slot in optimiser.state_dict()["state"].items():
            moments |= {f"{o}.{i}.{name}": value for name, value in slot.items()}
    tensors = {"weights": state.modules.state_dict(), "average": state.average, "moments": moments}
    for name, values in tensors.items():
        values = {key: value.detach().clone().contiguous() for key, value in values.items()}
        save_file(values, folder / f"{name}.tmp")
        (folder / f"{name}.tmp").replace(folder / f"{name}.safetensors")
    (folder / "progress.json").write_text(json.dumps({"step": state.step, "seconds": round(state.seconds, 1)}))


def load_state(state: TrainState, folder: Path) -> bool:
    """Continue from `folder` if it holds a state; returns whether it did."""
    if not (folder / "progress.json").exists():
        return False
    progress = json.loads((folder / "progress.json").read_text())
    state.step, state.seconds = progress["step"], progress["seconds"]
    state.modules.load_state_dict(load_file(folder / "weights.safetensors"))
    state.average = load_file(folder / "average.safetensors")
    slots: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in state.optimisers]
    for name, value in load_file(folder / "moments.safetensors").items():
        o, i, key = name.split(".", 2)
        slots[int(o)].setdefault(int(i), {})[key] = value
    for optimiser, slot in zip(state.optimisers, slots, strict=True):
        optimiser.load_state_dict({"state": slot, "param_groups": optimiser.state_dict()["param_groups"]})
    return True


def load_bundled(modules: nn.ModuleDict) -> bool:
    """Start from the bundled model's weights; returns whether there is one of these sizes."""
    from kvlock_fast.models.bundled import model_path

    for name, module in modules.items():
        files = list((model_path() / name).glob("*.safetensors"))
        if not files:
            return False
        weights = {key: value.float() for key, value in load_file(files[0]).items()}
        missing, unexpected = module.load_state_dict(weights, strict=False)
        # T5's embedding has two names and is stored under one.
        if unexpected or any("embed_tokens" not in key for key in missing):
            raise ValueError(f"the bundled {name} has another form: missing {missing}, unexpected {unexpected}")
    return True


class Log:
    """Appends one JSON object per line, and echoes it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, **figures) -> None:
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(rounded) + "\n")
        print(json.dumps(rounded), flush=True)
