"""R-SFT as a part of `llamafactory-cli train`, switched on by `rsft: true` in the recipe.

Three seams of LLaMA-Factory 0.9.5, each replaced in the module that looks it up:

    llamafactory.hparams.parser       the recipe's keys      RsftArguments joins FinetuningArguments
    llamafactory.model.adapter        what is trained        _setup_freeze_tuning selects the FFN of rsft_layers
    llamafactory.train.sft.workflow   how it is trained      CustomSeq2SeqTrainer visits instead of stepping

Recipes without `rsft: true` get the objects that they would get without us: the classes that are parsed and trained
with are LLaMA-Factory's own.

One step of the Trainer is one visit of one fact, or of one batch of them. So the learning-rate schedule, logging,
saving and resuming count visits, and the Trainer's own optimizer.step() after the visit finds no gradients and does
nothing.
"""

import functools
import os
from pathlib import Path

import torch
from datasets.fingerprint import Hasher
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import cached_file

from ...delta.format import load_delta, save_delta
from ...errors import MM4KEError, report_in_one_line
from ...rsft.algorithm import EpochStatistics, LossNotFinite, Visit
from ...rsft.forward import FastForward, active_dropout
from ...rsft.guard import Guard
from ...rsft.layers import ffn_parameter_names
from ...rsft.losses import answer_losses, samples_of
from ...rsft.prefix import PREFIX_CACHE_MB
from ...rsft.provenance import Provenance, joint_hash, parameter_hashes
from ...rsft.subject import gradient_only_at, learned_tokens, trained_ffns
from ...rsft.visitor import Visitor
from ...storage.checkpoint import open_safetensors, tensor_files
from ...storage.names import name_in
from ...storage.tensors import tensor_sha256
from .. import LLAMAFACTORY
from .checkpoint import Output, config_settings, needed_no_update, take_recipe, written_to
from .data import renew_cached_facts
from .recipe import advice_on, asks_for_rsft, check_recipe, recipe_name, with_rsft_keys, without_rsft_keys

# What a knowledge delta says of its training.
DELTA_RECIPE_KEYS = (
    "rsft_layers",
    "rsft_modules",
    "rsft_steps_per_sample",
    "rsft_loss_threshold",
    "rsft_gradient_at",
    "rsft_guard_weight",
    "per_device_train_batch_size",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
)


def register(module) -> None:
    """Called once for each seam, right after LLaMA-Factory has executed it."""
    {
        "llamafactory.hparams.parser": add_recipe_keys,
        "llamafactory.model.adapter": select_ffn_of_layers,
        "llamafactory.train.sft.workflow": substitute_trainer,
    }[module.__name__](module)


def add_recipe_keys(parser) -> None:
    """Parse, document and check the `rsft` keys; `export` and `chat` accept them too, so that one recipe serves all."""
    original = parser.FinetuningArguments
    for arguments in (parser._TRAIN_ARGS, parser._INFER_ARGS, parser._EVAL_ARGS):
        arguments[arguments.index(original)] = with_rsft_keys(original)

    def ignoring_rsft_keys(parse):
        @functools.wraps(parse)
        def parse_and_drop(args=None):
            return tuple(without_rsft_keys(arguments) for arguments in parse(args))

        return parse_and_drop

    parser._parse_infer_args = ignoring_rsft_keys(parser._parse_infer_args)
    parser._parse_eval_args = ignoring_rsft_keys(parser._parse_eval_args)
    parse_train_args = parser._parse_train_args

    @functools.wraps(parse_train_args)
    def parse_and_check(args=None):
        try:
            parsed = parse_train_args(args)
        except ValueError as error:  # transformers checks its own keys as it reads them
            if asks_for_rsft(parser.read_args(args)):
                report_in_one_line()
                raise MM4KEError(f"{recipe_name()}: {advice_on(error)}") from error
            raise
        model_args, data_args, training_args, finetuning_args, _ = parsed
        if finetuning_args.rsft:
            report_in_one_line()
            LLAMAFACTORY.require_supported("rsft: true")
            check_recipe(model_args, data_args, training_args, finetuning_args)
            if training_args.do_train:
                if training_args.device.type == "cpu" and (hint := wait_policy_hint()):
                    parser.logger.warning_rank0(hint)
                renew_cached_facts(model_args, data_args)
                # Not a field: it is no key of a recipe.
                finetuning_args.recipe = take_recipe(model_args, data_args, training_args, finetuning_args)
        return tuple(without_rsft_keys(arguments) for arguments in parsed)

    parser._parse_train_args = parse_and_check


def wait_policy_hint() -> str | None:
    """How training on a CPU gets faster beside other work. OpenMP reads this before we are there, so it's up to users."""
    if torch.get_num_threads() == 1 or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return None
    return "R-SFT: beside any other busy process this training is several times faster with OMP_WAIT_POLICY=passive."


def select_ffn_of_layers(adapter) -> None:
    """With `rsft: true`, freeze everything but the FFN of the layers that the recipe names."""
    setup_freeze_tuning = adapter._setup_freeze_tuning

    @functools.wraps(setup_freeze_tuning)
    def setup(model, finetuning_args, is_trainable, cast_trainable_params_to_fp32):
        if not (is_trainable and getattr(finetuning_args, "rsft", False)):
            return setup_freeze_tuning(model, finetuning_args, is_trainable, cast_trainable_params_to_fp32)
        try:
            layers, modules = finetuning_args.rsft_layers, finetuning_args.rsft_modules
            names = ffn_parameter_names(model, layers, modules, finetuning_args.rsft_gradient_at)
        except MM4KEError as error:
            raise MM4KEError(f"{recipe_name()}: {error}") from None
        trained = set(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
            if name in trained and cast_trainable_params_to_fp32:
                parameter.data = parameter.data.to(torch.float32)
        adapter.logger.info_rank0(f"R-SFT trains: {', '.join(names)}")

    adapter._setup_freeze_tuning = setup


def substitute_trainer(workflow) -> None:
    """With `rsft: true`, `CustomSeq2SeqTrainer` makes a trainer that visits samples as Algorithm 1 does.

    The class stays the one that programs compare with, derive from and pickle; only what it makes is another.
    """
    from llamafactory.data import loader  # not earlier: LLaMA-Factory imports us while it imports itself

    from . import facts

    facts.keep_facts_whole(loader, workflow)
    original = workflow.CustomSeq2SeqTrainer

    class RsftTrainer(original):
        def __init__(self, *, model, data_collator, **kwargs):
            refuse_damaged(model)  # before there is an output_dir
            super().__init__(model=model, data_collator=facts.OwnCollator(data_collator), **kwargs)
            self._refuse_mixed_dtypes()
            self.visited: Visit | None = None
            self.visit_grad_norm: torch.Tensor | float | None = None
            self.visitor = make_visitor(self)
            self.add_callback(RsftCallback(self, workflow.logger))
            self.output: Output | None = None
            self.base_hashes: dict[str, str] = {}

        def train(self, resume_from_checkpoint=None, **kwargs):
            """Train from a checkpoint of this very training, or anew; nothing where output_dir has its result."""
            recipe = self.finetuning_args.recipe
            self.base_hashes = parameter_hashes(self.model)
            guard_texts = recipe.data_args.rsft_guard_texts
            guarded = {} if guard_texts is None else {"rsft_guard": Hasher.hash(guard_texts)}
            provenance = Provenance(
                recipe.settings | config_settings(self.model.config) | guarded,
                joint_hash(self.base_hashes),
                [Hasher.hash(fact) for fact in self.train_dataset],
            )
            if self.finetuning_args.rsft_save_delta:
                self._base_tensors()  # an error now and not after the training
            self.output = Output(Path(self.args.output_dir), provenance, self._fact)
            try:
                checkpoint = self.output.prepare(recipe.resume, self.args.overwrite_output_dir)
                if self.output.is_finished:
                    return self._take_result()
                if guard_texts is not None:  # now, while the model is the base
                    ffns, weight = trained_ffns(self.model), self.finetuning_args.rsft_guard_weight
                    columns = (list(self.train_dataset[column]) for column in ("input_ids", facts.LEARNS))
                    learned = learned_tokens(*columns) if facts.LEARNS in self.train_dataset.column_names else ()
                    self.visitor.guard = Guard(self.model, ffns, guard_texts, weight, learned)
                with written_to(self.output.folder):
                    return super().train(resume_from_checkpoint=checkpoint and str(checkpoint), **kwargs)
            except BaseException:
                self.output.lock.release()
                raise

        def _init_training_state(self, max_steps, steps_per_epoch, num_train_epochs, *args, **kwargs):
            """Says how many epochs are behind a checkpoint: all, if it was saved when there was nothing left to learn."""
            done = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, *args, **kwargs)
            return (num_train_epochs, 0) if needed_no_update(self.state.log_history) else done

        def _take_result(self) -> TrainOutput:
            """As if the training had just ended, of which output_dir has the model or the delta."""
            folder = self.output.folder
            workflow.logger.info_rank0(f"R-SFT: {folder} has the result of this very training: nothing is trained.")
            if self.output.has_model:
                self._load_from_checkpoint(str(folder))
            else:
                delta, (base, names) = load_delta(self.output.delta), self._base_tensors()
                for name in delta.manifest.tensors:
                    self.model.get_parameter(names[name]).data.copy_(delta.edited(name, base[name]))
            self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            metrics = next(entry for entry in reversed(self.state.log_history) if "train_loss" in entry)
            metrics = {key: value for key, value in metrics.items() if key not in ("epoch", "step")}
            return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

        def _fact(self, index: int) -> str:
            """The end of a fact as the model reads it, which has the question and the answer."""
            text = self.processing_class.decode(self.train_dataset[index]["input_ids"], skip_special_tokens=True)
            text = " ".join(text.split())
            return text if len(text) <= 80 else f"... {text[-80:]}"

        def _refuse_mixed_dtypes(self) -> None:
            dtypes = {parameter.dtype for parameter in self.model.parameters()}
            if len(dtypes) > 1 and not self.args.bf16:
                names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
                raise MM4KEError(
                    f"{recipe_name()}: bf16: false: the trained FFN is float32 in a model of {names}; set bf16: true "
                    "(on a CPU with use_cpu: true), or save the model in float32 first, which is faster on a CPU"
                )

        def save_model(self, output_dir=None, _internal_call=False):
            """Called within the training for checkpoints, which are whole models, and once after it."""
            if _internal_call:
                super().save_model(output_dir, _internal_call)
                return
            there = self.output is not None and self.output.is_finished
            if self.finetuning_args.rsft_save_model and not (there and self.output.has_model):
                with written_to(Path(self.args.output_dir)):
                    super().save_model(output_dir, _internal_call)
            if self.finetuning_args.rsft_save_delta and not (there and self.output.delta.exists()):
                base, names = self._base_tensors()
                arguments = self.finetuning_args.to_dict() | self.args.to_dict()
                recipe = {key: arguments[key] for key in DELTA_RECIPE_KEYS}
                save_delta(
                    self.output.delta,
                    base,
                    {name: self.model.get_parameter(names[name]) for name in base},
                    architecture=type(self.model).__name__,
                    recipe=recipe | {"provenance": self.output.provenance.sha256()},
                    facts=len(self.train_dataset),
                )
                workflow.logger.info_rank0(f"R-SFT: the knowledge delta is in {self.output.delta}")

        def save_state(self):
            """The last that is written: from here on the training counts as finished."""
            with written_to(self.output.folder):
                super().save_state()
            if not self.finetuning_args.rsft_save_model:
                self.output.remove_checkpoints()
            self.output.lock.release()

        def _base_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
            """The base's trained tensors from its files, in their own dtypes, and the model's name of each."""
            model_args, config = self.finetuning_args.recipe.model_args, self.model.config
            file = cached_file(
                config._name_or_path,
                "config.json",
                cache_dir=model_args.cache_dir,
                # The very commit that was loaded, even if a branch has moved on since.
                revision=getattr(config, "_commit_hash", None) or model_args.model_revision,
                token=model_args.hf_hub_token,
            )
            folder = Path(file).parent
            files = tensor_files(folder)
            trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            names = {name_in(files, name, self.model.base_model_prefix): name for name in trained}
            if None in names:
                raise MM4KEError(
                    f"{recipe_name()}: rsft_save_delta: true: {folder} has no tensor {names[None]}; this model's files "
                    "name their tensors in another way, use `mm4ke delta extract` after the training"
                )
            tensors = {name: open_safetensors(files[name]).get_tensor(name) for name in names}
            for name, tensor in tensors.items():
                wide = self.model.get_parameter(names[name]).dtype
                # A model that is computed in 16 bit may have been rounded when it was loaded.
                loaded = (tensor.to(dtype).to(wide) for dtype in (wide, torch.bfloat16, torch.float16))
                if all(tensor_sha256(tensor) != self.base_hashes[names[name]] for tensor in loaded):
                    raise MM4KEError(
                        f"{recipe_name()}: rsft_save_delta: true: {name} in {folder} is not what the training started "
                        "from; don't change the base model meanwhile, and merge adapters into it before"
                    )
            return tensors, names

        def _prepare_inputs(self, inputs):
            for key in (facts.OWN, facts.LEARNS):  # an evaluation's batch has them still
                inputs.pop(key, None)
            return super()._prepare_inputs(inputs)

        def _samples_of(self, batch, own, learns) -> list:
            samples = samples_of(batch, self.args.device, own, learns)
            if samples is None:
                self.visitor.fast = None
                samples = [None] * len(batch["input_ids"])
                if len(samples) > 1:
                    raise MM4KEError(
                        f"{recipe_name()}: per_device_train_batch_size: {self.args.per_device_train_batch_size}: the "
                        f"batches of this model have {', '.join(batch)}; give 1"
                    )
            return samples

        def training_step(self, model, inputs, num_items_in_batch=None):
            """One visit. Returns the mean judged loss before its first update: the log has what tau judges."""
            model.train()
            own, learns = inputs.pop(facts.OWN), inputs.pop(facts.LEARNS, None)
            samples = self._samples_of(inputs, own, learns)
            inputs = self._prepare_inputs(inputs)
            self.visit_grad_norm = 0.0
            try:
                self.visited = self.visitor.visit(
                    samples,
                    number=self.state.global_step,
                    plain_losses=lambda indices: self._plain_losses(model, inputs, own, learns, indices),
                    backward=self.accelerator.backward,
                    step=lambda: self._step(model),
                    zero_grad=model.zero_grad,
                )
            except LossNotFinite as error:
                text = self.processing_class.decode(inputs["input_ids"][error.index], skip_special_tokens=True)
                raise MM4KEError(
                    f"{recipe_name()}: learning_rate: {self.args.learning_rate}: {error} (visit "
                    f"{self.state.global_step + 1}, {' '.join(text.split())[:120]!r}); give a lower learning rate"
                ) from None
            losses = self.visited.first_losses
            return torch.tensor(sum(losses) / len(losses), device=self.args.device)

        def _plain_losses(self, model, inputs, own, learns, indices) -> tuple[torch.Tensor, torch.Tensor]:
            with gradient_only_at(None if learns is None else learns[indices], self.model):
                if len(inputs["input_ids"]) == 1:
                    # Without num_items_in_batch the model returns the mean over all trained tokens.
                    loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                    return loss.reshape(1), answer_losses(outputs.logits.detach(), inputs["labels"], own)[1]
                labels = inputs["labels"][indices]
                part = {key: value[indices] for key, value in inputs.items() if key != "labels"}
                return answer_losses(model(**part).logits, labels, own[indices])

        def _step(self, model) -> None:
            if self.args.max_grad_norm > 0:
                self.visit_grad_norm = self._clip_grad_norm(model)
            self.optimizer.step()

        def _get_grad_norm(self, model, grad_norm=None):
            # The gradients were used and cleared within the visit: log the last ones, not the norm of nothing.
            return self.visit_grad_norm

    @functools.wraps(original.__init__, assigned=())  # or it would hide the class's signature
    def new(cls, finetuning_args=None, *args, **kwargs):
        asked = cls is original and getattr(finetuning_args, "rsft", False)
        return super(original, cls).__new__(RsftTrainer if asked else cls)

    original.__new__ = new


def refuse_damaged(model: torch.nn.Module) -> None:
    """Raises MM4KEError for a model with NaN or infinite parameters, which would look like a learning rate too high."""
    for name, parameter in model.named_parameters():
        if not parameter.detach().sum(dtype=torch.float32).isfinite():
            raise MM4KEError(
                f"{recipe_name()}: model_name_or_path: {model.config._name_or_path}: {name} holds NaN or infinity; "
                "use an undamaged copy of the model"
            )


def make_visitor(trainer) -> Visitor:
    """With the fast paths, unless this model or this recipe rules them out.

    Raises MM4KEError for a recipe that asks for them in a model with dropout.
    """
    arguments, model = trainer.finetuning_args, trainer.model
    megabytes = arguments.rsft_prefix_cache_mb
    fast = None
    if dropout := active_dropout(model):
        if megabytes is not None:
            raise MM4KEError(
                f"{recipe_name()}: rsft_prefix_cache_mb: {megabytes}: this model has dropout ({dropout}), with which no "
                "two passes of a fact are alike; switch it off in the model's config.json, or leave this key out"
            )
    elif not model.is_gradient_checkpointing:
        fast = FastForward(model, min(arguments.rsft_layers), (megabytes or PREFIX_CACHE_MB) * 2**20)
    return Visitor(
        fast, loss_threshold=arguments.rsft_loss_threshold, steps_per_sample=arguments.rsft_steps_per_sample
    )


class RsftCallback(TrainerCallback, ExportableState):
    """Keeps the statistics of an epoch, writes them to the log and `trainer_state.json`, and ends a finished training.

    The statistics are part of every checkpoint, so an epoch that was interrupted is resumed with its sums so far. So is
    the provenance, by which `Output` knows a training's own checkpoints.
    """

    def __init__(self, trainer, logger):
        self.trainer = trainer
        self.logger = logger
        self.statistics = EpochStatistics()

    def state(self) -> dict:
        output = self.trainer.output
        provenance = output and output.provenance.to_dict()
        return {"args": {}, "attributes": {"statistics": self.statistics.to_dict(), "provenance": provenance}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.statistics = EpochStatistics(**saved["attributes"]["statistics"])

    def on_step_end(self, args, state, control, *, train_dataloader, **kwargs):
        self.statistics.add(self.trainer.visited)
        self._show_progress()
        # Not on_epoch_end: a checkpoint at the end of an epoch is saved before that, and must have this epoch's entry.
        if state.global_step % len(train_dataloader) == 0:
            if self.statistics.updates == 0:
                self.logger.info_rank0(
                    f"R-SFT: epoch {round(state.epoch)} needed no update, every fact's loss is under "
                    f"rsft_loss_threshold: training ends, the rest of {args.num_train_epochs:g} epochs would change "
                    "nothing."
                )
                control.should_training_stop = True
            self._log_statistics()

    def on_train_end(self, args, state, control, **kwargs):
        if self.statistics.visits:  # max_steps ended the training within an epoch
            self._log_statistics()

    def _log_statistics(self) -> None:
        statistics, self.statistics = self.statistics, EpochStatistics()
        control = self.trainer.control
        should_log = control.should_log
        self.trainer.log({f"rsft_{key}": value for key, value in statistics.summary().items()})
        control.should_log = should_log  # log() clears it, and the step's own loss would not be logged

    def _show_progress(self) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix(
                    converged=f"{self.statistics.converged}/{self.statistics.visits}",
                    updates=self.statistics.updates,
                    refresh=False,
                )
