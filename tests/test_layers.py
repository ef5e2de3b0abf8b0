import pytest
import torch
from torch import nn

from packvit.layers import gelu_in_epilogue, gelu_tanh, has_gelu_epilogue


def test_the_epilogue_is_for_cuda_inference_with_a_bias_alone():
    linear = nn.Linear(8, 16)
    x = torch.randn(3, 8)
    assert not has_gelu_epilogue(x, linear)
    with torch.inference_mode():
        assert not has_gelu_epilogue(x, linear)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 77, 4096])
def test_gelu_in_the_epilogue_is_nearer_to_fp32_than_its_plain_twin(tokens: int):
    torch.manual_seed(tokens)
    linear = nn.Linear(1152, 4304, device="cuda")
    x = torch.randn(tokens, 1152, device="cuda")
    linear, x = linear.bfloat16(), x.bfloat16()
    assert not has_gelu_epilogue(x, linear)  # autograd is on, and torch has no derivative
    with torch.inference_mode():
        assert has_gelu_epilogue(x, linear)
        assert not has_gelu_epilogue(x, nn.Linear(1152, 8, bias=False, device="cuda"))
        exact = gelu_tanh(
            nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        )
        fused, plain = gelu_in_epilogue(x, linear), gelu_tanh(linear(x))
        assert (fused.double() - exact).norm() <= (plain.double() - exact).norm()
