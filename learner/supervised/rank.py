"""One rank of a supervised stage: its networks, data, loop and result. Imports no RLlib.

Every rank reads the same data and draws the same batches, of which it computes its own part.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from cluster.data.chat_settings import write_settings_of
from cluster.data.datasets import Reading, Source
from cluster.data.invalid_rows import BrokenRows
from learner import checkpoint
from learner.config import LearnerConfig, SftConfig
from learner.distributed.ranks import Ranks
from learner.distributed.sharding import is_sharded, local, shard
from learner.dpo_config import DpoConfig
from learner.learning_rates import default_learning_rate
from learner.model.actor_critic import ActorCritic, ModelSettings
from learner.model.lora import ADAPTER_FOLDER, adapter_tensors, has_inputs_first, num_parameters, write_adapter
from learner.model.microbatches import balanced, cost, micro_batches
from learner.model.reward_net import RewardNet
from learner.model.tensors import policy_tensors
from learner.model.tokenizer import load_tokenizer
from learner.place import Place
from learner.supervised.batches import mixed_batches, split, split_by_draw
from learner.supervised.choices import mismatch
from learner.supervised.examples import Limit
from learner.supervised.loop import Plan, Row, checkpoints_of, descend
from learner.supervised.optimizer import Optimizer
from learner.supervised.preferences import MeasuredRewards
from learner.supervised.reference import ReferenceTable
from learner.supervised.stages import Stage, loss_of, plan_of, reader_of, size_of

HELD_OUT_RESULTS = ("held_out_loss", "held_out_accuracy", "held_out_margin")


@dataclass(frozen=True, slots=True)
class SupervisedSettings:
    """Everything that a rank is built from.

    `stage` says what is trained, `config` how ranks divide the work. The trained model replaces `output_path`. Several
    `sources` are mixed by their weights, and rows are held out of each separately. The reward model is evaluated on the
    pairs of `fresh_path`, by default on the held-out ones. `more_path` has further pairs. With `by_prompt`, pairs are
    held out by their prompt only, so that held-out pairs stay held out when pairs are added. `member` numbers the
    reward models of an ensemble, which hold out the same pairs. `reference_path` is the folder in which DPO keeps the
    log-probabilities of its reference.
    """

    config: LearnerConfig
    stage: Stage
    place: Place
    sources: tuple[Source, ...]
    output_path: Path
    checkpoints_path: Path | None = None
    fresh_path: Path | None = None
    more_path: Path | None = None
    by_prompt: bool = False
    member: int = 0
    reference_path: Path | None = None
    reading: Reading = Reading()

    @property
    def log_dir(self) -> Path | None:
        """The folder of the ranks' logs."""
        return self.place.log_dir

    @property
    def name(self) -> Literal["sft", "reward_model", "dpo"]:
        """The stage's name, which is also that of its section of the run file."""
        if isinstance(self.stage, DpoConfig):
            return "dpo"
        return "sft" if isinstance(self.stage, SftConfig) else "reward_model"

    @property
    def member_seed(self) -> int:
        """The seed of a member's new head and of its order of batches."""
        return self.place.seed + self.member


def load_net(settings: SupervisedSettings) -> ActorCritic | RewardNet:
    """Load the networks that the stage trains."""
    config = settings.config
    if settings.name == "reward_model":
        return RewardNet(
            settings.place.model_path,
            settings.place.dtype,
            packing=config.packing,
            activation_checkpointing=config.activation_checkpointing,
            seed=settings.member_seed,
        )
    dtype = settings.place.dtype if settings.place.dtype in ("bfloat16", "float64") else "float32"
    model = ModelSettings(
        settings.place.model_path,
        dtype,
        "none",
        temperature=1.0,
        packing=config.packing,
        logprob_chunk_tokens=config.logprob_chunk_tokens,
        activation_checkpointing=config.activation_checkpointing,
        fused=config.fused,
    )
    if settings.name == "dpo":
        model = replace(model, lora=config.lora, seed=settings.place.seed, fused=config.fused)
    return ActorCritic(model)


def shard_net(net: nn.Module, settings: SupervisedSettings, num_ranks: int, device: torch.device) -> None:
    """Shard the networks over the ranks; a reward model's head stays in full precision. Collective."""
    heads = ("model.score",) if isinstance(net, RewardNet) else ()
    shard(net, num_ranks, device, half=settings.place.dtype == "bfloat16", heads=heads)


class SupervisedRank:
    """Trains and writes one rank. Every method is collective. `net` and `adamw` must be ready to train.

    Raises InputError naming the file and what is wrong with it.
    """

    def __init__(
        self,
        settings: SupervisedSettings,
        net: ActorCritic | RewardNet,
        adamw: torch.optim.Optimizer,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._settings = settings
        self._net = net
        self._adamw = adamw
        self._ranks = ranks
        self._device = device
        self._tokenizer = load_tokenizer(settings.place.model_path)
        self._model: Any = net.policy if isinstance(net, ActorCritic) else net.model
        self._loss: Any = loss_of(settings.stage, net, ranks, device)
        parts, counts = self._read_all()
        self._generator = torch.Generator().manual_seed(settings.place.seed)
        training, held_out = zip(*map(self._split, parts, settings.sources), strict=True)
        self._sizes = list(map(len, training))
        self._training, self._held_out = ([row for part in side for row in part] for side in (training, held_out))
        if settings.member:
            self._generator.manual_seed(settings.member_seed)
        self._plan = self._planned()
        steps = {"num_steps": float(self._plan.num_steps), "learning_rate": self._plan.learning_rate}
        self._counts = counts | {"num_held_out": len(self._held_out)} | steps
        if isinstance(settings.stage, DpoConfig) and settings.stage.loss == "kto":
            self._counts |= self._mismatched(settings.stage)
        self._kept: Row = {}
        self._checkpoints = checkpoints_of(
            settings.checkpoints_path,
            settings.stage,
            settings.member_seed,
            [example for part in parts for example in part],
            self._ranks,
        )
        self._rows = self._train()

    def _read_all(self) -> tuple[list[list[Any]], Row]:
        """Read each source's examples and count them; the first rank logs broken rows."""
        settings = self._settings
        broken = BrokenRows(settings.reading.broken_rows)
        read = [self._read(source.path, broken) for source in settings.sources]
        more = [self._read(settings.more_path, broken)] if settings.more_path is not None else []
        counts = {name: sum(own[name] for _, own in (*read, *more)) for name in read[0][1]}
        parts = [examples for examples, _ in read]
        for examples, _ in more:
            parts[-1] = parts[-1] + examples
            counts["num_more"] = float(len(examples))
        skipped = {"num_broken": len(broken.errors), "num_unpaired": broken.num_unpaired}
        if broken.errors and settings.log_dir is not None and self._ranks.rank == 0:
            settings.log_dir.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{error}\n" for error in broken.errors)
            (settings.log_dir / f"broken_rows_{settings.name}.txt").write_text(lines)
        return parts, counts | {name: float(num) for name, num in skipped.items() if num}

    def _mismatched(self, stage: DpoConfig) -> Row:
        """Add mismatched completions to labelled rows; returns the number of those that were cut, if any."""
        limit = Limit.of(self._model, stage, self._settings.name).max_tokens
        (self._training, num), (self._held_out, num_more) = (
            mismatch(rows, limit) for rows in (self._training, self._held_out)
        )
        return {"num_mismatched_cut": float(num + num_more)} if num + num_more else {}

    def _read(self, path: Path, broken: BrokenRows) -> tuple[list[Any], Row]:
        """Read the examples of a file; returns those to keep and the numbers of those cut and dropped."""
        name, stage = self._settings.name, self._settings.stage
        examples: list[Any] = reader_of(stage)(self._tokenizer, path, self._settings.reading.columns, broken)
        return Limit.of(self._model, stage, name).applied(examples, path)

    def _split(self, examples: list[Any], source: Source) -> tuple[list[Any], list[Any]]:
        """Split a source's examples into training and held-out ones."""
        settings = self._settings
        share = settings.stage.held_out_share
        if not share:
            return examples, []
        if settings.by_prompt:
            return split_by_draw(examples, [pair.draw for pair in examples], share, source.path)
        return split(examples, share, self._generator, source.path)

    def counts(self) -> Row:
        """Return `num_examples`, `num_cut`, `num_dropped`, `num_held_out`, `num_steps` and `learning_rate`.

        If there are any, also `num_broken` (rows skipped), `num_unpaired` (labelled rows without a counterpart) and
        `num_more` (examples of `more_path`).
        """
        return self._counts

    def advance(self, num: int) -> list[Row]:
        """Train up to `num` steps; returns their metrics, fewer if training ends."""
        return list(itertools.islice(self._rows, num))

    def _planned(self) -> Plan:
        """Return the number of steps and the learning rate: those set, or by the number of rows and weights."""
        stage, name, num = self._settings.stage, self._settings.name, num_parameters(self._model)
        has_adapters = name == "dpo" and self._settings.config.lora.rank > 0
        learning_rate = stage.learning_rate or default_learning_rate(name, num, lora=has_adapters)
        return plan_of(stage, len(self._training), learning_rate)

    def _train(self) -> Generator[Row, None, None]:
        stage, plan = self._settings.stage, self._plan
        if isinstance(stage, DpoConfig):
            yield from self._add_reference()
        optimizer = Optimizer(
            self._net,
            self._adamw,
            self._ranks,
            learning_rate=plan.learning_rate,
            schedule=plan.schedule,
            num_steps=plan.num_steps,
        )
        weights = [source.weight for source in self._settings.sources]
        batches = mixed_batches(self._sizes, weights, stage.batch_size, self._generator)
        evaluate = partial(self._measure, self._held_out) if self._held_out else None
        parts = (self._net, optimizer, batches, self._accumulate, evaluate, plan, self._checkpoints)
        self._kept = yield from descend(*parts)

    def _add_reference(self) -> Generator[Row, None, None]:
        """Read the reference's log-probabilities, or compute them: the model is the reference before training."""
        settings, net = self._settings, self._net
        assert isinstance(net, ActorCritic)
        rows = [*self._training, *self._held_out]
        table = ReferenceTable(settings.reference_path, settings.place, rows, self._ranks)
        found = table.read(self._device)
        if found is None:
            found = yield from table.compute(net, self._places, self._device)
        complete = [row._replace(reference=tuple(own)) for row, own in zip(rows, found.tolist(), strict=True)]
        num = len(self._training)
        self._training, self._held_out = complete[:num], complete[num:]

    def _accumulate(self, batch: Sequence[int]) -> Row:
        rows = [self._training[number] for number in batch]
        row: Row = self._loss.accumulate(self._pieces(rows), rows)
        return row

    def _measure(self, rows: Sequence[Any]) -> Row:
        measured: Row = self._loss.measure(self._pieces(rows), rows)
        return measured

    def _pieces(self, rows: Sequence[Any]) -> list[list[Any]]:
        """Return this rank's part of the rows, in micro-batches."""
        return [[rows[place] for place in places] for places in self._places(rows)]

    def _places(self, rows: Sequence[Any]) -> list[list[int]]:
        """Return the indices of this rank's rows, in micro-batches; equally many on every rank if sharded."""
        config = self._settings.config
        sizes = [size_of(row, packed=config.packing) for row in rows]
        parts = balanced([cost(size) for size in sizes], self._ranks.size)
        own = parts[self._ranks.rank] if self._ranks.rank < len(parts) else []
        pieces = micro_batches([sizes[number] for number in own], config.micro_batch_tokens, packed=config.packing)
        if is_sharded(self._net):
            num = int(self._ranks.all_max(torch.tensor(float(len(pieces)))))
            pieces += [[] for _ in range(num - len(pieces))]
        return [[own[index] for index in piece] for piece in pieces]

    def finish(self) -> Row:
        """Write the trained model atomically and delete the checkpoints; returns the model's measurements."""
        kept = self._kept
        result: Row = {name: kept[name] for name in HELD_OUT_RESULTS if name in kept}
        if kept:
            result["best_step"] = kept["step"]
        dtype = (
            AutoConfig.from_pretrained(self._settings.place.model_path, local_files_only=True).dtype or torch.float32
        )
        measured = self._measured_rewards(dtype) if self._settings.name == "reward_model" else None
        if measured:
            result |= measured.measures()
        with checkpoint.shared_folder(self._settings.output_path, self._ranks) as folder:
            self._write(folder, dtype)
            with self._ranks.agreed():
                if measured and self._ranks.rank == 0:
                    measured.write(folder, self._record() | result)
        if self._checkpoints:
            self._checkpoints.remove()
        return result

    def _measured_rewards(self, dtype: torch.dtype) -> MeasuredRewards:
        """Compute the rewards, in the written dtype, of the fresh pairs or else of the held-out ones."""
        self._round(dtype)
        settings, pairs = self._settings, self._held_out
        if settings.fresh_path is not None:
            pairs, _ = self._read(settings.fresh_path, BrokenRows(settings.reading.broken_rows))
        places = self._places(pairs)
        pieces = [[pairs[place] for place in piece] for piece in places]
        return MeasuredRewards(*self._loss.rewards(pieces, places, len(pairs)))

    def _record(self) -> dict[str, Any]:
        """Return the record of the training for the model's folder."""
        settings, paths = self._settings, [source.path for source in self._settings.sources]
        return {
            "data": [path.name for path in (*paths, settings.more_path) if path is not None],
            "member": settings.member,
            "seed": settings.member_seed,
            "settings": settings.stage.model_dump(),
            **self._counts,
        }

    @torch.no_grad()
    def _round(self, dtype: torch.dtype) -> None:
        """Round the weights to the dtype in which they are written."""
        for parameter in self._net.parameters():
            rows = local(parameter)
            rows.copy_(rows.to(dtype))

    def _write(self, folder: Path, dtype: torch.dtype) -> None:
        """Gather the model and write it on the first rank in `dtype`, that of its source. Collective."""
        first, source = self._ranks.rank == 0, self._settings.place.model_path
        tensors = {name: tensor.cpu() for name, tensor in policy_tensors(self._model, dtype) if first}
        adapter = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in adapter_tensors(self._model) if first}
        is_reward_model = self._settings.name == "reward_model"
        auto_class = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
        with self._ranks.agreed():
            if adapter:
                lora, inputs_first = self._settings.config.lora, has_inputs_first(self._model)
                write_adapter(folder / ADAPTER_FOLDER, adapter, lora, source, inputs_first=inputs_first)
            if first:
                checkpoint.write_model(folder, auto_class, self._model.config, tensors)
                self._tokenizer.save_pretrained(folder)
                write_settings_of(self._tokenizer, folder)
                for file in source.glob("generation_config.json"):
                    (folder / file.name).write_bytes(file.read_bytes())
