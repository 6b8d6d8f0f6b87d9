"""The lock in other people's denoising loops."""
