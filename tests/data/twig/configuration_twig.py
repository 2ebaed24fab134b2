"""The configuration of a model that comes with its checkpoint."""

from transformers import PretrainedConfig


class TwigConfig(PretrainedConfig):
    model_type = "twig"

    def __init__(self, vocab_size=199, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = 512
        super().__init__(**kwargs)
