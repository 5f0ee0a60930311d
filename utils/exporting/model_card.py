"""Model cards as Hugging Face shows them: a README.md with YAML front matter.

The front matter is written as one JSON value a line, which is YAML as well.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from utils.exporting.facts import ModelFacts, used_settings
from utils.texts import as_text

# Shown in this order where a run has them, and all that its loss has; the rest is in config.json.
_SHOWN = {
    "data": ("root", "min_images", "image_size"),
    "model": ("network", "embedding_size"),
    "loss": (),
    "train": (
        "epochs",
        "batch_size",
        "optimizer",
        "lr",
        "weight_decay",
        "schedule",
        "warmup_epochs",
        "precision",
        "seed",
    ),
}


def model_card(facts: ModelFacts, weights: str, precision: str) -> str:
    """The README.md of a folder that holds `weights` and config.json."""
    parts = [
        _front_matter(facts),
        f"# {facts.name}",
        f"A face recognition network: an aligned face of {facts.image_size}x{facts.image_size} pixels becomes "
        f"{facts.embedding_size} numbers, whose cosine with those of another face tells how alike the two are.",
        _table(("", ""), _model_rows(facts, weights, precision)),
        "## Accuracy",
        _accuracy(facts),
        "## Training",
        _training(facts),
        "## How to use it",
        _usage(facts),
        "## Intended use and limits",
        _LIMITS,
        "## Licence",
        _licence(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: ModelFacts) -> str:
    fields: dict[str, Any] = {
        "license": facts.licence or "unknown",
        "library_name": "pytorch",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["face-recognition", "face-verification", "face-embedding", facts.network],
    }
    results = _index_results(facts)
    if results:
        fields["model-index"] = [{"name": facts.name, "results": results}]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"])


def _index_results(facts: ModelFacts) -> list[dict[str, Any]]:
    task = {"type": "image-feature-extraction", "name": "Face verification"}
    results = []
    for name, result in facts.tests.items():
        metrics = [
            {"type": metric, "name": f"{metric}, {result.get('protocol', '')}", "value": result[metric]}
            for metric in ("accuracy", "eer", "auc")
            if metric in result
        ]
        if metrics:
            results.append({"task": task, "dataset": {"type": name, "name": name}, "metrics": metrics})
    return results


def _model_rows(facts: ModelFacts, weights: str, precision: str) -> list[tuple[str, str]]:
    size = facts.image_size
    return [
        ("Network", f"`{facts.network}`, {facts.parameters / 1e6:.2f} million parameters"),
        ("Input", f"float32 [N, 3, {size}, {size}], RGB, (rgb - 127.5) / 127.5"),
        ("Output", f"float32 [N, {facts.embedding_size}]; divide by its length before comparing"),
        ("Alignment", "five points to insightface's 112x112 template" if size == 112 else "as the training set's"),
        ("Weights", f"`{weights}`, {precision}"),
    ]


def _accuracy(facts: ModelFacts) -> str:
    rows = []
    for name, result in facts.tests.items():
        protocol = str(result.get("protocol", ""))
        if "accuracy" in result:
            spread = f" ± {_percent(result['std'])}" if "std" in result else ""
            rows.append((name, protocol, "accuracy", _percent(result["accuracy"]) + spread))
        rows += [
            (name, protocol, f"TAR at FAR {point['far']:g}", _percent(point["tar"]) + _few(point))
            for point in result.get("points", ())
            if point.get("supported", True)
        ]
    if rows:
        mirrored = "with" if facts.mirror else "without"
        table = _table(("set", "protocol", "measure", "value"), rows)
        told = ""
        if facts.best_accuracy is not None:
            told = (
                f" The weights are the training's best by its verification sets ({_percent(facts.best_accuracy)} on "
                "average): the accuracy on one of those is the best of many tries."
            )
        return f"{table}\n\nMeasured {mirrored} the mirror image added.{told}"
    if facts.best_accuracy is not None:
        return (
            f"On its verification sets the training reached {_percent(facts.best_accuracy)} on average (10 folds, "
            f"accuracy of the best epoch, by which the weights were chosen). It was not tested on other sets."
        )
    return "Nothing was measured."


def _few(point: dict[str, Any]) -> str:
    """That a rate hangs on few pairs, and between which values it may lie."""
    if point.get("support") != "weak":
        return ""
    between = " to ".join(map(_percent, point.get("interval") or ()))
    return f" (few impostor pairs{f': {between}' if between else ''})"


def _training(facts: ModelFacts) -> str:
    used = used_settings(facts.settings)
    rows = [
        (f"`{section}.{field}`", as_text(used[section][field]))
        for section, fields in _SHOWN.items()
        for field in fields or used.get(section, {})
        if field in used.get(section, {})
    ]
    if not facts.settings.keys() & {"loss", "train"}:  # others say what the network is, not how it was trained
        return "The weights come from elsewhere; how they were trained is not known here."
    steps = f"\n\nThese are the weights after {facts.step:,} steps." if facts.step is not None else ""
    return f"{_table(('setting', 'value'), rows)}{steps} All settings are in `config.json`, as they were given."


def _usage(facts: ModelFacts) -> str:
    return f"""With a checkout of insightface-pytorch and this folder:

```python
import torch

embedder = torch.hub.load("CHECKOUT", "embedder", "THIS_FOLDER", source="local")
vectors = embedder.embed(images)  # uint8 [N, {facts.image_size}, {facts.image_size}, 3] RGB to float32 unit vectors
cosine = vectors[0] @ vectors[1]
```

Inside the checkout, `from models import load_embedder; load_embedder("THIS_FOLDER")` does the same, and
`python all_pair_test.py SET --model THIS_FOLDER` measures it. `python -m utils.export THIS_FOLDER --format onnx`
makes an ONNX file of it."""


_LIMITS = """For comparing aligned faces: are two pictures of one person, which known person is this, which pictures of
a collection belong together. The threshold on the cosine has to be chosen on data like one's own: the false match rate
that a threshold gives on a public test does not carry over to other cameras, ages or groups of people.

The network carries the faults of the faces it was trained on. Error rates differ between groups of people (age, sex,
skin colour, origin) and have to be measured for those concerned. Small, blurred, covered or turned faces, and ones that
are not aligned as in training, are told apart worse. It does not tell whether a face is live, and knows nothing of
emotions or character. No decision that matters to a person should rest on it alone. Embeddings of faces are biometric
data: in many countries processing them needs a legal basis or consent."""


def _licence(facts: ModelFacts) -> str:
    sets = f" ({facts.training_sets})" if facts.training_sets else ""
    said = f"The weights: {facts.licence}." if facts.licence else "No licence was stated for these weights."
    return f"{said} The face sets that they were trained on{sets} have terms of their own, many for research alone."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """A line of it, with what would end the cell as a letter."""
    return " ".join(text.splitlines()).replace("|", "\\|")


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"


def card_settings(settings: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]) -> str:
    """The config.json beside the card: the settings by section, and as section `export` what the files say."""
    return json.dumps({**settings, "export": dict(metadata)}, indent=2) + "\n"
