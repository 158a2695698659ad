"""A decoder that does everything in another way.

Attention and MLP read one norm and are added at once. Queries, keys and values are one projection,
gate and up another. A part of each head is rotated. The head is the embedding's own weight, without
a module, scaled and capped. Keys and values are kept by an object of its own. The result is a tuple
or an output class of its own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_oddity import OddityConfig


@dataclass
class OddityOutput(ModelOutput):
    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    memory: object | None = None


class Memory:
    """Keys and values of every stage so far."""

    def __init__(self):
        self.stages = {}

    def length(self):
        return self.stages[0][0].shape[2] if self.stages else 0

    def join(self, stage, key, value):
        if stage in self.stages:
            old_key, old_value = self.stages[stage]
            key, value = torch.cat((old_key, key), 2), torch.cat((old_value, value), 2)
        self.stages[stage] = (key, value)
        return key, value


class Balance(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.tilt = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        y = x.to(torch.float32)
        y = y * torch.rsqrt(torch.mean(torch.square(y), -1, True) + 1e-5)
        return (y * (1 + self.tilt.to(torch.float32))).type_as(x)


def turn(x, angles, width):
    cos, sin = angles
    moved, still = x[..., :width], x[..., width:]
    first, second = torch.split(moved, width // 2, dim=-1)
    moved = moved * cos + torch.cat((torch.neg(second), first), -1) * sin
    return torch.cat((moved, still), dim=-1)


class Stage(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index, self.eyes = index, config.n_eyes
        self.eye_size, self.turned = config.eye_size, config.turned
        width = config.n_eyes * config.eye_size
        self.balance = Balance(config.size)
        self.look = nn.Linear(config.size, 3 * width, bias=True)
        self.seen = nn.Linear(width, config.size, bias=False)
        self.think = nn.Linear(config.size, 2 * config.inner, bias=False)
        self.thought = nn.Linear(config.inner, config.size, bias=False)

    def forward(self, flow, angles, memory=None):
        calm = self.balance(flow)
        return flow + self.attend(calm, angles, memory) + self.ponder(calm)

    def attend(self, x, angles, memory):
        query, key, value = torch.tensor_split(self.look(x), 3, -1)
        query, key, value = (
            t.unflatten(-1, (self.eyes, self.eye_size)).permute(0, 2, 1, 3)
            for t in (query, key, value)
        )
        query, key = (turn(t, angles, self.turned) for t in (query, key))
        if memory is not None:
            key, value = memory.join(self.index, key, value)
        if query.shape[2] > 1:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        return self.seen(out.permute(0, 2, 1, 3).flatten(2))

    def ponder(self, x):
        gate, up = self.think(x).chunk(2, dim=-1)
        return self.thought(F.gelu(gate, approximate="tanh") * up)


class Trunk(PreTrainedModel):
    config_class = OddityConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.n_words, config.size)
        self.stages = nn.ModuleList(Stage(config, i) for i in range(config.n_stages))
        self.end = Balance(config.size)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.05)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, std=0.05)

    def forward(self, input_ids, memory=None):
        flow = self.words(input_ids)
        start = memory.length() if memory is not None else 0
        places = torch.arange(start, start + input_ids.shape[1], device=flow.device).float()
        width = self.config.turned
        speeds = 10000.0 ** (-torch.arange(0, width, 2, device=flow.device) / width)
        phase = torch.cat([places[:, None] * speeds] * 2, -1)
        angles = (phase.cos().type_as(flow), phase.sin().type_as(flow))
        for stage in self.stages:
            flow = stage(flow, angles, memory)
        return (self.end(flow), memory)


class OddityLM(PreTrainedModel):
    config_class = OddityConfig

    def __init__(self, config):
        super().__init__(config)
        self.trunk = Trunk(config)
        self.post_init()

    def _init_weights(self, module):
        self.trunk._init_weights(module)

    def forward(self, input_ids, labels=None, memory=None, as_tuple=False):
        flow, memory = self.trunk(input_ids, memory)
        scores = F.linear(flow, self.trunk.words.weight) * self.config.loudness
        scores = torch.tanh(scores / self.config.ceiling) * self.config.ceiling
        loss = None
        if labels is not None:
            flat = scores[:, :-1].float().reshape(-1, scores.shape[-1])
            loss = F.cross_entropy(flat, labels[:, 1:].reshape(-1))
        if as_tuple:
            return (loss, scores, memory)
        return OddityOutput(loss=loss, scores=scores, memory=memory)
