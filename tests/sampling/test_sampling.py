"""Choosing tokens, guidance, and images that do not depend on the batch they are drawn in."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from transformers import JanusForConditionalGeneration

from vce_ray.config import SamplingConfig
from vce_ray.models.adapter import add_lora, merge_adapter
from vce_ray.models.janus import Janus
from vce_ray.models.load import load_model
from vce_ray.sampling import draw
from vce_ray.sampling.choose import choose, guide
from vce_ray.sampling.decoder import decoder_of
from vce_ray.sampling.noise import gumbel_noise
from vce_ray.sampling.rolling import RollingBatch

PROMPTS = ["a deer", "a cat in the style of openmoji on a blue background", "an owl on a red background", "key"]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(2)
    return load_model()


def test_choose_by_hand():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    noise = gumbel_noise(torch.tensor([9]), 0, 3)
    assert choose(logits, noise, SamplingConfig(temperature=0)).tolist() == [1]

    def drawn(**settings) -> set[int]:
        sampling = SamplingConfig(temperature=5.0, **settings)  # probabilities 0.27, 0.40, 0.33
        return {int(choose(logits, gumbel_noise(torch.tensor([seed]), 0, 3), sampling)) for seed in range(200)}

    assert drawn() == {0, 1, 2}
    assert drawn(top_k=1) == {1}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_p=0.35) == {1}
    assert drawn(top_p=0.45) == {1, 2}
    assert drawn(top_p=0.75) == {0, 1, 2}
    assert drawn(top_k=2, top_p=0.5) == {1}  # it has 0.55 of the two that top_k leaves


def test_guidance_by_hand():
    conditional, unconditional = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert guide(conditional, unconditional, 1.0).tolist() == [[2.0, 0.0]]
    assert guide(conditional, unconditional, 3.0).tolist() == [[4.0, -2.0]]


def test_a_sample_is_the_same_in_every_batch(model):
    prompts, seeds = PROMPTS * 4, list(range(16))
    together = draw(model, prompts, seeds, SamplingConfig(batch_size=16))
    alone = draw(model, prompts[:4], seeds[:4], SamplingConfig(batch_size=1))
    reverse = draw(model, prompts[::-1], seeds[::-1], SamplingConfig(batch_size=5))
    assert torch.equal(together[:4], alone)
    assert torch.equal(together, reverse.flip(0))
    assert not torch.equal(together[0], draw(model, prompts[:1], [99], SamplingConfig())[0])


def test_the_next_drawing_sees_changed_weights():
    model, settings = load_model(), SamplingConfig(temperature=0, guidance_scale=2)
    before = draw(model, PROMPTS, [0] * 4, settings)
    add_lora(model.net, rank=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    lora = draw(model, PROMPTS, [0] * 4, settings)
    merge_adapter(model.net)
    assert not torch.equal(lora, before)
    assert torch.equal(draw(model, PROMPTS, [0] * 4, settings), lora)
    with torch.no_grad():
        for parameter in model.net.model.language_model.layers.parameters():
            parameter.mul_(1.5)  # in place, as an optimizer does
    assert not torch.equal(draw(model, PROMPTS, [0] * 4, settings), lora)


def test_greedy_tokens_equal_those_of_transformers(model):
    prompts = PROMPTS[:3]
    ours = draw(model, prompts, [0] * 3, SamplingConfig(temperature=0, guidance_scale=4))
    inputs = model.processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
    theirs = model.net.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=4)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (8, 2), (4, 1)])
def test_greedy_tokens_of_other_shapes_equal_those_of_transformers(model, heads: int, key_value_heads: int):
    config = copy.deepcopy(model.net.config)
    config.text_config.num_hidden_layers = 2
    config.text_config.num_attention_heads = heads
    config.text_config.num_key_value_heads = key_value_heads
    config.text_config.head_dim = config.text_config.hidden_size // heads
    config.text_config.initializer_range = 0.2  # peaked logits: rounding must not decide between two tokens
    torch.manual_seed(0)
    net: Any = JanusForConditionalGeneration(config).eval()
    net.generation_config = model.net.generation_config
    small = Janus(net, model.processor, revision="random")
    ours = draw(small, PROMPTS[:3], [0] * 3, SamplingConfig(temperature=0, guidance_scale=2))
    inputs = model.processor(text=PROMPTS[:3], generation_mode="image", padding=True, return_tensors="pt")
    theirs = net.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=2)
    assert torch.equal(ours, theirs)
    assert len(ours.unique()) > 10


def test_decoding_gives_the_logits_of_the_teacher_forced_pass(model):
    batch = model.encode_prompts(PROMPTS)
    tokens = torch.randint(0, model.image_vocab_size, (4, 64), generator=torch.Generator().manual_seed(1))
    lengths = batch.mask_BP.sum(1)
    assert len(lengths.unique()) > 1
    embeds = torch.stack([row.roll(n, 0) for row, n in zip(batch.embeds_BPE, lengths.tolist(), strict=True)])
    decoder_of(model).keep([])
    hidden = [decoder_of(model).join(embeds, lengths, batch.first_B, torch.arange(4), 63)]
    hidden += [decoder_of(model).step(model.image_embeddings_VE[tokens[:, t]]) for t in range(63)]
    with torch.no_grad():
        stepped = model.image_head(torch.stack(hidden, dim=1))
        at_once = model.image_logits(batch, tokens)
    # 1e-4 plus float32 rounding of logits that reach 100: there, either pass is 1e-4 off from float64
    assert (stepped - at_once).abs().max() < 1e-4 + 1e-6 * at_once.abs().max()


def test_drawn_log_probs_equal_the_teacher_forced_pass(model):
    """Without guidance, the sampler sees the distribution that training scores."""
    prompts = PROMPTS[:3]
    batch = model.encode_prompts(prompts)
    greedy = draw(model, prompts, [0] * 3, SamplingConfig(temperature=0, guidance_scale=1))
    logits = model.image_logits(batch, greedy)
    assert torch.equal(logits.argmax(-1), greedy)
    unconditional = model.image_logits(batch, greedy, conditional=False)
    guided = draw(model, prompts, [0] * 3, SamplingConfig(temperature=0, guidance_scale=3))
    pair = (model.image_logits(batch, guided), model.image_logits(batch, guided, conditional=False))
    assert torch.equal(guide(*pair, 3.0).argmax(-1), guided)
    assert not torch.allclose(logits, unconditional, atol=0.1)


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        (["a deer"], [1, 2], "1 prompts but 2 seeds"),
        (["  "], [1], "empty prompt"),
        (["x" * 3000], [1], "3000 characters"),
    ],
)
def test_bad_input_is_rejected(model, prompts, seeds, message):
    with pytest.raises(ValueError, match=message):
        draw(model, prompts, seeds, SamplingConfig())


def test_a_decoder_is_kept_with_its_model_and_freed_with_it():
    model = load_model()
    draw(model, PROMPTS, [0] * 4, SamplingConfig())
    decoder = decoder_of(model)
    assert decoder.cache_bytes > 0 and decoder_of(model) is decoder
    freed = weakref.ref(decoder)
    del model, decoder
    assert freed() is None, "at once, without the garbage collector"


def test_no_prompts_draw_nothing(model):
    assert draw(model, [], [], SamplingConfig()).shape == (0, model.num_image_tokens)


def test_an_8_bit_cache_takes_a_quarter_and_draws_almost_the_same(model):
    settings = SamplingConfig(temperature=0, guidance_scale=2)
    decoder_of(model).release()
    plain = draw(model, PROMPTS, [0] * 4, settings)
    plain_bytes = decoder_of(model).cache_bytes
    eight = draw(model, PROMPTS, [0] * 4, settings.model_copy(update={"kv_cache_dtype": "fp8"}))
    assert decoder_of(model).cache_bytes == plain_bytes / 4, "of float32"
    assert torch.equal(draw(model, PROMPTS, [0] * 4, settings), plain), "the next batch is as before"
    assert not torch.equal(eight, plain)
    with torch.no_grad():
        logits = model.image_logits(model.encode_prompts(PROMPTS), eight)
    picked = logits.gather(-1, eight[..., None])[..., 0] - logits.amax(-1)
    assert picked.mean() > -0.5, "to the float32 model, its greedy tokens are nearly the most likely ones"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_that_join_and_leave_at_any_step_are_the_same(model, guidance: float):
    settings = SamplingConfig(batch_size=4, guidance_scale=guidance)
    longest = "a cat and a house in the style of openmoji on a blue background"  # needs more slots than there are
    requests = {
        "a": (PROMPTS[0], 1),
        "b": (PROMPTS[3], 2),
        "c": (longest, 3),
        "d": (PROMPTS[2], 4),
        "e": (PROMPTS[0], 5),
    }
    decoder_of(model).release()
    batch, drawn = RollingBatch(model, settings), {}

    def join(*names: str) -> int:
        return batch.join(names, [requests[name][0] for name in names], [requests[name][1] for name in names])

    assert join("a", "b") == 2
    assert batch.advance(20) == []
    assert join("c") == 1
    assert batch.advance(7) == []
    batch.drop(["a", "unknown"])  # the last image moves into its rows
    assert join("d", "e", "a") == 2, "four at most"
    rounds = 0
    while len(batch):
        drawn |= batch.advance(16)
        rounds += 1
    assert list(drawn) == ["b", "c", "d", "e"] and rounds == 6
    drawn_prompts, seeds = zip(*(requests[name] for name in drawn))
    assert torch.equal(torch.stack(list(drawn.values())), draw(model, list(drawn_prompts), list(seeds), settings))
