"""kakaobrain/rq-vae-transformer: RQ-VAE, a tokenizer, and RQ-Transformer, which models its stacks of codes."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained import taming
from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import IN_TRAINING, Rules, generator_conversion, head_count, in_blocks, square
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_CODEBOOK = "quantizer.codebooks"
_PARTS = {"codes": "weight", "cluster_size": "cluster_size_ema", "embedding_sum": "embed_ema"}
_EVERY = "every model that is read has"


@register("rq_vae", marks=(*taming.MARKS, f"{_CODEBOOK}.0.weight"), wrappers=("state_dict",), section="arch")
def rq_vae(state: State, settings: Settings) -> Conversion:
    """Convert `stage1/model.pt`.

    A codebook that all depths share stands in the file once for each of them, and has a last row that is no code.
    """
    depth = state.count(f"{_CODEBOOK}.{{}}")
    rows, code_dim = state[f"{_CODEBOOK}.0.weight"].shape
    settings.agree({"type": "rq-vae", "code_hier": 1})
    settings.without_effect("it is about the training", "gan", "ema")
    arguments = settings.section("hparams") if "hparams" in settings else settings
    arguments.agree({"bottleneck_type": "rq", "embed_dim": code_dim, "n_embed": rows - 1})
    arguments.agree({"use_padding_idx": False}, _EVERY)
    arguments.without_effect(IN_TRAINING, "masked_dropout")
    _check_shapes(state, arguments, depth, code_dim)
    shared = all(
        torch.equal(state[f"{_CODEBOOK}.0.{part}"], state[f"{_CODEBOOK}.{number}.{part}"])
        for number in range(depth)
        for part in _PARTS.values()
    )
    arguments.agree({"shared_codebook": shared})
    restarted = arguments.take("restart_unused_codes", True)
    config: dict[str, Any] = {
        "class_path": "discrete_lit.tokenizers.RQVAE",
        "init_args": {
            "network": taming.network(state, settings),
            "codebook_size": rows - 1,
            "code_dim": code_dim,
            "depth": depth,
            "shared_codebook": shared,
            "codebook_update": "ema",
            "commitment_weight": arguments.take("latent_loss_weight", 0.25),
            "decay": arguments.take("decay", 0.99),
            "codebook_init": "uniform",
            "revive_below": 1.0 if restarted else None,
            "reconstruction_loss": {"mse": "l2", "l1": "l1"}[arguments.take("loss_type", "mse", ("mse", "l1"))],
        },
    }
    renaming = [(f"{_CODEBOOK}.{{depth}}.{own}", f"{_CODEBOOK}.{{depth}}.{theirs}") for own, theirs in _PARTS.items()]
    return Conversion(
        config=config,
        tensors=_codebooks(state, range(1 if shared else depth)),
        renaming=taming.LAYOUT.renaming(taming.LAYOUT.levels(state), renaming),
        kept=(f"{_CODEBOOK}.*.steps",),
    )


def _codebooks(state: State, kept: range) -> dict[str, Tensor]:
    """Return the tensors with the codebooks of these depths alone, without their row that is no code."""
    tensors = {name: value for name, value in state.items() if not name.startswith(f"{_CODEBOOK}.")}
    for number in kept:
        for part in _PARTS.values():
            name = f"{_CODEBOOK}.{number}.{part}"
            tensors[name] = state[name][:-1] if part == "weight" else state[name]
    return tensors


def _check_shapes(state: State, arguments: Settings, depth: int, code_dim: int) -> None:
    """Compare what is said of the shapes of latents and codes with the tensors.

    Raises:
        ValueError: a position of the codes stands for several latents, which ours has no place for.
    """
    latents = len(state["quant_conv.bias"])
    names = ("latent_shape", "code_shape")
    given = {name: arguments.take(name, [0, 0, 0]) for name in names if name in arguments}
    sides = {tuple(shape[:2]) for shape in given.values()}
    if latents != code_dim or len(sides) > 1:
        raise ValueError(
            f"{state.source!r} makes one position of codes of several latents ({latents} channels of a latent, "
            f"{code_dim} of a code, {given}): one of each is read"
        )
    lasts = {"latent_shape": latents, "code_shape": depth}
    for name, shape in given.items():
        if shape[2:] != [lasts[name]]:
            raise ValueError(
                f"reference_config has {arguments.where(name)}={shape}, but the tensors have {lasts[name]}"
            )


_AUX = "aux.quantizer.codebooks"
_HEAD_WIDTH = 64
_BLOCK: Rules = (
    ("attention_norm.{rest}", "ln1.{rest}"),
    ("attention.query_key_value.{rest}", "attn.{query|key|value}.{rest}"),
    ("attention.out.{rest}", "attn.proj.{rest}"),
    ("mlp_norm.{rest}", "ln2.{rest}"),
    ("mlp.expand.{rest}", "mlp.0.{rest}"),
    ("mlp.contract.{rest}", "mlp.2.{rest}"),
)
_GELU = {"v1": "gelu", "v2": "gelu_quick"}
_STACKS = ("body", "head")


@register(
    "rq_transformer",
    marks=("pos_emb_hw", "pos_emb_d", "body_transformer.blocks.0.attn.key.weight", "cond_emb.weight"),
    wrappers=("state_dict_ema", "state_dict"),
    section="arch",
)
def rq_transformer(state: State, settings: Settings) -> Conversion:
    """Convert `stage2/model.pt` of a model of classes, or of none.

    The inputs of a published model are the code vectors of its RQ-VAE, which stand in the file of that: give it as
    `tokenizer`. No null label was trained: it has zeros, and guidance is refused.
    """
    width = state["cond_emb.weight"].shape[1]
    codes = state["pos_emb_d"].shape[1]
    places, before = state["pos_emb_hw"].shape[1], state["pos_emb_cond"].shape[1]
    settings.agree({"type": "rq-transformer", "use_padding_emb": False, "scaled_head_emb_vqvae": False}, _EVERY)
    settings.without_effect("the averages are read where the file has them", "ema")
    settings.without_effect("nothing in the published code reads it", "ar_hierarchy")
    if before > 1:
        raise ValueError(
            f"{state.source!r} is a model of texts (block_size_cond={before}): those of classes, or of none, are read"
        )
    vocab_size = state["classifier.linear.bias"].shape[-1]
    settings.agree_each("vocab_size", vocab_size, codes)
    shape = _code_shape(state, settings, places, codes)
    classes = len(state["cond_emb.weight"])
    for name, found in (("vocab_size_cond", classes), ("block_size_cond", before)):
        given = settings.take(name, found)
        if given == 0 and found == 1:
            settings.without_effect("the reference reads 0 as 1", name)
        elif given != found:
            raise ValueError(f"reference_config has {name}={given}, but the tensors have {found}")
    settings.agree({"embed_dim": width})
    settings.without_effect(IN_TRAINING, "embd_pdrop")
    backbone, arrangements, rules, kept = _inputs(state, settings, vocab_size, codes)
    body = {name: _stack(state, settings.section(name), name, width) for name in _STACKS}
    for name in ("mlp", "dropout"):
        if body["body"][name] != body["head"][name]:
            raise ValueError(f"reference_config has another {name} in head than in body: one of both is read")
    head: dict[str, Any] = backbone.pop("place_head")
    head |= {"sizes": [vocab_size] * codes, "positions": True}
    head |= {name: body["head"][name] for name in ("depth", "heads")}
    backbone |= body["body"] | {
        "width": width,
        "norm_epsilon": 1e-5,
        "dropout_places": ["attention_output", "mlp_output"],
        "place_head": {"class_path": "discrete_lit.backbones.FactorisedHead", "init_args": head},
    }

    def positions(of_condition: Tensor, of_places: Tensor) -> list[Tensor]:
        return [torch.cat((of_condition, of_places[:, :-1]), dim=1)]  # the last place is never read

    arrangements += [
        Arrangement(["pos_emb_cond", "pos_emb_hw"], ["positions"], positions),
        Arrangement(["pos_emb_d"], ["pos_emb_d"], lambda table: [table[0]]),
        Arrangement(
            ["cond_emb.weight"],
            ["cond_emb.weight"],
            lambda table: [torch.cat((table, torch.zeros_like(table[:1])))],
        ),
    ]
    return generator_conversion(
        "Autoregressive",
        state,
        tokens=Tokens(vocab_size, shape, needs_tokenizer=bool(kept)),
        num_classes=classes,
        backbone=backbone,
        rules=[
            ("class_embedding.weight", "cond_emb.weight"),
            ("positions.embedding", "positions"),
            ("place_head.positions", "pos_emb_d"),
            ("place_head.norm.{rest}", "classifier.layer_norm.{rest}"),
            *in_blocks("body_transformer.blocks.{block}", _BLOCK),
            *in_blocks("head_transformer.blocks.{block}", _BLOCK, ours="place_head.blocks.{block}"),
            *rules,
        ],
        arrangements=arrangements,
        dropped=(f"{_AUX}.*",),
        kept=kept,
        stacked_codes=True,
        soft_labels=_soft_labels(settings),
        label_dropout=0.0,
    )


def _code_shape(state: State, settings: Settings, places: int, codes: int) -> tuple[int, ...]:
    """Return the shape of the codes, `(h, w, D)`: `block_size`, or a square grid.

    Raises:
        ValueError: it is another than the positions' in the file.
    """
    given = settings.take("block_size", []) or [*square(state, places), codes]
    if len(given) != 3 or given[0] * given[1] != places or given[2] != codes:
        raise ValueError(
            f"reference_config has block_size={given}, but the tensors have {places} positions of {codes} codes"
        )
    return tuple(given)


def _inputs(
    state: State, settings: Settings, vocab_size: int, codes: int
) -> tuple[dict[str, Any], list[Arrangement], list[tuple[str, str]], tuple[str, ...]]:
    """Return what is said of embeddings and logits: switches, arrangements, rules, and names of ours that are kept.

    Raises:
        ValueError: a table that all depths share, or a head that reads code vectors which the input does not.
    """
    reads = {name: f"{name}_mlp.weight" in state for name in ("input", "head")}
    settings.agree({f"{name}_emb_vqvae": found for name, found in reads.items()})
    settings.agree({"shared_cls_emb": state["classifier.linear.weight"].ndim == 2})
    if reads["head"] and not reads["input"]:
        raise ValueError(
            f"{state.source!r} has head_emb_vqvae without input_emb_vqvae: the input reads code vectors, or both do"
        )
    arrangements, rules = list[Arrangement](), list[tuple[str, str]]()
    kept, head = tuple[str, ...](), dict[str, Any]()
    switches: dict[str, Any] = {"token_embedding": "parts", "place_head": head}
    if reads["input"]:
        code_dim = state["input_mlp.weight"].shape[1]
        settings.agree({"input_embed_dim": code_dim})
        switches |= {"token_embedding": "codes", "code_dim": code_dim}
        rules += [("token_embedding.project.{rest}", "input_mlp.{rest}"), ("token_embedding.vectors", "code_vectors")]
        kept = _read_codebooks(state, settings, codes, arrangements)
    else:
        settings.without_effect("no code vectors are read", "input_embed_dim")
    if reads["head"]:
        head["codes"] = "sum" if settings.take("cumsum_depth_ctx", True) else "newest"
        rules.append(("place_head.code_projection.{rest}", "head_mlp.{rest}"))
        settings.without_effect("the tokens have no table", "shared_tok_emb")
    else:
        settings.without_effect("the head reads no code vectors", "cumsum_depth_ctx")
        settings.agree({"shared_tok_emb": False}, "a model with tables of tokens that is read has")
        rows = len(state["tok_emb.weight"])
        if rows != codes * vocab_size:
            raise ValueError(
                f"{state.source!r} has a table of {rows} tokens for {codes} depths of {vocab_size} codes: one for each "
                "depth is read"
            )
        names = [f"tok_emb.{number}.weight" for number in range(codes)]
        arrangements.append(Arrangement(["tok_emb.weight"], names, lambda table: table.chunk(codes)))
        arrangements.append(Arrangement(["tok_emb.offsets"], [], lambda offsets: []))
        if reads["input"]:
            rules.append(("place_head.tables.{depth}.weight", "tok_emb.{depth}.weight"))
            arrangements.append(Arrangement(names[-1:], [], lambda table: []))  # no code follows the last
        else:
            head["shared_tables"] = True
            rules.append(("token_embedding.tables.{depth}.weight", "tok_emb.{depth}.weight"))
    if state["classifier.linear.weight"].ndim == 2:
        head["shared_logits"] = True
        rules += [
            ("place_head.heads.0.project.weight", "classifier.linear.weight"),
            ("place_head.heads.0.bias", "classifier.linear.bias"),
        ]
        return switches, arrangements, rules, kept

    def each_depth(weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [*weight.transpose(1, 2), *bias]

    parts = [f"classifier.{part}.{number}" for part in ("weight", "bias") for number in range(codes)]
    arrangements.append(Arrangement(["classifier.linear.weight", "classifier.linear.bias"], parts, each_depth))
    rules += [
        ("place_head.heads.{depth}.project.weight", "classifier.weight.{depth}"),
        ("place_head.heads.{depth}.bias", "classifier.bias.{depth}"),
    ]
    return switches, arrangements, rules, kept


def _read_codebooks(state: State, settings: Settings, codes: int, arrangements: list[Arrangement]) -> tuple[str, ...]:
    """Take the code vectors from the file where it has them beside the model; else name ours that keep theirs."""
    names = [f"{_AUX}.{number}.weight" for number in range(codes)]
    quantizer = settings.section("aux_quantizer")
    if names[0] not in state:
        quantizer.without_effect(
            "the tokenizer is loaded by itself", "latent_shape", "code_shape", "n_embed", "shared_codebook"
        )
        return ("token_embedding.vectors",)
    tables = [state[name] for name in names]
    quantizer.agree(
        {"n_embed": len(tables[0]) - 1, "shared_codebook": all(torch.equal(table, tables[0]) for table in tables)}
    )
    quantizer.without_effect("the model's own block_size and input_embed_dim say it", "latent_shape", "code_shape")
    # The last row is no code.
    arrangements.append(Arrangement(names, ["code_vectors"], lambda *tables: [torch.stack(tables)[:, :-1]]))
    return ()


def _stack(state: State, arguments: Settings, name: str, width: int) -> dict[str, Any]:
    """Return the switches of the blocks of body or head."""
    blocks = f"{name}_transformer.blocks.{{}}"
    depth = state.count(blocks)
    arguments.agree({"n_layer": depth})
    block = arguments.section("block")
    block.agree({"embed_dim": width})
    block.agree({"mlp_bias": True, "attn_bias": True, "attn_pdrop": 0.0}, _EVERY)
    return {
        "depth": depth,
        "heads": head_count(block, "n_head", max(1, width // _HEAD_WIDTH), width),
        "mlp": _GELU[block.take("gelu", "v1", tuple(_GELU))],
        "dropout": block.take("resid_pdrop", 0.1),
    }


def _soft_labels(settings: Settings) -> float | None:
    """Return the temperature of the soft labels of training; None where it is not said, or labels are hard."""
    loss = settings.section("loss")
    loss.without_effect("they weigh the loss of texts", "txt_weight", "img_weight")
    kinds = ("soft_target_cross_entropy", "cross_entropy")
    if loss.take("type", "cross_entropy", kinds) == "cross_entropy":
        loss.without_effect("they are of soft labels", "temp", "stochastic_codes")
        return None
    loss.agree({"stochastic_codes": True}, _EVERY)
    return loss.take("temp", 1.0)
