"""Masks from files and words, and making masks and frames fit."""

import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kvlock_fast import media
from kvlock_fast.errors import InputError
from tests.support.clipmaker import encode, noise


def blob(frames=5, height=48, width=64):
    """A disc that moves: bool `[F, H, W]`."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(y - height / 2) ** 2 + (x - width / 4 - 3 * i) ** 2 < 150 for i in range(frames)])


def as_pictures(mask, colour=(255, 255, 255)):
    return mask[..., None] * np.array(colour, dtype=np.uint8)


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_compressed_mask_comes_back(tmp_path):
    mask = blob()
    encode(tmp_path / "m.mp4", "libx264", "yuv420p", list(as_pictures(mask)))
    read = media.read_mask(tmp_path / "m.mp4")
    assert read.dtype == bool and read.shape == mask.shape
    # Only pixels on the border may fall to the other side.
    assert (read ^ mask).mean() < 0.01
    flat = np.zeros((3, 48, 64, 3), dtype=np.uint8)
    encode(tmp_path / "black.mp4", "libx264", "yuv420p", list(flat + 20))
    assert not media.read_mask(tmp_path / "black.mp4").any()


@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 0, 0), (0, 0, 255), (128, 0, 0)], ids=str)
def test_images_of_any_colour(tmp_path, colour):
    mask = blob(1)
    Image.fromarray(as_pictures(mask, colour)[0]).save(tmp_path / "m.png")
    assert np.array_equal(media.read_mask(tmp_path / "m.png"), mask)


def test_palette_and_one_bit_images(tmp_path):
    mask = blob(1)
    image = Image.fromarray(mask[0].astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(tmp_path / "p.png")
    Image.fromarray(mask[0]).save(tmp_path / "one.png")
    for name in ("p.png", "one.png"):
        assert np.array_equal(media.read_mask(tmp_path / name), mask)


def test_folder_of_images(tmp_path):
    mask = blob()
    for i, picture in enumerate(as_pictures(mask)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    assert np.array_equal(media.read_mask(tmp_path), mask)


ARRAYS = {
    "bool": lambda m: m,
    "one": lambda m: m.astype(np.uint8),
    "byte": lambda m: m.astype(np.uint8) * 255,
    "wide": lambda m: m.astype(np.int64) * 255,
    "word": lambda m: m.astype(np.uint16) * 65535,
    "float": lambda m: m * 0.9 + 0.05,
    "channel": lambda m: m[..., None],
    "fortran": lambda m: np.asfortranarray(m),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays(tmp_path, kind):
    mask = blob()
    array = ARRAYS[kind](mask)
    np.save(tmp_path / "m.npy", array)
    np.savez_compressed(tmp_path / "m.npz", array)
    np.savez(tmp_path / "named.npz", mask=array, other=np.zeros(3))
    for name in ("m.npy", "m.npz", "named.npz"):
        assert np.array_equal(media.read_mask(tmp_path / name), mask)
    if kind != "channel":
        np.save(tmp_path / "one.npy", array[0])
        assert np.array_equal(media.read_mask(tmp_path / "one.npy"), mask[:1])


def test_the_threshold_is_a_share_of_the_full_range(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "m.png")
    np.save(tmp_path / "m.npy", ramp)
    for name in ("m.png", "m.npy"):
        assert media.read_mask(tmp_path / name).sum() == 128
        assert media.read_mask(tmp_path / name, threshold=0).sum() == 255
        assert media.read_mask(tmp_path / name, threshold=0.9).sum() == 255 - 229
    for wrong in (-0.1, 1, float("nan")):
        with pytest.raises(InputError, match="threshold"):
            media.read_mask(tmp_path / "m.png", threshold=wrong)


BAD_ARRAYS = {
    "objects": np.array([[{}]], dtype=object),
    "flat": np.zeros(5, dtype=bool),
    "colour": np.zeros((2, 4, 4, 3), dtype=bool),
    "empty": np.zeros((0, 4, 4), dtype=bool),
    "nan": np.array([[0, np.nan]]),
    "inf": np.array([[0, np.inf]]),
    "negative": np.array([[0, -1]]),
    "large": np.array([[0, 70000]]),
    "above": np.array([[0, 1.5]]),
    "complex": np.array([[0, 1j]]),
    "text": np.array([["a", "b"]]),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_arrays_that_are_no_masks(tmp_path, kind):
    np.save(tmp_path / "bad.npy", BAD_ARRAYS[kind], allow_pickle=True)
    np.savez(tmp_path / "bad.npz", BAD_ARRAYS[kind], allow_pickle=True)
    for name in ("bad.npy", "bad.npz"):
        with pytest.raises(InputError, match=name):
            media.read_mask(tmp_path / name)


def test_damaged_array_files(tmp_path):
    np.save(tmp_path / "a.npy", blob())
    np.savez(tmp_path / "a.npz", blob())
    for name in ("a.npy", "a.npz"):
        data = (tmp_path / name).read_bytes()
        for damaged in (b"", b"words", data[: len(data) // 2], data[:20]):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(InputError, match=name):
                media.read_mask(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("one.npy", b"")
        archive.writestr("two.npy", b"")
    with pytest.raises(InputError, match=r"a\.npz' holds 2 arrays"):
        media.read_mask(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["missing.npy", "missing.npz", "missing.png", "missing.mp4", "missing"])
def test_a_missing_mask(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}.*does not exist"):
        media.read_mask(tmp_path / name)


# --- boxes ---------------------------------------------------------------------------------------------------------


def test_a_box():
    mask = media.box_mask("box:2,1,3,4", 2, 8, 10)
    assert mask.shape == (2, 8, 10) and mask.sum() == 2 * 12
    assert mask[:, 1:5, 2:5].all()
    assert media.box_mask("box: 0, 0, 10, 8", 1, 8, 10).all()


@pytest.mark.parametrize("spec", [
    "box:", "box:1,2,3", "box:1,2,3,4,5", "box:a,b,c,d", "box:1.5,2,3,4", "1,2,3,4", "boxes:1,2,3,4",
    "box:0,0,0,4", "box:0,0,4,-1", "box:-1,0,4,4", "box:8,0,3,1", "box:0,6,1,3", "box:99,99,1,1",
])  # fmt: skip
def test_boxes_that_are_none(spec):
    with pytest.raises(InputError) as caught:
        media.box_mask(spec, 1, 8, 10)
    assert f"'{spec}'" in str(caught.value)


# --- fitting -------------------------------------------------------------------------------------------------------

side = st.integers(1, 24)


@given(side, side, side, side, st.integers(0, 2**31))
def test_resize_mask_by_brute_force(height, width, new_height, new_width, seed):
    mask = np.random.default_rng(seed).random((2, height, width)) < 0.15

    def beneath(i, old, new):
        """The old pixels that share some of the new pixel i; growing, the one under its centre."""
        if new >= old:
            return [int((i + 0.5) * old / new)]
        return [j for j in range(old) if j * new < (i + 1) * old and (j + 1) * new > i * old]

    expected = np.array([
        [[mask[f][np.ix_(beneath(y, height, new_height), beneath(x, width, new_width))].any() for x in range(new_width)]
         for y in range(new_height)]
        for f in range(2)
    ])  # fmt: skip
    assert np.array_equal(media.resize_mask(mask, new_height, new_width), expected)


def test_a_thin_line_survives_shrinking():
    mask = np.zeros((1, 480, 854), dtype=bool)
    mask[0, 333] = True
    assert media.fit_mask(mask, 3, 60, 107).any(axis=1).all()


def test_one_frame_serves_all():
    mask = blob(1)
    fitted = media.fit_mask(mask, 7, 48, 64)
    assert fitted.shape == (7, 48, 64) and (fitted == mask).all()


@pytest.mark.parametrize("frames", [2, 4, 6, 10])
def test_another_length_is_refused(frames):
    with pytest.raises(InputError, match=f"5 frames.*{frames}"):
        media.fit_mask(blob(5), frames, 48, 64)


SHAPES = [
    ((480, 854), (720, 1280), True),
    ((720, 1280), (480, 854), True),
    ((480, 853), (480, 854), True),
    ((60, 107), (480, 854), True),
    ((48, 64), (64, 48), False),
    ((480, 832), (480, 854), False),
    ((480, 640), (480, 854), False),
    ((512, 512), (480, 854), False),
    ((16, 16), (1080, 1920), False),
]


@pytest.mark.parametrize(("given_size", "wanted", "fits"), SHAPES, ids=str)
def test_aspect_ratios(given_size, wanted, fits):
    mask = np.ones((1, *given_size), dtype=bool)
    if fits:
        assert media.fit_mask(mask, 2, *wanted).shape == (2, *wanted)
    else:
        with pytest.raises(InputError, match="aspect ratio"):
            media.fit_mask(mask, 2, *wanted)


@given(st.integers(1, 40), st.sampled_from([1, 4, 8]))
def test_fit_frames(count, multiple):
    frames = np.arange(count)[:, None]
    padded, before = media.fit_frames(frames, "pad", multiple)
    assert before == count and (len(padded) - 1) % multiple == 0 and 0 <= len(padded) - count < multiple
    assert np.array_equal(padded[:count], frames) and (padded[count:] == count - 1).all()
    trimmed, before = media.fit_frames(frames, "trim", multiple)
    assert before == count and (len(trimmed) - 1) % multiple == 0 and 0 <= count - len(trimmed) < multiple
    assert np.array_equal(trimmed, frames[: len(trimmed)])
    if (count - 1) % multiple:
        with pytest.raises(InputError, match=f"{count} frames"):
            media.fit_frames(frames, "error", multiple)
    else:
        assert media.fit_frames(frames, "error", multiple)[0] is frames


def test_fit_frames_refuses():
    with pytest.raises(InputError, match="no frames"):
        media.fit_frames(np.zeros((0, 2)), "pad")
    with pytest.raises(InputError, match="'cut'"):
        media.fit_frames(np.zeros((2, 2)), "cut")


@pytest.mark.parametrize("size", [(24, 32), (96, 130), (7, 5), (48, 64)], ids=str)
def test_resize_video(size):
    flat = np.full((9, 48, 64, 3), (3, 128, 255), dtype=np.uint8)
    resized = media.resize_video(flat, *size)
    assert resized.dtype == np.uint8 and resized.shape == (9, *size, 3)
    assert (resized == (3, 128, 255)).all()


def test_resize_video_filters_before_it_shrinks():
    stripes = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    small = media.resize_video(stripes, 16, 16).astype(int)
    assert np.abs(small[:, 2:-2, 2:-2] - 127.5).max() < 8


def test_resize_video_keeps_frames_apart():
    frames = noise(11, 16, 16)
    together = media.resize_video(frames, 24, 20)
    assert all(np.array_equal(media.resize_video(frames[i : i + 1], 24, 20)[0], together[i]) for i in range(11))


# --- real masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "frames", "share"), [("tennis", 70, 0.04), ("dog", 81, 0.64)])
def test_real_masks_fit_their_clips(clips, name, frames, share):
    video = media.read_video(clips / f"{name}.mp4")
    mask = media.read_mask(clips / f"{name}_mask.mp4")
    assert mask.mean() == pytest.approx(share, abs=0.01)
    fitted = media.fit_mask(mask, *video.frames.shape[:3])
    assert len(fitted) == frames and np.array_equal(fitted, mask)
