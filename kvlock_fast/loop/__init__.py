"""One denoising run. Begin at `denoise.py`."""
