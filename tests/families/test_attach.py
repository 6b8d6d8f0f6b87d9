"""Every family's transformer by itself, without its pipeline: what `attach` knows and what "auto" finds of it."""

import dataclasses

import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast.locking.discover import find_and_check
from kvlock_fast.locking.lock import Mode
from kvlock_fast.models.registry import arch_of
from tests.support.conformance import Scene, all_cases
from tests.support.tiny import untouched

ALPHA = 0.6
CASES = {case.name: case for case in all_cases()}
NOT_FOUND = {
    "flux2-dev": "come from no projection of their own",
    "flux2-klein": "come from no projection of their own",
    "framepack": "has 12 tokens of the video, where the foreground has 18",  # its first frames are another argument
    "kandinsky-5": "locking the keys of .* is not blending",  # rotated keys are rounded to bf16, in fp32 too
    "kandinsky-5-image": "locking the keys of .* is not blending",
    "latte": "has 12 tokens of the video, where the foreground has 60",
    "motif-decoders": "has 36 tokens of the video, where the foreground has 18",
}
"""What auto cannot see of the families that are described."""


@pytest.mark.parametrize("name", CASES)
def test_of_families_by_class_and_by_what_happens_is_found_what_is_written(name):
    """Two ways to a family's description that know nothing of each other; the text's place by the attention's call may
    be more than the projections show.
    """
    scene = Scene(CASES[name])
    transformer, written = scene.transformer, scene.model.arch
    assert dataclasses.replace(arch_of(transformer), family=written.family, flow=written.flow) == written
    told, _ = scene.told

    def sample():
        return scene.predict(scene.latents, told)

    if name in NOT_FOUND:
        with pytest.raises(kvf.InputError, match=NOT_FOUND[name]):
            find_and_check(transformer, sample, scene.tokens, scene.ahead or 0)
    else:
        found = find_and_check(transformer, sample, scene.tokens, scene.ahead or 0)
        assert found.attentions(transformer) == written.attentions(transformer)
        assert found.token_dim == written.token_dim and found.text in (written.text, "none")
    assert untouched(transformer)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_attach_locks_every_family_by_its_class(name):
    """As the pipeline's own lock does, which the conformance suite holds against the attention; and in fewer bytes."""
    scene = Scene(CASES[name])
    told, of_source = scene.told
    background = (~scene.inside).nonzero()[:, 0]
    kept, lock = scene.kept(scene.source, background), scene.lock(background)
    with lock.forward(Mode.STORED, scene.weight(ALPHA), kept, scene.tokens, ahead=scene.ahead):
        expected = scene.predict(scene.latents, told)
    lock.detach()
    sizes = []
    for format in (None, "int8"):
        with kvf.attach(scene.transformer, scene.inside, ahead=scene.ahead, format=format) as kv:
            with kv.source():
                scene.predict(scene.source, of_source)
            sizes.append(kv.nbytes)
            with kv.edit(ALPHA):
                got = scene.predict(scene.latents, told)
        assert torch.equal(got, expected) or (format and (got - expected).abs().max() < 0.1 * expected.abs().max())
    assert sizes[0] > 2 * sizes[1] and untouched(scene.transformer)
