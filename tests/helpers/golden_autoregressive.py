"""What our generators of ids in turn give for the golden cases that also train: SEED-Voken's and BAR's.

Losses and gradients are of eval mode, as the cases have them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from discrete_lit.backbones.embeddings import rotate
from discrete_lit.core.random import Purpose
from discrete_lit.samplers import BARSampler, OpenMAGVIT2Sampler, RandARSampler
from discrete_lit.samplers.raster import SubTokenSettings
from discrete_lit.tokenizers.quantizers import LookupFreeQuantizer
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_generators import greedy, guided, null, with_and_without_class
from helpers.golden_latents import gradients

TOLERANCE = 2e-5
NO_PLACE = {"bar": {"condition_ids": "classes have a table of their own, and ids of their own"}}
COMPARED: Compared = {}

# Our parameter whose gradient is a published one's, and what makes theirs of it.
Of = tuple[str, Callable[[Tensor], Tensor]]


def as_it_is(grad: Tensor) -> Tensor:
    return grad


def chunks_of(*order: int) -> Callable[[Tensor], Tensor]:
    """Chunk i of the published tensor is chunk `order[i]` of ours."""
    return lambda grad: torch.cat([grad.chunk(len(order))[number] for number in order])


def grads(generator: Any, loss: Tensor, named: Mapping[str, str | Of]) -> Tensors:
    """The gradients of a loss by published names."""
    made: Tensors = {}
    with gradients(generator.backbone):
        loss.backward()
        parameters = dict(generator.backbone.named_parameters())
        for theirs, ours in named.items():
            name, make = (ours, as_it_is) if isinstance(ours, str) else ours
            made[f"grad.{theirs}"] = make(parameters[name].grad).clone()
    return made


def open_magvit2_ids(generator: Any, pre: Tensor, post: Tensor) -> Tensor:
    return generator.backbone.place_head.sub_tokens.join(torch.stack((pre, post), dim=-1))


def sub_token_logits(generator: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """Logits of every sub-token of every position, the sub-tokens before it given."""
    head, sub_tokens = generator.backbone.place_head, generator.backbone.place_head.sub_tokens.split(ids)
    hidden = generator.backbone(ids[:, :-1], labels)
    return [head.sub_token_logits(hidden, sub_tokens[..., :number]) for number in range(len(head.sub_tokens))]


PARTS = ("pre", "post")


def open_magvit2_passes(generator: Any, case: Case) -> Tensors:
    labels, ids = case.inputs["y"][:, 0], open_magvit2_ids(generator, case.inputs["pre"], case.inputs["post"])
    made: Tensors = {}
    for suffix, label in (("", labels), ("_null", null(generator, labels))):
        for part, logits in zip(PARTS, sub_token_logits(generator, ids, label), strict=True):
            made[f"logits_{part}{suffix}"] = logits
    return made


def open_magvit2_ar(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    labels, ids = inputs["y"][:, 0], open_magvit2_ids(generator, inputs["pre"], inputs["post"])
    made = open_magvit2_passes(generator, case)
    for part in PARTS:
        logits = made[f"logits_{part}"].flatten(0, 1)
        made[f"loss_{part}"] = torch.nn.functional.cross_entropy(logits, inputs[part].flatten())[None]
    with torch.enable_grad():
        loss, _ = generator.loss(generator.to_grid(ids), labels)
        made["loss"] = loss.detach()[None]
        query_key_value = "attention.query_key_value.weight"
        made |= grads(
            generator,
            loss,
            {
                "pre_emb.weight": "token_embedding.tables.0.weight",
                "post_emb.weight": "token_embedding.tables.1.weight",
                "factorized_blocks.0.attention.wqkv.weight": f"place_head.blocks.0.{query_key_value}",
                "spatial_blocks.0.attention.wqkv.weight": f"blocks.0.{query_key_value}",
            },
        )
    for name in ("greedy_cfg", "greedy_nocfg"):
        # The reference does not guide at 0.
        scales = [float(case.read(f"{name}_pre", r"cfg_scale=\[(\S+), (\S+)\]")[number]) or 1.0 for number in (1, 2)]
        sampler = OpenMAGVIT2Sampler([SubTokenSettings(guidance_scale=scale, top_k=1) for scale in scales])
        drawn = generator.sample(labels, sampler).flatten(1)
        parts = generator.backbone.place_head.sub_tokens.split(drawn).unbind(dim=-1)
        made |= {f"{name}_{part}": value for part, value in zip(PARTS, parts, strict=True)}
        if name == "greedy_cfg":
            with_class, without = (
                sub_token_logits(generator, drawn, label) for label in (labels, null(generator, labels))
            )
            for number, part in enumerate(PARTS):
                difference = with_class[number] - without[number]
                made[f"cfg_logits_{part}_on_greedy"] = without[number] + scales[number] * difference
    return made | lookup_free(generator, case)


def lookup_free(generator: Any, case: Case) -> Tensors:
    """The ids of the tokenizer, of which the sub-tokens are parts."""
    z, sub_tokens = case.inputs["z"], generator.backbone.place_head.sub_tokens
    quantizer = LookupFreeQuantizer(z.shape[1], bit_order="first_least_significant").eval()
    found = quantizer(z.movedim(1, -1))
    pre, post = sub_tokens.split(found.tokens.flatten(1)).unbind(dim=-1)
    given = open_magvit2_ids(generator, case.inputs["pre"], case.inputs["post"]).view(found.tokens.shape)
    return {
        "lfq_pre": pre,
        "lfq_post": post,
        "lfq_quant": found.z_q.movedim(-1, 1),
        "quant_from_tokens": quantizer.lookup(given).movedim(-1, 1),
    }


def ibq_passes(generator: Any, case: Case) -> Tensors:
    logits = with_and_without_class(generator, case.inputs["z"][:, :-1], case.inputs["y"][:, 0])
    return dict(zip(("logits", "logits_null"), logits, strict=True))


def ibq_ar(load: Load, case: Case) -> Tensors:
    generator, labels, tokens = load(), case.inputs["y"][:, 0], case.inputs["z"]
    made = ibq_passes(generator, case)
    with torch.enable_grad():
        loss, _ = generator.loss(generator.to_grid(tokens), labels)
        made["loss"] = loss.detach()[None]
        made |= grads(
            generator,
            loss,
            {
                "tok_emb.weight": "token_embedding.table.weight",
                "class_emb.embedding_table.weight": "class_embedding.weight",
                "blocks.0.attention.wqkv.weight": "blocks.0.attention.query_key_value.weight",
                # Theirs: gates, scales and shifts, each of the attention and of the MLP.
                "blocks.0.ada_lin.1.weight": ("blocks.0.modulation.project.weight", chunks_of(2, 5, 1, 4, 0, 3)),
            },
        )
    cache = generator.backbone.new_cache(labels)
    steps = [generator.backbone(tokens[:, max(step - 1, 0) : step], labels, cache) for step in range(tokens.shape[1])]
    made["sample_logits"] = torch.cat(steps, dim=1)
    for name in case.matching(r"greedy_\w+"):
        scale = case.number(name, "cfg_scale")
        made[name] = greedy(generator, labels, guidance_scale=scale)
        on_greedy = name.replace("greedy_", "") + "_logits_on_greedy"
        made[on_greedy] = guided(generator, made[name][:, :-1], labels, [scale] * generator.length)
    return made


class OrderDraws:
    """Orders `(B, N)` in the place of random numbers, of training."""

    def __init__(self, orders: Tensor) -> None:
        self.orders, (self.batch, self.places) = orders, orders.shape

    def uniform(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        assert purpose == Purpose.ORDER
        # The first number decides that the order is random, the others sort to it.
        turns = torch.arange(1, count, dtype=torch.float64).expand(self.batch, -1) / count
        made = torch.zeros(self.batch, count - 1, dtype=torch.float64).scatter(1, self.orders, turns)
        return torch.cat((torch.zeros(self.batch, 1, dtype=torch.float64), made), dim=1)


class BitDraws(OrderDraws):
    """The numbers of a BAR case in the place of random ones, of training."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.inputs["orders"])
        self.inputs, self.bits = case.inputs, case.inputs["mask_uniform"].shape[1]

    def uniform(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        if purpose == Purpose.ORDER:
            return super().uniform(purpose, count, step)
        assert purpose == Purpose.MASK_ORDER and count == self.places * self.bits
        # Theirs compares the places of the sorted numbers with the count, ours their ranks.
        return (self.inputs["mask_uniform"].argsort(dim=-1).double() / self.bits).view(self.batch, -1)

    def normal(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        assert purpose == Purpose.MASK_RATIO and count == self.places
        return -self.inputs["t_normal"].double().view(self.batch, -1)


class NoisyBARSampler(BARSampler):
    """Draws bits by the Gumbel noise of a case, or greedily, and keeps the guided logits of every step."""

    def watch(self, case: Case, *, noise: bool) -> None:
        self.case, self.noise, self.logits = case, noise, list[Tensor]()

    def draw_id(self, head: Any, decoder: Any, hidden: Tensor, scales: Any, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        if self.noise:
            steps = len(self.bit_counts)
            of_confidence = uniforms.unflatten(-1, (steps, 2, head.bits))
            place = len(self.logits) // steps
            # The last step unmasks what is left, whatever its confidence.
            of_confidence[:, 0, :-1, 1] = self.case.inputs["conf_noise"][place].double().transpose(0, 1)
        return super().draw_id(head, decoder, hidden, scales, uniforms)

    def _draw_bits(self, logits: Tensor, uniforms: Tensor, tau: float) -> Tensor:
        place, step = divmod(len(self.logits), len(self.bit_counts))
        self.logits.append(logits[:, 0])
        if not self.noise:
            return super()._draw_bits(logits, uniforms, tau)
        gumbel = -torch.log(-torch.log(self.case.inputs["bit_noise"][place, step].double()))
        return (logits + tau * gumbel[:, None]).argmax(dim=-1)


def noisily(generator: Any, case: Case, *, scale: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The bits of the ids in raster order `(B, N b)`; the guided logits `(N, T, B, b, 2)`."""
    own = generator.sampler
    sampler = NoisyBARSampler(
        own.bit_counts, temperature, guidance_scale=scale, guidance_schedule=own.guidance_schedule
    )
    sampler.watch(case, noise=temperature > 0)
    drawn = generator.sample(case.inputs["y"], sampler).flatten(1)
    bits = generator.backbone.place_head.sub_tokens.split(drawn).flatten(1)
    return bits, torch.stack(sampler.logits).unflatten(0, (generator.length, -1)).float()


def bar_ids(generator: Any, case: Case) -> Tensor:
    sub_tokens = generator.backbone.place_head.sub_tokens
    return sub_tokens.join(case.inputs["z"].unflatten(1, (-1, len(sub_tokens))))


def head_conditions(generator: Any, ids: Tensor, labels: Tensor, order: Tensor | None = None) -> Tensor:
    head = generator.backbone.place_head
    hidden = generator.backbone(ids[:, :-1], labels, order=order)
    return head.hidden_projection(head.hidden_norm(hidden)).flatten(0, 1)


def bar_passes(generator: Any, case: Case) -> Tensors:
    ids, labels, orders = bar_ids(generator, case), case.inputs["y"], case.inputs["orders"]
    return {
        "conditions_raster": head_conditions(generator, ids, labels),
        "conditions_raster_null": head_conditions(generator, ids, null(generator, labels)),
        "conditions_orders": head_conditions(generator, ids.gather(1, orders), labels, orders),
    }


def bar(load: Load, case: Case) -> Tensors:
    generator, labels = load(), case.inputs["y"]
    any_draws: Any = BitDraws(case)
    head, ids, orders = generator.backbone.place_head, bar_ids(generator, case), case.inputs["orders"]
    made = bar_passes(generator, case)
    ordered = ids.gather(1, orders)
    target = head.sub_tokens.split(ordered)
    generator.train()
    masked, ratio = head._masks(generator.length, any_draws)
    hidden = generator.backbone(ordered[:, :-1], labels, order=orders)
    made |= {
        "target_bits": target.flatten(0, 1),
        "masked_bits": target.masked_fill(masked, head.masked_bit).flatten(0, 1),
        "mask_ratio": ratio.float().flatten(),
        "bit_logits": head.bit_logits(hidden, target.masked_fill(masked, head.masked_bit), ratio).flatten(0, 1),
    }
    with torch.enable_grad():
        loss, _ = generator.loss(
            generator.to_grid(ids), labels, any_draws, dropped=torch.zeros(len(labels), dtype=torch.bool)
        )
        # Ours is in nats of an id, theirs of a bit.
        loss = loss / head.bits
        made["loss"] = loss.detach()[None]
        made |= grads(
            generator,
            loss,
            {
                # Their third row is of the mask, which no input has.
                "input_embeddings.weight": (
                    "token_embedding.table.weight",
                    lambda grad: torch.cat((grad, torch.zeros_like(grad[:1]))),
                ),
                "lm_head.input_embed.weight": "place_head.bit_embedding.weight",
                "blocks.0.attn.qkv.weight": "blocks.0.attention.query_key_value.weight",
                "lm_head.output_embed.weight": "place_head.output.project.weight",
                "latent_condition_proj.weight": "place_head.hidden_projection.weight",
            },
        )
    generator.eval()
    scale = case.number("greedy_cfg", "guidance_scale")
    made["greedy_cfg"], made["greedy_cfg_logits"] = noisily(generator, case, scale=scale, temperature=0.0)
    made["greedy_nocfg"], _ = noisily(generator, case, scale=1.0, temperature=0.0)
    temperature = case.number("sampled_cfg", "randomize_temperature")
    made["sampled_cfg"], _ = noisily(generator, case, scale=scale, temperature=temperature)
    return made


class OrderedRandAR(RandARSampler):
    """Draws in the orders of a case, and keeps how many tokens each step draws."""

    def follow(self, case: Case) -> None:
        self.case, self.sizes = case, list[int]()

    def _order(self, context: Any) -> Tensor:
        return self.case.inputs["order"]

    def step_size(self, drawn: int, length: int) -> int:
        self.sizes.append(super().step_size(drawn, length))
        return self.sizes[-1]


def randar_passes(generator: Any, case: Case) -> Tensors:
    tokens, labels, order = case.inputs["z"], case.inputs["y"], case.inputs["order"]
    logits, logits_null = with_and_without_class(generator, tokens.gather(1, order)[:, :-1], labels, order)
    return {
        "logits": logits,
        "logits_null": logits_null,
        "logits_raster": generator.backbone(tokens[:, :-1], labels),
    }


def in_steps(generator: Any, drawn: Tensor, labels: Tensor, order: Tensor, sizes: list[int]) -> Tensor:
    """Logits of drawn ids in the order drawn, `(B, N, K)`, where those of a step do not see one another."""
    rows, first = [], 0
    for size in sizes:
        cache = generator.backbone.new_cache(labels)
        cache.ahead = size - 1
        rows.append(generator.backbone(drawn[:, :first], labels, cache, order)[:, -size:])
        first += size
    return torch.cat(rows, dim=1)


def randar(load: Load, case: Case) -> Tensors:
    generator, labels, order = load(), case.inputs["y"], case.inputs["order"]
    backbone, made = generator.backbone, randar_passes(generator, case)
    rotations = backbone.positions.of(order, tuple(range(generator.length)), starts=False)
    instructions = rotate(backbone.instructions.vector.view(1, backbone.heads, 1, -1), rotations)
    made["instruction_tokens"] = instructions.transpose(1, 2).flatten(2)
    with torch.enable_grad():
        generator.train()
        draws: Any = OrderDraws(order)
        dropped = torch.zeros(len(labels), dtype=torch.bool)
        loss, _ = generator.loss(generator.to_grid(case.inputs["z"]), labels, draws, dropped=dropped)
        made["loss"] = loss.detach()[None]
        made |= grads(
            generator,
            loss,
            {
                "pos_instruct_embeddings": "instructions.vector",
                "tok_embeddings.weight": "token_embedding.table.weight",
                "layers.0.attention.wqkv.weight": "blocks.0.attention.query_key_value.weight",
                "cls_embedding.embedding_table.weight": "class_embedding.weight",
            },
        )
        generator.eval()
    for name in case.matching(r"greedy_((?!logits)\w)+"):
        start, end = (float(case.read(name, r"cfg_scales=\((\S+), (\S+)\)")[number]) for number in (1, 2))
        steps = int(case.number(name, "num_inference_steps"))
        sampler = OrderedRandAR(None if steps < 0 else steps, guidance_start=start, guidance_scale=end, top_k=1)
        sampler.follow(case)
        made[name] = generator.sample(labels, sampler).flatten(1)
        if steps > 0:
            made["parallel_sizes"] = torch.tensor(sampler.sizes)
        drawn, scales, first = made[name].gather(1, order), list[float](), 0
        for size in sampler.sizes:
            scales += [sampler.scales(generator.length)[first]] * size
            first += size
        with_class, without = (
            in_steps(generator, drawn, label, order, sampler.sizes) for label in (labels, null(generator, labels))
        )
        made[f"{name}_logits"] = without + torch.tensor(scales)[:, None] * (with_class - without)
    return made


PASSES: dict[str, Callable[[Any, Case], Tensors]] = {
    "open_magvit2_ar": open_magvit2_passes,
    "ibq_ar": ibq_passes,
    "bar": bar_passes,
    "randar": randar_passes,
}
OUTPUTS = {"open_magvit2_ar": open_magvit2_ar, "ibq_ar": ibq_ar, "bar": bar, "randar": randar}


def network_outputs(generator: Any, case: Case) -> Tensors:
    """The logits of given ids."""
    return PASSES[case.family](generator, case)


def again(generator: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    labels = case.inputs["y"].flatten()
    return {**network_outputs(generator, case), "drawn": generator.sample(labels)}
