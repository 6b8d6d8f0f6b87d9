"""FateZero (arXiv 2303.09535): attention maps of the source's inversion, blended into the edit's by the mask.

For query i, with M_i = 1 on the foreground, in the first `inject_share` of the steps:

    A'_i = M_i A_i + (1 - M_i) A_src,i          out = A' V

V is always the edit's own. The paper is of Stable Diffusion 1.4 and stores every map, 100 GB for 8 frames. A row of a
map times V is the source's query and keys attending to the edit's values, so here no map is made or kept: the source's
inversion rides along, and no size is too large.

Adapted: maps are those of the video transformer's self-attention over space and time; the mask is the user's, where the
paper finds one by cross-attention; cross-attention maps are left as they are, as a mask says already where words go.
"""

from functools import partial

import torch
from torch import Tensor

from kvlock_fast.loop.schedule import share_of_steps
from kvlock_fast.methods.attention_loop import Mixer, attend, edit_with
from kvlock_fast.methods.attention_loop import why_not as why_not
from kvlock_fast.methods.job import Job


def edit(job: Job) -> Tensor:
    """See the package."""
    last = share_of_steps(job.lock.inject_share, job.solver.num_steps)
    foreground = job.task.mask.tokens

    def mixer(k: int) -> Mixer:
        return partial(blend_maps, foreground=foreground if k < last else torch.ones_like(foreground))

    return edit_with(job, mixer)


def blend_maps(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, foreground: Tensor) -> Tensor:
    """As `Mixer`; foreground: bool [1, S], the queries that keep maps of their own."""
    own = attend(q, k, v)
    if foreground.all():
        return own
    kept = attend(q[:1], k[:1], v[1:])
    return torch.cat([own[:1], torch.where(foreground[..., None, None], own[1:], kept)])
