"""The networks of PPO: a Hugging Face causal model as the policy, and a value head on its trunk or on a second one.

Turns token ids into log-probabilities, entropies and values of the sampled tokens. Knows neither losses nor ranks.

Shapes: B trajectories, T tokens of the longest, N sampled tokens of a batch, H hidden size, V vocabulary. Outputs
[B, T] stand at the token they are about and are 0 where the mask is false: the log-probability of token t and the
value of the state before it both come from position t - 1. Padding is on the right, where causal attention cannot see
it, so there is no attention mask. Nothing is dropped out: the model stays in evaluation mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cluster.errors import InputError
from learner import losses


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Where the policy comes from and how it is computed; `critic` as in the run file, or none at all."""

    path: Path
    dtype: str
    critic: Literal["shared", "separate", "none"]
    temperature: float


class Outputs(NamedTuple):
    """What a batch comes out as, [B, T] each, float32."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


def load_causal_model(path: Path, dtype: str) -> nn.Module:
    """The causal model of a folder, in evaluation mode. Raises InputError where there is none or it is not plain.

    Plain means: its logits are its output embedding of its trunk's hidden states, without scaling or capping.
    """
    if not (path / "config.json").is_file():
        raise InputError(str(path), "no model folder (it has no config.json)")
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
    )
    model.eval()
    probe = torch.arange(min(8, model.config.get_text_config().vocab_size))[None]
    with torch.no_grad():
        plain = model.get_output_embeddings()(hidden_states(model, probe))
        if not torch.allclose(model(input_ids=probe, use_cache=False).logits, plain):
            raise InputError(str(path), f"{model.config.model_type} scales or caps its logits, which is not supported")
    return model


def hidden_states(model: Any, token_ids: Tensor) -> Tensor:
    """The trunk's last hidden states [B, T, H]."""
    return model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state


def token_logprobs(model: Any, hidden: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N] of tokens [N], each given by the hidden state [N, H] before it.

    At the sampling temperature, normalised in float32.
    """
    logits = model.get_output_embeddings()(hidden).float()
    distributions = torch.log_softmax(logits / temperature, dim=-1)
    return distributions.gather(-1, token_ids[:, None])[:, 0], losses.entropy(distributions)


def sampled_token_logprobs(model: Any, token_ids: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """A causal model's log-probabilities [B, T] of the sampled tokens, without gradient."""
    with torch.no_grad():
        hidden = hidden_states(model, token_ids[:, :-1])[mask[:, 1:]]
        logprobs, _ = token_logprobs(model, hidden, token_ids[mask], temperature)
        return _spread(logprobs, mask)


def _spread(chosen: Tensor, mask: Tensor) -> Tensor:
    """[N] back to [B, T], zeros where the mask is false."""
    return chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)


class ActorCritic(nn.Module):
    """Policy and critic. The value head starts at zero, so that training starts from the policy alone."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.temperature = settings.temperature
        self.policy: Any = load_causal_model(settings.path, settings.dtype)
        self.critic: Any = None
        if settings.critic == "separate":
            self.critic = load_causal_model(settings.path, settings.dtype).base_model
        self.value_head: nn.Linear | None = None
        if settings.critic != "none":
            self.value_head = nn.Linear(self.policy.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Outputs:
        """Outputs for padded token ids [B, T] and the mask [B, T] of sampled tokens, whose first column is false.

        Without a critic all values are 0.
        """
        inputs, before = token_ids[:, :-1], mask[:, 1:]
        hidden = hidden_states(self.policy, inputs)[before]
        logprobs, entropy = token_logprobs(self.policy, hidden, token_ids[mask], self.temperature)
        if self.value_head is None:
            values = torch.zeros_like(logprobs)
        else:
            seen = hidden if self.critic is None else hidden_states(self.critic, inputs)[before]
            values = self.value_head(seen.float())[:, 0]
        return Outputs(_spread(logprobs, mask), _spread(entropy, mask), _spread(values, mask))

    def critic_tensors(self) -> dict[str, Tensor]:
        """Everything but the policy, by the names of `state_dict`."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("policy.")}

    def load_critic_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `critic_tensors` gave. Raises InputError where names differ."""
        if tensors.keys() != self.critic_tensors().keys():
            raise InputError("learner.critic", "the checkpoint was made with another critic")
        self.load_state_dict(tensors, strict=False)
