"""Results of several models: their files, and one table of all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import tables

from .methods import DEFAULT, METHODS
from .statistics import Table, by_text, mean, ratio

PEERS = [method.name for method in METHODS if method.family in ("peer", "null")]

Others = Mapping[str, Mapping[str, Any]]
"""Results of other models, by the names of their files."""


def name_of(model: str) -> str:
    """The name of a model's files. Those of the packaged one have none of a model."""
    return "quality" if model == "packaged" else f"quality-{Path(model).name.lower()}"


def others(folder: Path, name: str) -> Others:
    """The tables of other models in a folder."""
    found = {path.stem: tables.read(path) for path in sorted(folder.glob("quality*.csv")) if path.stem != name}
    return {stem: {**head, "records": records} for stem, (head, records) in found.items()}


def model_of(result: Mapping[str, Any]) -> str:
    given: str = result["plan"]["model"]
    return "SmolLM2-135M-Instruct" if given == "packaged" else Path(given).name


def retentions_of(kl: Table) -> list[float]:
    return sorted({retention for method, retention in kl if method == DEFAULT})


def best_peer(table: Table, retention: float) -> str:
    return min((name for name in PEERS if (name, retention) in table), key=lambda name: mean(table[name, retention]))


def shown(interval: Any, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{interval.value:{plus}.2f} ({interval.low:{plus}.2f} to {interval.high:{plus}.2f})"


def side_by_side(result: Mapping[str, Any], beside: Others) -> list[str]:
    """The default by the best peer of each model, where more than one was measured."""
    if not beside:
        return []
    fidelities = {model_of(one): by_text(one["records"], "fidelity", "kl") for one in (result, *beside.values())}
    columns = sorted({retention for kl in fidelities.values() for retention in retentions_of(kl)})
    rows = []
    for model, kl in fidelities.items():
        own = retentions_of(kl)
        cells = (
            f"{shown(ratio(kl[DEFAULT, r], kl[peer, r]))} {peer}" if r in own and (peer := best_peer(kl, r)) else ""
            for r in columns
        )
        rows.append((model, len(kl[DEFAULT, own[0]]), *cells))
    return [
        "## Models side by side",
        "",
        "KL of the default by that of the model's best peer, over each model's own texts; in brackets the interval.",
        "",
        *tables.markdown(("model", "texts", *(f"{r:.0%}" for r in columns)), rows).splitlines(),
        "",
        "Pages of the others: " + ", ".join(f"[{model_of(one)}]({name}.md)" for name, one in beside.items()),
    ]
