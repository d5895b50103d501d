"""Mathematics of one sample, on blocks; the counterpart of csrc/terms.h."""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation (Kahan): triton has no portable one."""
    e = tl.exp(x)
    near = tl.where(e == 1.0, x, (e - 1.0) * x / tl.log(tl.where(e == 1.0, 2.0, e)))
    return tl.where(e > 0.5, near, e - 1.0)


@triton.jit
def power(base, exponent):
    """base ** exponent for base in [0, 1] and exponent > 0; NaN passes."""
    positive = base > 0.0
    value = tl.exp(exponent * tl.log(tl.where(positive, base, 1.0)))
    return tl.where(positive, value, tl.where(base == base, 0.0, base))


@triton.jit
def focal_weight(nll, gamma):
    """(1 - p)^gamma at nll = -log p (Lin et al. 2017, eq. 4)."""
    return power(-expm1(-nll), gamma)


@triton.jit
def focal_slope(nll, gamma):
    """d/dnll of focal_weight(nll) * nll: (1-p)^gamma + gamma p nll (1-p)^(gamma-1), finite at p = 1."""
    miss = -expm1(-nll)
    hit = tl.exp(-nll)
    usable = (miss > 0.0) & (hit > 0.0)
    ratio = tl.where(usable, hit * nll / tl.where(usable, miss, 1.0), 0.0)
    return power(miss, gamma) * (1.0 + gamma * ratio)


@triton.jit
def two_parts(value, ACC: tl.constexpr):
    """float64 (N,) as high + low in the accumulate dtype: at 1e4 the high part alone loses 5e-4."""
    high = value.to(ACC)
    return high, (value - high.to(tl.float64)).to(ACC)


@triton.jit
def add_block(top, total, block):
    """Extends row maxima and the sums of exponentials above them, both (N,), by a block of columns."""
    # A NaN must come out of the sum; what a maximum makes of it depends on the device.
    new = tl.maximum(top, tl.max(tl.where(block == block, block, float("-inf")), 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(top - safe) + tl.sum(tl.exp(block - safe[:, None]), 1)
    return new, total


@triton.jit
def first_max(block, columns, top, best, nan):
    """Extends the column of the first maximum, `top` being the maximum so far, and of the first NaN."""
    number = tl.where(block == block, block, float("-inf"))
    block_top = tl.max(number, 1)
    at = tl.min(tl.where(number == block_top[:, None], columns[None, :], 2147483647), 1)
    nan_at = tl.min(tl.where(block == block, 2147483647, columns[None, :]), 1)
    return tl.where(block_top > top, at, best), tl.minimum(nan, nan_at)
