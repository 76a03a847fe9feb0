"""The networks of PPO: a Hugging Face causal model as the policy, and a value head on its trunk or on a second one.

Turns token ids into log-probabilities, entropies and values of the sampled tokens. Knows neither losses nor ranks.

Shapes: B trajectories, T tokens of the longest, N sampled tokens of a batch, H hidden size, V vocabulary. Outputs
[B, T] stand at the token they are about and are 0 where the mask is false: the log-probability of token t and the
value of the state before it both come from position t - 1. Sequences are packed, or padded on the right, where causal
attention cannot see it. Nothing is dropped out: the model stays in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from cluster.errors import InputError
from learner.config import LearnerConfig, LoraConfig
from learner.model.compiled import distributions, fuse_layers, fused_distributions
from learner.model.indexing import at, on_device, places_of
from learner.model.lora import adapters_off, add_adapters
from learner.model.packing import PACKED, make_pack
from learner.place import Place

Critic = Literal["shared", "separate", "none"]
CHUNK_ELEMENTS = 2**26
"""Numbers of a [tokens, V] table that are held at once, unless the settings say otherwise: 256 MiB in float32."""
FUSED_CHUNK_ELEMENTS = 2**31
"""The same where the table is fused away but for the logits: 4 GiB in bfloat16."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Where the networks come from and how they are computed; the names are the run file's, `critic` may be none.

    Trained weights are kept in float32 and computed in `dtype`; frozen ones are kept in it. `critic_path` is a
    reward model that a separate critic starts as. `fused`: what can be is compiled, on a GPU.
    """

    path: Path
    dtype: str
    critic: Critic
    temperature: float
    packing: bool = True
    logprob_chunk_tokens: int | None = None
    activation_checkpointing: bool = False
    with_entropy_gradient: bool = True
    critic_path: Path | None = None
    lora: LoraConfig = LoraConfig()
    seed: int = 0
    is_trained: bool = True
    fused: bool = True

    @classmethod
    def from_config(cls, config: LearnerConfig, place: Place, temperature: float, *, critic: Critic) -> ModelSettings:
        """Derive the settings of trained networks. Raises InputError if the critic needs a missing reward model."""
        from_reward_model = config.critic_from == "reward_model"
        if from_reward_model and place.critic_path is None:
            raise InputError("learner.critic_from", "there is no reward model to start the critic from")
        return cls(
            place.model_path,
            place.dtype,
            critic,
            temperature,
            packing=config.packing,
            logprob_chunk_tokens=config.logprob_chunk_tokens,
            activation_checkpointing=config.activation_checkpointing,
            with_entropy_gradient=config.entropy_coefficient > 0,
            critic_path=place.critic_path if from_reward_model else None,
            lora=config.lora,
            seed=place.seed,
            fused=config.fused,
        )

    @property
    def kept_dtype(self) -> str:
        """The dtype of the weights in memory."""
        return "float32" if self.is_trained and self.dtype == "bfloat16" else self.dtype


class Outputs(NamedTuple):
    """What a batch comes out as, [B, T] each, float32."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


def load_causal_model(path: Path, dtype: str, *, packing: bool = False) -> Any:
    """The causal model of a folder, in evaluation mode. Raises InputError where there is none or it is not plain.

    Plain means: its logits are its output embedding of its trunk's hidden states, without scaling or capping; and,
    where sequences are to be packed, that its attention keeps them apart.
    """
    model = load_model(AutoModelForCausalLM, path, dtype)
    probe = torch.arange(min(8, model.config.get_text_config().vocab_size))[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        plain = model.get_output_embeddings()(hidden)
        if not torch.allclose(model(input_ids=probe, use_cache=False).logits, plain):
            raise InputError(str(path), f"{model.config.model_type} scales or caps its logits, which is not supported")
        if packing:
            pack_attention(model, path, probe, hidden)
    return model


def require_model_folder(path: Path) -> None:
    """Raise InputError unless the folder looks like a Hugging Face model."""
    if not (path / "config.json").is_file():
        raise InputError(str(path), "no model folder (it has no config.json)")


def load_model(auto_class: Any, path: Path, dtype: str, **options: Any) -> Any:
    """The model of a folder, in evaluation mode. Raises InputError where the folder is missing or holds no model."""
    require_model_folder(path)
    given = {"attn_implementation": "sdpa", "trust_remote_code": False, "local_files_only": True, **options}
    try:
        return auto_class.from_pretrained(path, dtype=getattr(torch, dtype), **given).eval()
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"no model can be loaded: {error}") from error


def pack_attention(model: Any, path: Path, probe: Tensor, alone: Tensor) -> None:
    """Let the model's attention take packs, and see that a sequence behind another comes out as it did alone."""
    model.set_attn_implementation(PACKED)
    length = probe.shape[1]
    packed = trunk_of_pack(model.base_model, torch.cat([probe, probe], 1), [length, length])[length:]
    if not torch.allclose(packed, alone[0], rtol=1e-3, atol=1e-4 if alone.dtype == torch.float32 else 0.1):
        raise InputError(
            str(path), f"{model.config.model_type} does not keep packed sequences apart: set learner.packing = false"
        )


def trunk_of_pack(trunk: Any, token_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Hidden states [N, H] of sequences that lie end to end in token_ids [1, N]."""
    pack = make_pack(lengths, token_ids.device)
    output = trunk(input_ids=token_ids, position_ids=pack.positions, use_cache=False, pack=pack)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


class ActorCritic(nn.Module):
    """Policy and critic. The value head starts at zero (or as a reward model's), so training starts from the policy."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self._settings = settings
        self._is_fused = False
        dtype = settings.kept_dtype
        self.policy: Any = load_causal_model(settings.path, dtype, packing=settings.packing)
        self.critic: Any = None
        self.value_head: nn.Linear | None = None
        if settings.critic != "none":
            self._make_critic(dtype)
        if settings.lora.rank and settings.is_trained:
            for trunk in filter(None, (self.policy, self.critic)):
                add_adapters(trunk, settings.lora, seed=settings.seed)
        if settings.activation_checkpointing:
            for trunk in filter(None, (self.policy, self.critic)):
                checkpoint_activations(trunk)

    def _make_critic(self, dtype: str) -> None:
        """A head of zeros on the policy's trunk or on a copy of it; or trunk and head of a reward model."""
        settings = self._settings
        self.value_head = nn.Linear(self.policy.config.get_text_config().hidden_size, 1, dtype=self.numbers)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if settings.critic != "separate":
            return
        if settings.critic_path is None:
            self.critic = load_causal_model(settings.path, dtype, packing=settings.packing).base_model
            return
        model = load_model(AutoModelForSequenceClassification, settings.critic_path, dtype)
        if settings.packing:
            model.set_attn_implementation(PACKED)
        self.critic = model.base_model
        if model.score.weight.shape != self.value_head.weight.shape:
            raise InputError(str(settings.critic_path), "no critic for this policy: its hidden size is another")
        with torch.no_grad():
            self.value_head.weight.copy_(model.score.weight)

    @property
    def numbers(self) -> torch.dtype:
        """The dtype of what comes out."""
        return torch.float64 if self._settings.dtype == "float64" else torch.float32

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold shards, so that they must call in step."""
        return isinstance(self, FSDPModule)

    def forward(
        self,
        token_ids: Tensor,
        mask: Tensor,
        lengths: Sequence[int],
        *,
        logprobs_only: bool = False,
        temperature: float | None = None,
    ) -> Outputs:
        """Outputs for rows of token ids [B, T] of these lengths and the mask [B, T] of sampled tokens.

        The first column of the mask is false. Without a critic, and with `logprobs_only`, all values are 0; with the
        latter all entropies too. `temperature` is that of sampling unless given.
        """
        settings = self._settings
        if settings.fused and token_ids.is_cuda and not self._is_fused:
            fuse_layers(self)
            self._is_fused = True
        half, places = settings.dtype == "bfloat16", places_of(mask)
        with torch.autocast(token_ids.device.type, torch.bfloat16, enabled=half):
            hidden = self._hidden(self.policy.base_model, token_ids, places, lengths)
            logprobs, entropy = token_logprobs(
                self.policy.get_output_embeddings(),
                hidden,
                at(places, token_ids),
                settings.temperature if temperature is None else temperature,
                chunk_tokens=settings.logprob_chunk_tokens,
                entropy_gradient=None if logprobs_only else settings.with_entropy_gradient,
                fused=self._is_fused,
            )
            seen = hidden
            if self.critic is not None and not logprobs_only:
                seen = self._hidden(self.critic, token_ids, places, lengths)
        values = torch.zeros_like(logprobs)
        if self.value_head is not None and not logprobs_only:
            values = self.value_head(seen.to(self.value_head.weight.dtype))[:, 0]
        return Outputs(_spread(logprobs, mask), _spread(entropy, mask), _spread(values, mask))

    def _hidden(self, trunk: Any, token_ids: Tensor, places: Tensor, lengths: Sequence[int]) -> Tensor:
        """The trunk's hidden states [N, H] before each sampled token, which stand at `places` of the token ids."""
        inputs = token_ids[:, :-1]
        before = places - places // token_ids.shape[1] - 1
        if not self._settings.packing:
            return at(before, trunk(input_ids=inputs, use_cache=False).last_hidden_state)
        given = [length - 1 for length in lengths]
        if min(given) == inputs.shape[1]:
            return trunk_of_pack(trunk, inputs.reshape(1, -1), given).index_select(0, before)
        is_token = np.arange(inputs.shape[1]) < np.array(given)[:, None]
        tokens, ranks = np.flatnonzero(is_token), np.cumsum(is_token) - 1
        packed = trunk_of_pack(trunk, at(on_device(tokens, inputs.device), inputs)[None], given)
        return packed.index_select(0, on_device(ranks, inputs.device)[before])


class Reference:
    """The frozen policy that the KL is to: a model of its own, or `model` with its adapters off."""

    def __init__(self, model: ActorCritic) -> None:
        self._model = model

    def logprobs(self, token_ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        """Log-probabilities [B, T], as `ActorCritic` gives them, without gradient."""
        with torch.no_grad(), adapters_off(self._model):
            return self._model(token_ids, mask, lengths, logprobs_only=True).logprobs


def checkpoint_activations(model: Any) -> None:
    """Have the layers compute again what is inside them; nothing else is in training mode, so nothing drops out."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def token_logprobs(
    head: nn.Module,
    hidden: Tensor,
    token_ids: Tensor,
    temperature: float,
    *,
    chunk_tokens: int | None = None,
    entropy_gradient: bool | None = True,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N] of tokens [N], each given by the hidden state [N, H] before it.

    At the sampling temperature, normalised in float32. More than `chunk_tokens` at once are computed in chunks, and
    again in the backward pass, so that [N, V] is never held whole. `entropy_gradient`: None leaves entropies 0.
    """
    vocabulary = getattr(head, "out_features", None) or head.weight.shape[0]
    size = chunk_tokens or max(1, (FUSED_CHUNK_ELEMENTS if fused else CHUNK_ELEMENTS) // vocabulary)
    if len(hidden) <= size:
        return _distributions(head, hidden, token_ids, temperature, entropy_gradient, fused)
    parts = [
        checkpoint(
            _distributions,
            head,
            hidden[start : start + size],
            token_ids[start : start + size],
            temperature,
            entropy_gradient,
            fused,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, len(hidden), size)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _distributions(
    head: nn.Module, hidden: Tensor, token_ids: Tensor, temperature: float, entropy_gradient: bool | None, fused: bool
) -> tuple[Tensor, Tensor]:
    function = fused_distributions() if fused else distributions
    return function(head(hidden), token_ids, temperature, entropy_gradient)


def _spread(chosen: Tensor, mask: Tensor) -> Tensor:
    """[N] back to [B, T], zeros where the mask is false."""
    return chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)
