"""Real clips as cases: a folder with a file `clips.json`, a list of edits.

    [{"name": "dog", "video": "dog.mp4", "mask": "dog_mask.mp4", "source_prompt": "a dog on grass",
      "prompt": "a fox on grass", "frames": 33, "size": "480x832", "seed": 0}, ...]

video, mask: whatever `kvlock-fast edit` takes, relative to the folder (a mask may be a box, "box:x,y,w,h"); frames: the
most to take, size: HEIGHTxWIDTH to work at, seed: of the noise; the last three may be missing. There is no true answer:
success stays empty, the autoencoder's row is of the source, and consistency follows the middle of the mask.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.quality.measures import path_of_mask
from bench.quality.rows import Clip, Subject
from kvlock_fast.errors import InputError

NEEDED = ("name", "video", "mask", "source_prompt", "prompt")
OPTIONAL = ("frames", "size", "seed")


def read_clips(folder: Path) -> list[dict[str, Any]]:
    """The folder's edits, checked. Raises InputError naming the file and what is wrong with it."""
    path = folder / "clips.json"
    if not path.is_file():
        raise InputError(f"--clips '{folder}' has no clips.json")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise InputError(f"'{path}' is not a list of edits")
    names = set()
    for number, clip in enumerate(found):
        wrong = _wrong(clip) or (f"has the name {clip['name']!r} of another" if clip["name"] in names else None)
        if wrong:
            raise InputError(f"'{path}': edit {number} {wrong}")
        names.add(clip["name"])
    return found


def _wrong(clip: Any) -> str | None:
    if not isinstance(clip, dict):
        return "is not an object"
    for name in NEEDED:
        if not isinstance(clip.get(name), str) or not clip[name]:
            return f"has {clip.get(name)!r} as its {name}"
    unknown = sorted(set(clip) - {*NEEDED, *OPTIONAL})
    if unknown:
        return f"has an unknown field {unknown[0]!r}"
    for name in ("frames", "seed"):
        if name in clip and (not isinstance(clip[name], int) or clip[name] < (1 if name == "frames" else 0)):
            return f"has {clip[name]!r} as its {name}"
    height, _, width = str(clip.get("size", "1x1")).partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        return f"has {clip['size']!r} as its size"
    if "/" in clip["name"] or clip["name"].startswith("."):
        return f"has {clip['name']!r} as its name, which is to be a file's"
    return None


def clip_subject(number: int, folder: str) -> Subject:
    """An edit of the folder, read and brought to its size."""
    import numpy as np

    from kvlock_fast.media import box_mask, fit_mask, is_box, read_mask, read_video, resize_mask, resize_video

    place = Path(folder)
    clip = read_clips(place)[number]
    video = read_video(place / clip["video"], max_frames=clip.get("frames")).frames
    count, height, width = video.shape[:3]
    if is_box(clip["mask"]):
        mask = box_mask(clip["mask"], count, height, width)
    else:
        mask = fit_mask(read_mask(place / clip["mask"])[:count], count, height, width)
    if "size" in clip:
        height, width = (int(side) for side in clip["size"].split("x"))
        video, mask = resize_video(video, height, width), resize_mask(mask, height, width)
    mask = np.broadcast_to(mask, video.shape[:3]).astype(bool)
    taken = Clip(video, mask, clip["source_prompt"], clip["prompt"], clip.get("seed", 0))
    return Subject(clip["name"], "clip", taken, None, None, path_of_mask(mask))
