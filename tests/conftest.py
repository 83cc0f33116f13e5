"""Models with random weights in several shapes.
One thread: on two busy cores, two OpenMP threads cost several times as much."""
import pytest
import torch

from memory import Plastic
from model import BackboneConfig, NanoCTM, ThoughtConfig

torch.set_num_threads(1)

SHAPES = {
    "grouped queries": (BackboneConfig(97, 64, 96, 3, 4, 2, 16, 1e-6, 1e4, 256),
                        ThoughtConfig(4, 3, 64, 3, 32, 16, 32)),
    "fewer pairs than neurons": (BackboneConfig(61, 48, 64, 2, 3, 1, 8, 1e-5, 1e6, 256),
                                 ThoughtConfig(3, 2, 40, 2, 16, 8, 16)),
    "more pairs than neurons": (BackboneConfig(53, 32, 80, 2, 2, 2, 24, 1e-6, 500.0, 256),
                                ThoughtConfig(5, 4, 96, 4, 16, 4, 32)),
}


def randomised(shape: str, block: str = "ctm", seed: int = 0) -> NanoCTM:
    """Every parameter and buffer away from its initial ones and zeros,
    so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = NanoCTM(*SHAPES[shape], block=block)
    for name, p in model.named_parameters():
        if p.dim() < 2 and "half_life" not in name and "decay" not in name:
            p.data += 0.3 * torch.randn_like(p)
        elif "backbone" in name:
            p.data = torch.randn_like(p) * (1.0 if "embed" in name else p.shape[1] ** -0.5)
    if model.ctm:
        model.ctm.baseline.normal_(0, 0.1)
        model.ctm.variance.uniform_(0.2, 2.0)
        model.ctm.engram.data += 0.1 * torch.randn_like(model.ctm.engram)
        keys = torch.nn.functional.normalize(torch.randn(200, model.ctm.config.sync), dim=1)
        model.ctm.key_moment.copy_(keys.T @ keys / 200)
        model.ctm.whiten()
        model.ctm.ordinary.random_(model.backbone.config.vocab_size)
        model.ctm.c_proj.weight.data.normal_(0, model.ctm.config.sync ** -0.5)
        model.ctm.session_proj.normal_(0, 0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=SHAPES)
def model(request) -> NanoCTM:
    return randomised(request.param)


def some_tokens(model: NanoCTM, rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, model.backbone.config.vocab_size, (rows, length),
                         generator=torch.Generator().manual_seed(seed))


def some_memory(model: NanoCTM) -> torch.Tensor:
    return torch.randn_like(Plastic.blank(model.ctm).weight.float())


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the order in which fp32 was summed: 1e-4, and 1e-5 of what is large."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
