"""PyTorch's CPU random normals in numpy, so that a seed means the same picture in both.

Specified to the bit in docs/bundle-format.md, for other languages.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 16


def _uniform(generator: np.random.RandomState, count: int) -> np.ndarray:
    """``count`` floats in [0, 1): the low 24 bits of one 32-bit word each."""
    words = generator.randint(0, 1 << 32, size=count, dtype=np.uint32)
    return (words & np.uint32((1 << 24) - 1)).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Normals from uniforms in blocks of 16: eight radii, then eight angles."""
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    # PyTorch rounds each of these to float32; the angle's rounding alone moves a value by 1e-6.
    # Functions are taken in float64: numpy's float32 logarithm is not libm's in one value of ten.
    logarithm = np.log((np.float32(1.0) - blocks[:, 0]).astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2.0) * logarithm).astype(np.float64)
    angle = (np.float32(2.0 * np.pi) * blocks[:, 1]).astype(np.float64)
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normal.reshape(-1).astype(np.float32)


def randn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normals equal to PyTorch's CPU generator to 1e-6.

    Follows ``normal_fill`` of aten/src/ATen/native/cpu/DistributionTemplates.h, which PyTorch uses
    from 16 values on: MT19937, Box-Muller in blocks of 16, the last 16 values drawn anew when the
    count is no multiple of 16.

    Args:
        shape: at least 16 values in all.
        seed: as for ``torch.Generator("cpu").manual_seed``; the low 32 bits count.

    Returns:
        float32 array, as ``torch.randn(shape, generator=…)``.

    Raises:
        ValueError: fewer than 16 values.
    """
    count = int(np.prod(shape))
    if count < _BLOCK:
        raise ValueError(f"randn needs at least {_BLOCK} values, not {count}")
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    uniform = _uniform(generator, count)
    values = np.empty(count, np.float32)
    whole = count - count % _BLOCK
    values[:whole] = _box_muller(uniform[:whole])
    if whole != count:
        values[-_BLOCK:] = _box_muller(_uniform(generator, _BLOCK))
    return values.reshape(shape)
