"""AOTInductor: every operator in one package, run at another batch and length than it was exported
with."""

import pytest
import torch
import ways
from torch import Tensor

import torch_selfattn as ts


class EveryOperator(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 8))
        self.table = torch.nn.Parameter(torch.randn(64, 24))
        self.attention = ts.nn.MultiHeadAttention(24, 3, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> list[Tensor]:  # (B, L, 24), (B)
        length = x.size(1)
        results = [
            ts.sinusoidal_encoding(length, 6),
            ts.add_sinusoidal_encoding(x, 0.5),
            ts.add_learned_encoding(x, self.table),
            self.attention(x, x, x, key_lengths=lengths, need_weights=False)[0],
        ]
        q = x.unflatten(-1, (3, 8)).transpose(1, 2)
        cos, sin = ts.rotary_tables(length, 8)
        results += [cos, sin]
        k = ts.rotary_embedding(q, cos, sin)
        results += [
            k,
            ts.dot_product_attention(q, k, q, is_causal=True),
            *ts.dot_product_attention_with_lse(q, k, q, key_lengths=lengths),
            ts.additive_attention(q, k, q, self.weight, window_left=3),
            *ts.additive_attention_with_lse(q, k, q, self.weight, key_lengths=lengths),
            ts.attention_weights(q, k, self.weight, heads=torch.tensor([2, 0])),
        ]
        return results


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.way("AOTInductor", operators=ways.OPERATORS)
def test_every_operator(tmp_path):
    model = EveryOperator().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        model,
        (torch.randn(2, 7, 24), torch.tensor([7, 5])),
        dynamic_shapes={"x": {0: batch, 1: length}, "lengths": {0: batch}},
    )
    code = program.graph_module.code
    for operator in ways.OPERATORS:
        assert f"torch_selfattn.{operator}.default" in code, operator
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "every_operator.pt2")
    )
    compiled = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        for lengths in ([4, 1, 11], [20]):
            inputs = torch.randn(len(lengths), max(lengths), 24), torch.tensor(lengths)
            torch.testing.assert_close(compiled(*inputs), model(*inputs))
