"""What captions say reaches their spec."""

import pytest

from sd35_trt.mini.scenes import sample


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        ("that is not", lambda spec: any(len(o.colours) == 7 for o in spec.objects)),
        ("neither", lambda spec: any(len(o.colours) == 6 for o in spec.objects)),
        ("other than", lambda spec: any(len(o.shapes) == 7 for o in spec.objects)),
        ("any background but", lambda spec: len(spec.backgrounds) == 5),
    ],
)
def test_negations_reach_the_spec(words, holds):
    examples = [e for e in map(sample, range(3000)) if words in e.caption]
    if words == "that is not":  # ... red; the same words deny a size, a shape or contrast
        examples = [
            e for e in examples if " that is not red" in e.caption and " but " not in e.caption
        ]
    assert len(examples) >= 5
    assert all(holds(e.spec) for e in examples)


def test_relation_words_reach_the_spec():
    examples = [e for e in map(sample, range(4000)) if e.caption.startswith(("left of", "Left of"))]
    assert len(examples) >= 5
    assert {e.spec.relations for e in examples} == {((0, "left", 1),)}
