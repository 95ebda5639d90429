"""The commands by name and stage, and command lines for users to paste.

`hgnl train ...` and `python -m aggregate.train ...` are the same. Messages use the form that this
process was started with.
"""

import difflib
import json
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

# stage -> command -> its module and a description
STAGES: dict[str, dict[str, tuple[str, str]]] = {
    "Features": {
        "extract": ("extract", "videos in, a feature store out"),
        "ingest": ("extract.ingest", "features of other tools in, a feature store out"),
        "status": ("extract.status", "the contents of a store, and why videos failed"),
        "verify": ("extract.verify", "check every byte of a store against its checksum"),
        "export": ("extract.export", "features as .npy or HDF5 for other tools"),
    },
    "Models": {
        "train": ("aggregate.train", "train a head on stored features"),
        "evaluate": ("aggregate.evaluate", "test a model and write its scores"),
        "crossval": ("aggregate.crossval", "compare heads on all videos of a store"),
        "ablate": ("aggregate.ablate", "train many configurations in one pass"),
        "finetune": ("aggregate.finetune", "train end to end, through the backbone"),
        "audit": ("aggregate.audit", "near-duplicates across splits, labels that look wrong"),
        "complexity": (
            "aggregate.complexity",
            "parameters and multiplications: the paper's Tables 1 and 2",
        ),
    },
    "Ensemble": {
        "ensemble": ("ensemble", "fuse the scores of several models"),
        "submit": ("ensemble.submit", "check or grade a submission"),
    },
    "Use": {
        "predict": ("pipelines.predict", "classify videos with a trained model"),
        "report": ("pipelines.report", "one HTML page of a folder of runs"),
        "export-onnx": ("pipelines.export", "a model as ONNX, from pixels to logits"),
    },
    "Recipes": {
        "demo": ("pipelines.demo", "everything, on real clips that come with the package"),
        "kinetics700": ("pipelines.kinetics700", "the iQIYI system on a folder of Kinetics-700"),
    },
}
COMMANDS = {name: module for stage in STAGES.values() for name, (module, _) in stage.items()}
_PACKAGES = ("extract", "aggregate", "ensemble", "pipelines")
_ALSO_RUN = ("pipelines", "pipelines.untrimmed", "extract.decode.pool")  # by `python -m`


def refuse_other_modules() -> None:
    """Exit with an error for `python -m ensemble.search`, which would print nothing and look like
    success: it is not a command.

    Called while one of the four packages is imported for `python -m`.
    """
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
    commands = (*COMMANDS.values(), *_ALSO_RUN)
    if module.split(".")[0] in _PACKAGES and module.removesuffix(".__main__") not in commands:
        nearest = difflib.get_close_matches(module, commands, n=1, cutoff=0.8)
        hint = (
            f"did you mean {nearest[0]}?" if nearest else "`python -m pipelines` lists the commands"
        )
        print(f"error: {module} is not a command; {hint}", file=sys.stderr)
        sys.exit(2)


def program(module: str) -> list[str]:
    """The start of a command line for `module`: `hgnl train`, or `.venv/bin/python -m
    aggregate.train`."""
    main_spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = {target: name for name, target in COMMANDS.items()}.get(module)
    if name is None or (main_spec is not None and main_spec.name.split(".")[0] in _PACKAGES):
        return [sys.orig_argv[0], "-m", module]
    script = sys.argv[0]
    if Path(script).name != "hgnl" or shutil.which("hgnl") == script:
        script = "hgnl"
    return [script, name]


def command_line(module: str, *arguments: object, **options: Any) -> str:
    """A whole command, quoted for a POSIX shell.

    `options` are flags: True is a flag alone, a list is several values; None, False and an empty
    list are left out.
    """
    line = [*program(module), *map(str, arguments)]
    for name, value in options.items():
        if value is None or value is False or value == ():
            continue
        values = value if isinstance(value, list | tuple) else [value]
        line += [flag_of(name), *([] if value is True else map(str, values))]
    return shlex.join(line)


def first_training(store: str) -> str:
    """The command that trains a first model on a store, in a folder that is not in use."""
    folder = "runs/tsn" if not Path("runs/tsn").exists() else f"runs/{Path(store).stem}_tsn"
    return command_line("aggregate.train", agg="tsn", features=store, out=folder)


def flag_of(name: str) -> str:
    """The flag of the option `name`: `--batch-size` of batch_size."""
    return f"--{name.replace('_', '-')}"


def spaced(value: Any) -> str:
    """A value as it follows its flag: several values are separated by spaces."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def command_of(module: str, options: Any, **changes: Any) -> str:
    """The whole command of these `options` (a dataclass), those at their default left out."""
    flags = {}
    for field in fields(options):
        value = changes.get(field.name, getattr(options, field.name))
        if value != field.default:
            # `--normalize True` if the default is None: False is a third value then
            flags[field.name] = (
                value if field.default is False or not isinstance(value, bool) else str(value)
            )
    return command_line(module, **flags)


def install_command(extra: str) -> str:
    """The command that adds an extra of this package (`demo`, `gpu` ...), in the form in which the
    package was installed."""
    import importlib.metadata  # 30 ms
    from importlib.util import find_spec

    installer = "pip install" if find_spec("pip") else "uv pip install"
    # The *.egg-info of a checkout, first on the path of `python -m`, does not record the origin.
    origins = [
        distribution.read_text("direct_url.json")
        for distribution in importlib.metadata.distributions(name="hgnl-video")
    ]
    if not origins:  # a checkout on PYTHONPATH
        return f"{installer} {shlex.quote(f'{Path(__file__).parents[1]}[{extra}]')}"
    origin = json.loads(next(filter(None, origins), "{}"))
    folder = origin.get("url", "").removeprefix("file://")
    if not folder or "dir_info" not in origin:
        return f"{installer} 'hgnl-video[{extra}]'"
    editable = "-e " if origin["dir_info"].get("editable") else ""
    return f"{installer} {editable}{shlex.quote(f'{folder}[{extra}]')}"
