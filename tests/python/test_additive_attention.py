"""additive_attention and additive_attention_with_lse."""

from attention_problems import PROBLEMS, reference_of
from operator_tester import OperatorTester


class TestAdditiveAttention(OperatorTester):
    op = "additive_attention_with_lse"
    problems = PROBLEMS

    def arguments(self, problem, dtype, device):
        return problem.arguments("additive", dtype, device)

    def reference(self, arguments, dropout_factors):
        return reference_of(arguments, dropout_factors)[:2]
