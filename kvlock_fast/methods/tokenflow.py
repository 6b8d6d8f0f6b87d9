"""TokenFlow (arXiv 2307.10373): keyframes edited together, all frames follow their attention by correspondence.

Frames are in groups of `keyframe_stride`, with a keyframe each. In each step keyframes attend to each other (extended
attention); a token p of any frame, keyframes too, takes their outputs at its nearest neighbours in its group's keyframe
and in that of the group before, found by cosine similarity of the *source's* features:

    out(p) = w out_own[nn_own(p)] + (1 - w) out_before[nn_before(p)],    w = sigmoid(d_before / (d_own + d_before))

d in frames to the middle of a group, wherever its keyframe is; the first group has its own alone. So has the public
code (tokenflow_utils.py), where the paper speaks of the keyframes before and after a frame. In the first `inject_share`
of the steps the edit's queries and keys are the source's (as the paper has by Plug-and-Play). The source's features are
those of its inversion, step by step.

Adapted from an image U-Net to video transformers: a frame is a latent frame; features are what the self-attention takes
in; extended attention is the model's own attention over space and time, of the keyframes' tokens alone, and the
source's row keeps its own attention over all frames. Where the public code draws keyframes at random in each step, here
they move on by one frame a step, so that a seed means the same as for the other methods. There is no mask in it, but
background_latents "source" goes with it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.loop.schedule import share_of_steps
from kvlock_fast.methods.attention_loop import attend, edit_with
from kvlock_fast.methods.attention_loop import why_not as why_not
from kvlock_fast.methods.job import Job


def edit(job: Job) -> Tensor:
    """See the package."""
    lock, (frames, rows, columns) = job.lock, job.task.mask.grid
    last = share_of_steps(lock.inject_share, job.solver.num_steps)
    each, stride = rows * columns, lock.keyframe_stride
    return edit_with(job, lambda k: Flow(frames, each, stride, keyframes_at(k, frames, stride), inject=k < last))


def keyframes_at(step: int, frames: int, stride: int) -> tuple[int, ...]:
    """One of every `stride` frames: the first of each at step 0, then the next of each, around and around."""
    return tuple(min(start + step % stride, frames - 1) for start in range(0, frames, stride))


@dataclass(frozen=True)
class Flow:
    """The attention of a step, a `Mixer`: tokens are `frames` times `each`, in this order.

    stride: frames in a group; keyframes: one of each group.
    """

    frames: int
    each: int
    stride: int
    keyframes: tuple[int, ...]
    inject: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        source = attend(q[:1], k[:1], v[:1])
        edits = len(q) - 1
        q, k = (x[:1].expand(edits, -1, -1, -1) if self.inject else x[1:] for x in (q, k))
        extended = attend(*(self._pick(x) for x in (q, k, v[1:]))).unflatten(1, (len(self.keyframes), self.each))
        features = F.normalize(hidden[0].float(), dim=-1).view(self.frames, self.each, -1)
        followed = [self._follow(group, extended, features) for group in range(len(self.keyframes))]
        return torch.cat([source, torch.cat(followed, dim=1)])

    def _pick(self, x: Tensor) -> Tensor:
        """The keyframes' tokens of x [R, S, H, D]."""
        return x.unflatten(1, (self.frames, self.each))[:, list(self.keyframes)].flatten(1, 2)

    def _follow(self, group: int, extended: Tensor, features: Tensor) -> Tensor:
        """The output of a group's frames [R, n * N, H, D].

        extended: the attention's output by keyframe [R, keyframes, N, H, D]; features: the source's, of length 1,
        [frames, N, C].
        """
        frames = range(group * self.stride, min((group + 1) * self.stride, self.frames))
        tokens = features[frames.start : frames.stop].flatten(0, 1)

        def nearest(which: int) -> Tensor:
            near = (tokens @ features[self.keyframes[which]].T).argmax(dim=1)
            return extended[:, which].index_select(1, near)

        own = nearest(group)
        if group == 0:
            return own
        weights = torch.tensor([self._weight(group, frame) for frame in frames]).to(own)
        weight = weights.repeat_interleave(self.each)[:, None, None]
        return weight * own + (1 - weight) * nearest(group - 1)

    def _weight(self, group: int, frame: int) -> float:
        """Weight of the group's own keyframe against the one before, by the distances to both groups' middles."""
        middle = group * self.stride + self.stride // 2
        own, before = abs(frame - middle), abs(frame - middle + self.stride)
        return 1 / (1 + math.exp(-before / (own + before)))
