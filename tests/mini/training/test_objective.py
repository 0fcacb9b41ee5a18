import pytest
import torch

from mini.training import batches
from mini.training.objective import Dropout, LayoutHead, Objective, whereabouts
from sd35_trt.mini import checkpoint_path, scenes
from sd35_trt.quality import evaluate


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
    pictures = batches.SceneRenderer(torch.device("cpu"))(things, background)
    config = pipe.vae.config
    torch.manual_seed(0)
    nothing = Dropout(caption=0, t5=0, clip_l=0, clip_g=0)
    objective = Objective(pipe, nothing).eval()
    with torch.no_grad():
        latents = pipe.vae.encode(pictures).latent_dist.mean
        latents = (latents - config.shift_factor) * config.scaling_factor
        # The law of t is wide: several draws of each.
        latents = latents.repeat(6, 1, 1, 1)
        table = {name: torch.cat([column] * 6) for name, column in table.items()}
        flow = float(objective(latents, table)["flow"])
        shuffled = {name: column.roll(1, 0) for name, column in table.items()}
        wrong = float(objective(latents, shuffled)["flow"])
    assert flow < 0.2
    assert wrong > 1.2 * flow


def test_every_trained_weight_gets_a_gradient(pipe, batch):
    _, table = batch
    objective = Objective(pipe).train()
    torch.manual_seed(1)
    objective(torch.randn(6, 16, 16, 16), table)["total"].backward()
    without = {name for name, p in objective.named_parameters() if p.grad is None}
    # The last CLIP layer feeds the pooled vector alone, but that does get a gradient.
    assert not without
    objective.zero_grad(set_to_none=True)


def test_the_walk_through_the_blocks_is_the_transformers_own(pipe):
    torch.manual_seed(2)
    noisy, prompt = torch.randn(2, 16, 16, 16), torch.randn(2, 64, 256)
    pooled, timestep = torch.randn(2, 160), torch.tensor([900.0, 200.0])
    with torch.no_grad():
        velocity, tokens = Objective(pipe).denoise(noisy, prompt, pooled, timestep)
        expected = pipe.transformer(
            hidden_states=noisy,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=timestep,
        ).sample
    torch.testing.assert_close(velocity, expected)
    assert tokens.shape == (2, 64, 192)


def test_whereabouts_name_the_object_in_each_cell():
    things = torch.full((1, 3, 5), -1.0)
    things[0, 0] = torch.tensor([2, 5, 24.0, 40.0, 10.0])  # a shape's middle in column 1, row 2
    things[0, 2] = torch.tensor([7, 0, 100.0, 100.0, 17.0])
    shape, colour, way = (x.reshape(1, 8, 8, -1) for x in whereabouts(things, 8))
    assert (shape[0, 2, 1], colour[0, 2, 1]) == (2, 5)
    assert (shape[0, 6, 6], colour[0, 6, 6]) == (7, 0)
    assert (shape[0, 0, 7], colour[0, 0, 7]) == (8, 8)
    torch.testing.assert_close(way[0, 2, 1], torch.zeros(2))
    torch.testing.assert_close(way[0, 6, 6], torch.tensor([-0.25, -0.25]))
    assert 1 <= (shape == 2).sum() <= 5


def test_the_layout_head_is_judged_by_what_stands_where(batch):
    _, table = batch
    things, background = table["things"], table["background"]
    torch.manual_seed(3)
    head = LayoutHead(32)
    tokens = torch.randn(len(things), 64, 32, requires_grad=True)
    loss = head(tokens, things, background)
    loss.backward()
    assert tokens.grad.abs().sum() > 0
    optimizer = torch.optim.Adam([tokens, *head.parameters()], lr=0.03)
    for _ in range(100):
        optimizer.zero_grad()
        after = head(tokens, things, background)
        after.backward()
        optimizer.step()
    # Tokens that fit these scenes do not fit others.
    assert after < 0.3 * loss
    assert head(tokens, things.roll(1, 0), background.roll(1, 0)) > 2 * after
