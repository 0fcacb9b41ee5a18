import numpy as np
import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from mini.training import batches
from sd35_trt.mini import checkpoint_path, rendering, scenes, world


def test_batched_and_single_rendering_agree():
    examples = [scenes.sample(seed) for seed in range(24)]
    table = batches.describe(examples)
    renderer = batches.SceneRenderer(torch.device("cpu"))
    pictures = renderer(torch.from_numpy(table["things"]), torch.from_numpy(table["background"]))
    drawn = ((pictures + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    exact = np.stack([rendering.render(e.scene) for e in examples]).astype(float)
    assert np.abs(drawn - exact).mean() < 0.05
    assert (np.abs(drawn - exact) > 8).mean() < 1e-4


def test_targets_are_the_specs():
    examples = [scenes.sample(seed) for seed in range(200)]
    table = batches.describe(examples)
    shapes = len(world.SHAPES)
    for row, e in enumerate(examples):
        assert table["slots"][row, :, -1].sum() == len(e.spec.objects)
        for slot, o in enumerate(e.spec.objects):
            allowed = {world.SHAPES[i] for i in np.flatnonzero(table["slots"][row, slot, :shapes])}
            assert allowed == set(o.shapes)
        stated = (table["relations"][row] < len(world.RELATIONS)).sum()
        assert stated == len(e.spec.relations)


def test_a_relation_against_the_order_is_turned_round():
    o = world.ObjectSpec()
    spec = world.Spec((o, o), ((1, "left", 0),))
    scene = world.Scene("white", ())
    table = batches.describe([scenes.Example("", spec, scene, frozenset())])
    assert world.RELATIONS[table["relations"][0, 0]] == "right"


def test_every_caption_fits_the_tokenizers():
    captions = [scenes.sample(seed, "heldout").caption for seed in range(1000)]
    for name, kind in (
        ("tokenizer", CLIPTokenizer),
        ("tokenizer_2", CLIPTokenizer),
        ("tokenizer_3", T5TokenizerFast),
    ):
        tokenizer = kind.from_pretrained(checkpoint_path() / name)
        lengths = [len(ids) for ids in tokenizer(captions).input_ids]
        assert max(lengths) <= tokenizer.model_max_length == 32
        ids = batches.tokenize(tokenizer, captions[:3])
        assert ids.shape == (3, 32)
        assert ids.dtype == np.int16
        assert (ids[:, -1] == tokenizer.pad_token_id).all()
