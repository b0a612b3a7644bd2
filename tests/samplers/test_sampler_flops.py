"""What a sampler says that the network cost, against torch's counter."""

from random import Random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from discrete_lit.core.random import CounterRandom


@pytest.mark.slow_but(20)
@pytest.mark.parametrize("conditioning", ["prefix", "prefix_adaln"])
def test_flops_are_those_of_the_network(case, make_layout_backbone, conditioning, monkeypatch) -> None:
    switches = {"conditioning": conditioning, **case.switches}
    backbone = make_layout_backbone(case.backbone.layout, **switches).requires_grad_(False)
    total = 0

    def counting(method):
        def run(*arguments):
            nonlocal total
            # The counter knows no attention kernel of a CPU, but the products that one stands for.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                result = method(*arguments)
            total += counter.get_total_flops()
            return result

        return run

    for name in ("forward", "new_cache"):
        monkeypatch.setattr(backbone, name, counting(getattr(backbone, name)))
    if backbone.place_head is not None:
        name = "bit_logits" if case.name == "bar" else "sub_token_logits"
        monkeypatch.setattr(backbone.place_head, name, counting(getattr(backbone.place_head, name)))
    choose, labels = Random(5), torch.zeros(3, dtype=torch.int64)
    for _ in range(4):
        total = 0
        random = CounterRandom(0, torch.arange(3))
        output = case.random_sampler(choose)(backbone, labels, random, quantizer=case.quantizer)
        assert 3 * output.flops == total > 0
