"""A model that comes with its checkpoint: attention and a gated branch side by side, positions by ALiBi-free learned
embeddings. Its layers take a tensor and give one: nothing could be passed through them by keyword."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_twig import TwigConfig


def eager(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling
    length = scores.shape[-1]
    seen = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


class TwigAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.size = config.hidden_size // self.heads
        self.is_causal = True
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        split = self.qkv(x).view(*x.shape[:-1], 3, self.heads, self.size)
        query, key, value = (split[:, :, i].transpose(1, 2) for i in range(3))
        attend = eager
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed, _ = attend(self, query, key, value, None, scaling=1.5 / self.size)
        return self.out(mixed.reshape(*x.shape))


class TwigLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.norm = nn.LayerNorm(size)
        self.attention = TwigAttention(config)
        self.gate = nn.Linear(size, size)
        self.up = nn.Linear(size, size, bias=False)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y) + torch.sin(self.gate(y)) * self.up(y)


class TwigPreTrainedModel(PreTrainedModel):
    config_class = TwigConfig
    base_model_prefix = "trunk"
    _supports_sdpa = True

    def _init_weights(self, module):
        pass


class TwigModel(TwigPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(TwigLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.tokens(input_ids) + self.places(position_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class TwigForCausalLM(TwigPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.trunk = TwigModel(config)
        self.twig_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.trunk.tokens

    def get_output_embeddings(self):
        return self.twig_head

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        x = self.trunk(input_ids=input_ids, position_ids=position_ids).last_hidden_state
        return CausalLMOutputWithPast(logits=self.twig_head(x))
