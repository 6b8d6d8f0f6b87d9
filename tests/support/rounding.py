"""How far rounding alone takes an edit, so that a test may allow as much on any processor.

Two runs of the same arithmetic in other orders (another processor's instructions, weights at other addresses, rows in
other batches) differ by their rounding. Each is as far from the exact result as rounding takes it; so what two may
differ by follows from one run's distance to fp64, not from what a machine happened to show.
"""

from torch import Tensor

FACTOR = 4.0
"""Times eager's own distance to fp64: two runs lie on either side of the truth, and each may round worse than this."""
LEAST = 2.0**-22
"""Share of the values' size, where a run happens to meet the truth: two units in the last place of fp32."""


def in_double(pipe):
    """The pipeline with its transformers in fp64, what they say rounded to fp32 once."""

    def rounded(module, inputs, output):
        return tuple(x.float() for x in output) if isinstance(output, tuple) else output

    for name in ("transformer", "transformer_2"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).double().register_forward_hook(rounded)
    return pipe


def allowed(found: Tensor, exact: Tensor) -> float:
    """The absolute tolerance for another run of what gave `found`; exact: the same in fp64."""
    distance = (found.double() - exact.double()).abs().max().item()
    return max(FACTOR * distance, LEAST * exact.abs().max().item())
