"""How fast whole denoising steps are, beside diffusers and the lock in plain torch."""
