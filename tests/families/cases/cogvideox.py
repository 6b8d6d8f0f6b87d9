"""CogVideoX text-to-video as the conformance suite takes it."""

from functools import partial

from tests.support.conformance import Case
from tests.support.tiny import COGVIDEOX_KINDS, tiny_cogvideox


def stock(pipe, call):
    """diffusers' own latents."""
    return pipe(**call.arguments).frames.transpose(1, 2)


CASES = [
    Case(f"cogvideox-{kind}", partial(tiny_cogvideox, kind), stock, more={"max_sequence_length": 7})
    for kind in COGVIDEOX_KINDS
]
