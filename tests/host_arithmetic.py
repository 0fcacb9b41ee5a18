"""docs/bundle-format.md's arithmetic on the host, without numpy; and its test vectors.

    python tests/host_arithmetic.py docs/host-arithmetic.json

writes the vectors anew. Values are hexadecimal floats, as C's ``%a`` and Python's ``float.hex``
have them, so that a reader in another language compares bits.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

Row = tuple[float, float, float]


def f32(value: float) -> float:
    """Rounded to float32, to nearest, ties to even."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def mt19937(seed: int) -> Any:
    """Words of 32 bits (Matsumoto and Nishimura, 1998), seeded by their ``init_genrand``."""
    state = [seed & 0xFFFFFFFF]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) & 0xFFFFFFFF)
    while True:
        for i in range(624):
            y = state[i] & 0x80000000 | state[(i + 1) % 624] & 0x7FFFFFFF
            state[i] = state[(i + 397) % 624] ^ y >> 1 ^ (0x9908B0DF if y & 1 else 0)
        for y in state:
            y ^= y >> 11
            y ^= y << 7 & 0x9D2C5680
            y ^= y << 15 & 0xEFC60000
            yield y ^ y >> 18


def normals(uniforms: list[float]) -> list[float]:
    """Box and Muller's, of 16 uniforms: eight radii, then eight angles."""
    first, second = [], []
    for u, v in zip(uniforms[:8], uniforms[8:], strict=True):
        logarithm = f32(math.log(f32(1.0 - u)))
        radius = f32(math.sqrt(f32(-2.0 * logarithm)))
        angle = f32(f32(2.0 * math.pi) * v)
        first.append(f32(radius * math.cos(angle)))
        second.append(f32(radius * math.sin(angle)))
    return first + second


def noise(count: int, seed: int) -> list[float]:
    """``count`` values, at least 16."""
    words = mt19937(seed)

    def uniforms(n: int) -> list[float]:
        return [(next(words) & 0xFFFFFF) * 2.0**-24 for _ in range(n)]

    drawn = uniforms(count)
    values = [0.0] * count
    for i in range(0, count - count % 16, 16):
        values[i : i + 16] = normals(drawn[i : i + 16])
    if count % 16:
        values[count - 16 :] = normals(uniforms(16))
    return values


def sigmas(steps: int, shift: float, timesteps: float) -> list[float]:
    def shifted(x: float) -> float:
        return shift * x / (1.0 + (shift - 1.0) * x)

    last = shifted(1.0 / timesteps)
    even = [1.0]
    if steps > 1:
        even = [1.0 + i * ((last - 1.0) / (steps - 1)) for i in range(steps - 1)] + [last]
    return [*(f32(shifted(x)) for x in even), 0.0]


def euler(s: list[float]) -> list[Row]:
    return [(b / a, 1.0 - b / a, 0.0) for a, b in itertools.pairwise(s)]


def log_snr(sigma: float) -> float:
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log((1.0 - sigma) / sigma)


def dpmpp_2m(s: list[float]) -> list[Row]:
    table = euler(s)
    for i in range(1, len(table) - 2):
        before, now, after = map(log_snr, s[i - 1 : i + 2])
        if all(map(math.isfinite, (before, now, after))):
            weight = (after - now) / (2.0 * (now - before))
            a, b, _ = table[i]
            table[i] = (a, b * (1.0 + weight), -b * weight)
    return table


def mix(noise: float, encoded: float, sigma: float) -> float:
    return f32(f32(sigma * noise) + f32(f32(1.0 - sigma) * encoded))


def vectors() -> dict[str, Any]:
    """The contents of docs/host-arithmetic.json."""

    def hexed(values: Any) -> list[str]:
        return [value.hex() for value in values]

    data: dict[str, Any] = {"noise": [], "schedules": [], "mix": []}
    for seed, count in ((0, 32), (7, 16), (42, 40), (2**32 - 1, 17), (2**40 + 3, 16)):
        data["noise"].append({"seed": seed, "count": count, "values": hexed(noise(count, seed))})
    # The last of a whole picture of 1024 x 1024: later words of the generator count.
    whole = noise(16 * 128 * 128, 1234)
    data["noise"].append({"seed": 1234, "count": len(whole), "last": hexed(whole[-16:])})
    for steps, shift in ((1, 3.0), (2, 3.0), (4, 3.0), (5, 1.0), (9, 2.5), (28, 3.0), (28, 6.1)):
        s = sigmas(steps, shift, 1000.0)
        data["schedules"].append(
            {
                "steps": steps,
                "shift": shift.hex(),
                "num_train_timesteps": 1000,
                "sigmas": hexed(s),
                "timesteps": hexed(f32(x * 1000.0) for x in s[:-1]),
                "euler": [hexed(map(f32, row)) for row in euler(s)],
                "dpmpp-2m": [hexed(map(f32, row)) for row in dpmpp_2m(s)],
            }
        )
    s = sigmas(28, 3.0, 1000.0)
    for sigma, encoded in zip(s[2::7], (0.1, -1.7, 3.3e-5, 12.0), strict=True):
        for value in noise(16, 5)[:4]:
            row = (sigma, value, f32(encoded), mix(value, f32(encoded), sigma))
            data["mix"].append(
                dict(zip(("sigma", "noise", "encoded", "latent"), hexed(row), strict=True))
            )
    return data


def main() -> None:
    rows = (f'"{key}": [\n ' + ",\n ".join(map(json.dumps, value)) + "\n]"
            for key, value in vectors().items())  # fmt: skip
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
