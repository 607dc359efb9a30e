"""The command ``effcompile``: demo, inspect, methods, doctor."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="A torch.compile back end that rewrites transformers into efficient forms, and says what it did and why.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]


def _version(wanted: bool) -> None:
    if wanted:
        import effcompile

        print(effcompile.__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="Length of the prompt, 300 to 8,000.")] = 7000,
    bits: Annotated[str, typer.Option(help="Of keys and values: 16, 8, 4, 3 or 2, or two such as 8,4.")] = "4",
    skip_inductor: Annotated[bool, typer.Option("--skip-inductor", help="Leave out stock torch.compile.")] = False,
    as_json: AsJson = False,
) -> None:
    """A real model with a 4-bit cache, beside eager and stock Inductor: time, memory, perplexity, answer."""
    from effcompile import demo as module

    raise typer.Exit(module.main(tokens=tokens, bits=bits, skip_inductor=skip_inductor, as_json=as_json))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def inspect(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a transformers model, or its id on the hub.")],
    method: Annotated[
        str, typer.Option(help="Which method to apply; see [bold]effcompile methods[/].")
    ] = "compress_kv",
    tokens: Annotated[int, typer.Option(min=1, help="Length of the random prompt.")] = 64,
    verify: Annotated[bool, typer.Option("--verify", help="Compare each rewritten site with what was there.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Print what changed in the graphs, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compile MODEL with a method, read a random prompt, write three tokens, and report every site.

    The method's own options are given by their names, such as --key-bits 8 --value-bits 4.
    """
    from effcompile.passes import base, options
    from effcompile.passes.report import inspect as look

    told = Console(stderr=True)
    try:
        if method not in base.REGISTRY:
            raise options.unknown("method", method, base.REGISTRY, "--method")
        chosen = options.build(base.get(method), _method_options(context.args), "command line")
        with told.status(f"loading {model}"):
            network = _load(model)
        with told.status("compiling"):
            options.decorate(network, chosen)
            network.compile(backend="effcompile", options={"verify": verify})
            _generate(network, tokens)
    except (options.OptionError, _LoadError) as problem:
        told.print(Text(str(problem), "red"))
        raise typer.Exit(2) from None
    report = look(network)
    if as_json:
        print(report.to_json())
        return
    print(report)
    if diff:
        print(report.diff())


plans = typer.Typer(no_args_is_help=True, help="Look at plans that calibration has made.")
app.add_typer(plans, name="plan")

Folder = Annotated[Path, typer.Argument(help="Folder of a plan, as Plan.save writes it.")]


def _plan(folder: Path) -> Any:
    from effcompile.runtime.plan import Plan, PlanError

    try:
        return Plan.load(folder)
    except (PlanError, FileNotFoundError) as problem:
        Console(stderr=True).print(Text(str(problem), "red"))
        raise typer.Exit(2) from None


@plans.command()
def show(folder: Folder, as_json: AsJson = False) -> None:
    """Every record of a plan: module, pass, options, and what was measured while calibrating."""
    plan = _plan(folder)
    if as_json:
        print(json.dumps({"made": plan.made, "records": [json.loads(record.text) for record in plan]}, indent=1))
        return
    table = Table("module", "pass", "options", "measured", "tensors")
    for r in plan:
        table.add_row(
            r.module,
            " on ".join([r.method, *r.on]),
            ", ".join(f"{name}={value!r}" for name, value in r.options.items()),
            "\n".join(f"{name} {x:.4g}" for name, x in r.numbers.items()),
            "\n".join(f"{name} {tuple(t.shape)}" for name, t in r.tensors.items()),
        )
    console = Console()
    console.print(table)
    console.print(Text(", ".join(f"{name}: {value}" for name, value in plan.made.items()), "dim"))


@plans.command()
def diff(one: Folder, other: Folder) -> None:
    """What is different in two plans; ends with 1 if anything is."""
    first, second = _plan(one), _plan(other)
    lines = first.diff(second)
    for line in lines:
        print(line)
    raise typer.Exit(1 if lines else 0)


class _LoadError(Exception):
    """The model could not be read; the text says why."""


def _method_options(words: list[str]) -> dict[str, Any]:
    """``--key-bits 8 --flag`` as ``{"key_bits": 8, "flag": True}``."""
    from effcompile.passes.options import OptionError

    given: dict[str, Any] = {}
    rest = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            raise OptionError(f"command line: {name!r} is not an option; write --name value.")
        text = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        given[name[2:].replace("-", "_")] = value
    return given


def _load(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    local = Path(model).expanduser()
    try:
        return AutoModelForCausalLM.from_pretrained(str(local) if local.exists() else model).eval()
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise _LoadError(f"{model}: {first} Give a folder written by save_pretrained, or an id.") from None


def _generate(model: Any, tokens: int) -> None:
    """A random prompt and three tokens: enough to compile both graphs."""
    import torch

    config = model.config.get_text_config(decoder=True)
    seed = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=seed).to(model.device)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=3,
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )


@app.command()
def methods(as_json: AsJson = False) -> None:
    """Every method: its name, paper, phases, and options with their defaults."""
    from effcompile.passes import base

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "summary": cls.summary,
            "paper": cls.paper,
            "phases": list(cls.phases),
            "options": {o: {"type": base.type_name(t), "default": d} for o, (t, d) in base.fields_of(cls).items()},
            "exact_at": dict(cls.limit),
        }
        for name, cls in ((name, base.get(name)) for name in base.REGISTRY)
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(show_lines=True)
    for column in ("method", "options and defaults", "phases", "exact at", "paper"):
        # Options are read as lines: what else is there takes more of them.
        table.add_column(column, overflow="fold", min_width=36 if column.startswith("options") else None)
    for row in rows:
        given = "\n".join(f"{o}: {facts['type']} = {facts['default']!r}" for o, facts in row["options"].items())
        exact = "\n".join(f"{o}={value!r}" for o, value in row["exact_at"].items())
        table.add_row(f"{row['name']}\n[dim]{row['summary']}", given, "\n".join(row["phases"]), exact, row["paper"])
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@app.command()
def doctor() -> None:
    """Is everything here that effcompile needs? One line for each thing, and what to do; 1 if something fails."""
    from effcompile import doctor as module

    raise typer.Exit(module.main())
