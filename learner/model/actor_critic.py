"""The networks of PPO: a Hugging Face causal model as the policy, and a value head.

The value head is on the policy's trunk or on a second one. Computes log-probabilities, entropies and values of the
sampled tokens.

Shapes: B trajectories, T tokens of the longest, N sampled tokens of a batch, H hidden size, V vocabulary. Outputs
[B, T] are at the token that they describe, and 0 if the mask is false: the log-probability of token t and the value of
the state before it are both computed from position t - 1. Sequences are packed, or padded on the right, which causal
attention ignores. There is no dropout: the model stays in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from cluster.errors import InputError, first_line
from cluster.model_folder import require_no_adapter, weight_files
from learner.config import LearnerConfig, LoraConfig
from learner.model.compiled import distributions, fuse_layers, fused_distributions
from learner.model.indexing import at, on_device, places_of
from learner.model.lora import adapters_off, add_adapters
from learner.model.packing import PACKED, make_pack
from learner.place import Place

Critic = Literal["shared", "separate", "none"]
NEW_HEAD = "score.weight"
"""The head of a classifier, which a causal model's folder lacks when a reward model starts from it."""
CHUNK_ELEMENTS = 2**26
"""Elements of a [tokens, V] table in memory at once, unless the settings limit them: 256 MiB in float32."""
FUSED_CHUNK_ELEMENTS = 2**31
"""The same if compilation leaves only the logits in memory: 4 GiB in bfloat16."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Where the networks come from and how they are computed; field names are those of the run file.

    Trained weights are kept in float32 and computed in `dtype`; frozen ones are kept in `dtype`. `critic_path` is the
    reward model that a separate critic starts from. `fused` compiles layers and distributions on a GPU.
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
        """Derive the settings of trained networks.

        Raises InputError if the critic needs a missing reward model.
        """
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
    """The outputs for a batch, [B, T] each, float32."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


def load_causal_model(path: Path, dtype: str, *, packing: bool = False) -> Any:
    """Load the causal model of a folder, in evaluation mode.

    Raises InputError if it is missing or not supported.

    Supported means: its logits are its output embedding of its trunk's hidden states, without scaling or capping; and,
    if sequences are packed, its attention keeps them apart.
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
    """Raise InputError unless the folder looks like a Hugging Face model with weights that can be loaded."""
    require_no_adapter(path)
    if not (path / "config.json").is_file():
        raise InputError(str(path), "no model folder (it has no config.json)")
    weight_files(path)


def load_model(auto_class: Any, path: Path, dtype: str, **options: Any) -> Any:
    """Load the model of a folder, in evaluation mode.

    Raises InputError if the folder or its model is missing, or if its files lack weights of the model, except the head
    of a classifier: transformers would draw them at random.
    """
    require_model_folder(path)
    settings = {"attn_implementation": "sdpa", "trust_remote_code": False, "local_files_only": True, **options}
    settings |= {"use_safetensors": True, "output_loading_info": True}
    try:
        model, info = auto_class.from_pretrained(path, dtype=getattr(torch, dtype), **settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(str(path), f"no model can be loaded: {first_line(error)}") from error
    if missing := sorted(set(info["missing_keys"]) - {NEW_HEAD}):
        what = f"its files lack {len(missing)} weights of {type(model).__name__}, such as {missing[0]}"
        raise InputError(str(path), what)
    return model.eval()


def pack_attention(model: Any, path: Path, probe: Tensor, alone: Tensor) -> None:
    """Switch the model to packed attention, and check that packing does not change the output."""
    model.set_attn_implementation(PACKED)
    length = probe.shape[1]
    packed = trunk_of_pack(model.base_model, torch.cat([probe, probe], 1), [length, length])[length:]
    if not torch.allclose(packed, alone[0], rtol=1e-3, atol=1e-4 if alone.dtype == torch.float32 else 0.1):
        raise InputError(
            str(path), f"{model.config.model_type} does not keep packed sequences apart: set learner.packing = false"
        )


def trunk_of_pack(trunk: Any, token_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Compute hidden states [N, H] of sequences packed end to end in token_ids [1, N]."""
    pack = make_pack(lengths, token_ids.device)
    output = trunk(input_ids=token_ids, position_ids=pack.positions, use_cache=False, pack=pack)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


class ActorCritic(nn.Module):
    """Policy and critic. The value head starts at zero, or as a reward model's head."""

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
        """Create a value head of zeros on the policy's trunk or on a copy, or load a reward model."""
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
            raise InputError(
                str(settings.critic_path), "no critic for this policy: its hidden size differs from the policy's"
            )
        with torch.no_grad():
            self.value_head.weight.copy_(model.score.weight)

    @property
    def numbers(self) -> torch.dtype:
        """The dtype of the outputs."""
        return torch.float64 if self._settings.dtype == "float64" else torch.float32

    def use(self, config: LearnerConfig, temperature: float) -> None:
        """Switch to settings that a run may change: the sampling temperature, and whether entropies have gradients."""
        with_gradient = config.entropy_coefficient > 0
        self._settings = replace(self._settings, temperature=temperature, with_entropy_gradient=with_gradient)

    @property
    def is_sharded(self) -> bool:
        """Whether the model is sharded, so that ranks must call it together."""
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
        """Compute outputs for token ids [B, T] of these lengths; the mask [B, T] selects sampled tokens.

        The first column of the mask must be false. Without a critic, or with `logprobs_only`, all values are 0; with
        the latter, entropies too. `temperature` defaults to that of sampling.
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
        """Compute the trunk's hidden states [N, H] before the sampled tokens, which are at `places`."""
        inputs = token_ids[:, :-1]
        before = places - places // token_ids.shape[1] - 1
        if not self._settings.packing:
            return at(before, trunk(input_ids=inputs, use_cache=False).last_hidden_state)
        inner = [length - 1 for length in lengths]
        if min(inner) == inputs.shape[1]:
            return trunk_of_pack(trunk, inputs.reshape(1, -1), inner).index_select(0, before)
        is_token = np.arange(inputs.shape[1]) < np.array(inner)[:, None]
        tokens, ranks = np.flatnonzero(is_token), np.cumsum(is_token) - 1
        packed = trunk_of_pack(trunk, at(on_device(tokens, inputs.device), inputs)[None], inner)
        return packed.index_select(0, on_device(ranks, inputs.device)[before])


class Reference:
    """The frozen reference policy of the KL: a separate model, or `model` with its adapters off."""

    def __init__(self, model: ActorCritic) -> None:
        self._model = model

    def use(self, config: LearnerConfig, temperature: float) -> None:
        """Switch to settings that a run may change, as `ActorCritic.use` does."""
        self._model.use(config, temperature)

    def logprobs(self, token_ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        """Compute log-probabilities [B, T] as `ActorCritic` does, without gradient."""
        with torch.no_grad(), adapters_off(self._model):
            return self._model(token_ids, mask, lengths, logprobs_only=True).logprobs

    def outputs(self, token_ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> tuple[Tensor]:
        """Return `logprobs` as the only output."""
        return (self.logprobs(token_ids, mask, lengths),)


def checkpoint_activations(model: Any) -> None:
    """Enable activation checkpointing.

    Only the layers enter training mode, so that there is still no dropout.
    """
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
    """Compute log-probabilities and entropies [N] of tokens [N] from hidden states [N, H] before them.

    At `temperature`, normalised in float32. More than `chunk_tokens` tokens are computed in chunks, and again in the
    backward pass, so that [N, V] is never in memory as a whole. With `entropy_gradient` None, entropies are 0.
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
    """Scatter values [N] to [B, T], 0 where the mask is false."""
    return chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)
