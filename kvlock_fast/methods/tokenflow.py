"""TokenFlow (arXiv 2307.10373): keyframes edited together, the other frames follow their attention by correspondence.

In each step keyframes attend to each other (extended attention); a token p of another frame takes their outputs at its
nearest neighbours, found by cosine similarity of the *source's* features, in the keyframe before and the one after:

    out(p) = w out_next[nn_next(p)] + (1 - w) out_before[nn_before(p)],    w = sigmoid(d_before / (d_before + d_next))

d in frames. In the first `inject_share` of the steps the edit's queries and keys are the source's (as the paper has by
Plug-and-Play). The source's features are those of its inversion, step by step.

Adapted from an image U-Net to video transformers: a frame is a latent frame, and of `keyframe_stride` of them one is a
keyframe; features are what the self-attention takes in; extended attention is the model's own attention over space and
time, of the keyframes' tokens alone. Where the paper draws keyframes at random in each step, here they move on by one
frame a step, so that a seed means the same as for the other methods. There is no mask in it, but
background_latents "source" goes with it.
"""

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
    return edit_with(
        job, lambda k: Flow(frames, rows * columns, keyframes_at(k, frames, lock.keyframe_stride), inject=k < last)
    )


def keyframes_at(step: int, frames: int, stride: int) -> tuple[int, ...]:
    """One of every `stride` frames: the first of each at step 0, then the next of each, around and around."""
    return tuple(min(start + step % stride, frames - 1) for start in range(0, frames, stride))


@dataclass(frozen=True)
class Flow:
    """The attention of a step, a `Mixer`: tokens are `frames` times `each`, in this order."""

    frames: int
    each: int
    keyframes: tuple[int, ...]
    inject: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        source = attend(q[:1], k[:1], v[:1])
        edits = len(q) - 1
        q, k = (x[:1].expand(edits, -1, -1, -1) if self.inject else x[1:] for x in (q, k))
        extended = self._of_keyframes(attend(*(self._pick(x) for x in (q, k, v[1:]))))
        features = F.normalize(hidden[0].float(), dim=-1).view(self.frames, self.each, -1)
        followed = [self._follow(frame, extended, features) for frame in range(self.frames)]
        return torch.cat([source, torch.cat(followed, dim=1)])

    def _pick(self, x: Tensor) -> Tensor:
        """The keyframes' tokens of x [R, S, H, D]."""
        return x.unflatten(1, (self.frames, self.each))[:, list(self.keyframes)].flatten(1, 2)

    def _of_keyframes(self, out: Tensor) -> dict[int, Tensor]:
        """The attention's output by keyframe, [R, N, H, D] each."""
        return dict(zip(self.keyframes, out.split(self.each, dim=1), strict=True))

    def _follow(self, frame: int, extended: dict[int, Tensor], features: Tensor) -> Tensor:
        """The output of a frame; features: the source's, of length 1, [frames, N, C]."""
        if frame in extended:
            return extended[frame]
        around = [max((key for key in self.keyframes if key < frame), default=-1)]
        around += [min((key for key in self.keyframes if key > frame), default=-1)]
        taken = {
            key: extended[key].index_select(1, (features[frame] @ features[key].T).argmax(dim=1))
            for key in around
            if key >= 0
        }
        if len(taken) == 1:
            return next(iter(taken.values()))
        before, after = around
        distance = torch.tensor((frame - before) / (after - before))
        weight = distance.sigmoid().item()
        return weight * taken[after] + (1 - weight) * taken[before]
