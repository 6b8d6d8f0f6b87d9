"""Pipelines of diffusers that guide by a component of their own, a "guider"."""

from typing import Any

from kvlock_fast.errors import InputError

PLAIN = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}


def check_guider(guider: Any) -> None:
    """Raise InputError unless it is classifier-free guidance at every step: an edit's guidance takes its place."""
    name, config = type(guider).__name__, getattr(guider, "config", {})
    remedy = "set pipe.guider = ClassifierFreeGuidance(), whose scale is the call's guidance_scale"
    if name != "ClassifierFreeGuidance":
        raise InputError(f"the pipeline's guider {name} is not supported: {remedy}")
    for setting, plain in PLAIN.items():
        if config.get(setting, plain) != plain:
            raise InputError(
                f"the pipeline's guider {name} with {setting}={config[setting]!r} is not supported: {remedy}"
            )


def is_on(guider: Any) -> bool:
    """Whether a pipeline's guider guides: not without one, and not where it is switched off."""
    return guider is not None and bool(guider.config.get("enabled", True))
