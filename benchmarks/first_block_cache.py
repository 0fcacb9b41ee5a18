"""A peer: First-Block-Cache, of the package cache-dit, on diffusers' pipeline of mini.

It computes the first block, and the others where what the first changes has changed by a share
since it computed all of them last; else it adds what they changed then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from sd35_trt.mini import checkpoint_path
from sd35_trt.quality.evaluate import draw, load


def draw_cached(
    captions: Sequence[str], first_seed: int, thresholds: Sequence[tuple[float, int]],
    steps: int, device: str,
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Pictures uint8 [n, 128, 128, 3] and how many steps of each were full, for each threshold.

    Caption i is drawn alone, since one test serves a batch, from seed ``first_seed + i``.

    Args:
        thresholds: of the change, with the number of first steps that are always full.
    """
    os.environ["CACHE_DIT_LOG_LEVEL"] = "error"
    import cache_dit
    import torch

    torch.set_num_threads(1)
    results = []
    for threshold, warmup in thresholds:
        pipe = load(checkpoint_path(), device)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold,
            max_warmup_steps=warmup, enable_separate_cfg=False,
        )  # fmt: skip
        cache_dit.enable_cache(pipe, cache_config=config)
        images, full = [], []
        for number, caption in enumerate(captions):
            images.append(draw(pipe, [caption], steps=steps, first_seed=first_seed + number)[0])
            full.append(steps - len(pipe.transformer._cached_steps))
        results.append((np.stack(images), np.array(full)))
    return results


def first_block_cache(
    captions: Sequence[str], thresholds: Sequence[tuple[float, int]], steps: int, device: str,
    workers: int,
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """As :func:`draw_cached`, from seed 0, in some processes."""
    parts = np.array_split(np.arange(len(captions)), workers)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = [
            pool.submit(
                draw_cached, [captions[i] for i in part], int(part[0]), thresholds, steps, device
            )
            for part in parts
        ]
        drawn = [job.result() for job in jobs]
    return [
        (np.concatenate([d[i][0] for d in drawn]), np.concatenate([d[i][1] for d in drawn]))
        for i in range(len(thresholds))
    ]
