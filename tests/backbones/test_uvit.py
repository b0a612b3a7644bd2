"""aMUSEd's network against diffusers' at random weights: logits, loss, gradients, and a draw step by step."""

import re
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones import SequenceLayout, UViT
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.samplers import MaskGITSampler
from discrete_lit.samplers.categorical import draw_categorical

IDS, WORDS, TEXT = 7, 5, 6
# diffusers embeds them in float32, whose sines of large numbers are wrong in the fifth digit.
MICRO = (2.0, 1.5, 0.25, 0.0, 6.0)
LAYOUT = SequenceLayout(IDS, (4, 6), num_classes=1, attention="bidirectional", mask_token=True)

# diffusers' names, then ours.
NAMES = (
    (r"embed\.embeddings", "table"),
    (r"embed\.layer_norm", "table_norm"),
    (r"embed\.conv", "table_out"),
    (r"encoder_proj_layer_norm", "text_norm"),
    (r"encoder_proj", "text_embedding"),
    (r"cond_embed\.linear_(\d)", lambda found: f"pooled_embedding.{2 * int(found[1]) - 2}"),
    (r"down_block\.downsample\.conv", "halving"),
    (r"down_block\.downsample\.norm", "halving_norm"),
    (r"up_block\.upsample\.conv", "doubling"),
    (r"up_block\.upsample\.norm", "doubling_norm"),
    (r"down_block", "before"),
    (r"up_block", "behind"),
    (r"res_blocks", "convolutions"),
    (r"channelwise_linear_1", "expand"),
    (r"channelwise_linear_2", "contract"),
    (r"channelwise_norm\.gamma", "response_gain"),
    (r"channelwise_norm\.beta", "response_offset"),
    (r"cond_embeds_mapper", "modulation"),
    (r"attention_blocks\.(\d)\.norm(\d)", lambda found: f"attentions.{found[1]}.norms.{int(found[2]) - 1}"),
    (r"attention_blocks\.(\d)\.attn(\d)", lambda found: f"attentions.{found[1]}.attentions.{int(found[2]) - 1}"),
    (r"attention_blocks\.(\d)\.kv_mapper", r"attentions.\1.text_in"),
    (r"project_to_hidden_norm", "inner_norm"),
    (r"project_to_hidden", "inner"),
    (r"project_from_hidden_norm", "outer_norm"),
    (r"project_from_hidden", "outer"),
    (r"transformer_layers\.(\d)\.norm(\d)\.linear", lambda found: _norm_of(found, "modulation")),
    (r"transformer_layers\.(\d)\.norm(\d)\.norm", lambda found: _norm_of(found, "norm")),
    (r"transformer_layers\.(\d)\.attn1", r"blocks.\1.attention"),
    (r"transformer_layers\.(\d)\.attn2", r"blocks.\1.text_attention"),
    (r"transformer_layers\.(\d)\.ff\.net\.0\.proj", r"blocks.\1.expand"),
    (r"transformer_layers\.(\d)\.ff\.net\.2", r"blocks.\1.contract"),
    (r"mlm_layer\.conv1", "head_in"),
    (r"mlm_layer\.layer_norm", "head_norm"),
    (r"mlm_layer\.conv2", "head"),
    (r"to_q", "query"),
    (r"to_out\.0", "out"),
)


def _norm_of(found: re.Match[str], part: str) -> str:
    return f"blocks.{found[1]}.norms.{int(found[2]) - 1}.{part}"


def twins(*, downsampled: bool, bias: bool, conv_width: int) -> tuple[Any, UViT]:
    """diffusers' network at random weights, and ours with the same."""
    from diffusers import UVit2DModel

    torch.manual_seed(0)
    theirs = UVit2DModel(
        hidden_size=16,
        use_bias=bias,
        cond_embed_dim=TEXT,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=TEXT,
        vocab_size=IDS + 1,
        codebook_size=IDS,
        in_channels=10,
        block_out_channels=conv_width,
        num_res_blocks=2,
        downsample=downsampled,
        upsample=downsampled,
        block_num_heads=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
    )
    randomise(theirs, 0.4).double().eval()
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_hidden": 20, "embedding_width": 10, "conv_width": conv_width}
    ours = UViT(
        LAYOUT,
        **sizes,
        context_dim=TEXT,
        conv_blocks=2,
        conv_heads=4,
        downsampled=downsampled,
        micro_conditions=MICRO,
        micro_waves=4,
        bias=bias,
    )
    state: dict[str, Tensor] = {}
    for name, value in theirs.state_dict().items():
        if "Conv2d_0" in name:
            continue  # the downsampling's convolution, under its other name
        for pattern, ours_of_it in NAMES:
            name = re.sub(rf"(?<![a-z_]){pattern}", ours_of_it, name)
        state[name] = value
    for name in [name for name in state if name.endswith(("to_k.weight", "to_k.bias"))]:
        both = torch.cat((state.pop(name), state.pop(name.replace("to_k", "to_v"))))
        state[name.replace("to_k", "key_value")] = both
    own = ours.state_dict()
    state["no_text"] = own["no_text"]
    ours.load_state_dict({name: value.reshape(own[name].shape) for name, value in state.items()})
    return theirs, ours.double().eval()


def given(count: int) -> tuple[Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, IDS + 1, (count, 24), generator=generator)
    context = torch.randn(count, 1 + WORDS, TEXT, generator=generator, dtype=torch.float64)
    return tokens, Condition(labels=torch.zeros(count, dtype=torch.int64), context=context)


def assert_like(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Equal to a share of the largest number; what is left is of the sines in float32."""
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.detach().abs().max()))


@pytest.fixture
def double_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the norms of diffusers compute in the type of their input; they square in float32, whatever that is."""
    from diffusers.models.normalization import RMSNorm

    monkeypatch.setattr(RMSNorm, "forward", lambda norm, x: F.rms_norm(x, tuple(norm.dim), norm.weight, norm.eps))


def logits_of(theirs: nn.Module, tokens: Tensor, condition: Condition) -> Tensor:
    context = condition.context
    assert context is not None
    micro = torch.tensor(MICRO, dtype=torch.float64).expand(len(tokens), -1)
    return theirs(tokens.view(-1, 4, 6), context[:, 1:], context[:, 0], micro).flatten(2).transpose(1, 2)


@pytest.mark.parity
@pytest.mark.usefixtures("double_norms")
@pytest.mark.parametrize("switches", [(False, False, 16), (True, True, 8)])
def test_logits_loss_and_gradients_are_those_of_diffusers(switches: tuple[bool, bool, int]) -> None:
    downsampled, bias, conv_width = switches
    theirs, ours = twins(downsampled=downsampled, bias=bias, conv_width=conv_width)
    tokens, condition = given(2)
    expected, found = logits_of(theirs, tokens, condition), ours(tokens, condition)
    assert_like(found, expected)
    masked = (tokens == IDS).flatten().nonzero()[:, 0]
    assert len(masked)
    torch.testing.assert_close(ours(tokens, condition, predicted=masked), found.flatten(0, 1)[masked])
    target = torch.arange(len(masked)) % IDS
    losses = [F.cross_entropy(each.flatten(0, 1)[masked], target) for each in (found, expected)]
    assert_like(*losses)
    for loss in losses:
        loss.backward()
    pairs = (
        (ours.table, theirs.embed.embeddings),
        (ours.before.convolutions[0].depthwise, theirs.down_block.res_blocks[0].depthwise),
        (ours.blocks[1].expand, theirs.transformer_layers[1].ff.net[0].proj),
        (ours.pooled_embedding[0], theirs.cond_embed.linear_1),
    )
    for mine, other in pairs:
        assert float(other.weight.grad.abs().max()) > 1e-4
        assert_like(mine.weight.grad, other.weight.grad.reshape(mine.weight.shape), share=1e-4)


@pytest.mark.parity
@pytest.mark.usefixtures("double_norms")
@torch.no_grad()
def test_every_step_of_a_draw_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same noise, which the scheduler is given in the place of its own."""
    from diffusers import AmusedScheduler
    from diffusers.schedulers import scheduling_amused

    theirs, ours = twins(downsampled=True, bias=False, conv_width=16)
    _, condition = given(3)
    steps, noise, random = 5, 2.0, CounterRandom(0, torch.arange(3))
    drawn = MaskGITSampler(steps=steps, choice_temperature=noise)(ours, condition, random, trace=True)
    scheduler = AmusedScheduler(mask_token_id=IDS, masking_schedule="cosine")
    scheduler.set_timesteps(steps, temperature=(noise * (1 - 1 / steps), 0))
    sample = torch.full((3, 24), IDS)
    for step, time in enumerate(scheduler.timesteps):
        uniforms = random.uniform(Purpose.TOKEN, 24, step)
        gumbel = random.gumbel(Purpose.CONFIDENCE, 24, step)
        monkeypatch.setattr(
            torch,
            "multinomial",
            lambda law, count, generator, u=uniforms: draw_categorical(law.log(), u.flatten())[:, None],
        )
        monkeypatch.setattr(scheduling_amused, "gumbel_noise", lambda like, generator, g=gumbel: g)
        sample = scheduler.step(logits_of(theirs, sample, condition), time, sample).prev_sample
        assert drawn.trace is not None and torch.equal(sample, drawn.trace[step].tokens), step


def small(layout: SequenceLayout = LAYOUT, **changes: Any) -> UViT:
    sizes = {"width": 8, "depth": 1, "heads": 2, "mlp_hidden": 12, "embedding_width": 6, "conv_width": 8}
    settings = {**sizes, "context_dim": TEXT, "conv_blocks": 1, "conv_heads": 2, "micro_waves": 2, **changes}
    return randomise(UViT(layout, **settings), 0.4).double()


def test_words_that_are_not_valid_are_not_seen_and_no_text_is_its_own() -> None:
    network = small().eval()
    tokens, condition = given(2)
    assert condition.context is not None
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    masked = Condition(labels=condition.labels, context=condition.context, context_mask=mask)
    found = network(tokens, masked)
    shorter = Condition(labels=condition.labels, context=condition.context[:, :4])
    torch.testing.assert_close(found[0], network(tokens, shorter)[0])
    other = torch.where(mask[..., None], condition.context, 9.0)
    torch.testing.assert_close(network(tokens, Condition(**{**vars(masked), "context": other})), found)
    assert (found[1] - network(tokens, condition)[1]).abs().max() > 1e-3


def test_every_parameter_learns_and_checkpointing_changes_nothing() -> None:
    tokens, condition = given(4)
    mask = torch.ones(4, 1 + WORDS, dtype=torch.bool)
    mask[0] = False
    condition = Condition(labels=condition.labels, context=condition.context, context_mask=mask)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        network = small(downsampled=True, activation_checkpointing=checkpointed).train()
        network(tokens, condition).square().mean().backward()
        still = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
        assert not still
        gradients.append(torch.cat([value.grad.flatten() for value in network.parameters() if value.grad is not None]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "layout, changes, message",
    [
        (SequenceLayout(7, (4,), num_classes=1, attention="bidirectional"), {}, "a grid of two dimensions"),
        (SequenceLayout(7, (4, 6), num_classes=1, attention="causal"), {}, "a grid of two dimensions"),
        (SequenceLayout(7, (4, 5), num_classes=1, attention="bidirectional"), {"downsampled": True}, "halves both"),
        (LAYOUT, {"heads": 3}, "heads must divide the width"),
    ],
)
def test_settings_that_do_not_fit_are_refused(layout: SequenceLayout, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(layout, **changes)


def test_input_that_does_not_fit_is_refused() -> None:
    network, (tokens, condition) = small(), given(2)
    with pytest.raises(ValueError, match="has 24 ids, got 23"):
        network(tokens[:, 1:], condition)
    with pytest.raises(ValueError, match="the pooled text, then the text's vectors"):
        network(tokens, Condition(labels=condition.labels, context=torch.zeros(2, 1, TEXT)))
    with pytest.raises(ValueError, match="attends to vectors"):
        network(tokens, condition.labels)
