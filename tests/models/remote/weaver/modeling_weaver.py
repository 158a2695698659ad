"""A decoder with Llama's formulas and nobody's names, as remote code brings them.

No base class marks its layers, nothing says where its embeddings are, and the loss is written out.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_weaver import WeaverConfig


class Evener(nn.Module):
    def __init__(self, width, tiny):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.tiny = tiny

    def forward(self, threads):
        kind = threads.dtype
        wide = threads.float()
        power = (wide * wide).mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(power + self.tiny)).to(kind) * self.gain


def flip(threads):
    left, right = threads.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)


def spin(threads, across, along):
    return threads * across + flip(threads) * along


class Crossing(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lanes, self.shared = config.lanes, config.shared_lanes
        self.lane_width = config.width // config.lanes
        self.ask = nn.Linear(config.width, config.lanes * self.lane_width, bias=False)
        self.offer = nn.Linear(config.width, self.shared * self.lane_width, bias=False)
        self.carry = nn.Linear(config.width, self.shared * self.lane_width, bias=False)
        self.tie_off = nn.Linear(config.lanes * self.lane_width, config.width, bias=False)

    def forward(self, threads, across, along):
        rows, length, _ = threads.shape
        asks = self.ask(threads).view(rows, length, self.lanes, self.lane_width).transpose(1, 2)
        offers = self.offer(threads).view(rows, length, self.shared, self.lane_width)
        carried = self.carry(threads).view(rows, length, self.shared, self.lane_width)
        offers, carried = offers.transpose(1, 2), carried.transpose(1, 2)
        asks, offers = spin(asks, across, along), spin(offers, across, along)
        offers = offers.repeat_interleave(self.lanes // self.shared, dim=1)
        carried = carried.repeat_interleave(self.lanes // self.shared, dim=1)
        met = F.scaled_dot_product_attention(asks, offers, carried, is_causal=True)
        return self.tie_off(met.transpose(1, 2).reshape(rows, length, -1))


class Valve(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.open = nn.Linear(config.width, config.spread, bias=False)
        self.flow = nn.Linear(config.width, config.spread, bias=False)
        self.close = nn.Linear(config.spread, config.width, bias=False)

    def forward(self, threads):
        return self.close(F.silu(self.open(threads)) * self.flow(threads))


class Pick(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.first_evener = Evener(config.width, config.tiny)
        self.crossing = Crossing(config)
        self.second_evener = Evener(config.width, config.tiny)
        self.valve = Valve(config)

    def forward(self, threads, across, along):
        threads = threads + self.crossing(self.first_evener(threads), across, along)
        return threads + self.valve(self.second_evener(threads))


class Loom(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.spools = nn.Embedding(config.lexicon, config.width)
        self.picks = nn.ModuleList([Pick(config) for _ in range(config.depth)])
        self.last_evener = Evener(config.width, config.tiny)
        self.lane_width, self.turn = config.width // config.lanes, config.turn

    def forward(self, input_ids):
        threads = self.spools(input_ids)
        steps = torch.arange(0, self.lane_width, 2, device=threads.device) / self.lane_width
        places = torch.arange(threads.shape[1], device=threads.device)
        angles = torch.outer(places.float(), self.turn**-steps).repeat(1, 2)
        across, along = angles.cos().to(threads.dtype), angles.sin().to(threads.dtype)
        for pick in self.picks:
            threads = pick(threads, across, along)
        return self.last_evener(threads)


class WeaverForText(PreTrainedModel):
    config_class = WeaverConfig

    def __init__(self, config):
        super().__init__(config)
        self.loom = Loom(config)
        self.to_words = nn.Linear(config.width, config.lexicon, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.05)

    def forward(self, input_ids, attention_mask=None, labels=None):
        cloth = self.loom(input_ids)
        logits = self.to_words(cloth)
        loss = None
        if labels is not None:
            guesses = logits[..., :-1, :].contiguous().float()
            truth = labels[..., 1:].contiguous()
            measure = nn.CrossEntropyLoss()
            loss = measure(guesses.view(-1, guesses.size(-1)), truth.view(-1))
        return CausalLMOutputWithPast(loss=loss, logits=logits)
