"""Pictures in, pictures out: the one door to files of video, images and masks.

Everything beyond this door is uint8 RGB `[F, H, W, 3]` or bool `[F, H, W]` in memory. Sizes are checked before memory
is taken, colours keep their matrix and range, and outputs are whole or absent. PyAV, Pillow and torch are imported
only when a call needs them.
"""
# ruff: noqa: F401 - names for other rooms

from kvlock_fast.media.fitting import fit_frames, fit_mask, resize_mask, resize_video
from kvlock_fast.media.masks import box_mask, check_box, grow_mask, is_box, read_mask
from kvlock_fast.media.video_in import MAX_FRAMES, read_video
from kvlock_fast.media.video_out import ENCODERS, STILLS, check_video_output, write_video
from kvlock_fast.settings import MaskShape
