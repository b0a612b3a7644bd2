"""MD4 (google-deepmind/md4): its text models, in Flax. No checkpoint is published; these are of one's own runs.

Orbax writes them; a file of the flattened names under `params`, joined with dots, is read, or what Flax's `to_bytes`
wrote. Flax numbers the layers of a kind in the order in which the code calls them.
"""

import re
from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import IN_TRAINING, Rules, generator_conversion, in_blocks, sampled_by
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_NETWORK, _CONDITION = "classifier.Transformer_0", "classifier.CondEmbedding_0"
_TRANSFORMER_BLOCK = f"{_NETWORK}.TransformerBlock_{{block}}"
_EVERY = "every model that is read has"
# What MD4's schedules are squeezed by at both ends.
_EPSILON = 1e-4
_BLOCK: Rules = (
    ("attention.query_key_value.{rest}", "attention.{wq|wk|wv}.{rest}"),
    ("attention.out.{rest}", "attention.wo.{rest}"),
    ("attention_norm.{rest}", "RMSNorm_0.{rest}"),
    ("mlp_norm.{rest}", "RMSNorm_1.{rest}"),
    ("mlp.expand.{rest}", "feed_forward.{w1|w3}.{rest}"),
    ("mlp.contract.{rest}", "feed_forward.w2.{rest}"),
    ("modulation.project.{rest}", "Dense_0.{rest}"),
)
# The MLP's gate, which also stands before the modulations, by the reference's name.
_GATES = {"glu": ("glu", "sigmoid"), "swiglu": ("swiglu", "silu"), "geglu": ("geglu_tanh", "gelu_tanh")}
_OF_A_RUN = (
    *("learning_rate_schedule", "warmup_steps", "clip", "b2", "num_epochs", "ema_rate", "num_train_steps"),
    *("num_eval_steps", "batch_size", "num_microbatches", "per_device_batch_size", "eval_pad_last_batch", "check_nans"),
    *("log_loss_every_steps", "eval_every_steps", "checkpoint_every_steps", "checkpoint_keep_period"),
    *("grain_num_workers", "trial", "test_in_colab"),
)


@register(
    "md4",
    marks=(
        f"{_NETWORK}.TransformerBlock_0.attention.wq.kernel",
        f"{_NETWORK}.TransformerBlock_0.feed_forward.w1.kernel",
    ),
    section=None,
)
def md4(state: State, settings: Settings) -> Conversion:
    """Convert a text model of MD4, of which `data_shape` and `mlp_type` are asked for: the tensors do not tell them.

    An embedding with a linear layer behind it (`outside_embed`) becomes one table, the product of both.
    """
    timed = f"{_CONDITION}.dense0.kernel" in state
    outside = "classifier.Embed_0.embedding" in state
    rows, width = len(state[_embedding(outside)]), state[f"{_NETWORK}.TransformerBlock_0.attention.wo.kernel"].shape[1]
    depth = state.count(f"{_NETWORK}.TransformerBlock_{{}}")
    narrow = len(state[f"{_CONDITION}.Dense_0.bias"]) if timed else None
    if outside:
        narrow = state[_embedding(outside)].shape[1]
    if narrow is None:
        heads = settings.take("num_heads", 12)
        narrow = width // heads
    heads, rest = divmod(width, narrow)
    if rest or narrow % 2:
        raise ValueError(f"{state.source!r} has the width {width}, which is no even number times a number of heads")
    settings.agree({"vocab_size": rows - 1, "n_layers": depth, "feature_dim": narrow, "num_heads": heads})
    settings.agree({"outside_embed": outside, "time_features": "t" if timed else "none"})
    settings.agree({"model_type": "md4", "task_type": "text", "classes": -1, "model_sharding": False}, _EVERY)
    settings.without_effect("it is about image models", "ch_mult", "n_dit_layers", "dit_num_heads", "dit_hidden_size")
    settings.without_effect("it is about how weights begin", "depth_scaled_init", "cond_type")
    settings.without_effect(IN_TRAINING, "use_attn_dropout", "antithetic_time_sampling")
    settings.without_effect("it is about the run that trained the model", *_OF_A_RUN)
    mlp, activation = _GATES[_given(settings, "mlp_type", "glu", tuple(_GATES))]
    (length,) = _given(settings, "data_shape", [0], None)
    backbone: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_hidden": state[f"{_NETWORK}.TransformerBlock_0.feed_forward.w1.kernel"].shape[1],
        "mlp": mlp,
        "norm_epsilon": 1e-5,
        "bias": False,
        "positions": "rope_1d",
        "dropout": settings.take("dropout_rate", 0.0),
        "dropout_places": ["attention_weights", "attention_output", "mlp_output"],
    }
    if timed:
        waves = narrow // 2
        backbone |= {
            "conditioning": "adaln",
            "condition_width": narrow,
            "modulation_activation": activation,
            "time_waves": waves,
            # The slowest wave is among the reference's, whose exponent is i / (w - 1).
            "time_base": 10000.0 ** (waves / (waves - 1)),
            "time_hidden": len(state[f"{_CONDITION}.dense0.bias"]),
        }
    else:
        backbone |= {"conditioning": "added", "norm": "rms"}
    return generator_conversion(
        "DiscreteDiffusion",
        state,
        tokens=Tokens(rows - 1, (length,)),
        num_classes=1,
        backbone=backbone,
        rules=_rules(outside, timed),
        arrangements=[*_embeddings(outside, timed, width), *_layers()],
        process={"class_path": "discrete_lit.diffusion.AbsorbingProcess"},
        head={"class_path": "discrete_lit.diffusion.LeaveOneOutHead"},
        time_input="time" if timed else "none",
        label_dropout=0.0,
        **_training_and_sampling(settings),
    )


def _embedding(outside: bool) -> str:
    return "classifier.Embed_0.embedding" if outside else f"{_NETWORK}.Embed_0.embedding"


def _given(settings: Settings, name: str, like: Any, choices: tuple[str, ...] | None) -> Any:
    """Take an argument that must be given.

    Raises:
        ValueError: it is not.
    """
    if name not in settings:
        raise ValueError(
            f"the tensors do not tell {settings.where(name)}: give it in reference_config, as its config does"
        )
    found = settings.take(name, like, choices)
    if isinstance(found, list) and (len(found) != 1 or not isinstance(found[0], int) or found[0] < 1):
        raise ValueError(f"reference_config has {settings.where(name)}={found}; [N], the length of a text, is read")
    return found


def _rules(outside: bool, timed: bool) -> list[tuple[str, str]]:
    # Dense layers of the transformer: of the embedding, of the last modulation, of the logits.
    first = int(outside)
    return [
        ("token_embedding.table.weight", "tokens"),
        ("class_embedding.weight", "classes"),
        ("time_embedding.layers.0.{rest}", f"{_CONDITION}.dense0.{{rest}}"),
        ("time_embedding.layers.2.{rest}", f"{_CONDITION}.Dense_0.{{rest}}"),
        *in_blocks(_TRANSFORMER_BLOCK, _BLOCK),
        ("final_norm.{rest}", f"{_NETWORK}.RMSNorm_0.{{rest}}"),
        ("final_modulation.project.{rest}", f"{_NETWORK}.Dense_{first}.{{rest}}"),
        ("head.project.{rest}", f"{_NETWORK}.Dense_{first + timed}.{{rest}}"),
    ]


def _embeddings(outside: bool, timed: bool, width: int) -> list[Arrangement]:
    """Make one table of ids, and give one class and no class embeddings of zeros: the model has no classes."""
    if outside:
        within = [f"{_NETWORK}.Dense_0.kernel", f"{_NETWORK}.Dense_0.bias"]
        table = Arrangement(
            [_embedding(True), *within], ["tokens"], lambda table, kernel, bias: [table @ kernel + bias]
        )
    else:
        table = Arrangement([_embedding(False)], ["tokens"], lambda table: [table])
    if not timed:
        scale = f"{_NETWORK}.RMSNorm_0.scale"
        return [table, Arrangement([scale], [scale, "classes"], lambda gain: [gain, gain.new_zeros(2, width)])]
    inner, outer = f"{_CONDITION}.dense0.kernel", f"{_CONDITION}.Dense_0.bias"

    def cosines_first(kernel: Tensor) -> list[Tensor]:
        sines, cosines = kernel.chunk(2)
        return [torch.cat((cosines, sines))]

    return [
        table,
        Arrangement([inner], [inner], cosines_first),
        Arrangement([outer], [outer, "classes"], lambda bias: [bias, bias.new_zeros(2, len(bias))]),
    ]


def _layers() -> list[Arrangement]:
    """Put outputs before inputs, and call a gain a weight."""
    return [
        Arrangement(["{rest}.kernel"], ["{rest}.weight"], lambda kernel: [kernel.T]),
        Arrangement(["{rest}.scale"], ["{rest}.weight"], lambda scale: [scale]),
    ]


def _training_and_sampling(settings: Settings) -> dict[str, Any]:
    """Return the configuration of schedule, loss and sampler."""
    name = "noise_schedule_type" if "noise_schedule_type" in settings else "noise_schedule"
    kind, home = settings.take(name, "linear"), "discrete_lit.diffusion"
    curve: dict[str, Any] = {"class_path": f"{home}.{'CosineSchedule' if kind == 'cosine' else 'LinearSchedule'}"}
    if kind not in ("linear", "cosine"):
        power = re.fullmatch(r"poly(\d+(?:\.\d+)?)", kind)
        if power is None or float(power[1]) <= 0:
            raise ValueError(
                f"reference_config has {settings.where(name)}={kind!r}; linear, cosine, and poly with an exponent are "
                "read"
            )
        curve = {"class_path": f"{home}.PowerSchedule", "init_args": {"exponent": float(power[1])}}
    ends = {"lowest": _EPSILON, "highest": 1 - _EPSILON}
    schedule = {"class_path": f"{home}.TruncatedSchedule", "init_args": {"schedule": curve, **ends}}
    steps = settings.take("timesteps", 1000)
    loss: dict[str, Any] = {"class_path": f"{home}.losses.MaskedCrossEntropy"}
    if not settings.take("cont_time", False):
        loss = {"class_path": f"{home}.losses.DiscreteTimeBound", "init_args": {"steps": steps, "to_data": False}}
    sampling: dict[str, Any] = {"steps": steps}
    if settings.take("sampling_grid", "cosine", ("cosine", "uniform")) == "cosine":
        cosine = {"class_path": f"{home}.CosineSchedule"}
        sampling["grid"] = {
            "class_path": f"{home}.WarpedSchedule",
            "init_args": {"schedule": schedule, "times": cosine},
        }
    # The first two draw one law, in one step and in two.
    sampler = settings.take("sampler", "ancestral", ("ancestral", "mean", "topp"))
    if sampler == "topp":
        sampling["top_p"] = settings.take("topp", 0.98)
    else:
        settings.without_effect(f"sampler={sampler!r} draws from all ids", "topp")
    return {"schedule": schedule, "loss": loss, "sampler": sampled_by("AncestralSampler", **sampling)}
