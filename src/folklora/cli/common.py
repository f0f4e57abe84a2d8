"""Arguments that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, such as recipes/banking77.toml", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="A run directory", show_default=False)]
FederationFolder = Annotated[Path, typer.Argument(help="A federation's folder", show_default=False)]
Days = Annotated[int, typer.Option(help="How long the server's certificate holds")]
Listen = Annotated[
    str | None,
    typer.Option("--host", help="Interface to listen on; default: loopback or all, by the federation's host"),
]
Port = Annotated[int | None, typer.Option(help="Port to listen on; default: the federation's")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Plain HTTP; on one machine only (loopback)")]
Tuned = Annotated[bool, typer.Option("--tuned", help="Before the server's last reply: as its own training left it")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.lr=1e-3 (repeatable)")]
Precision = Annotated[Literal["float32", "bfloat16"], typer.Option(help="What the models compute in")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there")]
