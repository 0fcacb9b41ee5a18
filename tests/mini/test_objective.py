import pytest
import torch

from sd35_trt.mini import batches, checkpoint_path, evaluate, scenes
from sd35_trt.mini.objective import Dropout, Objective


@pytest.fixture(scope="module")
def pipe():
    return evaluate.load(checkpoint_path())


@pytest.fixture(scope="module")
def batch(pipe):
    examples = [scenes.sample(seed) for seed in range(6)]
    table = batches.describe(examples)
    captions = [e.caption for e in examples]
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        table[name] = batches.tokenize(getattr(pipe, name), captions)
    return captions, {name: torch.from_numpy(column) for name, column in table.items()}


def test_training_encodes_prompts_as_diffusers_does(pipe, batch):
    captions, table = batch
    objective = Objective(pipe).eval()
    ids = [table[name].long() for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    with torch.no_grad():
        prompt, pooled, _ = objective.encode(ids, [torch.ones(len(captions))] * 3)
        expected, _, expected_pooled, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=32
        )
    torch.testing.assert_close(prompt, expected)
    torch.testing.assert_close(pooled, expected_pooled)


def test_a_dropped_encoder_leaves_zeros(pipe, batch):
    _, table = batch
    objective = Objective(pipe).eval()
    ids = [table[name].long() for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    ones, zeros = torch.ones(6), torch.zeros(6)
    with torch.no_grad():
        prompt, pooled, _ = objective.encode(ids, [ones, ones, zeros])
        assert (prompt[:, 32:] == 0).all()
        assert prompt[:, :32].abs().sum() > 0
        prompt, pooled, _ = objective.encode(ids, [zeros, zeros, ones])
    assert (prompt[:, :32] == 0).all()
    assert (pooled == 0).all()


def test_the_trained_weights_have_a_low_flow_loss(pipe, batch):
    _, table = batch
    things, background = table["things"], table["background"]
    pictures = batches.Renderer(torch.device("cpu"))(things, background)
    config = pipe.vae.config
    torch.manual_seed(0)
    nothing = Dropout(caption=0, t5=0, clip_l=0, clip_g=0)
    objective = Objective(pipe, nothing).eval()
    with torch.no_grad():
        latents = pipe.vae.encode(pictures).latent_dist.mean
        latents = (latents - config.shift_factor) * config.scaling_factor
        flow = float(objective(latents, table)[0])
        shuffled = {name: column.roll(1, 0) for name, column in table.items()}
        wrong = float(objective(latents, shuffled)[0])
    assert flow < 0.2
    assert wrong > 1.2 * flow


def test_every_trained_weight_gets_a_gradient(pipe, batch):
    _, table = batch
    objective = Objective(pipe).train()
    torch.manual_seed(1)
    total, _, _ = objective.loss(torch.randn(6, 16, 16, 16), table)
    total.backward()
    without = {name for name, p in objective.named_parameters() if p.grad is None}
    # The last CLIP layer feeds the pooled vector alone, but that does get a gradient.
    assert not without
    objective.zero_grad(set_to_none=True)
