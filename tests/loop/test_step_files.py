"""A denoising step crosses few of the package's files: as many as a reader can hold in mind."""

import sys
from collections import Counter
from pathlib import Path

import pytest

import kvlock_fast
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.loop import denoise, trace
from tests.pipeline.test_pipeline import a_mask, call
from tests.support.tiny import tiny_wan

PACKAGE = Path(kvlock_fast.__file__).resolve().parent
ROOT = PACKAGE.parent


class Crossed:
    """The functions of the package that are called in step `step` of an edit, counted by file."""

    def __init__(self, monkeypatch, step: int):
        self.files: dict[str, Counter] = {}
        self._profile = sys.getprofile()
        span, mark = denoise.span, trace.Run.mark

        def spanned(name, number=None):
            if name == "step" and number == step:
                sys.setprofile(self._count)
            return span(name, number)

        def marked(run, tokens):
            sys.setprofile(self._profile)
            mark(run, tokens)

        monkeypatch.setattr(denoise, "span", spanned)
        monkeypatch.setattr(trace.Run, "mark", marked)

    def _count(self, frame, event, argument):
        if event != "call":
            return
        path = Path(frame.f_code.co_filename)
        if path.is_absolute() and (path := path.resolve()).is_relative_to(ROOT) and "tests" not in path.parts:
            if not path.is_relative_to(PACKAGE) and not path.is_relative_to(ROOT / "kernels"):
                return
            self.files.setdefault(str(path.relative_to(ROOT)), Counter())[frame.f_code.co_name] += 1

    def __str__(self) -> str:
        return "\n".join(f"{name}: {', '.join(sorted(called))}" for name, called in sorted(self.files.items()))


WAYS = {
    # lock, cache tier, processors, the step that is looked at, the most files
    "lockstep": (LockConfig(kappa=3), "lockstep", "generic", 5, 12),
    "lockstep warm-up": (LockConfig(kappa=3), "lockstep", "generic", 2, 12),
    "foreground": (LockConfig(kappa=2, compute="foreground"), "resident", "fast", 2, 18),
    "foreground, every token": (LockConfig(kappa=5, compute="foreground"), "resident", "fast", 5, 23),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_a_step_crosses_few_files(monkeypatch, way):
    lock, tier, processors, step, most = WAYS[way]
    crossed = Crossed(monkeypatch, step)
    mask = a_mask()
    call(tiny_wan(), lock=lock, cache=CacheConfig(tier=tier), processors=processors, steps=7, mask=mask)
    print(f"{way}: {len(crossed.files)} files\n{crossed}")
    assert crossed.files and len(crossed.files) <= most, f"{len(crossed.files)} files\n{crossed}"
