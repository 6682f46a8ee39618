"""The verbs that make a model which stays as it is: `sparsify` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import AnyDevice, BundleArgument, Device, Dtype, Kinds, Out, Pipe, load, words

DenoiserOnly = Annotated[
    bool, typer.Option("--denoiser-only", help="Write the denoiser's folder alone, not the whole pipeline.")
]


def sparsify(
    pipe: Pipe,
    calibration: Annotated[
        Path | None, typer.Option(help="What `calibrate` wrote, with --layers all for all layers. None for magnitude.")
    ] = None,
    out: Out = Path("out/sparse"),
    pattern: Annotated[
        str, typer.Option(help="2:4 (of every 4 weights 2 stay), any N:M, or a share of zeros: 0.5.")
    ] = "2:4",
    method: Annotated[str, typer.Option(help="obs (the others make up for it), wanda or magnitude.")] = "obs",
    kinds: Kinds = None,
    keep_dense: Annotated[
        str | None, typer.Option(help="Layers to leave alone, with wildcards, separated by commas.")
    ] = None,
    damping: Annotated[float, typer.Option(help="Relative damping of the Hessians.")] = 0.01,
    denoiser_only: DenoiserOnly = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Zero single weights and save a plain pipeline that any diffusers loads: as large as before, and only 2:4 can be
    faster, on GPUs that have kernels for it.
    """
    from .api_static import sparsify as run
    from .calibration import Calibration
    from .plain_folder import check_plain_folder

    check_plain_folder(out)  # before minutes of work, not after
    pipeline = load(pipe, device, dtype)
    model = run(
        pipeline,
        Calibration.load(calibration) if calibration else None,
        pattern=pattern,
        method=method,
        kinds=words(kinds) if kinds else None,
        keep_dense=words(keep_dense) if keep_dense else (),
        damping=damping,
    )
    model.save(model.denoiser_of(pipeline) if denoiser_only else pipeline, out)
    typer.echo(f"{model}\nsaved to {out}")


def export(
    pipe: Pipe,
    bundle: BundleArgument,
    out: Out = Path("out/plain"),
    sparsity: Annotated[
        float | None, typer.Option(help="Of the level. Default: the only one of the bundle's schedule.")
    ] = None,
    stage: Annotated[int, typer.Option(min=0, help="Of a bank with orders or consumers per stage.")] = 0,
    zeros: Annotated[
        bool,
        typer.Option("--zeros", help="Fill what is removed with zeros: for any level, as large and slow as dense."),
    ] = False,
    denoiser_only: DenoiserOnly = False,
    device: AnyDevice = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Save one level as a plain pipeline that any diffusers loads. Levels of --method depth become smaller; those of
    heads and neurons have no configuration in diffusers, so they are refused but for --zeros.
    """
    from .api_static import export as run
    from .hosts.diffusers import find_denoiser
    from .plain_folder import check_plain_folder

    check_plain_folder(out)  # before minutes of work, not after
    pipeline = load(pipe, device, dtype)
    target = find_denoiser(pipeline)[1] if denoiser_only else pipeline
    folder = run(target, bundle, out, sparsity=sparsity, stage=stage, form="zeros" if zeros else "small")
    typer.echo(f"saved to {folder}")
