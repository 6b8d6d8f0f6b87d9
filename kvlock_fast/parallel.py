"""Documented name of `kvlock_fast.loop.parallel`: an edit whose tokens several processes share."""

from kvlock_fast.loop.parallel import share_video

__all__ = ["share_video"]
