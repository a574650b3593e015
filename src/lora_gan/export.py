"""Export of a run's generator as a PEFT adapter or a merged model, with a model card."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig

from lora_gan.backbone import GENERATOR
from lora_gan.checkpointing.adapters import save_adapter
from lora_gan.errors import LoraGANError
from lora_gan.inference import Saved, load_saved
from lora_gan.sampling import Sampling, eos_ids

UNKNOWN = "not recorded: the checkpoint is not in the folder of its run"
LICENCE = """{what} is made from the base and trained on the data named above: the licences of both apply to it.
lora-gan itself is under the MIT licence, which says nothing about what is trained with it."""
USE = {
    False: """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})""",
    True: """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})""",
}
CARD = """---
{header}
---

# {name}

{what} of `{base}`, trained with lora-gan: adversarial, reward-guided fine-tuning with two LoRA adapters on
one frozen model.

## Use

```python
{use}
```

Training prompts ended where the completion begins; see the data's template in the configuration.

## Base

`{base}`

## Data

{data}

## Held-out results

{held_out}

## Licence

{licence}

## Configuration

{configuration}
"""


def export(
    ckpt_path: str, output: str = "exported", merge: bool = False, push_to_hub: str | None = None, private: bool = True
) -> None:
    """Write the generator of a checkpoint as a PEFT adapter or, merged with its base, as a plain model.

    Also write the tokenizer, the generation settings and a model card.

    Args:
        ckpt_path: Checkpoint of a run.
        output: Folder to write.
        merge: Write base + adapter as one model that plain transformers loads.
        push_to_hub: Repository, name/model, to upload the folder to; by default nothing is uploaded.
        private: Whether a repository created for the upload is private.

    Raises:
        LoraGANError: The checkpoint cannot be loaded, or the upload failed.
    """
    saved = load_saved(ckpt_path)
    backbone, folder = saved.backbone.cpu(), Path(output)
    settings = generation_settings(saved)
    if merge:
        with backbone.generator():
            merged = backbone.lm.merge_and_unload(adapter_names=[GENERATOR])
        merged.generation_config = settings
        merged.save_pretrained(folder)
    else:
        save_adapter(backbone, GENERATOR, folder)
        settings.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card(saved, push_to_hub or folder.name, merge), encoding="utf-8")
    print(f"written to {output}")
    if push_to_hub:
        print(f"uploaded to {_push(folder, push_to_hub, private)}")


def generation_settings(saved: Saved) -> GenerationConfig:
    """The sampling settings of training as a GenerationConfig of transformers."""
    given = saved.settings("model").get("sampling") or {}
    how = Sampling(**{f.name: given[f.name] for f in fields(Sampling) if f.name in given})
    drawn = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k} if how.do_sample else {}
    ends = eos_ids(saved.backbone)
    return GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        do_sample=how.do_sample,
        num_beams=how.num_beams,
        bos_token_id=saved.backbone.tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=ends[0],
        **drawn,
    )


def card(saved: Saved, name: str, merged: bool) -> str:
    """The model card: base, data, results, licence note, configuration."""
    what = "Merged model" if merged else "LoRA adapter"
    data = saved.settings("data")
    source = (data.get("source") or {}).get("class_path", "lora_gan.data.BuiltinWorld")
    header: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-gan", "reinforcement-learning"],
    }
    if not Path(saved.base).exists() and saved.base != "builtin":
        header["base_model"] = saved.base
    configuration = yaml.safe_dump(
        {key: saved.config[key] for key in ("seed_everything", "model", "data") if key in saved.config}
    )
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        name=name,
        what=what,
        base=saved.base,
        use=USE[merged].format(base=saved.base, name=name),
        data=f"`{source}`" + f", `{data['path']}`" * bool(data.get("path")) if data else UNKNOWN,
        held_out=saved.held_out or "not recorded: the run ended without a test",
        licence=LICENCE.format(what=f"This {what.lower()}" if merged else f"This {what}"),
        configuration=f"```yaml\n{configuration.strip()}\n```" if saved.config else UNKNOWN,
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
