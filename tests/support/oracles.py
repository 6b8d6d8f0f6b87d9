"""Independent fp64 references for `kvlock_fast.ops`, in numpy and plain loops: what the formulas say, nothing fast.

Arguments are torch tensors; results are numpy arrays. A token or element whose weight is zero is never read, so
NaN planted there shows up in an implementation that multiplies by zero, and never here.
"""

import math

import numpy as np
import torch


def f64(x):
    return x.detach().cpu().double().numpy()


def token_grid(frames, height, width, temporal_stride, spatial_stride, patch_size, causal):
    """Tokens along (t, h, w); a partial group, cell or patch at the end counts as one."""
    latent_frames = 1 + latent_frame(frames - 1, temporal_stride, causal)
    latent = latent_frames, math.ceil(height / spatial_stride), math.ceil(width / spatial_stride)
    return tuple(math.ceil(size / patch) for size, patch in zip(latent, patch_size, strict=True))


def latent_frame(frame, temporal_stride, causal):
    """Causal: frame 0 alone is latent frame 0; latent frame i >= 1 covers frames stride*(i-1)+1 .. stride*i."""
    return math.ceil(frame / temporal_stride) if causal else frame // temporal_stride


def token_mask(mask, *, temporal_stride=4, spatial_stride=8, patch_size=(1, 2, 2), causal=True):
    """Marks, pixel by pixel, the one token each foreground pixel lies under."""
    batch = f64(mask).astype(bool)
    if batch.ndim == 3:
        batch = batch[None]
    grid = token_grid(*batch.shape[1:], temporal_stride, spatial_stride, patch_size, causal)
    tokens = np.zeros((len(batch), *grid), dtype=bool)
    for b, frame, y, x in np.argwhere(batch):
        t = latent_frame(int(frame), temporal_stride, causal) // patch_size[0]
        tokens[b, t, y // spatial_stride // patch_size[1], x // spatial_stride // patch_size[2]] = True
    return tokens.reshape(len(batch), -1)


def blended(new, ref, foreground, alpha):
    """m new + (1 - m) (alpha ref + (1 - alpha) new), token by token, without reading what has no weight."""
    out = f64(new).copy()
    ref, foreground = f64(ref), foreground.cpu().numpy()
    for b in range(out.shape[0]):
        a = float(alpha[b]) if isinstance(alpha, torch.Tensor) else float(alpha)
        fg = foreground[b if len(foreground) > 1 else 0]
        source = ref[b if len(ref) > 1 else 0]
        for s in np.flatnonzero(~fg):
            if a == 1.0:
                out[b, s] = source[s]
            elif a != 0.0:
                out[b, s] = a * source[s] + (1.0 - a) * out[b, s]
    return out


def locked_attention(q, k, v, k_ref, v_ref, foreground, alpha, scale=None):
    """Attention with blended K and V."""
    return attention(q, blended(k, k_ref, foreground, alpha), blended(v, v_ref, foreground, alpha), scale)


def attention(q, k, v, scale=None):
    """softmax(q K^T scale) V, one (sample, head) at a time."""
    q, k, v = (x if isinstance(x, np.ndarray) else f64(x) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = np.empty(q.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            logits = q[b, :, h] @ k[b, :, h].T * scale
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            out[b, :, h] = weights / weights.sum(axis=-1, keepdims=True) @ v[b, :, h]
    return out


def eager_locked_attention(q, k, v, k_ref, v_ref, foreground, alpha, scale=None):
    """What a user would write in q's own dtype: the yardstick for half-precision accuracy."""
    q, k, v, k_ref, v_ref, foreground = (x.cpu() for x in (q, k, v, k_ref, v_ref, foreground))
    if isinstance(alpha, torch.Tensor):
        alpha = alpha.cpu().to(k.dtype)[:, None, None, None]
    fg = foreground[:, :, None, None]

    def blend(new, ref):
        return torch.where(fg, new, alpha * ref.to(new.dtype) + (1 - alpha) * new)

    return eager_attention(q, blend(k, k_ref), blend(v, v_ref), scale)


def eager_attention(q, k, v, scale=None):
    """softmax(q K^T scale) V in q's own dtype."""
    q, k, v = (x.cpu().transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale), dim=-1)
    return (weights @ v).transpose(1, 2)


def cfg_projection(cond, uncond, eps=1e-8):
    """<c, u> / (|u|^2 + eps) per sample."""
    pairs = zip(f64(cond), f64(uncond), strict=True)
    return np.array([(c * u).sum() / ((u * u).sum() + eps) for c, u in pairs])


def per_sample(value, like):
    """A float, or [B] in front of the trailing dimensions of `like`."""
    return f64(value).reshape(-1, *[1] * (like.ndim - 1)) if isinstance(value, torch.Tensor) else float(value)


def guided_prediction(cond, uncond, omega, s_star):
    """s u + omega (c - s u), and the sum of the terms' magnitudes (what rounding errors scale with)."""
    c, u = f64(cond), f64(uncond)
    omega, projected = per_sample(omega, c), per_sample(s_star, c) * u
    return projected + omega * (c - projected), abs(projected) + abs(omega) * (abs(c) + abs(projected))


def windowed_variance(history, foreground, reduction="elements"):
    """Unbiased variance over the window per element, then the mean over every channel of foreground positions.

    reduction "mean": the mean of each prediction first, then the variance of these.
    """
    history, foreground = f64(history), foreground.cpu().numpy()
    result = []
    for b in range(history.shape[1]):
        inside = history[:, b][:, :, foreground[b if len(foreground) > 1 else 0]]
        if reduction == "mean":
            inside = np.array([x.mean() for x in inside])
        result.append((np.square(inside - inside.mean(axis=0)).sum(axis=0) / (len(inside) - 1)).mean())
    return np.array(result)


def sqnr_db(x, decoded):
    """Signal power over error power; infinite where nothing was lost."""
    signal, error = np.square(f64(x)).sum(), np.square(f64(x) - f64(decoded)).sum()
    return math.inf if error == 0 else 10 * math.log10(signal / error)


def check_as_good_as_eager(got, eager, truth, summed=0.0):
    """No further from fp64 than same-dtype eager, plus one rounding to the output's dtype.

    summed: the largest magnitude that the results are weighted means of, where weights are rounded too. Means of
    opposite signs are smaller than that, and eager's error of a few of them can be small by chance.
    """
    rounding = torch.finfo(got.dtype).eps / 2 * max(abs(truth).max(initial=0), summed) + 1e-6
    error, allowed = (abs(f64(x) - truth).max(initial=0) for x in (got, eager))
    assert error <= allowed + rounding, f"error {error:.3e}, eager's {allowed:.3e} plus one rounding {rounding:.3e}"
