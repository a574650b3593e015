"""Export of a run's generator as a PEFT adapter or a merged model, with a model card."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lora_gan.atomic import atomic_folder
from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.bases import NAMES
from lora_gan.checkpointing.adapters import save_adapter
from lora_gan.data.templates import fields_of
from lora_gan.errors import LoraGANError
from lora_gan.inference import Saved, load_saved
from lora_gan.results import read_results
from lora_gan.sampling import Sampling, eos_ids
from lora_gan.types import Example

log = logging.getLogger("lora_gan")

CARD, NEW_CARD = "README.md", "MODEL_CARD.md"
MARKER = "export.json"  # lists the files of an export, so that a later one replaces nothing else
HOW = Sampling(do_sample=False)  # the defaults of `generate`
QUESTION = "What is the capital of France?"
UNKNOWN = "not recorded: the checkpoint is not in the folder of its run"
UNTESTED = "not recorded: these weights were not tested; `test --ckpt_path` with the run's configuration does it"


def export(
    ckpt_path: str,
    output: str = "exported",
    merge: bool = False,
    base: str | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
    dequantize: bool = False,
) -> None:
    """Write the generator of a checkpoint as a PEFT adapter or, merged with its base, as a plain model.

    Also write the tokenizer, generation settings (greedy, as ``generate`` completes) and a model card, which holds no
    rows of the data and no local paths. An earlier export in the folder is replaced; a README.md of your own stays.

    Args:
        ckpt_path: Checkpoint of a run, or "last" for the newest one in lightning_logs.
        output: Folder to write.
        merge: Write base + adapter as one model that plain transformers loads.
        base: Folder or hub id of the base, if it has moved since the training.
        push_to_hub: Repository, name/model, to upload the folder to; by default nothing is uploaded.
        private: Whether a repository created for the upload is private.
        dequantize: Load a base that was quantised in training as it was before, as on a machine without a GPU; a merged
            model is always made of that.

    Raises:
        LoraGANError: The folder holds other files, the checkpoint or its base cannot be loaded, or the upload failed.
    """
    folder = Path(output).expanduser().resolve()
    refuse_other_files(folder)
    saved = load_saved(ckpt_path, base, dequantize or merge)
    write_folder(saved.backbone.cpu(), folder, merge, card(saved, push_to_hub or folder.name, merge))
    print(f"{'merged model' if merge else 'adapter'} of {saved.path.name}, step {saved.step}, written to {output}")
    if push_to_hub:
        _say_what_is_uploaded(saved, folder, push_to_hub, private, merge)
        print(f"uploaded to {_push(folder, push_to_hub, private)}")


def write_folder(backbone: Backbone, folder: Path, merge: bool, text: str = "") -> None:
    """Write the generator, its tokenizer, generation settings and a card.

    Args:
        backbone: Not usable afterwards if ``merge``.
        folder: An earlier export in it is replaced.
        merge: Write base + adapter as one model.
        text: The model card; without one none is written.

    Raises:
        LoraGANError: The folder holds other files, or cannot be written.
    """
    refuse_other_files(folder)
    try:
        with atomic_folder(folder) as fresh:
            _write_weights(backbone, fresh, merge)
            backbone.tokenizer.save_pretrained(fresh)
            _write_card(text, fresh, folder)
    except OSError as error:
        raise LoraGANError(f"cannot write {folder}: {error}; choose another folder with --output") from error


# weights


def _write_weights(backbone: Backbone, folder: Path, merge: bool) -> None:
    settings = generation_settings(backbone)
    if merge:
        model = merged_model(backbone)
        model.generation_config = settings
        model.save_pretrained(folder)
    else:
        save_adapter(backbone, GENERATOR, folder)
        settings.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "generation_config.json", file)  # safetensors writes for the owner alone


def merged_model(backbone: Backbone) -> PreTrainedModel:
    """Base and generator as one plain model; the backbone is not usable afterwards.

    Tied word embeddings and head become two tensors where one of them has an adapter.
    """
    model = backbone.causal_lm
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    embeddings, head = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers)
    if embeddings.weight is head.weight and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    with backbone.generator():
        merged: PreTrainedModel = backbone.lm.merge_and_unload(adapter_names=[GENERATOR])
    return merged


def generation_settings(backbone: Backbone) -> GenerationConfig:
    """The settings by which ``generate`` completes, as a GenerationConfig of transformers.

    Without a length limit: evaluation programs and servers would cut every completion at it, whatever is asked of them.
    """
    ends = eos_ids(backbone)
    return GenerationConfig(
        do_sample=HOW.do_sample,
        bos_token_id=backbone.tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=ends[0],
    )


# the folder


def refuse_other_files(folder: Path) -> None:
    """Refuse a folder with files that are not of an earlier export.

    Raises:
        LoraGANError: There are such files, or the path is that of a file.
    """
    if folder.exists() and not folder.is_dir():
        raise LoraGANError(f"{folder} is a file; choose a folder with --output")
    ours = {*_marker(folder).get("files", ()), MARKER, CARD, NEW_CARD}
    others = sorted({path.name for path in folder.iterdir()} - ours) if folder.is_dir() else []
    if others:
        raise LoraGANError(
            f"{folder} holds files that are not of an earlier export, such as {others[0]}, and an export replaces the "
            "folder; choose another one with --output, or move them away"
        )


def _write_card(text: str, fresh: Path, folder: Path) -> None:
    """Write the card and the marker; a README.md that is not that of the earlier export stays."""
    edited = folder / CARD
    kept = edited.is_file() and _digest(edited.read_text(encoding="utf-8")) != _marker(folder).get("card")
    if kept:
        shutil.copy2(edited, fresh / CARD)
        log.warning("%s is your own and stays; the new model card is %s beside it", edited, NEW_CARD)
    if text:
        (fresh / (NEW_CARD if kept else CARD)).write_text(text, encoding="utf-8")
    files = sorted(path.name for path in fresh.iterdir())
    (fresh / MARKER).write_text(json.dumps({"files": files, "card": _digest(text)}, indent=2), encoding="utf-8")


def _marker(folder: Path) -> dict[str, Any]:
    """What an earlier export has left in the folder; empty where there was none."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


# the card

TEXT = """---
{header}
---

# {name}

{what} of `{base}`, trained with lora-gan: adversarial, reward-guided fine-tuning with two LoRA adapters on
one frozen model. These are the weights of step {step} ({checkpoint}).

## Use

```python
{use}
```

## Base

`{base}`

## Data

{data}

## Held-out results

{results}

## Licence

This {what_small} is made from the base and trained on the data named above: the licences of both apply to it.
lora-gan itself is under the MIT licence, which says nothing about what is trained with it.

## Configuration

{configuration}
"""
LOAD = {
    False: """from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
{imports}
{find_base}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), {name!r})
model.generation_config = GenerationConfig.from_pretrained({name!r})
""",
    True: """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r})
""",
}
ASK = """tokenizer = AutoTokenizer.from_pretrained({name!r})

{prompt}
completion = model.generate(**inputs, max_new_tokens={length})[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(completion, skip_special_tokens=True))"""


def card(saved: Saved, name: str, merged: bool) -> str:
    """The model card: how to use the model, base, data, results of these weights, licence note, configuration."""
    what = "merged model" if merged else "LoRA adapter"
    header: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-gan", "reinforcement-learning"],
    }
    if _on_hub(saved.base):
        header["base_model"] = saved.base
    configuration = yaml.safe_dump(
        {key: public(saved.config[key]) for key in ("seed_everything", "model", "data") if key in saved.config}
    )
    return TEXT.format(
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        name=name,
        what=what[0].upper() + what[1:],
        what_small=what,
        base=public(saved.base),
        step=saved.step,
        checkpoint=saved.path.name,
        use=example(saved, name, merged),
        data=_data(saved),
        results=_results(saved),
        configuration=f"```yaml\n{configuration.strip()}\n```" if saved.config else UNKNOWN,
    )


def example(saved: Saved, name: str, merged: bool) -> str:
    """Code that loads the export and completes a prompt as ``generate`` does."""
    named = saved.base in NAMES
    if named:
        base = f"locate({saved.base!r})  # this base comes with a Python package"
    elif _on_hub(saved.base):
        base = repr(saved.base)
    else:
        base = f"PeftConfig.from_pretrained({name!r}).base_model_name_or_path  # elsewhere, your copy of the base"
    load = LOAD[merged].format(
        name=name, find_base=f"base = {base}", imports="\nfrom lora_gan.bases import locate\n" if named else ""
    )
    return load + ASK.format(name=name, prompt=_prompt(saved), length=HOW.max_new_tokens)


def _prompt(saved: Saved) -> str:
    """Code that writes a prompt as in training."""
    asked, prompts = _asked(saved), saved.prompts
    if not prompts.chat:
        return f'prompt = {asked.prompt!r}\ninputs = tokenizer(prompt, return_tensors="pt")'
    messages = [{"role": m.role, "content": m.content} for m in asked.messages]
    if prompts.system is not None:
        messages = [{"role": "system", "content": prompts.system}, *(m for m in messages if m["role"] != "system")]
    options = "".join(f", {key}={value!r}" for key, value in (prompts.chat_template_kwargs or {}).items())
    lines = ",\n".join(f"    {message!r}" for message in messages)
    return (
        f"messages = [\n{lines},\n]\ninputs = tokenizer.apply_chat_template(\n"
        f'    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{options}\n)'
    )


def _asked(saved: Saved) -> Example:
    """A question as an example of the run; the names of the fields where its prompts have several."""
    try:
        return saved.prompts.asked(QUESTION)
    except LoraGANError:
        template = saved.prompts.templates[0]
        return saved.prompts.filled(template, {field: f"<{field}>" for field in fields_of(template)})


def _data(saved: Saved) -> str:
    data = saved.settings("data")
    default = "lora_gan.data.StandardFormat" if data.get("path") else "lora_gan.data.BuiltinWorld"
    source = (data.get("source") or {}).get("class_path", default)
    return f"`{source}`" + f", `{public(data['path'])}`" * bool(data.get("path")) if data else UNKNOWN


def _results(saved: Saved) -> str:
    """The tables of the tests of these weights; those of other checkpoints of the run are not shown."""
    if not saved.config:
        return UNKNOWN
    results = read_results(saved.path.absolute().parents[1], saved.step)
    tables = [f"{r.prompts} held-out prompts, step {r.step}:\n\n{r.table}" for r in results]
    return "\n\n".join(tables) or UNTESTED


def _on_hub(base: str) -> bool:
    return base not in NAMES and public(base) == base


def public(value: Any) -> Any:
    """A setting without local folders: of a path, only its name."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, str) and ("/" in value or "\\" in value) and _is_local(value):
        return Path(value).name
    return value


def _is_local(value: str) -> bool:
    try:
        path = Path(value).expanduser()
        return path.is_absolute() or value.startswith(".") or path.exists()
    except (OSError, RuntimeError):  # too long for a path, or ~ without a home
        return False


# the hub


def _say_what_is_uploaded(saved: Saved, folder: Path, repository: str, private: bool, merged: bool) -> None:
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"uploading to {repository} ({'private' if private else 'public'} if it is new): {files}")
    if not merged and not _on_hub(saved.base):
        log.warning(
            "adapter_config.json names the base by a folder of this machine, which others cannot load; upload the "
            "base, too, and set base_model_name_or_path to its id, or export with --merge true"
        )


def _push(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # the hub client raises a dozen unrelated classes
        raise LoraGANError(
            f"{folder} was written but could not be uploaded to {repository}: {type(error).__name__}: {error}; "
            "log in with hf auth login, check the repository's name, or upload the folder by hand"
        ) from error
