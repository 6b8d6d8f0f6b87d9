"""Wan text-to-video as the conformance suite takes it."""

from diffusers import UniPCMultistepScheduler

from tests.support.conformance import Case
from tests.support.tiny import tiny_wan


def stock(pipe, call):
    """diffusers' own latents."""
    return pipe(**call.arguments).frames


def unipc():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def expanded():
    pipe = tiny_wan()
    pipe.register_to_config(expand_timesteps=True)
    return pipe


CASES = [
    Case("wan-2.1", lambda: tiny_wan(unipc()), stock, more={"max_sequence_length": 12}),
    Case("wan-2.2", lambda: tiny_wan(unipc(), second=True), stock, more={"max_sequence_length": 12}),
    Case("wan-2.2-5b", expanded, stock, more={"max_sequence_length": 12}),
]
