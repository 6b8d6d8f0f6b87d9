"""The learned distance against a forward by hand in fp64, with random weights and, where they are, the real ones."""

import numpy as np
import pytest
import torch
from scipy.signal import correlate

from bench.quality import perceptual
from bench.quality.perceptual import BLURS, CONVOLUTIONS, installed_weights, learned_distance
from kvlock_fast.errors import InputError

WIDTHS = (4, 6, 5, 3, 7)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    random, path = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("lpips") / "w.pth"
    weights = {
        "scaling_layer.shift": torch.tensor([-0.03, -0.09, -0.19]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.46, 0.45, 0.44]).view(1, 3, 1, 1),
    }
    before = 3
    for i, (name, width, side) in enumerate(zip(CONVOLUTIONS, WIDTHS, (11, 5, 3, 3, 3), strict=True)):
        weights[f"{name}.weight"] = torch.randn(width, before, side, side, generator=random) / (side * before**0.5)
        weights[f"{name}.bias"] = torch.randn(width, generator=random)
        weights[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=random)
        before = width
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    for name, width in zip(BLURS, (4, 4, 6), strict=True):
        weights[name] = kernel.repeat(width, 1, 1, 1)
    torch.save(weights, path)
    return path


def by_hand(path, a, b):
    """Mean distance of two videos in fp64, frame by frame, with scipy's correlation."""
    weights = {
        name: value.double().numpy() for name, value in torch.load(path, weights_only=True, map_location="cpu").items()
    }

    def convolved(x, name):
        kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        pad = {11: 2, 5: 2, 3: 1}[kernel.shape[-1]]
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
        return np.stack([correlate(x, one, "valid")[0] for one in kernel]) + bias[:, None, None]

    def blurred(x):
        x, kernel = np.pad(x, ((0, 0), (2, 2), (2, 2)), mode="reflect"), np.outer([1, 2, 1], [1, 2, 1]) / 16
        return np.stack([correlate(one, kernel, "valid")[::2, ::2] for one in x])

    def largest(x):
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        return windows.max(axis=(3, 4))

    def layers(frame):
        x = frame.transpose(2, 0, 1) / 127.5 - 1
        x = (x - weights["scaling_layer.shift"][0]) / weights["scaling_layer.scale"][0]
        x = np.maximum(blurred(convolved(x, CONVOLUTIONS[0])), 0)
        yield x
        for name in CONVOLUTIONS[1:3]:
            x = np.maximum(convolved(blurred(largest(x)), name), 0)
            yield x
        for name in CONVOLUTIONS[3:]:
            x = np.maximum(convolved(x, name), 0)
            yield x

    def unit(x):
        return x / (np.sqrt((x**2).sum(0)) + 1e-10)

    distances = []
    for one, other in zip(a, b, strict=True):
        pairs = enumerate(zip(layers(one), layers(other), strict=True))
        heads = [(i, weights[f"lin{i}.model.1.weight"][0], (unit(x) - unit(y)) ** 2) for i, (x, y) in pairs]
        distances.append(sum((head * squared).sum(0).mean() for _, head, squared in heads))
    return np.mean(distances)


def videos(side=64, frames=2):
    random = np.random.default_rng(1)
    return random.integers(0, 256, (2, frames, side, side + 6, 3), dtype=np.uint8)


def test_against_a_forward_by_hand(random_weights):
    a, b = videos()
    distance = learned_distance(random_weights)
    assert distance(a, b) == pytest.approx(by_hand(random_weights, a, b), rel=1e-4)
    assert distance(b, a) == pytest.approx(distance(a, b), rel=1e-5) and distance(a, a) == 0.0


@pytest.mark.skipif(installed_weights() is None, reason="pip install --no-deps stlpips_pytorch")
def test_the_real_weights_by_hand():
    path = installed_weights()
    a, b = videos(frames=1)
    distance = learned_distance(path)
    assert distance(a, b) == pytest.approx(by_hand(path, a, b), rel=1e-3)
    near = np.clip(a.astype(int) + 3, 0, 255).astype(np.uint8)
    assert distance(near, a) < 0.1 * distance(b, a)


def test_small_frames_are_enlarged(random_weights, monkeypatch):
    a, b = videos(side=32)
    seen, features = [], perceptual.features
    monkeypatch.setattr(perceptual, "features", lambda x, w: seen.append(tuple(x.shape)) or features(x, w))
    assert learned_distance(random_weights)(a, b) > 0
    assert seen == [(2, 3, 64, 76)] * 2


def test_files_of_something_else(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("other.pth", "text.pth", "none.pth"):
        with pytest.raises(InputError, match=f"--lpips '.*{name}' is not ST-LPIPS' file of AlexNet"):
            learned_distance(tmp_path / name)
