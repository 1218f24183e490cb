"""What the benchmarks of R-SFT share: a recipe's model and batches as LLaMA-Factory makes them, and its training
loop taken apart, so that several ways to train can take turns on the same machine at the same time."""

import os
import platform
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, get_scheduler

from mm4ke_plugins.rsft.algorithm import Visit
from mm4ke_plugins.rsft.forward import FastForward
from mm4ke_plugins.rsft.layers import ffn_parameter_names
from mm4ke_plugins.rsft.losses import answer_losses, samples_of
from mm4ke_plugins.rsft.prefix import PREFIX_CACHE_MB
from mm4ke_plugins.rsft.visitor import Visitor

ROOT = Path(__file__).parents[2]


def machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "llamafactory", "mergekit"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{platform.machine()}, {device}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


class Recipe:
    """A recipe of R-SFT as LLaMA-Factory reads it: `model()` loads a fresh model, `batches` has an epoch's batches."""

    def __init__(self, path: Path, **overrides):
        import yaml
        from llamafactory.hparams import get_train_args
        from llamafactory.train.sft import workflow

        from mm4ke_plugins.hosts.llamafactory.facts import OWN, OwnCollator

        recipe = yaml.safe_load(path.read_text()) | {"plot_loss": False} | overrides
        with redirect_stdout(None):
            model_args, data_args, self.training, self.finetuning, _ = get_train_args(recipe)
            modules = workflow.load_tokenizer(model_args)
            template = workflow.get_template_and_fix_tokenizer(modules["tokenizer"], data_args)
            arguments = (template, model_args, data_args, self.training)
            rows = workflow.get_dataset(*arguments, stage="sft", **modules)["train_dataset"]
        self.tokenizer = modules["tokenizer"]
        self.folder = model_args.model_name_or_path
        collator = workflow.SFTDataCollatorWith4DAttentionMask
        collate = OwnCollator(collator(template=template, pad_to_multiple_of=8, **modules))
        size = self.training.per_device_train_batch_size
        self.batches = [
            dict(collate([rows[index] for index in range(start, min(start + size, len(rows)))]))
            for start in range(0, len(rows), size)
        ]
        self.own = [batch.pop(OWN) for batch in self.batches]  # of each batch, the answers' own tokens

    def model(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).train().requires_grad_(False)


@dataclass
class Run:
    """One model in training. `visit(n)` makes the n-th visit and keeps the time; the update is LLaMA-Factory's."""

    recipe: Recipe
    fast: type[FastForward] | None = FastForward
    seconds: float = 0.0
    updates: int = 0
    visits: list[Visit] = field(default_factory=list)

    def __post_init__(self):
        finetuning, training = self.recipe.finetuning, self.recipe.training
        self.model = self.recipe.model()
        self.names = ffn_parameter_names(self.model, finetuning.rsft_layers, finetuning.rsft_modules)
        self.trained = [self.model.get_parameter(name).requires_grad_(True) for name in self.names]
        self.optimizer = torch.optim.AdamW(self.trained, lr=training.learning_rate, weight_decay=0, fused=True)
        total = len(self.recipe.batches) * int(training.num_train_epochs)
        self.schedule = get_scheduler(training.lr_scheduler_type, self.optimizer, 0, total)
        self.visitor = Visitor(
            self.fast and self.fast(self.model, min(finetuning.rsft_layers), PREFIX_CACHE_MB * 2**20),
            loss_threshold=finetuning.rsft_loss_threshold,
            steps_per_sample=finetuning.rsft_steps_per_sample,
        )
        self.samples = [
            samples_of(batch, "cpu", own) for batch, own in zip(self.recipe.batches, self.recipe.own, strict=True)
        ]

    def visit(self, index: int) -> Visit:
        batch = self.recipe.batches[index]
        begin = time.perf_counter()
        visit = self.visitor.visit(
            self.samples[index],
            number=len(self.visits),
            plain_losses=lambda indices: self._plain_losses(batch, self.recipe.own[index], indices),
            backward=torch.Tensor.backward,
            step=self._step,
            zero_grad=self.model.zero_grad,
        )
        self.schedule.step()
        self.seconds += time.perf_counter() - begin
        self.updates += visit.updates
        self.visits.append(visit)
        return visit

    def _plain_losses(self, batch, own, indices) -> tuple[torch.Tensor, torch.Tensor]:
        if len(batch["input_ids"]) == 1:
            output = self.model(**batch)
            return output.loss[None], answer_losses(output.logits.detach(), batch["labels"], own)[1]
        part = {key: value[indices] for key, value in batch.items()}
        labels = part.pop("labels")
        return answer_losses(self.model(**part).logits, labels, own[indices])

    def _step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.training.max_grad_norm)
        self.optimizer.step()

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.trained])
