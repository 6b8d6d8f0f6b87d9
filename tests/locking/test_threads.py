"""One model in several threads: edits take turns, and nobody's frames or locks are another's."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast.locking.turns import one_at_a_time
from tests.pipeline.test_pipeline import a_mask, a_video, call
from tests.support.tiny import tiny_wan, untouched

SETTINGS = [
    dict(prompt="a blue circle"),
    dict(prompt="a dog", lock=kvf.LockConfig(alpha=0.5)),
    dict(prompt=["a cat", "a hat"], cache=kvf.CacheConfig(tier="resident", format="native")),
    dict(prompt="a red square", lock=kvf.LockConfig.preset("cfg")),
]


def rounds(config) -> int:
    return 250 if config.getoption("--all") else 6


def test_edits_in_threads_are_those_made_one_by_one(request):
    pipe = tiny_wan()
    alone = [call(pipe, steps=2, seed=i, **settings).latents for i, settings in enumerate(SETTINGS)]
    editors = [kvf.KVLockPipeline.from_pipe(pipe) for _ in SETTINGS]
    rng = random.Random(0)

    def edit(number):
        time.sleep(rng.random() / 100)
        return call(editors[number].pipe, steps=2, seed=number, **SETTINGS[number]).latents

    with ThreadPoolExecutor(len(SETTINGS)) as pool:
        for _ in range(rounds(request.config)):
            order = rng.sample(range(len(SETTINGS)), len(SETTINGS))
            for number, latents in zip(order, pool.map(edit, order), strict=True):
                assert torch.equal(latents, alone[number]), SETTINGS[number]
            assert untouched(pipe.transformer)


def test_an_edit_that_fails_lets_the_next_one_go(request):
    pipe = tiny_wan()
    expected = call(pipe, steps=2).latents

    def fail(stage, done, total):
        if stage == "denoise" and done:
            raise ZeroDivisionError

    def broken():
        with pytest.raises(ZeroDivisionError):
            call(pipe, steps=2, progress=fail)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(rounds(request.config)):
            first, second = pool.submit(broken), pool.submit(lambda: call(pipe, steps=2).latents)
            first.result()
            assert torch.equal(second.result(), expected)
            assert untouched(pipe.transformer)


def test_a_forward_of_another_thread_is_refused_under_a_lock():
    """A stranger to the lock runs it: without a refusal it would be blended without a word."""
    pipe = tiny_wan()
    transformer = pipe.transformer
    latents = torch.randn(1, transformer.config.in_channels, 1, 8, 12)
    text = torch.randn(1, 4, transformer.config.text_dim)

    def forward():
        with torch.no_grad():
            return transformer(latents, torch.tensor([500.0]), text, return_dict=False)[0]

    plain, foreground = forward(), torch.zeros(1, 24, dtype=torch.bool)
    foreground[:, :6] = True
    lock = kvf.attach(transformer, foreground, lock=kvf.LockConfig(alpha=0.5), num_steps=2)
    with ThreadPoolExecutor(1) as other:
        with lock:
            with lock.source():
                with pytest.raises(RuntimeError, match="another thread ran the transformer while it is locked"):
                    other.submit(forward).result()
                forward()
            assert torch.equal(other.submit(forward).result(), plain), "between forwards it is the plain model"
        assert torch.equal(other.submit(forward).result(), plain)
    assert untouched(transformer)


def test_two_that_attach_at_once_are_one_lock_and_one_refusal(request):
    transformer = tiny_wan().transformer
    foreground = torch.ones(1, 24, dtype=torch.bool)
    foreground[:, 6:] = False
    barrier, taken = threading.Barrier(2), []

    def attach(_):
        lock = kvf.attach(transformer, foreground, num_steps=2)
        barrier.wait()
        try:
            with lock:
                taken.append(1)
                time.sleep(0.002)
            return "locked"
        except kvf.InputError as error:
            return "refused" if "is locked already" in str(error) else str(error)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(4 * rounds(request.config)):
            assert set(pool.map(attach, range(2))) <= {"locked", "refused"}
            assert untouched(transformer)
    assert taken


def test_a_pipeline_is_refused_while_another_thread_has_attached():
    pipe = tiny_wan()
    foreground = torch.ones(1, 24, dtype=torch.bool)
    foreground[:, 6:] = False
    with (
        kvf.attach(pipe.transformer, foreground, num_steps=2),
        ThreadPoolExecutor(1) as other,
        pytest.raises(kvf.InputError, match="is locked already"),
    ):
        other.submit(call, pipe, steps=1).result()
    assert untouched(pipe.transformer)


def test_detach_ends_a_lock_and_twice_is_nothing():
    transformer = tiny_wan().transformer
    foreground = torch.ones(1, 24, dtype=torch.bool)
    foreground[:, 6:] = False
    lock = kvf.attach(transformer, foreground, num_steps=2)
    lock.detach()
    lock.__enter__()
    lock.detach()
    assert untouched(transformer)
    lock.detach()
    with lock:
        assert not untouched(transformer)
    assert untouched(transformer)


def test_turns_of_many_models_do_not_wait_for_each_other():
    models = [torch.nn.Linear(1, 1) for _ in range(3)]
    inside, most = set(), []

    def take(some):
        with one_at_a_time(some):
            clash = inside & {id(model) for model in some}
            inside.update(id(model) for model in some)
            most.append(len(inside))
            time.sleep(0.001)
            inside.difference_update(id(model) for model in some)
            return clash

    rng = random.Random(1)
    with ThreadPoolExecutor(6) as pool:
        jobs = [rng.sample(models, rng.choice((1, 2, 2, 3))) for _ in range(200)]
        assert not any(pool.map(take, jobs, timeout=60))
    with one_at_a_time(models), one_at_a_time(models[:1]):  # the same thread may come again
        assert threading.active_count() >= 1
    with one_at_a_time([]):
        pass


def test_a_video_and_its_mask_of_one_call_do_not_reach_another():
    """Two sizes at once: whoever waits has its own."""
    pipe = tiny_wan()
    sizes = [(5, 32, 48), (9, 48, 32)]

    def edit(size):
        editor = kvf.KVLockPipeline.from_pipe(pipe)
        generator = torch.Generator().manual_seed(0)
        return editor(
            a_video(*size), a_mask(*size), source_prompt="a", prompt="b", num_inference_steps=1, generator=generator,
            output="latent",
        ).latents  # fmt: skip

    alone = [edit(size) for size in sizes]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for found, expected in zip(pool.map(edit, sizes), alone, strict=True):
                assert torch.equal(found, expected)
