"""Examples by seed, and their splits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35_trt.mini.scenes import SPLITS, sample, split_of

seeds = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(SPLITS))
def test_a_seed_gives_one_example_of_its_split(seed, split):
    example = sample(seed, split)
    assert example == sample(seed, split)
    assert split_of(example.spec) == split


def test_splits_are_disjoint_and_both_hold_every_kind_of_caption():
    specs, tags = {}, {}
    for split in SPLITS:
        examples = [sample(seed, split) for seed in range(1500)]
        specs[split] = {(e.spec.objects, e.spec.relations) for e in examples}
        tags[split] = set().union(*(e.tags for e in examples))
    assert not specs["train"] & specs["heldout"]
    kinds = {"single", "count", "pair", "trio", "relation", "negation", "nested"}
    assert tags["train"] == tags["heldout"] == kinds


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        sample(0, "test")
