"""The denoising step as a CUDA graph: captured once for each kind of step, replayed for all that are of its kind.

A replay launches the same kernels on the same addresses, so whatever changes from step to step must be read from
memory that stays where it is: the stepper's state, the step's timestep and source latent, the cache's slots. The same
memory serves later runs of the same shapes: `CapturedLoops` keeps it, and the captured steps with it.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.config import LockConfig
from kvlock_fast.errors import InputError, warn
from kvlock_fast.loop.epilogue import DeviceStepper, stepper_kind
from kvlock_fast.loop.forwards import Forwards, Predictor
from kvlock_fast.loop.schedule import compares_with_source
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.task import Task
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.models.protocols import Transformer

MOST_GRAPHS = 16
"""Kinds of steps in a run that are captured: warm-up and locked, guided and not, two stages, two slots. Others run as
they are.
"""
MOST_LOOPS = 2
"""Loops that are kept: what a captured step needs while it runs stays taken between calls."""

Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Takes a step's work, which has run before, and gives what does the same again; does not run it."""


class StepGraphs:
    """Runs steps by kind: the first of a kind as it is, the second captured, the others replayed.

    rows: samples that a step of a kind has sent through the model; a replay cannot count them.
    """

    def __init__(self, capture: Capture | None):
        """capture: None runs every step as it is."""
        self.capture = capture
        self.replays: dict[Hashable, Work] = {}
        self.rows: dict[Hashable, int] = {}
        self._seen: set[Hashable] = set()

    def run(self, kind: Hashable, work: Work) -> bool:
        """Do the work of one step; whether it was a replay, so that none of its Python ran."""
        if self.capture is None:
            work()
            return False
        if kind in self.replays:
            self.replays[kind]()
            return True
        if kind in self._seen and len(self.replays) < MOST_GRAPHS:
            replay = self.replays[kind] = self.capture(work)
            replay()
            return True
        self._seen.add(kind)
        work()
        return False


@dataclass
class HeldLoop:
    """The memory that a loop's captured steps read and write, by name, the slots of its cache, and the steps."""

    tensors: dict[str, Tensor]
    slots: list[Tensor]
    graphs: StepGraphs


@dataclass
class CapturedLoops:
    """The last `MOST_LOOPS` loops with captured steps, over calls, by all that their kernels were launched with."""

    capture: Capture
    loops: OrderedDict[Hashable, HeldLoop] = field(default_factory=OrderedDict)

    def take(self, constants: Hashable, tensors: dict[str, Tensor], slots: list[Tensor]) -> HeldLoop:
        """The loop to run: with these tensors, or with earlier ones of their shapes that have taken over their values.

        constants: whatever else the kernels are launched with; slots: those of the cache, empty yet, which become the
        loop's own.
        """
        shapes = tuple((name, x.shape, x.stride(), x.dtype) for name, x in tensors.items())
        key = constants, shapes, tuple(slot.nbytes for slot in slots)
        held = self.loops.pop(key, None)
        if held is None:
            # Copies, as callers keep theirs; and none of an inference mode, which later calls may not be in.
            with torch.inference_mode(False):
                own = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
            held = HeldLoop(own, slots, StepGraphs(self.capture))
        else:
            for name, x in tensors.items():
                held.tensors[name].copy_(x)
        self.loops[key] = held
        while len(self.loops) > MOST_LOOPS:
            self.loops.popitem(last=False)
        return held

    def clear(self) -> None:
        """Give the memory back."""
        self.loops.clear()


def hold(
    loops: CapturedLoops, task: Task, predict: Predictor, forwards: Forwards, stepper: DeviceStepper
) -> StepGraphs:
    """Put all that a captured step reads and writes where it stays: in the memory of an earlier run like this one."""
    stored, steps = forwards.stored, range(predict.solver.num_steps)
    slots = [] if stored is None else stored.store.fixed_slots()
    constants = (
        task.lock,
        task.guidance,
        tuple(predict.stage(k) for k in steps),
        tuple(launch_facts(transformer) for transformer in predict.model.transformers),
        tuple(lock.fast is not None for lock in predict.locks),
        None if stored is None else stored.store.layout,
        forwards.region and forwards.region.foreground,
    )
    held = loops.take(constants, {**forwards.tensors(), **stepper.tensors()}, slots)
    if stored is not None and held.slots is not slots:
        stored.store.use_slots(held.slots)
    forwards.use(held.tensors)
    stepper.use(held.tensors)
    return held.graphs


def why_not_captured(model: PipelineModel, lock: LockConfig, solver: Solver) -> str | None:
    """Name what in an edit a replay of its steps would miss; None if nothing."""
    if lock.method != "lock":
        return f"the method {lock.method!r} has a loop of its own"
    if stepper_kind(lock, solver) is not DeviceStepper:
        return "it takes the scheduler's own steps"
    if compares_with_source(lock):
        return "tau='auto' counts the source's predictions on the host"
    if model.why_not_captured is not None:
        return model.why_not_captured
    parts = (part for transformer in model.transformers for part in transformer.modules())
    if any(hasattr(part, "_hf_hook") or "forward" in vars(part) for part in parts):
        return "forwards of the model were replaced, as by offloading: its weights may move between steps"
    return None


class CudaCapture:
    """Captures on a device; graphs that are there together share a pool of memory, as they never run at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            # The pool goes with the last of its graphs; its number means nothing from then on.
            pool = self._pool if len(self._graphs) else None
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
            self._pool = graph.pool()
        self._graphs.add(graph)
        return graph.replay


def launch_facts(transformer: Transformer) -> Hashable:
    """What a captured forward of a transformer took along by value: where its weights are, how adapters weigh, whose
    attention and which numerics it runs by, which of its parts are compiled.
    """
    where = tuple(x.data_ptr() for x in (*transformer.parameters(), *transformer.buffers()))
    adapters = tuple(
        (name, str(module.scaling), str(module.active_adapters), module.disable_adapters, str(module.merged_adapters))
        for name, module in transformer.named_modules()
        if hasattr(module, "merged_adapters")  # peft's layers
    )
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    # Not all of diffusers' transformers list their processors (`attn_processors`).
    processors = tuple(
        (module.processor, str(getattr(module.processor, "_attention_backend", None)))
        for module in transformer.modules()
        if getattr(module, "processor", None) is not None
    )
    attention = processors, str(_AttentionBackendRegistry.get_active_backend()[0])
    compiled = tuple(module._compiled_call_impl is not None for module in transformer.modules())
    backends = torch.backends.cuda
    numerics = (
        backends.matmul.allow_tf32, torch.get_float32_matmul_precision(), backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(), backends.cudnn_sdp_enabled(), backends.math_sdp_enabled(),
        backends.matmul.allow_bf16_reduced_precision_reduction, torch.is_autocast_enabled("cuda"),
        str(torch.get_autocast_dtype("cuda")), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(),
    )  # fmt: skip
    return where, adapters, attention, compiled, numerics


def choose_capture(wish: str, device: torch.device, why_not: str | None) -> Capture | None:
    """How to capture by a wish of `GRAPH`; why_not: why this run cannot be captured, if it cannot.

    "auto" says in a warning why it declines; "on" raises InputError with the reason.
    """
    if wish == "off":
        return None
    reason = why_not if device.type == "cuda" else f"the device is {device.type}, not cuda"
    if reason is None:
        return CudaCapture(device)
    if wish == "on":
        raise InputError(f"graph is 'on', but the steps cannot be captured: {reason}")
    warn(f"steps are not captured in a CUDA graph: {reason}")
    return None
