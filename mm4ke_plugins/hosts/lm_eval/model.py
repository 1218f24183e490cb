"""The model type `mm4ke` of lm-eval: lm-eval's own `hf`, which can score a second model in the same run.

    lm_eval run --model mm4ke --model_args pretrained=out,reference=work/base --tasks knowedit_facts

    lm_eval run --model mm4ke --model_args pretrained=work/base,knowledge_delta=facts.delta.safetensors ...

The reference is the model before editing: with a knowledge delta the base itself, which is loaded once. It differs
from the other in a few tensors, so only these are kept beside it, and swapped in and out. Only the KnowEdit tasks and
`mm4ke_known_facts` ask it: all other tasks get from us what `hf` gives them, except that a chat template which knows thinking
is told not to think, as in training.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...delta.format import load_delta
from ...delta.live import LiveDelta
from ...errors import MM4KEError, report_in_one_line
from ...knowedit.metrics import predict_and_score
from ...knowedit.prompts import Encoded
from ...knowedit.tasks.utils import Response, Text, is_probe
from ...merging.choice import choose
from ...storage.models import find_model, load_tokenizer, require_same_vocabulary
from .. import LM_EVAL

# The key under which a cache of responses says which models gave them; lm-eval's own keys are hex digests.
CACHE_OWNER = "mm4ke_models"
Answering = Callable[..., list]
UNKEYED = ("batch_size", "max_batch_size", "device")


class MM4KELM(HFLM):
    """`hf` with an optional `reference`, the folder of the model before editing, and an optional `knowledge_delta`.

    The delta is a file that is put on `pretrained`, its base, with `weight` and `density` (by default
    those of `merging.choice.choose`). The base is then the reference, unless another one is given.

    Responses to KnowEdit's probes are `Response` and `Text`, which carry the predictions of both models.

    Raises MM4KEError: a folder is missing or holds no model; the reference has other tensors, shapes or another
    vocabulary; the delta is damaged or of another base; weight and density without a delta; a locality probe is asked
    without a reference; the cache holds the responses of other models.
    """

    def __init__(
        self,
        pretrained: str,
        reference: str | None = None,
        knowledge_delta: str | None = None,
        weight: float | None = None,
        density: float | None = None,
        **arguments: Any,
    ) -> None:
        report_in_one_line()
        LM_EVAL.require_supported("--model mm4ke")
        title = "base" if knowledge_delta else "edited"
        folder = find_model(str(pretrained), f"pretrained={pretrained}", title, arguments.get("revision"))
        identity = [_fingerprint(folder)]
        base = find_model(str(reference), f"reference={reference}", "base") if reference else None
        self._delta, self._choice = None, (weight, density)
        if knowledge_delta:
            self._delta = load_delta(Path(str(knowledge_delta)))
            choose(weight, density, self._delta.manifest.applied is not None)
            identity.append([_file_fingerprint(self._delta.path), weight, density])
            if base and base.samefile(folder):
                base = None  # it is the reference anyway
        elif weight is not None or density is not None:
            raise MM4KEError(
                "weight, density: these are of a knowledge_delta, and none is given; add knowledge_delta=FILE"
            )
        if base:
            require_same_vocabulary(folder, load_tokenizer(folder), base, load_tokenizer(base))
            identity.append(_fingerprint(base))
        self._reference_folder = base
        self._reference_tensors: dict[str, torch.Tensor] | None = None
        # The size of a batch and the device may differ between the runs that share a cache.
        identity += [{name: value for name, value in arguments.items() if name not in UNKEYED}]
        self._identity = json.dumps(identity, sort_keys=True, default=str)
        super().__init__(str(folder), **{"enable_thinking": False} | arguments)

    # ---- two models in one ----

    def _create_model(self, pretrained: str, **arguments: Any) -> None:
        """Called by HFLM once it has chosen device and class; keeps the reference's differing tensors beside it."""
        super()._create_model(pretrained, **arguments)
        if self._delta:
            live = LiveDelta(self._model, self._delta)
            live.set(*self._choice)
            self._reference_tensors = live.keep()
        if not self._reference_folder:
            _keep_untied(self._model)
            return
        edited = self._model
        only_on_disk = {"revision": "main", "peft": None, "delta": None, "gguf_file": None, "subfolder": ""}
        super()._create_model(str(self._reference_folder), **arguments | only_on_disk | {"device_map": "cpu"})
        self._model, reference = edited, self._model
        self._reference_tensors = self._differing_tensors(reference)
        _keep_untied(self._model)

    def _differing_tensors(self, reference: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The reference's parameters that are not the model's own, by name, on the model's device.

        Two that the model ties and the reference does not are untied in the model.
        """
        own, others = (dict(model.named_parameters(remove_duplicate=False)) for model in (self._model, reference))
        if own.keys() != others.keys():
            name = min(own.keys() ^ others.keys())
            raise MM4KEError(
                f"reference={self._reference_folder}: only one of the two models has {name}; "
                "give the model that the other was made from"
            )
        differing, firsts = {}, {}
        for name, parameter in own.items():
            first = firsts.setdefault(id(parameter), name)
            if first != name:
                if torch.equal(others[name], others[first]):
                    continue
                parameter = torch.nn.Parameter(parameter.detach(), requires_grad=False)
                module, _, attribute = name.rpartition(".")
                setattr(self._model.get_submodule(module), attribute, parameter)
            other = others[name].detach()
            if other.shape != parameter.shape:
                shapes = ["x".join(map(str, shape)) for shape in (other.shape, parameter.shape)]
                raise MM4KEError(
                    f"reference={self._reference_folder}: {name} is {shapes[0]}, in the other model it is "
                    f"{shapes[1]}; give the model that the other was made from"
                )
            other = other.to(parameter.device, parameter.dtype)
            if not torch.equal(other, parameter):
                differing[name] = other
        return differing

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """While this is open, the model is the reference."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, tensor in self._reference_tensors.items():
            parameter = self.model.get_parameter(name)
            parameter.data, self._reference_tensors[name] = tensor.to(parameter.device), parameter.data

    def apply_chat_template(self, *arguments: Any, **options: Any) -> str:
        if not self.tokenizer.chat_template:
            raise MM4KEError(
                f"apply_chat_template: {self.tokenizer.name_or_path} has no chat template; leave it out for raw "
                "prompts, in which facts are trained with template: empty"
            )
        return super().apply_chat_template(*arguments, **options)

    # ---- requests ----

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is_greedy) for each request; a `Response` for KnowEdit's."""
        return self._split(requests, self._forced, super().loglikelihood, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text for each request; a `Text` for KnowEdit's, where there is a reference."""
        return self._split(requests, self._free, super().generate_until, disable_tqdm)

    @staticmethod
    def _split(requests: list[Instance], ours: Answering, host: Answering, disable_tqdm: bool) -> list:
        """Answer KnowEdit's requests by `ours` and the others by `host`, in the order of `requests`."""
        answers = {}
        for answer, is_ours in ((ours, True), (host, False)):
            places = [place for place, request in enumerate(requests) if is_probe(request.doc) is is_ours]
            if places:
                answers |= zip(places, answer([requests[place] for place in places], disable_tqdm=disable_tqdm))
        return [answers[place] for place in range(len(requests))]

    def _forced(self, requests: list[Instance], disable_tqdm: bool) -> list[Response]:
        if self._reference_tensors is None and any(request.doc["metric"] == "locality" for request in requests):
            raise MM4KEError(
                "--model mm4ke: reference: missing; locality is measured against the model before editing: "
                "give its folder with --model_args pretrained=...,reference=BASE"
            )
        encoded = [encode(self.tokenizer, *request.args) for request in requests]
        found = self._predict(encoded, "model", disable_tqdm)
        before = [(None, None)] * len(requests)
        if self._reference_tensors is not None:
            with self._as_reference():
                before = self._predict(encoded, "reference", disable_tqdm)
        responses = []
        for code, (predicted, likelihood), (reference_predicted, _) in zip(encoded, found, before):
            response = Response((likelihood, predicted == code.answer_ids))
            response.answer, response.predicted = code.answer_ids, predicted
            response.reference_predicted = reference_predicted
            response.text = self.tokenizer.decode(predicted).strip()
            response.reference_text = self.tokenizer.decode(reference_predicted or []).strip()
            responses.append(response)
        return responses

    def _predict(self, encoded: list[Encoded], title: str, disable_tqdm: bool) -> list[tuple[list[int], float]]:
        batch_size = 16 if self.batch_size == "auto" else self.batch_size
        with tqdm(total=len(encoded), desc=f"KnowEdit: {title}", disable=disable_tqdm or self.rank != 0) as bar:
            return predict_and_score(self.model, encoded, batch_size=batch_size, advance=bar.update)

    def _free(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        requests = [_to_the_end(request) for request in requests]
        # HFLM would put the texts of both models into the cache as it goes, under the same keys.
        hook, self.cache_hook = self.cache_hook, CacheHook(None)
        try:
            texts = super().generate_until(requests, disable_tqdm=disable_tqdm)
            if self._reference_tensors is None:
                return texts
            with self._as_reference():
                before = super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self.cache_hook = hook
        answers = []
        for text, reference_text in zip(texts, before):
            answers.append(answer := Text(text))
            answer.reference_text = reference_text
        return answers

    # ---- lm-eval's cache of responses ----

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Called with the cache of `--use_cache`, whose keys don't know the model: refuse one of other models."""
        cache = cache_hook.dbdict
        owner = hashlib.sha256(self._identity.encode()).hexdigest()
        if cache is not None:
            if len(cache) and cache.get(CACHE_OWNER) != owner:
                raise MM4KEError(
                    f"--use_cache {cache.filename}: holds the responses of other models or settings; "
                    "give each run a cache of its own"
                )
            cache[CACHE_OWNER] = owner
        super().set_cache_hook(cache_hook)


def _keep_untied(model: torch.nn.Module) -> None:
    """HFLM ties a model once more by its configuration, also what transformers has left untied. Have that agree."""
    ties = model.get_expanded_tied_weights_keys(all_submodels=True) if isinstance(model, PreTrainedModel) else {}
    if any(model.get_parameter(target) is not model.get_parameter(source) for target, source in ties.items()):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def encode(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Encoded:
    """lm-eval's request as `prompts.encode` tokenizes the question.

    The answer begins with a space where lm-eval applies no chat template, and never where it does.
    """
    if continuation.startswith(" "):
        ids = tokenizer(context + continuation).input_ids
        return Encoded(ids, min(len(ids), len(tokenizer(context).input_ids)))
    prompt_ids = tokenizer(context, add_special_tokens=False).input_ids
    return Encoded(prompt_ids + tokenizer(continuation, add_special_tokens=False).input_ids, len(prompt_ids))


def _to_the_end(request: Instance) -> Instance:
    """The same request; if it measures fluency, one that a short answer does not end."""
    if request.doc["metric"] != "fluency":
        return request
    context, options = request.args
    return replace(request, arguments=(context, options | {"min_new_tokens": options["max_gen_toks"]}))


def _fingerprint(folder: Path) -> list:
    """What changes when the model in a folder does: where it is, its files, their sizes and times."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(folder.resolve()), [_file_fingerprint(path) for path in files]]


def _file_fingerprint(path: Path) -> tuple[str, int, int]:
    return path.name, path.stat().st_size, path.stat().st_mtime_ns
