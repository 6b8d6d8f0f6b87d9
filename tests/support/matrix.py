"""docs/families.md, made from what passed: the suite of test_families.py by family, and the families' own facts."""

import re
from collections import defaultdict
from functools import cache
from pathlib import Path

FEATURES = {
    "test_lock_off_is_diffusers_bit_for_bit": "off = diffusers' bits",
    "test_pixels_are_diffusers_own": "decoding",
    "test_encoding_is_the_inverse_of_what_decoding_does_to_latents": "encoding",
    "test_locking_is_blending_at_the_attention_call": "lock = blending in attention",
    "test_skipped_layers_are_noticed": "skipped layers noticed",
    "test_the_model_is_left_as_it_was": "left as it was",
    "test_tokens_lie_as_the_model_has_them": "token order",
    "test_a_pixel_reaches_the_tokens_that_the_mask_says": "mask",
    "test_whole_edits": "edits (along, native, fp8)",
    "test_several_prompts_equal_one_at_a_time": "several prompts",
    "test_compiled_blocks_take_one_graph_for_all_alphas": "compiled blocks",
    "test_the_fast_path_is_the_generic_one": "fast path",
    "test_foreground_only_is_exact": "foreground-only",
}
"""Tests of the suite, and what a column says of a family that passed."""
PAGE = Path(__file__).parents[2] / "kvlock_fast" / "docs" / "families.md"
WORST_FIRST = ("failed", "skipped", "passed")
SIGNS = {"passed": "yes", "skipped": "-", "failed": "NO"}
INTRO = """# Families, and what is known to work

Made by the test suite (`make matrix`), not by hand: each row is a tiny random model of a real diffusers pipeline class
that went through every column's test; "-" is what a pipeline does not have. No trained weights were in it: that a
model *edits well* is not said here.

- **off = diffusers' bits**: with the lock off, the latents of diffusers' own pipeline, bit for bit, in fp32 and bf16.
- **decoding, encoding**: pixels as diffusers' own, and the inverse of that on the way in.
- **lock = blending in attention**: keys and values blended at the attention call by the definition, to 1e-6 in fp32.
- **skipped layers noticed, left as it was**: a lock that misses a layer is an error; afterwards the model is untouched.
- **token order, mask**: a token's latents are one row of the keys, and a pixel is in the token that the mask says.
- **edits**: whole edits, the source along, stored, and stored in fp8; **several prompts** equal one at a time.
- **compiled blocks**: `torch.compile` of the blocks, one graph for every alpha.
- **fast path**: `processors="fast"`, the prologue in front of the attention, equals the generic path.
- **foreground-only**: `compute="foreground"` equals the whole computation.
"""


class Results:
    """Outcomes of the suite, by feature and case, as pytest reports them."""

    def __init__(self):
        self.outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report):
        found = re.search(r"test_families\.py::(\w+)\[(.+)\]$", report.nodeid)
        if found is None or (report.when != "call" and report.outcome == "passed"):
            return
        self.outcomes[found.group(1), found.group(2)].add(report.outcome)

    def of(self, test: str, case: str) -> str:
        """The worst of all parameters of a test, where any was run; "-" where none could be."""
        mine = set()
        for (name, parameters), outcomes in self.outcomes.items():
            if name == test and parameters in (case, *_with_more(case, parameters)):
                mine |= outcomes
        if mine == {"passed", "skipped"}:  # some of a pipeline's calls are not there
            mine = {"passed"}
        return next((SIGNS[outcome] for outcome in WORST_FIRST if outcome in mine), "not run")


def _with_more(case: str, parameters: str) -> tuple[str, ...]:
    """`parameters` if they are those of the case and more: names of cases may begin with each other's."""
    if not parameters.startswith(f"{case}-"):
        return ()
    others = [name for name in _names() if parameters == name or parameters.startswith(f"{name}-")]
    return (parameters,) if max(others, key=len) == case else ()


@cache
def _names() -> list[str]:
    from tests.support.conformance import all_cases

    return [case.name for case in all_cases()]


def page(results: Results) -> str:
    """The page in Markdown."""
    names = _names()
    header = ["", *FEATURES.values()]
    rows = [[name, *(results.of(test, name) for test in FEATURES)] for name in names]
    return f"{INTRO}\n{_table(header, rows)}\n{facts()}"


def facts() -> str:
    """What the families' models say of themselves."""
    from tests.support.conformance import Scene, all_cases

    header = ["", "pipeline", "transformer", "patch, strides (t, hw)", "text in self-attention", "predicts", "guidance"]
    rows = []
    for case in all_cases():
        scene = Scene(case)
        arch, geometry = scene.model.arch, scene.model.geometry
        guidance = "an input (distilled)" if not case.guided else "one forward" if arch.one_call else "two forwards"
        kinds = {"flow_prediction": "flow", "reversed_flow": "flow, time reversed", "v_prediction": "v"}
        patch = "x".join(str(n) for n in geometry.patch_size)
        strides = f"{patch}, {geometry.temporal_stride}, {geometry.spatial_stride}"
        prediction = kinds.get(scene.solver.prediction, scene.solver.prediction)
        pipe, transformer = type(scene.pipe).__name__, type(scene.transformer).__name__
        rows.append([case.name, pipe, transformer, strides, arch.text, prediction, guidance])
    return f"## As the tests have them\n\n{_table(header, rows)}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
