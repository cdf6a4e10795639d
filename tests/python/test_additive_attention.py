"""additive_attention and additive_attention_with_lse."""

from attention_tester import AttentionTester


class TestAdditiveAttention(AttentionTester):
    op = "additive_attention_with_lse"
    score = "additive"
